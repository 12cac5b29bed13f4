"""Sums of log decays of SSD, of decay_sums.py, read and applied inside the kernels.

With g the running sum of log2 decays from the chunk's start, exp2(g_i - g_j) is what passes from
token j to i >= j. g has as many terms as operands of products.
"""

from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.pallas.terms import join, split, split_truncated, terms_of, transpose
from gt_jax.kernels.pallas.tiles import over_rows


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
