"""Fusions with a memory: an arbiter reads both branches and weighs them by what it has seen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.kernels.segments import resets
from gt_jax.models.config import ModelConfig
from gt_jax.models.gates import initial_share
from gt_jax.models.layers import project, record, symmetric_uniform


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
        weights = self._weights(h.swapaxes(0, 1))
        record(self, gate=weights[..., :1])
        return weights[..., :1] * rwkv + weights[..., 1:] * mamba, state

    def _weights(self, h):
        """[B, T, D] -> [B, T, 2] that sum to one; exactly (share, 1 - share) at initialisation."""
        share = initial_share(self)
        kernel = self.param("head_kernel", initializers.zeros, (h.shape[-1], 2))
        log_shares = jnp.log(jnp.array([share, 1 - share]) / 0.5)  # zeros for one half
        bias = self.param("head_bias", lambda key, shape: log_shares, (2,))
        return jax.nn.softmax(h @ kernel + bias)
