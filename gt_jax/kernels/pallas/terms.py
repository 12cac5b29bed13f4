"""Float32 numbers as sums of bfloat16 terms, which the tensor cores multiply.

One term (hi) holds 8 bits of a number, two (hi, lo) hold 16, three hold all 24. An operand in
several terms is a tuple of values or of references, the largest term first.
"""

import functools
import operator

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.tiles import load, overlay, tile

# dtype of the inputs -> terms of the operands of products
TERMS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 2}


def split(z, terms=2, dtype=jnp.bfloat16):
    """A float32 value as a tuple of 16 bit terms whose sum it is."""
    hi = z.astype(dtype)
    if terms == 1:
        return (hi,)
    return hi, *split(z - hi.astype(jnp.float32), terms - 1, dtype)


def split_truncated(z):
    """Like split(z, 2), but truncates instead of rounding twice: one bit less accurate, and no
    conversions of single numbers, which are slow."""
    bits = lax.bitcast_convert_type(z, jnp.uint32) & jnp.uint32(0xFFFF0000)
    hi = lax.bitcast_convert_type(bits, jnp.float32)
    return hi.astype(jnp.bfloat16), (z - hi).astype(jnp.bfloat16)


def total(terms):
    """The sum of terms."""
    return functools.reduce(operator.add, terms)


def difference(z, y):
    """z - y, term by term: first the terms that are large and alike in both."""
    return total(a - b for a, b in zip(z, y, strict=True))


def input_tiles(terms, *shape):
    """Shared memory for inputs that become operands: as they arrive, and in terms."""
    in_terms = tile(*shape[:-2], terms, *shape[-2:])
    return in_terms if terms == 1 else (tile(*shape, dtype=jnp.float32), in_terms)


def input_tiles_in_place(terms, *shape):
    """`input_tiles` whose terms take the place of what arrives; see split_in_place."""
    tiles = input_tiles(terms, *shape)
    return tiles if terms == 1 else overlay(*tiles)


def whole_and_terms(terms, tiles):
    """`input_tiles` in a kernel: references [..., rows, columns], [..., terms, rows, columns]."""
    if terms > 1:
        return tiles
    return tiles.at[(slice(None),) * (tiles.ndim - 3) + (0,)], tiles


def terms_of(ref):
    """References to the terms in a tile [terms, rows, columns]."""
    return tuple(ref.at[term] for term in range(ref.shape[0]))


def put(refs, terms):
    """Writes terms to their places."""
    for ref, term in zip(refs, terms, strict=True):
        ref[...] = term


def split_in_place(whole, refs):
    """Splits a float32 tile whose place is that of its terms; returns the value."""
    z = load(whole)
    plgpu.commit_smem()  # every warp has read it
    put(refs, split(z, len(refs)))
    return z


def join(refs):
    """The float32 value whose terms lie there."""
    return total(load(ref).astype(jnp.float32) for ref in refs)


def transpose(refs):
    """References to the terms of the transpose."""
    return tuple(ref.T for ref in refs)
