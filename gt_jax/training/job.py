"""What a run is made of, from its config and the checkpoint that it continues from."""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from gt_jax import checkpoint, compilation, kept_programs, kernels, stored
from gt_jax.config import Config, flatten, to_dict
from gt_jax.data import Batch, evaluation_batches, make_batches, tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, confined_to_device, count_parameters, fsdp, make_model
from gt_jax.training import hosts, memory, parallel, tuning
from gt_jax.training.display import say
from gt_jax.training.loggers import import_services
from gt_jax.training.model import make_model_config, takes_kernels
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.progress import Progress
from gt_jax.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    start_from,
)
from gt_jax.training.text import Text, characters_per_token, fingerprint, read_text
from gt_jax.training.utilization import flops_per_token
from gt_jax.training.watch import make_probe
from gt_jax.training.writer import restore

# What a resumed run may change; a longer one follows the schedule of its new length from there on.
FREE_ON_RESUME = ("train.steps", "train.max_minutes", "train.eval_every", "train.patience")
FREE_ON_RESUME += ("train.eval_at_start", "train.max_nonfinite", "train.sample_every")
FREE_ON_RESUME += ("train.sample_prompt", "train.sample_tokens", "train.stop_rules")
FREE_ON_RESUME += ("train.rewind_mads", "train.rewind_steps", "train.rewind_most")
FREE_ON_RESUME += ("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "log.every")
FREE_ON_RESUME += ("log.tensorboard", "log.wandb", "log.trackio", "log.project")
FREE_ON_RESUME += ("log.activations", "optim.decay_steps")
FREE_ON_RESUME += ("parallel.mode", "parallel.fsdp", "parallel.sequence")
FREE_ON_RESUME += ("parallel.coordinator_address", "parallel.num_processes", "parallel.process_id")
FREE_ON_RESUME += ("parallel.host_timeout",)
_OPERATIONS = {"rwkv": "wkv6", "mamba": "ssd"}  # by the part of a model that computes it


class Job(NamedTuple):
    """What a run is made of; nothing in it changes but the place in `batches`."""

    config: Config
    workdir: Path  # of all processes: checkpoints and a tokenizer's cache
    folder: Path  # of this process, from `hosts.folder`: all other files of the run
    mesh: Any
    text: Text
    fingerprint: str  # of the text's tokens
    batches: Any  # endless, for training
    held_out: Sequence  # batches of an evaluation
    per_token: float  # characters
    prompt: np.ndarray  # [T] ids, of samples
    model: Any
    model_config: ModelConfig
    parameters: dict[str, int]  # counts by part, and their "total"
    trained: int  # how many of them are trained
    flops: int  # of training on one token
    kernels: dict[str, Sequence[str]]  # operation -> what `kernels.choose_impl` says of it
    make_state: Callable  # seed, [] uint32 -> TrainState, to be traced
    start_from: Callable  # (new TrainState, parameters) -> one with them
    new_state: Callable | None  # the same, to be called; None for a run that resumes
    train_step: Callable
    eval_step: Callable
    probe: Callable  # (params, batch) -> more numbers for a line of metrics.jsonl
    sampling: dict[str, Callable]  # a sample's programs; empty where `generate` makes it
    compiling: dict[str, Future]  # these, "train", "init", "evaluate"; empty where calls compile
    services: list[ModuleType]  # wandb and trackio, where asked for


def prepare(
    config: Config,
    workdir: Path,
    folder: Path,
    mesh: Mesh,
    about: dict | None,
    prompt_of: Callable[[Text], np.ndarray],
    lower_sample: Callable[[Any, np.ndarray], dict[str, Callable]],
) -> Job:
    """Read the text, make the model, and begin to compile its steps in threads.

    Nothing large is allocated.

    Args:
        config, workdir: of the run.
        folder: from `hosts.folder`.
        mesh: from `parallel.make_mesh`.
        about: of the checkpoint to continue from, None for a new run.
        prompt_of: Text -> the prompt of samples, [T] ids.
        lower_sample: (model, prompt) -> the programs of a sample: name -> (shapes of parameters) ->
            the program lowered. They depend on the length of the prompt alone.

    Raises:
        InputError: the text, the model and the config do not fit each other or this machine.
    """
    services = import_services(config.log)
    # Text, in the tokens of the model that the run began with if there is one.
    begun = about or _begun_from(config)
    tokenizer = None
    if begun is not None and config.model.init_from:
        tokenizer = tokenizer_from_dict(begun["tokenizer"])
    read = functools.partial(read_text, config, tokenizer=tokenizer, cache_dir=workdir)
    text = hosts.first_before_others(read)  # it may train a tokenizer, and keeps that
    hashed = fingerprint(text.tokens)
    hosts.check_alike(f"the hash of the text of data.source={config.data.source}", hashed)
    if about:
        _check_same_text(about, text, hashed, config, workdir)
    shape: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "seq_len": config.train.seq_len,
        "rows": parallel.own_rows(mesh, config.train.batch_size),
    }
    batches = make_batches(text.tokens.train, order=config.data.order, seed=config.seed, **shape)
    held_out = evaluation_batches(
        text.tokens.validation,
        max_tokens=config.train.eval_tokens,
        carry=config.train.carry_state,
        **shape,
    )
    prompt = prompt_of(text)

    # Model and programs.
    model_config = make_model_config(config, text.tokenizer.vocab_size, begun)
    if config.parallel.sequence > 1 and (reason := confined_to_device(model_config)):
        raise InputError(f"parallel.sequence={config.parallel.sequence} must be 1: {reason}")
    start, examples = batches.state(), (next(batches), held_out[0])
    batches.restore(start)
    model = make_model(model_config)
    identity = [*_identity(config, model_config, examples), len(prompt)]
    sample = {}
    # With "fsdp" no program of one device is compiled: the whole model may not fit there.
    if config.train.sample_tokens and config.parallel.mode == "jit" and config.parallel.fsdp == 1:
        sample = lower_sample(model, prompt)
    kept = _kept(config, identity, sample, resumes=bool(about))
    counted = functools.partial(_count, config, model_config)
    if config.parallel.mode == "jit":
        counted = functools.partial(kept_programs.numbers, "counts", identity, counted)
    counts = counted()
    fields = f"model.dim={model_config.dim} with model.layers={model_config.layers}"
    if model_config.position_limit is not None:
        fields += f" and model.max_positions={model_config.max_positions}"
    total, trained, cut = counts["parts"]["total"], counts["trained"], config.parallel.fsdp
    memory.check_fits(total, config.optim, fields, trained, devices=cut)
    return Job(
        config=config,
        workdir=workdir,
        folder=folder,
        mesh=mesh,
        text=text,
        fingerprint=hashed,
        batches=batches,
        held_out=held_out,
        per_token=characters_per_token(text.tokenizer, text.tokens.validation),
        prompt=prompt,
        model=model,
        model_config=model_config,
        parameters=counts["parts"],
        trained=trained,
        flops=counts["flops"],
        kernels=counts["kernels"],
        services=services,
        probe=make_probe(model, config, mesh),
        **_programs(config, mesh, model, examples, resumes=bool(about), sample=sample, kept=kept),
    )


