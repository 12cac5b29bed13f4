"""The recurrence of a minGRU (Feng et al. 2024), its gates included, by Pallas kernels.

    s_t = (1 - z_t) s_{t-1} + z_t g(candidate_t),   z = sigmoid(update)
    g(x) = x + 1/2 from zero on, sigmoid(x) below

As linear_scan.py, but decay and input are computed in the kernels from what a product has written,
and their gradients become those of that product there. With bfloat16 gates that is 8 bytes a number
forward (both gates; s) and 16 backward (both gates, s, ds; both gradients).
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import linear_scan
from gt_jax.kernels.pallas.devices import portable_unsupported

_ALIGNED = 4  # channels that a thread reads at once


def fits(impl: str, gates: jax.Array, state: jax.Array) -> bool:
    """Whether `scan` takes a call; as linear_scan.fits.

    Args:
        impl: as of the recurrences.
        gates: [B, T, 2 C].
        state: [B, C].
    """
    return (
        impl in linear_scan.IMPLS
        and gates.dtype in (jnp.bfloat16, jnp.float32)
        and state.dtype == jnp.float32
        and gates.shape[1] >= linear_scan.SHORTEST
        and state.size > 0
        and state.shape[-1] % _ALIGNED == 0
        and portable_unsupported() is None
    )


@jax.custom_vjp
def scan(gates: jax.Array, state: jax.Array, resets: jax.Array | None) -> jax.Array:
    """s of all tokens.

    Args:
        gates: [B, T, 2 C] bfloat16 or float32, [candidate | update]; see `fits`.
        state: [B, C] float32, s before the first token.
        resets: [B, T] int32, 1 where s is zero before the token; None for nowhere.

    Returns:
        s [B, T, C] float32.
    """
    return _forward(gates, state, resets)[0]


def _forward(gates, state, resets):
    from gt_jax.kernels.pallas.launch import keep

    (s,) = keep(_call("forward", resets, gates, state))
    return s, (gates, s, state, resets)


def _backward(residuals, ds):
    gates, s, state, resets = residuals
    d_gates, d_state = _call("backward", resets, gates, ds, s, state)
    return d_gates, d_state, None


scan.defvjp(_forward, _backward)


def _call(name, resets, *arrays):
    """A function of gated_scan_kernels.py."""
    from gt_jax.kernels.elementwise import gated_scan_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    function = getattr(gated_scan_kernels, name)
    if resets is None:
        return batched_as_rows(lambda *arrays: function(None, *arrays))(*arrays)
    return batched_as_rows(function)(resets, *arrays)
