"""The Pallas kernels of gated_branches.py; residual_norm_rows.py says how they divide their work.

With n = a / sqrt(mean(a^2) + epsilon), g = sigmoid(z_a + bias_a) and the cotangent dc of c,

    d z_a = dc g (1 - g) n scale_a

and likewise for b; normed_branches.py has the gradients of norms with the cotangents dc g. Of
y = w a + (1 - w) b with w = sigmoid(c . head + bias),

    s = w (1 - w) (dw + sum over channels of dy (a - b));   dc = s head
    da and db grow by w dy and (1 - w) dy;   d head = sum over tokens of s c
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
from gt_jax.kernels.pallas import row_functions, rows
from gt_jax.kernels.pallas.launch import lowered_once

Pair = tuple[jax.Array, jax.Array]


class _Gated(Branches):
    """What both directions compute of a token."""

    def read_all(self, token, or_zeros=False):
        """Sections of a, b, z_a and z_b."""
        branches = self.read_each("ab", token, or_zeros)
        scores = (self.read(self.refs.scores_gmem, token, n * self.width, or_zeros) for n in (0, 1))
        return *branches, *scores

    def gates(self, *scores):
        """sigmoid(z + bias) of each branch."""
        biases = self.refs.bias_a_gmem, self.refs.bias_b_gmem
        gates = []
        for z, bias in zip(map(wide, scores), biases):
            if bias is not None:
                z = [z + own for z, own in zip(z, self.parameter(bias))]
            gates.append([row_functions.sigmoid(z) for z in z])
        return gates

    def weight(self, c, head, turn):
        """w."""
        score = sum((z * y for z, y in zip(c, head)), rows.zeros(self.row))
        (score,) = rows.sums_over_row([score], self.row, self.refs.score, turn)
        bias = self.refs.head_bias_gmem[self.model, 0] - self.refs.head_bias_gmem[self.model, 1]
        return sigmoid_of_scalar(score + bias)


def _inputs(a, b, scores, biases, scales, head):
    (bias_a, bias_b), (scale_a, scale_b) = biases or (None, None), scales
    head, head_bias = head or (None, None)
    return {
        **{"a": a, "b": b, "scores": scores},
        **{"bias_a": bias_a, "bias_b": bias_b, "scale_a": scale_a, "scale_b": scale_b},
        **{"head": head, "head_bias": head_bias},
    }


@lowered_once("epsilon")
def forward(
    a: jax.Array,
    b: jax.Array,
    scores: jax.Array,
    biases: Pair | None,
    scales: Pair,
    head: Pair | None,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """c [M, B, T, D] bfloat16; if there is a head, y in its place and w [M, B T] float32.

    Args:
        a, b: [M, B, T, D] bfloat16 of M models.
        scores: [M, B, T, 2 D] bfloat16, z_a and z_b.
        biases: [M, D] float32, of a and of b, or None.
        scales: [M, D] float32, of a and of b.
        head: [M, D] and [M, 1] float32, head and bias of w, or None.
        epsilon: added to the mean of squares.
    """
    grid = grid_for(a, "forward", True)

    def body(refs):
        here = _Gated(refs, grid)

        def compute(token, *values):
            a, b = map(wide, values[:2])
            of_a, of_b = here.inverses((a, b), epsilon, token.turn)
            gates = here.gates(*values[2:])
            out = [
                g * (x * (of_a * s)) + h * (y * (of_b * t))
                for g, h, x, y, s, t in zip(*gates, a, b, *here.scales())
            ]
            if refs.head_gmem is not None:
                w = here.weight(out, here.parameter(refs.head_gmem), token.turn)
                here.store_number(refs.w_gmem, token, w)
                out = [w * x + (1 - w) * y for x, y in zip(a, b)]
            for i, z in enumerate(out):
                here.store(refs.out_gmem, token, i, z)

        here.walk(here.read_all, compute)

    weights = jax.ShapeDtypeStruct((grid.models, grid.tokens), jnp.float32)
    return run(
        grid,
        body,
        "gated_branches_forward",
        _inputs(a, b, scores, biases, scales, head),
        {"out": a, "w": weights if head else None},
        {"row_sums": rows.sums_scratch(2), "score": rows.sums_scratch(1) if head else None},
    )


@lowered_once("epsilon")
def backward(
    a: jax.Array,
    b: jax.Array,
    scores: jax.Array,
    biases: Pair | None,
    scales: Pair,
    head: Pair | None,
    d_out: jax.Array,
    dw: jax.Array | None,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """Gradients of `forward`.

    Args:
        a, b, scores, biases, scales, head, epsilon: as of `forward`.
        d_out: [M, B, T, D] bfloat16, cotangent of its first result.
        dw: [M, B T] float32, cotangent of w, if there is a head.

    Returns:
        da, db and d scores, in their shapes, bfloat16; sums over tokens, to be added over the
        second axis, [M, blocks, S] float32: d scale_a, d scale_b and either d bias_a, d bias_b or,
        if there is a head, d head and copies of d bias.
    """
    grid, width = grid_for(a, "backward", True), a.shape[-1]

    def body(refs):
        here = _Gated(refs, grid)

        def read(token):
            dw = refs.dw_gmem[token.at] if head else None
            d_out = here.read(refs.d_out_gmem, token, or_zeros=True)
            return *here.read_all(token, or_zeros=True), d_out, dw

        def compute(token, sums, *values):
            *values, d_out, dw = values
            a, b, dc = map(wide, (*values[:2], d_out))
            slope = [sum((d * (x - y) for d, x, y in zip(dc, a, b)), rows.zeros(grid.row))]
            slope = slope if head else []
            of_a, of_b, *slope = here.inverses((a, b), epsilon, token.turn, *slope)
            gates, scales = here.gates(*values[2:]), here.scales()
            normed = [[x * of_a for x in a], [x * of_b for x in b]]
            straight = None
            if head:
                terms = zip(*(zip(*z) for z in (gates, normed, scales)))
                c = [g * x * s + h * y * t for (g, h), (x, y), (s, t) in terms]
                heads = here.parameter(refs.head_gmem)
                w = here.weight(c, heads, token.turn)
                straight = [[w * d for d in dc], [(1 - w) * d for d in dc]]
                slope = (slope[0] + dw) * w * (1 - w)
                dc = [slope * z for z in heads]
            d_scores = [
                [d * (g * (1 - g)) * x * s for d, g, x, s in zip(dc, *of_one)]
                for of_one in zip(gates, normed, scales)
            ]
            of_gate = [[d * g for d, g in zip(dc, z)] for z in gates]
            of_scale, along = here.along_norms(of_gate, normed, scales, token.turn)
            for n, ref in enumerate((refs.da_gmem, refs.db_gmem)):
                given = of_gate[n], normed[n], scales[n], along[n], (of_a, of_b)[n]
                for i, d in enumerate(here.through_norm(*given)):
                    here.store(ref, token, i, d + straight[n][i] if straight else d)
                    here.store(refs.d_scores_gmem, token, i, d_scores[n][i], n * width)
            added = [z for pair in of_scale for z in pair]
            if head:
                added += [*(slope * z for z in c), here.existing(slope, token)]
            elif biases:
                added += [z for pair in d_scores for z in pair]
            return plus(sums, added)

        here.walk_and_sum(read, compute, summed)

    summed = 3 * width + grid.row.channels if head else (4 if biases else 2) * width
    return run(
        grid,
        body,
        "gated_branches_backward",
        _inputs(a, b, scores, biases, scales, head) | {"d_out": d_out, "dw": dw},
        {"da": a, "db": b, "d_scores": scores},
        {
            "row_sums": rows.sums_scratch(3 if head else 2),
            "along": rows.sums_scratch(2),
            "score": rows.sums_scratch(1) if head else None,
        },
        summed,
    )
