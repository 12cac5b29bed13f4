"""The Pallas kernels of normed_pair.py; residual_norm_rows.py says how they divide their work.

With n = a / sqrt(mean(a^2) + epsilon), the cotangents d of its half of the pair and da of a,

    total = da + (d scale_a - n mean(d scale_a n)) / sqrt(mean(a^2) + epsilon)
    d scale_a = sum over tokens of d n

and likewise for b.
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
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import kernel, loop, lowered_once


@lowered_once("epsilon")
def forward(
    a: jax.Array, b: jax.Array, scale_a: jax.Array, scale_b: jax.Array, *, epsilon: float
) -> list[jax.Array]:
    """[M, B, T, 2 D] bfloat16.

    Args:
        a, b: [M, B, T, D] bfloat16 of M models.
        scale_a, scale_b: [M, D] float32.
        epsilon: added to the mean of squares.
    """
    grid, models, width = grid_for(a, "forward", True), len(a), a.shape[-1]
    row = grid.row

    def body(refs):
        m, token, kept = place(grid)
        here = Tokens(refs, grid, m)

        def read(n):
            at = token(jnp.minimum(n, grid.steps - 1))
            return here.read(refs.a_gmem, at), here.read(refs.b_gmem, at)

        def step(n, values):
            following = read(n + 1)  # arrives while this token is computed
            values = [wide(z) for z in values]
            inverses = here.inverses(values, epsilon, lax.rem(n, jnp.int32(2)))
            scales = refs.scale_a_gmem, refs.scale_b_gmem
            for i, (x, inverse, scale) in enumerate(zip(values, inverses, scales)):
                for c, z, s in zip(here.columns, x, here.parameter(scale)):
                    z, at = (z * (inverse * s)).astype(jnp.bfloat16), (m, token(n))
                    rows.store(refs.pair_gmem, at, c + i * width, z, row, kept(n))
            return following

        loop(grid.steps, step, read(jnp.int32(0)))

    (pair,) = kernel(
        body,
        name="normed_pair_forward",
        inputs={"a": flat(a), "b": flat(b), "scale_a": scale_a, "scale_b": scale_b},
        outputs={"pair": jax.ShapeDtypeStruct((models, grid.tokens, 2 * width), jnp.bfloat16)},
        scratch={"row_sums": rows.sums_scratch(2)},
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [pair.reshape(*a.shape[:-1], 2 * width)]


@lowered_once("epsilon")
def backward(
    a: jax.Array,
    b: jax.Array,
    scale_a: jax.Array,
    scale_b: jax.Array,
    da: jax.Array,
    db: jax.Array,
    d_pair: jax.Array,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """Gradients of `forward`.

    Args:
        a, b, scale_a, scale_b, epsilon: as of `forward`.
        da, db: [M, B, T, D] bfloat16, cotangents of a and b from elsewhere.
        d_pair: [M, B, T, 2 D] bfloat16.

    Returns:
        Those of a and b, [M, B, T, D] bfloat16; sums over tokens, to be added over the second axis,
        [M, blocks, 2 D] float32: d scale_a and d scale_b.
    """
    grid, models, width = grid_for(a, "backward", True), len(a), a.shape[-1]
    row = grid.row

    def body(refs):
        m, token, kept = place(grid)
        here = Tokens(refs, grid, m)

        def read(n):
            # Zeros where there is no token, which then adds nothing to any sum.
            n = jnp.minimum(n, grid.steps - 1)
            of_a, of_b = (refs.a_gmem, refs.da_gmem), (refs.b_gmem, refs.db_gmem)
            load = lambda ref, first=0: here.read(ref, token(n), kept(n), first)
            return tuple(
                (load(x), load(d), load(refs.d_pair_gmem, i * width))
                for i, (x, d) in enumerate((of_a, of_b))
            )

        def step(n, carry):
            values, sums = carry
            following = read(n + 1)  # arrives while this token is computed
            turn, at = lax.rem(n, jnp.int32(2)), (m, token(n))
            branches = [wide(x) for x, *_ in values]
            inverses = here.inverses(branches, epsilon, turn)
            scales = [here.parameter(z) for z in (refs.scale_a_gmem, refs.scale_b_gmem)]
            normed = [[z * inverse for z in x] for x, inverse in zip(branches, inverses)]
            of_norm = [wide(d) for *_, d in values]
            of_scale = [[d * x for d, x in zip(*z)] for z in zip(of_norm, normed)]
            along = [
                sum((d * s for d, s in zip(*z)), rows.zeros(row)) for z in zip(of_scale, scales)
            ]
            along = rows.sums_over_row(along, row, refs.along, turn)
            for i, ref in enumerate((refs.total_a_gmem, refs.total_b_gmem)):
                mean = along[i] * (1 / width)
                straight = wide(values[i][1])
                terms = zip(here.columns, of_norm[i], scales[i], normed[i], straight)
                for column, d, s, x, other in terms:
                    total = other + (d * s - x * mean) * inverses[i]
                    rows.store(ref, at, column, total.astype(jnp.bfloat16), row, kept(n))
            added = [z for one in of_scale for z in one]
            return following, tuple(x + y for x, y in zip(sums, added))

        zeros = tuple(rows.zeros(row) for _ in range(2 * grid.sections))
        _, sums = loop(grid.steps, step, (read(jnp.int32(0)), zeros))
        store_sums(refs.sums_gmem, refs.sums, grid, m, sums)

    like = jax.ShapeDtypeStruct((models, grid.tokens, width), jnp.bfloat16)
    total_a, total_b, sums = kernel(
        body,
        name="normed_pair_backward",
        inputs={"a": flat(a), "b": flat(b), "scale_a": scale_a, "scale_b": scale_b}
        | {"da": flat(da), "db": flat(db), "d_pair": flat(d_pair)},
        outputs={
            **{"total_a": like, "total_b": like},
            "sums": jax.ShapeDtypeStruct((models, grid.blocks, 2 * width), jnp.float32),
        },
        scratch={
            "sums": plgpu.SMEM((row.number, 2 * width), jnp.float32),
            "row_sums": rows.sums_scratch(2),
            "along": rows.sums_scratch(2),
        },
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [total_a.reshape(a.shape), total_b.reshape(b.shape), sums]
