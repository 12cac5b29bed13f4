"""Log-likelihoods and greedy continuations of many texts side by side, for any model.

Rows of different lengths are padded on the left, and where the padding ends a new segment begins:
every row starts from the zero state and no padding changes its result. Long rows are read in pieces
that hand the state on, so that memory does not grow with their length.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.errors import InputError

_PIECE = 4096  # tokens read in one call, over all rows
_SHORTEST = 64  # columns of a piece, at least
_DISPATCH = 16  # tokens generated between two looks at the text


class Score(NamedTuple):
    """Of one continuation: log_probs [n] float32, nats; greedy: each token was the likeliest."""

    log_probs: np.ndarray
    greedy: bool


class _Piece(NamedTuple):
    """What a call of the model says of its B rows of T tokens."""

    log_probs: jax.Array  # [B, T] float32, of the targets
    hits: jax.Array  # [B, T] bool, the target is the likeliest token
    token: jax.Array  # [B] int32, the likeliest after the last
    state: Any


def position_limit(model) -> int | None:
    """The tokens an attention model can read; None for recurrent models, which have no limit."""
    return model.config.max_positions if "gpt" in model.config.architecture else None


def loss_unit(tokenizer) -> str:
    """What a loss in nats is counted per: "character" or "token"."""
    return "character" if tokenizer.kind.startswith("char") else "token"


def check_ids(model, texts) -> None:
    """Raise InputError if an id of some texts, int arrays [n], is none of the model's."""
    size = model.config.vocab_size
    for ids in texts:
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"token ids must be whole numbers, not {ids.dtype}")
        outside = ids[(ids < 0) | (ids >= size)]
        if outside.size:
            raise InputError(
                f"token id {outside[0]} is outside the model's vocabulary of {size} ids; "
                "use the tokenizer that belongs to the model"
            )


def score(model, params, pairs, *, batch_size: int = 8) -> list[Score]:
    """Log-likelihood of continuations given the tokens before them.

    Args:
        model, params: from `gt_jax.load`.
        pairs: of (context, continuation), int arrays [m] and [n] with m, n >= 1. Attention models
            see the last `max_positions` tokens before the last one.
        batch_size: rows read side by side; the result does not depend on it.

    Raises:
        InputError: a continuation alone is longer than an attention model's positions; an id is
            outside the vocabulary.
    """
    limit = position_limit(model)
    check_ids(model, itertools.chain.from_iterable(pairs))
    texts = []
    for context, continuation in pairs:
        if limit is not None and len(continuation) > limit:
            raise InputError(
                f"a continuation of {len(continuation)} tokens exceeds the {limit} positions of "
                "this model; score it in windows"
            )
        text = np.concatenate([context, continuation]).astype(np.int32)
        texts.append(text[-limit - 1 :] if limit else text)
    batch_size = max(min(batch_size, len(texts)), 1)
    scores: list = [None] * len(texts)
    for rows in _batches(texts, batch_size):
        inputs = [texts[i][:-1] for i in rows]
        pieces = [
            (p.log_probs, p.hits)
            for p in _read(model, params, inputs, [texts[i][1:] for i in rows], batch_size)
        ]
        pieces = jax.device_get(pieces)
        log_probs, hits = (np.concatenate(part, axis=1) for part in zip(*pieces))
        for row, i in enumerate(rows):
            n = len(pairs[i][1])
            scores[i] = Score(log_probs[row, -n:], bool(hits[row, -n:].all()))
    return scores


def continue_greedily(
    model,
    params,
    prompts,
    *,
    max_tokens: int,
    done: Callable[[int, list[int]], bool] = lambda row, ids: False,
    batch_size: int = 8,
) -> list[list[int]]:
    """The likeliest token, again and again, after each of some prompts.

    Args:
        model, params: from `gt_jax.load`.
        prompts: int arrays [n], n >= 1. Attention models see their last tokens, so many that
            max_tokens have room after them.
        max_tokens: per prompt, at most.
        done: done(index of the prompt, ids so far) ends that one; asked every few tokens, so that
            more may follow what it waits for.
        batch_size: prompts continued side by side; the result does not depend on it.

    Raises:
        InputError: max_tokens leaves an attention model no position for a prompt; an id is outside
            the vocabulary.
    """
    limit = position_limit(model)
    check_ids(model, prompts)
    if limit is not None and max_tokens >= limit:
        raise InputError(
            f"{max_tokens} tokens to generate leave no room for a prompt in the {limit} positions "
            "of this model; ask for fewer"
        )
    if limit is not None:
        prompts = [prompt[-(limit - max_tokens) :] for prompt in prompts]
    batch_size = max(min(batch_size, len(prompts)), 1)
    texts: list = [None] * len(prompts)
    for rows in _batches(prompts, batch_size):
        inputs = [prompts[i] for i in rows]
        *_, last = _read(model, params, inputs, inputs, batch_size)
        token, state = last.token, last.state
        ids = [[] for _ in rows]
        while len(ids[0]) < max_tokens:
            token, state, new = _extend(model, params, token, state)
            ids = [row + more for row, more in zip(ids, np.asarray(new).tolist())]
            if all(done(i, row[:max_tokens]) for i, row in zip(rows, ids)):
                break
        for i, row in zip(rows, ids):
            texts[i] = row[:max_tokens]
    return texts


