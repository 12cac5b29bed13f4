"""The levels of chunks.py on chip: sums of log decays, and which tokens a level pairs."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from gt_jax.kernels.chunks import levels
from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.pallas.terms import split
from gt_jax.kernels.pallas.tiles import iota

_LOWEST_LOG_DECAY = -128.0  # exp of this is 0 in float32
_LOG2_E = math.log2(math.e)

LEVELS = CHUNK.bit_length() - 1

# Log decays are summed on the tensor cores as float16, whose 11 bits are more than the bfloat16
# operands of other products resolve, and in as many terms as those have. Second terms come close to
# the smallest number of float16: with two terms, log decays are 64 times as large and a 1 of the
# patterns is 1/64.
ONE = {1: 1.0, 2: 2.0**-6}

FROM_START, TO_END = 5, 6  # places of the chunk-wide patterns among sum_patterns()


def log2_decay(w, terms):
    """Terms of w / log(2) / ONE; -inf is replaced by a number that decays to zero as well."""
    z = jnp.maximum(w, _LOWEST_LOG_DECAY) * (_LOG2_E / ONE[terms])
    return split(z, terms, jnp.float16)


@functools.cache
def _patterns():
    C = CHUNK
    from_start, to_end = np.tri(C, k=-1), np.tri(C, k=-1).T
    return np.concatenate([levels(C).before[1:], [from_start, to_end]])


def sum_patterns(terms):
    """[7, C, C] float16 of 0 and ONE: which log decays a token sums.

    The pattern of level l is at l - 1 (level 0 sums nothing); then follow those from the chunk's
    start (FROM_START) and to its end (TO_END).
    """
    return jnp.asarray(_patterns() * ONE[terms], jnp.float16)


class Masks:
    """Masks over a tile [C, C], computed where they are used, and a zero that hides constants.

    What depends on nothing in a loop is computed once, before it, and then occupies registers that
    the loop needs: masks, addresses, descriptors of operands. A zero read from memory, added to an
    index, prevents that. In the masks it is mixed into bits in which the compiler cannot tell rows
    or columns apart anyway; in the other bits most of a mask folds to constants, because a register
    of an accumulator holds known columns and half-known rows.
    """

    def __init__(self, zero_ref):
        self._zero = zero_ref

    def zero(self):
        """An int32 zero the compiler does not know."""
        return self._zero[...]

    def _indices(self):
        zero = self.zero()
        i = iota((CHUNK, CHUNK), 0) + zero * 16
        return i, iota((CHUNK, CHUNK), 1)

    def query(self, level):
        """The row's token is a query at this level: it lies in the second half of its block."""
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
        """One of the two tokens reads the other at this level."""
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
