"""The recurrence of a minGRU (Feng et al. 2024), its gates included, by Pallas kernels.

    s_t = (1 - z_t) s_{t-1} + z_t g(candidate_t),   z = sigmoid(update)
    g(x) = x + 1/2 from zero on, sigmoid(x) below

As linear_scan.py, but decay and input are computed in the kernels from what a product has written,
and their gradients become those of that product there. All that is read of s are one number of a
token, s . head, and the last state: so the gradient needs no array ds. With bfloat16 gates that is
6 bytes a number forward (both gates; s) and 10 backward (both gates, s; both gradients).
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
def scan(
    gates: jax.Array, head: jax.Array, state: jax.Array, resets: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """s . head of all tokens, and the last token's s.

    Args:
        gates: [B, T, 2 C] bfloat16 or float32, [candidate | update]; see `fits`.
        head: [C] float32.
        state: [B, C] float32, s before the first token.
        resets: [B, T] int32, 1 where s is zero before the token; None for nowhere.

    Returns:
        [B, T] float32, of s rounded to the dtype of gates, and [B, C] float32.
    """
    return _forward(gates, head, state, resets)[0]


def _forward(gates, head, state, resets):
    from gt_jax.kernels.pallas.launch import keep

    s, last = keep(_call("forward", resets, gates, state))
    score = jnp.sum(s.astype(jnp.float32) * head, axis=-1)
    return (score, last), (gates, head, s, state, resets)


def _backward(residuals, cotangents):
    gates, head, s, state, resets = residuals
    given = gates, head[None], s, state
    d_gates, d_state, d_head = _call("backward", resets, *given, *cotangents)
    return d_gates, jnp.sum(d_head, axis=(0, 1)), d_state, None


scan.defvjp(_forward, _backward)


def _call(name, *arrays):
    """A function of gated_scan_kernels.py."""
    from gt_jax.kernels.elementwise import gated_scan_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    return batched_as_rows(getattr(gated_scan_kernels, name))(*arrays)
