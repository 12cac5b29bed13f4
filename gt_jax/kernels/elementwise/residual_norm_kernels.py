"""The Pallas kernels of residual_norm.py: a row of threads (pallas/rows.py) holds all channels of a
token, reads it once and sums over it inside its warps.

With r = 1 / sqrt(mean(u^2) + epsilon), the cotangents dn (a sum of several) and du of the stream,

    total = du + r dn scale - u r^3 mean(dn scale u);   d scale = sum over tokens of dn u r

of u = x or x + branch. Of u = x + g a + (1 - g) b with g = sigmoid([a; b] kernel + bias),

    s = g (1 - g) (dg + sum over channels of total (a - b))
    da = g total + s kernel_a;   db = (1 - g) total + s kernel_b
    d kernel = sum over tokens of s [a; b];   d bias = sum over tokens of s

With g = sigmoid(score + bias) of a given score, s is its gradient and there is no kernel.

A block of the grid walks tokens that lie as far apart as all blocks together are long.
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
    store_sums,
    wide,
)
from gt_jax.kernels.pallas import row_numbers, rows
from gt_jax.kernels.pallas.launch import kernel, loop, lowered_once


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
    if there is a kernel of a gate, g [M, B T] float32.

    Args:
        x: [M, B, T, D] float32 of M models.
        a: [M, B, T, D] bfloat16 or float32, a branch, or None.
        b: [M, B, T, D] bfloat16, the branch that a gate joins to a, or None.
        gate: [M, 2 D] float32, kernel_a and kernel_b, or None.
        bias: [M, 1] float32, with b alone.
        score: [M, B T] float32, with b where there is no `gate`.
        scale: [M, D] float32.
        epsilon: added to the mean of squares.
    """
    models, width = x.shape[0], x.shape[-1]
    grid = grid_for(x, "forward", b is not None)
    row = grid.row

    def body(refs):
        m, token, kept = place(grid)
        here = Tokens(refs, grid, m)
        scales = here.parameter(refs.scale_gmem)

        def read(n):
            at = token(jnp.minimum(n, grid.steps - 1))
            given = None if score is None else refs.score_gmem[m, at]
            return *(here.read(z, at) for z in (refs.x_gmem, refs.a_gmem, refs.b_gmem)), given

        def step(n, values):
            following = read(n + 1)  # arrives while this token is computed
            x, a, b, given = values
            turn = lax.rem(n, jnp.int32(2))
            gate = None if b is None else here.gate(a, b, given, turn)[0]
            if refs.g_gmem is not None:
                row_numbers.store(refs.g_gmem, (m, token(n)), gate, kept(n))
            u = here.stream(x, a, b, gate)
            squares = sum((z * z for z in u), rows.zeros(row))
            (squares,) = rows.sums_over_row([squares], row, refs.sums, turn)
            inverse = lax.rsqrt(squares * (1 / width) + epsilon)
            for c, z, scale in zip(here.columns, u, scales):
                at = m, token(n)
                if a is not None:
                    rows.store(refs.u_gmem, at, c, z, row, kept(n))
                out = (z * (inverse * scale)).astype(jnp.bfloat16)
                rows.store(refs.n_gmem, at, c, out, row, kept(n))
            return following

        loop(grid.steps, step, read(jnp.int32(0)))

    like = lambda dtype: jax.ShapeDtypeStruct((models, grid.tokens, width), dtype)
    results = kernel(
        body,
        name="residual_norm_forward",
        inputs={"x": flat(x), "a": flat(a), "b": flat(b)}
        | {"gate": gate, "bias": bias, "score": score, "scale": scale},
        outputs={
            "u": None if a is None else like(jnp.float32),
            "n": like(jnp.bfloat16),
            "g": None if gate is None else jax.ShapeDtypeStruct((models, grid.tokens), jnp.float32),
        },
        scratch={
            "sums": rows.sums_scratch(1),
            "score": None if gate is None else rows.sums_scratch(1),
        },
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [z.reshape(x.shape) if z.ndim == 3 else z for z in results]


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
        dg: [M, B T] float32, cotangent of g, if there is a kernel of a gate.
        of_branch: whether the gradient is wanted in bfloat16 as well, for a branch.

    Returns:
        total [M, B, T, D] float32; the same in bfloat16 if of_branch; da, db [M, B, T, D] bfloat16
        if there is b; d score [M, B T] float32 if there is a score; sums over tokens, to be added
        over the second axis, [M, blocks, S] float32: d scale; d kernel_a and d kernel_b if there is
        a kernel of a gate; copies of d bias if there is b.
    """
    models, width = x.shape[0], x.shape[-1]
    gated, learned = b is not None, gate is not None
    grid = grid_for(x, "backward", gated)
    row = grid.row
    summed = (3 * width if learned else width) + (row.channels if gated else 0)

    def body(refs):
        m, token, kept = place(grid)
        here = Tokens(refs, grid, m)
        cotangents = [getattr(refs, f"dn{i}_gmem") for i in range(len(dn))]

        def read(n):
            n = jnp.minimum(n, grid.steps - 1)
            x = here.read(refs.x_gmem, token(n))
            # Zeros where there is no token, which then adds nothing to any sum.
            a, b = (here.read(z, token(n), kept(n)) for z in (refs.a_gmem, refs.b_gmem))
            du, *of_norm = (here.read(z, token(n), kept(n)) for z in (refs.du_gmem, *cotangents))
            # Of a gate with a kernel, the cotangent; of one with a score, the score.
            of_gate = refs.dg_gmem if learned else refs.score_gmem
            of_gate = of_gate[m, token(n)] if gated else None
            return x, a, b, du, tuple(of_norm), of_gate

        def step(n, carry):
            (x, a, b, du, dn, of_gate), sums = carry
            following = read(n + 1)  # arrives while this token is computed
            turn = lax.rem(n, jnp.int32(2))
            score = None if learned else of_gate
            gate, kernels = here.gate(a, b, score, turn) if gated else (None, None)
            u = here.stream(x, a, b, gate)
            scales = here.parameter(refs.scale_gmem)  # again for each token: saves registers
            dn = [sum(wide(z)[1:], z[0].astype(jnp.float32)) for z in zip(*dn)]
            squares = along = rows.zeros(row)
            for z, d, scale in zip(u, dn, scales):
                squares += z * z
                along += d * scale * z
            squares, along = rows.sums_over_row([squares, along], row, refs.row_sums, turn)
            inverse = lax.rsqrt(squares * (1 / width) + epsilon)
            along *= inverse * inverse * inverse * (1 / width)
            totals, of_scale = [], []
            for z, d, scale, rest, total in zip(u, dn, scales, du, sums):
                d = d * inverse
                of_scale.append(total + d * z)
                totals.append(rest + (d * scale - z * along))
            at, keep = (m, token(n)), kept(n)
            if gated:
                a, b = wide(a), wide(b)
                slope = sum((t * (y - z) for t, y, z in zip(totals, a, b)), rows.zeros(row))
                (slope,) = rows.sums_over_row([slope], row, refs.slopes, turn)
                slope = (slope + of_gate if learned else slope) * gate * (1 - gate)
                if not learned:
                    row_numbers.store(refs.d_score_gmem, at, slope, keep)
            for i, (c, t) in enumerate(zip(here.columns, totals)):
                rows.store(refs.dx_gmem, at, c, t, row, keep)
                if of_branch:
                    rows.store(refs.da_gmem, at, c, t.astype(jnp.bfloat16), row, keep)
                if gated:
                    da, db = gate * t, (1 - gate) * t
                    if learned:
                        da, db = da + slope * kernels[0][i], db + slope * kernels[1][i]
                    rows.store(refs.da_gmem, at, c, da.astype(jnp.bfloat16), row, keep)
                    rows.store(refs.db_gmem, at, c, db.astype(jnp.bfloat16), row, keep)
            added = []
            if learned:
                added = [s + slope * z for s, z in zip(sums[grid.sections :], [*a, *b])]
            if gated:
                slopes = rows.zeros(row) + slope
                slopes = slopes if keep is None else rows.masked(slopes, keep)
                added.append(sums[-1] + slopes)
            return following, (*of_scale, *added)

        zeros = tuple(rows.zeros(row) for _ in range(summed // row.channels))
        _, sums = loop(grid.steps, step, (read(jnp.int32(0)), zeros))
        store_sums(refs.sums_gmem, refs.sums, grid, m, sums)

    like = lambda dtype: jax.ShapeDtypeStruct((models, grid.tokens, width), dtype)
    narrow = like(jnp.bfloat16)
    *results, sums = kernel(
        body,
        name="residual_norm_backward",
        inputs={"x": flat(x), "a": flat(a), "b": flat(b), "du": flat(du)}
        | {"gate": gate, "bias": bias, "score": score, "scale": scale, "dg": dg}
        | {f"dn{i}": flat(z) for i, z in enumerate(dn)},
        outputs={
            "dx": like(jnp.float32),
            "da": narrow if gated or of_branch else None,
            "db": narrow if gated else None,
            "d_score": None if score is None else jax.ShapeDtypeStruct(score.shape, score.dtype),
            "sums": jax.ShapeDtypeStruct((models, grid.blocks, summed), jnp.float32),
        },
        scratch={
            "sums": plgpu.SMEM((row.number, summed), jnp.float32),
            "row_sums": rows.sums_scratch(2),
            "score": rows.sums_scratch(1) if learned else None,
            "slopes": rows.sums_scratch(1) if gated else None,
        },
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [*(z.reshape(x.shape) if z.ndim == 3 else z for z in results), sums]
