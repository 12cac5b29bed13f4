"""Brings what rows of threads (rows.py) will read from memory to the second-level cache."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.devices import interpreting

_SECTOR = 32  # bytes that memory is read by


def fetch(source, sequence, first, count, column, row):
    """Starts to bring a row's channels of `count` tokens nearer, and waits for nothing.

    It takes no registers, where what is loaded long before it is used takes many. The threads of a
    row share the tokens.

    Args:
        source: reference [sequences, tokens, channels] in global memory.
        sequence, first: int32 scalars. Tokens beyond the last are the last.
        count: of tokens.
        column: the row's first channel.
        row: the row.
    """
    if interpreting():
        return
    size = jnp.dtype(source.dtype).itemsize
    sectors = pl.cdiv(row.channels * size, _SECTOR)  # of a token
    length = source.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[rows._SCALAR] * 3), return_type=None)
    def start(_, memref, *scalars):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        number = rows._constant
        sequence, first, column = rows._registers(scalars)
        lane = arith.remui(mgpu.utils.thread_idx(), number(row.lanes))
        for n in range(0, count * sectors, row.lanes):
            own = arith.addi(lane, number(n))
            if count * sectors % row.lanes:
                own = arith.minui(own, number(count * sectors - 1))
            token = arith.addi(first, arith.divui(own, number(sectors)))
            token = arith.minsi(token, number(length - 1))
            at = arith.muli(arith.remui(own, number(sectors)), number(_SECTOR // size))
            whole = rows.Row(1, row.channels)  # the address of a thread for itself
            address = rows._address([memref], [0], [sequence, token, arith.addi(column, at)], whole)
            address = llvm.ptrtoint(ir.IntegerType.get_signless(64), address)
            prefetch = "prefetch.global.L2 [$0];"
            llvm.inline_asm(None, [address], prefetch, "l", has_side_effects=True)

    start(source, sequence, first, column)
