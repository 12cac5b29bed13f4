"""One place for a setting: its type, default, meaning, and range or choices.

    @dataclass(frozen=True)
    class Optim:
        lr: float = setting(4e-3, "peak learning rate", ABOVE_ZERO)

`check` holds a dataclass of settings to what its fields say.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gt_jax.errors import InputError, did_you_mean


class Range(NamedTuple):
    """The numbers that a setting accepts: a test, and the same in words."""

    test: Callable[[Any], bool]
    wanted: str


POSITIVE = Range(lambda v: v >= 1, "at least 1")
NOT_NEGATIVE = Range(lambda v: v >= 0, "0 or more")
ABOVE_ZERO = Range(lambda v: v > 0, "above 0")
FRACTION = Range(lambda v: 0 < v < 1, "above 0 and below 1")
SHARE = Range(lambda v: 0 <= v <= 1, "between 0 and 1")
LARGEST = 2**31 - 1  # of whole numbers: they become int32 on the device
SMALLEST, LARGEST_FLOAT = 1.2e-38, 3.4e38  # of other numbers but 0: they become float32
BELOW_ONE = Range(lambda v: 0 <= v < 1, "from 0 to below 1")


def setting(
    default: Any, about: str, within: Range | None = None, *, choices: Sequence[str] = ()
) -> Any:
    """A dataclass field with a default and its meaning in one line.

    Args:
        default: a value, or a class for a group of settings that starts from its own defaults.
        about: what it does, for people; `--help` and the documentation print it.
        within: the numbers it takes.
        choices: the words it takes.
    """
    metadata = {"about": about, "within": within, "choices": tuple(choices)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(settings: Any, prefix: str = "") -> None:
    """Raise InputError unless every field has its type and lies in its range or choices.

    Args:
        settings: a dataclass whose fields come from `setting`; groups inside are checked too.
        prefix: what the fields' names begin with in messages, e.g. "model.".
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check(value, name + ".")
        else:
            _check_type(value, field.type, name)
            if value is not None:
                _check_value(value, field.metadata, name)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"optim": {"lr": 1e-3}} -> {"optim.lr": 1e-3}."""
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat.update(flatten(value, name + ".") if isinstance(value, dict) else {name: value})
    return flat


def unflatten(flat: dict[str, object]) -> dict:
    """Undo `flatten`. Raises InputError if a name is within another one's value."""
    tree = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise InputError(f"{name} is not a config field: {group} is one value")
        node[last] = value
    return tree


def accepted(kind: Any) -> tuple[type, ...]:
    """The types of a field: (int, NoneType) of `int | None`."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


# Types in the words of a message, and the values that count as one.
_KINDS = {
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    bool: ("true or false", bool),
    str: ("text", str),
}


def _check_type(value, kind, name: str) -> None:
    kinds = accepted(kind)
    if value is None and types.NoneType in kinds:
        return
    kinds = [k for k in kinds if k is not types.NoneType]
    if any(
        isinstance(value, _KINDS[k][1]) and isinstance(value, bool) == (k is bool) for k in kinds
    ):
        return
    expected = " or ".join(_KINDS[k][0] for k in kinds)
    raise InputError(f"{name}={value!r} must be {expected}, not {type(value).__name__}")


def _check_value(value, metadata, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}={value} must be a finite number")
    if isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST_FLOAT:
        raise InputError(
            f"{name}={value} must lie between {SMALLEST:g} and {LARGEST_FLOAT:g}: beyond, it would "
            "be zero or infinite in float32"
        )
    within, choices = metadata.get("within"), metadata.get("choices")
    if within and not within.test(value):
        raise InputError(f"{name}={value} must be {within.wanted}")
    if within in (POSITIVE, NOT_NEGATIVE) and isinstance(value, int) and value > LARGEST:
        raise InputError(f"{name}={value} must be at most {LARGEST}")
    if choices:
        check_choice(name, value, choices)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise InputError, naming the nearest choice, unless `value` is one of the choices."""
    if value not in choices:
        raise InputError(
            f"{name}={value!r} must be one of {', '.join(choices)}" + did_you_mean(value, choices)
        )