def _identity(config: Config, model_config: ModelConfig, examples: tuple[Batch, Batch]) -> list:
    """All that a run's programs depend on besides the code, which `kept_programs` looks after.

    The settings, what the text and the checkpoint of model.init_from say of the model, the shapes
    of batches.
    """
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), examples)
    return [to_dict(config), model_config, shapes]


def _kept(
    config: Config, identity: list, sample: Iterable[str], *, resumes: bool
) -> dict[str, kept_programs.Kept]:
    """The run's programs as the process before may have kept them; they begin to load."""
    if config.parallel.mode != "jit":
        return {}
    names = ("train", "evaluate") if resumes else ("train", "init", "evaluate")
    return kept_programs.find((*names, *sample), identity)


def _count(config: Config, model_config: ModelConfig) -> dict[str, Any]:
    """Counts of a Job: "parts", its parameters; "trained"; "flops"; and its "kernels".

    Traces the model, and so finds out whether model.impl runs here. What `choose_impl` says imports
    the kernels, which programs that are kept do not need.
    """
    parts, tune = count_parameters(model_config), config.train.tune
    trained = parts["total"] if tune == "none" else tuning.count(model_config, config.train)
    flops = flops_per_token(model_config, config.train.seq_len, frozen=tune != "none", parts=parts)
    ops = [op for part, op in _OPERATIONS.items() if part in parts]
    chosen = {op: kernels.choose_impl(op) for op in ops}
    return {"parts": parts, "trained": trained, "flops": flops, "kernels": chosen}


