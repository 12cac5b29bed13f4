"""How a hybrid block joins its two branches; FUSIONS at the bottom names every way.

A fusion is a module of (rwkv, mamba, state, segment_ids) -> (fused, state) with rwkv, mamba and
fused [B, T, D]. These ones keep no state; `arbiter.py` has those that do. To add one, write the
module and put it into FUSIONS. A fusion that weighs the RWKV branch records that weight as "gate".

The init of a gate is exact: its kernel is zero, so every gate equals `gate_init` at the first step.
Only the legacy branch with init "normal" draws gate kernels from N(0, 0.02) and W_p of rf likewise,
as the reference repository did.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.models.arbiter import GRU
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import normal, project, record, rms_norm


class Gains(nn.Module):
    """HY: gain_r RMSNorm(rwkv) + gain_m RMSNorm(mamba), one gain per channel."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        c = self.config
        share = 0.7 if c.gate_init is None else c.gate_init
        gain_r = self.param("rwkv_gain", initializers.constant(share), (c.dim,))
        gain_m = self.param("mamba_gain", initializers.constant(1 - share), (c.dim,))
        record(self, gate=gain_r)
        rwkv = rms_norm(c, "rwkv_norm")(rwkv).astype(jnp.float32)
        mamba = rms_norm(c, "mamba_norm")(mamba).astype(jnp.float32)
        return gain_r * rwkv + gain_m * mamba, state


class Gate(nn.Module):
    """GF: g rwkv + (1 - g) mamba with one g = sigmoid(w . [rwkv; mamba] + b) per position."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        D = self.config.dim
        kernel = self.param("kernel", gate_kernel_init(self.config), (2 * D,))
        bias = self.param("bias", initializers.constant(logit(self.config.gate_init)), (1,))
        rwkv, mamba = rwkv.astype(jnp.float32), mamba.astype(jnp.float32)
        score = jnp.sum(rwkv * kernel[:D] + mamba * kernel[D:], axis=-1, keepdims=True)
        gate = jax.nn.sigmoid(score + bias)  # [B, T, 1]
        record(self, gate=gate)
        return gate * rwkv + (1 - gate) * mamba, state


class ChannelGate(nn.Module):
    """HGF: as GF with one gate per position and channel."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        D = self.config.dim
        kernel = self.param("kernel", gate_kernel_init(self.config), (2 * D, D))
        bias = self.param("bias", initializers.constant(logit(self.config.gate_init)), (D,))
        gate = jax.nn.sigmoid(project_pair(rwkv, mamba, kernel).astype(jnp.float32) + bias)
        record(self, gate=gate)
        return gate * rwkv + (1 - gate) * mamba, state


class WeightedSum(nn.Module):
    """WS: alpha rwkv + (1 - alpha) mamba, one unconstrained alpha per layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        share = 0.5 if self.config.gate_init is None else self.config.gate_init
        alpha = self.param("alpha", initializers.constant(share), (1,))
        record(self, gate=alpha)
        return alpha * rwkv + (1 - alpha) * mamba, state


class Residual(nn.Module):
    """RF: rwkv + W_p mamba."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        c = self.config
        init = normal if reproduces_reference(c) else initializers.normal(0.01)
        kernel = self.param("kernel", init, (c.dim, c.dim))
        return rwkv + project(mamba, kernel), state


class Concat(nn.Module):
    """CP: W_c [rwkv; mamba]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, rwkv, mamba, state=None, segment_ids=None):
        D = self.config.dim
        kernel = self.param("kernel", normal, (2 * D, D))
        return project_pair(rwkv, mamba, kernel), state


def project_pair(rwkv, mamba, kernel):
    """[rwkv; mamba] @ kernel [2D, out], without writing the concatenation."""
    D = rwkv.shape[-1]
    return project(rwkv, kernel[:D]) + project(mamba, kernel[D:])


def logit(share):
    """Bias whose sigmoid is `share`; None is one half."""
    return 0.0 if share is None else math.log(share / (1 - share))


def reproduces_reference(config):
    return config.branch == "legacy" and config.init == "normal"


def gate_kernel_init(config):
    return normal if reproduces_reference(config) else initializers.zeros


FUSIONS = {
    "hy": Gains,
    "gf": Gate,
    "ws": WeightedSum,
    "rf": Residual,
    "cp": Concat,
    "hgf": ChannelGate,
    "gru": GRU,
}
