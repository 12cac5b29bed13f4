"""Exact GELU before a product, by Pallas kernels: x Phi(x), to 2e-7 before it is rounded.

In XLA's code for a GPU its arithmetic takes longer than reading and writing.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.projected import projected
from gt_jax.kernels.pallas.devices import portable_unsupported

BLOCK = 4096  # numbers of a block of the grid
LEAST = 2**22  # numbers that a kernel is worth starting for


def fits(impl: str, x: jax.Array) -> bool:
    """Whether `gelu_product` takes x: impl allows kernels, the GPU and the size suit them."""
    return (
        impl in ("auto", "mosaic", "portable")
        and x.dtype == jnp.bfloat16
        and x.shape[-2] > 1
        and x.size >= LEAST
        and x.size % BLOCK == 0
        and portable_unsupported() is None
    )


def gelu_product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """gelu(x) @ weights; the backward pass computes gelu(x) again, beside its slope.

    Args:
        x: [B, T, C] bfloat16; see `fits`.
        weights: [C, D] bfloat16.

    Returns:
        [B, T, D] bfloat16.
    """
    return projected(lambda x: _call("value", x)[0], lambda *z: _call("gradients", *z))(weights, x)


def _call(name, *arrays):
    """A kernel of gelu_product_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import gelu_product_kernels
    from gt_jax.kernels.pallas.launch import of_models

    return of_models(getattr(gelu_product_kernels, name))(*arrays)
