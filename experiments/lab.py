"""Seeds side by side: many runs of the trainer's own step in one program.

    task = lab.text_task(config)
    arms = {"GF": lab.Arm(config, task), "HY": lab.Arm(other_config, task)}
    runs = lab.train(arms, seeds=range(5), sweep={"optim.lr": (3e-4, 1e-3)})
    runs["GF"].at({"optim.lr": 3e-4}).loss()  # [seeds, evaluations]

An arm's runs differ in their seed and in fields of SWEEPABLE alone, so one vmapped step takes them
all, and a scan takes many steps without the host. Arms that share an architecture share a program;
programs compile in threads, and run one after another as they are ready. Each run is, within float
noise, what gt_jax.train does with the same config and seed: the same parameters and batches, so
that runs of different arms with the same seed are pairs.

How an experiment reads its command line and keeps its results: experiments/results.py.
"""

import dataclasses
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from gt_jax.config import Config, flatten, from_config_dict
from gt_jax.data import evaluation_batches, make_batches
from gt_jax.data.batches import Batch
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, count_parameters, make_model
from gt_jax.models.fusion import logit
from gt_jax.train import make_model_config
from gt_jax.training import backend
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step
from gt_jax.training.text import loss_unit, read_text

# Config fields in which the runs of one program may differ.
SWEEPABLE = ("model.gate_init", "optim.lr", "optim.min_lr_ratio", "optim.weight_decay")
SWEEPABLE += tuple(f"optim.lr_multipliers.{part}" for part in ("rwkv", "mamba", "gate"))

# Weight of the RWKV branch that a fusion starts from where model.gate_init is None.
GATES = {"hy": 0.7, "gf": 0.5, "ws": 0.5, "hgf": 0.5}

# Runs side by side beyond which a large GPU would gain nothing.
FULL = 32

# Triton's products run no faster here, and trying them out is most of compiling.
ON_GPU = {"xla_gpu_enable_triton_gemm": False}

# Compiles fast, runs slowly: for tiny models and few steps.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


# Programs are lowered one after another, which Python does not faster at once: so the first can
# run early. And one runs at a time.
_LOWERING, _RUNNING = threading.Lock(), threading.Lock()


class Task(NamedTuple):
    """What a model learns and is measured on.

    Attributes:
        name: for people.
        vocab_size: number of token ids.
        batches: seed -> endless iterator of Batch, all of one shape; the same for every arm.
        held_out: Batches of one shape to measure every run on; all of them, each time.
        unit: what a loss is per: "character" or "token".
    """

    name: str
    vocab_size: int
    batches: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Batch]
    unit: str = "token"


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
    """configs/base.py with some fields changed: {"optim.lr": 3e-4, "model.fusion": "hy"}.

    Raises:
        InputError: an unknown field or an impossible value.
    """
    config = base.get_config()
    known = flatten(config.to_dict())
    for name in changes:
        if name not in known:
            raise InputError(f"{name} is not a config field; configs/base.py has them all")
    config.update_from_flattened_dict(dict(changes))
    return from_config_dict(config)


def settings(config: Config) -> dict:
    """What of a config every result says."""
    shape = {"batch": config.train.batch_size, "length": config.train.seq_len}
    return {"steps": config.train.steps} | shape