def _programs(config: Config, mesh, model, examples, *, resumes: bool, sample, kept) -> dict:
    """The fields of a Job that are compiled; in mode "jit" they are compiling when this returns."""
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    mode = config.parallel.mode

    # Of the seed: a key of its own would be another small program, which each start compiles.
    def make_state(seed):
        return init_state(model, tx, config, jax.random.key(seed))

    shapes, devices = None, config.parallel.fsdp
    if devices > 1:
        shapes = jax.eval_shape(make_state, 0)
        if size := fsdp.indivisible(shapes.params, devices):
            raise InputError(f"parallel.fsdp={devices} must divide {size}")
    sharding = parallel.state_sharding(mesh, shapes)
    activation = config.train.batch_size * config.train.seq_len * model.config.dim
    train_step = parallel.compile_train_step(
        make_step, mesh, mode, shapes, activation=activation, kernels=takes_kernels(model.config)
    )
    once = functools.partial(
        jax.jit, out_shardings=sharding, compiler_options=compilation.options(compilation.UNTIMED)
    )
    make_state = once(make_state)
    restart = once(functools.partial(start_from, tx=tx, config=config))
    eval_step = make_eval_step(model)
    if mode != "jit":
        return {
            "make_state": make_state,
            "start_from": restart,
            "new_state": make_state,
            "train_step": train_step,
            "eval_step": parallel.compile_eval_step(eval_step, mesh),
            "sampling": {},
            "compiling": {},
        }
    carry = None
    if config.train.carry_state:
        carry = jax.eval_shape(lambda: model.init_state(config.train.batch_size))
    programs = parallel.lower_programs(
        make_state, train_step, eval_step, mesh, examples, carry, sample
    )
    if resumes:
        del programs["init"]
    compiling = compilation.compile_side_by_side(programs, kept)
    ready = {name: compilation.when_ready(program) for name, program in compiling.items()}
    return {
        "make_state": make_state,
        "start_from": restart,
        "new_state": ready.get("init"),
        "train_step": ready["train"],
        "eval_step": parallel.put_batches(ready["evaluate"], mesh),
        "sampling": {name: ready[name] for name in sample},
        "compiling": compiling,
    }


def first_state(job: Job, folder: Path | None, about: dict | None) -> TrainState:
    """The TrainState of a checkpoint and its place in job.batches; a new one without any.

    New parameters are those of model.init_from where that is set.
    """
    seed = np.uint32(job.config.seed)
    if about is not None and folder is not None:
        state = restore(folder, jax.eval_shape(job.make_state, seed))
        with stored.readable(folder):
            job.batches.restore(about["batches"])
        return state
    assert job.new_state
    state = job.new_state(seed)
    if job.config.model.init_from:
        _, params, _ = checkpoint.load(job.config.model.init_from, say=say)
        sharding = parallel.state_sharding(job.mesh, state).params
        params = tuning.completed(params, state.params)
        if isinstance(sharding, Sharding):
            sharding = jax.tree.map(lambda _: sharding, params)
        state = job.start_from(state, parallel.put_whole(params, sharding))
    return state


def _begun_from(config: Config) -> dict | None:
    """What a checkpoint says of the model in model.init_from, None where none is set.

    Raises:
        InputError: there is none, it is damaged, or says other sizes than its files have.
    """
    if config.model.init_from is None:
        return None
    folder = checkpoint.find(config.model.init_from)
    about = checkpoint.read_about(folder)
    stored.describe(folder, about, checkpoint.stored_shapes(folder, "params"))
    return about


def progress_of(folder: Path, about: dict, config: Config, workdir: Path) -> Progress:
    """The Progress of a checkpoint that the run of a config is to continue from.

    Raises:
        InputError: the run began with another config, or what the checkpoint says is damaged.
    """
    with stored.readable(folder):
        progress = Progress.of_checkpoint(about, int(folder.name))
    if (began := stored.run_config(folder, about)) is None:
        raise InputError(f"{folder} is no checkpoint of a run; move it out of {workdir}")
    _check_same_run(began, config, workdir)
    return progress


def _check_same_run(began: Config, config: Config, workdir: Path) -> None:
    old, new = (flatten(to_dict(c)) for c in (began, config))
    for name in new:
        if name not in FREE_ON_RESUME and new[name] != old.get(name):
            raise InputError(
                f"{name}={new[name]} differs from {old.get(name)}, with which {workdir} began; "
                f"set it back, or start anew with another --workdir"
            )


def _check_same_text(about: dict, text: Text, hashed: str, config: Config, workdir: Path) -> None:
    if about.get("tokenizer") != text.tokenizer.to_dict() or about.get("text", hashed) != hashed:
        raise InputError(
            f"data.source={config.data.source} is no longer the text that {workdir} began with; "
            "bring it back, or start anew with another --workdir"
        )
    if "text" not in about:
        say(f"note:   {workdir} was begun by a version that kept no hash of its text; not compared")
