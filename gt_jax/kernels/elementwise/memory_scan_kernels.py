"""The Pallas kernels of memory_scan.py; linear_scan_rows.py says how they work.

With dx the gradient of (1 - a) i c, as in linear_scan_kernels.py:

    d forget_t = dx_t (s_{t-1} - i_t c_t) a_t (1 - a_t),   d bias = sum over tokens of d forget
    d read_t = dx_t (1 - a_t) c_t i_t (1 - i_t),   d c_t = dx_t (1 - a_t) i_t
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_rows import (
    Place,
    grid_for,
    run,
    states_before,
    states_of_tokens,
    sums_of_rows,
)
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import loop, lowered_once


def _gates(place, token):
    """a, 1 - a, i and c."""
    width, refs = place.grid.slabs * place.grid.row.channels, place.refs
    load = lambda *where: place.load(*where).astype(jnp.float32)
    forget = load(refs.scores_gmem, token) + place.of_sequence(refs.bias_gmem)
    read = rows.sigmoid(load(refs.scores_gmem, token, width))
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
    grid = grid_for(*s.shape)
    inputs = {"scores": scores, "c": c, "bias": bias, "resets": resets, "ds": ds}
    states = states_before(grid, inputs, _terms_backward, d_last, reverse=True)
    width, of_c = state.shape[1], c.dtype

    def body(refs):
        place = Place(grid, refs, reverse=True)
        before = place.of_sequence(refs.state_gmem)

        def step(n, carry):
            u, d_bias = carry
            tokens, decays, gs = place.read(n, _terms_backward)
            earlier = place.states_earlier(tokens, before)
            u, after, _ = place.fold(decays, gs, u)
            for token, decay, g, s in zip(tokens, decays, gs, earlier):
                dx = g + u
                u = decay * dx
                # Computed again, which takes fewer registers than to keep them.
                stays, takes, read, c = _gates(place, token)
                dx = dx * takes
                d_forget = dx * stays * (place.kept(token, s) - read * c)
                d_read, d_c = dx * c * read * (1 - read), dx * read
                d_bias += d_forget
                for offset, d in ((0, d_forget), (width, d_read)):
                    place.store(refs.d_scores_gmem, token, d.astype(scores.dtype), offset)
                place.store(refs.dc_gmem, token, d_c.astype(of_c))
            return after, d_bias

        u, d_bias = loop(grid.tiles, step, (place.start(), rows.zeros(grid.row)))
        place.store_of_split(refs.d_state_gmem, u)
        place.store_of_row(refs.d_bias_gmem, d_bias)

    inputs |= {"states": states, "s": s, "state": state}
    outputs = {
        "d_scores": jax.ShapeDtypeStruct(scores.shape, scores.dtype),
        "dc": jax.ShapeDtypeStruct(c.shape, c.dtype),
        "d_bias": sums_of_rows(grid, state),
        "d_state": jax.ShapeDtypeStruct((len(s), grid.splits, width), jnp.float32),
    }
    *gradients, d_state = run(grid, body, "memory_scan_backward", len(s), inputs, outputs)
    return [*gradients, d_state[:, 0]]
