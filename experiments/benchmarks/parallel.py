"""How much faster do several GPUs of one host train than one, and what do they exchange?

    python -m experiments parallel --cards=2,4 --config=gf_mh_350m --rows=16
    python -m experiments parallel --parts=data,fsdp --config=gf_mh_base,gf_mh_1b --rows=8

Parts: `data` and `fsdp` train each --config with --rows rows a card on one card and on several,
with copied and with cut parameters (the speedup is that of tokens per second: n cards do n times
the work); `recurrences` runs the two kernels, forward and backward, on one row of --length tokens
that the cards share; `sequence` trains gf_mh_base on one such row (the speedup is that of the same
work).

It is the trainer's own step on random tokens. --seeds is the number of timed stretches, of
--timed_steps steps each. "collectives" is the share of the time in which kernels run that exchange
data, or wait for another card, and "exposed" that in which no other kernel runs beside them, from a
profiler's trace of three steps. "loss difference" is the largest relative one of five steps to one
card's on the same batches; "same bits" says whether these five steps give the same losses and
parameters in a second run. Every program has a process of its own, so that peak memory is its own,
and all compile before the first is timed.
"""

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.parallel_tables import write
from experiments.lab import command, programs, traces, workers
from experiments.lab.recurrences import (
    OPS,
    STATE_SIZE,
    compile_recurrence,
    largest_difference,
    make_inputs,
)
from experiments.lab.timing import Trainer, random_batches, spread, timings
from gt_jax.config import from_config_dict
from gt_jax.config_files import load_config
from gt_jax.errors import InputError
from gt_jax.training import backend, parallel

PARTS = ("recurrences", "data", "fsdp", "sequence")
LONG = "gf_mh_base"  # of part `sequence`
HEADS = {"wkv6": 32, "ssd": 64}  # of the recurrences
COMPARED = 5  # steps whose losses are compared
TRACED = 3  # steps


class Job(NamedTuple):
    """A program of training and where it runs."""

    mode: str  # of parallel_tables.MODES, or "reference": losses of one card
    config: str
    cards: int
    changes: dict  # of the config
    compared: dict | None = None  # of a reference: cards -> rows of their batches

    @property
    def name(self):
        return f"{self.config} {self.mode}" + (f" on {self.cards}" if self.cards > 1 else "")

    @property
    def tokens(self):
        return self.changes["train.batch_size"] * self.changes["train.seq_len"]


def main(argv=None):
    parser = command.parser("parallel", __doc__)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to measure, see above, with commas between"
    )
    about = "configs that data and fsdp train, with commas between"
    parser.add_argument("--config", default="gf_mh_350m", help=about)
    about = (
        "numbers of cards to compare with one, with commas between (default: all that there are)"
    )
    parser.add_argument("--cards", help=about)
    parser.add_argument("--rows", type=int, default=16, help="rows of each card in data and fsdp")
    parser.add_argument(
        "--length", type=int, default=131072, help="tokens of the row that cards share"
    )
    parser.add_argument("--timed_steps", type=int, default=10, help="steps of a timed stretch")
    about = "end after so long, with what was measured until then (default: no limit)"
    parser.add_argument("--seconds", type=float, default=math.inf, help=about)
    options = command.parse(parser, argv)
    parts = command.one_of(PARTS, options.parts, "--parts")
    for name in ("rows", "length", "timed_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}={getattr(options, name)} must be at least 1")
    if not options.seconds > 0:
        raise InputError(f"--seconds={options.seconds:g} must be above 0")
    # The processes share the memory of the devices: none may take most of it beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options.cards = numbers_of_cards(options, parts)
    jobs = training_jobs(options, parts)
    several = options.cards[-1]
    works = [
        workers.Work("recurrences", prepare_recurrences, time_recurrences, (options,), several)
    ]
    works = works if "recurrences" in parts else []
    works += [
        workers.Work(job.name, prepare_training, time_training, (options, job), job.cards)
        for job in jobs
    ]
    # What is there so far is a result, should the machine go before all is measured.
    later = {work.name: {"reason": "not measured"} for work in works}
    keep = lambda found: write(options, jobs, later | found, shown=False)
    found = workers.run_all(works, here=options.quick, seconds=options.seconds, each=keep)
    write(options, jobs, found)


def numbers_of_cards(options, parts):
    """Of --cards those above one, in order.

    Raises:
        InputError: there are not so many devices, or in some of the parts they cannot share
            --length tokens.
    """
    there = jax.device_count()
    if there < 2:
        raise InputError("there is one device; this compares several with one")
    asked = (options.cards or str(there)).split(",")
    numbers = {int(n) for n in asked if n.isdecimal() and 0 < int(n) <= there}
    cards = sorted(numbers - {1})
    if not cards or not all(n.isdecimal() and int(n) in numbers for n in asked):
        raise InputError(
            f"--cards={options.cards} must be numbers of the {there} devices, 2 or more"
        )
    for n in cards if {"recurrences", "sequence"} & set(parts) else ():
        if options.length % n:
            raise InputError(f"--length={options.length} must be a multiple of the {n} devices")
    return cards


