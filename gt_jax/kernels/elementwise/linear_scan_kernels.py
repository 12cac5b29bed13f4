"""The Pallas kernels of linear_scan.py; linear_scan_walks.py has their formulas."""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.linear_scan_walks import (
    Terms,
    gradients_of_tokens,
    states_of_tokens,
)
from gt_jax.kernels.pallas.launch import lowered_once


def _given(place, token):
    return place.load("decay", token), place.load("x", token)


_TERMS = Terms(_given, lambda place, token, given: given, (("decay", 0), ("x", 0)))


def _gradients(place, token, given, dx, s):
    place.store(place.refs.dx_gmem, token, dx)
    place.store(place.refs.d_decay_gmem, token, dx * s)


@lowered_once()
def forward(decay: jax.Array, x: jax.Array, state: jax.Array) -> list[jax.Array]:
    """s_t = decay_t s_{t-1} + x_t, [B, T, C] float32.

    Args:
        decay, x: [B, T, C] float32, C a multiple of 4.
        state: [B, C] float32 before the first token.
    """
    inputs = {"decay": decay, "x": x}
    return states_of_tokens("linear_scan_forward", inputs, _TERMS, state, x.shape[1])


@lowered_once()
def backward(decay: jax.Array, ds: jax.Array, s: jax.Array, state: jax.Array) -> list[jax.Array]:
    """The gradients of decay and x, [B, T, C] float32.

    Args:
        decay, state: as of `forward`, which gave s.
        ds: [B, T, C] float32, the cotangent of s.
    """
    given = {"decay": decay, "x": ds}, _TERMS, _gradients, s, state, jnp.zeros_like(state)
    return gradients_of_tokens("linear_scan_backward", *given, {"d_decay": decay, "dx": ds})
