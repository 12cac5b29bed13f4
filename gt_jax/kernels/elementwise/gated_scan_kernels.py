"""The Pallas kernels of gated_scan.py; linear_scan_walks.py says how they walk.

With z = sigmoid(update), keep = 1 - z and dx the gradient of z g, as in linear_scan_walks.py:

    d candidate_t = dx_t z_t g'(candidate_t),   d update_t = dx_t z_t keep_t (g_t - s_{t-1})

The cotangent of s_t is d score_t head, and d head is the sum over tokens of d score_t s_t.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_walks import (
    Terms,
    gradients_of_tokens,
    states_of_tokens,
)
from gt_jax.kernels.pallas import row_functions, rows
from gt_jax.kernels.pallas.launch import lowered_once


def _given(place, token):
    """Candidate and update, and whether it is reset."""
    load = lambda offset: place.load("gates", token, offset)
    return load(0), load(place.channels), place.reset(token)


def _given_backward(place, token):
    """The same and d score."""
    return *_given(place, token), place.number("d_score", token)


def _gates(candidate, update):
    """exp(-update) and, of the candidate from below zero up to zero, exp(candidate); one over one
    plus each, in a product: special functions are what takes longest."""
    power = row_functions.exp_of_negative(update.astype(jnp.float32), most=124)
    below = row_functions.exp(jnp.minimum(candidate.astype(jnp.float32), 0.0))
    return power, below, row_functions.reciprocal((1 + below) * power + (1 + below))


def _terms(place, token, given):
    candidate, update, reset = given
    power, below, both = _gates(candidate, update)
    z = (1 + below) * both
    # g is a sigmoid below zero, below / (1 + below), and one half more than the candidate above.
    x = z * jnp.maximum(candidate.astype(jnp.float32), 0.0) + below * both
    return place.existing(token, place.unless_reset(power * z, reset), x)


def _terms_backward(place, token, given):
    _, update, reset, d_score = given
    _, keep = row_functions.sigmoids(update.astype(jnp.float32))
    return place.existing(token, place.unless_reset(keep, reset), d_score * place.parameter)


def _gradients(place, token, given, dx, s):
    candidate, update, reset, d_score = given
    refs, s = place.refs, place.unless_reset(s, reset)
    candidate = candidate.astype(jnp.float32)
    # Each sigmoid by itself: keep, which `_terms_backward` wants, is then computed once.
    z, keep = row_functions.sigmoids(update.astype(jnp.float32))
    below = jnp.minimum(row_functions.sigmoid(candidate), 0.5)  # one half from zero on
    slope = jnp.where(candidate >= 0, 1.0, below * (1 - below))
    step = jnp.maximum(candidate, 0.0) + below - s  # from the state before to g
    dx = dx * z
    for offset, d in ((0, dx * slope), (place.channels, dx * keep * step)):
        place.store(refs.d_gates_gmem, token, d.astype(refs.d_gates_gmem.dtype), offset)
    return rows.masked((s + z * step) * d_score, token[1])


@lowered_once()
def forward(resets: jax.Array | None, gates: jax.Array, state: jax.Array) -> list[jax.Array]:
    """s [B, T, C] of a minGRU in the dtype of gates, and that of the last token, [B, C] float32.

    Args:
        resets: [B, T] int32, or None.
        gates: [B, T, 2 C], [candidate | update], C a multiple of 4.
        state: [B, C] float32 before the first token.
    """
    terms = Terms(_given, _terms)
    given = {"gates": gates, "resets": resets}, terms, state, gates.shape[1], gates.dtype
    return states_of_tokens("gated_scan_forward", *given)


@lowered_once()
def backward(
    resets: jax.Array | None,
    gates: jax.Array,
    head: jax.Array,
    s: jax.Array,
    state: jax.Array,
    d_score: jax.Array,
    d_last: jax.Array,
) -> list[jax.Array]:
    """The gradients of gates, in their shape and dtype, and of the state; of head [B, splits, C]
    float32, to be added over all axes but the last.

    Args:
        resets, gates, state: as of `forward`, which gave s.
        head: [M, C] float32 of M models, B a multiple of M; the cotangent of s is d_score head.
        d_score: [B, T] float32.
        d_last: [B, C] float32, cotangent of the last token's s as a state.
    """
    inputs = {"gates": gates, "resets": resets, "parameter": head, "d_score": d_score}
    terms = Terms(_given_backward, _terms_backward, (("gates", 1),))
    given = inputs, terms, _gradients, s, state, d_last
    outputs = {"d_gates": gates, "d_state": None, "total": None}
    return gradients_of_tokens("gated_scan_backward", *given, outputs)
