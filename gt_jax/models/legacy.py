"""The RWKV branch of the GroundThink reference repository, kept to reproduce and compare with it.

It is a whole block with static decays rather than an RWKV-6 time-mix, so its output contains its
input; four recurrences went by the same name:

    a    WKV6 with constant decay and bonus; the receptance acts inside and, as sigmoid, outside
    b1   s_t = w s_{t-1} + exp(k_t) v_t, read as s_t; a document's first token adds exp(u) v
    b2   as b1 over the same sum without v, exp(k) up to exp(30): a decayed mean of the values
    c    b2 with k in [-10, 10], and the mixer alone: no norm, feed-forward or residual
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.kernels import wkv6, wkv6_step
from gt_jax.kernels.segments import resets
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import (
    FeedForward,
    dense,
    kernel_init,
    layer_norm,
    output_init,
    recurrence,
    rms_norm,
)


class VectorState(NamedTuple):
    """State of variants b1, b2 and c, float32, [B, D] but for `started`.

    numerator and denominator are the two decayed sums (b1 leaves the denominator at zero). started
    [B] is zero before the first token of a document, which is special, and one after it.
    """

    numerator: jax.Array
    denominator: jax.Array
    started: jax.Array


class LegacyBranch(nn.Module):
    """n' = n + W_o (sigmoid(r) wkv(k, v)); out = n' + F_v relu(F_k LN n')^2, reading y = LN n.

    Variant c is W_o (sigmoid(r) wkv(k, v)) of n itself.

    The CUDA kernel of the reference (a) took r, k, v, w and u rounded to bfloat16, whatever dtype
    the rest used. Here r, k and v have the model's computation dtype, and w and u stay float32.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: jax.Array | VectorState | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | VectorState]:
        """x [B, T, D], state or None -> y [B, T, D] and the state; see rwkv6.TimeMix.

        The state is the WKV6 state [B, H, K, K] for variant a, else a VectorState.
        """
        c = self.config
        plain = c.legacy_wkv == "c"
        xavier = initializers.variance_scaling(0.25, "fan_avg", "uniform")  # gain 0.5
        matrix = xavier if plain else initializers.orthogonal(1.0)

        y = x if plain else layer_norm(c, "mixer_norm")(x)
        k, v, r = (
            dense(c, c.dim, name, kernel_init(c, matrix))(y)
            for name in ("key", "value", "receptance")
        )
        decay = self.param("time_decay", initializers.constant(-5.0), (c.heads, c.head_dim))
        bonus = self.param("time_first", initializers.zeros, (c.heads, c.head_dim))
        recur: Callable = matrix_wkv if c.legacy_wkv == "a" else vector_wkv
        y, after = recur(c, r, k, v, -jnp.exp(decay), bonus, state, segment_ids)
        y = (jax.nn.sigmoid(r.astype(jnp.float32)) * y).astype(c.dtype)
        y = dense(c, c.dim, "output", output_init(c, matrix))(y)
        if plain:
            return y, after

        x = x + y
        hidden = dense(c, 4 * c.dim, "ffn_key", kernel_init(c, matrix))(
            layer_norm(c, "ffn_norm")(x)
        )
        hidden = jnp.square(jax.nn.relu(hidden))
        return x + dense(c, c.dim, "ffn_value", output_init(c, matrix))(hidden), after


def matrix_wkv(
    config: ModelConfig,
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_w: jax.Array,
    u: jax.Array,
    state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Variant a: r, k, v [B, T, D], log_w, u [H, K], state [B, H, K, K] -> y [B, T, D], state."""
    B, T, D = r.shape
    r, k, v = (z.reshape(B, T, *u.shape) for z in (r, k, v))
    log_w = jnp.broadcast_to(log_w, r.shape)
    if state is not None and T == 1:
        y, after = wkv6_step(r[:, 0], k[:, 0], v[:, 0], log_w[:, 0], u, state)
    else:
        y, after = recurrence(
            wkv6, config, r, k, v, log_w, u, initial_state=state, segment_ids=segment_ids
        )
    return y.reshape(B, T, D), after


def vector_wkv(
    config: ModelConfig,
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_w: jax.Array,
    u: jax.Array,
    state: VectorState | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, VectorState]:
    """Variants b1, b2 and c: arguments as matrix_wkv, state VectorState -> y [B, T, D], state."""
    del r  # the receptance acts outside the recurrence alone
    B, T, D = k.shape
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    k = jnp.clip(k, *{"b1": (None, None), "b2": (None, 30), "c": (-10, 10)}[config.legacy_wkv])
    if state is None:
        zeros = jnp.zeros((B, D))
        state = VectorState(zeros, zeros, jnp.zeros(B))
    starts = resets(segment_ids, (B, T))
    first = starts.at[:, 0].set(state.started == 0)[..., None]  # [B, T, 1]
    decay = jnp.where(starts[..., None], 0, jnp.exp(log_w).reshape(D))
    bonus = jnp.exp(u).reshape(D)

    weight = jnp.exp(k)
    numerator = decayed_sum(decay, weight * v, state.numerator)
    if config.legacy_wkv == "b1":
        denominator = jnp.zeros_like(numerator)
        y = numerator + jnp.where(first, bonus * v, 0)
    else:
        denominator = decayed_sum(decay, weight, state.denominator)
        scale = jnp.where(first, bonus, 1)  # cancels, but for the 1e-6
        y = scale * numerator / (scale * denominator + 1e-6)
    return y, VectorState(numerator[:, -1], denominator[:, -1], jnp.ones(B))


def decayed_sum(decay: jax.Array, x: jax.Array, state: jax.Array) -> jax.Array:
    """s_t = decay_t s_{t-1} + x_t over axis 1; decay and x [B, T, D], state [B, D] -> [B, T, D]."""
    x = x.at[:, 0].add(decay[:, 0] * state)

    def combine(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(combine, (decay, x), axis=1)[1]


class Block(nn.Module):
    """x += LegacyBranch(RMSNorm x); x += FeedForward(RMSNorm x), the reference's "pure RWKV-6"."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: jax.Array | VectorState | None,
        segment_ids: jax.Array | None,
        rwkv_drop: float | jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | VectorState]:
        del rwkv_drop  # only hybrids use it
        c = self.config
        mixed, state = LegacyBranch(c, name="rwkv")(
            rms_norm(c, "mixer_norm")(x), state, segment_ids=segment_ids
        )
        x = x + mixed
        if c.feed_forward:
            x = x + FeedForward(c, name="ffn")(rms_norm(c, "ffn_norm")(x))
        return x, state
