"""The Pallas kernels of normed_pair.py; residual_norm_rows.py says how they divide their work.

normed_branches.py has the gradient of a norm, to which that of the branch from elsewhere is added.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise.normed_branches import Branches
from gt_jax.kernels.elementwise.residual_norm_rows import grid_for, plus, run, wide
from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import lowered_once


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
    grid, width = grid_for(a, "forward", True), a.shape[-1]

    def body(refs):
        here = Branches(refs, grid)

        def compute(token, *branches):
            branches = [wide(z) for z in branches]
            inverses = here.inverses(branches, epsilon, token.turn)
            scales = refs.scale_a_gmem, refs.scale_b_gmem
            for n, (x, inverse, scale) in enumerate(zip(branches, inverses, scales)):
                for i, (z, s) in enumerate(zip(x, here.parameter(scale))):
                    here.store(refs.pair_gmem, token, i, z * (inverse * s), n * width)

        here.walk(lambda token: here.read_each("ab", token), compute)

    return run(
        grid,
        body,
        "normed_pair_forward",
        {"a": a, "b": b, "scale_a": scale_a, "scale_b": scale_b},
        {"pair": jax.ShapeDtypeStruct((*a.shape[:-1], 2 * width), jnp.bfloat16)},
        {"row_sums": rows.sums_scratch(2)},
    )


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
    grid, width = grid_for(a, "backward", True), a.shape[-1]

    def body(refs):
        here = Branches(refs, grid)

        def read(token):
            of_a, of_b = (refs.a_gmem, refs.da_gmem), (refs.b_gmem, refs.db_gmem)
            load = lambda ref, first=0: here.read(ref, token, first, or_zeros=True)
            return tuple(
                (load(x), load(d), load(refs.d_pair_gmem, n * width))
                for n, (x, d) in enumerate((of_a, of_b))
            )

        def compute(token, sums, *values):
            branches = [wide(x) for x, *_ in values]
            inverses = here.inverses(branches, epsilon, token.turn)
            scales = here.scales()
            normed = [[z * inverse for z in x] for x, inverse in zip(branches, inverses)]
            of_norm = [wide(d) for *_, d in values]
            of_scale, along = here.along_norms(of_norm, normed, scales, token.turn)
            for n, ref in enumerate((refs.total_a_gmem, refs.total_b_gmem)):
                straight = wide(values[n][1])
                given = of_norm[n], normed[n], scales[n], along[n], inverses[n]
                for i, (d, other) in enumerate(zip(here.through_norm(*given), straight)):
                    here.store(ref, token, i, other + d)
            return plus(sums, [z for one in of_scale for z in one])

        here.walk_and_sum(read, compute, 2 * width)

    return run(
        grid,
        body,
        "normed_pair_backward",
        {"a": a, "b": b, "scale_a": scale_a, "scale_b": scale_b}
        | {"da": da, "db": db, "d_pair": d_pair},
        {"total_a": a, "total_b": b},
        {"row_sums": rows.sums_scratch(2), "along": rows.sums_scratch(2)},
        2 * width,
    )
