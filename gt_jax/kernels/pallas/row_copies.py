"""What rows of threads (rows.py) read later is copied to shared memory meanwhile (cp.async).

What is on its way occupies no registers, and a thread may read it more than once. Each thread reads
only what it has itself copied, so that `wait` is all that orders the two. A stash is shared memory
of 32-bit numbers, and a slot of it begins at a byte and has room for all threads of a block.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows


def size_of(ref, row) -> int:
    """Bytes that a thread copies of a token's channels."""
    return row.vector * jnp.dtype(ref.dtype).itemsize


def start(source, index, column, row, stash, slot):
    """Starts to copy what rows.load(source, index, column, row) reads.

    Args:
        source: reference [..., channels] in global memory.
        index, column, row: as of rows.load.
        stash: shared memory.
        slot: int32 scalar, its first byte.
    """
    scalars, size = (*index, column, slot), size_of(source, row)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()) + (rows._SCALAR,) * len(scalars),
        return_type=None,
    )
    def copy(_, from_gmem, to_smem, *scalars):
        *place, slot = rows._registers(scalars)
        _copy(rows._address((from_gmem,), (0,), place, row), _place(to_smem, slot, size), size)

    copy(source, stash, *scalars)


def read(stash, slot, dtype, row):
    """The channels that this row has copied to a slot, as rows.load gives them."""
    size = row.vector * jnp.dtype(dtype).itemsize

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), rows._SCALAR), return_type=rows._value(dtype, row.vector)
    )
    def take(_, memref, slot):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        address = _place(memref, slot.registers.item(), size)
        x = llvm.load(ir.VectorType.get((row.vector,), element), address, alignment=size)
        return rows._array(x, dtype)

    return take(stash, slot)


def commit():
    """What was started before, since the last commit, is a group."""

    def close(_):
        from jaxlib.mlir.dialects import nvvm

        nvvm.cp_async_commit_group()

    plgpu.inline_mgpu(arg_types=(), return_type=None)(close)()


def wait(left: int):
    """Waits until no more than so many groups of this thread are on their way."""

    def arrive(_):
        from jaxlib.mlir.dialects import nvvm

        nvvm.cp_async_wait_group(left)

    plgpu.inline_mgpu(arg_types=(), return_type=None)(arrive)()


def _copy(source, target, size):
    from jaxlib.mlir.dialects import nvvm

    kinds = nvvm.LoadCacheModifierKind
    nvvm.cp_async_shared_global(target, source, size, kinds.CG if size == 16 else kinds.CA)


def _place(memref, slot, size):
    """Where this thread's part of a slot lies."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    own = arith.muli(mgpu.utils.thread_idx(), rows._constant(size))
    offset, byte = arith.addi(slot, own), ir.IntegerType.get_signless(8)
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(memref), [offset], byte)
