"""Checks of single values from a user; each error names the field, the value and the fix."""

import math
import numbers
import reprlib
from typing import Any

import numpy as np

from gt_jax.errors import InputError

INT32 = 2**31 - 1


class _Brief(reprlib.Repr):
    """Python's, with integers that repr refuses for their digits, inside of arrays too."""

    def repr_int(self, x, level):
        if abs(x) < 10**40:
            return super().repr_int(x, level)
        return f"<a whole number of about {int(x.bit_length() * math.log10(2)) + 1} digits>"


_BRIEF = _Brief()  # Python 3.11 takes no arguments here
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 2, 4, 4, 4
_BRIEF.maxstring, _BRIEF.maxother = 60, 60


class SettingError(InputError):
    """A field of a request that cannot be; `field` is its name."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def brief(value: Any) -> str:
    """repr(value) of at most about 200 characters, even for numbers that repr itself refuses."""
    return _BRIEF.repr(value)


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """value as an int from low to high.

    Raises:
        SettingError: the value is not a whole number (a bool is none), or is out of the range.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not _lies_within(value, low, high):
        raise SettingError(name, f"{name}={brief(value)} must be a whole number, {low} to {high}")
    return int(value)


def check_real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """value as a float from low (not low itself with `above`) to high.

    Raises:
        SettingError: the value is not a finite number (a bool is none), or is out of the range.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not _lies_within(value, low, high) or (above and value == low):
        wanted = f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise SettingError(name, f"{name}={brief(value)} must be a number {wanted}")
    return float(value)


def _lies_within(value: Any, low: float, high: float) -> bool:
    return low <= value <= high


def check_surrogates(name: str, text: str) -> None:
    """Raise SettingError for a text with half of a surrogate pair, which no UTF-8 text holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingError(
            name,
            f"{name} holds {text[error.start]!a} at character {error.start}, half of a "
            "surrogate pair; send whole characters",
        ) from error


def token_ids(name: str, tokens: Any) -> np.ndarray:
    """[T] int64 of a list or an array of whole numbers.

    Raises:
        SettingError: text, numbers that are not whole, a list of lists.
    """
    if isinstance(tokens, str | bytes):
        raise SettingError(name, f"{name}={brief(tokens)} must be token ids; encode the text")
    try:
        ids = np.asarray(tokens)
    except (ValueError, OverflowError, TypeError) as error:  # a list of lists, not all as long
        raise SettingError(name, f"{name} must be one list of token ids") from error
    if ids.ndim != 1:
        raise SettingError(name, f"{name} has {ids.ndim} axes; give one list of token ids")
    if ids.size and (ids.dtype.kind not in "iu" or ids.dtype == np.uint64):
        whole = lambda i: isinstance(i, numbers.Integral) and not isinstance(i, bool)
        given = tokens if isinstance(tokens, list | tuple) else ids.tolist()
        for odd in (i for i in given if not whole(i) or abs(int(i)) > INT32):
            raise SettingError(name, f"{name} holds {brief(odd)}, which is no token id")
        ids = np.asarray([int(i) for i in given])
    return ids.astype(np.int64)


def check_ids(name: str, ids: np.ndarray, vocab: int) -> None:
    """Raise SettingError naming the first of ids [T] outside a vocabulary of this size."""
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise SettingError(name, f"{name} has the id {outside[0]}; ids are 0 to {vocab - 1}")
