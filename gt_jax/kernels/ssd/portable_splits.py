"""The pass over the splits of a long sequence of few heads; see pallas/splits.py.

A split maps its state S to d S + U. U follows from x and B; backward from dy and C.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.pallas.splits import row_of_split
from gt_jax.kernels.pallas.terms import split_truncated
from gt_jax.kernels.pallas.tiles import over_rows
from gt_jax.kernels.pallas.warps import load_columns
from gt_jax.kernels.ssd.fused import states_between
from gt_jax.kernels.ssd.hopper_sizes import Sizes


def add_weighed(S, x, weight, B, terms):
    """S + (weight x)^T B for tiles x [C, P] and B [C, N]; weight [C] along columns.

    terms: bfloat16 numbers whose sum weight x is; with two, what a state keeps is not rounded.
    """
    z = warps.load(x.T)
    z *= over_rows(weight, z.shape)
    for term in split_truncated(z) if terms == 2 else (z.astype(jnp.bfloat16),):
        S = warps.dot(S, warps.left(term), B)
    return S


def split_states(
    size: Sizes,
    splits: int,
    x: jax.Array,
    B: jax.Array,
    g: jax.Array,
    dt: jax.Array | None,
    state: jax.Array | None,
    *,
    reverse: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The state that each split starts from (ends with if reverse).

    Args:
        size: Sizes with the splits as rows of the batch.
        splits: how many there are of each row.
        x, B: x and B, or dy and C if reverse; [batch * splits, T, ...].
        g: [batch * splits, H, chunks, 1, CHUNK].
        dt: [batch * splits, H, chunks, CHUNK], or None if reverse.
        state: [batch, H, P, N] before the first split, or the gradient after the last; None is 0.
        axis_name: of the devices that share the sequence, as for `states_of_splits`.

    Returns:
        [batch * splits, H, P, N] float32.
    """
    return states_between(
        size, splits, _additions, x, B, g, dt, state, reverse=reverse, axis_name=axis_name
    )


@lowered_once("size", "splits", "maps", "reverse")
def _additions(size, splits, maps, x, B, g, dt, reverse):
    """U of the first `maps` splits of each row (last if reverse), [rows, H, P, N] float32."""
    P, N = size.P, size.N
    rows = size.batch // splits * maps

    def body(refs):
        x_s, B_s = refs.x, refs.B
        row, h = divide(lax.axis_index("heads"), size.heads)
        group = h // (size.heads // size.groups)
        source = row_of_split(row, splits, maps, reverse=reverse)

        def step(n, U):
            m = size.chunks - 1 - n if reverse else n
            copies.copy_in(refs.x_gmem.at[source, tiles.tokens(m), h], x_s)
            copies.copy_in(refs.B_gmem.at[source, tiles.tokens(m), group], B_s)
            g_m = load_columns(refs.g_gmem.at[source, h, m, 0])
            g_end = refs.g_gmem[source, h, m, 0, CHUNK - 1]
            warps.sync()
            if reverse:
                weight = jnp.exp2(g_m)
            else:
                weight = jnp.exp2(g_end - g_m) * load_columns(refs.dt_gmem.at[source, h, m])
            U = add_weighed(U * jnp.exp2(g_end), x_s, weight, B_s, terms=1 if reverse else 2)
            warps.sync()
            return U

        refs.U_gmem.at[row, h][...] = loop(size.chunks, step, warps.zeros(P, N))

    (update,) = kernel(
        body,
        name="ssd_portable_splits",
        inputs={"x": x, "B": B, "g": g, "dt": dt},
        outputs={"U": jax.ShapeDtypeStruct((rows, size.heads, P, N), jnp.float32)},
        scratch={"x": tiles.tile(CHUNK, P), "B": tiles.tile(CHUNK, N)},
        grid={"heads": rows * size.heads},
        threads=1,
    )
    return update
