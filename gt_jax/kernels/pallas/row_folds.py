"""Maps s -> product s + end of rows of threads (rows.py), one after the other."""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.devices import interpreting


def of_warp(row):
    """How many rows a warp has; a row is not longer than a warp."""
    return rows._WARP // row.lanes


def fold_of_warp(product, end, row):
    """Maps s -> product s + end of rows, one after the other; float32, for rows within a warp.

    Returns:
        Product and end of the rows of the warp before this one, 1 and 0 for the first; and of all
        up to this one. Not for the interpreter.
    """
    kind = rows._layout(row.vector)
    result = [rows._value(jnp.float32, row.vector)] * 4

    @plgpu.inline_mgpu(arg_types=(kind, kind), return_type=result)
    def fold(_, product, end):
        from jaxlib.mlir.dialects import arith, vector

        lane = arith.remui(mgpu.utils.thread_idx(), rows._constant(rows._WARP))
        own = arith.divui(lane, rows._constant(row.lanes))
        begun = lambda n: arith.cmpi(arith.CmpIPredicate.uge, own, rows._constant(n))
        (p,), (e,) = product.registers.flat, end.registers.flat
        distance = 1
        while distance < of_warp(row):
            earlier_p, earlier_e = (_of_row_before(z, distance * row.lanes) for z in (p, e))
            e = arith.select(begun(distance), arith.addf(arith.mulf(p, earlier_e), e), e)
            p = arith.select(begun(distance), arith.mulf(p, earlier_p), p)
            distance *= 2
        others = []
        for z, first in ((p, 1), (e, 0)):
            number = vector.broadcast(z.type, mgpu.utils.c(first, z.type.element_type))
            others.append(arith.select(begun(1), _of_row_before(z, row.lanes), number))
        return [rows._array(z, jnp.float32) for z in (*others, p, e)]

    return fold(product, end)


def _of_row_before(x, lanes):
    """What the thread so many lanes before holds; for the first threads of a warp, their own."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import nvvm, vector

    i32 = ir.IntegerType.get_signless(32)
    everybody = mgpu.utils.c(0xFFFFFFFF, i32)
    (count,) = ir.VectorType(x.type).shape
    for n in range(count):
        part = vector.extract(x, dynamic_position=[], static_position=[n])
        lanes_before, clamp = rows._constant(lanes), rows._constant(0)
        part = nvvm.shfl_sync(everybody, part, lanes_before, clamp, nvvm.ShflKind.up)
        x = vector.insert(part, x, dynamic_position=[], static_position=[n])
    return x


def either(keep, x, other):
    """x where the bool scalar `keep` of the row is true, else `other`, both float32."""
    if interpreting():
        return jnp.where(keep, x, other)
    kind = rows._layout(rows._vector(x))

    @plgpu.inline_mgpu(
        arg_types=(rows._SCALAR, kind, kind), return_type=rows._value(x.dtype, rows._vector(x))
    )
    def select(_, keep, x, other):
        from jaxlib.mlir.dialects import arith

        (kept,), (z,), (y,) = rows._registers((keep,)), x.registers.flat, other.registers.flat
        return rows._array(arith.select(kept, z, y), jnp.float32)

    return select(keep, x, other)


def sync():
    """What any row wrote to shared memory before is there for all rows behind, of all warpgroups
    of a block."""

    @plgpu.inline_mgpu(arg_types=(), return_type=None)
    def barrier(_):
        from jaxlib.mlir.dialects import gpu

        gpu.barrier()

    barrier()
