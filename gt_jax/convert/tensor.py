"""A tensor still in its file, and how messages quote what a file says."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """Shape and dtype of a tensor, and read() -> np.ndarray, which raises InputError if damaged."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def one_line(text, limit: int = 300) -> str:
    """What a file or an exception says, as a message can quote it: one short line, printable."""
    words = " ".join(str(text)[: 4 * limit].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if len(line) <= limit else f"{line[:limit]}..."
