"""A run's settings as frozen dataclasses: each with its type, default, range and meaning, once.

`default_config` gives them as an ml_collections ConfigDict for config files to change, and
`from_config_dict` takes it back: it returns a `Config`, or raises an InputError that names the
field, the value and the fix, before anything is loaded or compiled.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from gt_jax.config_hybrid import Debate, PartSteps
from gt_jax.config_model import Model
from gt_jax.errors import InputError, did_you_mean
from gt_jax.settings import (
    ABOVE_ZERO,
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    accepted,
    check,
    flatten,
    setting,
    unflatten,
)
from gt_jax.suggestions import ELSEWHERE
from gt_jax.thresholds import STOP_RULES, split_rules


@dataclass(frozen=True)
class Data:
    """data.*: the text, its tokens, and their order."""

    source: str = setting(
        "shakespeare",
        "shakespeare, shakespeare-all, a file, a folder, tfds:NAME, a folder that"
        " `python -m gt_jax.prepare` made, or several of these as DIR:WEIGHT,DIR:WEIGHT",
    )
    validation_source: str = setting(
        "", "another source that validates; empty: data.source has a part that does"
    )
    field: str = setting("text", "the text field of JSONL lines and TFDS examples")
    tokenizer: str = setting(
        "char",
        "char, char97 (32 reserved ids first), sentencepiece, or a file: tokenizer.json,"
        " SentencePiece .model, RWKV vocabulary; prepared folders bring their own",
    )
    vocab_size: int = setting(4096, "of a SentencePiece tokenizer; characters need none", POSITIVE)
    order: str = setting(
        "windows",
        "shuffled windows, or tracks that continue from batch to batch",
        choices=("windows", "tracks"),
    )
    split: str = setting(
        "contiguous",
        "the last part of the text validates; tracks: the last part of each track",
        choices=("contiguous", "tracks"),
    )
    validation_fraction: float = setting(
        0.1, "of the text; data sets with their own split keep it", FRACTION
    )


@dataclass(frozen=True)
class Multipliers:
    """optim.lr_multipliers.*: by part of the model."""

    rwkv: float = setting(1.0, "of the RWKV branches", NOT_NEGATIVE)
    mamba: float = setting(1.0, "of the Mamba branches", NOT_NEGATIVE)
    gate: float = setting(1.0, "of the fusions", NOT_NEGATIVE)


@dataclass(frozen=True)
class Optim:
    """optim.*: the optimizer, its schedule, averaging, clipping and accumulation."""

    name: str = setting(
        "adamw",
        "muon is for the blocks' projections and leaves the rest to AdamW; schedule_free is AdamW"
        " with an average in place of a falling rate",
        choices=("adamw", "muon", "schedule_free"),
    )
    lr: float = setting(
        4e-3,
        "peak learning rate; the best of a sweep for gf_mh with AdamW. Updates of Muon have the"
        " size of AdamW's",
        ABOVE_ZERO,
    )
    schedule: str = setting(
        "cosine",
        "how the rate falls after the warm-up; wsd: not before the last decay_steps",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    min_lr_ratio: float = setting(0.1, "the rate ends at this share of the peak", SHARE)
    warmup_steps: int = setting(50, "linear; step 0 already moves", NOT_NEGATIVE)
    decay_steps: int = setting(
        0, "last steps of wsd, in which the rate falls; 0 for a fifth of all", NOT_NEGATIVE
    )
    weight_decay: float = setting(
        0.1, "on weight matrices alone, never on embeddings, gates or decays", NOT_NEGATIVE
    )
    b1: float = setting(
        0.9, "decay of the mean of gradients; schedule_free: share of the average", BELOW_ONE
    )
    b2: float = setting(0.95, "decay of the mean of their squares", BELOW_ONE)
    eps: float = setting(1e-8, "added to the root of that mean", ABOVE_ZERO)
    muon_momentum: float = setting(0.95, "decay of Muon's mean of gradients", BELOW_ONE)
    moments_dtype: str = setting(
        "float32", "of the means of gradients and squares", choices=("float32", "bfloat16")
    )
    ema: float = setting(
        0.0,
        "decay of a mean of the parameters, which is what is evaluated, saved and exported; 0 for"
        " none",
        BELOW_ONE,
    )
    clip: float = setting(1.0, "global gradient norm; 0 turns clipping off", NOT_NEGATIVE)
    lr_multipliers: Multipliers = setting(Multipliers, "of the learning rate, by part of the model")
    mamba_grad_scale: float = setting(
        1.0, "of the Mamba branches' gradients, before clipping; Adam divides it out", ABOVE_ZERO
    )
    part_warmup_steps: PartSteps = setting(
        PartSteps, "a longer warm-up of a part, to the same peak; 0: warmup_steps"
    )
    frozen_steps: PartSteps = setting(PartSteps, "first updates that leave a part as it is")
    grad_accumulation: int = setting(
        1, "microbatches per step; the gradient stays the full batch's", POSITIVE
    )


@dataclass(frozen=True)
class Train:
    """train.*: length, batches, evaluation, samples."""

    steps: int = setting(500, "batches to learn from", POSITIVE)
    max_minutes: float = setting(
        0.0, "stop after so long, for the same command to continue; 0 for no limit", NOT_NEGATIVE
    )
    batch_size: int = setting(64, "rows per step over all devices and microbatches", POSITIVE)
    seq_len: int = setting(64, "tokens per row", Range(lambda v: v >= 2, "at least 2"))
    carry_state: bool = setting(
        False, "begin each row with the state the last batch ended in (needs data.order=tracks)"
    )
    rwkv_dropout_start: float = setting(
        0.0, "chance that a block drops its RWKV branch, at step 0", BELOW_ONE
    )
    rwkv_dropout_end: float = setting(0.0, "at the last step; linear in between", BELOW_ONE)
    eval_every: int = setting(
        100, "steps between evaluations; 0 for none before the end", NOT_NEGATIVE
    )
    eval_tokens: int = setting(
        0, "validation tokens per evaluation; 0 for the whole split", NOT_NEGATIVE
    )
    patience: int = setting(
        0, "stop after so many evaluations without a new best; 0 for never", NOT_NEGATIVE
    )
    stop_rules: str = setting(
        "",
        "what else ends a run, with commas between: "
        + "; ".join(f"{name}: {when}" for name, when in STOP_RULES.items()),
        Range(
            lambda v: set(split_rules(v)) <= set(STOP_RULES),
            f"empty, or of {', '.join(STOP_RULES)} with commas between",
        ),
    )
    max_nonfinite: int = setting(
        10, "stop after so many NaN or infinite steps in a row (each is skipped)", POSITIVE
    )
    sample_every: int = setting(0, "steps between text samples; 0 for one at the end", NOT_NEGATIVE)
    sample_prompt: str = setting(
        "", "what a sample continues; empty: the start of the validation text"
    )
    sample_tokens: int = setting(256, "length of a sample; 0 for none at all", NOT_NEGATIVE)


@dataclass(frozen=True)
class Checkpoint:
    """checkpoint.*: when to save, and how many to keep."""

    every: int = setting(
        250, "steps; the best and the last are saved in any case; 0 for only those", NOT_NEGATIVE
    )
    keep: int = setting(2, "latest checkpoints kept, besides the best", POSITIVE)
    keep_every: int = setting(
        0, "steps between checkpoints that are kept for good; 0 for none", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class Parallel:
    """parallel.*: how devices share a batch."""

    mode: str = setting(
        "jit", "over a device mesh, or pmap; both compute the same", choices=("jit", "pmap")
    )
    fsdp: int = setting(
        1, "devices that share large parameters, their moments and gradients", POSITIVE
    )
    sequence: int = setting(
        1, "devices that share each row, train.seq_len / sequence tokens each", POSITIVE
    )


@dataclass(frozen=True)
class Log:
    """log.*: what a run records."""

    every: int = setting(10, "steps between lines of metrics.jsonl and of the screen", POSITIVE)
    activations: bool = setting(
        False,
        "also variances of activations, entropy of the output and norms of the states, of a few"
        " rows; costs a forward pass over them at every line",
    )
    tensorboard: bool = setting(True, "also write event files under tensorboard/")
    wandb: bool = setting(False, "also log to Weights & Biases; WANDB_MODE=offline keeps it here")
    trackio: bool = setting(False, "also log to trackio, on this machine unless it is told where")
    project: str = setting("gt_jax", "where wandb and trackio collect runs")


@dataclass(frozen=True)
class Config:
    """Every setting of a run, in groups."""

    seed: int = setting(
        0,
        "initial weights, order of the text, dropout and samples all follow from it",
        Range(lambda v: 0 <= v < 2**32, "between 0 and 2**32 - 1"),
    )
    model: Model = setting(Model, "the model")
    data: Data = setting(Data, "its text")
    optim: Optim = setting(Optim, "how it learns")
    train: Train = setting(Train, "for how long, on how much")
    debate: Debate = setting(Debate, "losses of a hybrid's branches besides the task's")
    checkpoint: Checkpoint = setting(Checkpoint, "what is saved")
    parallel: Parallel = setting(Parallel, "over which devices")
    log: Log = setting(Log, "what is logged")


# Fields that stood elsewhere when a run was stored.
_MOVED = {
    "model.rwkv_dropout_start": "train.rwkv_dropout_start",
    "model.rwkv_dropout_end": "train.rwkv_dropout_end",
}


def default_config() -> config_dict.ConfigDict:
    """Every setting with its default, for a config file to change and return."""
    return _placeholders(Config())


def from_config_dict(config: config_dict.ConfigDict | dict) -> Config:
    """Checked settings from an ml_collections ConfigDict or a plain (nested) dict.

    Raises:
        InputError: a field is unknown, missing, mistyped or out of range, or two fields disagree.
    """
    plain = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    built = _build(Config, plain, "")
    check(built)
    _check_together(built)
    return built


def from_stored(stored: dict) -> Config:
    """Like from_config_dict, for settings that an earlier version may have written.

    Fields that did not exist then get their defaults; renamed fields are translated.
    """
    values = flatten(to_dict(Config()))
    for name, value in flatten(stored).items():
        values[_MOVED.get(name, name)] = value
    return from_config_dict(unflatten(values))


def to_dict(config: Config) -> dict:
    """The nested plain dict that `from_config_dict` takes back."""
    return dataclasses.asdict(config)


def walk_fields(cls: Any = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """("seed", its dataclass field), ("model.preset", ...) and so on for every setting."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from walk_fields(field.type, prefix + field.name + ".")
        else:
            yield prefix + field.name, field


