"""A run's settings as frozen dataclasses; configs/base.py has their defaults and their meaning.

`from_config_dict` is the one door. It turns a plain ml_collections config into a `Config`, or
raises an InputError that names the field, the value and the mend, before anything is loaded or
compiled.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass

import jax

from gt_jax.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Model:
    preset: str
    init_from: str | None
    branches: str | None
    branch: str | None
    legacy_wkv: str | None
    fusion: str | None
    gate_init: float | None
    dim: int | None
    layers: int | None
    heads: int | None
    state_size: int | None
    max_positions: int | None
    tie_embeddings: bool | None
    feed_forward: bool | None
    init: str | None
    dtype: str
    impl: str
    rwkv_dropout_start: float
    rwkv_dropout_end: float
    remat: str


@dataclass(frozen=True)
class Data:
    source: str
    field: str
    tokenizer: str
    vocab_size: int
    order: str
    split: str
    validation_fraction: float


@dataclass(frozen=True)
class Multipliers:
    rwkv: float
    mamba: float
    gate: float


@dataclass(frozen=True)
class Optim:
    lr: float
    min_lr_ratio: float
    warmup_steps: int
    weight_decay: float
    b1: float
    b2: float
    eps: float
    clip: float
    lr_multipliers: Multipliers
    grad_accumulation: int


@dataclass(frozen=True)
class Train:
    steps: int
    max_minutes: float
    batch_size: int
    seq_len: int
    carry_state: bool
    eval_every: int
    eval_tokens: int
    patience: int
    max_nonfinite: int
    sample_every: int
    sample_prompt: str
    sample_tokens: int


@dataclass(frozen=True)
class Checkpoint:
    every: int
    keep: int


@dataclass(frozen=True)
class Parallel:
    mode: str


@dataclass(frozen=True)
class Log:
    every: int
    tensorboard: bool


@dataclass(frozen=True)
class Config:
    seed: int
    model: Model
    data: Data
    optim: Optim
    train: Train
    checkpoint: Checkpoint
    parallel: Parallel
    log: Log


def from_config_dict(config_dict) -> Config:
    """Checked settings from an ml_collections ConfigDict or a plain (nested) dict.

    Raises:
        InputError: a field is unknown, missing, mistyped or out of range, or two fields disagree.
    """
    plain = config_dict.to_dict() if hasattr(config_dict, "to_dict") else config_dict
    config = _build(Config, plain, "")
    _check(config)
    return config


def to_dict(config: Config) -> dict:
    """The nested plain dict that `from_config_dict` takes back."""
    return dataclasses.asdict(config)


def computation_dtype(dtype: str) -> str:
    """model.dtype with "auto" resolved: bfloat16 on accelerators, float32 on CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"optim": {"lr": 1e-3}} -> {"optim.lr": 1e-3}."""
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat.update(flatten(value, name + ".") if isinstance(value, dict) else {name: value})
    return flat


def field_names(cls=None, prefix: str = "") -> list[str]:
    """Every field of a Config: ["seed", "model.preset", ...]."""
    names = []
    for field in dataclasses.fields(cls or Config):
        nested = dataclasses.is_dataclass(field.type)
        name = prefix + field.name
        names += field_names(field.type, name + ".") if nested else [name]
    return names


# What other trainers call these fields.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "lr_min": "optim.min_lr_ratio",
    "min_lr": "optim.min_lr_ratio",
    "warmup": "optim.warmup_steps",
    "beta1": "optim.b1",
    "beta2": "optim.b2",
    "epsilon": "optim.eps",
    "grad_clip": "optim.clip",
    "max_grad_norm": "optim.clip",
    "gradient_accumulation_steps": "optim.grad_accumulation",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "max_iters": "train.steps",
    "max_seq_len": "train.seq_len",
    "sequence_length": "train.seq_len",
    "context_length": "train.seq_len",
    "block_size": "train.seq_len",
    "bs": "train.batch_size",
    "eval_interval": "train.eval_every",
    "log_interval": "log.every",
    "log_every": "log.every",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "num_layers": "model.layers",
    "n_embd": "model.dim",
    "d_model": "model.dim",
    "hidden_size": "model.dim",
    "n_head": "model.heads",
    "num_heads": "model.heads",
    "d_state": "model.state_size",
    "dataset": "data.source",
    "model": "model.preset",
}


def suggest_field(name: str, known) -> str:
    """`; did you mean 'optim.lr'?` to end a message about a field that is none, or "".

    Args:
        name: what was written, with or without its group.
        known: the names of all fields, with their groups.
    """
    group, _, last = name.rpartition(".")
    same = _ELSEWHERE.get(last.lower().replace("-", "_"))
    if same in known:
        return f"; did you mean {same!r}?"
    ends = [field for field in known if field.rpartition(".")[2] == last]
    if ends:  # the right name in another group, or without one
        return f"; did you mean {ends[0]!r}?"
    if group:
        return did_you_mean(name, known)
    lasts = {field.rpartition(".")[2]: field for field in reversed(list(known))}
    close = did_you_mean(name, lasts)
    return f"; did you mean {lasts[close.split(chr(39))[1]]!r}?" if close else ""


def check_devices(config: Config, devices: int) -> None:
    """Raise InputError unless every microbatch divides evenly over `devices`."""
    if config.train.batch_size % (devices * config.optim.grad_accumulation):
        raise InputError(
            f"train.batch_size={config.train.batch_size} must be a multiple of {devices} devices "
            f"times optim.grad_accumulation={config.optim.grad_accumulation}"
        )


def _build(cls, values: dict, prefix: str):
    if not isinstance(values, dict):
        raise InputError(f"{prefix[:-1]}={values!r} must be a group of fields, not one value")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            hint = did_you_mean(name, fields) or "; configs/base.py has them all"
            same = _ELSEWHERE.get(name, "")
            if same.startswith(prefix) and same.removeprefix(prefix) in fields:
                hint = f"; did you mean {same!r}?"
            raise InputError(f"{prefix}{name} is not a config field{hint}")
    for name in fields:
        if name not in values:
            raise InputError(f"{prefix}{name} is missing; configs/base.py has a default for it")
    return cls(**{name: _typed(fields[name], values[name], prefix + name) for name in fields})


def _typed(kind, value, name: str):
    """`value` as `kind`; whole floats are not integers, but integers are floats."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    accepted = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(value) in accepted or (value is None and types.NoneType in accepted):
        return value
    if float in accepted and type(value) is int:
        return float(value)
    expected = " or ".join("None" if t is types.NoneType else t.__name__ for t in accepted)
    raise InputError(f"{name}={value!r} must be {expected}, not {type(value).__name__}")


