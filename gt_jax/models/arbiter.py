"""Fusions with a memory: an arbiter reads both branches and weighs them by what it has seen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.kernels.elementwise.normed_pair import normed_pair
from gt_jax.kernels.segments import resets
from gt_jax.models import stream
from gt_jax.models.config import ModelConfig
from gt_jax.models.gates import branch_norm, branch_weights, head_bias, head_kernel
from gt_jax.models.layers import (
    fan_in_uniform,
    project,
    record,
    symmetric_uniform,
)
from gt_jax.models.rounding import side_by_side
from gt_jax.models.scans import gated_scan, linear_scan


class GRU(nn.Module):
    """w_t = softmax(W h_t + b), fused = w_0 rwkv + w_1 mamba, h_t = GRU([rwkv; mamba], h_{t-1}).

    The GRU is Cho et al.'s (2014) with the reset after the matrix, as PyTorch's GRUCell:

    reset, update = sigmoid(x + y) for x = W_x [rwkv; mamba] + b_x, y = W_h h_{t-1} + b_h
    h_t = (1 - update) tanh(x' + reset y') + update h_{t-1}, primes marking the last third
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """rwkv, mamba [B, T, D]; state [B, D] float32, zeros if None -> fused [B, T, D], state."""
        c = self.config
        B, T, D = rwkv.shape
        init = symmetric_uniform(D**-0.5)
        input_kernel = self.param("input_kernel", init, (2 * D, 3 * D))
        input_bias = self.param("input_bias", init, (3 * D,))
        hidden_kernel = self.param("hidden_kernel", init, (D, 3 * D))
        hidden_bias = self.param("hidden_bias", init, (3 * D,))

        pair = jnp.concatenate([rwkv, mamba], axis=-1)
        inputs = project(pair, input_kernel).astype(jnp.float32) + input_bias
        starts = resets(segment_ids, (B, T))

        def step(h, inputs):
            x, start = inputs  # [B, 3D], [B]
            h = jnp.where(start[:, None], 0, h)
            y = project(h.astype(c.dtype), hidden_kernel).astype(jnp.float32) + hidden_bias
            gates = jax.nn.sigmoid(x[:, : 2 * D] + y[:, : 2 * D])
            reset, update = gates[:, :D], gates[:, D:]
            new = jnp.tanh(x[:, 2 * D :] + reset * y[:, 2 * D :])
            h = (1 - update) * new + update * h
            return h, h

        state = jnp.zeros((B, D)) if state is None else state
        state, h = jax.lax.scan(step, state, (inputs.swapaxes(0, 1), starts.T))
        of_rwkv, of_mamba = branch_weights(self, h.swapaxes(0, 1))
        record(self, gate=of_rwkv)
        return of_rwkv * rwkv + of_mamba * mamba, state


class MinGRU(nn.Module):
    """softmax(W s_t + b) weighs the branches; s_t is a minGRU's (Feng et al. 2024), 1.5 D wide.

    s_t = (1 - update_t) s_{t-1} + update_t g(candidate_t),   update_t = sigmoid(U n_t)
    candidate_t = C n_t for n_t = [RMSNorm(rwkv); RMSNorm(mamba)],   g(x) = max(x, 0) + 1/2 or,
    below zero, sigmoid(x)

    Neither gate reads s_{t-1}: all tokens are computed at once. The weighted sum is of the branches
    themselves, not of the normalised ones.
    """

    config: ModelConfig
    only_in_products = (("candidate_kernel", "update_kernel"),)
    only_in_differences = ("head_kernel",)

    @nn.compact
    def score(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array, jax.Array]:
        """Both branches; W s_t and b, as `blend` takes them; the state."""
        c, D = self.config, self.config.dim
        hidden = 3 * D // 2
        norms = branch_norm(self, "rwkv_norm"), branch_norm(self, "mamba_norm")
        if stream.takes_branches(c, rwkv, mamba):
            scales = norms[0].weight(D), norms[1].weight(D)
            normed: Any = normed_pair(norms[0].epsilon, rwkv, mamba, scales)
            rwkv, mamba, pair = normed  # custom_vjp hides the type
        else:
            pair = jnp.concatenate([norms[0](rwkv), norms[1](mamba)], axis=-1)
        names = ("candidate_kernel", "update_kernel")
        kernels = [self.param(name, fan_in_uniform(), (2 * D, hidden)) for name in names]
        gates = project(pair, side_by_side(kernels, pair.dtype))
        head = head_kernel(self, hidden)
        score, state = gated_scan(gates, head, state, segment_ids, impl=c.impl)  # [B, T]
        return (rwkv, mamba), score[..., None], head_bias(self), state

    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """rwkv, mamba [B, T, D]; state [B, 1.5 D] float32 or None -> fused [B, T, D], state."""
        return blend(self, *self.score(rwkv, mamba, state, segment_ids))


class RunningMean(nn.Module):
    """softmax(W c_t + b) weighs the branches; c_t is a weighted mean over all tokens so far.

    c_t = sum over s <= t of q_s x_s / sum of q_s,   x = [rwkv; mamba],   q = sigmoid(w . x + v)

    Two weights of a softmax are decided by one score, so W stands for W_0 - W_1 here. It is applied
    before the sums, which are then of two numbers a token: q (W x) and q. A score below -30 counts
    as -30, so that the sum of q is above zero from the first token on.
    """

    config: ModelConfig
    only_in_differences = ("head_kernel",)

    @nn.compact
    def score(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array, jax.Array]:
        """Both branches; W c_t and b, as `blend` takes them; the state."""
        D = self.config.dim
        kernel = self.param("kernel", fan_in_uniform(), (2 * D, 1))[:, 0]
        bias = self.param("bias", initializers.zeros, (1,))
        head = head_kernel(self, 2 * D)

        # One vector at a time: on a GPU that is part of what reads the branches anyway. A product
        # with both wants them in float32, written out, and so their gradients.
        wide = rwkv.astype(jnp.float32), mamba.astype(jnp.float32)
        read = lambda of_x: wide[0] @ of_x[:D] + wide[1] @ of_x[D:]  # [B, T]
        q = jax.nn.sigmoid(jnp.maximum(read(kernel) + bias, -30))
        terms = jnp.stack([q * read(head), q], axis=-1)
        decay, impl = jnp.ones_like(terms), self.config.impl
        sums = linear_scan(decay, terms, state, segment_ids, impl=impl)
        score = sums[..., :1] / sums[..., 1:]  # [B, T, 1]
        return (rwkv, mamba), score, head_bias(self), sums[:, -1]

    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """rwkv, mamba [B, T, D]; state [B, 2] float32 or None -> fused [B, T, D], state."""
        return blend(self, *self.score(rwkv, mamba, state, segment_ids))


def blend(
    fusion: nn.Module,
    branches: tuple[jax.Array, jax.Array],
    score: jax.Array,
    bias: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """g rwkv + (1 - g) mamba [B, T, D] float32 for g = sigmoid(score + b_0 - b_1), and the state.

    Args:
        fusion: whose gate g is.
        branches: rwkv and mamba, [B, T, D].
        score: [B, T, 1] float32.
        bias: [2] float32, b.
        state: of the fusion.
    """
    score = score + (bias[:1] - bias[1:])
    of_rwkv, of_mamba = jax.nn.sigmoid(score), jax.nn.sigmoid(-score)
    record(fusion, gate=of_rwkv)
    return of_rwkv * branches[0] + of_mamba * branches[1], state
