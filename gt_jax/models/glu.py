"""Fusions of normalised branches whose gates read what the block read.

They take one more argument than other fusions, `block_input` [B, T, D], the block's normalised
input, and say so with `reads_input = True`. Without it they read the mean of both normalised
branches in its place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.kernels.elementwise import gated_branches
from gt_jax.kernels.elementwise.weighted_norms import weighted_norms
from gt_jax.models import stream
from gt_jax.models.config import ModelConfig
from gt_jax.models.gates import (
    Configured,
    branch_norm,
    branch_weights,
    head_bias,
    head_kernel,
    initial_share,
    logit,
)
from gt_jax.models.layers import RMSNorm, fan_in_uniform, normal, output_init, project, record
from gt_jax.models.rounding import side_by_side
from gt_jax.models.scans import memory_scan


class GLU(nn.Module):
    """W_o (w_0 rwkv + w_1 mamba) for w = softmax(W c + b), with r and m the normalised branches.

    c = sigmoid(W_r n) r + sigmoid(W_m n) m,   n the block's input

    W_o starts at zero, and the update of the block with it.
    """

    config: ModelConfig
    reads_input = True
    only_in_products = ("rwkv_kernel", "mamba_kernel"), ("output_kernel",)
    only_in_differences = ("head_kernel",)

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
        norms = branch_norms(self)
        r, m, n = normalised(norms, rwkv, mamba, block_input)
        names = ("rwkv_kernel", "mamba_kernel")
        kernels = [self.param(name, normal, (c.dim, c.dim)) for name in names]
        in_kernel = stream.takes_branches(c, rwkv, mamba)
        scores = project_each(n, kernels, alone=in_kernel)
        if in_kernel:
            arrays = rwkv, mamba, scores, scales_of(norms, c.dim)
            head = head_kernel(self, c.dim), head_bias(self)
            blended: Any = gated_branches.gated_blend(norms[0].epsilon, *arrays, *head)
            fused, of_rwkv = blended  # custom_vjp hides the type
        else:
            gates = gates_of(scores)
            of_rwkv, of_mamba = branch_weights(self, gates[0] * r + gates[1] * m)
            fused = of_rwkv * rwkv + of_mamba * mamba
        kernel = self.param("output_kernel", initializers.zeros, (c.dim, c.dim))
        output = lambda branch: project(branch.astype(c.dtype), kernel)
        record(self, gate=of_rwkv, from_rwkv=output(of_rwkv * rwkv))
        return output(fused), state


class ParallelFusion(nn.Module):
    """W_o (sigmoid(G_r n + b_r) r + sigmoid(G_m n + b_m) m): a gate each, of a sum that is free.

    r and m are the normalised branches, n is the block's input. The share that is recorded is the
    first gate's in the sum of both.
    """

    config: ModelConfig
    reads_input = True
    only_in_products = ("rwkv_kernel", "mamba_kernel"), ("output_kernel",)

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
        norms = branch_norms(self)
        r, m, n = normalised(norms, rwkv, mamba, block_input)
        kernels, biases = [], []
        for name, start in (("rwkv", share), ("mamba", 1 - share)):
            kernels.append(self.param(f"{name}_kernel", initializers.zeros, (c.dim, c.dim)))
            start = initializers.constant(logit(start))
            biases.append(self.param(f"{name}_bias", start, (c.dim,)))
        in_kernel = stream.takes_branches(c, rwkv, mamba)
        scores, output = project_each(n, kernels, alone=in_kernel), output_projection(self)
        gates = gates_of(scores, biases)
        from_rwkv = gates[0] * r
        record(self, gate=gates[0] / (gates[0] + gates[1]), from_rwkv=output(from_rwkv))
        if in_kernel:
            arrays = rwkv, mamba, scores, tuple(biases), scales_of(norms, c.dim)
            return output(gated_branches.gated_sum(norms[0].epsilon, *arrays)), state
        return output(from_rwkv + gates[1] * m), state


class ParallelScan(nn.Module):
    """W_o h_t with h_t = a_t h_{t-1} + (1 - a_t) i_t c_t: a gated memory of the weighted branches.

    a = sigmoid(A n + b_a),   i = sigmoid(I n),   c = w_0 r + w_1 m,   w = softmax(W n + b)

    r and m are the normalised branches, n is the block's input. b_a starts evenly between 0 and 4:
    channels forget half of their memory in 1 to 38 tokens.
    """

    config: ModelConfig
    reads_input = True
    only_in_products = ("decay_kernel", "input_kernel"), ("output_kernel",)
    only_in_differences = ("head_kernel",)

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        block_input: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        c, D = self.config, self.config.dim
        norms = branch_norms(self)
        r, m, n = normalised(norms, rwkv, mamba, block_input)
        in_kernel = stream.takes_branches(c, rwkv, mamba)
        if in_kernel:
            head = head_kernel(self, D), head_bias(self)
            arrays = rwkv, mamba, n, scales_of(norms, D)
            weighted: Any = weighted_norms(norms[0].epsilon, *arrays, *head)
            n, branches, of_rwkv = weighted  # custom_vjp hides the type
        else:
            of_rwkv, of_mamba = branch_weights(self, n.astype(jnp.float32))
            branches = of_rwkv * r + of_mamba * m
        names = ("decay_kernel", "input_kernel")
        kernels = [self.param(name, fan_in_uniform(), (D, D)) for name in names]
        scores = project_each(n, kernels, alone=in_kernel)
        bias = self.param("decay_bias", lambda key, shape: jnp.linspace(0, 4, *shape), (D,))
        h, last = memory_scan(scores, branches, bias, state, segment_ids, impl=c.impl)
        output = output_projection(self)
        of_one = scores, of_rwkv * r, bias, None, segment_ids
        record(self, gate=of_rwkv, from_rwkv=output(memory_scan(*of_one, impl="chunked")[0]))
        return output(h), last


def project_each(x: jax.Array, kernels: Sequence[jax.Array], alone: bool = False) -> jax.Array:
    """x [..., in] @ kernel [in, out] of each kernel of one shape, side by side, in one product.

    XLA joins such products of the forward pass, but not those that give the gradient of x. It also
    joins this one and a mixer's of the same x, unless `alone`: what takes no slices of the result,
    as Pallas kernels, then waits for copies of them, and the gradient for a concatenation.
    """
    x = jax.lax.optimization_barrier(x) if alone else x
    return project(x, side_by_side(kernels, x.dtype))


def gates_of(
    scores: jax.Array, biases: Sequence[jax.Array | float] = (0.0, 0.0)
) -> list[jax.Array]:
    """sigmoid(z + bias) [B, T, D] float32 of both z in scores [B, T, 2 D]."""
    halves = jnp.split(scores.astype(jnp.float32), 2, axis=-1)
    return [jax.nn.sigmoid(z + bias) for z, bias in zip(halves, biases)]


def branch_norms(fusion: Configured) -> tuple[RMSNorm, RMSNorm]:
    """Of RWKV's branch and of Mamba's."""
    return branch_norm(fusion, "rwkv_norm"), branch_norm(fusion, "mamba_norm")


def scales_of(norms: tuple[RMSNorm, RMSNorm], width: int) -> tuple[jax.Array, jax.Array]:
    """Scales [width] of both norms."""
    return norms[0].weight(width), norms[1].weight(width)


def normalised(
    norms: tuple[RMSNorm, RMSNorm],
    rwkv: jax.Array,
    mamba: jax.Array,
    block_input: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both branches [B, T, D] float32 by their norms, and what the gates read [B, T, D]."""
    r, m = norms[0](rwkv), norms[1](mamba)
    n = (r + m) / 2 if block_input is None else block_input
    return r.astype(jnp.float32), m.astype(jnp.float32), n


def output_projection(fusion: Configured) -> Callable[[jax.Array], jax.Array]:
    """The function x [B, T, D] float32 -> W_o x in the computation dtype."""
    c = fusion.config
    init = output_init(c, fan_in_uniform(c.layers**-0.5))  # as Mamba-2 ends
    kernel = fusion.param("output_kernel", init, (c.dim, c.dim))
    return lambda x: project(x.astype(c.dtype), kernel)
