"""Mamba-2's gated norm, RMSNorm(y silu(z)) * scale, that reads z where the projection wrote it.

The gradient of z goes into an array as wide as the projection, of which all other columns stay
unwritten: causal_conv.py fills them in.
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.projected import projected
from gt_jax.kernels.pallas.devices import portable_unsupported


def unsupported(width: int, tokens: int, dtype: str) -> str | None:
    """Why the fused kernels do not take a call, or None.

    Args:
        width: channels of y.
        tokens: their number.
        dtype: of y and z.
    """
    if reason := portable_unsupported():
        return reason
    if dtype != "bfloat16":
        return f"the fused norm is for bfloat16; this is {dtype}"
    from gt_jax.kernels.elementwise import gated_norm_kernels

    return gated_norm_kernels.unsupported(width, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_norm(epsilon: float, y: jax.Array, projected: jax.Array, scale: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale of x = y silu(z), in float32.

    Args:
        epsilon: added to the mean of squares over the channels.
        y: [B, T, E] bfloat16.
        projected: [B, T, more than E] bfloat16, of which the first E columns are z; the first
            result of `split_and_convolve`, which alone knows what to do with its gradient.
        scale: [E] float32.

    Returns:
        [B, T, E] bfloat16.
    """
    (out,) = _call("forward", epsilon, y, projected, scale)
    return out


def gated_norm_projected(
    epsilon: float, y: jax.Array, projection: jax.Array, scale: jax.Array, weights: jax.Array
) -> jax.Array:
    """gated_norm @ weights; the backward pass computes the norm again, beside its gradient.

    Args:
        epsilon, y, projection, scale: as of `gated_norm`; `projection` is its `projected`.
        weights: [E, D] bfloat16.

    Returns:
        [B, T, D] bfloat16.
    """

    def backward(y, projection, scale, d_out):
        arrays = y, projection, scale, d_out
        *gradients, d_scale, out = _call("backward", epsilon, *arrays, again=True)
        return [out, *gradients, jnp.sum(d_scale, axis=0)]

    product = projected(lambda *z: _call("forward", epsilon, *z)[0], backward)
    return product(weights, y, projection, scale)


def _call(name, epsilon, *arrays, **options):
    """A kernel of gated_norm_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import gated_norm_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    kernel = functools.partial(getattr(gated_norm_kernels, name), epsilon=epsilon, **options)
    return [z[0] for z in batched_as_rows(kernel)(*(z[None] for z in arrays))]


def _forward(epsilon, y, projected, scale):
    return gated_norm(epsilon, y, projected, scale), (y, projected, scale)


def _backward(epsilon, residuals, d_out):
    dy, d_projected, d_scale = _call("backward", epsilon, *residuals, d_out)
    return dy, d_projected, jnp.sum(d_scale, axis=0)


gated_norm.defvjp(_forward, _backward)
