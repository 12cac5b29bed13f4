"""One number of a token, or of a channel, beside the channels that rows.py reads and writes."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.devices import interpreting

_SCALAR = plgpu.Layout.WG_SPLAT(())


def store(target, index, value, keep=None):
    """Writes a float32 scalar of a row of threads; all of its threads write the same.

    Args:
        target: reference in global memory.
        index: int32 scalars, one for each of its axes.
        value: float32 scalar.
        keep: bool scalar, whether to write, or None.
    """
    if interpreting():

        @pl.when(True if keep is None else keep)
        def _():
            target[index] = value

        return
    scalars = (*index, value) if keep is None else (*index, value, keep)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) + (_SCALAR,) * len(scalars), return_type=None)
    def write(_, memref, *arguments):
        from jaxlib.mlir.dialects import llvm

        numbers = [z.registers.item() for z in arguments]
        kept = numbers.pop() if keep is not None else None
        *place, x = numbers
        address = _address(memref, place)
        if kept is None:
            llvm.store(x, address)
        else:
            with mgpu.utils.when(kept):
                llvm.store(x, address)

    write(target, *scalars)


def store_across(target, index, axis, values, row, keep=None):
    """Writes for each channel of a row of threads several numbers that lie side by side.

    Args:
        target: reference in global memory.
        index: int32 scalars, one for each of its axes: of the row's first channel and of the
            first number, aligned to their count.
        axis: of the channels, the last but one or before it.
        values: a power of two of float32 values of the row, the numbers of its channels.
        row: rows.Row of threads that hold one channel each.
        keep: bool scalar, whether to write, or None.
    """
    if interpreting():
        where = [*index]
        where[axis] = pl.ds(index[axis], row.channels)
        where[-1] = pl.ds(index[-1], len(values))

        @pl.when(True if keep is None else keep)
        def _():
            target[tuple(where)] = jnp.stack(values, axis=1)

        return
    scalars = tuple(index) if keep is None else (*index, keep)
    kinds = (_SCALAR,) * len(scalars) + (plgpu.Layout.WG_STRIDED(values[0].shape, vec_size=1),) * (
        len(values)
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *kinds), return_type=None)
    def write(_, memref, *arguments):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        registers = [z.registers.item() for z in arguments]
        place, parts = registers[: len(index)], registers[len(scalars) :]
        lanes = mgpu.utils.c(row.lanes, ir.IntegerType.get_signless(32))
        lane = arith.remui(mgpu.utils.thread_idx(), lanes)
        place[axis] = arith.addi(place[axis], lane)
        numbers = [vector.extract(z, dynamic_position=[], static_position=[0]) for z in parts]
        x = vector.from_elements(ir.VectorType.get((len(numbers),), numbers[0].type), numbers)
        address, alignment = _address(memref, place), 4 * len(numbers)
        if keep is None:
            llvm.store(x, address, alignment=alignment)
        else:
            with mgpu.utils.when(registers[len(index)]):
                llvm.store(x, address, alignment=alignment)

    write(target, *scalars, *values)


def _address(memref, index):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i64, kind = ir.IntegerType.get_signless(64), ir.MemRefType(memref.type)
    strides, _ = kind.get_strides_and_offset()
    offset = mgpu.utils.c(0, i64)
    for n, stride in zip(index, strides, strict=True):
        step = arith.muli(arith.extsi(i64, n), mgpu.utils.c(stride, i64))
        offset = arith.addi(offset, step)
    base = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(memref))
    return mgpu.utils.getelementptr(base, [offset], kind.element_type)
