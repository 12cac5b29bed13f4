"""What both directions of the WKV6 kernels share: sums of log decays, and who meets whom."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from gt_jax.kernels import mosaic
from gt_jax.kernels.chunks import levels
from gt_jax.kernels.mosaic import CHUNK

_LOWEST_LOG_DECAY = -128.0  # exp of this is 0 in float32
_LOG2_E = math.log2(math.e)

# Log decays are summed on the tensor cores as float16, whose 11 bits are beyond what the bfloat16
# operands of other products resolve, and in as many parts as those. Second parts come close to the
# smallest number of float16: with two, log decays are 64 times as large and a 1 of the patterns is
# 1/64.
ONE = {1: 1.0, 2: 2.0**-6}

SIZE = 64  # key and value channels of a head on chip
HEADS = 2  # that a block of the grid works on, a warpgroup each; 1 where tiles hold two parts
FROM_START, TO_END = 5, 6  # places of the chunk-wide patterns among sum_patterns()


def channels():
    """All channels of a head: of a narrower one, bulk copies read zeros for what is not there, and
    write nothing there. They start at a traced 0, as JAX refuses a slice it sees to end beyond.
    """
    return pl.ds(lax.axis_index("wg") * 0, SIZE)


def place_of(heads, batch, H, n):
    """Batch row and head that warpgroup n of a block has; a last odd one repeats its neighbour."""
    row = jnp.minimum(lax.axis_index("rows") * heads + n, batch * H - 1)
    return lax.div(row, jnp.int32(H)), lax.rem(row, jnp.int32(H))


def log2_decay(w, parts):
    """Parts of log decays in base 2, over ONE; -inf is replaced by what decays to zero as well."""
    z = jnp.maximum(w, _LOWEST_LOG_DECAY) * (_LOG2_E / ONE[parts])
    return mosaic.split(z, parts, jnp.float16)


@functools.cache
def _patterns():
    C = CHUNK
    from_start, to_end = np.tri(C, k=-1), np.tri(C, k=-1).T
    return np.concatenate([levels(C).before[1:], [from_start, to_end]])


def sum_patterns(parts):
    """[7, C, C] float16 of 0 and ONE: what is summed at level l, at l - 1 (level 0 sums nothing);
    then from the chunk's start, and to its end."""
    return jnp.asarray(_patterns() * ONE[parts], jnp.float16)


class Fresh:
    """Values made anew wherever they are used: masks over an accumulator [C, C], and a zero.

    What depends on nothing in a loop is computed once, before it, and then occupies registers that
    the loop has not: masks, addresses, descriptors of operands. A zero read from memory, added to
    an index, hides that. In the masks it is mixed into bits where the compiler cannot tell rows or
    columns apart anyway; in the others most of a mask folds to constants, because a register of an
    accumulator holds known columns and half-known rows.
    """

    def __init__(self, zero_ref):
        self._zero = zero_ref

    def zero(self):
        """An int32 zero the compiler does not know."""
        return self._zero[...]

    def _indices(self):
        zero = self.zero()
        i = mosaic.iota((CHUNK, CHUNK), 0) + zero * 16
        return i, mosaic.iota((CHUNK, CHUNK), 1)

    def query(self, level):
        """The row's token lies in the second half of its block."""
        return (self._indices()[0] & (1 << level)) != 0

    def _same_block(self, level, i, j):
        high = max(4, level + 1)
        same = (i >> high) == (j >> high)
        for bit in range(level + 1, 4):
            same &= (i & (1 << bit)) == (j & (1 << bit))
        return same

    def pair(self, level):
        """The row's token reads the column's at this level."""
        i, j = self._indices()
        bit = 1 << level
        return self._same_block(level, i, j) & ((i & bit) != 0) & ((j & bit) == 0)

    def partners(self, level):
        """The two tokens meet at this level, either way round."""
        i, j = self._indices()
        bit = 1 << level
        return self._same_block(level, i, j) & ((i & bit) != (j & bit))

    def diagonal(self):
        """Row and column are the same token."""
        return self._same_block(-1, *self._indices())

    def later(self):
        """The row's token comes after the column's."""
        i, j = self._indices()
        far = (i >> 4) > (j >> 4)
        near = (i >> 4) == (j >> 4)
        halves = ((i & 8) != 0) & ((j & 8) == 0)
        return far | (near & (halves | (((i & 8) == (j & 8)) & ((i & 7) > (j & 7)))))
