"""The Pallas kernels of gated_scan.py; linear_scan_rows.py says how they work.

With z = sigmoid(update), keep = 1 - z and dx the gradient of z g, as in linear_scan_kernels.py:

    d candidate_t = dx_t z_t g'(candidate_t),   d update_t = dx_t z_t keep_t (g_t - s_{t-1})
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_rows import (
    Place,
    grid_for,
    run,
    states_before,
    states_of_tokens,
)
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import loop, lowered_once


def _gates(place, token):
    """z, 1 - z, g and its slope."""
    width = place.grid.slabs * place.grid.row.channels
    load = lambda offset: place.load(place.refs.gates_gmem, token, offset).astype(jnp.float32)
    candidate, update = load(0), load(width)
    below = jnp.minimum(rows.sigmoid(candidate), 0.5)  # one half from zero on
    slope = jnp.where(candidate >= 0, 1.0, below * (1 - below))
    # 1 - sigmoid(x) would round to zero from x = 17 on.
    z, keep = rows.sigmoid(update), rows.sigmoid(-update)
    return z, keep, jnp.maximum(candidate, 0.0) + below, slope


def _kept(place, token, x):
    """x, or zeros where the token starts a segment."""
    resets = place.refs.resets_gmem
    return x if resets is None else rows.masked(x, resets[place.sequence, token[0]] == 0)


def _terms(place, token):
    z, keep, value, _ = _gates(place, token)
    return _kept(place, token, keep), z * value


def _terms_backward(place, token):
    _, keep, *_ = _gates(place, token)
    return _kept(place, token, keep), place.load(place.refs.ds_gmem, token)


@lowered_once()
def forward(resets: jax.Array | None, gates: jax.Array, state: jax.Array) -> list[jax.Array]:
    """s [B, T, C] float32 of a minGRU.

    Args:
        resets: [B, T] int32, or None.
        gates: [B, T, 2 C], [candidate | update], C a multiple of 4.
        state: [B, C] float32 before the first token.
    """
    inputs = {"gates": gates, "resets": resets}
    return [states_of_tokens("gated_scan_forward", inputs, _terms, state, gates.shape[1])]


@lowered_once()
def backward(
    resets: jax.Array | None, gates: jax.Array, ds: jax.Array, s: jax.Array, state: jax.Array
) -> list[jax.Array]:
    """The gradients of the gates, in their shape and dtype, and of the state.

    Args:
        resets, gates, state: as of `forward`, which gave s.
        ds: [B, T, C] float32, the cotangent of s.
    """
    grid = grid_for(*s.shape)
    inputs = {"gates": gates, "resets": resets, "ds": ds}
    states = states_before(grid, inputs, _terms_backward, jnp.zeros_like(state), reverse=True)
    width = state.shape[1]

    def body(refs):
        place = Place(grid, refs, reverse=True)
        before = rows.load(refs.state_gmem, (place.sequence,), place.column, grid.row)

        def step(n, carry):
            tokens, decays, gs = place.read(n, _terms_backward)
            earlier = place.states_earlier(tokens, before)
            u, carry, _ = place.fold(decays, gs, carry)
            for token, decay, g, s in zip(tokens, decays, gs, earlier):
                dx = g + u
                u = decay * dx
                # Computed again, which takes fewer registers than to keep them.
                z, keep, value, slope = _gates(place, token)
                dx = dx * z
                d_update = dx * keep * (value - _kept(place, token, s))
                for offset, d in ((0, dx * slope), (width, d_update)):
                    place.store(refs.d_gates_gmem, token, d.astype(gates.dtype), offset)
            return carry

        u = loop(grid.tiles, step, place.start())
        place.store_of_split(refs.d_state_gmem, u)

    inputs |= {"states": states, "s": s, "state": state}
    outputs = {
        "d_gates": jax.ShapeDtypeStruct(gates.shape, gates.dtype),
        "d_state": jax.ShapeDtypeStruct((len(s), grid.splits, width), jnp.float32),
    }
    d_gates, d_state = run(grid, body, "gated_scan_backward", len(s), inputs, outputs)
    return [d_gates, d_state[:, 0]]
