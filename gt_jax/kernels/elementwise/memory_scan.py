"""A gated memory of an input, as ParallelScan keeps it, its gates included, by Pallas kernels.

    s_t = a_t s_{t-1} + (1 - a_t) i_t c_t,   a = sigmoid(forget + bias),   i = sigmoid(read)

As gated_scan.py, for [forget | read] that a product has written. With bfloat16 that is 8 bytes a
number forward (both scores, c; s) and 16 backward (both scores, c, s, ds; three gradients).
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import gated_scan


def fits(impl: str, scores: jax.Array, c: jax.Array, state: jax.Array) -> bool:
    """Whether `scan` takes a call; as gated_scan.fits.

    Args:
        impl: as of the recurrences.
        scores: [B, T, 2 C].
        c: [B, T, C].
        state: [B, C].
    """
    return c.dtype in (jnp.bfloat16, jnp.float32) and gated_scan.fits(impl, scores, state)


@jax.custom_vjp
def scan(
    scores: jax.Array, c: jax.Array, bias: jax.Array, state: jax.Array, resets: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """s of all tokens, and that of the last one in float32.

    Args:
        scores: [B, T, 2 C] bfloat16 or float32, [forget | read]; see `fits`.
        c: [B, T, C] bfloat16 or float32.
        bias: [C] float32.
        state: [B, C] float32, s before the first token.
        resets: [B, T] int32, 1 where s is zero before the token; None for nowhere.

    Returns:
        [B, T, C] in the dtype of scores, and [B, C] float32.
    """
    return _forward(scores, c, bias, state, resets)[0]


def _forward(scores, c, bias, state, resets):
    from gt_jax.kernels.pallas.launch import keep

    s, last = keep(_call("forward", resets, scores, c, bias[None], state))
    return (s, last), (scores, c, bias, s, state, resets)


def _backward(residuals, cotangents):
    scores, c, bias, s, state, resets = residuals
    arrays = scores, c, bias[None], s, state
    d_scores, dc, d_bias, d_state = _call("backward", resets, *arrays, *cotangents)
    return d_scores, dc, jnp.sum(d_bias, axis=(0, 1)), d_state, None


scan.defvjp(_forward, _backward)


def _call(name, *arrays):
    """A function of memory_scan_kernels.py."""
    from gt_jax.kernels.elementwise import memory_scan_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    return batched_as_rows(getattr(memory_scan_kernels, name))(*arrays)
