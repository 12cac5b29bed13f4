"""What the chunked implementations share: chunks of time, sums of decays, carrying the state.

Products of decays inside a chunk are exponentials of sums of log decays. Taking such a sum as the
difference of two prefix sums loses digits and turns -inf into NaN, and factoring it into
exp(G_i) exp(-G_j) overflows. Instead every pair of tokens i > j belongs to exactly one level: the
block of 2b tokens (b = 1, 2, 4, ...) whose middle separates them. With that middle as reference,

    sum over (j, i) of w  =  [sum from the middle to i]  +  [sum from j to the middle]

holds exactly and both sums are at most 0, so nothing overflows and nothing cancels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike

# exp of this is 0 in every dtype, and sums of it stay finite where sums of -inf would meet 0 * inf
LOWEST_LOG_DECAY = -1e4

# Temporaries grow with the tokens worked on at once, so long sequences go group by group.
_GROUP_TOKENS = 1024


class Plan(NamedTuple):
    """How a batch is cut: `groups` one after the other, `chunks` of `steps` tokens at once."""

    length: int
    groups: int
    chunks: int
    steps: int
    rows: int  # of the batch, so many at once
    dtype: jnp.dtype  # of states, decays and accumulation
    operand_dtype: jnp.dtype  # of matmul operands


def make_plan(
    length: int,
    chunk_size: int,
    dtype: DTypeLike,
    precision: str,
    state_dtype: DTypeLike,
    *,
    batch: int = 1,
    cpu_tokens: int = _GROUP_TOKENS,
) -> Plan:
    """Cuts `batch` rows of `length` tokens into equal groups of at most about _GROUP_TOKENS.

    On a CPU, a group's rows together have at most about `cpu_tokens`. Temporaries then stay in its
    caches, and a call takes little new memory: an operating system needs longer to hand out a
    page than a CPU to fill it.
    """
    if chunk_size < 2 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size} must be a power of two, at least 2")
    steps = min(chunk_size, max(2, 1 << (length - 1).bit_length()))
    most_tokens, rows = _GROUP_TOKENS, batch
    if jax.default_backend() == "cpu":
        most_tokens = min(_GROUP_TOKENS, cpu_tokens)
    groups = math.ceil(length / max(most_tokens, steps))
    chunks = math.ceil(length / groups / steps)
    if jax.default_backend() == "cpu":
        most_rows = max(1, cpu_tokens // (chunks * steps))
        rows = max(n for n in range(1, min(batch, most_rows) + 1) if batch % n == 0)
    exact = precision == "highest" or dtype == jnp.float16  # states can exceed float16's range
    operand_dtype = jnp.dtype(state_dtype if exact else dtype)
    return Plan(length, groups, chunks, steps, rows, jnp.dtype(state_dtype), operand_dtype)


class Levels(NamedTuple):
    """Constants of a chunk of C steps; L = log2(C) levels, finest first."""

    query: np.ndarray  # [L, C] bool: the token lies in the second half of its block
    pair: np.ndarray  # [L, C, C] bool: i reads j at this level
    before: np.ndarray  # [L, C, C] bool: s in [middle, i) for queries i, in (j, middle) for keys j
    through: np.ndarray  # [L, C, C] bool: the same, but s in [middle, i] for queries


@functools.cache
def levels(steps: int) -> Levels:
    """Levels of a chunk; see the module's docstring."""
    t = np.arange(steps)
    query, pair, before, through = [], [], [], []
    for half in (1 << level for level in range(steps.bit_length() - 1)):
        block, second = t // (2 * half), t // half % 2 == 1
        middle = (2 * block + 1) * half
        query.append(second)
        pair.append((block[:, None] == block) & second[:, None] & ~second)
        key_sum = (t > t[:, None]) & (t < middle[:, None]) & ~second[:, None]
        from_middle = (t >= middle[:, None]) & second[:, None]
        before.append(key_sum | (from_middle & (t < t[:, None])))
        through.append(key_sum | (from_middle & (t <= t[:, None])))
    return Levels(*map(np.array, (query, pair, before, through)))


