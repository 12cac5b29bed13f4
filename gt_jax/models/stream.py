"""The residual stream of a block: what is added to it, and its norm, by fused kernels or plainly.

The kernels (gt_jax/kernels/elementwise/residual_norm.py) run where those of the recurrences do. A
single token takes the plain form, and so does a small step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import gated_branches, residual_norm
from gt_jax.models.config import ModelConfig
from gt_jax.models.layers import rms_norm

# A stream of more numbers than this takes kernels. A step of gf_mh on an H200 took 5.96 ms with
# them and 2.77 without at 0.5 million (64 x 64 tokens), of gf_mh_base 102.6 and 106.9 at 25
# million (JAX 0.11.2).
LEAST_NUMBERS = 2**20


class Sum(NamedTuple):
    """A stream that has yet to be added up, in the kernel of the next norm."""

    x: jax.Array  # [B, T, D] float32
    branch: jax.Array  # [B, T, D]


def begin(config: ModelConfig, x: jax.Array) -> jax.Array | Sum:
    """The stream [B, T, D] as the first block takes it: a Sum, where kernels take the stream.

    A block leaves a Sum where it was given one. Blocks that take the same are traced once. Not with
    model.remat=full, which keeps what blocks are given: a Sum is half as large again.
    """
    if config.remat == "full" or not takes_kernels(config, x):
        return x
    return add_later(config, x, _nothing(config.dtype, x))


def add_later(config: ModelConfig, x: jax.Array | Sum, branch: jax.Array) -> jax.Array | Sum:
    """x + branch [B, T, D]; where kernels take the stream, a Sum for the next norm to add."""
    x = summed(x)
    if takes_kernels(config, x) and branch.dtype in ("bfloat16", "float32"):
        return Sum(x, branch)
    return x + branch


def summed(x: jax.Array | Sum) -> jax.Array:
    """The stream itself [B, T, D]."""
    return x.x + x.branch if isinstance(x, Sum) else x


def normed(
    config: ModelConfig, name: str, x: jax.Array | Sum, readers: int = 1
) -> tuple[jax.Array, list[jax.Array]]:
    """The RMSNorm `name` of the stream, once for each of its readers.

    Args:
        config: the model's.
        name: of the norm's parameters.
        x: [B, T, D] float32, or such a Sum.
        readers: how many mixers read the result; their gradients add up in one kernel.

    Returns:
        The stream [B, T, D], to be used in place of x from here on, and `readers` times the norm
        [B, T, D] in the computation dtype.
    """
    norm = rms_norm(config, name)
    if isinstance(x, Sum):
        return residual_norm.added(norm.epsilon, readers, *x, norm.weight(x.x.shape[-1]))
    if takes_kernels(config, x):
        return residual_norm.normed(norm.epsilon, readers, x, norm.weight(x.shape[-1]))
    return x, [norm(x)] * readers


def add_and_norm(
    config: ModelConfig, name: str, x: jax.Array, branch: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x + branch [B, T, D], and its RMSNorm `name` in the computation dtype; as `normed`."""
    x, (n,) = normed(config, name, add_later(config, x, branch))
    return x, n


def takes_kernels(config: ModelConfig, x: jax.Array, is_gated: bool = False) -> bool:
    """Whether the kernels of residual_norm.py, or its `gated`, take the stream x [B, T, D]."""
    return (
        x.dtype == "float32"
        and _is_large(config, x)
        and not residual_norm.unsupported(x.shape[-1], config.dtype, is_gated)
    )


def takes_branches(config: ModelConfig, rwkv: jax.Array, mamba: jax.Array) -> bool:
    """Whether the kernels of gated_branches.py take both branches [B, T, D]."""
    return (
        rwkv.dtype == mamba.dtype == "bfloat16"
        and _is_large(config, rwkv)
        and not gated_branches.unsupported(rwkv.shape[-1], config.dtype)
    )


def _zeros(dtype, x) -> jax.Array:
    return jnp.zeros(x.shape, dtype)


# Zeros that have a gradient, which reaches nothing: as the first block's branch is differentiated
# like those of the others, it is traced and lowered with them.
_nothing = jax.custom_vjp(_zeros, nondiff_argnums=(0,))
_nothing.defvjp(lambda dtype, x: (_zeros(dtype, x), None), lambda dtype, _, grad: (None,))


def _is_large(config, x):
    allowed = config.impl not in ("chunked", "reference")
    return allowed and x.shape[1] > 1 and x.size > LEAST_NUMBERS
