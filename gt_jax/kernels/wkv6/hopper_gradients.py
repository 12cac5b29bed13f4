"""What the gradient kernel of WKV6 does with the levels of a chunk."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.products import matmul
from gt_jax.kernels.pallas.terms import join, put, split, terms_of
from gt_jax.kernels.pallas.tiles import load
from gt_jax.kernels.wkv6.hopper_levels import LEVELS, ONE
from gt_jax.kernels.wkv6.hopper_sizes import SQUARE


def gradient_one(terms):
    """What a 1 of the patterns is in products with gradients, which need the range of bfloat16.

    One table serves both, as the bits of a power of two in float16 are one in bfloat16 too.
    """
    one = np.float16(ONE[terms])
    return float(one if interpreting() else one.view(jnp.bfloat16))


def through_levels(terms, refs, wg, masks, dr, dk, dw):
    """dr, dk and dw [C, K] with what reaches them through A; M lies where dS lay."""
    (exponent,) = matmul(sums(refs, wg, masks, LEVELS - 2))  # [C, K]
    for level in reversed(range(LEVELS)):
        at = wg + masks.zero()
        Y = terms_of(refs.Y_smem.at[at])
        decay = jnp.exp2(exponent) if level else 1.0  # no decay lies between neighbours
        r, k = load_float32(refs.r_smem.at[at]) * decay, load_float32(refs.k_smem.at[at]) * decay
        put(Y, split(jnp.where(masks.query(level), r, k), terms))
        plgpu.commit_smem()
        partners, M = masks.partners(level), terms_of(refs.dS_smem.at[at])
        M = tuple(jnp.where(partners, load_float32(z), 0.0).astype(jnp.bfloat16) for z in M)
        (dY,) = matmul((SQUARE, (M, Y)))  # [C, K]
        dx, query = dY * decay, masks.query(level)
        dr, dk = jnp.where(query, dr + dx, dr), jnp.where(query, dk, dk + dx)
        if level == 0:
            return dr, dk, dw
        at = wg + masks.zero()
        Y, Z = terms_of(refs.Y_smem.at[at]), terms_of(refs.Z_smem.at[at])
        put(Z, split(dY * join(Y), terms))
        plgpu.commit_smem()
        gathered = gather(refs, masks, dw, level - 1, Z)
        if level > 1:
            dw, exponent = matmul(gathered, sums(refs, wg, masks, level - 2))
        else:
            (dw,) = matmul(gathered)
        dw = stow(terms, refs.do_smem, wg, masks, dw)


def operands(refs, wg, masks):
    """The warpgroup's index, and the terms of do, of Y, Z and dS and what takes their places."""
    at = wg + masks.zero()
    tiles = refs.do_terms_smem.at[at], refs.Y_smem.at[at], refs.Z_smem.at[at], refs.dS_smem.at[at]
    return at, *map(terms_of, tiles)


def load_float32(ref):
    """A tile from shared memory as float32."""
    return load(ref).astype(jnp.float32)


def sums(refs, wg, masks, pattern):
    """For matmul: the log2 decays summed as a pattern says, [C, K]."""
    zero = masks.zero()
    return SQUARE, (refs.sums_smem.at[pattern + zero], terms_of(refs.log2_w_smem.at[wg + zero]))


def gather(refs, masks, start, pattern, Z):
    """For matmul: `start` and, for each log decay, the rows of Z in whose sums it is, [C, K]."""
    return start, (refs.dsums_smem.at[pattern + masks.zero()].T, Z)


def stow(terms, smem, wg, masks, z):
    """z or, as operands of two terms take the registers, the reference where it lies from now."""
    if terms == 1:
        return z
    ref = smem.at[wg + masks.zero()]
    ref[...] = z
    return ref
