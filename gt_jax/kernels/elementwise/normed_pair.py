"""RMSNorms of two branches, side by side for one product with both.

    [RMSNorm(a); RMSNorm(b)]

by Pallas kernels on NVIDIA GPUs. The branches are returned beside it, so that the gradients of
their other uses are added in the kernel of the norms' gradients.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normed_pair(
    epsilon: float, a: jax.Array, b: jax.Array, scales: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two branches and their norms; gated_branches.unsupported says of what widths.

    Args:
        epsilon: of both norms, added to the mean of squares over the channels.
        a, b: [B, T, D] bfloat16.
        scales: of a and of b, [D] float32 each.

    Returns:
        a and b themselves, to be used in their place, and [B, T, 2 D] bfloat16.
    """
    return _forward(epsilon, a, b, scales)[0]


def _forward(epsilon, a, b, scales):
    (pair,) = _call("forward", a, b, *scales, epsilon=epsilon)
    return (a, b, pair), (a, b, *scales)


def _backward(epsilon, residuals, cotangents):
    da, db, sums = _call("backward", *residuals, *cotangents, epsilon=epsilon)
    return da, db, tuple(jnp.split(jnp.sum(sums, axis=0), 2))


normed_pair.defvjp(_forward, _backward)


def _call(name, *arrays, **options):
    """A kernel of normed_pair_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import normed_pair_kernels
    from gt_jax.kernels.pallas.launch import of_models

    return of_models(functools.partial(getattr(normed_pair_kernels, name), **options))(*arrays)
