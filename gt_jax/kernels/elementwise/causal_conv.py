"""Mamba-2's short convolution, fused with the split before it and the join of the gradient.

The input projection of Mamba-2 gives [z | xBC | dt] for every token. `split_and_convolve` reads xBC
where it lies there and writes silu(conv(xBC)) as the three arrays that the recurrence takes; its
gradient goes straight back beside that of z. Every number is read and written once.

z itself is not copied: `split_and_convolve` hands on the whole projection, of which gated_norm.py
reads z in place. That array has one reader, and its gradient one writer for each column: the norm
writes the columns of z and leaves all others to the convolution, which fills them in.
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.causal_conv_sizes import WIDTH, Sizes
from gt_jax.kernels.pallas.devices import portable_unsupported


def unsupported(sizes: Sizes, tokens: tuple[int, int], dtype: str) -> str | None:
    """Why the fused kernels do not take a call, or None.

    Args:
        sizes: columns of the projection.
        tokens: (B, T).
        dtype: of the projection.
    """
    if reason := portable_unsupported():
        return reason
    if dtype != "bfloat16":
        return f"the fused convolution is for bfloat16; this is {dtype}"
    from gt_jax.kernels.elementwise import causal_conv_kernels

    return causal_conv_kernels.unsupported(sizes, *tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def split_and_convolve(
    sizes: Sizes,
    projected: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Splits [z | xBC | dt] and gives silu(bias + sum over i of weight_i xBC_{t-3+i}) of xBC.

    Args:
        sizes: the columns.
        projected: [B, T, sizes.padded_width] bfloat16.
        weight: [channels, 4] float32; the last column weighs the token itself.
        bias: [channels] float32.
        seen: [B, T] int32, how many tokens before a token belong to its document; None for all of
            its row.

    Returns:
        `projected`, of which only z may be read and only by one reader that takes its gradient as
        gated_norm.py does; values [B, T, inner], B and C [B, T, state], dt [B, T, heads] in
        bfloat16.
    """
    values, B, C = _call("forward", sizes, seen, projected, _taps(weight, bias))
    begin = sizes.inner + sizes.channels
    return projected, values, B, C, projected[..., begin : begin + sizes.heads]


def _taps(weight, bias):
    """[5, channels]: the weights of the four tokens, then the bias."""
    return jnp.concatenate([weight.T, bias[None]])


def _call(name, sizes, seen, *arrays):
    """A kernel of causal_conv_kernels.py, whose arrays begin with an axis of models."""
    from gt_jax.kernels.elementwise import causal_conv_kernels
    from gt_jax.kernels.pallas.launch import batched_as_rows

    kernel = getattr(causal_conv_kernels, name)

    def run(projected, taps, *arrays):
        marks = None
        if seen is not None:
            *arrays, marks = arrays
        return kernel(projected, taps, marks, *arrays, sizes=sizes)

    marks = () if seen is None else (seen,)
    return [z[0] for z in batched_as_rows(run)(*(z[None] for z in (*arrays, *marks)))]


def _forward(sizes, projected, weight, bias, seen):
    results = split_and_convolve(sizes, projected, weight, bias, seen)
    return results, (projected, weight, bias, seen)


def _backward(sizes, residuals, cotangents):
    projected, weight, bias, seen = residuals
    d_projected, dx, dB, dC, d_dt = cotangents
    d_projected, d_taps = _call(
        "backward", sizes, seen, projected, _taps(weight, bias), d_projected, dx, dB, dC
    )
    begin = sizes.inner + sizes.channels
    end = projected.shape[-1] - begin - sizes.heads
    d_dt = jnp.pad(d_dt, ((0, 0), (0, 0), (0, end)))
    d_projected = jax.lax.dynamic_update_slice(d_projected, d_dt, (0, 0, begin))
    d_taps = jnp.sum(d_taps, axis=0)
    return d_projected, d_taps[:-1].T, d_taps[-1], None


split_and_convolve.defvjp(_forward, _backward)


def tokens_seen(index: jax.Array) -> jax.Array:
    """How many of the 3 tokens before a token are of its document, [B, T] int32.

    Args:
        index: [B, T] int32, number of the token's document in its row.
    """
    before = [
        jnp.pad(index[:, :-n], ((0, 0), (n, 0)), constant_values=-1) == index
        for n in range(1, min(WIDTH, index.shape[1]))
    ]
    return sum((z.astype(jnp.int32) for z in before), jnp.zeros_like(index))
