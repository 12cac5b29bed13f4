"""Seeds side by side: many runs of the trainer's own step in one program.

    task = lab.text_task(config)
    arms = {"GF": lab.Arm(config, task), "HY": lab.Arm(other_config, task)}
    runs = lab.train(arms, seeds=range(5), sweep={"optim.lr": (3e-4, 1e-3)})
    runs["GF"].at({"optim.lr": 3e-4}).loss()  # [seeds, evaluations]

Arms that share an architecture share a program (lab/programs.py). Programs compile in
threads, and run as they are ready, one after another on each device. Each run is, within float
noise, what gt_jax.train does with the same config and seed: the same parameters and batches, so
that runs of different arms with the same seed are pairs.

lab/command.py reads the command line of a question, lab/results.py keeps its results.
"""

import collections
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.lab import groups, programs, tasks, unfinished
from gt_jax.config import Config, default_config, flatten, from_config_dict
from gt_jax.data import evaluation_batches, make_batches
from gt_jax.data.batches import Batch
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, count_parameters
from gt_jax.scoring import loss_unit
from gt_jax.training import backend
from gt_jax.training.text import fingerprint, read_text

# One program runs at a time on a device.
_RUNNING = collections.defaultdict(threading.Lock)

# Seconds until one thread of Python lets another on. The thread that makes batches waits that long
# at every turn while programs are traced: with Python's usual 5 ms, 9 s for 100 steps of five seeds
# that take 0.1 s alone.
SWITCH = 1e-4


TEST_BATCHES = 32  # of a drawn task, if nothing else is said


class Task(NamedTuple):
    """What a model learns and is measured on.

    Attributes:
        name: for people.
        vocab_size: number of token ids.
        batches: seed -> endless iterator of Batch, all of one shape; the same for every arm.
        held_out: Batches of one shape to measure every run on; all of them, each time.
        unit: what a loss is per: "character" or "token".
        text: hash of a text, "" of a drawn task.
    """

    name: str
    vocab_size: int
    batches: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Batch]
    unit: str = "token"
    text: str = ""


class Arm(NamedTuple):
    """One thing compared: a config (its seed and data group do not matter here) on a task."""

    config: Config
    task: Task


class Runs(NamedTuple):
    """The runs of an arm, first all seeds of the first point of the sweep, then of the next.

    Attributes:
        points: [runs] dicts of the run's "seed" and its values of the swept fields.
        metrics: what the train step reports, each [runs, steps] ("loss", "grad_norm", "r_m_ratio",
            "lr", "skipped", ...) and "gate" [runs, steps, layers] where the fusion has one. Entry s
            belongs to the parameters after s updates, so "gate"[:, 0] is the gate at the start.
        steps: [evaluations] updates done at each evaluation.
        nats: [runs, evaluations, batches] summed loss on each held-out batch.
        correct: [runs, evaluations, batches] targets whose token was the likeliest.
        targets: [batches] counted targets of each held-out batch.
        params: NumPy leaves [runs, ...] after the last step, or None if not kept.
        model_config: the ModelConfig; its gate_init is None if gates were set run by run.
        parameters: their number.
        seconds: the program's running time, evaluations included, compilation not; for all its
            runs, other arms' included.
        compile_seconds: likewise.
    """

    points: tuple[dict, ...]
    metrics: dict[str, np.ndarray]
    steps: np.ndarray
    nats: np.ndarray
    correct: np.ndarray
    targets: np.ndarray
    params: Any
    model_config: ModelConfig
    parameters: int
    seconds: float
    compile_seconds: float

    def at(self, point: Mapping) -> "Runs":
        """The runs with these values of seed or swept fields, in the order they are in."""
        chosen = [
            i for i, p in enumerate(self.points) if all(p[name] == v for name, v in point.items())
        ]
        return self.take(chosen)

    def take(self, chosen) -> "Runs":
        """The runs with these indices."""
        return self._replace(
            points=tuple(self.points[i] for i in chosen),
            metrics={name: x[chosen] for name, x in self.metrics.items()},
            nats=self.nats[chosen],
            correct=self.correct[chosen],
            params=jax.tree.map(lambda x: x[chosen], self.params),
        )

    def loss(self, batches=slice(None)) -> np.ndarray:
        """[runs, evaluations] mean nats per target of some of the held-out batches."""
        return self.nats[..., batches].sum(-1) / self.targets[batches].sum()

    def accuracy(self, batches=slice(None)) -> np.ndarray:
        """[runs, evaluations] share of targets whose token was the likeliest."""
        return self.correct[..., batches].sum(-1) / self.targets[batches].sum()


def make_config(changes: Mapping) -> Config:
    """The default config with some fields changed: {"optim.lr": 3e-4, "model.fusion": "hy"}.

    Raises:
        InputError: an unknown field or an impossible value.
    """
    config = default_config()
    known = flatten(config.to_dict())
    for name in changes:
        if name not in known:
            raise InputError(f"{name} is not a config field; gt_jax.config has them all")
    config.update_from_flattened_dict(dict(changes))
    return from_config_dict(config)


def settings(config: Config) -> dict:
    """What of a config every result says."""
    shape = {"batch": config.train.batch_size, "length": config.train.seq_len}
    return {"steps": config.train.steps} | shape


def jit(compile_fast: bool) -> Callable:
    """jax.jit with the compiler's options of the laboratory; compile_fast is for tiny jobs."""
    return functools.partial(jax.jit, compiler_options=programs.compiler_options(compile_fast))


