"""The Pallas kernels of gated_branches.py; residual_norm_rows.py says how they divide their work.

With n = a / sqrt(mean(a^2) + epsilon), g = sigmoid(z_a + bias_a) and the cotangent dc of c,

    d z_a = dc g (1 - g) n scale_a;   d n = dc g scale_a;   d scale_a = sum over tokens of dc g n
    da = (d n - n mean(d n n)) / sqrt(mean(a^2) + epsilon)

and likewise for b. Of y = w a + (1 - w) b with w = sigmoid(c . head + bias),

    s = w (1 - w) (dw + sum over channels of dy (a - b));   dc = s head
    da and db grow by w dy and (1 - w) dy;   d head = sum over tokens of s c
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.elementwise.residual_norm_rows import (
    Tokens,
    flat,
    grid_for,
    place,
    sigmoid_of_scalar,
    store_sums,
    wide,
)
from gt_jax.kernels.pallas import row_numbers, rows
from gt_jax.kernels.pallas.launch import kernel, loop, lowered_once

Pair = tuple[jax.Array, jax.Array]


class _Gated(Tokens):
    """What both directions compute of a token."""

    def read_all(self, token, keep=None):
        """Sections of a, b, z_a and z_b."""
        refs = self.refs
        a, b = (self.read(z, token, keep) for z in (refs.a_gmem, refs.b_gmem))
        scores = [self.read(refs.scores_gmem, token, keep, n * self.width) for n in (0, 1)]
        return a, b, *scores

    def gates(self, *scores):
        """sigmoid(z + bias) of each branch."""
        biases = self.refs.bias_a_gmem, self.refs.bias_b_gmem
        gates = []
        for z, bias in zip(map(wide, scores), biases):
            if bias is not None:
                z = [z + own for z, own in zip(z, self.parameter(bias))]
            gates.append([rows.sigmoid(z) for z in z])
        return gates

    def weight(self, c, head, turn):
        """w."""
        score = sum((z * y for z, y in zip(c, head)), rows.zeros(self.row))
        (score,) = rows.sums_over_row([score], self.row, self.refs.score, turn)
        return sigmoid_of_scalar(score + self.refs.head_bias_gmem[self.model, 0])


def _inputs(a, b, scores, biases, scales, head):
    (bias_a, bias_b), (scale_a, scale_b) = biases or (None, None), scales
    head, head_bias = head or (None, None)
    return {
        **{"a": flat(a), "b": flat(b), "scores": flat(scores)},
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
    grid, models = grid_for(a, "forward", True), len(a)
    row = grid.row

    def body(refs):
        m, token, kept = place(grid)
        here = _Gated(refs, grid, m)

        def step(n, values):
            following = here.read_all(token(jnp.minimum(n + 1, grid.steps - 1)))
            turn, at = lax.rem(n, jnp.int32(2)), (m, token(n))
            a, b = map(wide, values[:2])
            of_a, of_b = here.inverses((a, b), epsilon, turn)
            gates_a, gates_b = here.gates(*values[2:])
            scales = zip(here.parameter(refs.scale_a_gmem), here.parameter(refs.scale_b_gmem))
            out = [
                g * (x * (of_a * s)) + h * (y * (of_b * t))
                for g, x, h, y, (s, t) in zip(gates_a, a, gates_b, b, scales)
            ]
            if refs.head_gmem is not None:
                w = here.weight(out, here.parameter(refs.head_gmem), turn)
                row_numbers.store(refs.w_gmem, at, w, kept(n))
                out = [w * x + (1 - w) * y for x, y in zip(a, b)]
            for c, z in zip(here.columns, out):
                rows.store(refs.out_gmem, at, c, z.astype(jnp.bfloat16), row, kept(n))
            return following

        loop(grid.steps, step, here.read_all(token(jnp.int32(0))))

    weights = jax.ShapeDtypeStruct((models, grid.tokens), jnp.float32)
    out, *w = kernel(
        body,
        name="gated_branches_forward",
        inputs=_inputs(a, b, scores, biases, scales, head),
        outputs={"out": _like(a, grid), "w": weights if head else None},
        scratch={"row_sums": rows.sums_scratch(2), "score": rows.sums_scratch(1) if head else None},
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [out.reshape(a.shape), *w]


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
    grid, models = grid_for(a, "backward", True), len(a)
    row, width = grid.row, a.shape[-1]
    summed = 3 * width + row.channels if head else (4 if biases else 2) * width

    def body(refs):
        m, token, kept = place(grid)
        here = _Gated(refs, grid, m)

        def read(n):
            # Zeros where there is no token, which then adds nothing to any sum.
            n = jnp.minimum(n, grid.steps - 1)
            dw = refs.dw_gmem[m, token(n)] if head else None
            d_out = here.read(refs.d_out_gmem, token(n), kept(n))
            return *here.read_all(token(n), kept(n)), d_out, dw

        def step(n, carry):
            (*values, d_out, dw), sums = carry
            following = read(n + 1)  # arrives while this token is computed
            turn, at, keep = lax.rem(n, jnp.int32(2)), (m, token(n)), kept(n)
            a, b, dc = map(wide, (*values[:2], d_out))
            slope = [sum((d * (x - y) for d, x, y in zip(dc, a, b)), rows.zeros(row))]
            of_a, of_b, *slope = here.inverses((a, b), epsilon, turn, *(slope if head else []))
            gates = here.gates(*values[2:])
            scales = [here.parameter(z) for z in (refs.scale_a_gmem, refs.scale_b_gmem)]
            normed = [[x * of_a for x in a], [x * of_b for x in b]]
            straight = None
            if head:
                terms = zip(*(zip(*z) for z in (gates, normed, scales)))
                c = [g * x * s + h * y * t for (g, h), (x, y), (s, t) in terms]
                heads = here.parameter(refs.head_gmem)
                w = here.weight(c, heads, turn)
                straight = [[w * d for d in dc], [(1 - w) * d for d in dc]]
                slope = (slope[0] + dw) * w * (1 - w)
                dc = [slope * z for z in heads]
            d_scores = [
                [d * (g * (1 - g)) * x * s for d, g, x, s in zip(dc, *of_one)]
                for of_one in zip(gates, normed, scales)
            ]
            of_gate = [[d * g for d, g in zip(dc, z)] for z in gates]
            of_scale = [[d * x for d, x in zip(*z)] for z in zip(of_gate, normed)]
            along = [
                sum((d * s for d, s in zip(*z)), rows.zeros(row)) for z in zip(of_scale, scales)
            ]
            along = rows.sums_over_row(along, row, refs.along, turn)
            for i, ref in enumerate((refs.da_gmem, refs.db_gmem)):
                inverse, mean = (of_a, of_b)[i], along[i] * (1 / width)
                for j, column in enumerate(here.columns):
                    d = (of_gate[i][j] * scales[i][j] - normed[i][j] * mean) * inverse
                    d = d + straight[i][j] if straight else d
                    rows.store(ref, at, column, d.astype(jnp.bfloat16), row, keep)
                    d = d_scores[i][j].astype(jnp.bfloat16)
                    rows.store(refs.d_scores_gmem, at, column + i * width, d, row, keep)
            added = [z for pair in of_scale for z in pair]
            if head:
                slopes = rows.zeros(row) + slope
                slopes = slopes if keep is None else rows.masked(slopes, keep)
                added += [*(slope * z for z in c), slopes]
            elif biases:
                added += [z for pair in d_scores for z in pair]
            return following, tuple(x + y for x, y in zip(sums, added))

        zeros = tuple(rows.zeros(row) for _ in range(summed // row.channels))
        _, sums = loop(grid.steps, step, (read(jnp.int32(0)), zeros))
        store_sums(refs.sums_gmem, refs.sums, grid, m, sums)

    inputs = _inputs(a, b, scores, biases, scales, head)
    da, db, d_scores, sums = kernel(
        body,
        name="gated_branches_backward",
        inputs=inputs | {"d_out": flat(d_out), "dw": dw},
        outputs={
            **{"da": _like(a, grid), "db": _like(b, grid), "d_scores": _like(scores, grid)},
            "sums": jax.ShapeDtypeStruct((models, grid.blocks, summed), jnp.float32),
        },
        scratch={
            "sums": plgpu.SMEM((row.number, summed), jnp.float32),
            "row_sums": rows.sums_scratch(3 if head else 2),
            "along": rows.sums_scratch(2),
            "score": rows.sums_scratch(1) if head else None,
        },
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [*(z.reshape(x.shape) for z, x in ((da, a), (db, b), (d_scores, scores))), sums]


def _like(x, grid):
    return jax.ShapeDtypeStruct((len(x), grid.tokens, x.shape[-1]), x.dtype)
