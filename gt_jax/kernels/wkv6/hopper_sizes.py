"""Extents and tuning of the WKV6 kernels for Hopper GPUs, and where a warpgroup works."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.pallas.terms import TERMS

SIZE = 64  # key and value channels of a head on chip
SQUARE = (CHUNK, SIZE)  # a tile of an input
SCORES = (CHUNK, CHUNK)  # a tile of the matrix A
STATE = (SIZE, SIZE)  # a state, V before K


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring."""

    heads: int  # that a block of the grid works on, a warpgroup each
    split_stages: int  # chunks in flight in the pass over splits


# bfloat16 terms of an operand -> tuning; tiles of two terms leave room for one head
TUNING = {1: Tuning(heads=2, split_stages=2), 2: Tuning(heads=1, split_stages=2)}


class Sizes(NamedTuple):
    """Extents of one call of a kernel."""

    batch: int
    length: int
    heads: int
    K: int
    V: int
    terms: int  # bfloat16 numbers whose sum an operand is

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, CHUNK)

    @property
    def rows(self) -> int:
        """Pairs of an example and a head."""
        return self.batch * self.heads

    @property
    def heads_per_block(self) -> int:
        """A warpgroup each."""
        return min(TUNING[self.terms].heads, self.rows)

    @property
    def grid(self) -> dict[str, int]:
        return {"rows": pl.cdiv(self.rows, self.heads_per_block)}

    def place(self, n):
        """Example and head of warpgroup n of a block; a last odd one repeats its neighbour."""
        row = jnp.minimum(lax.axis_index("rows") * self.heads_per_block + n, self.rows - 1)
        return lax.div(row, jnp.int32(self.heads)), lax.rem(row, jnp.int32(self.heads))


def sizes_of(r: jax.Array, v: jax.Array) -> Sizes:
    """Sizes of a call with r [B, T, H, K] and v [B, T, H, V]."""
    return Sizes(*r.shape, v.shape[-1], TERMS[r.dtype])


def channels():
    """All channels of a head.

    Of a narrower head, bulk copies read zeros for channels that it has not, and write nothing
    there. The slice starts at a traced 0, as JAX refuses a slice that it sees to end beyond.
    """
    return pl.ds(lax.axis_index("wg") * 0, SIZE)
