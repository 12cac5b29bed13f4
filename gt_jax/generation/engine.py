"""Many requests through a few rows of a batch, many tokens to a call of the device.

Every row of the batch is somewhere in its own text: it reads what waits of its prompt, a token a
step, then draws and reads what it has drawn. A finished row takes the next request. No row is ever
padded and the batch always has the same number of rows, so the tokens of a request are the same to
the last bit whatever its neighbours are and whether it has any.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.errors import InputError
from gt_jax.generation.contexts import PIECES, Context, read, zero_state
from gt_jax.generation.sampling import Settings, choose
from gt_jax.generation.text import TextOut
from gt_jax.generation.weights import prepare, step

BURST = 32  # steps in one call of the device
STRIDE = 8  # steps between looks at whether any row has something to do; divides BURST
ROWS = 8

# A step is hundreds of small kernels: the branches' run side by side, and no product is cut along
# the axis it sums, since summing the parts takes longer than is saved.
ON_GPU = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_experimental_force_split_k": 1,
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue and how.

    Attributes:
        prompt: [T] ids, or a Context of `read` or `load_context`, which several requests may share.
        max_tokens: how many to draw at most.
        temperature, top_k, top_p, min_p, repetition_penalty: see `sampling.Settings`. The penalty
            is for tokens of the prompt and of what was drawn.
        seed: same seed, same tokens, in any company.
        stop: strings that end the text; they need a tokenizer and are left out of the text, while
            the tokens end with the one that completes the string.
        stop_ids: token ids that end the text and are left out.

    Raises:
        InputError: a setting is out of its range.
    """

    prompt: Any
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, ok, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", -(2**31) <= self.seed < 2**31, "a whole number of 32 bits"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "strings, none empty"),
        ):
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r} must be {wanted}")

    @property
    def narrows(self) -> bool:
        """Whether top_k, top_p or min_p leaves tokens out, for which logits are sorted."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Piece(NamedTuple):
    """What one burst added to one request.

    index: of the request. tokens: ids. log_probabilities: of each under the model, before any
    setting. text: "" without a tokenizer. reason: None while more will come, else "stop" or
    "length".
    """

    index: int
    tokens: list[int]
    log_probabilities: list[float]
    text: str
    reason: str | None


class Completion(NamedTuple):
    """The pieces of one request joined; fields as in Piece."""

    tokens: list[int]
    log_probabilities: list[float]
    text: str
    reason: str


def complete(
    model,
    params,
    requests: Iterable[Request],
    *,
    tokenizer=None,
    rows: int = ROWS,
    on_piece: Callable[[Piece], None] | None = None,
) -> list[Completion]:
    """Completions in the order of the requests; `on_piece` sees each piece as it comes.

    Arguments and errors as in `stream`.
    """
    requests = list(requests)
    parts = [[] for _ in requests]
    for piece in stream(model, params, requests, tokenizer=tokenizer, rows=rows):
        parts[piece.index].append(piece)
        if on_piece is not None:
            on_piece(piece)
    return [
        Completion(
            [token for part in mine for token in part.tokens],
            [value for part in mine for value in part.log_probabilities],
            "".join(part.text for part in mine),
            mine[-1].reason,
        )
        for mine in parts
    ]


def stream(
    model, params, requests: Iterable[Request], *, tokenizer=None, rows: int = ROWS
) -> Iterator[Piece]:
    """Work through requests, yielding what each burst added to each.

    Args:
        model, params: from `gt_jax.load`.
        requests: any number.
        tokenizer: makes text; needed for stop strings.
        rows: requests under way at once. It is part of what a float32 result depends on: other
            batch sizes round matrix products otherwise.

    Raises:
        InputError: at once, if rows or a request is impossible for this model.
    """
    requests = list(requests)
    if rows < 1:
        raise InputError(f"rows={rows} must be at least 1")
    for request in requests:
        check(model, request, tokenizer)
    return work_off(model, params, deque(enumerate(requests)), tokenizer=tokenizer, rows=rows)


def check(model, request, tokenizer):
    """Raise InputError for a request that is impossible for this model."""
    if request.stop and tokenizer is None:
        raise InputError(f"stop={request.stop!r} needs a tokenizer")
    prompt = request.prompt
    length = prompt.length if isinstance(prompt, Context) else len(prompt)
    if length == 0:
        raise InputError("prompt is empty; give it at least one token")
    config = model.config
    # The last token drawn is not read.
    if "gpt" in config.architecture and length + request.max_tokens - 1 > config.max_positions:
        raise InputError(
            f"max_tokens={request.max_tokens} after a prompt of {length} tokens exceeds the "
            f"{config.max_positions} positions of this model; ask for fewer"
        )


def work_off(model, params, queue, *, tokenizer=None, rows=ROWS, dropped=frozenset()):
    """As `stream`, for requests that may still be added or dropped by another thread.

    Args:
        queue: deque of (index, Request), each one checked; emptied.
        dropped: indices of requests that nobody waits for any more.
    """
    work = {}  # row -> _Work
    weights = prepare(model, params, rows_of_batch(rows))
    slots = empty_slots(model, params, rows_of_batch(rows))
    while queue or work:
        work = {row: mine for row, mine in work.items() if mine.index not in dropped}
        for row in sorted(set(range(rows)) - set(work))[: len(queue)]:
            index, request = queue.popleft()
            if index in dropped:
                continue
            context = request.prompt
            if not isinstance(context, Context):
                context = read(model, params, context)
            slots = fill(slots, row, one_slot(request, context))
            work[row] = _Work(index, request, context, tokenizer)
        narrows = any(mine.request.narrows for mine in work.values())
        slots, drawn = advance(model, weights, slots, narrows=narrows)
        tokens, log_probabilities = jax.device_get(drawn)  # [BURST, rows] each
        for row, mine in list(work.items()):
            drew = tokens[:, row] >= 0
            if drew.any():
                piece = mine.take(tokens[drew, row].tolist(), log_probabilities[drew, row].tolist())
                yield piece
                if piece.reason:
                    del work[row]


class _Work:
    """The host's side of a row: how much was drawn, the text, whether it is the end."""

    def __init__(self, index, request, context, tokenizer):
        self.index, self.request = index, request
        self.left = request.max_tokens
        prompt = request.prompt  # More of it tells whether it ends inside a character.
        before = context.waiting if isinstance(prompt, Context) else prompt[-PIECES[0] :]
        self.out = tokenizer and TextOut(tokenizer, before, request.stop)

    def take(self, tokens, log_probabilities):
        ends = [n for n, token in enumerate(tokens) if token in self.request.stop_ids]
        used = ends[0] if ends else len(tokens)
        self.left -= used
        reason = "stop" if ends else "length" if self.left == 0 else None
        text = ""
        if self.out:
            text, used = self.out.add(tokens[:used])
            reason = "stop" if self.out.stopped else reason
            text += self.out.end() if reason else ""
        return Piece(self.index, tokens[:used], log_probabilities[:used], text, reason)


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


