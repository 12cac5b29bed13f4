"""Extents and tuning of the SSD kernels for Hopper GPUs."""

import dataclasses
from typing import NamedTuple

import jax

from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.pallas.terms import TERMS

SQUARE = (CHUNK, CHUNK)  # a tile with a token in its rows and one in its columns


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring."""

    heads: int  # that a block of the grid works on at most, a warpgroup each
    stages: int  # chunks in flight, forward
    backward_stages: int  # and backward
    split_stages: int  # and in the pass over splits
    longest_chain: int = 16  # blocks that add to one sum, each starting after the one before
    examples_together: int = 8  # whose blocks run at a time, at most


# bfloat16 terms of an operand -> tuning; tiles of two terms leave room for one head
TUNING = {
    1: Tuning(heads=2, stages=3, backward_stages=2, split_stages=4),
    2: Tuning(heads=1, stages=2, backward_stages=1, split_stages=4),
}


class Sizes(NamedTuple):
    """Extents of one call of a kernel."""

    batch: int
    length: int
    heads: int
    groups: int
    P: int
    N: int
    terms: int  # bfloat16 numbers whose sum an operand is

    @property
    def tuning(self) -> Tuning:
        return TUNING[self.terms]

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    @property
    def heads_per_block(self) -> int:
        """All heads of a block share the B and C of one group."""
        return self.tuning.heads if self.heads_per_group % self.tuning.heads == 0 else 1

    @property
    def blocks(self) -> int:
        """Blocks of the grid that an example takes."""
        return self.heads // self.heads_per_block


def sizes_of(x: jax.Array, B: jax.Array) -> Sizes:
    """Sizes of a call with x [B, T, H, P] and B [B, T, G, N]."""
    return Sizes(*x.shape[:3], B.shape[2], x.shape[3], B.shape[3], TERMS[x.dtype])
