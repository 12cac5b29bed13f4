"""Fusions of normalised branches whose gates read what the block read.

They take one more argument than other fusions, `block_input` [B, T, D], the block's normalised
input, and say so with `reads_input = True`. Without it they read the mean of both normalised
branches in its place.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.models.config import ModelConfig
from gt_jax.models.gates import (
    Configured,
    branch_norm,
    branch_weights,
    initial_share,
    logit,
)
from gt_jax.models.layers import fan_in_uniform, normal, output_init, project, record
from gt_jax.models.scans import linear_scan


class GLU(nn.Module):
    """W_o (w_0 rwkv + w_1 mamba) for w = softmax(W c + b), with r and m the normalised branches.

    c = sigmoid(W_r n) r + sigmoid(W_m n) m,   n the block's input

    W_o starts at zero, and the update of the block with it.
    """

    config: ModelConfig
    reads_input = True

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
        block_input: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        D = self.config.dim
        r, m, n = normalised(self, rwkv, mamba, block_input)
        kernels = [self.param(name, normal, (D, D)) for name in ("rwkv_kernel", "mamba_kernel")]
        gates = [jax.nn.sigmoid(z.astype(jnp.float32)) for z in project_each(n, kernels)]
        of_rwkv, of_mamba = branch_weights(self, gates[0] * r + gates[1] * m)
        kernel = self.param("output_kernel", initializers.zeros, (D, D))
        output = lambda branch: project(branch.astype(self.config.dtype), kernel)
        from_rwkv = of_rwkv * rwkv
        record(self, gate=of_rwkv, from_rwkv=output(from_rwkv))
        return output(from_rwkv + of_mamba * mamba), state


class ParallelFusion(nn.Module):
    """W_o (sigmoid(G_r n + b_r) r + sigmoid(G_m n + b_m) m): a gate each, of a sum that is free.

    r and m are the normalised branches, n is the block's input. The share that is recorded is the
    first gate's in the sum of both.
    """

    config: ModelConfig
    reads_input = True

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
        block_input: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        c = self.config
        share = initial_share(self)
        r, m, n = normalised(self, rwkv, mamba, block_input)
        kernels, biases = [], []
        for name, start in (("rwkv", share), ("mamba", 1 - share)):
            kernels.append(self.param(f"{name}_kernel", initializers.zeros, (c.dim, c.dim)))
            start = initializers.constant(logit(start))
            biases.append(self.param(f"{name}_bias", start, (c.dim,)))
        scores = zip(project_each(n, kernels), biases)
        gates = [jax.nn.sigmoid(z.astype(jnp.float32) + bias) for z, bias in scores]
        output = output_projection(self)
        from_rwkv = gates[0] * r
        record(self, gate=gates[0] / (gates[0] + gates[1]), from_rwkv=output(from_rwkv))
        return output(from_rwkv + gates[1] * m), state


class ParallelScan(nn.Module):
    """W_o h_t with h_t = a_t h_{t-1} + (1 - a_t) i_t c_t: a gated memory of the weighted branches.

    a = sigmoid(A n + b_a),   i = sigmoid(I n),   c = w_0 r + w_1 m,   w = softmax(W n + b)

    r and m are the normalised branches, n is the block's input. b_a starts evenly between 0 and 4:
    channels forget half of their memory in 1 to 38 tokens.
    """

    config: ModelConfig
    reads_input = True

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        block_input: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        D = self.config.dim
        r, m, n = normalised(self, rwkv, mamba, block_input)
        of_rwkv, of_mamba = branch_weights(self, n.astype(jnp.float32))
        names = ("decay_kernel", "input_kernel")
        kernels = [self.param(name, fan_in_uniform(), (D, D)) for name in names]
        forget, read = (z.astype(jnp.float32) for z in project_each(n, kernels))
        forget += self.param("decay_bias", lambda key, shape: jnp.linspace(0, 4, *shape), (D,))
        decay, scale = jax.nn.sigmoid(forget), jax.nn.sigmoid(-forget) * jax.nn.sigmoid(read)
        from_rwkv = scale * of_rwkv * r
        both, impl = from_rwkv + scale * of_mamba * m, self.config.impl
        h = linear_scan(decay, both, state, segment_ids, impl=impl)
        output = output_projection(self)
        kept_of_rwkv = linear_scan(decay, from_rwkv, segment_ids=segment_ids, impl=impl)
        record(self, gate=of_rwkv, from_rwkv=output(kept_of_rwkv))
        return output(h), h[:, -1]


def project_each(x: jax.Array, kernels: Sequence[jax.Array]) -> list[jax.Array]:
    """x [..., in] @ kernel [in, out] of each kernel of one shape, all in one product.

    XLA joins such products of the forward pass, but not those that give the gradient of x.
    """
    both = project(x, jnp.concatenate(kernels, axis=-1))
    return jnp.split(both, len(kernels), axis=-1)


def normalised(
    fusion: Configured, rwkv: jax.Array, mamba: jax.Array, block_input: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both branches [B, T, D] float32 by their RMSNorms, and what the gates read [B, T, D]."""
    r, m = branch_norm(fusion, "rwkv_norm")(rwkv), branch_norm(fusion, "mamba_norm")(mamba)
    n = (r + m) / 2 if block_input is None else block_input
    return r.astype(jnp.float32), m.astype(jnp.float32), n


def output_projection(fusion: Configured) -> Callable[[jax.Array], jax.Array]:
    """The function x [B, T, D] float32 -> W_o x in the computation dtype."""
    c = fusion.config
    init = output_init(c, fan_in_uniform(c.layers**-0.5))  # as Mamba-2 ends
    kernel = fusion.param("output_kernel", init, (c.dim, c.dim))
    return lambda x: project(x.astype(c.dtype), kernel)
