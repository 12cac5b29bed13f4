"""Tiles of 64 tokens as the kernels of token shifts hold them in registers.

A quad of threads holds 32 channels of a token, each thread eight neighbours: 16 bytes of bfloat16,
one access to memory. A product by warps wants other columns in a thread, 2 q + {0, 1} of every
eight for thread q of the quad. Which column of a product stands for which channel is free, however:
with the matrix's channels in the order of `in_order_of_products`, the registers of an accumulator
or of a left operand are those of a tile, grouped otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import tiles
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.pallas.warps import inline

GROUP = 32  # channels of a quad: the order of channels changes within them

TILE = plgpu.Layout.TILED(
    fragmented_array.Tiling(((64, 32), (16, 32), (8, 32), (8,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# The same for 32 tokens, of which a thread holds half as much.
SMALL_TILE = plgpu.Layout.TILED(
    fragmented_array.Tiling(((32, 32), (8, 32), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_ACC = plgpu.Layout.WGMMA


def in_order_of_products(w: jax.Array, axis: int) -> jax.Array:
    """w with an axis of channels (a multiple of 32) in the order that products want; see above."""
    axis %= w.ndim
    shape = (*w.shape[:axis], -1, 4, 4, 2, *w.shape[axis + 1 :])
    return w.reshape(shape).swapaxes(axis + 1, axis + 2).reshape(w.shape)


def _layout(rows):
    return TILE if rows == CHUNK else SMALL_TILE


def load(ref):
    """A tile [64 or 32, columns] of global or shared memory, in its dtype."""
    if interpreting():
        return ref[...]
    return plgpu.load(ref, layout=_layout(ref.shape[0]), optimized=False)


def as_float32(x, layout=TILE):
    """bfloat16 in float32. A mask gives the upper of two numbers, where a cast takes two steps."""
    if interpreting():
        return x.astype(jnp.float32)

    @inline((layout,), plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def widen(_, z):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        registers = np.empty_like(z.registers)
        for at, register in np.ndenumerate(z.registers):
            count = ir.VectorType(register.type).shape[0]
            pairs = mgpu.utils.bitcast(register, ir.VectorType.get((count // 2,), i32))
            numbers = []
            for n in range(count // 2):
                pair = vector.extract(pairs, dynamic_position=[], static_position=[n])
                lower = arith.shli(pair, mgpu.utils.c(16, i32))
                upper = arith.andi(pair, mgpu.utils.c(-(1 << 16), i32))
                numbers += [arith.bitcast(f32, lower), arith.bitcast(f32, upper)]
            registers[at] = vector.from_elements(ir.VectorType.get((count,), f32), numbers)
        return mgpu.FragmentedArray(_registers=registers, _layout=z.layout, _is_signed=None)

    return widen(x)


def store(ref, value):
    """Writes a tile, or a sum's few numbers, in the accesses that its layout gives."""
    if interpreting() or not hasattr(plgpu, "store"):
        ref[...] = value
    else:  # JAX 0.12 refuses half a cache line of a row, or 32 bytes a thread, unless told
        plgpu.store(ref, value, optimized=False)


def load_rows(ref, columns):
    """[64 or 32] float32 of global memory -> [rows, columns], the same in every column."""
    if interpreting():
        return in_every_column(ref[...], columns)
    layout = _layout(ref.shape[0]).reduce(1)
    return in_every_column(plgpu.load(ref, layout=layout, optimized=False), columns)


def in_every_column(v, columns):
    """A number for each row of a tile -> [rows, columns]."""
    z = tiles.over_columns(v, (v.shape[0], columns))
    return z if interpreting() else plgpu.layout_cast(z, _layout(v.shape[0]))


def load_columns(ref, rows=CHUNK):
    """[columns] float32 of global or shared memory, to be spread by in_every_row."""
    if interpreting():
        return ref[...]
    return plgpu.load(ref, layout=_layout(rows).reduce(0), optimized=False)


def in_every_row(v, rows=CHUNK):
    """[columns] -> [rows, columns]."""
    z = tiles.over_rows(v, (rows, v.shape[0]))
    return z if interpreting() else plgpu.layout_cast(z, _layout(rows))


def zeros(columns, rows=CHUNK):
    """A tile of float32."""
    z = jnp.zeros((rows, columns), jnp.float32)
    return z if interpreting() else plgpu.layout_cast(z, _layout(rows))


def left(x):
    """A tile of bfloat16 as a left operand whose columns are in the order of products."""
    if interpreting():
        return in_order_of_products(x, 1)
    layout = plgpu.Layout.MMA_LHS(x.dtype)
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)

    @inline((TILE,), result)
    def regroup(_, z):
        registers = np.empty((x.shape[1] // GROUP, 4, 2), dtype=object)
        for (group, n, half), _ in np.ndenumerate(registers):
            eight = z.registers.reshape(-1, 2)[group, half]
            registers[group, n, half] = mgpu.utils.vector_slice(eight, slice(2 * n, 2 * n + 2))
        to = layout.to_mgpu()
        registers = registers.reshape(to.registers_shape(x.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=to, _is_signed=None)

    return regroup(x)


def from_product(x):
    """An accumulator [64, columns] whose columns are in the order of products, as a tile."""
    if interpreting():
        return in_order_of_products(x, 1)

    @inline((_ACC,), plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE))
    def regroup(_, z):
        pairs = z.registers.reshape(-1, 4, 2)  # [groups, eights, halves of the rows]
        registers = np.empty((pairs.shape[0], 2), dtype=object)
        for (group, half), _ in np.ndenumerate(registers):
            registers[group, half] = mgpu.utils.vector_concat(list(pairs[group, :, half]))
        to = TILE.to_mgpu()
        registers = registers.reshape(to.registers_shape(x.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=to, _is_signed=None)

    return regroup(x)


def sum_of_rows(x):
    """The sum over the rows of a small float32 tile, [columns] in the order of products.

    Putting it in the order of products once more gives back the order of channels.
    """
    if interpreting():
        return jnp.sum(in_order_of_products(x, 1), axis=0)
    shape = (CHUNK, x.shape[1])

    @inline((SMALL_TILE,), plgpu.ShapeDtypeStruct(shape, x.dtype, layout=_ACC))
    def with_zeros(_, z):  # as an accumulator, whose other rows are zero
        zero = mgpu.FragmentedArray.splat(mgpu.c(0.0, z.mlir_dtype), shape, _ACC.to_mgpu())
        registers = zero.registers.reshape(-1, 4, 2).copy()
        for group, eight in enumerate(z.registers.flat):
            for n in range(4):
                registers[group, n, 0] = mgpu.utils.vector_slice(eight, slice(2 * n, 2 * n + 2))
        registers = registers.reshape(zero.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=zero.layout, _is_signed=None)

    return jnp.sum(with_zeros(x), axis=0)


def row_sums(acc, a):
    """acc [64, 8] + the sum of every row of a left operand [64, k], in all eight columns."""
    if interpreting():
        return acc + jnp.sum(a.astype(jnp.float32), axis=1, keepdims=True)
    ones = jnp.ones((a.shape[1], 8), a.dtype)
    return plgpu.mma(acc, a, plgpu.layout_cast(ones, plgpu.Layout.MMA_RHS(a.dtype)))
