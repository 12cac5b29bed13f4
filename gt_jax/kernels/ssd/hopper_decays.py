"""Sums of log decays of SSD: made outside of the kernels, read and applied inside.

With g the running sum of log2 decays from the chunk's start, exp2(g_i - g_j) is what passes from
token j to i >= j. g has as many terms as operands of products.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gt_jax.kernels.pallas.launch import CHUNK, row_major
from gt_jax.kernels.pallas.terms import join, split, split_truncated, terms_of, transpose
from gt_jax.kernels.pallas.tiles import over_rows
from gt_jax.kernels.ssd.hopper_sizes import Sizes

# exp of this is 0 in float32, and a chunk's sum of it is finite
_LOWEST_LOG_DECAY = -104.0
_LOG2_E = math.log2(math.e)


def by_chunk(z: jax.Array, size: Sizes) -> jax.Array:
    """[B, T, H] -> [B, H, chunks, CHUNK] float32, zero past the end."""
    # Row-major, or XLA, where a transpose is all there is to do, would lay out as its result
    # everything that z is computed from, and with it x, B and C.
    z = row_major(z.astype(jnp.float32))
    z = jnp.pad(z, ((0, 0), (0, size.chunks * CHUNK - size.length), (0, 0)))
    return z.transpose(0, 2, 1).reshape(size.batch, size.heads, size.chunks, CHUNK)


def by_token(z: jax.Array, size: Sizes) -> jax.Array:
    """[B, H, chunks, CHUNK] -> [B, T, H]."""
    z = z.reshape(size.batch, size.heads, -1).transpose(0, 2, 1)[:, : size.length]
    return row_major(z)


def log2_decays(a: jax.Array, size: Sizes) -> jax.Array:
    """Running sums g of log2 decays in each chunk.

    Two terms are the sums of whole numbers, which are exact, and of what is left, which are small:
    where one decay is strong, the differences of other sums would lose digits that float32 needs.

    Args:
        a: [B, T, H] log decay, at most 0; -inf forgets everything.
        size: of the call.

    Returns:
        [B, H, chunks, terms, CHUNK] float32.
    """
    a = by_chunk(jnp.maximum(a, _LOWEST_LOG_DECAY), size) * _LOG2_E
    whole = jnp.round(a)
    a = jnp.stack((a,) if size.terms == 1 else (whole, a - whole), axis=-2)
    until = np.tri(CHUNK, dtype=np.float32).T  # [s, t]: s <= t; a constant costs no launch
    return jnp.matmul(a, until, precision=lax.Precision.HIGHEST)


def decays(g_smem, slot, wg, load):
    """Terms of g of a chunk and a head, read by `load`: load_rows or load_columns."""
    return [load(ref) for ref in terms_of(g_smem.at[slot, wg])]


def decay_to_end(g_smem, slot, wg):
    """Terms of g of the chunk's last token, plain numbers."""
    return [g_smem[slot, wg, term, CHUNK - 1] for term in range(g_smem.shape[2])]


def weighed(x, weight, B):
    """Operands of the products that sum to (weight x)^T B; x and B are terms."""
    z = join(transpose(x))  # [P, C]
    z *= over_rows(weight, z.shape)
    if len(B) == 1:
        return [(term, B) for term in split_truncated(z)]
    return [(split(z, len(B)), B)]
