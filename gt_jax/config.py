"""A run's settings as one frozen dataclass of the groups in gt_jax.config_groups.

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

from gt_jax.config_groups import Checkpoint, Data, Log, Lora, Optim, Parallel, Train
from gt_jax.config_hybrid import Debate
from gt_jax.config_model import Model
from gt_jax.errors import InputError, did_you_mean
from gt_jax.settings import Range, accepted, check, flatten, setting, unflatten
from gt_jax.suggestions import ELSEWHERE


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
    if train.tune != "none" and config.model.init_from is None:
        raise InputError(
            f"train.tune={train.tune} trains a part of a stored model; name one with "
            "model.init_from=RUN"
        )
    if train.lora != Lora() and train.tune != "lora":
        raise InputError(
            f"train.lora is of train.tune=lora, and train.tune={train.tune}; set that, or leave "
            "train.lora as it is"
        )
    _check_optimizer(config.optim)
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every and (not every or keep_every % every):
        raise InputError(
            f"checkpoint.keep_every={keep_every} must be a multiple of checkpoint.every={every}"
        )
    if train.rewind_mads:
        _check_rewind(config)
    if train.patience and not train.eval_every:
        raise InputError(f"train.patience={train.patience} needs evaluations: set train.eval_every")


def _check_rewind(config: Config) -> None:
    train, every = config.train, config.checkpoint.every
    if train.carry_state:
        raise InputError(
            f"train.rewind_mads={train.rewind_mads:g} skips text, which train.carry_state=True "
            "would have to follow; set one to 0 or False"
        )
    # A spike is seen two steps late, and its own checkpoints must not push out the one before.
    if every < train.rewind_steps + 2 or config.checkpoint.keep < 2:
        raise InputError(
            f"train.rewind_mads={train.rewind_mads:g} needs checkpoint.every={every} to be at "
            f"least train.rewind_steps + 2, and checkpoint.keep={config.checkpoint.keep} at least 2"
        )


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
