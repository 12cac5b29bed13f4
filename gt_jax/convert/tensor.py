"""A tensor still in its file."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """Shape and dtype of a tensor, and read() -> np.ndarray, which raises InputError if damaged."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
