"""What fusions share: where a gate starts, weights of both branches, the norm of a branch."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.nn import initializers

from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import RMSNorm


class Configured(Protocol):
    """A module of a model, as every fusion is."""

    @property
    def config(self) -> ModelConfig: ...

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any) -> Any: ...


# A norm with it amplifies nothing more than ten times. With the 1e-6 of other norms a branch that
# starts at exactly zero, as official RWKV-6 does, is amplified 1000 times at its first steps.
BRANCH_EPSILON = 1e-2


def initial_share(fusion: Configured) -> float:
    """RWKV's share at initialisation, in (0, 1), of a fusion module.

    It is config.gate_init if set, else the fusion's own `default_share`, else one half.
    """
    given = fusion.config.gate_init
    return getattr(fusion, "default_share", 0.5) if given is None else given


def logit(share: float | None) -> float:
    """The bias whose sigmoid is `share`, in (0, 1); None means one half."""
    return 0.0 if share is None else math.log(share / (1 - share))


def branch_norm(fusion: Configured, name: str) -> RMSNorm:
    """RMSNorm of a branch's output, inside a fusion.

    Its epsilon is config.branch_epsilon if set, else the fusion's own `branch_epsilon`, else 1e-2.
    """
    c = fusion.config
    own = getattr(fusion, "branch_epsilon", BRANCH_EPSILON)
    epsilon = own if c.branch_epsilon is None else c.branch_epsilon
    return RMSNorm(epsilon, c.dtype, name=name)


def post_norm(config: ModelConfig, name: str) -> RMSNorm:
    """RMSNorm of a block's update, in float32, with the epsilon of branches."""
    return RMSNorm(config.branch_epsilon or BRANCH_EPSILON, name=name)


def branch_weights(fusion: Configured, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """softmax(W h + b), the weights of both branches.

    They are exactly (share, 1 - share) at initialisation, where W is zero.

    Args:
        fusion: the module whose parameters head_kernel and head_bias are.
        h: [B, T, C] float32.

    Returns:
        RWKV's and Mamba's, [B, T, 1] float32; they sum to one.
    """
    # A softmax over an axis of two is several small kernels on a GPU, a sigmoid part of another.
    bias = head_bias(fusion)
    score = (h @ head_kernel(fusion, h.shape[-1]))[..., None] + (bias[:1] - bias[1:])
    return jax.nn.sigmoid(score), jax.nn.sigmoid(-score)


def head_kernel(fusion: Configured, width: int) -> jax.Array:
    """W_0 - W_1 [width] float32 of the fusion's parameter head_kernel W, zero at initialisation."""
    kernel = fusion.param("head_kernel", initializers.zeros, (width, 2))
    return kernel[:, 0] - kernel[:, 1]


def head_bias(fusion: Configured) -> jax.Array:
    """The fusion's parameter head_bias b [2] float32, of which b_0 - b_1 counts.

    It starts at the logarithms of (share, 1 - share).
    """
    share = initial_share(fusion)
    log_shares = jnp.log(jnp.array([share, 1 - share]) / 0.5)  # zeros for one half
    return fusion.param("head_bias", lambda key, shape: log_shares, (2,))
