"""What the Pallas kernels for Hopper share, and every difference between JAX versions.

A trap that neither the interpreter nor lowering shows (see hopper.py): sums over the rows of an
accumulator (axis 0) go through one scratch area that all warpgroups of a block share, so two of
them must not take such sums at once.
"""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.hopper import interpreting, simulation

CHUNK = 64  # tokens a warpgroup works on at once: the rows of one wgmma tile
MULTIPROCESSORS = 132  # of an H100 or H200; a block of the grid occupies one
LEAST_CHUNKS = 8  # of a piece of a sequence
# Type of the inputs -> how many bfloat16 numbers an operand of a product is the sum of.
PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 2}


def choose_pieces(blocks, chunks):
    """Into how many pieces each row of `chunks` chunks is cut: 1 where `blocks` fill the GPU."""
    pieces = 1
    while 2 * pieces * blocks <= MULTIPROCESSORS and chunks >= 2 * pieces * LEAST_CHUNKS:
        pieces *= 2
    return pieces


def lowered_once(*static):
    """Decorates a function that calls a kernel: calls of one shape share one lowering.

    Lowering a kernel takes seconds, and the layers of a model would each do it again.

    Args:
        static: names of arguments that are no arrays, to be hashed.
    """

    def decorate(function):
        signature = inspect.signature(function)

        @functools.partial(jax.jit, static_argnames=("simulation", *static))
        def lowered(simulation, **arguments):
            return function(**arguments)

        @functools.wraps(function)
        def call(*args, **options):
            return lowered(simulation=simulation(), **signature.bind(*args, **options).arguments)

        return call

    return decorate


def batched_as_rows(function):
    """function, whose arrays all begin with the rows of a batch; vmap gives it more rows.

    For kernels in which blocks of the grid pass on numbers: they would mix what vmap tells apart.
    """

    @jax.custom_batching.custom_vmap
    def rows(*arrays):
        return tuple(function(*arrays))

    @rows.def_vmap
    def _more_rows(size, batched, *arrays):
        spread = (
            z if b else jnp.broadcast_to(z, (size, *z.shape)) for z, b in zip(arrays, batched)
        )
        results = rows(*(z.reshape(-1, *z.shape[2:]) for z in spread))
        return tuple(z.reshape(size, -1, *z.shape[1:]) for z in results), (True,) * len(results)

    return rows


def keep(results):
    """Names what a forward pass computed "recurrence", for policies of jax.checkpoint to store."""
    return [checkpoint_name(x, "recurrence") for x in results]


def kernel(body, *, threads, manual_barriers=False, **options):
    """plgpu.kernel with `threads` warpgroups on the axis "wg"; approximate exp2 as on the GPU.

    With manual_barriers, the body orders what its own warps write and read in shared memory.
    """
    interpret = False
    if interpreting():
        from jax._src.pallas.mosaic_gpu.interpret import params  # public from JAX 0.12 on

        interpret = params.InterpretGPUParams()
    return plgpu.kernel(
        body,
        num_threads=threads,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=manual_barriers,
        ),
        **options,
    )


def tile(*shape, dtype=jnp.bfloat16):
    """Shared memory for matrices [..., rows, columns] in the layout wgmma and bulk copies want."""
    columns = 128 // jnp.dtype(dtype).itemsize  # a swizzled row is 128 bytes
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def overlay(*types):
    """Scratch of several types in one place; the interpreter wants a place for each."""
    return types if interpreting() else plgpu.RefUnion(*types)


def wait_for_turn(turns, n, value):
    """Waits until the semaphore turns[n] is `value`: the blocks before have all passed it on."""
    plgpu.semaphore_wait(turns.at[n], value, decrement=False, memory_scope="gpu")


def pass_on_turn(turns, n):
    """Counts up the semaphore turns[n], once all that this thread copied has arrived."""
    plgpu.semaphore_signal(turns.at[n], memory_scope="gpu")


def matmul(*sums):
    """Sums of matrix products on the tensor cores, all in flight at once.

    Each sum is (start, (a, b), (a, b), ...): `start` is a float32 value to add to, or the shape of
    a result that starts at zero; `a` a value or a reference into shared memory, `b` a reference.
    Operands may be tuples of parts; `start` may then be a reference to the value.
    Returns one float32 value per sum.
    """
    inside, outside, products = [], [], []
    for start, *pairs in sums:
        products.append([product for pair in pairs for product in _products(*pair)])
        # Tensor cores round towards zero (Fasi et al. 2021, doi:10.7717/peerj-cs.330). Along a
        # sequence that would add up to what operands of two parts lose, so the products of such
        # are added to `start` afterwards.
        apart = not isinstance(start, tuple) and len(products[-1]) > len(pairs)
        inside.append(start.shape if apart else start)
        outside.append(start if apart else None)
    values = (_interpreted if interpreting() else _on_tensor_cores)(inside, products)
    return [z if start is None else _value(start) + z for start, z in zip(outside, values)]