def jit(compile_fast: bool) -> Callable:
    """jax.jit, or one for tiny jobs."""
    return functools.partial(jax.jit, compiler_options=COMPILE_FAST if compile_fast else None)


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
) -> dict[str, Runs]:
    """Train every arm with every seed at every point of a sweep.

    Args:
        arms: name -> Arm. config.train says how many steps, and how many from one evaluation to
            the next (0: one at the end; there is one at the end in any case).
        seeds: ids, as config.seed.
        sweep: field of SWEEPABLE -> values, all combinations of which are tried; a field that is
            not swept is as the arm's config says.
        group: runs of a program side by side at most; None for as many as are good for speed. Fewer
            in any case if memory is short.
        keep_params: whether Runs.params are wanted.
        compile_fast: for tiny jobs.
        show: takes a line when a program is done.

    Returns:
        name -> Runs, in the order of arms. With group, groups follow one another and the result is
        the same.

    Raises:
        InputError: a field cannot be swept, or a config is impossible.
    """
    points = _points(sweep or {}, seeds)
    backend.prepare()
    programs = _programs(arms, points)
    results = {}
    with ThreadPoolExecutor(min(len(programs), os.cpu_count())) as pool:
        options = {"group": group, "compile_fast": compile_fast}
        waiting = [pool.submit(_compile, program, **options) for program in programs]
        for done in as_completed(waiting):
            compiled = done.result()
            with _RUNNING:
                runs = _run(compiled, keep_params)
            show(_line(compiled, runs))
            for i, name in enumerate(compiled.program.names):
                results[name] = runs.take(range(i * len(points), (i + 1) * len(points)))
    return {name: results[name] for name in arms}


class _Program(NamedTuple):
    """Arms of one architecture: what they share, and [runs] values of what they do not."""

    names: list[str]
    model_config: ModelConfig
    config: Config
    task: Task
    points: list[dict]  # of the runs
    values: list[dict]  # of the runs, for every field of SWEEPABLE


class _Compiled(NamedTuple):
    program: _Program
    group: int  # runs side by side
    init: Callable
    advance: dict[int, Callable]  # by number of steps
    measure: Callable
    seconds: float


def _points(sweep, seeds):
    for name in sweep:
        if name not in SWEEPABLE:
            raise InputError(f"{name} cannot be swept; one of {', '.join(SWEEPABLE)} can")
    return tuple(
        dict(zip(sweep, values)) | {"seed": int(seed)}
        for values in itertools.product(*sweep.values())
        for seed in seeds
    )


def _programs(arms, points):
    programs = {}
    for name, (config, task) in arms.items():
        model_config = make_model_config(config, task.vocab_size)
        defaults = {f: v for f, v in flatten(dataclasses.asdict(config)).items() if f in SWEEPABLE}
        gated = model_config.architecture == "hybrid" and model_config.fusion in GATES
        swept_gate = any("model.gate_init" in point for point in points)
        if swept_gate and not gated:
            raise InputError(f"model.gate_init cannot be swept for {name}, which has no gate")
        if gated:
            share = model_config.gate_init
            defaults["model.gate_init"] = GATES[model_config.fusion] if share is None else share
            model_config = dataclasses.replace(model_config, gate_init=None)
        shared = _with_values(config, dict.fromkeys(SWEEPABLE))
        model = (shared.model.rwkv_dropout_start, shared.model.rwkv_dropout_end)
        key = (model_config, model, shared.optim, shared.train, id(task))
        program = programs.setdefault(key, _Program([], model_config, config, task, [], []))
        program.names.append(name)
        program.points.extend(points)
        program.values.extend(
            {field: point.get(field, defaults[field]) for field in SWEEPABLE} for point in points
        )
    return list(programs.values())


def _with_values(config: Config, values: Mapping) -> Config:
    """A Config with some of its optim fields replaced, by tracers if need be."""
    multipliers = {
        part: values[f"optim.lr_multipliers.{part}"] for part in ("rwkv", "mamba", "gate")
    }
    fields = {f: values[f"optim.{f}"] for f in ("lr", "min_lr_ratio", "weight_decay")}
    fields["lr_multipliers"] = dataclasses.replace(config.optim.lr_multipliers, **multipliers)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **fields))


