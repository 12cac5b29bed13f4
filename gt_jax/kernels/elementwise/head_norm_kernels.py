"""Pallas kernels of a norm over the channels of each head, gated: forward and backward.

With c = y - mean(y), i = 1 / sqrt(mean(c^2) + epsilon), z = c i scale + bias and q = sigmoid(g):

    out = z g q;   dg = dout z q (1 + g (1 - q));   dz = dout g q;   dscale = sum_t dz c i
    dbias = sum_t dz;   dn = dz scale;   dy = i (dn - mean(dn) - c i mean(dn c i))

A block of the grid owns a head and walks tiles of 32 tokens, each held in registers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gt_jax.kernels.elementwise import token_shift_layout as layout
from gt_jax.kernels.pallas.launch import kernel, loop, lowered_once

ROWS = 32  # tokens of a tile: with more, a thread holds so much that few of them run at a time
_LOG2_E = math.log2(math.e)


class Tuning(NamedTuple):
    """Most tiles of 32 tokens that a block of the grid walks."""

    forward_tiles: int = 4
    backward_tiles: int = 16


TUNING = Tuning()


def _divisor(n, most):
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _sigmoid(g):
    """In float32, by approximate exponentials and logarithms: good to 1e-6, no division."""
    return jnp.exp2(-_LOG2_E * jnp.log(1 + jnp.exp2(-_LOG2_E * g)))


def _mean(z):
    """The mean of each row, in every column."""
    return layout.in_every_column(jnp.sum(z, axis=1) * (1 / z.shape[1]), z.shape[1])


def _normalised(y, epsilon):
    """Rows of mean 0 and variance 1, and what they were multiplied by."""
    c = y - _mean(y)
    inverse = lax.rsqrt(_mean(c * c) + epsilon)
    return c * inverse, inverse


def _load(ref, at):
    return layout.load(ref.at[at]).astype(jnp.float32)


def _parameter(ref, columns):
    return layout.in_every_row(layout.load_columns(ref.at[columns], ROWS), ROWS)


@lowered_once("epsilon", "tuning")
def gated(
    y: jax.Array,
    g: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    tuning: Tuning,
) -> list[jax.Array]:
    """The gated norm.

    Args:
        y: [N, H, V] bfloat16, N a multiple of 32, V one of 32.
        g: [N, H V] bfloat16 gate.
        scale, bias: [H V] float32.
        epsilon: added to the variance.
        tuning: how the work is cut.

    Returns:
        One array like g.
    """
    N, H, V = y.shape
    walked = _divisor(N // ROWS, tuning.forward_tiles)

    def body(refs):
        first = lax.axis_index("tokens") * (walked * ROWS)
        columns = pl.ds(lax.axis_index("heads") * V, V)
        scale, bias = (_parameter(z, columns) for z in (refs.scale_gmem, refs.bias_gmem))

        def step(i, carry):
            at = pl.ds(first + i * ROWS, ROWS), columns
            y, g = _load(refs.y_gmem, at), _load(refs.g_gmem, at)
            z = _normalised(y, epsilon)[0] * scale + bias
            layout.store(refs.out_gmem.at[at], (z * g * _sigmoid(g)).astype(jnp.bfloat16))
            return carry

        loop(walked, step, jnp.int32(0))

    return kernel(
        body,
        name="head_norm",
        inputs={"y": y.reshape(N, H * V), "g": g, "scale": scale, "bias": bias},
        outputs={"out": jax.ShapeDtypeStruct(g.shape, g.dtype)},
        scratch={},
        grid={"tokens": N // (walked * ROWS), "heads": H},
        threads=1,
    )


@lowered_once("epsilon", "tuning", "again")
def gradients(
    y: jax.Array,
    g: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dout: jax.Array,
    *,
    epsilon: float,
    tuning: Tuning,
    again: bool = False,
) -> list[jax.Array]:
    """Gradients of `gated`.

    Args:
        y, g, scale, bias, epsilon, tuning: as of `gated`.
        dout: like g.
        again: whether to compute the norm again.

    Returns:
        dy [N, H V] and dg like g; sums over stretches of tokens, to be added over the first axis,
        of dscale and of dbias: [S, H V] float32 each; if `again`, what `gated` gives.
    """
    N, H, V = y.shape
    walked = _divisor(N // ROWS, tuning.backward_tiles)
    stretches = N // (walked * ROWS)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def body(refs):
        stretch = lax.axis_index("tokens")
        first = stretch * (walked * ROWS)
        columns = pl.ds(lax.axis_index("heads") * V, V)

        def step(i, sums):
            at = pl.ds(first + i * ROWS, ROWS), columns
            y, g, dout = (_load(z, at) for z in (refs.y_gmem, refs.g_gmem, refs.dout_gmem))
            n, inverse = _normalised(y, epsilon)
            # Read again for each tile, which takes fewer registers than to keep them.
            scale, bias = (_parameter(z, columns) for z in (refs.scale_gmem, refs.bias_gmem))
            q = _sigmoid(g)
            z = n * scale + bias
            if again:
                layout.store(refs.out_gmem.at[at], (z * g * q).astype(bf16))
            dg = dout * z * (q * (1 + g * (1 - q)))
            layout.store(refs.dg_gmem.at[at], dg.astype(bf16))
            dz = dout * (g * q)
            dn = dz * scale
            dy = inverse * (dn - _mean(dn) - n * _mean(dn * n))
            layout.store(refs.dy_gmem.at[at], dy.astype(bf16))
            return sums[0] + dz * n, sums[1] + dz

        sums = loop(walked, step, (layout.zeros(V, ROWS), layout.zeros(V, ROWS)))
        for z, to in zip(sums, (refs.dscale_gmem, refs.dbias_gmem)):
            layout.store(to.at[stretch, columns], layout.sum_of_rows(z))

    wide, sums = jax.ShapeDtypeStruct(g.shape, bf16), jax.ShapeDtypeStruct((stretches, H * V), f32)
    dy, dg, dscale, dbias, *out = kernel(
        body,
        name="head_norm_gradients",
        inputs={"y": y.reshape(N, H * V), "g": g, "scale": scale, "bias": bias, "dout": dout},
        outputs={"dy": wide, "dg": wide, "dscale": sums, "dbias": sums}
        | {"out": wide if again else None},
        scratch={},
        grid={"tokens": stretches, "heads": H},
        threads=1,
    )
    return [dy, dg, *(layout.in_order_of_products(z, 1) for z in (dscale, dbias)), *out]