def product(
    equation: str, *operands: jax.Array, plan: Plan, dtype: DTypeLike, terms: int = 1
) -> jax.Array:
    """einsum with operands in plan.operand_dtype and accumulation in `dtype`.

    terms=2 takes the last operand as the sum of two bfloat16 terms, good to 16 bits.
    """
    multiply = functools.partial(_einsum, equation, preferred_element_type=dtype)
    if plan.operand_dtype != jnp.bfloat16:
        return multiply(*(x.astype(plan.operand_dtype) for x in operands))
    *others, last = operands
    rounded = [_round_to_bfloat16(x) for x in others]
    coarse = _round_to_bfloat16(last)
    result = multiply(*rounded, coarse)
    if terms == 2:
        result += multiply(*rounded, _round_to_bfloat16(last - coarse.astype(last.dtype)))
    return result


def _round_to_bfloat16(x):
    """x in bfloat16; on CPUs, whose matmuls cannot accumulate it in float32, in float32."""
    if jax.default_backend() != "cpu":
        return x.astype(jnp.bfloat16)
    info = jnp.finfo(jnp.bfloat16)
    return lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)


def exact(equation: str, *operands: jax.Array | np.ndarray) -> jax.Array:
    """einsum in the dtype of the last operand, at full precision; masks may be bool."""
    # Converted in the program, so that a mask enters it with a byte an element.
    converted = [jnp.asarray(x).astype(operands[-1].dtype) for x in operands]
    return _einsum(equation, *converted)


def _einsum(equation, *operands, **options):
    """einsum at full precision, kept apart from what follows where that goes wrong.

    XLA for CPUs (JAX 0.10.2 and 0.12) fuses a product with the elementwise operations on its
    result, and some of its compilations then return NaN or other wrong numbers, every time they
    are called.
    """
    result = jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST, **options)
    return lax.optimization_barrier(result) if jax.default_backend() == "cpu" else result


class Sums(NamedTuple):
    """Sums of log decays w in a chunk of C tokens, cut into blocks; see the module's docstring."""

    within: list[jax.Array]  # [..., C, K] per level inside a block, from its middle
    above: list[tuple[jax.Array, jax.Array]]  # per level above: queries, keys [..., C/2b, b, K]
    from_start: jax.Array  # [..., C, K] of the tokens before
    to_end: jax.Array  # [..., C, K] of the tokens behind
    total: jax.Array  # [..., K]


