"""Matrices in shared memory and in registers: their types, and how they are read and spread.

Values have the layout of a wgmma accumulator, in which a warpgroup holds 64 rows.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import CHUNK

# Of 16-bit numbers
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def tile(*shape, dtype=jnp.bfloat16):
    """Shared memory for matrices [..., rows, columns] in the layout wgmma and bulk copies want."""
    columns = 128 // jnp.dtype(dtype).itemsize  # a swizzled row is 128 bytes
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def overlay(*types):
    """Scratch of several types in one place; the interpreter wants a place for each."""
    return types if interpreting() else plgpu.RefUnion(*types)


def tokens(m):
    """The tokens of chunk m."""
    return pl.ds(pl.multiple_of(m * CHUNK, CHUNK), CHUNK)


def iota(shape, axis):
    """Index along `axis`."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def full(shape, value, dtype):
    """A constant."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), plgpu.Layout.WGMMA)


def load(ref):
    """A tile from shared memory."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)


def load_from_gmem(ref):
    """A tile from global memory, without shared memory between."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def load_rows(ref):
    """[rows] from shared memory, to be broadcast along the columns of an accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def load_columns(ref):
    """[columns] from shared memory, to be broadcast along the rows of an accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def over_rows(v, shape):
    """[columns] -> shape, the same in every row."""
    return lax.broadcast_in_dim(v, shape, [1])


def over_columns(v, shape):
    """[rows] -> shape, the same in every column."""
    return lax.broadcast_in_dim(v, shape, [0])
