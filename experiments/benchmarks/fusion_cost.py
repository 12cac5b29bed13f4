"""What does each fusion add to GF-MH's training step?

    python -m experiments fusion_cost
    python -m experiments fusion_cost --only=mingru,linrec --width=384 --blocks=10

The trainer's own step on random tokens, 8 rows of 2048. GF-MH's program and those of fusions run in
turn, a stretch of steps each: what a fusion adds is the ratio of its stretch to GF-MH's just
before, less one. --seeds is the number of stretches here; numbers are medians, and the ends of
their range. Programs compile in processes of their own, --at_once at a time; these are timed when
all of them are ready, and the result is written anew with their rows.
"""

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from experiments import lab
from experiments.lab import command, programs, results
from experiments.lab.timing import Trainer, spread
from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, count_parameters
from gt_jax.training import backend
from gt_jax.training.model import make_model_config

NAME, BASE = "GF-MH", "gf"  # what others are compared with, and its fusion
VOCAB = 65
SHAPE = {"train.batch_size": 8, "train.seq_len": 2048}
HEAD = 32  # channels of an RWKV head
SECONDS = 0.4  # of a stretch, about


def main(argv=None):
    parser = command.parser("fusion_cost", __doc__)
    parser.add_argument("--only", default=",".join(FUSIONS), help="fusions, with commas between")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--blocks", type=int, default=8, help="of the model")
    many = max(1, (os.cpu_count() or 1) - 4)
    parser.add_argument("--at_once", type=int, default=many, help="fusions that compile together")
    options = command.parse(parser, argv)
    others = [name for name in command.one_of(FUSIONS, options.only, "--only") if name != BASE]
    others = others[:1] if options.quick else others
    if not others:
        raise InputError(f"--only={options.only} must name a fusion besides {BASE}")
    if options.at_once < 1:
        raise InputError(f"--at_once={options.at_once} must be 1 or more")
    wanted = {name: changes(options, name) for name in [BASE, *others]}
    config, *_ = configs = [lab.make_config(fields) for fields in wanted.values()]
    for each in configs:  # what cannot be is said before a process starts
        make_model_config(each, VOCAB)
    # The processes share the device's memory: none may take most of it beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = {}
    with contextlib.ExitStack() as stack:
        base = Program(stack, wanted[BASE], options.quick)
        for first in range(0, len(others), options.at_once):
            with contextlib.ExitStack() as lot:
                names = others[first : first + options.at_once]
                made = {name: Program(lot, wanted[name], options.quick) for name in names}
                rows |= timed({BASE: base} | made, len(options.seeds))
            write(options, config, rows)


def changes(options, fusion):
    """The config fields of a run."""
    fields = {"model.preset": "gf-mh" if fusion == BASE else "gf", "model.fusion": fusion}
    size = {"dim": options.width, "layers": options.blocks, "heads": options.width // HEAD}
    fields |= {f"model.{field}": value for field, value in size.items()}
    return fields | SHAPE | command.common(options)


class Program:
    """A run's training step in a process of its own, which compiles it at once."""

    def __init__(self, stack, fields, quick):
        worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.worker = stack.enter_context(worker)
        self.ready = worker.submit(_compile, fields, 0.0 if quick else SECONDS)

    def stretch(self):
        """ms a step."""
        return self.worker.submit(_stretch).result()


_here = {}  # of a Program's process: its Trainer, and how many steps a stretch has


def _compile(fields, seconds):
    """{"parameters", "MiB", "compile s"} of a run."""
    backend.prepare()
    trainer = Trainer(lab.make_config(fields), VOCAB)
    _here["trainer"] = trainer
    trainer.run(2)
    _here["steps"] = max(1, round(seconds / trainer.run(1)))
    return {
        "parameters": count_parameters(trainer.model.config)["total"],
        "MiB": programs.program_bytes(trainer.compiled) / 2**20,
        "compile s": trainer.compile_seconds,
    }


def _stretch():
    return 1e3 * _here["trainer"].run(_here["steps"]) / _here["steps"]


def timed(made, stretches):
    """fusion -> what is known of it: that of `_compile`, "ms" and, of all but GF-MH, "added"."""
    known = {name: program.ready.result() for name, program in made.items()}
    ms = {name: [] for name in made}
    added = {name: [] for name in made if name != BASE}
    for _ in range(stretches):
        for name in added:
            ms[BASE].append(made[BASE].stretch())
            ms[name].append(made[name].stretch())
            added[name].append(ms[name][-1] / ms[BASE][-1] - 1)
    for name, found in known.items():
        found |= {"ms": spread(ms[name])}
        found |= {"added": spread(added[name]) if name in added else None}
    return known


def write(options, config, rows):
    named = {NAME if name == BASE else name: row for name, row in rows.items()}
    measures = {f"ms a step {name}": row["ms"] for name, row in named.items()}
    measures |= {f"added by {name}": row["added"] for name, row in named.items() if row["added"]}
    columns = ["parameters", "ms", "added", "MiB", "compile s"]
    model = config.model
    results.write(
        options,
        settings=lab.settings(config) | {"size": (model.dim, model.layers), "vocabulary": VOCAB},
        measures=measures,
        tables=[
            results.table(
                "A training step by fusion",
                ["fusion", *columns],
                [[name, *(row[column] for column in columns)] for name, row in named.items()],
                "Added to GF-MH's step: 0.1 is a tenth. MiB: of the program.",
            )
        ],
    )


if __name__ == "__main__":
    command.run(main)
