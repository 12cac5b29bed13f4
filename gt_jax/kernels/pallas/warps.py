"""What the portable Pallas kernels share: products by warps, for every GPU since compute
capability 8.0.

One warpgroup works on a chunk of 64 tokens, and each of its four warps owns a block of 16 of them:
the rows of a tile that the warp loads, computes with and stores. An instruction multiplies a
16 x 16 left operand by a right one of 16 rows, both in registers. Three facts save most of the
shared memory and of the barriers that a plain product of tiles costs:

- An accumulator, rounded to 16 bits, is a left operand: the same registers, grouped otherwise.
- The transpose of a left operand is a right operand of the same warp, likewise.
- A right operand of the warp's own rows is an accumulator after one exchange inside the warp.

So a product of rows with rows of the same block needs neither shared memory nor a barrier. Values
that differ from warp to warp are written here as functions of whole tiles; `shift` names the block
that a warp reads: its own (0), the one before (-1) or behind (1), and so on, modulo 4.

No TMA, mbarrier or wgmma, which only newer GPUs have. The interpreter knows no products of warps:
there they are computed from whole tiles.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import launch, splits, tiles
from gt_jax.kernels.pallas.devices import interpreting, simulation
from gt_jax.kernels.pallas.launch import CHUNK

BLOCK = 16  # tokens of a warp: the rows of one product
BLOCKS = CHUNK // BLOCK
_ACC = plgpu.Layout.WGMMA  # the layout of accumulators, also of plgpu.mma

BLOCKS_AT_ONCE = 2  # blocks of the grid that one multiprocessor holds


def blocks_at_once():
    """How many blocks of the grid the GPU that is there holds at a time."""
    count = launch.MULTIPROCESSORS if simulation() else jax.devices()[0].core_count
    return BLOCKS_AT_ONCE * count


def choose_splits(blocks, chunks):
    """Into how many splits a sequence is cut, on the GPU that is there."""
    return splits.choose_splits(blocks, chunks, running=blocks_at_once())


def inline(arguments, result):
    """Decorates a function of FragmentedArrays and memrefs, after the launch context."""
    return plgpu.inline_mgpu(arg_types=arguments, return_type=result)


def _result(shape, dtype, layout):
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def _left_layout(dtype):
    return plgpu.Layout.MMA_LHS(dtype)


def _right_layout(dtype):
    return plgpu.Layout.MMA_RHS(dtype)


def sync():
    """What any warp wrote to shared memory before is there for all warps behind."""
    if not interpreting():
        inline((), None)(lambda _: mgpu.utils.warpgroup_barrier())()


def sync_warp():
    """What any thread wrote before is there for the threads of its warp behind."""
    if not interpreting():
        inline((), None)(lambda _: mgpu.utils.warp_barrier())()


def _registers(x, rows):
    """Registers of an accumulator or left operand [64, columns] as [columns / 8, rows]."""
    return x.registers.reshape(-1, rows)


def _array(like, registers, layout, shape):
    to = layout.to_mgpu()
    registers = registers.reshape(to.registers_shape(shape))
    return type(like)(_registers=registers, _layout=to, _is_signed=like.is_signed)


def left(x):
    """An accumulator of 16 bits [64, k] as a left operand."""
    if interpreting():
        return x
    layout = _left_layout(x.dtype)

    @inline((_ACC,), _result(x.shape, x.dtype, layout))
    def regroup(_, z):
        return _array(z, z.registers, layout, x.shape)

    return regroup(x)


def rounded(x):
    """An accumulator of 32 bits in bfloat16, two numbers at a time whatever is done with them.

    Where single numbers are used afterwards LLVM would round one by one, which is slow.
    """
    x = x.astype(jnp.bfloat16)
    if interpreting():
        return x

    @inline((_ACC,), _result(x.shape, x.dtype, _ACC))
    def keep(_, z):
        kept = np.empty_like(z.registers)
        for at, register in np.ndenumerate(z.registers):
            kept[at] = _asm("mov.b32 $0, $1;", register)
        return _array(z, kept, _ACC, x.shape)

    return keep(x)


def right_transposed(x):
    """An accumulator of 16 bits [64, k] -> of each warp's own rows the transpose [k, 16], as a
    right operand; whole in the interpreter."""
    if interpreting():
        return x
    layout, shape = _right_layout(x.dtype), (x.shape[1], BLOCK)

    @inline((_ACC,), _result(shape, x.dtype, layout))
    def regroup(_, z):
        registers = _registers(z, 2)  # [columns / 8, halves of the rows]
        registers = registers.reshape(-1, 2, 2).transpose(0, 2, 1)  # [k / 16, n / 8, k / 8 % 2]
        return _array(z, registers, layout, shape)

    return regroup(x)


def right(x):
    """An accumulator of 16 bits [64, n] -> each warp's own rows [16, n], as a right operand."""
    if interpreting():
        return x
    layout, shape = _right_layout(x.dtype), (BLOCK, x.shape[1])

    @inline((_ACC,), _result(shape, x.dtype, layout))
    def transpose(_, z):
        moved = np.empty_like(z.registers)
        for at, register in np.ndenumerate(z.registers):
            # 8 x 8 numbers, two a thread
            moved[at] = _asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", register)
        return _array(z, moved, layout, shape)

    return transpose(x)