def part(before, whole) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a whole text, parted where they first differ from those of its beginning alone.

    A token across the border belongs to the second part, which is never empty.
    """
    n = min(len(before), len(whole) - 1)
    same = whole[:n] == before[:n]
    n = n if same.all() else int(np.argmin(same))
    return whole[:n], whole[n:]


def windows(documents, *, seq_len: int, stride: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(context, continuation) pairs for `score` that count each target of the documents once.

    Windows of seq_len inputs begin every `stride` tokens, and a document's last ends with it. Each
    counts the targets that the one before it did not reach; but in a document's first window, they
    have more than seq_len - stride tokens before them.
    """
    pairs = []
    for ids in documents:
        counted = 1  # The first token has no context.
        for start in itertools.count(0, stride):
            if counted >= len(ids):
                break
            stop = min(start + seq_len + 1, len(ids))
            start = max(stop - seq_len - 1, 0)
            pairs.append((ids[start:counted], ids[counted:stop]))
            counted = stop
    return pairs


def _batches(texts, batch_size):
    """Lists of indices, of texts of about equal length."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _read(model, params, inputs, targets, batch_size) -> Iterator[_Piece]:
    """Reads rows, each ending with the last column of the last piece.

    Compiles for few shapes: `batch_size` rows; a power of two of columns, or pieces of one length.
    """
    size = max(_PIECE >> (batch_size - 1).bit_length(), _SHORTEST)
    size = min(size, position_limit(model) or size)
    longest = max(map(len, inputs))
    if longest <= size:
        size = min(1 << (longest - 1).bit_length(), size)
    columns = -(-longest // size) * size

    rows = np.zeros((2, batch_size, columns), np.int32)
    pad = np.full(batch_size, columns - 1)
    for i, pair in enumerate(zip(inputs, targets)):
        pad[i] = columns - len(pair[0])
        rows[:, i, pad[i] :] = pair
    segments = (np.arange(columns) >= pad[:, None]).astype(np.int32)
    state = _zero_state(model, batch_size)
    for start in range(0, columns, size):
        part = np.s_[:, start : start + size]
        fresh = start <= pad  # So far the row was padding: what it left in the state goes.
        piece = _step(model, params, *rows[:, *part], segments[part], fresh, state)
        state = piece.state
        yield piece


@functools.lru_cache(maxsize=4)
def _zero_state(model, batch_size):
    return model.init_state(batch_size)


@functools.partial(jax.jit, static_argnames="model")
def _step(model, params, inputs, targets, segment_ids, fresh, state) -> _Piece:
    state = jax.tree.map(
        lambda x: jnp.where(fresh.reshape(-1, *[1] * (x.ndim - 1)), 0, x).astype(x.dtype), state
    )
    logits, state = model.apply({"params": params}, inputs, state, segment_ids=segment_ids)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    log_probs = chosen - jax.nn.logsumexp(logits, -1)
    return _Piece(log_probs, likeliest == targets, likeliest[:, -1], state)


@functools.partial(jax.jit, static_argnames="model")
def _extend(model, params, token, state):
    """Feeds `token` [B] and the likeliest after it in turn; returns also those fed, [B, n]."""

    def step(carry, _):
        token, state = carry
        logits, state = model.apply({"params": params}, token[:, None], state)
        return (jnp.argmax(logits[:, 0], -1).astype(jnp.int32), state), token

    (token, state), fed = jax.lax.scan(step, (token, state), length=_DISPATCH)
    return token, state, fed.T