def _products(a, b):
    """Products of parts, the smallest first, without those that the parts' own rounding exceeds."""
    a, b = (z if isinstance(z, tuple) else (z,) for z in (a, b))
    kept = max(len(a), len(b))
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < kept]
    return [(a[i], b[j]) for i, j in sorted(pairs, key=sum, reverse=True)]


def _value(z):
    return z if isinstance(z, jax.Array) else load(z)


def _interpreted(starts, products):
    """The interpreter knows neither operands in registers nor started accumulators."""
    values = []
    for start, pairs in zip(starts, products):
        value = jnp.zeros(start, jnp.float32) if isinstance(start, tuple) else start
        for a, b in pairs:
            a, b = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
            value += jnp.dot(a, b, preferred_element_type=jnp.float32)
        values.append(value)
    return values


def _on_tensor_cores(starts, products):
    def issue(accumulators):
        for accumulator, pairs in zip(accumulators, products):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

    return pl.run_state(issue)(tuple(plgpu.ACC.init(_started(start)) for start in starts))


def _started(start):
    if not isinstance(start, tuple):
        return start
    return plgpu.layout_cast(jnp.zeros(start, jnp.float32), plgpu.Layout.WGMMA)


def loop(steps, body, carry):
    """carry after body(0, carry) ... body(steps - 1, carry); counts in int32 whatever the flags."""
    return lax.fori_loop(jnp.int32(0), jnp.int32(steps), body, carry)


def divide(n, by):
    """Quotient and remainder of a traced int32 and a number."""
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


def iota(shape, axis):
    """Index along `axis` in the layout of accumulators."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def row_major(x):
    """x, whose layout in memory XLA may not choose to suit what reads or writes it."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def tokens(m):
    """The tokens of chunk m."""
    return pl.ds(pl.multiple_of(m * CHUNK, CHUNK), CHUNK)


def full(shape, value, dtype):
    """A constant in the layout of accumulators."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), plgpu.Layout.WGMMA)


def load(ref):
    """A tile from shared memory in the layout of accumulators."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)


def input_tiles(parts, *shape):
    """Shared memory for inputs that become operands: as they arrive, and split."""
    split_tile = tile(*shape[:-2], parts, *shape[-2:])
    return split_tile if parts == 1 else (tile(*shape, dtype=jnp.float32), split_tile)


def input_tiles_in_place(parts, *shape):
    """`input_tiles` whose parts take the place of what arrives; see split_in_place."""
    tiles = input_tiles(parts, *shape)
    return tiles if parts == 1 else overlay(*tiles)


def whole_and_split(parts, tiles):
    """`input_tiles` in a kernel: [..., rows, columns] and [..., parts, rows, columns]."""
    if parts > 1:
        return tiles
    return tiles.at[(slice(None),) * (tiles.ndim - 3) + (0,)], tiles


def split(z, parts=2, dtype=jnp.bfloat16):
    """Parts of 16 bits whose sum is z: two of bfloat16 hold 16 of its bits, where one holds 8."""
    high = z.astype(dtype)
    if parts == 1:
        return (high,)
    return high, *split(z - high.astype(jnp.float32), parts - 1, dtype)


def cut(z):
    """As split(z), of whose bits it keeps one less, by cutting bits off where that rounds twice."""
    bits = lax.bitcast_convert_type(z, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (z - high).astype(jnp.bfloat16)


def parts_of(ref):
    """References to the parts in a tile [parts, rows, columns]."""
    return tuple(ref.at[part] for part in range(ref.shape[0]))


def put(refs, parts):
    """Writes parts to their places."""
    for ref, part in zip(refs, parts, strict=True):
        ref[...] = part


def split_in_place(whole, refs):
    """Splits a float32 tile whose place is that of its parts; returns the value."""
    z = load(whole)
    plgpu.commit_smem()  # every warp has read it
    put(refs, split(z, len(refs)))
    return z


def join(refs):
    """The float32 value whose parts lie there."""
    return total(load(ref).astype(jnp.float32) for ref in refs)


def transpose(refs):
    """References to the parts of the transpose."""
    return tuple(ref.T for ref in refs)


def total(parts):
    """The sum of parts."""
    return functools.reduce(operator.add, parts)


def difference(z, y):
    """z - y of values in parts, by parts: what is large and alike in both goes first."""
    return total(a - b for a, b in zip(z, y, strict=True))


def load_rows(ref):
    """[rows] from shared memory, to be broadcast along the columns of an accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def load_columns(ref):
    """[columns] from shared memory, to be broadcast along the rows of an accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def over_rows(v, shape):
    """[columns] -> shape, the same in every row."""
    return lax.broadcast_in_dim(v, shape, [1])


def over_columns(v, shape):
    """[rows] -> shape, the same in every column."""
    return lax.broadcast_in_dim(v, shape, [0])
