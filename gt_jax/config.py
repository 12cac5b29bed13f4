"""A run's settings as frozen dataclasses: each with its type, default, range and meaning, once.

`default_config` gives them as an ml_collections ConfigDict for config files to change, and
`from_config_dict` takes it back: it returns a `Config`, or raises an InputError that names the
field, the value and the fix, before anything is loaded or compiled.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from gt_jax.errors import InputError, did_you_mean
from gt_jax.models import ModelConfig
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


def _model_fields() -> list[tuple]:
    """A preset, and the fields of ModelConfig to change: None means "as the preset says"."""
    fields = [
        ("preset", str, setting("gf-mh", "`python -m gt_jax.models` lists them all")),
        (
            "init_from",
            str | None,
            setting(
                None,
                "a model to continue from, as gt_jax.load takes it: the run has its weights,"
                " architecture and tokenizer, whatever preset and data.tokenizer say",
            ),
        ),
    ]
    kinds = typing.get_type_hints(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        about, choices = field.metadata["about"], field.metadata["choices"]
        within = field.metadata["within"]
        if field.name == "dtype":
            default, about = "auto", about + "; auto: bfloat16 on GPU and TPU, float32 on CPU"
            choices = ("auto", *choices)
        elif field.name in ("impl", "remat"):
            default = field.default
        elif field.name in ("vocab_size", "architecture"):  # from the tokenizer and the preset
            continue
        else:
            default = None
        kind = kinds[field.name] if default is not None else kinds[field.name] | None
        fields.append((field.name, kind, setting(default, about, within, choices=choices)))
    return fields


_ModelFields = dataclasses.make_dataclass("_ModelFields", _model_fields(), frozen=True)


class Model(_ModelFields):
    """model.*: a preset, changes to it, and how to compute it."""


@dataclass(frozen=True)
class Data:
    """data.*: the text, its tokens, and their order."""

    source: str = setting(
        "shakespeare", "shakespeare, shakespeare-all, a file, a folder, or tfds:NAME"
    )
    field: str = setting("text", "the text field of JSONL lines and TFDS examples")
    tokenizer: str = setting("char", "char, char97 (32 reserved ids first) or sentencepiece")
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
    """optim.*: AdamW, its schedule, clipping and accumulation."""

    lr: float = setting(
        4e-3, "peak learning rate of AdamW; the best of a sweep for gf_mh", ABOVE_ZERO
    )
    min_lr_ratio: float = setting(0.1, "the cosine ends at this share of the peak", SHARE)
    warmup_steps: int = setting(50, "linear; step 0 already moves", NOT_NEGATIVE)
    weight_decay: float = setting(
        0.1, "on weight matrices alone, never on embeddings, gates or decays", NOT_NEGATIVE
    )
    b1: float = setting(0.9, "decay of the mean of gradients", BELOW_ONE)
    b2: float = setting(0.95, "decay of the mean of their squares", BELOW_ONE)
    eps: float = setting(1e-8, "added to the root of that mean", ABOVE_ZERO)
    moments_dtype: str = setting("float32", "of AdamW's two", choices=("float32", "bfloat16"))
    clip: float = setting(1.0, "global gradient norm; 0 turns clipping off", NOT_NEGATIVE)
    lr_multipliers: Multipliers = setting(Multipliers, "of the learning rate, by part of the model")
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


@dataclass(frozen=True)
class Parallel:
    """parallel.*: how devices share a batch."""

    mode: str = setting(
        "jit", "over a device mesh, or pmap; both compute the same", choices=("jit", "pmap")
    )


@dataclass(frozen=True)
class Log:
    """log.*: what a run records."""

    every: int = setting(10, "steps between lines of metrics.jsonl and of the screen", POSITIVE)
    tensorboard: bool = setting(True, "also write event files under tensorboard/")


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


def computation_dtype(dtype: str) -> str:
    """model.dtype with "auto" resolved: bfloat16 on accelerators, float32 on CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_devices(config: Config, devices: int) -> None:
    """Raise InputError unless every microbatch divides evenly over `devices`."""
    if config.train.batch_size % (devices * config.optim.grad_accumulation):
        raise InputError(
            f"train.batch_size={config.train.batch_size} must be a multiple of {devices} devices "
            f"times optim.grad_accumulation={config.optim.grad_accumulation}"
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
    if train.patience and not train.eval_every:
        raise InputError(f"train.patience={train.patience} needs evaluations: set train.eval_every")
