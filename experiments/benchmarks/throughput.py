"""How fast does each family train and write, and in how much memory?

    python -m experiments throughput
    python -m experiments throughput --only=GF-MH,GPT-2

Tokens per second of the trainer's own step and of the generation engine's own loop (lab/timing.py),
on random tokens, against batch, length at equal tokens per step, and size. The families have the
hybrid's parameters, embeddings apart, and a GPT-2 has as many positions as it needs. --seeds is the
number of timed stretches of each program here; all numbers are their median ± half their range,
after everything has compiled.
"""

import contextlib
import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax

from experiments import lab
from experiments.lab import command, programs, results
from experiments.lab.families import FAMILIES, HYBRID, match
from experiments.lab.statistics import estimate
from experiments.lab.timing import Decoder, Trainer, random_params, spread, total_bytes
from gt_jax.errors import InputError
from gt_jax.models import count_parameters, make_model
from gt_jax.training import backend
from gt_jax.training.model import make_model_config
from gt_jax.training.utilization import flops_per_token

VOCAB = 65
SMALL, LARGE = (128, 8), (384, 10)  # width and blocks of the hybrid
USUAL = (64, 64)  # rows and tokens in a row of the other experiments
# (size, rows, tokens in a row): more rows, longer rows of as many tokens, a larger model
TRAINING = ((SMALL, 8, 64), (SMALL, *USUAL), (SMALL, 256, 64), (SMALL, 32, 512), (SMALL, 4, 4096))
TRAINING += ((LARGE, 32, 512),)
DECODING = ((SMALL, 1), (SMALL, 256), (LARGE, 16))  # (size, rows)
SECONDS = 0.4  # of a stretch, about
POSITIONS = 1024  # of a GPT that decodes
BURSTS = 4  # of a stretch of decoding; those of 7 stretches end before the positions do
TINY = (32, 1)
QUICK = {"training": ((TINY, 4, 16),), "decoding": ((TINY, 2),)}
SECONDS_QUICK = 0.02


def main(argv=None):
    parser = command.parser("throughput", __doc__)
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, with commas between")
    options = command.parse(parser, argv)
    families = command.one_of(FAMILIES, options.only, "--only")
    if len(options.seeds) > 7:
        raise InputError(f"--seeds={len(options.seeds)} must be at most 7: a GPT runs out of text")
    training = QUICK["training"] if options.quick else TRAINING
    decoding = QUICK["decoding"] if options.quick else DECODING
    # The processes share the device's memory: none may take most of it beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    stretches, seconds = len(options.seeds), SECONDS_QUICK if options.quick else SECONDS
    trained, written = {}, {}
    with contextlib.ExitStack() as stack:
        # Processes for each family: only one thread of a process traces at a time. All compile
        # first, so that nothing disturbs what is timed.
        spawn = multiprocessing.get_context("spawn")
        workers = []
        for family, part in shares(families, training, decoding):
            worker = stack.enter_context(ProcessPoolExecutor(1, spawn))
            workers.append(
                (family, part, worker, worker.submit(compile_all, options, family, part))
            )
        for *_, ready in workers:
            ready.result()
        took = time.perf_counter() - options.began
        print(f"{sum(len(part) for _, part, *_ in workers)} programs ready after {took:.0f} s")
        found = {}
        for family, _, worker, _ in workers:
            found |= worker.submit(time_all, family, stretches, seconds).result()
            worker.shutdown()  # and what it holds of the memory is free
        for family in families:
            trained |= {(family, *p): found["train", family, *p] for p in training}
            written |= {(family, *p): found["decode", family, *p] for p in decoding}

    measures = {}
    for (family, (width, _), rows, length), row in trained.items():
        name = f"{family}, {width} wide, {rows} x {length}"
        measures |= {f"training tokens/s {name}": row["rate"], f"training MiB {name}": row["MiB"]}
    for (family, (width, _), rows), row in written.items():
        name = f"{family}, {width} wide, {rows} rows"
        measures |= {f"decoding tokens/s {name}": row["rate"], f"decoding MiB {name}": row["MiB"]}
    usual = training[0] if options.quick else (SMALL, *USUAL)
    for rows, kind, point in (
        (trained, "training", usual),
        *((written, f"decoding {point[0][0]} wide {point[1]} rows", point) for point in decoding),
    ):
        for family in families:
            speeds = [rows[(f, *point)]["rate"] for f in (family, HYBRID) if (f, *point) in rows]
            if family != HYBRID and len(speeds) == 2 and None not in speeds:
                pairs = zip(*(speed["values"] for speed in speeds))
                ratio = estimate([its / hybrid for its, hybrid in pairs])
                measures[f"{kind} speed {family} / {HYBRID}"] = ratio
    results.write(
        options,
        settings={"stretches": stretches, "size": SMALL, "large": LARGE, "vocabulary": VOCAB},
        measures={name: value for name, value in measures.items() if value is not None},
        tables=[
            results.table(
                "Training",
                ["model", "shape", "parameters", "rows x length", "tokens/s", "TFLOP/s", "MiB"],
                [row["cells"] for row in trained.values()],
                "Model FLOPs, by 6 a parameter and 12 an element of state. MiB: of the program.",
            ),
            results.table(
                "Decoding",
                ["model", "shape", "parameters", "rows", "tokens/s", "ms a token", "MiB"],
                [row["cells"] for row in written.values()],
                "At temperature 1. MiB: of parameters and states.",
            ),
        ],
        plots=plots(families, trained, written),
        notes=[
            "A rate is the median of the stretches ± half their range; intervals of ratios are of "
            "the stretches too: of timing on one machine, not of machines.",
            "A point that does not fit in the memory has no rate.",
            "GPT-2's attention is XLA's, which writes scores out; decoding, it attends over all of "
            "its 1024 positions, used or not.",
        ],
    )


