"""The Pallas kernels of memory_scan.py; linear_scan_walks.py says how they walk.

With dx the gradient of (1 - a) i c, as in linear_scan_walks.py:

    d forget_t = dx_t (s_{t-1} - i_t c_t) a_t (1 - a_t),   d bias = sum over tokens of d forget
    d read_t = dx_t (1 - a_t) c_t i_t (1 - i_t),   d c_t = dx_t (1 - a_t) i_t
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_walks import gradients_of_tokens, states_of_tokens
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import lowered_once


def _gates(place, token):
    """a, 1 - a, i and c."""
    refs = place.refs
    load = lambda *where: place.load(*where).astype(jnp.float32)
    forget = load(refs.scores_gmem, token) + place.of_sequence(refs.bias_gmem)
    read = rows.sigmoid(load(refs.scores_gmem, token, place.channels))
    # 1 - sigmoid(x) would round to zero from x = 17 on.
    return rows.sigmoid(forget), rows.sigmoid(-forget), read, load(refs.c_gmem, token)


def _terms(place, token):
    stays, takes, read, c = _gates(place, token)
    return place.existing(token, place.kept(token, stays), takes * read * c)


def _terms_backward(place, token):
    refs = place.refs
    forget = place.load(refs.scores_gmem, token).astype(jnp.float32)
    stays = rows.sigmoid(forget + place.of_sequence(refs.bias_gmem))
    ds = place.load(refs.ds_gmem, token).astype(jnp.float32)
    return place.existing(token, place.kept(token, stays), ds)


def _gradients(place, token, dx, s, d_bias):
    refs, width = place.refs, place.channels
    # Computed again, which takes fewer registers than to keep them.
    stays, takes, read, c = _gates(place, token)
    dx = dx * takes
    d_forget = dx * stays * (place.kept(token, s) - read * c)
    d_read, d_c = dx * c * read * (1 - read), dx * read
    d_bias = d_bias + d_forget
    for offset, d in ((0, d_forget), (width, d_read)):
        place.store(refs.d_scores_gmem, token, d.astype(refs.d_scores_gmem.dtype), offset)
    place.store(refs.dc_gmem, token, d_c.astype(refs.dc_gmem.dtype))
    return d_bias


@lowered_once()
def forward(
    resets: jax.Array | None, scores: jax.Array, c: jax.Array, bias: jax.Array, state: jax.Array
) -> list[jax.Array]:
    """s [B, T, C] in the dtype of scores, and that of the last token, [B, C] float32.

    Args:
        resets: [B, T] int32, or None.
        scores: [B, T, 2 C], [forget | read], C a multiple of 4.
        c: [B, T, C] bfloat16 or float32.
        bias: [B, C] float32.
        state: [B, C] float32 before the first token.
    """
    inputs = {"scores": scores, "c": c, "bias": bias, "resets": resets}
    given = inputs, _terms, state, c.shape[1], scores.dtype
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
    """The gradients of scores and c, in their shape and dtype; of the bias, [B, splits, rows, C]
    float32, to be added over all axes but the last; of the state.

    Args:
        resets, scores, c, bias, state: as of `forward`, which gave s.
        ds: [B, T, C] in the dtype of s, its cotangent.
        d_last: [B, C] float32, cotangent of the last token's s as a state.
    """
    inputs = {"scores": scores, "c": c, "bias": bias, "resets": resets, "ds": ds}
    given = inputs, _terms_backward, _gradients, s, state, d_last
    outputs = {"d_scores": scores, "dc": c, "totals": None, "d_state": None}
    zero = lambda place: rows.zeros(place.grid.row)
    return gradients_of_tokens("memory_scan_backward", *given, outputs, zero)
