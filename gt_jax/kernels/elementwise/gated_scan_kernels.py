"""The Pallas kernels of gated_scan.py; linear_scan_walks.py says how they walk.

With z = sigmoid(update), keep = 1 - z and dx the gradient of z g, as in linear_scan_walks.py:

    d candidate_t = dx_t z_t g'(candidate_t),   d update_t = dx_t z_t keep_t (g_t - s_{t-1})

The cotangent of s_t is d score_t head, and d head is the sum over tokens of d score_t s_t.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_walks import gradients_of_tokens, states_of_tokens
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import lowered_once


def _gates(place, token):
    """z, 1 - z, g and its slope."""
    load = lambda offset: place.load(place.refs.gates_gmem, token, offset).astype(jnp.float32)
    candidate, update = load(0), load(place.channels)
    below = jnp.minimum(rows.sigmoid(candidate), 0.5)  # one half from zero on
    slope = jnp.where(candidate >= 0, 1.0, below * (1 - below))
    # 1 - sigmoid(x) would round to zero from x = 17 on.
    z, keep = rows.sigmoid(update), rows.sigmoid(-update)
    return z, keep, jnp.maximum(candidate, 0.0) + below, slope


def _terms(place, token):
    z, keep, value, _ = _gates(place, token)
    return place.existing(token, place.kept(token, keep), z * value)


def _terms_backward(place, token):
    _, keep, *_ = _gates(place, token)
    ds = _d_score(place, token[0]) * place.of_sequence(place.refs.head_gmem)
    return place.existing(token, place.kept(token, keep), ds)


def _gradients(place, token, dx, s, d_head):
    refs, width = place.refs, place.channels
    # Computed again, which takes fewer registers than to keep them.
    z, keep, value, slope = _gates(place, token)
    dx = dx * z
    d_update = dx * keep * (value - place.kept(token, s))
    for offset, d in ((0, dx * slope), (width, d_update)):
        place.store(refs.d_gates_gmem, token, d.astype(refs.d_gates_gmem.dtype), offset)
    # The token before: s of this one is not there.
    of_head = s * _d_score(place, jnp.maximum(token[0] - 1, 0))
    return d_head + rows.masked(of_head, token[0] > 0)


def _of_last_token(place):
    """The last token's term of d head, in the first row of threads that walks."""
    grid = place.grid
    end = place.load(place.refs.s_gmem, (jnp.int32(grid.length - 1), None)).astype(jnp.float32)
    is_last = (place.split == grid.splits - 1) & (place.own == 0)
    return rows.masked(end * _d_score(place, jnp.int32(grid.length - 1)), is_last)


def _d_score(place, token):
    return place.refs.d_score_gmem[place.sequence, token]


@lowered_once()
def forward(resets: jax.Array | None, gates: jax.Array, state: jax.Array) -> list[jax.Array]:
    """s [B, T, C] of a minGRU in the dtype of gates, and that of the last token, [B, C] float32.

    Args:
        resets: [B, T] int32, or None.
        gates: [B, T, 2 C], [candidate | update], C a multiple of 4.
        state: [B, C] float32 before the first token.
    """
    given = {"gates": gates, "resets": resets}, _terms, state, gates.shape[1], gates.dtype
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
    """The gradients of gates, in their shape and dtype, and of the state; of head
    [B, splits, rows, C] float32, to be added over all axes but the last.

    Args:
        resets, gates, state: as of `forward`, which gave s.
        head: [B, C] float32; the cotangent of s is d_score head.
        d_score: [B, T] float32.
        d_last: [B, C] float32, cotangent of the last token's s as a state.
    """
    inputs = {"gates": gates, "resets": resets, "head": head, "d_score": d_score}
    given = inputs, _terms_backward, _gradients, s, state, d_last
    outputs = {"d_gates": gates, "d_state": None, "totals": None}
    return gradients_of_tokens("gated_scan_backward", *given, outputs, _of_last_token)
