"""Tokens by rows of threads: what kernels without matrix products share.

A block of the grid is 128 threads in rows. A thread holds a few neighbouring channels of a token,
and every row reads its own token: a row's number in the block, `own_row`, is a scalar that differs
from row to row, and all that is computed from it does as well. So values here are what one row
holds, and kernels are written for a row. In the interpreter a block is a single row.

    x = load(ref, (own_row(row) + first,), column, row)

reads `row.channels` channels from `column` on of the row's token.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.devices import interpreting

_THREADS = 128  # of a block
_WARP = 32
_SCALAR = plgpu.Layout.WG_SPLAT(())


class Row(NamedTuple):
    """Threads of a row, a power of two, and the neighbouring channels that each of them holds."""

    lanes: int
    vector: int

    @property
    def channels(self) -> int:
        return self.lanes * self.vector

    @property
    def number(self) -> int:
        """How many rows a block has."""
        return 1 if interpreting() else _THREADS // self.lanes


def widest_row(vector: int, *widths: int) -> Row | None:
    """The longest row whose channels divide all widths, or None."""
    rows = (Row(lanes, vector) for lanes in (32, 16, 8))
    return next((row for row in rows if all(w % row.channels == 0 for w in widths)), None)


def own_row(row):
    """Number of the row in its block, int32."""
    if interpreting():
        return jnp.int32(0)

    @plgpu.inline_mgpu(arg_types=(), return_type=_scalar(jnp.int32))
    def number(_):
        from jaxlib.mlir.dialects import arith

        n = arith.divui(mgpu.utils.thread_idx(), _constant(row.lanes))
        return mgpu.FragmentedArray.splat(n, (), is_signed=True)

    return number()


def load(source, index, column, row, keep=None):
    """Channels of a row's token, or zeros where not `keep`; the index has to be valid anyway.

    Args:
        source: reference [..., channels], or a list of pairs (reference [..., channels], first
            column) for arrays that count as one, side by side; `column` lies in one of them.
        index: scalars, one for each axis of a reference but the last.
        column: the row's first channel.
        row: the row.
        keep: bool scalar or None.
    """
    sources = source if isinstance(source, list) else [(source, 0)]
    if interpreting():
        inside = lambda z, ref: jnp.clip(z, 0, ref.shape[-1] - row.channels)
        parts = [ref[(*index, _ds(inside(column - first, ref), row))] for ref, first in sources]
        x = parts[0]
        for part, (_, first) in zip(parts[1:], sources[1:]):
            x = jnp.where(column >= first, part, x)
        return x if keep is None else jnp.where(keep, x, 0)
    refs, firsts = zip(*sources)
    scalars = (*index, column) if keep is None else (*index, column, keep)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(refs) + (_SCALAR,) * len(scalars),
        return_type=_value(refs[0].dtype, row.vector),
    )
    def read(_, *arguments):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        memrefs, scalars = arguments[: len(refs)], _registers(arguments[len(refs) :])
        kept = scalars.pop() if keep is not None else None
        vector_type = ir.VectorType.get((row.vector,), ir.MemRefType(memrefs[0].type).element_type)
        address = _address(memrefs, firsts, scalars, row)
        x = llvm.load(vector_type, address, alignment=_alignment(refs[0], row))
        if kept is not None:
            zero = mgpu.utils.c(0, vector_type.element_type)
            x = arith.select(kept, x, vector.broadcast(vector_type, zero))
        return _array(x, refs[0].dtype)

    return read(*refs, *scalars)


def store(target, index, column, value, row, keep=None):
    """Writes a row's channels, where `keep`; as load."""
    targets = target if isinstance(target, list) else [(target, 0)]
    if interpreting():
        _store_interpreted(targets, index, column, value, row, keep)
        return
    refs, firsts = zip(*targets)
    scalars = (*index, column) if keep is None else (*index, column, keep)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(refs)
        + (_SCALAR,) * len(scalars)
        + (_layout(row.vector),),
        return_type=None,
    )
    def write(_, *arguments):
        from jaxlib.mlir.dialects import llvm

        scalars = _registers(arguments[len(refs) : -1])
        kept = scalars.pop() if keep is not None else None
        address = _address(arguments[: len(refs)], firsts, scalars, row)
        (x,) = arguments[-1].registers.flat
        if kept is None:
            llvm.store(x, address, alignment=_alignment(refs[0], row))
        else:
            with mgpu.utils.when(kept):
                llvm.store(x, address, alignment=_alignment(refs[0], row))

    write(*refs, *scalars, value)


def _store_interpreted(targets, index, column, value, row, keep):
    from jax.experimental import pallas as pl

    ends = [first for _, first in targets[1:]] + [2**30]
    for (ref, first), end in zip(targets, ends):
        here = (column >= first) & (column < end)
        here = here if keep is None else here & keep

        @pl.when(here)
        def _(ref=ref, first=first):
            ref[(*index, _ds(column - first, row))] = value


def masked(x, keep, other=0):
    """x where the bool scalar `keep` of the row is true, or None, else the number `other`."""
    if keep is None:
        return x
    if interpreting():
        return jnp.where(keep, x, other)

    @plgpu.inline_mgpu(
        arg_types=(_layout(_vector(x)), _SCALAR), return_type=_value(x.dtype, _vector(x))
    )
    def select(_, x, keep):
        from jaxlib.mlir.dialects import arith, vector

        (z,), (kept,) = x.registers.flat, _registers((keep,))
        number = vector.broadcast(z.type, mgpu.utils.c(other, z.type.element_type))
        return _array(arith.select(kept, z, number), x_dtype)

    x_dtype = x.dtype
    return select(x, keep)


