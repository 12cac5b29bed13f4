"""RMSNorm of a float32 residual stream, with what is added to the stream before it.

    n = u / sqrt(mean(u^2) + epsilon) scale of u = x, x + branch or x + g a + (1 - g) b

by Pallas kernels on NVIDIA GPUs. Every function returns u beside n, so that the gradient that comes
back along the stream is added in the kernel of the norm's gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gt_jax.kernels.pallas.devices import portable_unsupported

# Results of these functions that model.remat=dots keeps: bytes that a forward pass writes anyway,
# and that a backward pass would have to compute from a float32 stream.
KEPT = ("normed", "added", "gated", "blended")


def unsupported(width: int, dtype: str, is_gated: bool = False) -> str | None:
    """Why the fused kernels do not take a call, or None.

    Args:
        width: channels of the stream.
        dtype: of the norm's result.
        is_gated: whether it is of `gated` or `blended`, which hold more of a token.
    """
    if reason := portable_unsupported():
        return reason
    if dtype != "bfloat16":
        return f"the fused residual norm is for bfloat16; this is {dtype}"
    from gt_jax.kernels.elementwise import residual_norm_rows

    return residual_norm_rows.unsupported(width, is_gated)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normed(
    epsilon: float, readers: int, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The norm of x.

    Args:
        epsilon: added to the mean of squares over the channels.
        readers: how many read the result, each a copy of its own: the kernel adds their gradients.
        x: [B, T, D] float32.
        scale: [D] float32.

    Returns:
        x itself, and `readers` times the same norm [B, T, D] bfloat16.
    """
    return _normed_forward(epsilon, readers, x, scale)[0]


def _normed_forward(epsilon, readers, x, scale):
    (n,) = _call("forward", x, *[None] * 5, scale, epsilon=epsilon)
    n = checkpoint_name(n, "normed")
    return (x, [n] * readers), (x, scale)


def _normed_backward(epsilon, readers, residuals, cotangents):
    x, scale = residuals
    du, dn = cotangents
    arrays = x, *[None] * 5, scale, du, dn, None
    dx, sums = _call("backward", *arrays, epsilon=epsilon, of_branch=False)
    return dx, jnp.sum(sums, axis=0)


normed.defvjp(_normed_forward, _normed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def added(
    epsilon: float, readers: int, x: jax.Array, branch: jax.Array, scale: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The sum of a stream and a branch, and its norm.

    Args:
        epsilon: added to the mean of squares over the channels.
        readers: as of `normed`.
        x: [B, T, D] float32.
        branch: [B, T, D] bfloat16 or float32.
        scale: [D] float32.

    Returns:
        x + branch [B, T, D] float32 and `readers` times its norm [B, T, D] bfloat16.
    """
    return _added_forward(epsilon, readers, x, branch, scale)[0]


def _added_forward(epsilon, readers, x, branch, scale):
    arrays = _call("forward", x, branch, *[None] * 4, scale, epsilon=epsilon)
    u, n = (checkpoint_name(z, "added") for z in arrays)
    return (u, [n] * readers), (u, jnp.zeros((), branch.dtype), scale)


def _added_backward(epsilon, readers, residuals, cotangents):
    u, like, scale = residuals
    du, dn = cotangents
    narrow = like.dtype == jnp.bfloat16
    arrays = u, *[None] * 5, scale, du, dn, None
    dx, *d_branch, sums = _call("backward", *arrays, epsilon=epsilon, of_branch=narrow)
    return dx, d_branch[0] if narrow else dx, jnp.sum(sums, axis=0)


added.defvjp(_added_forward, _added_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(
    epsilon: float,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of a stream and two branches that share one gate a token, and its norm.

    Args:
        epsilon: added to the mean of squares over the channels.
        x: [B, T, D] float32.
        a, b: [B, T, D] bfloat16.
        kernel: [2 D] float32, of the gate g = sigmoid([a; b] kernel + bias).
        bias: [1] float32.
        scale: [D] float32.

    Returns:
        x + g a + (1 - g) b [B, T, D] float32, its norm [B, T, D] bfloat16, and g [B, T, 1] float32.
    """
    return _gated_forward(epsilon, x, a, b, kernel, bias, scale)[0]


def _gated_forward(epsilon, *arrays):
    *of_gate, scale = arrays
    u, n, g = _call("forward", *of_gate, None, scale, epsilon=epsilon)
    return (u, checkpoint_name(n, "gated"), g.reshape(*u.shape[:-1], 1)), arrays


def _gated_backward(epsilon, residuals, cotangents):
    (*of_gate, scale), (du, dn, dg) = residuals, cotangents
    arrays = *of_gate, None, scale, du, [dn], dg.reshape(-1)
    dx, da, db, sums = _call("backward", *arrays, epsilon=epsilon, of_branch=False)
    width = dx.shape[-1]
    sums = jnp.sum(sums, axis=0)
    return dx, da, db, sums[width : 3 * width], sums[3 * width : 3 * width + 1], sums[:width]


gated.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blended(
    epsilon: float,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    score: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like `gated`, for a gate g = sigmoid(score + bias_a - bias_b) of a score from elsewhere.

    Args:
        epsilon, x, a, b, scale: as of `gated`.
        score: [B, T, 1] float32.
        bias: [2] float32, bias_a and bias_b, whose difference costs a kernel of its own outside.

    Returns:
        x + g a + (1 - g) b [B, T, D] float32, its norm [B, T, D] bfloat16, and g [B, T, 1] float32.
    """
    return _blended_forward(epsilon, x, a, b, score, bias, scale)[0]


def _blended_forward(epsilon, x, a, b, score, bias, scale):
    arrays = x, a, b, None, bias, score.reshape(-1), scale
    u, n, g = _call("forward", *arrays, epsilon=epsilon)
    return (u, checkpoint_name(n, "blended"), g.reshape(score.shape)), arrays


def _blended_backward(epsilon, arrays, cotangents):
    du, dn, dg = cotangents
    arrays = *arrays, du, [dn], dg.reshape(-1)
    dx, da, db, d_score, sums = _call("backward", *arrays, epsilon=epsilon, of_branch=False)
    width, sums = dx.shape[-1], jnp.sum(sums, axis=0)
    d_score = d_score.reshape(*dx.shape[:-1], 1)
    slope = sums[width]
    return dx, da, db, d_score, jnp.stack([slope, -slope]), sums[:width]


blended.defvjp(_blended_forward, _blended_backward)


def _call(name, *arrays, **options):
    """A kernel of residual_norm_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import residual_norm_kernels
    from gt_jax.kernels.pallas.launch import of_models

    return of_models(functools.partial(getattr(residual_norm_kernels, name), **options))(*arrays)