# A device that shares rows holds at least what a token reads of the ones before it.
FEWEST_TOKENS = 4


def computation_dtype(dtype: str) -> str:
    """model.dtype with "auto" resolved: bfloat16 on accelerators, float32 on CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_devices(config: Config, devices: int) -> None:
    """Raise InputError unless every microbatch divides evenly over `devices`."""
    fsdp, sequence, length = config.parallel.fsdp, config.parallel.sequence, config.train.seq_len
    if devices % (fsdp * sequence):
        raise InputError(
            f"parallel.fsdp={fsdp} times parallel.sequence={sequence} must divide the number of "
            f"devices, {devices}"
        )
    rows = devices // sequence
    if config.train.batch_size % (rows * config.optim.grad_accumulation):
        what = "devices" if sequence == 1 else f"groups of parallel.sequence={sequence} devices"
        raise InputError(
            f"train.batch_size={config.train.batch_size} must be a multiple of {rows} {what} "
            f"times optim.grad_accumulation={config.optim.grad_accumulation}"
        )
    if fsdp * sequence > 1 and config.parallel.mode == "pmap":
        raise InputError(
            "parallel.mode=pmap spreads rows alone: parallel.fsdp and parallel.sequence need jit"
        )
    if length % sequence or (sequence > 1 and length // sequence < FEWEST_TOKENS):
        raise InputError(
            f"train.seq_len={length} must be a multiple of parallel.sequence={sequence} and at "
            f"least {FEWEST_TOKENS} times as much"
        )


def _placeholders(settings) -> config_dict.ConfigDict:
    """A ConfigDict of a dataclass; a None knows what type may take its place."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = _placeholders(value)
        elif value is None:
            [kind] = (k for k in accepted(field.type) if k is not type(None))
            value = config_dict.placeholder(kind)
        values[field.name] = value
    return config_dict.ConfigDict(values)


