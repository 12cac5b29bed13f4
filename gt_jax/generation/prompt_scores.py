"""Log-probabilities of a prompt's own tokens, chunk by chunk.

It is a reading of its own, beside that of `contexts`: with logits the model is another program, and
what is drawn after a prompt shall not depend on whether somebody asked for its scores.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.generation.contexts import PREFILL_CHUNKS, start_state
from gt_jax.generation.requests import MOST_TOP_LOGPROBS, Scores
from gt_jax.models import LanguageModel, Params

# Chunks of a few sizes. Logits of larger ones would need gigabytes: 1024 x 65536 are 256 MiB.
CHUNKS = PREFILL_CHUNKS[:3]


class Reading(NamedTuple):
    """A prompt ids [T] on the way: the state after `read` tokens, and what was found so far."""

    ids: np.ndarray
    state: Any
    read: int
    found: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]


def start_reading(model: LanguageModel, params: Params, ids: np.ndarray) -> Reading:
    """The Reading of a checked prompt, ids [T], with nothing read."""
    return Reading(ids.astype(np.int32), start_state(model, params), 0, ())


def tokens_left(reading: Reading) -> int:
    """How many tokens are still to be read; 0 at the end. The last one predicts nothing here."""
    return len(reading.ids) - 1 - reading.read


def read_chunk(model: LanguageModel, params: Params, reading: Reading) -> Reading:
    """The reading after its next chunk; the last chunk is padded."""
    read, left = reading.read, tokens_left(reading)
    size = max((size for size in CHUNKS if size <= left), default=CHUNKS[0])
    if model.config.position_limit is not None:
        size = min(size, model.config.position_limit - read)
    used = min(size, left)
    rows = np.zeros((2, 1, size), np.int32)
    rows[:, 0, :used] = reading.ids[read : read + used], reading.ids[read + 1 : read + 1 + used]
    state, found = _score_chunk(model, params, *rows, reading.state)
    return Reading(reading.ids, state, read + used, (*reading.found, found))


@functools.partial(jax.jit, static_argnames="model")
def _score_chunk(model, params, tokens, targets, state):
    logits, state = model.apply({"params": params}, tokens, state)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    values, ids = jax.lax.top_k(logits, min(MOST_TOP_LOGPROBS, logits.shape[-1]))
    total = jax.nn.logsumexp(logits, axis=-1)
    found = (chosen - total, ids, values - total[..., None])
    return state, jax.tree.map(lambda x: x[0], found)


def scores_of(reading: Reading, top: int) -> Scores:
    """The Scores of all tokens but the first, with the `top` likeliest at each place."""
    count = reading.read
    if not count:
        return Scores([], [])
    chosen, ids, values = (np.concatenate(x) for x in zip(*jax.device_get(reading.found)))
    likeliest = likeliest_of(ids[:count, :top], values[:count, :top])
    return Scores(chosen[:count].tolist(), likeliest)


def likeliest_of(ids: np.ndarray, values: np.ndarray) -> list[dict[int, float]]:
    """Token id -> log-probability for each row of two arrays [T, n], likeliest first."""
    return [dict(zip(*row)) for row in zip(ids.tolist(), values.tolist())]
