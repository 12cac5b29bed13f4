"""The Pallas kernels of residual_norm.py; residual_norm_rows.py says how they divide their work.

With r = 1 / sqrt(mean(u^2) + epsilon), the cotangents dn (a sum of several) and du of the stream,

    total = du + r dn scale - u r^3 mean(dn scale u);   d scale = sum over tokens of dn u r

of u = x or x + branch. Of u = x + g a + (1 - g) b with g = sigmoid([a; b] kernel + bias),

    s = g (1 - g) (dg + sum over channels of total (a - b))
    da = g total + s kernel_a;   db = (1 - g) total + s kernel_b
    d kernel = sum over tokens of s [a; b];   d bias = sum over tokens of s

With g = sigmoid(score + bias_a - bias_b) of a given score, s is its gradient; there is no kernel.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels.elementwise.residual_norm_rows import (
    Tokens,
    grid_for,
    plus,
    run,
    sigmoid_of_scalar,
    wide,
)
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import lowered_once


class _Stream(Tokens):
    """What both directions compute of a token."""

    def gate(self, a, b, score, turn):
        """g of two branches; kernel_a and kernel_b, or None if the score of g is given."""
        refs = self.refs
        if score is not None:
            bias = refs.bias_gmem[self.model, 0] - refs.bias_gmem[self.model, 1]
            return sigmoid_of_scalar(score + bias), None
        kernels = [self.parameter(refs.gate_gmem, n * self.width) for n in (0, 1)]
        score = rows.zeros(self.row)
        for z, weights in zip((a, b), kernels):
            for value, weight in zip(wide(z), weights):
                score += value * weight
        (score,) = rows.sums_over_row([score], self.row, refs.score, turn)
        return sigmoid_of_scalar(score + refs.bias_gmem[self.model, 0]), kernels

    def stream(self, x, a, b, gate):
        """u."""
        u = wide(x)
        if gate is not None:
            return [x + (gate * a + (1 - gate) * b) for x, a, b in zip(u, wide(a), wide(b))]
        return u if a is None else [x + a for x, a in zip(u, wide(a))]


@lowered_once("epsilon")
def forward(
    x: jax.Array,
    a: jax.Array | None,
    b: jax.Array | None,
    gate: jax.Array | None,
    bias: jax.Array | None,
    score: jax.Array | None,
    scale: jax.Array,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """u unless it is x, and u / sqrt(mean(u^2) + epsilon) scale in bfloat16: [M, B, T, D] each;
    if there is b, g [M, B T] float32.

    Args:
        x: [M, B, T, D] float32 of M models.
        a: [M, B, T, D] bfloat16 or float32, a branch, or None.
        b: [M, B, T, D] bfloat16, the branch that a gate joins to a, or None.
        gate: [M, 2 D] float32, kernel_a and kernel_b, or None.
        bias: [M, 1] float32, with b alone; [M, 2], bias_a and bias_b, with a score.
        score: [M, B T] float32, with b where there is no `gate`.
        scale: [M, D] float32.
        epsilon: added to the mean of squares.
    """
    width = x.shape[-1]
    grid = grid_for(x, "forward", b is not None)

    def body(refs):
        here = _Stream(refs, grid)
        scales = here.parameter(refs.scale_gmem)

        def read(token):
            given = None if score is None else refs.score_gmem[token.at]
            return *(here.read(z, token) for z in (refs.x_gmem, refs.a_gmem, refs.b_gmem)), given

        def compute(token, x, a, b, given):
            gate = None if b is None else here.gate(a, b, given, token.turn)[0]
            if refs.g_gmem is not None:
                here.store_number(refs.g_gmem, token, gate)
            u = here.stream(x, a, b, gate)
            squares = sum((z * z for z in u), rows.zeros(grid.row))
            (squares,) = rows.sums_over_row([squares], grid.row, refs.row_sums, token.turn)
            inverse = lax.rsqrt(squares * (1 / width) + epsilon)
            for i, (z, scale) in enumerate(zip(u, scales)):
                if a is not None:
                    here.store(refs.u_gmem, token, i, z)
                here.store(refs.n_gmem, token, i, z * (inverse * scale))

        here.walk(read, compute)

    of_gate = jax.ShapeDtypeStruct((grid.models, grid.tokens), jnp.float32)
    return run(
        grid,
        body,
        "residual_norm_forward",
        {"x": x, "a": a, "b": b, "gate": gate, "bias": bias, "score": score, "scale": scale},
        {
            "u": None if a is None else x,
            "n": jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            "g": None if b is None else of_gate,
        },
        {
            "row_sums": rows.sums_scratch(1),
            "score": None if gate is None else rows.sums_scratch(1),
        },
    )


@lowered_once("epsilon", "of_branch")
def backward(
    x: jax.Array,
    a: jax.Array | None,
    b: jax.Array | None,
    gate: jax.Array | None,
    bias: jax.Array | None,
    score: jax.Array | None,
    scale: jax.Array,
    du: jax.Array,
    dn: list[jax.Array],
    dg: jax.Array | None,
    *,
    epsilon: float,
    of_branch: bool,
) -> list[jax.Array]:
    """Gradients of `forward`.

    Args:
        x, a, b, gate, bias, score, scale, epsilon: as of `forward`.
        du: [M, B, T, D] float32, cotangent of u.
        dn: arrays [M, B, T, D] bfloat16 whose sum is the cotangent of the norm.
        dg: [M, B T] float32, cotangent of g, if there is b.
        of_branch: whether the gradient is wanted in bfloat16 as well, for a branch.

    Returns:
        total [M, B, T, D] float32; the same in bfloat16 if of_branch; da, db [M, B, T, D] bfloat16
        if there is b; d score [M, B T] float32 if there is a score; sums over tokens, to be added
        over the second axis, [M, blocks, S] float32: d scale; d kernel_a and d kernel_b if there is
        a kernel of a gate; copies of d bias if there is b.
    """
    width, gated, learned = x.shape[-1], b is not None, gate is not None
    grid = grid_for(x, "backward", gated)
    row = grid.row

    def body(refs):
        here = _Stream(refs, grid)
        cotangents = [getattr(refs, f"dn{i}_gmem") for i in range(len(dn))]

        def read(token):
            x = here.read(refs.x_gmem, token)
            given = refs.a_gmem, refs.b_gmem, refs.du_gmem, *cotangents
            a, b, du, *of_norm = (here.read(z, token, or_zeros=True) for z in given)
            of_token = lambda ref: None if ref is None else ref[token.at]
            return x, a, b, du, tuple(of_norm), of_token(refs.score_gmem), of_token(refs.dg_gmem)

        def compute(token, sums, x, a, b, du, dn, score, dg):
            gate, kernels = here.gate(a, b, score, token.turn) if gated else (None, None)
            u = here.stream(x, a, b, gate)
            scales = here.parameter(refs.scale_gmem)  # again for each token: saves registers
            dn = [sum(wide(z)[1:], z[0].astype(jnp.float32)) for z in zip(*dn)]
            squares = along = rows.zeros(row)
            for z, d, scale in zip(u, dn, scales):
                squares += z * z
                along += d * scale * z
            given = [squares, along]
            squares, along = rows.sums_over_row(given, row, refs.row_sums, token.turn)
            inverse = lax.rsqrt(squares * (1 / width) + epsilon)
            along *= inverse * inverse * inverse * (1 / width)
            totals, of_scale = [], []
            for z, d, scale, rest, total in zip(u, dn, scales, du, sums):
                d = d * inverse
                of_scale.append(total + d * z)
                totals.append(rest + (d * scale - z * along))
            if gated:
                a, b = wide(a), wide(b)
                slope = sum((t * (y - z) for t, y, z in zip(totals, a, b)), rows.zeros(row))
                (slope,) = rows.sums_over_row([slope], row, refs.slopes, token.turn)
                slope = (slope + dg) * gate * (1 - gate)
                if not learned:
                    here.store_number(refs.d_score_gmem, token, slope)
            for i, t in enumerate(totals):
                here.store(refs.dx_gmem, token, i, t)
                if of_branch:
                    here.store(refs.da_gmem, token, i, t)
                if gated:
                    da, db = gate * t, (1 - gate) * t
                    if learned:
                        da, db = da + slope * kernels[0][i], db + slope * kernels[1][i]
                    here.store(refs.da_gmem, token, i, da)
                    here.store(refs.db_gmem, token, i, db)
            of_kernels = [slope * z for z in (*a, *b)] if learned else []
            of_bias = [here.existing(slope, token)] if gated else []
            return *of_scale, *plus(sums[grid.sections :], [*of_kernels, *of_bias])

        here.walk_and_sum(read, compute, summed)

    summed = (3 * width if learned else width) + (row.channels if gated else 0)
    narrow = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    return run(
        grid,
        body,
        "residual_norm_backward",
        {"x": x, "a": a, "b": b, "du": du, "gate": gate, "bias": bias, "score": score}
        | {"scale": scale, "dg": dg}
        | {f"dn{i}": z for i, z in enumerate(dn)},
        {
            "dx": x,
            "da": narrow if gated or of_branch else None,
            "db": narrow if gated else None,
            "d_score": score,
        },
        {
            "row_sums": rows.sums_scratch(2),
            "score": rows.sums_scratch(1) if learned else None,
            "slopes": rows.sums_scratch(1) if gated else None,
        },
        summed,
    )