def rows_of_batch(rows):
    """Rows that the device works on where `rows` are wanted.

    XLA's GPU backend multiplies a matrix and a single row element by element, writes that out and
    sums it; an idle second row costs less.
    """
    return rows if jax.default_backend() == "cpu" else max(rows, 2)


@functools.partial(jax.jit, static_argnames=("model", "rows"), keep_unused=True)
def empty_slots(model, params, rows):
    """Slots whose rows have nothing to do."""
    full = lambda value: jnp.full(rows, value, jnp.result_type(value))
    return Slots(
        zero_state(model, params, rows),
        queue=jnp.zeros((rows, PIECES[0]), jnp.int32),
        waiting=full(1),
        seen=jnp.zeros((rows, model.config.vocab_size), bool),
        key=jax.random.split(jax.random.key(0), rows),
        drawn=full(0),
        limit=full(0),
        settings=jax.tree.map(full, Settings()),
    )


def one_slot(request, context):
    """Slots of one row, for `fill`."""
    queue = np.zeros((1, PIECES[0]), np.int32)
    queue[0, : len(context.waiting)] = context.waiting
    return Slots(
        context.state,
        queue=queue,
        waiting=np.int32([len(context.waiting)]),
        seen=context.seen[None],
        key=jax.random.key(request.seed)[None],
        drawn=np.int32([0]),
        limit=np.int32([request.max_tokens]),
        settings=Settings(*(np.array([getattr(request, name)]) for name in Settings._fields)),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def fill(slots, row, one):
    """`slots` with the row of `one` at index `row`."""
    return jax.tree.map(lambda many, new: many.at[row].set(new[0]), slots, one)


def advance(model, weights, slots, *, narrows):
    """BURST steps, or fewer if every row reaches its limit.

    Args:
        weights: of `prepare`.
        narrows: whether any row may have top-k, top-p or min-p.

    Returns:
        The slots, which take the place of those given, and for every step and row the token drawn,
        int32, or -1 while a row still reads its prompt or has nothing to do; with the token's
        log-probability, float32.
    """
    return _advance()(model, weights, slots, narrows=narrows)


@functools.cache
def _advance():
    options = ON_GPU if jax.default_backend() == "gpu" else None
    arguments = {"static_argnames": ("model", "narrows"), "donate_argnames": "slots"}
    return jax.jit(_burst, compiler_options=options, **arguments)


def _burst(model, weights, slots, *, narrows):
    B, vocab = slots.seen.shape
    tokens = jnp.full((BURST, B), -1, jnp.int32)
    log_probabilities = jnp.zeros((BURST, B))

    def busy(carry):
        steps, slots, _ = carry
        return (steps < BURST) & jnp.any(slots.drawn < slots.limit)

    def advance_one(_, carry):
        steps, slots, (tokens, log_probabilities) = carry
        logits, state = step(model, weights, slots.queue[:, 0], slots.state)
        logits = jax.lax.optimization_barrier(logits)  # the same to the last bit however drawn from
        keys = jax.vmap(jax.random.fold_in)(slots.key, slots.drawn)
        token = choose(keys, logits, slots.seen, slots.settings, narrows=narrows)
        log_probability = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        log_probability -= jax.nn.logsumexp(logits, axis=1)

        draws = (slots.waiting == 1) & (slots.drawn < slots.limit)
        queue = jnp.roll(slots.queue, -1, axis=1)
        slots = slots._replace(
            state=state,
            queue=queue.at[:, 0].set(jnp.where(draws, token, queue[:, 0])),
            waiting=jnp.maximum(slots.waiting - 1, 1),
            seen=slots.seen | (draws[:, None] & (token[:, None] == jnp.arange(vocab))),
            drawn=slots.drawn + draws,
        )
        tokens = tokens.at[steps].set(jnp.where(draws, token, -1))
        log_probabilities = log_probabilities.at[steps].set(log_probability)
        return steps + 1, slots, (tokens, log_probabilities)

    # A GPU waits for the host to see the condition of a while loop, but not in a known number of
    # steps.
    stride = lambda carry: jax.lax.fori_loop(0, STRIDE, advance_one, carry)
    start = (0, slots, (tokens, log_probabilities))
    _, slots, drawn = jax.lax.while_loop(busy, stride, start)
    return slots, drawn