def _asm(instruction, register):
    """A register of two 16-bit numbers after an instruction that LLVM does not look into."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32 = ir.IntegerType.get_signless(32)
    operand = mgpu.utils.bitcast(register, i32)
    result = llvm.inline_asm(i32, [operand], instruction, "=r,r", has_side_effects=False)
    return mgpu.utils.bitcast(result, register.type)


def beside(*blocks):
    """Accumulators [64, n] side by side."""
    if interpreting():
        return jnp.concatenate(blocks, axis=1)
    shape = (CHUNK, sum(z.shape[1] for z in blocks))

    @inline((_ACC,) * len(blocks), _result(shape, blocks[0].dtype, _ACC))
    def join(_, *z):
        return _array(z[0], np.concatenate([_registers(x, 2) for x in z]), _ACC, shape)

    return join(*blocks)


def _block(shift):
    """Index of the block that a warp reads."""

    @inline((), _result((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
    def index(_):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32 = ir.IntegerType.get_signless(32)
        # Opaque to LLVM, which would compute all addresses before the loop, to occupy registers.
        warp = llvm.inline_asm(
            i32, [mgpu.utils.warp_idx(sync=True)], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
        )
        at = arith.addi(warp, mgpu.utils.c(shift % BLOCKS, i32))
        at = arith.andi(at, mgpu.utils.c(BLOCKS - 1, i32))
        return mgpu.FragmentedArray.splat(at, (), is_signed=True)

    return index()


def _rows(ref, shift):
    """The rows of a tile [64, ...] that a warp reads."""
    return ref.at[pl.ds(pl.multiple_of(_block(shift) * BLOCK, BLOCK), BLOCK)]


def _rolled(z, shift):
    """A tile whose rows stand where the warps that read them have theirs."""
    return jnp.roll(z, -shift * BLOCK, axis=0)


def rows_right(ref, shift):
    """Rows [16, n] of the block at `shift`, as a right operand."""
    if interpreting():
        return _rolled(ref[...], shift)
    return plgpu.load(_rows(ref, shift), layout=_right_layout(ref.dtype))


def rows_right_transposed(ref, shift):
    """The transpose [k, 16] of rows of the block at `shift`, as a right operand."""
    if interpreting():
        return _rolled(ref[...], shift)
    return plgpu.load(_rows(ref, shift).T, layout=_right_layout(ref.dtype))


def load_left(ref, **options):
    """A tile [64, k] as a left operand."""
    return plgpu.load(ref, layout=_left_layout(ref.dtype), **options)


def constant_left(shape, value, dtype):
    """A constant as a left operand."""
    z = jnp.full(shape, value, dtype)
    return z if interpreting() else plgpu.layout_cast(z, _left_layout(dtype))


def load(ref):
    """A tile in the layout of accumulators, in float32."""
    return tiles.load(ref).astype(jnp.float32)


def load_rows(ref):
    """[rows] from global memory, to be broadcast along the columns of an accumulator."""
    return plgpu.load(ref, layout=_ACC.reduce(1), optimized=False)


def load_columns(ref):
    """[columns] from global memory, to be broadcast along the rows of an accumulator."""
    return plgpu.load(ref, layout=_ACC.reduce(0), optimized=False)


def row_maxima(z):
    """Of an accumulator [64, columns], to be broadcast along columns; jnp.max would reserve 2 KiB
    of shared memory."""
    if interpreting():
        return jnp.max(z, axis=1)

    @inline((_ACC,), _result(z.shape[:1], z.dtype, _ACC.reduce(1)))
    def reduce(_, z):
        return z.reduce("max", 1)

    return reduce(z)


def zeros(*shape):
    """An accumulator."""
    return tiles.full(shape, 0.0, jnp.float32)


def dot(acc, a, b, read=lambda z: z):
    """acc + a @ read(b), a a left operand and b a tile [k, n] of shared memory."""
    if interpreting():
        return acc + _product("ik,kj->ij", a, read(b[...]))
    return plgpu.mma(acc, a, read(plgpu.load(b, layout=_right_layout(b.dtype))))


def block_dot(acc, a, b):
    """acc [64, n] + a [64, 16] times, block by block, the rows b [16, n]."""
    if interpreting():
        return acc + _by_block("wik,wkj->wij", a, b)
    return plgpu.mma(acc, a, b)


def block_dot_transposed(acc, a, b):
    """acc [64, 16] + a [64, k] times, block by block, the transposed rows b [k, 16]."""
    if interpreting():
        return acc + _by_block("wik,wjk->wij", a, b)
    return plgpu.mma(acc, a, b)


def _product(equation, a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _by_block(equation, a, b):
    a, b = (z.reshape(BLOCKS, BLOCK, -1) for z in (a, b))
    return _product(equation, a, b).reshape(CHUNK, -1)


def transposed_block(ref, shift):
    """The transpose of 16 rows of the block at `shift` of a tile [64, 16], as a left operand."""
    if interpreting():
        z = _rolled(ref[...], shift)
        return z.reshape(BLOCKS, BLOCK, BLOCK).swapaxes(1, 2).reshape(CHUNK, BLOCK)
    layout, shape = _left_layout(ref.dtype), (CHUNK, BLOCK)

    @inline((_right_layout(ref.dtype),), _result(shape, ref.dtype, layout))
    def regroup(_, z):
        return _array(z, z.registers.reshape(2, 2).T, layout, shape)

    return regroup(rows_right(ref, shift))


def put_block_rows(ref, x, first):
    """Writes the first row of every block of x [64, n] to ref[first + block]."""
    if interpreting():
        ref[pl.ds(first, BLOCKS)] = x[::BLOCK]
        return

    @inline((plgpu.RefType(), _ACC), None)
    def store(_, to, z):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        c = lambda n: mgpu.utils.c(n, i32)
        row = arith.addi(mgpu.utils.warp_idx(sync=True), c(first))
        thread = arith.remui(mgpu.utils.thread_idx(), c(4))
        row, column = (arith.index_cast(index, n) for n in (row, arith.muli(thread, c(2))))
        # Eight threads of a warp write the same numbers to the same place.
        for n, register in enumerate(_registers(z, 2)[:, 0]):
            at = arith.addi(column, mgpu.utils.c(8 * n, index))
            vector.store(register, to, [row, at])

    store(ref, x)


def block_row(ref, first, shift, columns):
    """Row first + block + shift of ref (no modulo) for the rows of each block, [64, columns]."""
    if interpreting():
        rows = ref[pl.ds(first + shift, BLOCKS)]
        return jnp.repeat(rows, BLOCK, axis=0)
    row = ref.at[_block(0) + (first + shift)]
    return tiles.over_rows(tiles.load_columns(row), (CHUNK, columns))
