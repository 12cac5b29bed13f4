"""What both directions of the portable WKV6 kernels share: sums of log decays inside a block.

A chunk of 64 tokens is cut into four blocks of 16, one a warp. With p the sum of log decays from
the start of a token's block (without the token) and s the sum to the block's end,

    Q = r exp(p)      Kh = k exp(s)      E = exp(the block's whole sum)

token i of block x reads token j of an earlier block y through Q_i . (E_{y+1} ... E_{x-1} Kh_j), and
tokens of one block meet at the levels 1, 2, 4, 8 of chunks.py. All exponents are at most 0.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from gt_jax.kernels.chunks import levels
from gt_jax.kernels.pallas import tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.pallas.warps import BLOCK, BLOCKS


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring."""

    prefetch: bool = False  # the next chunk into the second-level cache


TUNING = Tuning()

LEVELS = BLOCK.bit_length() - 1
# Places among patterns(): of level l > 0 it is l - 1.
FROM_START, TO_END, WHOLE = LEVELS - 1, LEVELS, LEVELS + 1
# Rows of E in shared memory: ones around the four of the blocks, for blocks that do not exist.
FIRST, E_ROWS = BLOCKS - 1, 3 * BLOCKS - 2


@functools.cache
def _patterns():
    """[6, 64, 16] of 0 and 1: what token i of any block sums over the tokens of its block."""
    before = np.tri(BLOCK, k=-1)
    one_block = [*levels(BLOCK).before[1:], before, before.T, np.ones((BLOCK, BLOCK))]
    return np.tile(np.stack(one_block), (1, BLOCKS, 1))


def sum_patterns():
    """The patterns in float16, for sums of log decays."""
    return jnp.asarray(_patterns(), jnp.float16)


def gradient_patterns():
    """Their transposes in bfloat16, for the gradients of those sums."""
    by_block = _patterns().reshape(-1, BLOCKS, BLOCK, BLOCK).swapaxes(2, 3)
    return jnp.asarray(by_block.reshape(-1, CHUNK, BLOCK), jnp.bfloat16)


class Masks:
    """Masks made anew wherever they are used, as hopper_levels.Masks: kept, they cost registers."""

    def __init__(self, zero_ref):
        self._zero = zero_ref

    def zero(self):
        """An int32 zero the compiler does not know."""
        return self._zero[...]

    def query(self, level, columns):
        """The row's token lies in the second half of its block of this level."""
        i = tiles.iota((CHUNK, columns), 0) + self.zero() * BLOCK
        return (i & (1 << level)) != 0

    def has_block(self, shift):
        """1 where the row's block has one at `shift`, else 0, [64, 16]."""
        block = (tiles.iota((CHUNK, BLOCK), 0) + self.zero() * CHUNK) >> LEVELS
        return _number(block + shift >= 0 if shift < 0 else block + shift < BLOCKS)

    def _row_and_column(self):
        i = tiles.iota((CHUNK, BLOCK), 0) + self.zero() * CHUNK
        return i & (BLOCK - 1), tiles.iota((CHUNK, BLOCK), 1)

    def apart(self, level):
        """Two tokens of a block, [64, 16], part at this level or above."""
        i, j = self._row_and_column()
        return (i ^ j) >= (1 << level)

    def part(self, level):
        """1 where two tokens of a block part at this very level, else 0."""
        i, j = self._row_and_column()
        return _number(((i ^ j) >> level) == 1)

    def later(self):
        """The row's token comes after the column's."""
        i, j = self._row_and_column()
        return i > j

    def not_before(self):
        """1 where the row's token is the column's or comes after it, else 0."""
        i, j = self._row_and_column()
        return _number(i >= j)

    def diagonal(self):
        """Row and column are the same token."""
        i, j = self._row_and_column()
        return i == j


def _number(mask):
    """A mask as a factor: a selected accumulator is rounded number by number, not two at a time."""
    return jnp.where(mask, 1.0, 0.0)


def summed_within(patterns_ref, masks, g):
    """A function of a place: that sum of log2 decays g [64, K] (float16) inside the blocks."""
    rows = warps.right(g)

    def sums(place):
        pattern = warps.load_left(patterns_ref.at[place + masks.zero()], optimized=False)
        return warps.block_dot(warps.zeros(CHUNK, g.shape[1]), pattern, rows)

    return sums
