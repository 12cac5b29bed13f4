"""RWKV-6 "Finch" (x060; Peng et al. 2024, arXiv:2404.05892): time-mix, channel-mix and block.

Every projection of the time-mix reads its own blend of the token and the one before, chosen per
channel by a small network; the decay of the recurrence is chosen the same way. Parameters carry the
official names; dense kernels are [in, out].
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.nn import initializers

from gt_jax.kernels import wkv6, wkv6_step
from gt_jax.kernels.elementwise import head_norm, token_shift
from gt_jax.kernels.segments import resets
from gt_jax.models import starts
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import (
    apply_each,
    branch_output_init,
    dense,
    inputs_after,
    inputs_before,
    is_launch_bound,
    kernel_init,
    layer_norm,
    output_init,
    per_row,
    previous_token,
    project,
    recurrence,
    rounded,
    symmetric_uniform,
)

orthogonal = initializers.orthogonal

_HEAD_EPSILON = 64e-5  # of the norm of each head


class TimeMixState(NamedTuple):
    """What a time-mix remembers: wkv [B, H, K, V] float32 and its last input [B, D]."""

    wkv: jax.Array
    last: jax.Array


class TimeMix(nn.Module):
    """The RWKV-6 mixer.

    With x' = x_{t-1}, five inputs x_j = x + (x' - x) (mu_j + delta_j) for j in w k v r g, where
    delta = tanh((x + (x' - x) mu_x) A1) A2:

        r, k, v = W_r x_r, W_k x_k, W_v x_v;   log w = -exp(lambda + tanh(x_w B1) B2)
        y = W_o (GroupNorm(wkv6(r, k, v, log w, u)) silu(W_g x_g))
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: TimeMixState | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, TimeMixState]:
        """Mixes over time.

        Args:
            x: [B, T, D] normalised input in the computation dtype.
            state: TimeMixState before the first token; None is that of a document's beginning:
                zeros, or with model.learned_states time_state [H, K, V]. With T = 1 this is a step.
            segment_ids: [B, T] int; a document begins with a token whose id differs from the token
                before. `state` belongs to the first segment.

        Returns:
            y [B, T, D] in the computation dtype, and the TimeMixState after the last token.
        """
        c = self.config
        B, T, D = x.shape
        H, K = c.heads, c.head_dim
        x_w, *inputs = self._shifted_inputs(x, state, segment_ids)

        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1}
        layers = [dense(c, D, name, kernel_init(c, orthogonal(g))) for name, g in gains.items()]
        r, k, v, g = apply_each(layers, inputs)
        log_w = self._log_decay(x_w)  # float32
        u = self.param("time_faaaa", bonus_init(self.layer, c.layers), (H, K))

        start = None
        if c.learned_states:
            start = self.param("time_state", initializers.zeros, (H, K, K))

        r, k, v, log_w = (z.reshape(B, T, H, K) for z in (r, k, v, log_w))
        bonus = None
        if c.rwkv_carry and segment_ids is not None:
            # A document's last token leaves a share of its state: of what it decays and what it
            # adds. The bonus reads the same k, unshared, and is added by itself.
            scores = jnp.sum((r * u * k).astype(jnp.float32), axis=-1, keepdims=True)
            bonus = scores * v  # [B, T, H, V]
            ends = jnp.pad(resets(segment_ids)[:, 1:], ((0, 0), (0, 1)))[..., None, None]
            log_w = jnp.where(ends, log_w + math.log(c.rwkv_carry), log_w)
            k = jnp.where(ends, c.rwkv_carry * k, k)
            u, segment_ids = jnp.zeros_like(u), None
        if state is not None and T == 1:
            y, wkv = wkv6_step(r[:, 0], k[:, 0], v[:, 0], log_w[:, 0], u, state.wkv)
            y = y[:, None]
        else:
            initial = None if state is None else state.wkv
            if state is None and start is not None:
                initial = starts.repeated(start, B)
            y, wkv = recurrence(
                wkv6, c, r, k, v, log_w, u, initial_state=initial, segment_ids=segment_ids
            )
            if start is not None and segment_ids is not None:
                y, wkv = starts.add_to_wkv6(y, wkv, start, r, log_w, segment_ids, c.impl)
        y = y if bonus is None else y + bonus
        norm = HeadNorm(c, self.layer, name="ln_x")
        output = dense(c, D, "output", branch_output_init(c, initializers.zeros))
        if c.remat != "none" and head_norm.fits(c.impl, y, g):
            y = norm.projected(y, g, rounded(output.kernel(D), y.dtype))
        else:
            y = output(norm(y, g))  # [B, T, D]
        return y, TimeMixState(wkv, inputs_after(x[:, -1]))

    def _shifted_inputs(self, x, state, segment_ids):
        """The inputs [B, T, D] of decay, receptance, key, value and gate."""
        D = x.shape[-1]
        shares = {
            name: self.param(
                f"time_maa_{name}", shift_init(self.layer, self.config.layers, name), (D,)
            )
            for name in "xwkvrg"
        }
        rank = self.config.mix_rank or mix_rank(D)
        w1 = self.param("time_maa_w1", initializers.zeros, (D, 5 * rank))
        w2 = self.param("time_maa_w2", symmetric_uniform(0.01), (5, rank, D))

        last = None if state is None else state.last
        delta = previous_token(x, last, segment_ids) - x
        hidden = jnp.tanh(project(x + delta * shares["x"].astype(x.dtype), w1))
        if token_shift.fits(self.config.impl, x, rank):
            last = inputs_before(x[:, -1], last, segment_ids)
            starts = None if segment_ids is None else resets(segment_ids)
            mu = jnp.stack([shares[name] for name in "wkvrg"])
            w, k, v, r, g = token_shift.blends(x, last, starts, mu, hidden, w2)
            return w, r, k, v, g
        if is_launch_bound(x):
            stacked = hidden.reshape(-1, 5, rank).swapaxes(0, 1)  # [5, B T, rank]
            products = (stacked @ w2.astype(x.dtype)).reshape(5, *x.shape)
        else:
            products = list(map(project, jnp.split(hidden, 5, axis=-1), w2))
        w, k, v, r, g = (
            x + delta * (shares[name].astype(x.dtype) + product)
            for name, product in zip("wkvrg", products)
        )
        return w, r, k, v, g

    def _log_decay(self, x_w):
        """-exp(omega) in float32: small decays and their gradients need the range."""
        D = x_w.shape[-1]
        base = self.param("time_decay", decay_init(self.layer, self.config.layers), (D,))
        rank = self.config.decay_rank or 2 * mix_rank(D)
        w1 = self.param("time_decay_w1", initializers.zeros, (D, rank))
        w2 = self.param("time_decay_w2", symmetric_uniform(0.01), (rank, D))
        change = project(jnp.tanh(project(x_w, w1)), w2)
        return -jnp.exp(base + change.astype(jnp.float32))


class HeadNorm(nn.Module):
    """GroupNorm with one group per head, gated: norm(y) silu(g), statistics in float32.

    y [B, T, H, V] and g [B, T, H V] -> [B, T, H V] in the computation dtype.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def parameters(self, width: int) -> tuple[jax.Array, jax.Array]:
        """scale [H V] and bias [H V]."""
        start = initializers.constant(((1 + self.layer) / self.config.layers) ** 0.7)
        scale = self.param("scale", start, (width,))
        return scale, self.param("bias", initializers.zeros, (width,))

    def projected(self, y: jax.Array, g: jax.Array, weights: jax.Array) -> jax.Array:
        """The norm @ weights [H V, D]; the backward pass does not keep what is multiplied."""
        scale, bias = self.parameters(g.shape[-1])
        return head_norm.gated_projected(y, g, scale, bias, _HEAD_EPSILON, weights)

    def __call__(self, y: jax.Array, g: jax.Array) -> jax.Array:
        B, T, H, V = y.shape
        scale, bias = self.parameters(H * V)
        if head_norm.fits(self.config.impl, y, g):
            return head_norm.gated(y, g, scale, bias, _HEAD_EPSILON)
        y = y.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = (y * jax.lax.rsqrt(variance + _HEAD_EPSILON)).reshape(B, T, H * V)
        y = y * per_row(scale, B)[:, None] + per_row(bias, B)[:, None]
        return (y * jax.nn.silu(g.astype(jnp.float32))).astype(self.config.dtype)


class ChannelMix(nn.Module):
    """The RWKV-6 feed-forward: sigmoid(W_r x_r) * W_v relu(W_k x_k)^2 on token-shifted inputs."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self, x: jax.Array, last: jax.Array | None = None, *, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D], last input [B, D] or None -> y [B, T, D] and the new last input [B, D]."""
        c = self.config
        D = c.dim
        share_k, share_r = (
            self.param(f"time_maa_{name}", shift_init(self.layer, c.layers, "channel"), (D,))
            for name in "kr"
        )
        delta = previous_token(x, last, segment_ids) - x
        x_k, x_r = (x + delta * share.astype(x.dtype) for share in (share_k, share_r))
        k = dense(c, hidden_dim(D), "key", kernel_init(c, orthogonal(1.0)))(x_k)
        r = dense(c, D, "receptance", kernel_init(c, initializers.zeros))(x_r)
        y = dense(c, D, "value", output_init(c, initializers.zeros))(jnp.square(jax.nn.relu(k)))
        return jax.nn.sigmoid(r.astype(jnp.float32)) * y, inputs_after(x[:, -1])


class BlockState(NamedTuple):
    """State of an RWKV-6 block: its TimeMixState, and the channel-mix's last input [B, D].

    Before the first token both are None; without a channel-mix, `ffn` stays None.
    """

    rwkv: TimeMixState | None
    ffn: jax.Array | None


class Block(nn.Module):
    """x += TimeMix(LN x); x += ChannelMix(LN x). The first block first normalises the embedding."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: BlockState | None,
        segment_ids: jax.Array | None,
        rwkv_drop: float | jax.Array | None,
    ) -> tuple[jax.Array, BlockState]:
        del rwkv_drop  # only hybrids use it
        c = self.config
        state = BlockState(None, None) if state is None else state
        if self.layer == 0:
            x = layer_norm(c, "embedding_norm")(x).astype(x.dtype)
        mixed, time_state = TimeMix(c, self.layer, name="rwkv")(
            layer_norm(c, "mixer_norm")(x), state.rwkv, segment_ids=segment_ids
        )
        x = x + mixed
        if not c.feed_forward:
            return x, BlockState(time_state, None)
        mixed, last = ChannelMix(c, self.layer, name="ffn")(
            layer_norm(c, "ffn_norm")(x), state.ffn, segment_ids=segment_ids
        )
        return x + mixed, BlockState(time_state, last)


def hidden_dim(dim: int) -> int:
    """Inner width of the channel-mix: 3.5 dim, rounded down to a multiple of 32."""
    return int(3.5 * dim) // 32 * 32


def mix_rank(dim: int) -> int:
    """Rank of each input's blend in official models, twice as high from the width of the 7B model.

    The decay's rank is twice that.
    """
    return 64 if dim >= 4096 else 32


def shift_init(layer: int, layers: int, name: str) -> Initializer:
    """Share of the token before, per channel i: 1 - (i/D)^a, less 0.3 depth for values.

    Early channels and early layers look further back. `name` is x w k v r g or "channel".
    """
    depth, height = layer / max(layers - 1, 1), 1 - layer / layers
    power = {"r": 0.5 * height, "g": 0.5 * height, "channel": height**3}.get(name, height)

    def init(key, shape, dtype=jnp.float32):
        del key
        position = jnp.arange(shape[0], dtype=dtype) / shape[0]
        return 1 - position**power - (0.3 * depth if name == "v" else 0)

    return init


def decay_init(layer: int, layers: int) -> Initializer:
    """Raw decay omega per channel, from -6 (remembers ~400 tokens) to -1, more slow ones deeper."""
    power = 0.7 + 1.3 * layer / max(layers - 1, 1)

    def init(key, shape, dtype=jnp.float32):
        del key
        return -6 + 5 * jnp.linspace(0, 1, shape[0], dtype=dtype) ** power

    return init


def bonus_init(layer: int, layers: int) -> Initializer:
    """Bonus of the present token: falls along the channels with depth, with a zigzag of 0.1."""
    depth = layer / max(layers - 1, 1)

    def init(key, shape, dtype=jnp.float32):
        del key
        H, K = shape
        channel = jnp.arange(H * K)
        zigzag = 0.1 * ((channel + 1) % 3 - 1)
        ramp = depth * (1 - channel / max(H * K - 1, 1))
        return (ramp + zigzag).astype(dtype).reshape(shape)

    return init
