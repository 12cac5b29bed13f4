"""A norm over the channels of each head, gated by silu, by Pallas kernels on NVIDIA GPUs.

Each direction reads its inputs once and writes its outputs once.
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.pallas.devices import portable_unsupported

BY_ROWS = True  # by head_norm_row_kernels.py; else by head_norm_kernels.py
TOKENS, CHANNELS, MOST_CHANNELS = 32, 32, 128  # of a tile; of a head: multiples, and the most


def fits(impl: str, y: jax.Array, g: jax.Array) -> bool:
    """Whether `gated` takes a call: impl allows kernels, the GPU and the sizes suit them.

    Args:
        impl: as of the recurrences; "chunked" and "reference" take no kernels.
        y: [B, T, H, V].
        g: [B, T, H V].
    """
    B, T, _, V = y.shape
    return (
        impl in ("auto", "mosaic", "portable")
        and y.dtype == g.dtype == jnp.bfloat16
        and T > 1
        and (B * T) % TOKENS == 0
        and V % CHANNELS == 0
        and V <= MOST_CHANNELS
        and portable_unsupported() is None
    )


def gated(
    y: jax.Array, g: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """(norm(y) scale + bias) silu(g): mean 0 and variance 1 in each head; float32 inside.

    Args:
        y: [B, T, H, V] bfloat16; see `fits`.
        g: [B, T, H V] bfloat16 gate.
        scale, bias: [H V] float32.
        epsilon: added to the variance.

    Returns:
        [B, T, H V] bfloat16.
    """
    B, T, H, V = y.shape
    if BY_ROWS:
        return _gated_by_rows(epsilon, y, g, scale, bias)
    out = _gated(epsilon, y.reshape(B * T, H, V), g.reshape(B * T, H * V), scale, bias)
    return out.reshape(g.shape)


def _value(epsilon, y, g, scale, bias) -> jax.Array:
    return _forward(epsilon, y, g, scale, bias)[0]


def _forward(epsilon, y, g, scale, bias):
    from gt_jax.kernels.elementwise import head_norm_kernels as kernels

    (out,) = kernels.gated(y, g, scale, bias, epsilon=epsilon, tuning=kernels.TUNING)
    return out, (y, g, scale, bias)


def _backward(epsilon, residuals, dout):
    from gt_jax.kernels.elementwise import head_norm_kernels as kernels

    y, g, scale, bias = residuals
    dy, dg, dscale, dbias = kernels.gradients(
        y, g, scale, bias, dout, epsilon=epsilon, tuning=kernels.TUNING
    )
    return dy.reshape(y.shape), dg, jnp.sum(dscale, axis=0), jnp.sum(dbias, axis=0)


_gated = jax.custom_vjp(_value, nondiff_argnums=(0,))
_gated.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_by_rows(epsilon, y, g, scale, bias):
    return _call("gated", epsilon, y, g, scale, bias)[0]


def _call(name, epsilon, *arrays):
    """A kernel of head_norm_row_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import head_norm_row_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    kernel = functools.partial(getattr(head_norm_row_kernels, name), epsilon=epsilon)
    return [z[0] for z in batched_as_rows(kernel)(*(z[None] for z in arrays))]


def _backward_by_rows(epsilon, residuals, dout):
    dy, dg, dscale, dbias = _call("gradients", epsilon, *residuals, dout)
    return dy, dg, jnp.sum(dscale, axis=0), jnp.sum(dbias, axis=0)


_gated_by_rows.defvjp(
    lambda epsilon, *arrays: (_gated_by_rows(epsilon, *arrays), arrays), _backward_by_rows
)
