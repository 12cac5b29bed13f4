"""Many runs in one program: which ones share it, what it does, and how it fits into memory.

The runs of a program have one architecture and differ in their seeds and in SWEEPABLE fields. They
go side by side through the trainer's own step, under vmap, and a scan takes many steps without the
host. `prepare` compiles a program for as many runs as are wanted, or as there is memory for.
"""

import dataclasses
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax import compilation
from gt_jax.config import Config, flatten, from_config_dict, to_dict, unflatten
from gt_jax.data.batches import Batch
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model
from gt_jax.models.fusion import default_share, gate_parameters
from gt_jax.training import debate
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step, summed_loss

_OPTIM = ("lr", "min_lr_ratio", "warmup_steps", "weight_decay")
# Config fields in which the runs of one program may differ.
SWEEPABLE = ("model.gate_init", *(f"optim.{field}" for field in _OPTIM))
SWEEPABLE += tuple(f"optim.lr_multipliers.{part}" for part in ("rwkv", "mamba", "gate"))
_DEBATE = tuple(f"{name}_weight" for name in debate.NAMES)
_DEBATE += ("arbiter_temperature", "fade_from", "fade_to")
SWEEPABLE += tuple(f"debate.{field}" for field in _DEBATE)

# Runs side by side beyond which a large GPU would gain nothing.
FULL = 32

# Compiles fast, runs slowly: for tiny models and few steps.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Programs are lowered one after another, which Python does not faster at once: so the first can
# run early.
LOWERING = threading.Lock()


class Program(NamedTuple):
    """Arms of one architecture: what they share, and [runs] values of what they do not."""

    names: list[str]
    model_config: ModelConfig
    config: Config
    task: Any  # of lab/training.py
    points: list[dict]  # of the runs: seeds and values of the swept fields
    values: list[dict]  # of the runs, for every field of SWEEPABLE


class Compiled(NamedTuple):
    """A program's `functions`, compiled for `group` runs side by side in some seconds."""

    program: Program
    group: int
    init: Callable
    advance: dict[int, Callable]  # by number of steps
    measure: Callable
    seconds: float


def side_by_side(work: Callable, jobs: Sequence) -> list:
    """work(job) of all jobs, in threads so that programs compile side by side; where there are
    several devices, each job is on one of them."""
    devices = jax.local_devices()

    def on_one(i, job):
        with jax.default_device(devices[i % len(devices)]):
            return work(job)

    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count()))) as pool:
        return list(pool.map(on_one, range(len(jobs)), jobs))


def device() -> jax.Device:
    """The device of the thread's job."""
    return jax.config.jax_default_device or jax.local_devices()[0]


def plan(arms: Mapping, seeds: Sequence[int], sweep: Mapping[str, Sequence]) -> list[Program]:
    """The programs that train arms, each (config, task), as lab.train says.

    Raises:
        InputError: a field cannot be swept, or a config is impossible.
    """
    for name in sweep:
        if name not in SWEEPABLE:
            raise InputError(f"{name} cannot be swept; one of {', '.join(SWEEPABLE)} can")
    points = [
        dict(zip(sweep, values)) | {"seed": int(seed)}
        for values in itertools.product(*sweep.values())
        for seed in seeds
    ]
    programs = {}
    for name, (config, task) in arms.items():
        model_config = make_model_config(config, task.vocab_size)
        defaults = {f: v for f, v in flatten(dataclasses.asdict(config)).items() if f in SWEEPABLE}
        # Refuses what cannot be.
        debate.make_terms(make_model(model_config), _with_terms(config, sweep))
        gated = has_gate(model_config)
        if "model.gate_init" in sweep and not gated:
            raise InputError(f"model.gate_init cannot be swept for {name}, which has no gate")
        for name_of_field, values in sweep.items():
            for value in values:
                from_config_dict(unflatten(flatten(to_dict(config)) | {name_of_field: value}))
        if gated:
            share = model_config.gate_init
            if share is None:
                share = default_share(model_config.fusion)
            defaults["model.gate_init"] = share
            model_config = dataclasses.replace(model_config, gate_init=None)
        config = _with_terms(config, sweep)
        shared = _with_values(config, dict.fromkeys(SWEEPABLE))
        key = (model_config, shared.optim, shared.train, shared.debate, id(task))
        program = programs.setdefault(key, Program([], model_config, config, task, [], []))
        program.names.append(name)
        program.points.extend(points)
        program.values.extend(
            {field: point.get(field, defaults[field]) for field in SWEEPABLE} for point in points
        )
    return list(programs.values())


def has_gate(model_config: ModelConfig) -> bool:
    """Whether model.gate_init decides anything in this model."""
    if model_config.architecture != "hybrid":
        return False
    share = default_share(model_config.fusion)
    return share is not None and bool(gate_parameters(model_config, share))


def compiler_options(compile_fast: bool) -> dict:
    """For the compiler; compile_fast is for tiny jobs."""
    options = COMPILE_FAST if compile_fast else {}
    return options | (compilation.options(compilation.UNTIMED) or {})


def _with_terms(config: Config, sweep: Mapping[str, Sequence]) -> Config:
    """A Config whose debate weights are not 0 where the sweep has other values."""
    weights = {
        f"{name}_weight": max(sweep.get(f"debate.{name}_weight", (0,))) for name in debate.NAMES
    }
    weights = {field: weight for field, weight in weights.items() if weight}
    return dataclasses.replace(config, debate=dataclasses.replace(config.debate, **weights))


