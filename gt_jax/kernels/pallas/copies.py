"""Moving tiles between memories by the warps of a block; see warps.py."""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import tiles
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.warps import BLOCK, inline

# Where each warp copies the 16 rows it owns, 16 bytes a thread.
_OWN_ROWS = plgpu.Layout.TILED(
    fragmented_array.Tiling(((64, 64), (16, 64), (4, 64), (8,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


_OWN_NARROW_ROWS = plgpu.Layout.TILED(
    fragmented_array.Tiling(((64, 16), (16, 16), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def narrow_tile(*shape):
    """Shared memory for matrices [..., rows, columns] of which 16 columns are taken at a time."""
    transforms = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(32))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def copy_in(source, tile):
    """Each warp copies its own rows of 16-bit numbers into a tile; see sync_warp."""
    if interpreting():
        tile[...] = source[...]
    else:
        tile[...] = plgpu.load(source, layout=_OWN_ROWS, optimized=False)


def start_copy(source, tile):
    """Copies 16-bit numbers [64, columns] into a tile and does not wait; see `arrived`."""
    if interpreting():
        tile[...] = source[...]
        return

    @inline((plgpu.RefType(), plgpu.RefType(tiles.TRANSFORMS)), None)
    def copy(_, from_gmem, to_smem):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, nvvm

        i32 = ir.IntegerType.get_signless(32)
        number = lambda n: mgpu.utils.c(n, i32)
        element = ir.MemRefType(from_gmem.type).element_type
        (rows, columns), (stride, _) = (
            ir.MemRefType(from_gmem.type).shape,
            ir.MemRefType(from_gmem.type).get_strides_and_offset()[0],
        )
        # Eight threads copy 128 bytes of a row, which swizzling keeps in a row of a tile [8, 64].
        thread = mgpu.utils.thread_idx()
        row, part = arith.divui(thread, number(8)), arith.remui(thread, number(8))
        in_tile = arith.remui(row, number(8))
        step = mgpu.utils.WARPGROUP_SIZE // 8
        # A slice of columns has the strides of the whole.
        tiles_apart = ir.MemRefType(to_smem.type).get_strides_and_offset()[0][0]
        source = arith.addi(arith.muli(row, number(stride)), arith.muli(part, number(8)))
        target = arith.addi(
            arith.muli(arith.divui(row, number(8)), number(tiles_apart)),
            arith.addi(
                arith.muli(in_tile, number(64)),
                arith.muli(arith.xori(part, in_tile), number(8)),
            ),
        )
        pointer = lambda base, offset: mgpu.utils.getelementptr(base, [offset], element)
        source = pointer(global_pointer(from_gmem), source)
        target = pointer(mgpu.utils.memref_ptr(to_smem), target)
        for n in range(rows // step):
            for tile_of_row in range(columns // 64):
                nvvm.cp_async_shared_global(
                    pointer(target, n * step // 8 * tiles_apart + tile_of_row * 512),
                    pointer(source, n * step * stride + tile_of_row * 64),
                    16,
                    nvvm.LoadCacheModifierKind.CG,
                )

    copy(source, tile)


def start_copy_row(source, row):
    """start_copy for [64] numbers of 32 bits, to be read by any warp."""
    if interpreting():
        row[...] = source[...]
        return

    @inline((plgpu.RefType(), plgpu.RefType()), None)
    def copy(_, from_gmem, to_smem):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, nvvm

        i32 = ir.IntegerType.get_signless(32)
        memref = ir.MemRefType(from_gmem.type)
        # Two threads copy the same number.
        n = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(memref.shape[0], i32))
        source, target = (
            mgpu.utils.getelementptr(pointer, [n], memref.element_type)
            for pointer in (global_pointer(from_gmem), mgpu.utils.memref_ptr(to_smem))
        )
        nvvm.cp_async_shared_global(target, source, 4, nvvm.LoadCacheModifierKind.CA)

    copy(source, row)


def arrived():
    """Waits until what this thread started to copy is there; for all warps behind a sync."""
    if interpreting():
        return

    def wait(_):
        from jaxlib.mlir.dialects import nvvm

        nvvm.cp_async_commit_group()
        nvvm.cp_async_wait_group(0)

    inline((), None)(wait)()


def global_pointer(memref):
    """A pointer to where a memref of global memory begins, as copies want it."""
    from jaxlib.mlir.dialects import llvm

    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(memref))


def copy_in_narrow(source, tile):
    """copy_in for a narrow tile."""
    for column in range(0, tile.shape[1], BLOCK):
        columns = slice(column, column + BLOCK)
        z = source.at[:, columns]
        if interpreting():
            tile[:, columns] = z[...]
        else:
            z = plgpu.load(z, layout=_OWN_NARROW_ROWS, optimized=False)
            tile.at[:, columns][...] = z


def prefetch(ref):
    """Asks for a tile [64, columns] of global memory to be in the second-level cache soon."""
    if interpreting():
        return

    @inline((plgpu.RefType(),), None)
    def ask(_, source):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        memref = ir.MemRefType(source.type)
        line = 128 * 8 // mgpu.utils.bitwidth(memref.element_type)  # elements of a cache line
        lines = memref.shape[1] // line  # of a row
        for first in range(0, memref.shape[0] * lines, mgpu.utils.WARPGROUP_SIZE):
            n = arith.addi(mgpu.utils.thread_idx(), mgpu.utils.c(first, i32))
            # With fewer lines than threads, two threads ask for the same.
            row = arith.remui(n, mgpu.utils.c(memref.shape[0], i32))
            column = arith.remui(
                arith.divui(n, mgpu.utils.c(memref.shape[0], i32)), mgpu.utils.c(lines, i32)
            )
            at = [arith.index_cast(index, z) for z in (row, column)]
            at[1] = arith.muli(at[1], mgpu.utils.c(line, index))
            element = mgpu.utils.memref_slice(source, (at[0], mgpu.utils.ds(at[1], line)))
            pointer = mgpu.utils.memref_ptr(element)
            mgpu.utils.inline_ptx("prefetch.global.L2 [$0];", pointer, has_side_effects=True)

    ask(ref)


def copy_out(tile, target):
    """Each warp copies its own rows out of a tile, behind a sync_warp."""
    target[...] = tile[...] if interpreting() else plgpu.load(tile, layout=_OWN_ROWS)
