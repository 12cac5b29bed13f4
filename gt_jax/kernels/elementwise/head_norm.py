"""A norm over the channels of each head, gated by silu, by Pallas kernels on NVIDIA GPUs.

Each direction reads its inputs once and writes its outputs once.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.projected import projected
from gt_jax.kernels.pallas.devices import portable_unsupported

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


def gated_projected(
    y: jax.Array,
    g: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    weights: jax.Array,
) -> jax.Array:
    """`gated` @ weights; the backward pass computes the norm again, beside its gradient.

    Args:
        y, g, scale, bias, epsilon: as of `gated`.
        weights: [H V, D] bfloat16.

    Returns:
        [B, T, D] bfloat16.
    """
    B, T, H, V = y.shape
    product = projected(
        lambda *arrays: _value(epsilon, *arrays),
        lambda *arrays: _again(epsilon, arrays[:-1], arrays[-1]),
    )
    out = product(weights, y.reshape(B * T, H, V), g.reshape(B * T, H * V), scale, bias)
    return out.reshape(B, T, -1)


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
    out = _gated(epsilon, y.reshape(B * T, H, V), g.reshape(B * T, H * V), scale, bias)
    return out.reshape(g.shape)


def _value(epsilon, y, g, scale, bias) -> jax.Array:
    return _forward(epsilon, y, g, scale, bias)[0]


def _forward(epsilon, y, g, scale, bias):
    from gt_jax.kernels.elementwise import head_norm_kernels as kernels

    (out,) = kernels.gated(y, g, scale, bias, epsilon=epsilon, tuning=kernels.TUNING)
    return out, (y, g, scale, bias)


def _backward(epsilon, residuals, dout):
    return tuple(_gradients(epsilon, residuals, dout, again=False))


def _again(epsilon, residuals, dout):
    """The norm, and its gradients."""
    *gradients, out = _gradients(epsilon, residuals, dout, again=True)
    return [out, *gradients]


def _gradients(epsilon, residuals, dout, again):
    from gt_jax.kernels.elementwise import head_norm_kernels as kernels

    y, g, scale, bias = residuals
    options = {"epsilon": epsilon, "tuning": kernels.TUNING, "again": again}
    dy, dg, dscale, dbias, *out = kernels.gradients(y, g, scale, bias, dout, **options)
    return [dy.reshape(y.shape), dg, jnp.sum(dscale, axis=0), jnp.sum(dbias, axis=0), *out]


_gated = jax.custom_vjp(_value, nondiff_argnums=(0,))
_gated.defvjp(_forward, _backward)
