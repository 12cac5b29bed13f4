"""The Pallas kernels of linear_scan.py; linear_scan_rows.py says how they work.

The gradient walks from the last token to the first. With u_t = decay_t ds_t, the gradient of the
state that token t reads, and g the cotangent of s:

    u_t = decay_t u_{t+1} + decay_t g_t,   dx_t = g_t + u_{t+1},   d decay_t = dx_t s_{t-1}
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


def _terms(place, token):
    return place.load(place.refs.decay_gmem, token), place.load(place.refs.x_gmem, token)


@lowered_once()
def forward(decay: jax.Array, x: jax.Array, state: jax.Array) -> list[jax.Array]:
    """s_t = decay_t s_{t-1} + x_t, [B, T, C] float32.

    Args:
        decay, x: [B, T, C] float32, C a multiple of 4.
        state: [B, C] float32 before the first token.
    """
    inputs = {"decay": decay, "x": x}
    return states_of_tokens("linear_scan_forward", inputs, _terms, state, x.shape[1])


@lowered_once()
def backward(decay: jax.Array, ds: jax.Array, s: jax.Array, state: jax.Array) -> list[jax.Array]:
    """The gradients of decay and x, [B, T, C] float32.

    Args:
        decay, state: as of `forward`, which gave s.
        ds: [B, T, C] float32, the cotangent of s.
    """
    grid = grid_for(*s.shape)
    inputs = {"decay": decay, "x": ds}
    states = states_before(grid, inputs, _terms, jnp.zeros_like(state), reverse=True)

    def body(refs):
        place = Place(grid, refs, reverse=True)
        before = rows.load(refs.state_gmem, (place.sequence,), place.column, grid.row)

        def step(n, carry):
            tokens, decays, gs = place.read(n, _terms)
            earlier = place.states_earlier(tokens, before)
            u, carry, _ = place.fold(decays, gs, carry)
            for token, decay, g, s in zip(tokens, decays, gs, earlier):
                dx = g + u
                u = decay * dx
                place.store(refs.dx_gmem, token, dx)
                place.store(refs.d_decay_gmem, token, dx * s)
            return carry

        loop(grid.tiles, step, place.start())

    inputs |= {"states": states, "s": s, "state": state}
    like_s = jax.ShapeDtypeStruct(s.shape, s.dtype)
    outputs = {"d_decay": like_s, "dx": like_s}
    return run(grid, body, "linear_scan_backward", len(s), inputs, outputs)