def shares(families, training, decoding):
    """(family, jobs) of each process: a few for each family, where there are the cores for it."""
    jobs = [("train", *point) for point in training] + [("decode", *point) for point in decoding]
    parts = max(1, min(3, os.cpu_count() // (2 * len(families))))
    return [(family, jobs[i::parts]) for family in families for i in range(parts) if jobs[i::parts]]


_ready = {}  # of this process: (kind, *point) -> program


def compile_all(options, family, jobs):
    """Compile programs of a family, side by side, for `time_all`."""
    backend.prepare()
    make = {"train": trainer, "decode": decoder}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {job: pool.submit(make[job[0]], options, family, *job[1:]) for job in jobs}
        _ready.update({job: future.result() for job, future in waiting.items()})


def time_all(family, stretches, seconds):
    """(kind, family, *point) -> what time_training or time_decoding says of a compiled program."""

    def size(job):
        kind, made = job[0], _ready[job]
        return programs.program_bytes(made.compiled) if kind == "train" else 0

    timer = {"train": time_training, "decode": time_decoding}
    # The largest first: the others find room in what it leaves.
    return {
        (kind, family, *point): timer[kind](
            _ready[kind, *point], (family, *point), stretches, seconds
        )
        for kind, *point in sorted(_ready, key=size, reverse=True)
    }


def config_of(options, family, size, length, rows=1):
    """A family with as many parameters in its blocks as the hybrid of a size."""
    changes = command.common(options) | shape(family, size)
    changes |= {"train.batch_size": rows, "train.seq_len": length}
    if family == "GPT-2":
        changes["model.max_positions"] = length
    return lab.make_config(changes)


@functools.cache
def shape(family, size):
    return match(family, size, vocab_size=VOCAB, length=POSITIONS, counted="blocks")


def trainer(options, family, size, rows, length):
    return Trainer(config_of(options, family, size, length, rows), VOCAB)


def decoder(options, family, size, rows):
    config = config_of(options, family, size, POSITIONS)
    model = make_model(make_model_config(config, VOCAB))
    return model, Decoder(model, random_params(model), rows)


def time_training(made, point, stretches, seconds):
    """{"rate", "MiB", "cells"} of a Trainer; no rate if it does not fit."""
    family, _, rows, length = point
    rate, size = None, programs.program_bytes(made.compiled)
    if size <= programs.bytes_free():
        try:
            made.run(2)
            steps = max(1, round(seconds / made.run(1)))
            rate = spread([steps * rows * length / made.run(steps) for _ in range(stretches)])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    flops = flops_per_token(made.model.config, length)
    cells = [*described(family, made.model), f"{rows} x {length}", rate]
    cells += [rate and flops * rate["mean"] / 1e12, size / 2**20]
    return {"rate": rate, "MiB": size / 2**20, "cells": cells}


def time_decoding(made, point, stretches, _):
    """{"rate", "MiB", "cells"} of a model and its Decoder."""
    (family, _, rows), (model, made) = point, made
    rate = spread([rows / made.run(BURSTS) for _ in range(stretches)])
    size = (total_bytes(made.weights) + total_bytes(made.slots.state)) / 2**20
    cells = [*described(family, model), rows, rate, 1e3 * rows / rate["mean"], size]
    return {"rate": rate, "MiB": size, "cells": cells}


def described(family, model):
    c = model.config
    return [family, f"{c.dim} x {c.layers}", count_parameters(c)["total"]]


def plots(families, trained, written):
    """Rates against rows, length and rows decoded, at the smaller size."""
    shortest = min(length for *_, length in trained)
    most = max(rows * length for *_, rows, length in trained)
    axes = {
        ("Training, by rows", f"rows of {shortest} tokens"): (
            *(trained, lambda rows, length: length == shortest, 0),
        ),
        ("Training, by length", f"tokens in a row, {most} a step"): (
            *(trained, lambda rows, length: rows * length == most, 1),
        ),
        ("Decoding", "rows"): (written, lambda rows: True, 0),
    }
    made = []
    for (title, axis), (found, belongs, place) in axes.items():
        series = []
        for family in families:
            points = {
                point[place]: row["rate"]
                for (f, size, *point), row in found.items()
                if f == family and size in (SMALL, TINY) and belongs(*point) and row["rate"]
            }
            ends = {p: [points[x][p] for x in sorted(points)] for p in ("mean", "low", "high")}
            ends["y"] = ends.pop("mean")
            if points:
                series.append({"name": family, "x": sorted(points)} | ends)
        made.append(results.plot(title, axis, "tokens/s", series, log="xy"))
    return made


if __name__ == "__main__":
    command.run(main)