def text_task(config: Config) -> Task:
    """The Task of the text that config.data names, in the batches that gt_jax.train would use.

    Raises:
        InputError: there is no such text, or it is too short.
    """
    text = read_text(config)
    shape = {"batch_size": config.train.batch_size, "seq_len": config.train.seq_len}
    batches = lambda seed: make_batches(
        text.tokens.train, order=config.data.order, seed=seed, **shape
    )
    next(batches(0))  # too little text is said now
    return Task(
        name=text.corpus.name,
        vocab_size=text.tokenizer.vocab_size,
        batches=batches,
        held_out=evaluation_batches(
            text.tokens.validation, max_tokens=config.train.eval_tokens, **shape
        ),
        unit=loss_unit(text.tokenizer),
        text=fingerprint(text.tokens),
    )


def drawn_task(name, generate, vocab_size, length, batch_size, *, tests=None):
    """The Task of sequences that a generator of lab/tasks.py draws.

    Args:
        name, generate, vocab_size, length: of the task, as in tasks.Task.
        batch_size: sequences in every batch.
        tests: generators of the test batches; TEST_BATCHES from `generate` if None.
    """

    @functools.cache  # programs that train one after another draw the same
    def batch(generate, split, seed, index):
        tokens, targets = tasks.draw(
            generate, split=split, seed=seed, index=index, batch=batch_size, length=length
        )
        return Batch(tokens, targets, None, np.ones(batch_size, bool))

    return Task(
        name,
        vocab_size,
        batches=lambda seed: (batch(generate, "train", seed, i) for i in itertools.count()),
        held_out=[
            batch(test, "test", 0, i) for i, test in enumerate(tests or [generate] * TEST_BATCHES)
        ],
        unit="answer",
    )


def train(
    arms: Mapping[str, Arm],
    *,
    seeds: Sequence[int],
    sweep: Mapping[str, Sequence] | None = None,
    group: int | None = None,
    keep_params: bool = False,
    compile_fast: bool = False,
    show: Callable[[str], None] = print,
    finished: Callable[[str, Runs], None] = lambda name, runs: None,
    kept: unfinished.Kept | None = None,
) -> dict[str, Runs]:
    """Train every arm with every seed at every point of a sweep.

    Args:
        arms: name -> Arm. config.train says how many steps, and how many from one evaluation to
            the next (0: one at the end; there is one at the end in any case).
        seeds: ids, as config.seed.
        sweep: field of programs.SWEEPABLE -> values, all combinations of which are tried; a field
            that is not swept is as the arm's config says.
        group: runs of a program side by side at most; None for as many as are good for speed. Fewer
            in any case if memory is short.
        keep_params: whether Runs.params are wanted.
        compile_fast: for tiny jobs.
        show: takes a line when a program is done.
        finished: takes an arm's name and its Runs as soon as they are done, in a thread.
        kept: where the state of a program is kept between evaluations, so that a command that was
            interrupted continues when it is given again; of tasks of a text alone.

    Returns:
        name -> Runs, in the order of arms. With group, groups follow one another and the result is
        the same.

    Raises:
        InputError: a field cannot be swept, or a config is impossible.
    """
    planned = programs.plan(arms, seeds, sweep or {})
    sys.setswitchinterval(SWITCH)
    backend.prepare()

    def job(program):
        compiled = programs.prepare(program, group=group, compile_fast=compile_fast)
        starts = range(0, len(program.points), compiled.group)
        place_of = lambda start: kept.place(program.names, start, compiled.group, *program.values)
        places = {start: kept and place_of(start) for start in starts}
        with _RUNNING[programs.device()]:
            runs = _run(compiled, places, keep_params, show)
        show(_line(compiled, runs))
        parts = np.split(np.arange(len(runs.points)), len(program.names))
        of_arms = {name: runs.take(part) for name, part in zip(program.names, parts)}
        for name, of_arm in of_arms.items():
            finished(name, of_arm)
        for place in filter(None, places.values()):
            place.forget()
        return of_arms

    results = {n: runs for part in programs.side_by_side(job, planned) for n, runs in part.items()}
    return {name: results[name] for name in arms}


def _run(compiled: programs.Compiled, places: Mapping, keep_params: bool, show: Callable) -> Runs:
    """All runs of a program, group after group: `places` has where each starts."""
    program = compiled.program
    show_where = lambda text: show(f"{', '.join(program.names)}: {text}")
    trained = [groups.train(compiled, *each, keep_params, show_where) for each in places.items()]
    *of_groups, seconds = zip(*trained)
    join = lambda *x: np.concatenate(x)[: len(program.points)]
    metrics, nats, correct, params = (jax.tree.map(join, *each) for each in of_groups)
    targets = [np.sum(batch.targets >= 0) for batch in program.task.held_out]
    return Runs(
        points=tuple(program.points),
        metrics=metrics,
        steps=np.cumsum(programs.steps_between_evaluations(program.config)),
        nats=nats,
        correct=correct,
        targets=np.array(targets),
        params=params,
        model_config=program.model_config,
        parameters=count_parameters(program.model_config)["total"],
        seconds=sum(seconds),
        compile_seconds=compiled.seconds,
    )


def _line(compiled: programs.Compiled, runs: Runs) -> str:
    """What a program did, for the screen."""
    runs_total, steps = runs.nats.shape[0], int(runs.steps[-1])
    together = "" if compiled.group == runs_total else f", {compiled.group} at a time"
    final = runs.loss()[:, -1]
    return (
        f"{', '.join(compiled.program.names):24} {runs_total} runs{together}, {steps} steps in "
        f"{runs.seconds:.1f} s, compiled in {runs.compile_seconds:.1f} s; "
        f"loss {np.min(final):.4f} to {np.max(final):.4f}"
    )
