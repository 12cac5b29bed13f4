"""How long training commands take as they are typed, from a cold start and from a warm one.

    python -m experiments commands --seeds=1
    python -m experiments commands --config=gf_mh_base:train.steps=200:train.eval_every=100

A config may be followed by fields to change in it, each after a colon. For every one of --seeds,
`python -m gt_jax.train` runs it twice in processes of their own, with a workdir each and one empty
folder for what compiles: the first run is cold, the second finds its programs there. "seconds" are
those of the whole process, imports, evaluations, checkpoints, sample and curve included; "compiled"
is when the training step was ready, as the run itself says. Rows are written to --out as they come.
What a run printed is shown where it fails.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.lab import command, results
from experiments.lab.timing import spread
from gt_jax.config_files import find_config, load_config
from gt_jax.errors import InputError

CONFIGS = ("gf_mh", "gf_mh_base:train.steps=200:train.eval_every=100")
STARTS = ("cold", "warm")
COLUMNS = ["command", "start", "seconds", "compiled", "tokens/s in training", "best loss"]
# What a run says of itself -> the column it is for.
SAID = {
    "compiled": re.compile(r"compiled (\d+) s after the start"),
    "tokens/s in training": re.compile(r"([\d,]+) tokens/s in training"),
    "best loss": re.compile(r"best validation loss ([\d.]+) at step"),
}


def main(argv=None):
    parser = command.parser("commands", __doc__)
    about = "configs, with commas between, each with changes as name:field=value"
    parser.add_argument("--config", default=",".join(CONFIGS), help=about)
    options = command.parse(parser, argv)
    given = list(dict.fromkeys(options.config.split(",")))
    flags = {name: flags_of(name, options) for name in given}  # wrong ones are found before a run
    # Not this process but those that it starts shall have the GPU's memory.
    env = dict(os.environ)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    found = {}
    for _ in options.seeds:
        for name in given:
            with tempfile.TemporaryDirectory(prefix="gt_jax-commands-") as folder:
                for start in STARTS:
                    row = timed(flags[name], Path(folder), start, env)
                    found.setdefault((name, start), []).append(row)
                    write_result(options, found, shown=False)
    write_result(options, found, shown=True)


def flags_of(given, options):
    """The command line of a config and its changes.

    Raises:
        InputError: there is no such config, or a change is not `field=value`.
    """
    name, *changes = given.split(":")
    load_config(name)
    for change in changes:
        if "=" not in change:
            raise InputError(f"--config={given}: {change!r} must be field=value")
    if options.source != "shakespeare":
        changes.append(f"data.source={options.source}")
    changes.append(f"model.impl={options.impl}")
    if options.quick:
        changes += [f"{field}={value}" for field, value in command.QUICK.items()]
    return [f"--config={find_config(name)}", *(f"--config.{change}" for change in changes)]


def timed(flags, folder, start, env):
    """Numbers of one run by column; those that it did not say are None.

    Raises:
        InputError: it failed; the message ends with its last lines.
    """
    line = [sys.executable, "-m", "gt_jax.train", *flags]
    line += [f"--workdir={folder / start}", f"--compile_cache={folder / 'compiled'}"]
    began = time.perf_counter()
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    row = {"seconds": time.perf_counter() - began}
    if done.returncode:
        last = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise InputError(f"a {start} run of {flags[0]} ended with {done.returncode}: {last}")
    for column, pattern in SAID.items():
        numbers = pattern.findall(done.stdout)
        row[column] = float(numbers[-1].replace(",", "")) if numbers else None
    return row


def write_result(options, found, shown):
    """Write what was found, and print it if `shown`."""
    rows, measures = [], {}
    for (name, start), runs in found.items():
        numbers = {
            column: spread([run[column] for run in runs])
            for column in COLUMNS[2:]
            if all(run[column] is not None for run in runs)
        }
        rows.append([name, start, *(numbers.get(column) for column in COLUMNS[2:])])
        measures |= {f"{name} {start} {column}": value for column, value in numbers.items()}
    results.write(
        options,
        settings={"config": options.config, "cores": os.cpu_count()},
        measures=measures,
        tables=[results.table("Whole commands", COLUMNS, rows)],
        shown=shown,
    )


if __name__ == "__main__":
    command.run(main)