def _arrays(values: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """[runs] float32 by field, and by name what a gate's parameters start from."""
    arrays = {f: [v[f] for v in values] for f in SWEEPABLE if f != "model.gate_init"}
    shares = [v["model.gate_init"] for v in values]
    if shares[0] is not None:
        arrays |= {"bias": list(map(logit, shares)), "alpha": shares, "rwkv_gain": shares}
        arrays["mamba_gain"] = [1 - share for share in shares]
    return {name: np.asarray(x, np.float32) for name, x in arrays.items()}


def _set_gates(params, values):
    """Parameters with the gate of every block as in `values`, if they are there."""

    def value(path, leaf):
        *_, part, name = (key.key for key in path)
        return jnp.full_like(leaf, values[name]) if part == "fusion" and name in values else leaf

    return jax.tree_util.tree_map_with_path(value, params) if "bias" in values else params


def _functions(program: _Program):
    """init(seeds, values), advance(states, values, of_run, batches), measure(params, batches)."""
    model, config = make_model(program.model_config), program.config

    def parts(values):
        own = _with_values(config, values)
        schedule = make_schedule(own.optim, config.train.steps)
        return make_optimizer(own.optim, schedule), schedule, own

    def init_one(seed, values):
        state = init_state(model, parts(values)[0], config, jax.random.key(seed))
        return state.replace(params=_set_gates(state.params, values))

    def init(seeds, values):
        if jax.default_backend() == "cpu":  # where batched QRs wait for each other for ever
            return jax.lax.map(lambda run: init_one(*run), (seeds, values))
        return jax.vmap(init_one)(seeds, values)

    def step_one(state, values, batch):
        return make_train_step(model, *parts(values))(state, batch)

    def measure_one(params, batch):
        logits = model.apply({"params": params}, batch.inputs, segment_ids=batch.segment_ids).logits
        counts = batch.targets >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(batch.targets, 0)
        )
        right = (jnp.argmax(logits, -1) == batch.targets) & counts
        return jnp.sum(losses, where=counts), jnp.sum(right)

    def advance(states, values, of_run, batches):
        def step(states, batch):
            batch = jax.tree.map(lambda x: x[of_run], batch)  # [data, B, ...] -> [runs, B, ...]
            return jax.vmap(step_one)(states, values, batch)

        return jax.lax.scan(step, states, batches)

    def measure(params, batches):
        over_runs = jax.vmap(measure_one, in_axes=(0, None))
        return jax.lax.map(lambda batch: over_runs(params, batch), batches)  # [batches, runs]

    return init, advance, measure


def _compile(program: _Program, *, group: int | None, compile_fast: bool) -> _Compiled:
    """Compile a program for as many runs side by side as asked for or as fit."""
    began = time.perf_counter()
    runs = len(program.points)
    group = min(group or math.ceil(runs / math.ceil(runs / FULL)), runs)
    options = COMPILE_FAST if compile_fast else {}
    options = options | (ON_GPU if jax.default_backend() == "gpu" else {})
    while True:
        with _LOWERING:
            lowered = _lower(program, group)
        with ThreadPoolExecutor(len(lowered)) as pool:
            compiled = dict(zip(lowered, pool.map(lambda x: x.compile(options), lowered.values())))
        init = compiled.pop("init")
        needed = max(map(program_bytes, compiled.values()))
        parts = math.ceil(needed / bytes_free())
        if parts == 1 or group == 1:
            break
        group = max(math.ceil(group / parts), 1)
    measure = compiled.pop("measure")
    return _Compiled(program, group, init, compiled, measure, time.perf_counter() - began)


def _lower(program: _Program, group: int) -> dict:
    """What a group of runs is made of: "init", "measure", and steps to advance by number."""
    init, advance, measure = _functions(program)
    seeds, values, of_run, data = _inputs(program, slice(0, group), group)
    states = jax.eval_shape(init, seeds, values)
    batch = next(program.task.batches(0))
    lowered = {
        "init": jax.jit(init).lower(seeds, values),
        "measure": jax.jit(measure).lower(states.params, _stacked(program.task.held_out)),
    }
    advance = jax.jit(advance, donate_argnums=0)
    for steps in set(_bursts(program.config)):
        batches = _shapes(batch, steps, len(data))
        lowered[steps] = advance.lower(states, values, of_run, batches)
    return lowered


