"""How a hybrid block joins its two branches; FUSIONS names every way.

A fusion is a module of (rwkv, mamba, state, segment_ids) -> (fused, state) with rwkv, mamba and
fused [B, T, D]. The fusions here keep no state; `arbiter.py` has those
that do, `glu.py` those that read the block's input. To add one, write
the module and put it into FUSIONS; nothing else has to name it. A fusion that weighs the RWKV
branch records that weight as "gate" and starts it at initial_share(self). Its class may say

    default_share    RWKV's share where model.gate_init is None: 0.5 if not said, None for no gate
    reads_input      True: it is also called with block_input=, the block's normalised input
    branch_epsilon   of its branch_norm where model.branch_epsilon is None: 1e-2 if not said
    only_in_products names of matrices, in tuples, that nothing but products in model.dtype reads,
                     those of a tuple side by side, of one shape: small steps round all at once
    only_in_differences names of matrices [.., 2] of which W_0 - W_1 alone is read: small steps
                     subtract for all blocks at once, and give [W_0 - W_1, 0] for W
    score            a method, as MinGRU's, of one that is `blend` of what it gives: a kernel may
                     then join the branches, add them to the stream and take the next norm

What it records as "from_rwkv" [B, T, D] is RWKV's term of its sum; it need not say so if that is
the gate times the branch. Analysis reads both.

The init of a gate is exact: its kernel is zero, so every gate equals `gate_init` at step 0.
Only the legacy branch with init "normal" or "reference" draws gate kernels from N(0, 0.02) and W_p
of rf likewise, as the reference repository did; "reference" also forgets gate_init in hgf, as it.

gate_init is a weight, not yet a contribution: the output projection of the official RWKV-6 starts
at zero, so at step 0 all of the update is Mamba's, whatever gate_init says. model.branch_start sets
both outputs to zero, or neither, so that a gate's start means the same for both.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from flax.typing import Initializer
from jax.nn import initializers

from gt_jax.errors import InputError
from gt_jax.models.arbiter import GRU, MinGRU, RunningMean
from gt_jax.models.config import ModelConfig
from gt_jax.models.gates import branch_norm, initial_share, logit
from gt_jax.models.glu import GLU, ParallelFusion, ParallelScan
from gt_jax.models.layers import normal, project, project_pair, record


class Gains(nn.Module):
    """HY: gain_r RMSNorm(rwkv) + gain_m RMSNorm(mamba), one gain per channel.

    The official RWKV-6 branch starts at exactly zero, where the slope of RMSNorm is 1 / sqrt(eps),
    1000 times its slope at an output of unit size. So HY's gradient is large at step 0: its norm is
    28 under preset hy and 7 under gf, on 64 x 64 characters (35 and 2 in two blocks of width 32).
    Clipping (optim.clip) scales that step down; with model.branch_epsilon=0.01 it is as under gf.
    """

    config: ModelConfig
    default_share = 0.7
    branch_epsilon = 1e-6

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        c = self.config
        share = initial_share(self)
        gain_r = self.param("rwkv_gain", initializers.constant(share), (c.dim,))
        gain_m = self.param("mamba_gain", initializers.constant(1 - share), (c.dim,))
        record(self, gate=gain_r)
        rwkv = branch_norm(self, "rwkv_norm")(rwkv).astype(jnp.float32)
        mamba = branch_norm(self, "mamba_norm")(mamba).astype(jnp.float32)
        return gain_r * rwkv + gain_m * mamba, state


class Gate(nn.Module):
    """GF: g rwkv + (1 - g) mamba with one g = sigmoid(w . [rwkv; mamba] + b) per position."""

    config: ModelConfig

    @nn.compact
    def parameters(self) -> tuple[jax.Array, jax.Array]:
        """w [2D] and b [1], both float32."""
        kernel = self.param("kernel", gate_kernel_init(self.config), (2 * self.config.dim,))
        start = initializers.constant(logit(initial_share(self)))
        return kernel, self.param("bias", start, (1,))

    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        D = self.config.dim
        kernel, bias = self.parameters()
        rwkv, mamba = rwkv.astype(jnp.float32), mamba.astype(jnp.float32)
        score = jnp.sum(rwkv * kernel[:D] + mamba * kernel[D:], axis=-1, keepdims=True)
        gate = jax.nn.sigmoid(score + bias)  # [B, T, 1]
        record(self, gate=gate)
        return self.join(gate, rwkv, mamba), state

    @staticmethod
    def join(gate: jax.Array, rwkv: jax.Array, mamba: jax.Array) -> jax.Array:
        """g rwkv + (1 - g) mamba [B, T, D] float32, with g [B, T, 1] float32."""
        return gate * rwkv + (1 - gate) * mamba


class ChannelGate(nn.Module):
    """HGF: like GF, with one gate per position and channel."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        D = self.config.dim
        kernel = self.param("kernel", gate_kernel_init(self.config), (2 * D, D))
        # The original overwrote the bias too: its HGF-MH and HGF-RH start as its HGF.
        start = 0.0 if self.config.init == "reference" else logit(initial_share(self))
        bias = self.param("bias", initializers.constant(start), (D,))
        gate = jax.nn.sigmoid(project_pair(rwkv, mamba, kernel).astype(jnp.float32) + bias)
        record(self, gate=gate)
        return gate * rwkv + (1 - gate) * mamba, state


