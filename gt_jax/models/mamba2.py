"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): the mixer and the block of a pure Mamba-2 model.

A short causal convolution, then one matrix state per head that decays by a data-dependent scalar.
Parameters carry the names of the mamba_ssm package; dense kernels are [in, out].
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from gt_jax.kernels import context_parallel, ssd, ssd_step
from gt_jax.kernels.elementwise import causal_conv, gated_norm
from gt_jax.models import starts, stream
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import (
    FeedForward,
    branch_output_init,
    dense,
    fan_in_uniform,
    kernel_init,
    project,
    recurrence,
    rounded,
)
from gt_jax.models.mamba2_layers import CausalConv, GatedNorm

CONV_WIDTH = 4


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
            state: MambaState before the first token; None is that of a document's beginning: zeros,
                or with model.learned_states init_states [H, P, N]. With T = 1 this is a step.
            segment_ids: [B, T] int; a document begins with a token whose id differs from the token
                before. `state` belongs to the first segment.

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
        start = None
        if c.learned_states:
            start = self.param("init_states", initializers.zeros, (H, c.mamba_head_dim, N))
        if state is not None and T == 1:
            y, ssm = ssd_step(values[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state.ssm, **options)
            y = y[:, None]
        else:
            initial = None if state is None else state.ssm
            if state is None and start is not None:
                initial = starts.repeated(start, batch)
            options |= {"initial_state": initial, "segment_ids": segment_ids}
            y, ssm = recurrence(ssd, c, values, dt, A, B, C, **options)
            if start is not None and segment_ids is not None:
                log_w = jax.nn.softplus(dt + options["dt_bias"]) * A
                y, ssm = starts.add_to_ssd(y, ssm, start, log_w, C, segment_ids, c.impl)
                y = y.astype(values.dtype)
        y = y.reshape(batch, T, E)
        official_out = fan_in_uniform(c.layers**-0.5)
        out_proj = dense(c, c.dim, "out_proj", branch_output_init(c, official_out))
        if fused and c.remat != "none":
            weights = rounded(out_proj.kernel(E), y.dtype)
            y = norm.of_projection_projected(y, projected, weights)
        else:
            y = out_proj(norm.of_projection(y, projected) if fused else norm(y, z))
        return y, MambaState(ssm, tail)


def _projection_sizes(config: ModelConfig) -> causal_conv.Sizes:
    """The columns of what in_proj gives."""
    state = config.mamba_groups * config.state_size
    return causal_conv.Sizes(config.mamba_dim, state, config.mamba_heads)


def _takes_fused_kernels(config: ModelConfig, batch: int, T: int, tail: jax.Array | None) -> bool:
    """Whether Pallas kernels compute the convolution and the norm: where those of the recurrence
    run, from the start of sequences that one device holds."""
    if config.impl in ("chunked", "reference"):
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
        x, (n,) = stream.normed(c, "mixer_norm", x)
        y, state = Mamba2(c, name="mamba")(n, state, segment_ids=segment_ids)
        if not c.mamba_feed_forward:
            return x + y, state
        x, n = stream.add_and_norm(c, "ffn_norm", x, y)
        return x + FeedForward(c, name="ffn")(n), state


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