def _with_values(config: Config, values: Mapping) -> Config:
    """A Config with some of its optim and debate fields replaced, by tracers if need be.

    Debate weights of 0 stay: their terms are not computed.
    """
    multipliers = {
        part: values[f"optim.lr_multipliers.{part}"] for part in ("rwkv", "mamba", "gate")
    }
    fields = {field: values[f"optim.{field}"] for field in _OPTIM}
    fields["lr_multipliers"] = dataclasses.replace(config.optim.lr_multipliers, **multipliers)
    on = debate.active(config.debate)
    off = {f"{name}_weight" for name in debate.NAMES if name not in on}
    of_debate = {field: values[f"debate.{field}"] for field in _DEBATE if on and field not in off}
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, **fields),
        debate=dataclasses.replace(config.debate, **of_debate),
    )


def _arrays(model_config: ModelConfig, values: Sequence[Mapping]) -> dict:
    """[runs] float32 by field, and as "gates" what the gates' parameters of the runs start from."""
    fields = (field for field in SWEEPABLE if field != "model.gate_init")
    arrays = {field: np.asarray([v[field] for v in values], np.float32) for field in fields}
    shares = [v["model.gate_init"] for v in values]
    if shares[0] is not None:
        starts = {share: gate_parameters(model_config, share) for share in set(shares)}
        arrays["gates"] = {
            path: np.stack([starts[share][path] for share in shares]) for path in starts[shares[0]]
        }
    return arrays


def _set_gates(params, values):
    """Parameters with the gate of every block as in `values`, if they are there."""
    gates = values.get("gates", {})

    def value(path, leaf):
        names = tuple(key.key for key in path)
        within = names[names.index("fusion") + 1 :] if "fusion" in names else None
        return gates.get(within, leaf)

    return jax.tree_util.tree_map_with_path(value, params)


def functions(program: Program):
    """What programs are made of, as functions of many runs.

    Returns:
        init(seeds [runs], values) -> states; advance(states, values, of_run, batches) -> states and
        metrics [steps, runs], where run i reads batches [steps, data, B, T] of number of_run[i];
        measure(params, batches [N, B, T]) -> summed loss and right guesses, both [N, runs].
    """
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
        right = jnp.argmax(logits, -1) == batch.targets  # never where a target does not count
        return summed_loss(logits, batch.targets), jnp.sum(right)

    def advance(states, values, of_run, batches):
        def step(states, batch):
            batch = jax.tree.map(lambda x: x[of_run], batch)  # [data, B, ...] -> [runs, B, ...]
            return jax.vmap(step_one)(states, values, batch)

        return jax.lax.scan(step, states, batches)

    def measure(params, batches):
        over_runs = jax.vmap(measure_one, in_axes=(0, None))
        return jax.lax.map(lambda batch: over_runs(params, batch), batches)  # [batches, runs]

    return init, advance, measure


def prepare(program: Program, *, group: int | None, compile_fast: bool) -> Compiled:
    """Compile a program for as many runs side by side as asked for or as fit."""
    began = time.perf_counter()
    runs = len(program.points)
    group = min(group or math.ceil(runs / math.ceil(runs / FULL)), runs)
    options = compiler_options(compile_fast)
    while True:
        with LOWERING:
            lowered = compilation.without_collector(lambda n=group: _lower(program, n))
        with ThreadPoolExecutor(len(lowered)) as pool:
            compiled = dict(zip(lowered, pool.map(lambda x: x.compile(options), lowered.values())))
        init = compiled.pop("init")
        needed = max(map(program_bytes, compiled.values()))
        parts = math.ceil(needed / bytes_free())
        if parts == 1 or group == 1:
            break
        group = max(math.ceil(group / parts), 1)
    measure = compiled.pop("measure")
    return Compiled(program, group, init, compiled, measure, time.perf_counter() - began)


def _lower(program: Program, group: int) -> dict:
    """What a group of runs is made of: "init", "measure", and steps to advance by number."""
    init, advance, measure = functions(program)
    seeds, values, of_run, data = inputs_of(program, slice(0, group), group)
    traced = jax.jit(init).trace(seeds, values)
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    batch = next(program.task.batches(0))
    lowered = {
        "init": traced.lower(),
        "measure": jax.jit(measure).lower(states.params, stacked(program.task.held_out)),
    }
    advance = jax.jit(advance, donate_argnums=0)
    for steps in set(steps_between_evaluations(program.config)):
        batches = _shapes(batch, steps, len(data))
        lowered[steps] = advance.lower(states, values, of_run, batches)
    return lowered


def inputs_of(program: Program, which: slice, group: int):
    """seeds, values, of_run of some runs, and the seeds of the data; the last fills the group."""
    seeds, values = [point["seed"] for point in program.points[which]], program.values[which]
    missing = group - len(seeds)
    seeds, values = seeds + seeds[-1:] * missing, values + values[-1:] * missing
    data = sorted({point["seed"] for point in program.points})  # for every group, so of one shape
    of_run = np.array([data.index(seed) for seed in seeds], np.int32)
    return np.array(seeds, np.uint32), _arrays(program.model_config, values), of_run, data


def steps_between_evaluations(config: Config) -> list[int]:
    """Numbers of steps between evaluations."""
    steps = config.train.steps
    every = min(config.train.eval_every or steps, steps)
    return [every] * (steps // every) + ([steps % every] if steps % every else [])


def _shapes(batch, *axes):
    """Shapes of many batches."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype), batch)


def stacked(batches) -> Batch:
    """Batches as one, [N, B, T]."""
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
    """What a program may take of its device's memory, or of the machine's if it has none."""
    stats = device().memory_stats()
    if stats:
        return 0.75 * stats["bytes_limit"]  # programs that compile meanwhile try kernels
    return 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