def _build(cls, values, prefix: str):
    """An instance of cls; whole numbers serve as floats."""
    if not isinstance(values, dict):
        raise InputError(f"{prefix[:-1]}={values!r} must be a group of fields, not one value")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            fix = did_you_mean(name, fields) or "; --help lists them all"
            same = ELSEWHERE.get(name, "")
            if same.startswith(prefix) and same.removeprefix(prefix) in fields:
                fix = f"; did you mean {same!r}?"
            raise InputError(f"{prefix}{name} is not a config field{fix}")
    built = {}
    for name, field in fields.items():
        if name not in values:
            raise InputError(f"{prefix}{name} is missing; gt_jax.config.default_config has it")
        value = values[name]
        if isinstance(value, np.generic):  # a NumPy number; config.json takes Python's
            value = value.item()
        if dataclasses.is_dataclass(field.type):
            value = _build(field.type, value, prefix + name + ".")
        elif float in accepted(field.type) and type(value) is int:
            value = float(value)
        built[name] = value
    return cls(**built)


_MOST_TOKENS = 2**31 - 1  # of a step: indices are int32


def _check_together(config: Config) -> None:
    train, accumulation = config.train, config.optim.grad_accumulation
    if train.batch_size % accumulation:
        raise InputError(
            f"train.batch_size={train.batch_size} must be a multiple of "
            f"optim.grad_accumulation={accumulation}"
        )
    tokens = train.batch_size * train.seq_len
    if tokens > _MOST_TOKENS:  # the host would fill its memory with batches before a device says so
        raise InputError(
            f"train.batch_size={train.batch_size} with train.seq_len={train.seq_len} makes "
            f"{tokens:,} tokens a step, more than {_MOST_TOKENS:,}; lower one"
        )
    if train.carry_state and config.data.order != "tracks":
        raise InputError(
            f"train.carry_state=True needs text that continues from batch to batch: set "
            f'data.order="tracks" (it is "{config.data.order}")'
        )
    _check_optimizer(config.optim)
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every and (not every or keep_every % every):
        raise InputError(
            f"checkpoint.keep_every={keep_every} must be a multiple of checkpoint.every={every}"
        )
    if train.patience and not train.eval_every:
        raise InputError(f"train.patience={train.patience} needs evaluations: set train.eval_every")


def _check_optimizer(optim: Optim) -> None:
    if optim.decay_steps and optim.schedule != "wsd":
        raise InputError(
            f"optim.decay_steps={optim.decay_steps} is of optim.schedule=wsd; set that, or leave it"
            f" at 0 (the schedule is {optim.schedule})"
        )
    if optim.name != "schedule_free":
        return
    if optim.schedule != "constant":
        raise InputError(
            f"optim.name=schedule_free averages instead of lowering the rate, so optim.schedule="
            f"{optim.schedule} must be constant"
        )
    if optim.ema:
        raise InputError(
            f"optim.name=schedule_free has an average of its own; set optim.ema={optim.ema:g} to 0"
        )
    if not optim.b1:
        raise InputError("optim.name=schedule_free needs optim.b1=0.0 above 0, for example 0.9")
