"""Log-likelihoods and greedy continuations of many texts side by side, for any model.

Rows of different lengths are padded on the left. A new segment begins where the padding ends, so
every row starts as a document does and padding changes no result. Long rows are read in chunks
that pass the state on, so memory does not grow with their length.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError
from gt_jax.finite import check_computed
from gt_jax.models import LanguageModel, Params, make_model
from gt_jax.models.carry import choose_rows, first_state

Ids = Sequence[int] | np.ndarray  # token ids [n]

_CHUNK = 4096  # tokens read in one call, over all rows
_SHORTEST = 64  # columns of a chunk, at least
_DISPATCH = 16  # tokens generated between two looks at the text


class Score(NamedTuple):
    """Of one continuation: log_probs [n] float32, nats; greedy: each token was the likeliest."""

    log_probs: np.ndarray
    greedy: bool


class _Chunk(NamedTuple):
    """Results of one call of the model on B rows of T tokens."""

    log_probs: jax.Array  # [B, T] float32, of the targets
    hits: jax.Array  # [B, T] bool, the target is the likeliest token
    token: jax.Array  # [B] int32, the likeliest after the last
    state: Any


def loss_unit(tokenizer: Tokenizer) -> str:
    """What a loss in nats is counted per: "character" or "token"."""
    return "character" if tokenizer.kind.startswith("char") else "token"


def check_ids(model: LanguageModel, texts: Iterable[Ids]) -> None:
    """Raise InputError if texts, int arrays [n], hold an id outside the model's vocabulary."""
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


def score(
    model: LanguageModel,
    params: Params,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[Score]:
    """Log-likelihood of continuations given the tokens before them.

    Args:
        model, params: from `gt_jax.load`.
        pairs: of (context, continuation), int arrays [m] and [n] with m, n >= 1. Attention models
            see the last `max_positions` tokens before the last one.
        batch_size: rows read side by side; the result does not depend on it.
        on_batch: told the number of rows after each batch.

    Raises:
        InputError: a continuation alone is longer than an attention model's positions; an id is
            outside the vocabulary; a probability is NaN.
    """
    limit = model.config.position_limit
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
        chunks = [
            (p.log_probs, p.hits)
            for p in _read(model, params, inputs, [texts[i][1:] for i in rows], batch_size)
        ]
        log_probs, hits = (np.concatenate(x, axis=1) for x in zip(*jax.device_get(chunks)))
        for row, i in enumerate(rows):
            n = len(pairs[i][1])
            check_computed(log_probs[row, -n:])
            scores[i] = Score(log_probs[row, -n:], bool(hits[row, -n:].all()))
        on_batch(len(rows))
    return scores


def continue_greedily(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Ids],
    *,
    max_tokens: int,
    done: Callable[[int, list[int]], bool] = lambda row, ids: False,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """The likeliest token, again and again, after each of some prompts.

    Args:
        model, params: from `gt_jax.load`.
        prompts: int arrays [n], n >= 1. Attention models see the last tokens of each, as many as
            leave room for max_tokens.
        max_tokens: per prompt, at most.
        done: done(index of the prompt, ids so far) says whether to end that prompt. It is asked
            every few tokens, so some tokens may follow the end it looks for.
        batch_size: prompts continued side by side; the result does not depend on it.
        on_batch: told the number of prompts after each batch.

    Raises:
        InputError: max_tokens leaves an attention model no position for a prompt; an id is outside
            the vocabulary; a probability is NaN.
    """
    limit = model.config.position_limit
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
        check_computed(last.log_probs)
        token, state = last.token, last.state
        ids = [[] for _ in rows]
        while len(ids[0]) < max_tokens:
            token, state, new = _extend(model, params, token, state)
            ids = [row + more for row, more in zip(ids, np.asarray(new).tolist())]
            if all(done(i, row[:max_tokens]) for i, row in zip(rows, ids)):
                break
        for i, row in zip(rows, ids):
            texts[i] = row[:max_tokens]
        on_batch(len(rows))
    return texts


def part(before: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the ids of a whole text where they first differ from the ids of its beginning alone.

    A token across the border belongs to the second part, which is never empty.
    """
    n = min(len(before), len(whole) - 1)
    same = whole[:n] == before[:n]
    n = n if same.all() else int(np.argmin(same))
    return whole[:n], whole[n:]


def windows(
    documents: Iterable[np.ndarray], *, seq_len: int, stride: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(context, continuation) pairs for `score` that count each target of the documents once.

    Windows of seq_len inputs begin every `stride` tokens; the last one ends with the document. Each
    window counts the targets that the window before did not reach. Except in the first window, a
    target has more than seq_len - stride tokens before it.
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


def _read(model, params, inputs, targets, batch_size) -> Iterator[_Chunk]:
    """Read rows that all end with the last column of the last chunk.

    Few shapes have to be compiled: `batch_size` rows, and chunks of one length or, for short rows,
    of a power of two of columns.
    """
    # Padding is no document that could leave a share of its state to the text after it.
    model = make_model(dataclasses.replace(model.config, rwkv_carry=0.0))
    size = max(_CHUNK >> (batch_size - 1).bit_length(), _SHORTEST)
    size = min(size, model.config.position_limit or size)
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
    state = _zeros(cast(Any, model), batch_size)  # a frozen dataclass is hashable
    for start in range(0, columns, size):
        part = np.s_[:, start : start + size]
        resets = start <= pad  # the row was padding so far
        chunk = _step(model, params, *rows[:, *part], segments[part], resets, state)
        state = chunk.state
        yield chunk


@functools.lru_cache(maxsize=4)
def _zeros(model: Any, batch_size: int) -> Any:
    return model.init_state(batch_size)


@functools.partial(jax.jit, static_argnames="model")
def _step(model, params, inputs, targets, segment_ids, resets, state) -> _Chunk:
    zeros = jax.tree.map(jnp.zeros_like, state)
    state = choose_rows(resets, first_state(model.config, params, zeros), state)
    logits, state = model.apply({"params": params}, inputs, state, segment_ids=segment_ids)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    log_probs = chosen - jax.nn.logsumexp(logits, -1)
    return _Chunk(log_probs, likeliest == targets, likeliest[:, -1], state)


@functools.partial(jax.jit, static_argnames="model")
def _extend(model, params, token, state):
    """Feeds `token` [B] and the likeliest after it in turn; returns also those fed, [B, n]."""

    def step(carry, _):
        token, state = carry
        logits, state = model.apply({"params": params}, token[:, None], state)
        return (jnp.argmax(logits[:, 0], -1).astype(jnp.int32), state), token

    (token, state), fed = jax.lax.scan(step, (token, state), length=_DISPATCH)
    return token, state, fed.T
