"""How much faster do several GPUs of one host train than one, and what do they exchange?

    python -m experiments parallel --config=gf_mh_350m --rows=16
    python -m experiments parallel --parts=data,fsdp --config=gf_mh_1b --rows=8

Parts: `data` and `fsdp` train --config with --rows rows a card on one card and on all, with copied
and with cut parameters (the speedup is that of tokens per second: n cards do n times the work);
`recurrences` runs the two kernels, forward and backward, on one row of --length tokens that the
cards share; `sequence` trains gf_mh_base on one such row (the speedup is that of the same work).

It is the trainer's own step on random tokens. --seeds is the number of timed stretches, of
--timed_steps steps each. "collectives" is the share of the time in which kernels run that exchange
data, or wait for another card, and "exposed" that in which no other kernel runs beside them, from a
profiler's trace of three steps. "loss difference" is the largest relative one of five steps to one
card's on the same batches; "same bits" says whether these five steps give the same losses and
parameters in a second run. Every program has a process of its own, so that peak memory is its own,
and all compile before the first is timed.
"""

import contextlib
import multiprocessing
import os
import statistics
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command, programs, results, traces
from experiments.lab.recurrences import (
    OPS,
    STATE_SIZE,
    compile_recurrence,
    largest_difference,
    make_inputs,
)
from experiments.lab.timing import Trainer, spread, timings, trainer_of
from gt_jax.config import from_config_dict
from gt_jax.config_files import load_config
from gt_jax.errors import InputError
from gt_jax.training import backend, parallel

PARTS = ("recurrences", "data", "fsdp", "sequence")
LONG = "gf_mh_base"  # of part `sequence`
HEADS = {"wkv6": 32, "ssd": 64}  # of the recurrences
COMPARED = 5  # steps whose losses are compared
TRACED = 3  # steps
TRAINING_COLUMNS = ["config", "mode", "cards", "rows x length", "ms a step", "tokens/s", "speedup"]
TRAINING_COLUMNS += ["peak MiB a card", "state MiB a card", "collectives", "exposed"]
TRAINING_COLUMNS += ["loss difference", "same bits", "compile s"]
RECURRENCE_COLUMNS = ["recurrence", "cards", "length", "ms", "speedup", "MiB a card", "difference"]


class Job(NamedTuple):
    """A program of training and where it runs."""

    mode: str  # "one card", "data", "fsdp", "sequence", or "reference": losses of one card
    config: str
    cards: int
    changes: dict  # of the config

    @property
    def name(self):
        return f"{self.config} {self.mode}"

    @property
    def tokens(self):
        return self.changes["train.batch_size"] * self.changes["train.seq_len"]


def main(argv=None):
    parser = command.parser("parallel", __doc__)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to measure, see above, with commas between"
    )
    parser.add_argument("--config", default="gf_mh_350m", help="config that data and fsdp train")
    parser.add_argument("--rows", type=int, default=16, help="rows of each card in data and fsdp")
    parser.add_argument(
        "--length", type=int, default=131072, help="tokens of the row that cards share"
    )
    parser.add_argument("--timed_steps", type=int, default=10, help="steps of a timed stretch")
    options = command.parse(parser, argv)
    parts = command.one_of(PARTS, options.parts, "--parts")
    # The processes share the memory of the devices: none may take most of it beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cards = jax.device_count()
    if cards < 2:
        raise InputError("there is one device; this compares several with one")
    if options.length % cards:
        raise InputError(f"--length={options.length} must be a multiple of the {cards} devices")
    jobs = training_jobs(options, parts, cards)
    work = [("recurrences", prepare_recurrences, time_recurrences, None)]
    work = work if "recurrences" in parts else []
    work += [(job.name, prepare_training, time_training, job) for job in jobs]
    found = run_all(options, work)
    rows = found.get("recurrences", [])
    if isinstance(rows, dict):  # the reason why there are none
        rows = [[op, cards, rows["reason"]] + [None] * 4 for op in OPS]
    trained = compare(jobs, found)
    measures = {
        f"{job.name} {name}": row[name]
        for job, row in trained
        for name in ("tokens/s", "speedup", "collectives", "exposed", "state bytes")
        if row.get(name) is not None
    }
    measures |= {f"{row[0]} speedup": row[4] for row in rows if row[4] is not None and row[1] > 1}
    results.write(
        options,
        settings={"cards": cards, "rows": options.rows, "length": options.length}
        | {"stretches": len(options.seeds), "steps of a stretch": options.timed_steps},
        measures=measures,
        tables=[
            results.table("Recurrences, forward and backward", RECURRENCE_COLUMNS, rows),
            results.table("Training", TRAINING_COLUMNS, [cells(job, row) for job, row in trained]),
            results.table(
                "Collectives",
                ["config", "mode", "kernel", "ms a step"],
                [
                    [job.config, job.mode, kernel, ms]
                    for job, row in trained
                    for kernel, ms in row.get("kernels", {}).items()
                ],
            ),
        ],
        notes=["A time is the median of the stretches; ± is half their range."],
    )


