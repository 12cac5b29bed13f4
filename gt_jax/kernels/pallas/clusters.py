"""Blocks that run at the same time and write to each other's shared memory: clusters of a GPU.

A row of threads is of rows.py. Pallas makes the blocks of a cluster wait for each other before the
first instruction, so that each may be written to.
"""

import jax
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.devices import interpreting

AXIS = "cluster"
SIZES = 1, 2, 4, 8  # blocks; every such GPU takes them


def available() -> bool:
    """Whether the GPU that kernels are lowered for has clusters, and is one they are made for."""
    from jax.experimental.mosaic.gpu import utils

    return not interpreting() and tuple(utils._infer_arch()) == (9, 0)


def rank() -> jax.Array:
    """The number of this block in its cluster, int32."""
    return lax.axis_index(AXIS)


def push(ref, at, value, row, block: int, keep):
    """Writes a row's channels, float32, to row `at` of `ref` [N, channels] of another block.

    Args:
        ref: shared memory of this block; that of the other lies at the same place.
        at: int32 scalar.
        value: of the row.
        row: rows.Row.
        block: number of the other, or of this one.
        keep: bool scalar, which rows write.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), rows._SCALAR, rows._SCALAR, rows._layout(row.vector)),
        return_type=None,
    )
    def write(_, memref, at, keep, value):
        from jaxlib.mlir.dialects import llvm

        at, kept = rows._registers((at, keep))
        address = rows._address((memref,), (0,), [at, rows._constant(0)], row)
        (x,) = value.registers.flat
        with mgpu.utils.when(kept):
            there = mgpu.utils.get_cluster_ptr(address, rows._constant(block), generic=False)
            llvm.store(x, there, alignment=rows._alignment(ref, row))

    write(ref, at, keep, value)


def sync():
    """What any thread of the cluster wrote before is there for all threads behind."""

    @plgpu.inline_mgpu(arg_types=(), return_type=None)
    def barrier(_):
        from jaxlib.mlir.dialects import nvvm

        nvvm.cluster_arrive(aligned=True)
        nvvm.cluster_wait(aligned=True)

    barrier()
