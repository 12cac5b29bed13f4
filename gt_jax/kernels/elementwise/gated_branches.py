"""Two branches, each normalised and weighed by a gate of its own, in one pass over the tokens.

    c = sigmoid(z_a + bias_a) RMSNorm(a) + sigmoid(z_b + bias_b) RMSNorm(b)

by Pallas kernels on NVIDIA GPUs, for what a product has written: scores z = [z_a; z_b]. Each
direction is one kernel; norms and gates are computed again for the gradient.
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import residual_norm

_WIDEST = 1536  # 12 channels a thread: of more, the gradient does not fit into its registers


def unsupported(width: int, dtype: str) -> str | None:
    """Why the kernels do not take a call, or None.

    Args:
        width: channels of a branch.
        dtype: of the branches, scores and result.
    """
    if reason := residual_norm.unsupported(width, dtype, is_gated=True):
        return reason
    if width > _WIDEST:
        return f"the kernels of gated branches hold at most {_WIDEST} channels; these are {width}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_sum(
    epsilon: float,
    a: jax.Array,
    b: jax.Array,
    scores: jax.Array,
    biases: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """c, as above.

    Args:
        epsilon: of both norms, added to the mean of squares over the channels.
        a, b: [B, T, D] bfloat16.
        scores: [B, T, 2 D] bfloat16, z_a and z_b.
        biases, scales: of a and of b, [D] float32 each.

    Returns:
        [B, T, D] bfloat16.
    """
    return _sum_forward(epsilon, a, b, scores, biases, scales)[0]


def _sum_forward(epsilon, *arrays):
    (c,) = _call("forward", *arrays, None, epsilon=epsilon)
    return c, arrays


def _sum_backward(epsilon, arrays, dc):
    da, db, d_scores, sums = _call("backward", *arrays, None, dc, None, epsilon=epsilon)
    d_scales, d_biases = jnp.split(jnp.sum(sums, axis=0), 2)
    return da, db, d_scores, tuple(jnp.split(d_biases, 2)), tuple(jnp.split(d_scales, 2))


gated_sum.defvjp(_sum_forward, _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_blend(
    epsilon: float,
    a: jax.Array,
    b: jax.Array,
    scores: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    head: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """w a + (1 - w) b with w = sigmoid(c . head + bias_a - bias_b), c as above without biases.

    Args:
        epsilon, a, b, scores, scales: as of `gated_sum`.
        head: [D] float32.
        bias: [2] float32, bias_a and bias_b.

    Returns:
        The sum [B, T, D] bfloat16, and w [B, T, 1] float32.
    """
    return _blend_forward(epsilon, a, b, scores, scales, head, bias)[0]


def _blend_forward(epsilon, a, b, scores, *parameters):
    scales, *of_head = parameters
    y, w = _call("forward", a, b, scores, None, scales, of_head, epsilon=epsilon)
    return (y, w.reshape(*y.shape[:-1], 1)), (a, b, scores, *parameters)


def _blend_backward(epsilon, residuals, cotangents):
    a, b, scores, scales, *of_head = residuals
    dy, dw = cotangents
    arrays = a, b, scores, None, scales, of_head, dy, dw.reshape(-1)
    da, db, d_scores, sums = _call("backward", *arrays, epsilon=epsilon)
    width, sums = a.shape[-1], jnp.sum(sums, axis=0)
    d_scales = sums[:width], sums[width : 2 * width]
    slope = sums[3 * width]
    d_head = sums[2 * width : 3 * width]
    return da, db, d_scores, d_scales, d_head, jnp.stack([slope, -slope])


gated_blend.defvjp(_blend_forward, _blend_backward)


def _call(name, *arrays, **options):
    """A kernel of gated_branches_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import gated_branches_kernels
    from gt_jax.kernels.pallas.launch import of_models

    return of_models(functools.partial(getattr(gated_branches_kernels, name), **options))(*arrays)
