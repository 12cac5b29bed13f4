"""The choice of the next token; every row of a batch has its own settings.

penalise what was seen -> divide by the temperature -> top-k -> top-p -> min-p -> draw
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Settings(NamedTuple):
    """One value a row: floats but for `top_k`.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw among the k likeliest tokens; 0 for all.
    top_p: draw among the likeliest tokens that together reach this probability, in (0, 1].
    min_p: draw among tokens at least this share as likely as the likeliest, in [0, 1].
    repetition_penalty: above 0; a token seen before has its logit divided by it, or multiplied
        where negative (Keskar et al. 2019, arXiv:1909.05858). 1 leaves all as they are.
    """

    temperature: jax.Array | np.ndarray | float = 1.0
    top_k: jax.Array | np.ndarray | int = 0
    top_p: jax.Array | np.ndarray | float = 1.0
    min_p: jax.Array | np.ndarray | float = 0.0
    repetition_penalty: jax.Array | np.ndarray | float = 1.0


def choose(
    keys: jax.Array, logits: jax.Array, seen: jax.Array, settings: Settings, *, narrows: bool = True
) -> jax.Array:
    """The next token of every row.

    Args:
        keys: [B] random keys; no row's draw depends on another row.
        logits: [B, vocab] float32.
        seen: [B, vocab] bool, tokens that the repetition penalty is for.
        settings: Settings of [B] arrays.
        narrows: False where no row has top-k, top-p or min-p; it saves sorting the vocabulary,
            which costs more than a small model does.

    Returns:
        [B] int32.
    """
    logits = penalize(logits, seen, jnp.asarray(settings.repetition_penalty))
    temperature = jnp.asarray(settings.temperature)
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    if narrows:
        scaled = keep_likeliest(scaled, settings)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    greedy = (temperature == 0)[:, None]
    return jnp.argmax(jnp.where(greedy, logits, scaled + noise), axis=-1).astype(jnp.int32)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Less likely tokens where `seen`: [B, vocab] float32, [B, vocab] bool, [B] -> [B, vocab]."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likeliest(logits: jax.Array, settings: Settings) -> jax.Array:
    """Logits [B, vocab] outside a row's top-k, top-p or min-p become -inf; ties stay together."""
    values = (settings.top_k, settings.top_p, settings.min_p)
    top_k, top_p, min_p = (jnp.asarray(x)[:, None] for x in values)  # [B, 1]
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.clip(jnp.where(top_k == 0, vocab, top_k) - 1, 0, vocab - 1)
    in_top_k = ordered >= jnp.take_along_axis(ordered, last, axis=-1)
    probabilities = jax.nn.softmax(ordered, where=in_top_k)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all likelier tokens
    least = jnp.finfo(before.dtype).tiny  # what rounds to 0 keeps the likeliest all the same
    in_top_p = (before < jnp.maximum(top_p, least)) | (top_p == 1)
    in_min_p = probabilities >= min_p * probabilities[:, :1]
    kept = jnp.where(in_top_k & in_top_p & in_min_p, ordered, jnp.inf)
    return jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
