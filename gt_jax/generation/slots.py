"""The batch on the device: its slots, and the burst of decode steps that advances them all.

A slot is one row of the batch. Every step it reads one token: first the waiting tokens of its
prompt, then the token that it drew last. No row is ever padded and the batch always has the same
number of rows, so the tokens of a request do not depend on its neighbours, to the last bit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax import compilation
from gt_jax.generation.contexts import PREFILL_CHUNKS, Context, start_state
from gt_jax.generation.requests import MOST_TOP_LOGPROBS, Request
from gt_jax.generation.sampling import Settings, choose
from gt_jax.generation.weights import decode_step
from gt_jax.models import LanguageModel, Params

BURST = 32  # steps in one call of the device
STRIDE = 8  # steps between looks at whether any row has something to do; divides BURST


class Slots(NamedTuple):
    """The batch on the device; every array's first axis is the row.

    state: of the model. queue: [B, 64] int32, the `waiting` [B] >= 1 tokens to read come first.
    seen: [B, vocab] bool. key: [B] random keys. drawn, limit: [B] int32, tokens so far and at most.
    settings: Settings of [B].
    """

    state: Any
    queue: jax.Array
    waiting: jax.Array
    seen: jax.Array
    key: jax.Array
    drawn: jax.Array
    limit: jax.Array
    settings: Settings


class Drawn(NamedTuple):
    """What a burst of S steps drew.

    tokens: [S, B] int32, -1 while a row still reads its prompt or has nothing to do.
    log_probabilities: [S, B] float32. top_ids, top_values: [S, B, 20 or 0], the likeliest tokens
    with their log-probabilities.
    """

    tokens: jax.Array
    log_probabilities: jax.Array
    top_ids: jax.Array
    top_values: jax.Array


def rows_of_batch(rows: int) -> int:
    """The number of rows on the device for `rows` requests at once.

    For a single row, XLA's GPU backend writes out all the element-wise products of a matrix before
    it sums them; an idle second row costs less.
    """
    return rows if jax.default_backend() == "cpu" else max(rows, 2)


@functools.partial(jax.jit, static_argnames=("model", "rows"), keep_unused=True)
def empty_slots(model: LanguageModel, params: Params, rows: int) -> Slots:
    """Slots whose rows have nothing to do."""
    full = lambda value: jnp.full(rows, value, jnp.result_type(value))
    return Slots(
        start_state(model, params, rows),
        queue=jnp.zeros((rows, PREFILL_CHUNKS[0]), jnp.int32),
        waiting=full(1),
        seen=jnp.zeros((rows, model.config.vocab_size), bool),
        key=jax.random.split(jax.random.key(0), rows),
        drawn=full(0),
        limit=full(0),
        settings=jax.tree.map(full, Settings()),
    )


def one_slot(request: Request, context: Context) -> Slots:
    """Slots of one row, for `fill_slot`; in place of its key is the seed, [1] int32."""
    queue = np.zeros((1, PREFILL_CHUNKS[0]), np.int32)
    queue[0, : len(context.waiting)] = context.waiting
    row: dict[str, Any] = {  # NumPy arrays: `fill_slot` moves them to the device in one call
        "state": context.state,
        "queue": queue,
        "waiting": np.array([len(context.waiting)], np.int32),
        "seen": context.seen[None],
        "key": np.array([request.seed], np.int32),
        "drawn": np.array([0], np.int32),
        "limit": np.array([request.max_tokens], np.int32),
        "settings": Settings(*(np.array([getattr(request, name)]) for name in Settings._fields)),
    }
    return Slots(**row)


@functools.partial(jax.jit, donate_argnames="slots")
def fill_slot(slots: Slots, row: int, one: Slots) -> Slots:
    """`slots` with the row of `one` at index `row`."""
    # Made here: outside a compiled function, a key costs most of what a short request does.
    one = one._replace(key=jax.vmap(jax.random.key)(one.key))
    return jax.tree.map(lambda many, new: many.at[row].set(new[0]), slots, one)


def advance(
    model: LanguageModel,
    weights: list[jax.Array],
    slots: Slots,
    *,
    narrows: bool,
    names_likeliest: bool = False,
) -> tuple[Slots, Drawn]:
    """BURST steps, or fewer if every row reaches its limit.

    Args:
        weights: of `prepare_weights`.
        narrows: whether any row may have top-k, top-p or min-p.
        names_likeliest: whether any row wants the likeliest tokens beside the one drawn.

    Returns:
        The slots, which take the place of those given, and what was drawn.
    """
    top = min(MOST_TOP_LOGPROBS, model.config.vocab_size) if names_likeliest else 0
    return _advance()(model, weights, slots, narrows=narrows, top=top)


def lower_advance(model: LanguageModel, weights: Any, slots: Any, *, narrows: bool) -> Any:
    """The jax.stages.Lowered of `advance` without likeliest tokens, for arrays or their shapes.

    It is compiled as a sample's: with nothing tried out on the device.
    """
    return _advance(sample=True).lower(model, weights, slots, narrows=narrows, top=0)


@functools.cache
def _advance(sample=False):
    options = compilation.options(compilation.SAMPLE if sample else compilation.DECODING)
    arguments = {"static_argnames": ("model", "narrows", "top"), "donate_argnames": "slots"}
    return jax.jit(_burst, compiler_options=options, **arguments)


def _burst(model, weights, slots, *, narrows, top):
    B, vocab = slots.seen.shape
    nothing = Drawn(
        jnp.full((BURST, B), -1, jnp.int32),
        jnp.zeros((BURST, B)),
        jnp.zeros((BURST, B, top), jnp.int32),
        jnp.zeros((BURST, B, top)),
    )

    def busy(carry):
        steps, slots, _ = carry
        return (steps < BURST) & jnp.any(slots.drawn < slots.limit)

    def advance_one(_, carry):
        steps, slots, drawn = carry
        logits, state = decode_step(model, weights, slots.queue[:, 0], slots.state)
        logits = jax.lax.optimization_barrier(logits)  # the same to the last bit however drawn from
        keys = jax.vmap(jax.random.fold_in)(slots.key, slots.drawn)
        token = choose(keys, logits, slots.seen, slots.settings, narrows=narrows)
        log_probability = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=1)
        log_probability -= total

        draws = (slots.waiting == 1) & (slots.drawn < slots.limit)
        queue = jnp.roll(slots.queue, -1, axis=1)
        slots = slots._replace(
            state=state,
            queue=queue.at[:, 0].set(jnp.where(draws, token, queue[:, 0])),
            waiting=jnp.maximum(slots.waiting - 1, 1),
            seen=slots.seen | (draws[:, None] & (token[:, None] == jnp.arange(vocab))),
            drawn=slots.drawn + draws,
        )
        none = jnp.zeros((B, 0))
        values, ids = jax.lax.top_k(logits, top) if top else (none, none.astype(jnp.int32))
        step = Drawn(jnp.where(draws, token, -1), log_probability, ids, values - total[:, None])
        return steps + 1, slots, jax.tree.map(lambda all, x: all.at[steps].set(x), drawn, step)

    # A GPU waits for the host at every condition of a while loop, but not inside a loop of a known
    # length: so the condition is only checked once per STRIDE.
    stride = lambda carry: jax.lax.fori_loop(0, STRIDE, advance_one, carry)
    start = (0, slots, nothing)
    _, slots, drawn = jax.lax.while_loop(busy, stride, start)
    return slots, drawn
