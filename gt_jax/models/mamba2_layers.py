"""The short convolution and the gated norm of a Mamba-2 mixer.

Their Pallas kernels are causal_conv and gated_norm of gt_jax.kernels.elementwise; here are the
parameters, and the plain forms with gradients that read each tensor few times.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.kernels.elementwise import causal_conv, gated_norm
from gt_jax.models.layers import (
    inputs_after,
    inputs_before,
    segment_index,
    sums_over_tokens,
    symmetric_uniform,
)


class CausalConv(nn.Module):
    """SiLU of a depthwise convolution over time that sees a token and the width - 1 before it."""

    width: int

    @nn.compact
    def weights(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """[channels, width] and the bias [channels]."""
        bound = symmetric_uniform(self.width**-0.5)  # PyTorch's default for Conv1d
        weight = self.param("weight", bound, (channels, self.width))
        return weight, self.param("bias", bound, (channels,))

    def __call__(
        self, x: jax.Array, tail: jax.Array | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves in float32.

        Args:
            x: [B, T, channels].
            tail: [B, width - 1, channels] inputs before x, of its first segment; zeros if None.
            segment_ids: [B, T] int or None; taps never cross a segment's start.

        Returns:
            [B, T, channels] and the new tail, in x.dtype.
        """
        batch, T, channels = x.shape
        taps = self.width - 1
        weight, bias = self.weights(channels)
        index = segment_index(segment_ids, (batch, T))
        same_as_last = (index[:, -taps:] == index[:, -1:])[..., None]
        tail = inputs_before(jnp.where(same_as_last, x[:, -taps:], 0), tail, segment_ids)
        if tail is None:
            tail = jnp.zeros((batch, taps, channels), x.dtype)
        window = jnp.concatenate([tail.astype(x.dtype), x], axis=1)  # [B, taps + T, channels]
        new_tail, same = window[:, T:], None
        if segment_ids is not None:
            window_index = jnp.pad(index, ((0, 0), (taps, 0)))
            seen = [window_index[:, i : i + T] == index for i in range(self.width)]
            same = jnp.stack(seen, axis=1)[..., None]  # [B, width, T, 1]
            of_last = window_index[:, T:] == index[:, -1:]
            new_tail = jnp.where(of_last[..., None], new_tail, 0)

        return _silu_of_conv(window, weight.T, bias, same), inputs_after(new_tail)

    def split_projection(
        self, sizes: causal_conv.Sizes, projected: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """What `causal_conv.split_and_convolve` gives of [B, T, width], and the new tail."""
        batch, T, _ = projected.shape
        index = segment_index(segment_ids, (batch, T))
        seen = None if segment_ids is None else causal_conv.tokens_seen(index)
        weight, bias = (z.astype(jnp.float32) for z in self.weights(sizes.channels))
        parts: Any = causal_conv.split_and_convolve(sizes, projected, weight, bias, seen)
        of_last = (index[:, 1 - self.width :] == index[:, -1:])[..., None]
        tail = projected[:, 1 - self.width :, sizes.inner : sizes.inner + sizes.channels]
        return parts, jnp.where(of_last, tail, 0)


@jax.custom_vjp
def _silu_of_conv(window, weight, bias, same):
    """silu(bias + sum over i of weight_i window_{t+i}, where same_{i,t} if given) in window.dtype.

    window [B, width - 1 + T, channels], weight [width, channels], bias [channels],
    same [B, width, T, 1] bool.
    """
    return jax.nn.silu(_conv(window, weight, bias, same)).astype(window.dtype)


def _conv(window, weight, bias, same):
    return bias + sum(
        x.astype(jnp.float32) * w for x, w in zip(_tokens_by_tap(window, same, len(weight)), weight)
    )


def _tokens_by_tap(window, same, width):
    """What each tap sees: `width` arrays [B, T, channels]."""
    T = window.shape[1] - width + 1
    seen = [window[:, i : i + T] for i in range(width)]
    return seen if same is None else [jnp.where(same[:, i], x, 0) for i, x in enumerate(seen)]


def _silu_of_conv_forward(window, weight, bias, same):
    return _silu_of_conv(window, weight, bias, same), (window, weight, bias, same)


def _silu_of_conv_backward(residuals, g):
    # The first barrier makes XLA compute the convolution again instead of keeping it in float32;
    # the second makes it store g in the dtype of the inputs, since g is read several times.
    *arrays, same = residuals
    (window, weight, bias), g = jax.lax.optimization_barrier((tuple(arrays), g))
    width = len(weight)
    y, slope = jax.vjp(jax.nn.silu, _conv(window, weight, bias, same))
    (g,) = slope(g.astype(y.dtype))
    g = jax.lax.optimization_barrier(g.astype(window.dtype))
    T = g.shape[1]
    d_window, terms, last_terms = jnp.zeros((), jnp.float32), [], []
    for i in range(width):
        # Shifts g, not the window: slices of the window would be kept from the forward pass.
        shifted = g if same is None else jnp.where(same[:, i], g, 0)
        shifted = jnp.pad(shifted, ((0, 0), (i, width - 1 - i), (0, 0)))  # as window
        shifted = shifted.astype(jnp.float32)
        d_window += shifted * weight[i]
        # The last taps are summed apart: T alone splits into rounder groups of tokens.
        terms.append((shifted * window)[:, :T])
        last_terms.append((shifted * window)[:, T:])
    *d_weight, d_bias = sums_over_tokens(*terms, g.astype(jnp.float32))
    d_weight = jnp.stack(d_weight) + jnp.sum(jnp.stack(last_terms), axis=(1, 2))
    return d_window.astype(window.dtype), d_weight, d_bias, None


_silu_of_conv.defvjp(_silu_of_conv_forward, _silu_of_conv_backward)


class GatedNorm(nn.Module):
    """RMSNorm of y silu(z) with a scale, [B, T, E] -> [B, T, E] in the dtype of y.

    The mean of squares is over each of `groups` sections of the channels, as in mamba_ssm.
    """

    epsilon: float
    groups: int = 1

    @nn.compact
    def scale(self, width: int) -> jax.Array:
        return self.param("scale", initializers.ones, (width,))

    def of_projection(self, y: jax.Array, projected: jax.Array) -> jax.Array:
        """The norm with z in the first columns of what `split_projection` hands on."""
        scale = self.scale(y.shape[-1]).astype(jnp.float32)
        return gated_norm.gated_norm(self.epsilon, y, projected, scale)

    def of_projection_projected(
        self, y: jax.Array, projected: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """`of_projection` @ weights; the backward pass does not keep what is multiplied."""
        scale = self.scale(y.shape[-1]).astype(jnp.float32)
        return gated_norm.gated_norm_projected(self.epsilon, y, projected, scale, weights)

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        scale = self.scale(y.shape[-1])
        if self.groups == 1:
            return _gated_norm(y, z, scale, self.epsilon)
        sections = zip(*(jnp.split(x, self.groups, axis=-1) for x in (y, z, scale)))
        normed: list[Any] = [_gated_norm(y, z, scale, self.epsilon) for y, z, scale in sections]
        return jnp.concatenate(normed, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated_norm(y, z, scale, epsilon):
    return _gated_norm_forward(y, z, scale, epsilon)[0]


def _gated_norm_forward(y, z, scale, epsilon):
    x = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (x * (inverse * scale)).astype(y.dtype), (y, z, scale, inverse)


def _gated_norm_backward(epsilon, residuals, g):
    *arrays, scale, inverse = residuals
    (y, z), g = jax.lax.optimization_barrier((tuple(arrays), g))  # as in _silu_of_conv_backward
    y_, z_ = y.astype(jnp.float32), z.astype(jnp.float32)
    share = jax.nn.sigmoid(z_)
    x, g = y_ * z_ * share, g.astype(jnp.float32) * inverse
    (d_scale,) = sums_over_tokens(g * x)
    along = jnp.mean(g * x * scale, axis=-1, keepdims=True)
    dx = g * scale - x * (jnp.square(inverse) * along)
    dy = dx * z_ * share
    dz = dx * y_ * share * (1 + z_ * (1 - share))
    return dy.astype(y.dtype), dz.astype(z.dtype), d_scale


_gated_norm.defvjp(_gated_norm_forward, _gated_norm_backward)
