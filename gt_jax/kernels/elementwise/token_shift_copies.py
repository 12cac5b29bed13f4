"""How the kernels of token shifts read: a step's tiles are copied while the step before computes.

Copies go straight to shared memory (cp.async), so that what is on its way occupies no registers.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, warps
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import loop
from gt_jax.kernels.pallas.warps import inline

_BYTES = 16  # bytes that a thread copies at a time
_ROOM = 98  # KiB of shared memory that a block may have on every GPU


class Tile(NamedTuple):
    """What a step reads in shared memory.

    Attributes:
        shape: [..., rows, columns].
        dtype: of 16 or 32 bits.
        width: 32 or 64 columns that products take at a time, whose 16-bit numbers are swizzled; or
            None for rows as they are.
    """

    shape: tuple[int, ...]
    dtype: Any = jnp.bfloat16
    width: int | None = None


def staged(tiles: dict[str, Tile], beside: int = 0) -> tuple[int, dict]:
    """How many steps' tiles shared memory holds, and the scratch for them.

    Two, one in use and one on its way, where every GPU has room for them and `beside` bytes more.
    """
    rounded = lambda z: -(-z // 1024)
    sizes = [math.prod(z.shape) * jnp.dtype(z.dtype).itemsize for z in tiles.values()]
    stages = 2 if sum(rounded(2 * z) for z in sizes) + rounded(beside) <= _ROOM else 1
    place = lambda z: plgpu.SMEM(
        (stages, *z.shape), z.dtype, transforms=_swizzled(z.width) if z.width else ()
    )
    return stages, {name: place(z) for name, z in tiles.items()}


def _swizzled(columns):
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def walk(stages, steps, start, step, carry):
    """carry after step(i, stage, carry) for every i < steps, whose copies start(i, stage) starts.

    All warps have what was copied when a step begins, and have finished with the step before.
    """

    def body(i, carry):
        stage = i % stages
        if stages == 1:
            start(i, stage)
        copies.arrived()
        warps.sync()
        if stages > 1:
            pl.when(i + 1 < steps)(lambda: start(i + 1, 1 - stage))
        carry = step(i, stage, carry)
        if stages == 1:
            warps.sync()
        return carry

    if stages > 1:
        start(jnp.int32(0), jnp.int32(0))
    return loop(steps, body, carry)


def start_copy(source, first, columns, target, *, width=None, before=False):
    """Starts to copy rows from `first` of source [N, D] into target [rows, columns].

    Args:
        source: in global memory, of 16 or 32 bits.
        first: row, a traced int32.
        columns: pl.ds.
        target: in shared memory.
        width: columns of a tile of target, if it is swizzled.
        before: whether to copy from row first - 1; for first = 0, row 0 twice.
    """
    rows = target.shape[0]
    lowest = jnp.where(first == 0, jnp.int32(0), jnp.int32(-1)) if before else jnp.int32(0)
    if interpreting():
        if before:
            edge = source[pl.ds(first + lowest, 1), columns]
            rest = source[pl.ds(first, rows - 1), columns]
            target[...] = jnp.concatenate([edge, rest])
        else:
            target[...] = source[pl.ds(first, rows), columns]
        return
    kind = plgpu.RefType(_swizzled(width)) if width else plgpu.RefType()

    @inline((plgpu.RefType(), kind, plgpu.Layout.WG_SPLAT(())), None)
    def copy(_, from_gmem, to_smem, lowest):
        _copy(from_gmem, to_smem, width, rows, before, lowest.registers.item())

    # Only where the rows begin counts, and the last of them may be one further.
    copy(source.at[pl.ds(first, rows - rows % 8 or rows), columns], target, lowest)


def _copy(source, target, width, rows, before, lowest):
    """A thread copies a part of every few rows; all of them together a few whole rows."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    c = lambda n: mgpu.utils.c(n, i32)
    memref, to = ir.MemRefType(source.type), ir.MemRefType(target.type)
    element, columns = memref.element_type, memref.shape[1]
    (stride, _), _ = memref.get_strides_and_offset()
    numbers = 8 * _BYTES // mgpu.utils.bitwidth(element)  # of a part
    group = width or columns
    parts = group // numbers  # of a row
    together = mgpu.utils.WARPGROUP_SIZE // parts  # rows
    thread = mgpu.utils.thread_idx()
    row, part = arith.divui(thread, c(parts)), arith.remui(thread, c(parts))

    strides = to.get_strides_and_offset()[0]
    if width:  # of tiles [8, width], in which a row's parts change places
        turn = arith.divui(arith.remui(row, c(8)), c(64 // width))
        eights, across = strides[0] // 8, strides[1]
        place = arith.addi(
            arith.muli(arith.divui(row, c(8)), c(strides[0])),
            arith.addi(
                arith.muli(arith.remui(row, c(8)), c(width)),
                arith.muli(arith.xori(part, turn), c(numbers)),
            ),
        )
    else:
        eights, across = strides[0], 0
        place = arith.addi(arith.muli(row, c(strides[0])), arith.muli(part, c(numbers)))
    pointer = lambda base, offset: mgpu.utils.getelementptr(base, [offset], element)
    base = copies.global_pointer(source)
    from_row = lambda row: pointer(
        base, arith.addi(arith.muli(row, c(stride)), arith.muli(part, c(numbers)))
    )
    shifted = arith.subi(row, c(1)) if before else row
    read, written = from_row(shifted), pointer(mgpu.utils.memref_ptr(target), place)
    for n, start in enumerate(range(0, rows, together)):
        first = from_row(arith.maxsi(shifted, lowest)) if before and n == 0 else read
        partial = start + together > rows
        there = arith.cmpi(arith.CmpIPredicate.slt, row, c(rows - start)) if partial else None
        for m in range(columns // group):
            # Tells the second-level cache to fetch the line, the rest of which is read next.
            mgpu.utils.inline_ptx(
                f"cp.async.cg.shared.global.L2::128B [$0], [$1], {_BYTES};",
                pointer(written, start * eights + m * across),
                pointer(first, start * stride + m * group),
                predicate=there,
                has_side_effects=True,
            )
