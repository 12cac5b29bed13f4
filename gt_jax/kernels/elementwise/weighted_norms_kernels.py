"""The Pallas kernels of weighted_norms.py; residual_norm_rows.py says how they divide their work.

With r and m the scaled norms of a and b, the cotangents dc, dw, and dn of n from elsewhere,

    s = w (1 - w) (dw + sum over channels of dc (r - m)),   dn grows by s head
    d head = sum over tokens of s n,   d bias = sum over tokens of s

and norms of cotangents w dc and (1 - w) dc as in gated_branches_kernels.py.
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


class _Weighted(Tokens):
    """What both directions compute of a token."""

    def read_all(self, token, keep=None):
        """Sections of a, b and n."""
        refs = self.refs
        return tuple(self.read(z, token, keep) for z in (refs.a_gmem, refs.b_gmem, refs.n_gmem))

    def normed(self, branches, n, epsilon, turn):
        """1 / sqrt(mean of squares + epsilon) of each branch, each divided by it, and w."""
        heads = self.parameter(self.refs.head_gmem)
        score = sum((z * h for z, h in zip(n, heads)), rows.zeros(self.row))
        *inverses, score = self.inverses(branches, epsilon, turn, score)
        weight = sigmoid_of_scalar(score + self.refs.bias_gmem[self.model, 0])
        return inverses, [[z * r for z in x] for x, r in zip(branches, inverses)], weight


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
        bias: [M, 1] float32.
        epsilon: added to the mean of squares.
    """
    grid, models = grid_for(a, "forward", True), len(a)
    row = grid.row

    def body(refs):
        m, token, kept = place(grid)
        here = _Weighted(refs, grid, m)

        def step(i, values):
            following = here.read_all(token(jnp.minimum(i + 1, grid.steps - 1)))
            *branches, n = map(wide, values)
            turn, at = lax.rem(i, jnp.int32(2)), (m, token(i))
            _, (r, m_), w = here.normed(branches, n, epsilon, turn)
            row_numbers.store(refs.w_gmem, at, w, kept(i))
            scales = here.parameter(refs.scale_a_gmem), here.parameter(refs.scale_b_gmem)
            for column, x, y, s, t in zip(here.columns, r, m_, *scales):
                c = (w * (x * s) + (1 - w) * (y * t)).astype(jnp.bfloat16)
                rows.store(refs.c_gmem, at, column, c, row, kept(i))
            return following

        loop(grid.steps, step, here.read_all(token(jnp.int32(0))))

    c, w = kernel(
        body,
        name="weighted_norms_forward",
        inputs={"a": flat(a), "b": flat(b), "n": flat(n)}
        | {"scale_a": scale_a, "scale_b": scale_b, "head": head, "bias": bias},
        outputs={
            "c": jax.ShapeDtypeStruct((models, grid.tokens, a.shape[-1]), jnp.bfloat16),
            "w": jax.ShapeDtypeStruct((models, grid.tokens), jnp.float32),
        },
        scratch={"row_sums": rows.sums_scratch(3)},
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [c.reshape(a.shape), w]


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
        second axis, [M, blocks, S] float32: d scale_a, d scale_b, d head and copies of d bias.
    """
    grid, models, width = grid_for(a, "backward", True), len(a), a.shape[-1]
    row = grid.row
    summed = 3 * width + row.channels

    def body(refs):
        m, token, kept = place(grid)
        here = _Weighted(refs, grid, m)

        def read(i):
            # Zeros where there is no token, which then adds nothing to any sum.
            i = jnp.minimum(i, grid.steps - 1)
            given = (here.read(z, token(i), kept(i)) for z in (refs.dn_gmem, refs.dc_gmem))
            return *here.read_all(token(i), kept(i)), *given, refs.dw_gmem[m, token(i)]

        def step(i, carry):
            (*values, dw), sums = carry
            following = read(i + 1)  # arrives while this token is computed
            turn, at, keep = lax.rem(i, jnp.int32(2)), (m, token(i)), kept(i)
            *branches, n, dn, dc = map(wide, values)
            inverses, normed, w = here.normed(branches, n, epsilon, turn)
            scales = [here.parameter(z) for z in (refs.scale_a_gmem, refs.scale_b_gmem)]
            of_scale = [[d * x for d, x in zip(dc, z)] for z in normed]
            along = [
                sum((d * s for d, s in zip(*z)), rows.zeros(row)) for z in zip(of_scale, scales)
            ]
            along = rows.sums_over_row(along, row, refs.along, turn)
            slope = (along[0] - along[1] + dw) * w * (1 - w)
            for j, (ref, share) in enumerate(((refs.da_gmem, w), (refs.db_gmem, 1 - w))):
                inverse, mean = inverses[j] * share, along[j] * (1 / width)
                for column, d, s, x in zip(here.columns, dc, scales[j], normed[j]):
                    d = (d * s - x * mean) * inverse
                    rows.store(ref, at, column, d.astype(jnp.bfloat16), row, keep)
            for column, d, h in zip(here.columns, dn, here.parameter(refs.head_gmem)):
                d = (d + slope * h).astype(jnp.bfloat16)
                rows.store(refs.d_n_gmem, at, column, d, row, keep)
            slopes = rows.zeros(row) + slope
            slopes = slopes if keep is None else rows.masked(slopes, keep)
            added = [*(w * z for z in of_scale[0]), *((1 - w) * z for z in of_scale[1])]
            added += [*(slope * z for z in n), slopes]
            return following, tuple(x + y for x, y in zip(sums, added))

        zeros = tuple(rows.zeros(row) for _ in range(summed // row.channels))
        _, sums = loop(grid.steps, step, (read(jnp.int32(0)), zeros))
        store_sums(refs.sums_gmem, refs.sums, grid, m, sums)

    like = jax.ShapeDtypeStruct((models, grid.tokens, width), jnp.bfloat16)
    *gradients, sums = kernel(
        body,
        name="weighted_norms_backward",
        inputs={"a": flat(a), "b": flat(b), "n": flat(n)}
        | {"scale_a": scale_a, "scale_b": scale_b, "head": head, "bias": bias}
        | {"dn": flat(dn), "dc": flat(dc), "dw": dw},
        outputs={
            **{"da": like, "db": like, "d_n": like},
            "sums": jax.ShapeDtypeStruct((models, grid.blocks, summed), jnp.float32),
        },
        scratch={
            "sums": plgpu.SMEM((row.number, summed), jnp.float32),
            "row_sums": rows.sums_scratch(3),
            "along": rows.sums_scratch(2),
        },
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [*(z.reshape(a.shape) for z in gradients), sums]