def training_jobs(options, parts, cards):
    """The programs of training that some parts need, in the order in which they are timed."""
    quick = command.QUICK if options.quick else {}
    rows = quick.get("train.batch_size", options.rows)
    length = quick.get("train.seq_len", load_config(options.config).train.seq_len)
    # One update before the second step: the losses compared are of parameters that moved.
    common = quick | {"optim.grad_accumulation": 1, "optim.warmup_steps": 1}
    common |= {"model.impl": options.impl, "train.seq_len": length}
    several = common | {"train.batch_size": rows * cards}
    jobs = []
    if {"data", "fsdp"} & set(parts):
        one = Job("one card", options.config, 1, common | {"train.batch_size": rows})
        jobs.append(one)
        if "data" in parts:
            jobs.append(Job("data", options.config, cards, several))
        if "fsdp" in parts:
            jobs.append(Job("fsdp", options.config, cards, several | {"parallel.fsdp": cards}))
        again = several | {"optim.grad_accumulation": cards}
        jobs.append(Job("reference", options.config, 1, again))
    if "sequence" in parts:
        long = common | {"train.batch_size": 1, "train.seq_len": options.length}
        jobs.append(Job("one card, long", LONG, 1, long))
        jobs.append(Job("sequence", LONG, cards, long | {"parallel.sequence": cards}))
    return jobs


def run_all(options, work):
    """name -> what was measured, or {"reason": why nothing was}, of (name, prepare, time, job)."""
    spawn = multiprocessing.get_context("spawn")
    make = ThreadPoolExecutor if options.quick else ProcessPoolExecutor
    found = {}
    with contextlib.ExitStack() as stack:
        waiting = []
        for name, prepare, measure, job in work:
            worker = stack.enter_context(make(1) if options.quick else make(1, spawn))
            waiting.append((name, measure, job, worker, worker.submit(prepare, options, job)))
        made = {name: attempt(ready.result) for name, *_, ready in waiting}
        for name, measure, job, worker, _ in waiting:
            if made[name] is None:
                found[name] = attempt(worker.submit(measure, options, job).result)
            else:
                found[name] = made[name]
            print(f"{name}: {found[name]}", flush=True)  # should a later one end it all
            worker.shutdown()  # and what it holds of the memory is free
    return found


def attempt(get):
    """get(), or {"reason": why it fails, in a line}. Wrong input is raised."""
    try:
        return get()
    except InputError:
        raise
    except Exception as error:  # the other programs are measured nevertheless
        traceback.print_exc()
        first, *_ = [*str(error).splitlines(), ""]
        return {"reason": f"{type(error).__name__}: {first[:200]}"}


_ready = {}  # of this process: name -> what `prepare_...` made


def prepare_training(options, job):
    """Compile a program and that of its first state, side by side."""
    backend.prepare()
    given = load_config(job.config)
    given.update_from_flattened_dict(job.changes)
    config, vocab = from_config_dict(given), 97 if options.quick else given.data.vocab_size
    devices = jax.devices()[: job.cards]
    with ThreadPoolExecutor(2) as pool:
        trainer = pool.submit(Trainer, config, vocab, devices)
        init = pool.submit(compile_init, config, vocab, devices)
        _ready[job.name] = trainer.result(), init.result()


def compile_init(config, vocab, devices):
    """random key -> TrainState of a new run, compiled."""
    mesh = parallel.make_mesh(config.parallel.fsdp, config.parallel.sequence, devices)
    init = trainer_of(config, vocab)[-1]
    with programs.LOWERING:
        sharding = parallel.state_sharding(mesh, jax.eval_shape(init, jax.random.key(0)))
        lowered = jax.jit(init, out_shardings=sharding).lower(jax.random.key(0))
    return lowered.compile()


