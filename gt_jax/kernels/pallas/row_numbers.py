"""One number of a token, beside the channels that rows.py reads and writes."""

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
