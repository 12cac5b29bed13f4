"""Two branches, each normalised, in a sum whose weights a third array decides token by token.

    c = w RMSNorm(a) + (1 - w) RMSNorm(b),   w = sigmoid(n . head + bias_a - bias_b)

by Pallas kernels on NVIDIA GPUs. n is returned beside c, so that the gradient of its other uses is
added in the kernel of c's gradients.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_norms(
    epsilon: float,
    a: jax.Array,
    b: jax.Array,
    n: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    head: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c, as above; gated_branches.unsupported says of what widths.

    Args:
        epsilon: of both norms, added to the mean of squares over the channels.
        a, b, n: [B, T, D] bfloat16.
        scales: of a and of b, [D] float32 each.
        head: [D] float32.
        bias: [2] float32, bias_a and bias_b.

    Returns:
        n itself, to be used in its place; c [B, T, D] bfloat16; w [B, T, 1] float32.
    """
    return _forward(epsilon, a, b, n, scales, head, bias)[0]


def _forward(epsilon, a, b, n, scales, head, bias):
    arrays = a, b, n, *scales, head, bias
    c, w = _call("forward", *arrays, epsilon=epsilon)
    return (n, c, w.reshape(*c.shape[:-1], 1)), arrays


def _backward(epsilon, arrays, cotangents):
    dn, dc, dw = cotangents
    da, db, dn, sums = _call("backward", *arrays, dn, dc, dw.reshape(-1), epsilon=epsilon)
    width, sums = da.shape[-1], jnp.sum(sums, axis=0)
    d_scales = sums[:width], sums[width : 2 * width]
    slope = sums[3 * width]
    return da, db, dn, d_scales, sums[2 * width : 3 * width], jnp.stack([slope, -slope])


weighted_norms.defvjp(_forward, _backward)


def _call(name, *arrays, **options):
    """A kernel of weighted_norms_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import weighted_norms_kernels
    from gt_jax.kernels.pallas.launch import of_models

    return of_models(functools.partial(getattr(weighted_norms_kernels, name), **options))(*arrays)