# field -> (test, what it must be)
_POSITIVE = (lambda v: v >= 1, "at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "0 or more")
_FRACTION = (lambda v: 0 < v < 1, "above 0 and below 1")
_SHARE = (lambda v: 0 <= v <= 1, "between 0 and 1")
_BETA = (lambda v: 0 <= v < 1, "from 0 to below 1")
_ABOVE_ZERO = (lambda v: v > 0, "above 0")
_RANGES = {
    "seed": (lambda v: 0 <= v < 2**32, "between 0 and 2**32 - 1"),
    "model.rwkv_dropout_start": _BETA,
    "model.rwkv_dropout_end": _BETA,
    "data.vocab_size": _POSITIVE,
    "data.validation_fraction": _FRACTION,
    "optim.lr": _ABOVE_ZERO,
    "optim.min_lr_ratio": _SHARE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.b1": _BETA,
    "optim.b2": _BETA,
    "optim.eps": _ABOVE_ZERO,
    "optim.clip": _NOT_NEGATIVE,
    "optim.lr_multipliers.rwkv": _NOT_NEGATIVE,
    "optim.lr_multipliers.mamba": _NOT_NEGATIVE,
    "optim.lr_multipliers.gate": _NOT_NEGATIVE,
    "optim.grad_accumulation": _POSITIVE,
    "train.steps": _POSITIVE,
    "train.max_minutes": _NOT_NEGATIVE,
    "train.batch_size": _POSITIVE,
    "train.seq_len": (lambda v: v >= 2, "at least 2"),
    "train.eval_every": _NOT_NEGATIVE,
    "train.eval_tokens": _NOT_NEGATIVE,
    "train.patience": _NOT_NEGATIVE,
    "train.max_nonfinite": _POSITIVE,
    "train.sample_every": _NOT_NEGATIVE,
    "train.sample_tokens": _NOT_NEGATIVE,
    "checkpoint.every": _NOT_NEGATIVE,
    "checkpoint.keep": _POSITIVE,
    "log.every": _POSITIVE,
}
_CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.impl": ("auto", "reference", "chunked", "mosaic"),
    "data.order": ("windows", "tracks"),
    "data.split": ("contiguous", "tracks"),
    "parallel.mode": ("jit", "pmap"),
}


def _check(config: Config) -> None:
    values = flatten(to_dict(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}={value} must be a finite number")
    for name, (test, wanted) in _RANGES.items():
        if not test(values[name]):
            raise InputError(f"{name}={values[name]} must be {wanted}")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise InputError(
                f"{name}={values[name]!r} must be one of {', '.join(choices)}"
                + did_you_mean(values[name], choices)
            )
    train, accumulation = config.train, config.optim.grad_accumulation
    if train.batch_size % accumulation:
        raise InputError(
            f"train.batch_size={train.batch_size} must be a multiple of "
            f"optim.grad_accumulation={accumulation}"
        )
    if train.carry_state and config.data.order != "tracks":
        raise InputError(
            f"train.carry_state=True needs text that continues from batch to batch: set "
            f'data.order="tracks" (it is "{config.data.order}")'
        )
    if train.patience and not train.eval_every:
        raise InputError(f"train.patience={train.patience} needs evaluations: set train.eval_every")