class WeightedSum(nn.Module):
    """WS: alpha rwkv + (1 - alpha) mamba, one unconstrained alpha per layer."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        alpha = self.param("alpha", initializers.constant(initial_share(self)), (1,))
        record(self, gate=alpha)
        return alpha * rwkv + (1 - alpha) * mamba, state


class Residual(nn.Module):
    """RF: rwkv + W_p mamba."""

    config: ModelConfig
    default_share = None

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        c = self.config
        init = normal if reproduces_reference(c) else initializers.normal(0.01)
        kernel = self.param("kernel", init, (c.dim, c.dim))
        return rwkv + project(mamba, kernel), state


class Concat(nn.Module):
    """CP: W_c [rwkv; mamba]."""

    config: ModelConfig
    default_share = None

    @nn.compact
    def __call__(
        self,
        rwkv: jax.Array,
        mamba: jax.Array,
        state: None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        D = self.config.dim
        kernel = self.param("kernel", normal, (2 * D, D))
        return project_pair(rwkv, mamba, kernel), state


def reproduces_reference(config: ModelConfig) -> bool:
    """Whether kernels of gates and of rf are drawn as in the reference repository."""
    return config.branch == "legacy" and config.init in ("normal", "reference")


def gate_kernel_init(config: ModelConfig) -> Initializer:
    """Zero, so that a gate starts at its bias; N(0, 0.02) where the reference had it."""
    return normal if reproduces_reference(config) else initializers.zeros


FUSIONS = {
    "hy": Gains,
    "gf": Gate,
    "ws": WeightedSum,
    "rf": Residual,
    "cp": Concat,
    "hgf": ChannelGate,
    "gru": GRU,
    "mingru": MinGRU,
    "linrec": RunningMean,
    "glu": GLU,
    "parallel": ParallelFusion,
    "pscan": ParallelScan,
}


def default_share(name: str) -> float | None:
    """RWKV's share where a fusion starts if model.gate_init is None; None if it has no gate."""
    return getattr(FUSIONS[name], "default_share", 0.5)


def check_gate(config: ModelConfig) -> None:
    """Raises InputError if gate_init is set for a fusion without a gate."""
    if config.gate_init is not None and default_share(config.fusion) is None:
        gated = ", ".join(name for name in FUSIONS if default_share(name) is not None)
        raise InputError(
            f"model.gate_init={config.gate_init} has no meaning for model.fusion={config.fusion!r}:"
            f" leave it unset or choose a fusion with a gate ({gated})"
        )


def gate_parameters(config: ModelConfig, share: float) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of a fusion that model.gate_init decides, as they are at initialisation.

    They are found by initialising the fusion with this share and with another one: only the fusion
    itself has to know their names.

    Args:
        config: the ModelConfig of a hybrid; its gate_init does not matter.
        share: RWKV's share, in (0, 1).

    Returns:
        Path in the fusion's parameters -> NumPy array; empty if nothing depends on gate_init.

    Raises:
        InputError: a parameter depends on gate_init and on the random key, so the share alone does
            not say what it starts from.
    """

    module = FUSIONS[config.fusion]
    config, other = (dataclasses.replace(config, gate_init=s) for s in (share, share / 2))
    here, there = _parameters(module, config, seed=0), _parameters(module, other, seed=0)
    found = {path: leaf for path, leaf in here.items() if not np.array_equal(leaf, there[path])}
    again = _parameters(module, config, seed=1) if found else {}
    for path, leaf in found.items():
        if not np.array_equal(leaf, again[path]):
            raise InputError(
                f"model.fusion={config.fusion!r} draws {'/'.join(path)} at random around "
                "model.gate_init, which cannot be set later; start it from a constant"
            )
    return found


@functools.cache
def _parameters(module, config, seed) -> dict[tuple[str, ...], Any]:
    """Path -> NumPy array of a fusion's parameters at initialisation."""
    branch = jnp.zeros((1, 1, config.dim))
    params = jax.jit(module(config).init)(jax.random.key(seed), branch, branch).get("params", {})
    return flatten_dict(jax.device_get(params))