def time_training(options, job):
    """Numbers of a Trainer by name; of a reference the losses alone."""
    made, init = _ready[job.name]

    def first_steps():
        made.restart()  # also lets go of the state before
        made.restart(init(jax.random.key(0)))
        return made.losses(COMPARED), jax.device_get(checksums(made.state.params))

    losses, sums = first_steps()
    row = {"losses": losses, "compile s": made.compile_seconds}
    if job.mode == "reference":
        return row
    again = first_steps()
    row["same bits"] = losses == again[0] and bool(np.array_equal(sums, again[1]))
    made.run(2)
    steps = options.timed_steps
    seconds = [made.run(steps) / steps for _ in options.seeds]
    row["ms"] = spread([1e3 * s for s in seconds])
    row["tokens/s"] = spread([job.tokens / s for s in seconds])
    stats = [device.memory_stats() or {} for device in jax.devices()[: job.cards]]
    row["peak"] = max(s["peak_bytes_in_use"] for s in stats) if all(stats) else None
    row["program"] = programs.program_bytes(made.compiled)
    row["state bytes"] = bytes_a_card((made.state.params, made.state.opt_state))
    shares = traces.collective_shares(traces.kernels(lambda: made.run(TRACED)))
    if shares:
        row["collectives"], row["exposed"] = shares["collective"], shares["exposed"]
        row["kernels"] = {name: ms / TRACED for name, ms in shares["ms"].items()}
    return row


@jax.jit
def checksums(tree):
    """[leaves] uint32, sums of the bits of each array."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in jax.tree.leaves(tree)]
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in bits])


def bytes_a_card(tree):
    """Of a tree of arrays, what one device holds."""
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return int(sum(np.prod(shape, dtype=int) * dtype.itemsize for shape, dtype in shapes))


def prepare_recurrences(options, _):
    """Compile both recurrences on one device and on all."""
    backend.prepare()
    with ThreadPoolExecutor(4) as pool:
        waiting = {
            (op, cards): pool.submit(
                compile_recurrence, op, shape_of(options, op), cards, options.impl
            )
            for op in OPS
            for cards in (1, jax.device_count())
        }
        _ready["recurrences"] = {name: future.result() for name, future in waiting.items()}


def shape_of(options, op):
    heads, length = (2, 64) if options.quick else (HEADS[op], options.length)
    return 1, length, heads, STATE_SIZE[op]


def time_recurrences(options, _):
    """Rows of the table: of each recurrence, one device and all."""
    effort = {"seconds": 0.1, "least_calls": 3, "repeats": len(options.seeds)}
    rows = []
    for op in OPS:
        one, known = None, None
        shape = shape_of(options, op)
        arguments = make_inputs(op, shape, jax.random.key(0))
        for cards in (1, jax.device_count()):
            run, shardings = _ready["recurrences"][op, cards]
            placed = jax.device_put(arguments, shardings)
            ms, difference = spread(timings(run, [placed], effort)), None
            found = jax.device_put(run(*placed), jax.devices()[0])
            one, known = (ms, found) if cards == 1 else (one, known)
            if cards > 1:
                difference = float(largest_difference(found, known))
            size = programs.program_bytes(run) / 2**20
            rows.append([op, cards, shape[1], ms, one["mean"] / ms["mean"], size, difference])
    return rows


def compare(jobs, found):
    """[(job, numbers)] but references, with speedup and loss difference to one card's."""
    rows = []
    for job in jobs:
        row = found[job.name]
        modes = ("one card, long",) * 2 if job.config == LONG else ("one card", "reference")
        if job.mode in ("sequence", "one card, long"):
            modes = ("one card, long",) * 2
        one, known = (found.get(f"{job.config} {mode}", {}) for mode in modes)
        if "tokens/s" in row and "tokens/s" in one:
            speeds = [statistics.median(r["tokens/s"]["values"]) for r in (row, one)]
            row["speedup"] = speeds[0] / speeds[1]
        if job.cards > 1 and "losses" in row and "losses" in known:
            pairs = zip(row["losses"], known["losses"])
            row["loss difference"] = max(abs(a / b - 1) for a, b in pairs)
        if job.mode != "reference":
            rows.append((job, row))
    return rows


def cells(job, row):
    """A row of the table of training."""
    shape = f"{job.changes['train.batch_size']} x {job.changes['train.seq_len']}"
    first = [job.config, job.mode, job.cards, shape]
    if "reason" in row:
        return [*first, row["reason"]] + [None] * (len(TRAINING_COLUMNS) - len(first) - 1)
    mib = lambda name: row[name] and row[name] / 2**20
    numbers = [row["ms"], row["tokens/s"], row.get("speedup"), mib("peak"), mib("state bytes")]
    numbers += [row.get(name) for name in ("collectives", "exposed", "loss difference")]
    return [*first, *numbers, row["same bits"], row["compile s"]]


if __name__ == "__main__":
    command.run(main)
