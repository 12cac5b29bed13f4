"""Attention baselines: the block of GPT-2 (LayerNorm) and of the RMSNorm variant called GPT-1 here.

    x += Attention(norm x);  x += FeedForward(norm x)         no biases but the LayerNorms'

The state is a key-value cache with room for `max_positions` tokens of the present document.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.kernels.segments import resets
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import (
    FeedForward,
    dense,
    kernel_init,
    layer_norm,
    normal,
    output_init,
    rms_norm,
    segment_index,
)


class Cache(NamedTuple):
    """Keys and values [B, max_positions, H, K] by position; the first `length` [B] are filled."""

    key: jax.Array
    value: jax.Array
    length: jax.Array


def positions(
    shape: tuple[int, int], state: Cache | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Position of each token in its document.

    Args:
        shape: (B, T).
        state: Cache before the first token, or None.
        segment_ids: [B, T] int or None.

    Returns:
        [B, T] int32. At or beyond max_positions the model has no answer: its logits are NaN.
    """
    B, T = shape
    length = jnp.zeros((B,), jnp.int32) if state is None else state.length
    steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), shape)
    if segment_ids is None:
        return length[:, None] + steps
    start = jnp.where(resets(segment_ids, shape), steps, -length[:, None])
    return steps - jax.lax.cummax(start, axis=1)


class Attention(nn.Module):
    """Causal multi-head attention over the document so far, scaled by 1/sqrt(K)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: Cache | None = None, *, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, D], Cache or None (empty) -> y [B, T, D] and the Cache after the last token."""
        c = self.config
        B, T, D = x.shape
        qkv = dense(c, 3 * D, "qkv", kernel_init(c, normal))(x)
        q, k, v = jnp.moveaxis(qkv.reshape(B, T, 3, c.heads, c.head_dim), 2, 0)
        index = segment_index(segment_ids, (B, T))

        mask = jnp.tril(jnp.ones((1, T, T), bool))
        if segment_ids is not None:
            mask = mask & (index[:, :, None] == index[:, None, :])
        keys, values = k, v
        if state is not None:
            keys = jnp.concatenate([state.key, k], axis=1)  # [B, max_positions + T, H, K]
            values = jnp.concatenate([state.value, v], axis=1)
            slots = jnp.arange(c.max_positions)
            cached = (slots < state.length[:, None, None]) & (index == 0)[..., None]
            mask = jnp.concatenate([cached, jnp.broadcast_to(mask, (B, T, T))], axis=-1)
        y = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None]).reshape(B, T, D)

        output = initializers.normal(0.02 * (2 * c.layers) ** -0.5)  # two sums into x per layer
        y = dense(c, D, "output", output_init(c, output))(y)
        place = positions((B, T), state, segment_ids)
        return y, self._remember(state, k, v, place, index)

    def _remember(self, state, k, v, place, index):
        """The cache with the tokens of the last segment written at their positions."""
        c = self.config
        B, _, H, K = k.shape
        if state is None:
            keys = values = jnp.zeros((B, c.max_positions, H, K), k.dtype)
        else:
            keys, values = state.key, state.value
        rows = jnp.arange(B)[:, None]
        slots = jnp.where(index == index[:, -1:], place, c.max_positions)
        return Cache(
            keys.at[rows, slots].set(k, mode="drop"),
            values.at[rows, slots].set(v, mode="drop"),
            place[:, -1] + 1,
        )


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: Cache | None,
        segment_ids: jax.Array | None,
        rwkv_drop: float | jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        del rwkv_drop  # only hybrids use it
        c = self.config
        norm = layer_norm if c.architecture == "gpt2" else rms_norm
        mixed, state = Attention(c, name="attention")(
            norm(c, "mixer_norm")(x), state, segment_ids=segment_ids
        )
        x = x + mixed
        if not c.feed_forward:
            return x, state
        down = initializers.normal(0.02 * (2 * c.layers) ** -0.5)
        return x + FeedForward(c, down, name="ffn")(norm(c, "ffn_norm")(x)), state
