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
from jax.experimental import pallas as pl
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
# The same for 32 tokens, of which a thread holds half as much; also for copies of more rows.
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


def matrix(*shape):
    """Shared memory for matrices of which 32 columns are taken at a time."""
    transforms = (plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(2 * GROUP))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def copy_in(source, matrix):
    """Copies rows (a multiple of 32) of 16-bit numbers into a matrix; sync behind it."""
    matrix[...] = source[...] if interpreting() else plgpu.load(
        source, layout=SMALL_TILE, optimized=False
    )  # fmt: skip


def _layout(rows):
    return TILE if rows == CHUNK else SMALL_TILE


def load(ref):
    """A tile [64 or 32, columns] of global or shared memory, in its dtype."""
    if interpreting():
        return ref[...]
    return plgpu.load(ref, layout=_layout(ref.shape[0]), optimized=False)


def store(ref, value):
    """Writes a tile, or a sum's few numbers, in the accesses that its layout gives."""
    if interpreting() or not hasattr(plgpu, "store"):
        ref[...] = value
    else:  # JAX 0.12 refuses half a cache line of a row, or 32 bytes a thread, unless told
        plgpu.store(ref, value, optimized=False)


def load_before(ref, first, columns):
    """Rows first - 1 to first + 62 of ref [N, D]; for first = 0, row 0 twice."""
    lowest = jnp.where(first == 0, jnp.int32(0), jnp.int32(-1))
    if interpreting():
        edge = ref[pl.ds(first + lowest, 1), columns]
        return jnp.concatenate([edge, ref[pl.ds(first, CHUNK), columns][:-1]])
    source = ref.at[pl.ds(first, CHUNK), columns]
    result = plgpu.ShapeDtypeStruct((CHUNK, columns.size), ref.dtype, layout=TILE)

    @inline((plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), result)
    def load(_, source, lowest):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        c = lambda n: mgpu.utils.c(n, i32)
        element = ir.MemRefType(source.type).element_type
        thread = mgpu.utils.thread_idx()
        thread = arith.remui(thread, c(mgpu.utils.WARPGROUP_SIZE))
        warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
        row = arith.addi(arith.muli(warp, c(16)), arith.divui(lane, c(4)))
        column = arith.muli(arith.remui(lane, c(4)), c(8))
        layout = TILE.to_mgpu()
        registers = np.empty((columns.size // GROUP, 2), dtype=object)
        for (group, half), _ in np.ndenumerate(registers):
            before = arith.maxsi(arith.addi(row, c(8 * half - 1)), lowest.registers.item())
            at = (
                arith.index_cast(index, before),
                arith.index_cast(index, arith.addi(column, c(GROUP * group))),
            )
            numbers = mgpu.utils.memref_slice(source, (at[0], mgpu.utils.ds(at[1], 8)))
            pointer = mgpu.utils.memref_ptr(numbers)
            registers[group, half] = llvm.load(ir.VectorType.get((8,), element), pointer)
        shape = layout.registers_shape((CHUNK, columns.size))
        return mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=layout, _is_signed=None
        )

    return load(source, lowest)


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
