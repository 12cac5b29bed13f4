"""The Pallas kernels of weighted_norms.py; residual_norm_rows.py says how they divide their work.

With r and m the scaled norms of a and b, the cotangents dc, dw, and dn of n from elsewhere,

    s = w (1 - w) (dw + sum over channels of dc (r - m)),   dn grows by s head
    d head = sum over tokens of s n,   d bias_a = -d bias_b = sum over tokens of s

and normed_branches.py has the gradients of norms with the cotangents w dc and (1 - w) dc.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.normed_branches import Branches
from gt_jax.kernels.elementwise.residual_norm_rows import (
    grid_for,
    plus,
    run,
    sigmoid_of_scalar,
    wide,
)
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import lowered_once


class _Weighted(Branches):
    """What both directions compute of a token."""

    def normed(self, branches, n, epsilon, turn):
        """1 / sqrt(mean of squares + epsilon) of each branch, each divided by it, and w."""
        heads = self.parameter(self.refs.head_gmem)
        score = sum((z * h for z, h in zip(n, heads)), rows.zeros(self.row))
        *inverses, score = self.inverses(branches, epsilon, turn, score)
        bias = self.refs.bias_gmem[self.model, 0] - self.refs.bias_gmem[self.model, 1]
        normed = [[z * r for z in x] for x, r in zip(branches, inverses)]
        return inverses, normed, sigmoid_of_scalar(score + bias)


@lowered_once("epsilon")
def forward(
    a: jax.Array,
    b: jax.Array,
    n: jax.Array,
    scale_a: jax.Array,
    scale_b: jax.Array,
    head: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """c [M, B, T, D] bfloat16 and w [M, B T] float32.

    Args:
        a, b, n: [M, B, T, D] bfloat16 of M models.
        scale_a, scale_b, head: [M, D] float32.
        bias: [M, 2] float32, bias_a and bias_b.
        epsilon: added to the mean of squares.
    """
    grid = grid_for(a, "forward", True)

    def body(refs):
        here = _Weighted(refs, grid)

        def compute(token, *values):
            *branches, n = map(wide, values)
            _, normed, w = here.normed(branches, n, epsilon, token.turn)
            here.store_number(refs.w_gmem, token, w)
            for i, (x, y, s, t) in enumerate(zip(*normed, *here.scales())):
                here.store(refs.c_gmem, token, i, w * (x * s) + (1 - w) * (y * t))

        here.walk(lambda token: here.read_each("abn", token), compute)

    return run(
        grid,
        body,
        "weighted_norms_forward",
        {"a": a, "b": b, "n": n, "scale_a": scale_a, "scale_b": scale_b}
        | {"head": head, "bias": bias},
        {"c": a, "w": jax.ShapeDtypeStruct((grid.models, grid.tokens), jnp.float32)},
        {"row_sums": rows.sums_scratch(3)},
    )


@lowered_once("epsilon")
def backward(
    a: jax.Array,
    b: jax.Array,
    n: jax.Array,
    scale_a: jax.Array,
    scale_b: jax.Array,
    head: jax.Array,
    bias: jax.Array,
    dn: jax.Array,
    dc: jax.Array,
    dw: jax.Array,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """Gradients of `forward`.

    Args:
        a, b, n, scale_a, scale_b, head, bias, epsilon: as of `forward`.
        dn: [M, B, T, D] bfloat16, cotangent of n from elsewhere.
        dc: [M, B, T, D] bfloat16.
        dw: [M, B T] float32.

    Returns:
        da, db and the whole of dn, [M, B, T, D] bfloat16; sums over tokens, to be added over the
        second axis, [M, blocks, S] float32: d scale_a, d scale_b, d head and copies of d bias_a.
    """
    grid, width = grid_for(a, "backward", True), a.shape[-1]

    def body(refs):
        here = _Weighted(refs, grid)

        def read(token):
            values = here.read_each(("a", "b", "n", "dn", "dc"), token, or_zeros=True)
            return *values, refs.dw_gmem[token.at]

        def compute(token, sums, *values):
            *branches, n, dn, dc = map(wide, values[:-1])
            inverses, normed, w = here.normed(branches, n, epsilon, token.turn)
            scales = here.scales()
            of_scale, along = here.along_norms((dc, dc), normed, scales, token.turn)
            slope = (along[0] - along[1] + values[-1]) * w * (1 - w)
            for j, (ref, share) in enumerate(((refs.da_gmem, w), (refs.db_gmem, 1 - w))):
                given = dc, normed[j], scales[j], along[j], inverses[j] * share
                for i, d in enumerate(here.through_norm(*given)):
                    here.store(ref, token, i, d)
            for i, (d, h) in enumerate(zip(dn, here.parameter(refs.head_gmem))):
                here.store(refs.d_n_gmem, token, i, d + slope * h)
            of_scales = [*(w * z for z in of_scale[0]), *((1 - w) * z for z in of_scale[1])]
            slopes = here.existing(slope, token)
            return plus(sums, [*of_scales, *(slope * z for z in n), slopes])

        here.walk_and_sum(read, compute, summed)

    summed = 3 * width + grid.row.channels
    return run(
        grid,
        body,
        "weighted_norms_backward",
        {"a": a, "b": b, "n": n, "scale_a": scale_a, "scale_b": scale_b}
        | {"head": head, "bias": bias, "dn": dn, "dc": dc, "dw": dw},
        {"da": a, "db": b, "d_n": n},
        {"row_sums": rows.sums_scratch(3), "along": rows.sums_scratch(2)},
        summed,
    )