def sums_over_row(values, row, scratch, turn):
    """Sums of float32 values over the channels of the row, scalars in all its threads.

    Args:
        values: a list.
        row: the row.
        scratch: sums_scratch of as many values.
        turn: int32 scalar that alternates between 0 and 1 from call to call, so that one barrier a
            call is enough.
    """
    return _over_row(values, row, scratch, turn, jnp.sum, "addf")


def largest_over_row(values, row, scratch, turn):
    """As sums_over_row, the largest of each; NaN where there is one."""
    return _over_row(values, row, scratch, turn, jnp.max, "maximumf")


def _over_row(values, row, scratch, turn, interpreted, operation):
    if interpreting():
        return [interpreted(x) for x in values]
    kinds = (_layout(row.vector),) * len(values)
    result = [_scalar(jnp.float32)] * len(values)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, *kinds), return_type=result)
    def total(_, memref, turn, *values):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith
        from jaxlib.mlir.dialects import memref as memrefs

        join = getattr(arith, operation)
        sums = [_over_warp(x, row, join) for x in values]
        if row.lanes > _WARP:
            index = lambda z: arith.index_cast(ir.IndexType.get(), z)
            thread = mgpu.utils.thread_idx()
            warp = arith.divui(thread, _constant(_WARP))
            first = arith.muli(
                arith.divui(thread, _constant(row.lanes)), _constant(row.lanes // _WARP)
            )
            at = lambda i, n: [index(turn.registers.item()), index(_constant(i)), index(n)]
            for i, z in enumerate(sums):  # all threads of a warp write the same
                memrefs.store(z, memref, at(i, warp))
            mgpu.utils.warpgroup_barrier()
            for i in range(len(sums)):
                warps = [arith.addi(first, _constant(n)) for n in range(row.lanes // _WARP)]
                sums[i] = _tree([memrefs.load(memref, at(i, n)) for n in warps], join)
        return [mgpu.FragmentedArray.splat(z, ()) for z in sums]

    return total(scratch, turn, *values)


def sums_scratch(count: int):
    """Shared memory for sums_over_row or largest_over_row of `count` values."""
    return plgpu.SMEM((2, count, _THREADS // _WARP), jnp.float32)


def _over_warp(x, row, join):
    from jaxlib.mlir.dialects import vector

    (z,) = x.registers.flat
    z = _tree(
        [vector.extract(z, dynamic_position=[], static_position=[n]) for n in range(row.vector)],
        join,
    )
    distance = 1
    while distance < min(row.lanes, _WARP):
        z = join(z, mgpu.utils.shfl_bfly(z, distance))
        distance *= 2
    return z


def _tree(terms, join):
    """A power of two of terms, joined."""
    while len(terms) > 1:
        terms = [join(a, b) for a, b in zip(terms[::2], terms[1::2])]
    return terms[0]


def zeros(row):
    """A float32 value."""
    if interpreting():
        return jnp.zeros(row.channels, jnp.float32)
    return plgpu.layout_cast(jnp.zeros(_THREADS * row.vector, jnp.float32), _layout(row.vector))


def _ds(column, row):
    from jax.experimental import pallas as pl

    return pl.ds(column, row.channels)


def _vector(x):
    """Channels of a thread."""
    return x.shape[0] // _THREADS


def _layout(vector):
    return plgpu.Layout.WG_STRIDED((_THREADS * vector,), vec_size=vector)


def _value(dtype, vector):
    return plgpu.ShapeDtypeStruct((_THREADS * vector,), dtype, layout=_layout(vector))


def _scalar(dtype):
    return plgpu.ShapeDtypeStruct((), dtype, layout=_SCALAR)


def _alignment(ref, row):
    """Of a thread's channels, in bytes."""
    return min(16, row.vector * jnp.dtype(ref.dtype).itemsize)


def _constant(n):
    from jaxlib.mlir import ir

    return mgpu.utils.c(n, ir.IntegerType.get_signless(32))


def _registers(scalars):
    return [z.registers.item() for z in scalars]


def _array(register, dtype):
    import numpy as np
    from jaxlib.mlir import ir

    registers = np.empty((1,), dtype=object)
    registers[0] = register
    signed = True if jnp.issubdtype(dtype, jnp.signedinteger) else None
    (vector,) = ir.VectorType(register.type).shape
    layout = _layout(vector).to_mgpu()
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def _address(memrefs, firsts, scalars, row):
    """Where the thread's channels begin, in the last memref that begins before the column."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i64 = ir.IntegerType.get_signless(64)
    wide = lambda z: arith.extsi(i64, z)
    *index, column = scalars
    lane = arith.remui(mgpu.utils.thread_idx(), _constant(row.lanes))
    own = arith.addi(column, arith.muli(lane, _constant(row.vector)))
    address = None
    for memref, first in zip(memrefs, firsts):
        kind = ir.MemRefType(memref.type)
        strides, _ = kind.get_strides_and_offset()
        offset = wide(arith.subi(own, _constant(first)))
        for n, stride in zip(index, strides[:-1], strict=True):
            offset = arith.addi(offset, arith.muli(wide(n), mgpu.utils.c(stride, i64)))
        base = mgpu.utils.memref_ptr(memref)
        if not mgpu.utils.is_smem_ref(kind):
            base = llvm.addrspacecast(llvm.PointerType.get(1), base)  # global memory
        here = mgpu.utils.getelementptr(base, [offset], kind.element_type)
        if address is not None:
            begun = arith.cmpi(arith.CmpIPredicate.sge, column, _constant(first))
            here = arith.select(begun, here, address)
        address = here
    return address
