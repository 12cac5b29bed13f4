"""What a training step takes of a device's memory and time, by what it recomputes.

    python -m experiments train_memory --config=gf_mh_base,gf_mh_350m --remat=none,dots,full
    python -m experiments train_memory --config=gf_mh_350m:model.layers=24
    ... --config=gf_mh_1b,gf_mh_1b:train.seq_len=8192 --add

A config may be followed by fields to change in it, each after a colon. Every one is trained on
random tokens by the trainer's own step, in rows of its train.seq_len and as many as make --tokens
a step (or as train.batch_size says after a colon), with each model.remat of --remat.

A program has a process of its own, so that peak memory is its own. --at_once programs of a GPU
compile side by side, without a cache on disk, and are then timed one after another, those that
store least first. Where there are several GPUs, each has its share of the programs. "first step" is
compiling and running it; --seeds is the number of timed stretches, of --timed_steps steps each.
"program" is the compiler's count of what a program holds at once; where that exceeds the memory, or
the memory runs out, the program does not fit and the others continue. Rows are written to --out as
they come; --add keeps those that are there.
"""

import ast
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax

from experiments.lab import command, programs, results, workers
from experiments.lab.timing import Trainer, spread
from gt_jax.config import flatten, from_config_dict, to_dict, unflatten
from gt_jax.config_files import load_config
from gt_jax.errors import InputError
from gt_jax.models import count_parameters
from gt_jax.training import backend
from gt_jax.training.utilization import flops_per_token, peak_flops

CONFIGS = ("gf_mh_base", "gf_mh_350m", "gf_mh_1b")
REMAT = ("full", "dots", "none")  # what stores least first: what needs most is then alone
CHARACTERS = 65  # token ids where a token is a character
COLUMNS = ["config", "rows x length", "remat", "parameters", "first step s", "ms a step"]
COLUMNS += ["tokens/s", "share of peak", "peak MiB", "program MiB"]
TITLE = "Training by what the backward pass recomputes"


class Job(NamedTuple):
    """A program of training: a config, given as `name:field=value`, and its remat."""

    given: str
    remat: str
    rows: int
    length: int
    config: object  # of gt_jax.config

    @property
    def name(self):
        return f"{self.given} {self.rows} x {self.length} {self.remat}"


def main(argv=None):
    parser = command.parser("train_memory", __doc__)
    about = "configs, with commas between, each with changes as name:field=value; default: "
    about += f"{','.join(CONFIGS)}, of which --quick takes the first"
    parser.add_argument("--config", help=about)
    parser.add_argument(
        "--remat", default=",".join(REMAT), help="values of model.remat, with commas between"
    )
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--timed_steps", type=int, default=10, help="steps of a timed stretch")
    parser.add_argument("--at_once", type=int, default=4, help="programs of a GPU that compile")
    parser.add_argument("--add", action="store_true", help="keep the rows that --out has")
    options = command.parse(parser, argv)
    if options.config is None:
        options.config = ",".join(CONFIGS[:1] if options.quick else CONFIGS)
    for name in ("tokens", "timed_steps", "at_once"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}={getattr(options, name)} must be at least 1")
    # Programs share a GPU's memory: none takes most of it beforehand, and one may have nearly all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    jobs = jobs_of(options)
    path = results.path_of(options)
    before = results.read(path)["tables"][0]["rows"] if options.add and path.exists() else []
    found, lock = {}, threading.Lock()

    def keep(of_a_wave):
        with lock:
            found.update(of_a_wave)
            write_result(options, rows_of(jobs, found, before), shown=False)

    on_gpu = jax.default_backend() == "gpu" and not options.quick
    cards = jax.local_device_count() if on_gpu else 1

    def measure_on(card):
        own = jobs[card::cards]
        works = [
            workers.Work(job.name, prepare, time_steps, (options, job), 1, card) for job in own
        ]
        for first in range(0, len(works), options.at_once):
            wave = works[first : first + options.at_once]
            workers.run_all(wave, here=options.quick, each=keep)

    with ThreadPoolExecutor(cards) as pool:
        for done in [pool.submit(measure_on, card) for card in range(cards)]:
            done.result()
    write_result(options, rows_of(jobs, found, before), shown=True)