def _inputs(program, which, group):
    """seeds, values, data of each run, and the seeds of the data; the last run fills the group."""
    seeds, values = [point["seed"] for point in program.points[which]], program.values[which]
    missing = group - len(seeds)
    seeds, values = seeds + seeds[-1:] * missing, values + values[-1:] * missing
    data = sorted({point["seed"] for point in program.points})  # for every group, so of one shape
    of_run = np.array([data.index(seed) for seed in seeds], np.int32)
    return np.array(seeds, np.uint32), _arrays(values), of_run, data


def _bursts(config: Config) -> list[int]:
    """Numbers of steps between evaluations."""
    steps = config.train.steps
    every = min(config.train.eval_every or steps, steps)
    return [every] * (steps // every) + ([steps % every] if steps % every else [])


def _shapes(batch, *axes):
    """Shapes of many batches."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype), batch)


def _stacked(batches) -> Batch:
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def program_bytes(compiled) -> int:
    """What a program takes of the memory while it runs."""
    memory = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def bytes_free() -> float:
    """What a program may take of the device's memory, or of the machine's if it has none."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return 0.75 * stats["bytes_limit"]  # programs that compile meanwhile try kernels
    return 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run(compiled: _Compiled, keep_params: bool) -> Runs:
    """All runs of a program, group after group."""
    program, group = compiled.program, compiled.group
    began = time.perf_counter()
    groups = [
        _run_group(compiled, slice(start, start + group), keep_params)
        for start in range(0, len(program.points), group)
    ]
    seconds = time.perf_counter() - began
    join = lambda *x: np.concatenate(x)[: len(program.points)]
    metrics, nats, correct, params = jax.tree.map(join, *groups)
    targets = [np.sum(batch.targets >= 0) for batch in program.task.held_out]
    return Runs(
        points=tuple(program.points),
        metrics=metrics,
        steps=np.cumsum(_bursts(program.config)),
        nats=nats,
        correct=correct,
        targets=np.array(targets),
        params=params,
        model_config=program.model_config,
        parameters=count_parameters(program.model_config)["total"],
        seconds=seconds,
        compile_seconds=compiled.seconds,
    )


def _run_group(compiled: _Compiled, which: slice, keep_params: bool):
    """metrics, nats, correct, params of some runs, NumPy leaves [runs, ...]."""
    program = compiled.program
    seeds, values, of_run, data = _inputs(program, which, compiled.group)
    held_out = jax.device_put(_stacked(program.task.held_out))
    values, of_run = jax.device_put((values, of_run))
    feeds = [program.task.batches(seed) for seed in data]
    states = compiled.init(seeds, values)
    metrics, measured, pending = [], [], None
    for steps in _bursts(program.config):
        # One batch of every seed for every step: [steps, data, B, ...]
        burst = [_stacked(next(feed) for feed in feeds) for _ in range(steps)]
        batches = _stacked(burst)
        states, numbers = compiled.advance[steps](states, values, of_run, batches)
        sums = compiled.measure(states.params, held_out)
        if pending:  # read while the next burst runs
            _keep(pending, metrics, measured)
        pending = numbers, sums
    _keep(pending, metrics, measured)
    metrics = jax.tree.map(lambda *x: np.concatenate(x).swapaxes(0, 1), *metrics)
    nats, correct = jax.tree.map(lambda *x: np.stack(x).transpose(2, 0, 1), *measured)
    params = jax.device_get(states.params) if keep_params else None
    return metrics, nats, correct, params


def _keep(pending, metrics, measured):
    numbers, sums = jax.device_get(pending)
    metrics.append(numbers)
    measured.append(sums)


def _line(compiled: _Compiled, runs: Runs) -> str:
    """What a program did, for the screen."""
    runs_total, steps = runs.nats.shape[0], int(runs.steps[-1])
    together = "" if compiled.group == runs_total else f", {compiled.group} at a time"
    final = runs.loss()[:, -1]
    return (
        f"{', '.join(compiled.program.names):24} {runs_total} runs{together}, {steps} steps in "
        f"{runs.seconds:.1f} s, compiled in {runs.compile_seconds:.1f} s; "
        f"loss {np.min(final):.4f} to {np.max(final):.4f}"
    )
