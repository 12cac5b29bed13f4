"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): the mixer and the block of a pure Mamba-2 model.

A short causal convolution, then one matrix state per head that decays by a data-dependent scalar.
Parameters carry the names of the mamba_ssm package; dense kernels are [in, out].
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from gt_jax.kernels import causal_conv, context_parallel, gated_norm, ssd, ssd_step
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import (
    FeedForward,
    branch_output_init,
    dense,
    fan_in_uniform,
    inputs_after,
    inputs_before,
    kernel_init,
    project,
    recurrence,
    rms_norm,
    segment_index,
    sums_over_tokens,
    symmetric_uniform,
)

CONV_WIDTH = 4
_FUSED = True  # whether the Pallas kernels of the convolution and the norm may run


class MambaState(NamedTuple):
    """What a mixer remembers: ssm [B, H, P, N] float32, last conv inputs [B, 3, 2D + 2 G N]."""

    ssm: jax.Array
    conv: jax.Array


class Mamba2(nn.Module):
    """The Mamba-2 mixer of inner width E = 2D: H heads of P channels in G groups.

    The heads of a group share B and C, and the last norm is over the channels of a group.

    z, xBC, dt = split(W_in x);   x, B, C = split(silu(conv(xBC)))
    y = ssd(x, softplus(dt + bias), -exp(A_log), B, C) + D x
    out = W_out (RMSNorm(y silu(z)))
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: MambaState | None = None, *, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, MambaState]:
        """Mixes over time.

        Args:
            x: [B, T, D] normalised input in the computation dtype.
            state: MambaState before the first token; None is zeros. With T = 1 this is a step.
            segment_ids: [B, T] int; the state is zero before a token whose id differs from the
                token before. `state` belongs to the first segment.

        Returns:
            y [B, T, D] in the computation dtype, and the MambaState after the last token.
        """
        c = self.config
        E, N, H, G = c.mamba_dim, c.state_size, c.mamba_heads, c.mamba_groups
        batch, T, _ = x.shape

        in_proj = dense(c, 2 * E + 2 * G * N + H, "in_proj", kernel_init(c, fan_in_uniform()))
        conv = CausalConv(CONV_WIDTH, name="conv1d")
        norm = GatedNorm(1e-5, G, name="norm")
        tail = None if state is None else state.conv
        fused = _takes_fused_kernels(c, batch, T, tail)
        if fused:
            sizes = _projection_sizes(c)
            kernel = in_proj.kernel(c.dim)
            kernel = jnp.pad(kernel, ((0, 0), (0, sizes.padded_width - kernel.shape[1])))
            projected = project(x.astype(c.dtype), kernel)
            parts, tail = conv.split_projection(sizes, projected, segment_ids)
            projected, values, B, C, dt = parts  # z stays in `projected`
        else:
            z, xBC, dt = jnp.split(in_proj(x), [E, 2 * E + 2 * G * N], axis=-1)
            xBC, tail = conv(xBC, tail, segment_ids)
            if T == 1:  # without the barrier, XLA convolves once for each of the three
                xBC = jax.lax.optimization_barrier(xBC)
            values, B, C = jnp.split(xBC, [E, E + G * N], axis=-1)
        values = values.reshape(batch, T, H, c.mamba_head_dim)
        B, C = (y.reshape(batch, T, G, N) for y in (B, C))
        dt = dt.astype(jnp.float32)

        A = -jnp.exp(self.param("A_log", log_decay_rate_init, (H,)))
        options = {
            "D": self.param("D", initializers.ones, (H,)),
            "dt_bias": self.param("dt_bias", step_bias_init, (H,)),
            "dt_softplus": True,
        }
        if state is not None and T == 1:
            y, ssm = ssd_step(values[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state.ssm, **options)
            y = y[:, None]
        else:
            initial = None if state is None else state.ssm
            options |= {"initial_state": initial, "segment_ids": segment_ids}
            y, ssm = recurrence(ssd, c, values, dt, A, B, C, **options)
        y = y.reshape(batch, T, E)
        y = norm.of_projection(y, projected) if fused else norm(y, z)
        official_out = fan_in_uniform(c.layers**-0.5)
        y = dense(c, c.dim, "out_proj", branch_output_init(c, official_out))(y)
        return y, MambaState(ssm, tail)


def _projection_sizes(config: ModelConfig) -> causal_conv.Sizes:
    """The columns of what in_proj gives."""
    state = config.mamba_groups * config.state_size
    return causal_conv.Sizes(config.mamba_dim, state, config.mamba_heads)


def _takes_fused_kernels(config: ModelConfig, batch: int, T: int, tail: jax.Array | None) -> bool:
    """Whether Pallas kernels compute the convolution and the norm: where those of the recurrence
    run, from the start of sequences that one device holds."""
    if not _FUSED or config.impl in ("chunked", "reference"):
        return False
    if config.mamba_groups > 1 or tail is not None:
        return False
    if context_parallel.current_axis() is not None:
        return False
    sizes = _projection_sizes(config)
    return not (
        causal_conv.unsupported(sizes, (batch, T), config.dtype)
        or gated_norm.unsupported(sizes.inner, batch * T, config.dtype)
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


class Block(nn.Module):
    """x += Mamba2(RMSNorm x), the whole block of the official language model.

    model.mamba_feed_forward puts x += FeedForward(RMSNorm x) behind it.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: MambaState | None,
        segment_ids: jax.Array | None,
        rwkv_drop: float | jax.Array | None,
    ) -> tuple[jax.Array, MambaState]:
        del rwkv_drop  # only hybrids use it
        c = self.config
        y, state = Mamba2(c, name="mamba")(
            rms_norm(c, "mixer_norm")(x), state, segment_ids=segment_ids
        )
        x = x + y
        if c.mamba_feed_forward:
            x = x + FeedForward(c, name="ffn")(rms_norm(c, "ffn_norm")(x))
        return x, state


def log_decay_rate_init(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """log A for A from U(1, 16)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def step_bias_init(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """The bias whose softplus is a step size, log-uniform in [0.001, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))  # softplus inverse