def jobs_of(options):
    """The programs of --config and --remat, those that store least first.

    Raises:
        InputError: a config or a field of one is wrong, or --tokens are no rows of its length.
    """
    chosen = command.one_of(REMAT, options.remat, "--remat")
    jobs = []
    for remat in (r for r in REMAT if r in chosen):
        for given in dict.fromkeys(options.config.split(",")):
            name, *changes = given.split(":")
            settings = flatten(to_dict(from_config_dict(load_config(name))))
            settings |= {"model.impl": options.impl, "optim.grad_accumulation": 1}
            settings["train.batch_size"] = None
            for change in changes:
                field, _, value = change.partition("=")
                if field not in settings:
                    raise InputError(f"--config={given}: {field!r} is no field of a config")
                settings[field] = read_value(value)
            settings |= command.QUICK if options.quick else {}
            length, rows = settings["train.seq_len"], settings["train.batch_size"]
            if rows is None:
                rows = options.tokens // length
                if options.tokens % length:
                    raise InputError(
                        f"--tokens={options.tokens} must be a multiple of train.seq_len={length} of"
                        f" {given}"
                    )
            settings |= {"model.remat": remat, "train.batch_size": rows}
            config = from_config_dict(unflatten(settings))
            jobs.append(Job(given, remat, rows, length, config))
    return jobs


def read_value(text):
    """A field's value: the number, True, False or None that it is in Python, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


_ready = {}  # of this process: name -> a Trainer


def prepare(options, job):
    """Compile a program without a cache, as the time that it takes is measured."""
    backend.prepare()
    jax.config.update("jax_enable_compilation_cache", False)
    data = job.config.data
    vocab = data.vocab_size if data.tokenizer == "sentencepiece" else CHARACTERS
    _ready[job.name] = Trainer(job.config, vocab, jax.local_devices()[:1])


def time_steps(options, job):
    """Numbers of a program by name, "reason" instead of the measured ones if it does not fit."""
    made = _ready.pop(job.name)
    device = jax.local_devices()[0]
    row = {"program": programs.program_bytes(made.compiled)}
    row["parameters"] = count_parameters(made.model.config)["total"]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit and row["program"] > limit:
        return row | {"reason": "does not fit"}
    try:
        made.restart()
        row["first"] = made.compile_seconds + made.run(1)
        made.run(2)
        seconds = [made.run(options.timed_steps) / options.timed_steps for _ in options.seeds]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"reason": "does not fit"}
    tokens = job.rows * job.length
    row["ms"] = spread([1e3 * s for s in seconds])
    row["rate"] = spread([tokens / s for s in seconds])
    if peak := peak_flops(device.device_kind):
        flops = flops_per_token(made.model.config, job.length)
        row["share"] = flops * row["rate"]["mean"] / peak
    row["peak"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return row


def rows_of(jobs, found, before):
    """Rows of the table: those of before that were not measured again, and what was found."""
    rows = [cells(job, found[job.name]) for job in jobs if job.name in found]
    again = {tuple(row[:3]) for row in rows}
    return [row for row in before if tuple(row[:3]) not in again] + rows


def cells(job, row):
    """A row of the table."""
    mib = lambda name: row[name] / 2**20 if row.get(name) else None
    first = [job.given, f"{job.rows} x {job.length}", job.remat, row.get("parameters")]
    numbers = [row.get(name) for name in ("first", "ms", "rate", "share")]
    if "reason" in row:
        numbers[0] = row["reason"]
    return [*first, *numbers, mib("peak"), mib("program")]


def write_result(options, rows, shown):
    """Write rows of the table, and print it if `shown`."""
    measures = {
        f"{' '.join(row[:3])} {name}": row[COLUMNS.index(name)]
        for row in rows
        for name in ("tokens/s", "share of peak", "peak MiB")
        if row[COLUMNS.index(name)] is not None
    }
    results.write(
        options,
        settings={"tokens": options.tokens, "compiled at once": options.at_once}
        | {"stretches": len(options.seeds), "steps of a stretch": options.timed_steps},
        measures=measures,
        tables=[results.table(TITLE, COLUMNS, rows)],
        notes=[
            "A time is the median of the stretches; ± is half their range. The first step is that "
            "of a process that compiles beside others, without a cache.",
        ],
        shown=shown,
    )


if __name__ == "__main__":
    command.run(main)
