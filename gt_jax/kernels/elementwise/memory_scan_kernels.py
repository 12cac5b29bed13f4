"""The Pallas kernels of memory_scan.py; linear_scan_walks.py says how they walk.

With dx the gradient of (1 - a) i c, as in linear_scan_walks.py:

    d forget_t = dx_t (s_{t-1} - i_t c_t) a_t (1 - a_t),   d bias = sum over tokens of d forget
    d read_t = dx_t (1 - a_t) c_t i_t (1 - i_t),   d c_t = dx_t (1 - a_t) i_t
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_walks import (
    Terms,
    gradients_of_tokens,
    states_of_tokens,
)
from gt_jax.kernels.pallas import row_functions
from gt_jax.kernels.pallas.launch import lowered_once


def _given(place, token):
    """Forget, read and c, and whether it is reset."""
    forget = place.load("scores", token)
    read = place.load("scores", token, place.channels)
    return forget, read, place.load("c", token), place.reset(token)


def _given_backward(place, token):
    """The same and ds."""
    return *_given(place, token), place.load("ds", token)


def _gates(place, forget, read):
    """exp(-forget - bias) and exp(-read); one over one plus each, in a product: special functions
    are what takes longest."""
    # At most 2^62, so that the product of both is finite: no gate is below 2e-19.
    exp = functools.partial(row_functions.exp_of_negative, most=62)
    forget, read = exp(forget.astype(jnp.float32), place.parameter), exp(read.astype(jnp.float32))
    return forget, read, row_functions.reciprocal((1 + read) * forget + (1 + read))


def _terms(place, token, given):
    forget, read, c, reset = given
    forget, read, both = _gates(place, forget, read)
    kept, x = (1 + read) * both, forget * both * c.astype(jnp.float32)
    return place.existing(token, place.unless_reset(kept, reset), x)


def _terms_backward(place, token, given):
    forget, _, _, reset, ds = given
    kept, _ = row_functions.sigmoids(forget.astype(jnp.float32), place.parameter)
    return place.existing(token, place.unless_reset(kept, reset), ds.astype(jnp.float32))


def _gradients(place, token, given, dx, s):
    forget, read, c, reset, _ = given
    refs, c = place.refs, c.astype(jnp.float32)
    # Each sigmoid by itself: kept, which `_terms_backward` wants, is then computed once.
    kept, takes = row_functions.sigmoids(forget.astype(jnp.float32), place.parameter)
    read = row_functions.sigmoid(read.astype(jnp.float32))
    dx = dx * takes
    d_forget = dx * kept * (place.unless_reset(s, reset) - read * c)
    for offset, d in ((0, d_forget), (place.channels, dx * c * read * (1 - read))):
        place.store(refs.d_scores_gmem, token, d.astype(refs.d_scores_gmem.dtype), offset)
    place.store(refs.dc_gmem, token, (dx * read).astype(refs.dc_gmem.dtype))
    return d_forget


@lowered_once()
def forward(
    resets: jax.Array | None, scores: jax.Array, c: jax.Array, bias: jax.Array, state: jax.Array
) -> list[jax.Array]:
    """s [B, T, C] in the dtype of scores, and that of the last token, [B, C] float32.

    Args:
        resets: [B, T] int32, or None.
        scores: [B, T, 2 C], [forget | read], C a multiple of 4.
        c: [B, T, C] bfloat16 or float32.
        bias: [M, C] float32 of M models, B a multiple of M.
        state: [B, C] float32 before the first token.
    """
    inputs = {"scores": scores, "c": c, "parameter": bias, "resets": resets}
    given = inputs, Terms(_given, _terms), state, c.shape[1], scores.dtype
    return states_of_tokens("memory_scan_forward", *given)


@lowered_once()
def backward(
    resets: jax.Array | None,
    scores: jax.Array,
    c: jax.Array,
    bias: jax.Array,
    s: jax.Array,
    state: jax.Array,
    ds: jax.Array,
    d_last: jax.Array,
) -> list[jax.Array]:
    """The gradients of scores and c, in their shape and dtype; of the bias, [B, splits, C] float32,
    to be added over all axes but the last; of the state.

    Args:
        resets, scores, c, bias, state: as of `forward`, which gave s.
        ds: [B, T, C] in the dtype of s, its cotangent.
        d_last: [B, C] float32, cotangent of the last token's s as a state.
    """
    inputs = {"scores": scores, "c": c, "parameter": bias, "resets": resets, "ds": ds}
    terms = Terms(_given_backward, _terms_backward, (("scores", 0), ("ds", 0)))
    given = inputs, terms, _gradients, s, state, d_last
    outputs = {"d_scores": scores, "dc": c, "total": None, "d_state": None}
    return gradients_of_tokens("memory_scan_backward", *given, outputs)