def training_jobs(options, parts):
    """The programs of training that some parts need, in the order in which they are timed.

    Should the time not suffice, the first config and the long row have come first.
    """
    quick = command.QUICK if options.quick else {}
    rows = quick.get("train.batch_size", options.rows)
    # One update before the second step: the losses compared are of parameters that moved.
    common = quick | {"optim.grad_accumulation": 1, "optim.warmup_steps": 1}
    common |= {"model.impl": options.impl}
    modes = [mode for mode in ("data", "fsdp") if mode in parts]
    groups, long_row = [], []
    for config in dict.fromkeys(options.config.split(",")) if modes else ():
        common["train.seq_len"] = quick.get("train.seq_len", load_config(config).train.seq_len)
        jobs = [Job("one card", config, 1, common | {"train.batch_size": rows})]
        for n in reversed(options.cards):
            cut = {"data": {}, "fsdp": {"parallel.fsdp": n}}
            jobs += [
                Job(mode, config, n, common | {"train.batch_size": n * rows} | cut[mode])
                for mode in modes
            ]
        # As much at once as one card does, and rows for every number of cards: see `losses_of`.
        n = math.lcm(*options.cards)
        again = common | {"train.batch_size": n * rows, "optim.grad_accumulation": n}
        compared = {cards: cards * rows for cards in options.cards}
        groups.append([*jobs, Job("reference", config, 1, again, compared)])
    if "sequence" in parts:
        long = common | {"train.batch_size": 1, "train.seq_len": options.length}
        long_row.append(Job("one card, long", LONG, 1, long))
        long_row += [
            Job("sequence", LONG, n, long | {"parallel.sequence": n})
            for n in reversed(options.cards)
        ]
    first, others = (groups or [[]])[0], itertools.chain(*groups[1:])
    return [*first[:-1], *long_row, *first[-1:], *others]


_ready = {}  # of this process: name -> what `prepare_...` made


def prepare_training(options, job):
    """Compile a program and what it begins with."""
    backend.prepare()
    given = load_config(job.config)
    given.update_from_flattened_dict(job.changes)
    config, vocab = from_config_dict(given), 97 if options.quick else given.data.vocab_size
    with ThreadPoolExecutor(1) as pool:
        others = []  # lowered after the step, which takes longest to compile
        trainer = Trainer(
            config,
            vocab,
            jax.devices()[: job.cards],
            lambda trainer, _: others.append(pool.submit(compile_others, trainer)),
        )
        _ready[job.name] = trainer, *others[0].result()


def compile_others(trainer):
    """random key -> TrainState of a new run, and `checksums` of its parameters, compiled."""
    shapes = parallel.shapes_on(trainer.shardings, trainer.shapes)
    with programs.LOWERING:
        init = jax.jit(trainer.init, out_shardings=trainer.shardings).lower(jax.random.key(0))
        sums = checksums.lower(shapes.params)
    return init.compile(), sums.compile()


def time_training(options, job):
    """Numbers of a Trainer by name; of a reference losses alone, by the number of cards."""
    made, init, sums = _ready[job.name]

    def restart():
        made.state = None  # frees its memory first
        made.restart(init(jax.random.key(0)))

    def first_steps():
        restart()
        return made.losses(COMPARED), jax.device_get(sums(made.state.params))

    if job.compared:
        found = {}
        for cards, rows in job.compared.items():
            restart()
            found[cards] = losses_of(made, job, rows)
        return {"losses": found}
    losses, bits = first_steps()
    row = {"losses": losses, "compile s": made.compile_seconds}
    again = first_steps()
    row["same bits"] = losses == again[0] and bool(np.array_equal(bits, again[1]))
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


def losses_of(made, job, rows):
    """Losses of batches of fewer rows than the step takes: each row so often that it is full."""
    times, length = job.changes["train.batch_size"] // rows, job.changes["train.seq_len"]
    batches = random_batches(made.vocab, rows, length)
    full = lambda x: np.concatenate([x] * times)
    made.feed = ((parallel.put_batch(jax.tree.map(full, b), made.mesh), None) for b in batches)
    return made.losses(COMPARED)


@jax.jit
def checksums(tree):
    """[leaves] uint32, sums of the bits of each array."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in jax.tree.leaves(tree)]
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in bits])


def bytes_a_card(tree):
    """Of a tree of arrays, what one device holds."""
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return int(sum(np.prod(shape, dtype=int) * dtype.itemsize for shape, dtype in shapes))


def prepare_recurrences(options):
    """Compile both recurrences on one device and on several, and what draws their inputs."""
    backend.prepare()
    with ThreadPoolExecutor(8) as pool:
        waiting = {
            (op, n): pool.submit(compile_recurrence, op, shape_of(options, op), n, options.impl)
            for op in OPS
            for n in (1, *options.cards)
        }
        inputs = {
            op: make_inputs.lower(op, shape_of(options, op), jax.random.key(0)).compile()
            for op in OPS
        }
        made = {name: future.result() for name, future in waiting.items()}
    _ready["recurrences"] = inputs, made


def shape_of(options, op):
    heads, length = (2, 64) if options.quick else (HEADS[op], options.length)
    return 1, length, heads, STATE_SIZE[op]


def time_recurrences(options):
    """Rows of the table: of each recurrence, one device and several."""
    effort = {"seconds": 0.1, "least_calls": 3, "repeats": len(options.seeds)}
    rows = []
    inputs, made = _ready["recurrences"]
    for op in OPS:
        arguments = inputs[op](jax.random.key(0))
        for n in (1, *options.cards):
            run, shardings = made[op, n]
            placed = jax.device_put(arguments, shardings)
            ms, difference = spread(timings(run, [placed], effort)), None
            found = jax.device_put(run(*placed), jax.devices()[0])
            if n == 1:
                one, known = ms, found
            else:
                difference = float(largest_difference(found, known))
            size = programs.program_bytes(run) / 2**20
            length, speedup = shape_of(options, op)[1], one["mean"] / ms["mean"]
            rows.append([op, n, length, ms, speedup, size, difference])
    return rows


if __name__ == "__main__":
    command.run(main)