def level_sums(w: jax.Array, block: int) -> Sums:
    """Sums of w [..., C, K] for every level, without a difference; linear in w.

    A half block of 2b tokens is two of b: sums before a token grow by the first half's total in the
    second half, sums behind it by the second half's total in the first.
    """
    C = w.shape[-2]
    before = behind = jnp.zeros_like(w)
    total, within, above = w, [], []  # of each half block: [..., C / b, K]
    for b in (1 << level for level in range(C.bit_length() - 1)):
        second_half = (np.arange(C) // b % 2 == 1)[:, None]
        if b < block:
            within.append(jnp.where(second_half, before, behind))
        else:
            above.append((halves(before, b)[1], halves(behind, b)[0]))
        first, second = halves(total, 1)  # [..., C / 2b, 1, K]
        zero = jnp.zeros_like(first)
        before, behind = _add_to_halves(before, zero, first), _add_to_halves(behind, second, zero)
        total = (first + second)[..., 0, :]
    return Sums(within, above, before, behind, total[..., 0, :])


def _add_to_halves(x, first, second):
    """x [..., C, K] plus what each half of its blocks of 2b has in common [..., C / 2b, 1, K]."""
    blocks = x.reshape(*first.shape[:-2], 2, -1, x.shape[-1])  # [..., C / 2b, 2, b, K]
    return (blocks + jnp.stack((first, second), axis=-3)).reshape(x.shape)


def halves(x: jax.Array, b: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., C, X] -> both halves [..., C / 2b, b, X] of its blocks of 2b (b = b.shape[-2])."""
    b = b if isinstance(b, int) else b.shape[-2]
    x = x.reshape(*x.shape[:-2], -1, 2, b, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def sum_channels(x: jax.Array) -> jax.Array:
    """[..., X] -> [..., 1]; on CPUs a product with ones, faster than a sum there."""
    if jax.default_backend() != "cpu":
        return jnp.sum(x, axis=-1, keepdims=True)
    X = x.shape[-1]
    sums = _einsum("rx,xy->ry", x.reshape(-1, X), jnp.ones((X, 1), x.dtype))
    return sums.reshape(*x.shape[:-1], 1)


def carry_chunks(
    state: jax.Array,
    decay: jax.Array,
    update: jax.Array,
    *,
    reverse: bool = False,
    starts_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """States around each chunk under S <- decay * S + update.

    Args:
        state: [B, H, X, Y] before the first chunk (after the last one if reverse).
        decay: [M, B, H, X or 1, Y or 1] per chunk.
        update: [M, B, H, X, Y] per chunk.
        starts_dtype: of the states that chunks start from, where nothing reads them but products.

    Returns:
        [M, B, H, X, Y], the state each chunk starts from, and the state after them all.
    """
    if starts_dtype is None or jax.default_backend() == "cpu":  # see _round_to_bfloat16
        starts_dtype = state.dtype

    def step(state, chunk):
        decay, update = chunk
        return decay * state + update, state.astype(starts_dtype)

    unroll = min(16, update.shape[0])
    state, starts = lax.scan(step, state, (decay, update), reverse=reverse, unroll=unroll)
    return starts, state


def map_rows(function: Callable, plan: Plan, *arrays: Any) -> Any:
    """function(*arrays), all leaves [B, ...], for plan.rows of the batch at a time."""
    if plan.rows == jax.tree.leaves(arrays)[0].shape[0]:
        return function(*arrays)
    parts = jax.tree.map(lambda x: x.reshape(-1, plan.rows, *x.shape[1:]), arrays)
    results = lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def zeros_if_none(x: jax.Array | None, shape: tuple[int, ...], plan: Plan) -> jax.Array | None:
    """An initial state [B, ...], where None stands for zeros.

    It stays None in a sequence of one chunk, which then leaves out what the state takes part in: a
    quarter of the work of WKV6 and half that of SSD.
    """
    if x is not None or plan.groups * plan.chunks == 1:
        return x
    return jnp.zeros(shape, plan.dtype)


def values(tree: Any) -> Any:
    """What a rule of a custom_vjp with symbolic zeros is called with -> arrays."""
    is_leaf = lambda x: isinstance(x, CustomVJPPrimal)
    return jax.tree.map(lambda x: x.value, tree, is_leaf=is_leaf)


def cotangents_or_none(cotangents: tuple) -> list[jax.Array | None]:
    """Cotangents of results, None where they are zero because nothing uses the result."""
    return [None if isinstance(x, SymbolicZero) else x for x in cotangents]


def scan_tokens(
    body: Callable,
    carry: Any,
    arrays: tuple[jax.Array, ...],
    plan: Plan,
    *,
    per_group: Any = None,
    reverse: bool = False,
) -> tuple[Any, Any, tuple[jax.Array, ...]]:
    """Runs over a sequence group by group; a single group is inlined.

    Args:
        body: (carry, its entry of per_group, *arrays of the group) -> (carry, result, outputs);
            arrays and outputs are [M, B, H, C, ...].
        carry: of the first group.
        arrays: [B, T, H, ...]; tokens past the end are zero.
        per_group: leaves [groups, ...].

    Returns:
        The last carry, the results [groups, ...] and the outputs [B, T, H, ...].
    """
    tokens = plan.chunks * plan.steps
    past_end = plan.groups * tokens - plan.length
    padded = [jnp.pad(x, ((0, 0), (0, past_end)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]

    def step(carry, group):
        index, entry = group
        # Slices, since [groups, B, ...] would be a copy of each array in another order.
        of_group = [lax.dynamic_slice_in_dim(x, index * tokens, tokens, axis=1) for x in padded]
        chunks = (rearrange(x, "b (m c) h ... -> m b h c ...", c=plan.steps) for x in of_group)
        carry, result, outputs = body(carry, entry, *chunks)
        return carry, (result, [rearrange(x, "m b h c ... -> b (m c) h ...") for x in outputs])

    if plan.groups == 1:
        entry = jax.tree.map(lambda x: x[0], per_group)
        carry, (result, outputs) = step(carry, (0, entry))
        result = jax.tree.map(lambda x: x[None], result)
    else:
        groups = (jnp.arange(plan.groups), per_group)
        carry, (result, outputs) = lax.scan(step, carry, groups, reverse=reverse)
        outputs = [rearrange(x, "g b t ... -> b (g t) ...") for x in outputs]
    return carry, result, tuple(x[:, : plan.length] for x in outputs)


def named(results: Any) -> Any:
    """Names what a forward pass computed "recurrence", for policies of jax.checkpoint to store."""
    return jax.tree.map(lambda x: checkpoint_name(x, "recurrence"), results)
