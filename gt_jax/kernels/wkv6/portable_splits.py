"""The pass over the splits of a long sequence of few heads; see pallas/splits.py.

A split maps its state S to diag(d) S + U. d and U of a split follow from k, v and w; backward from
r, do and w. States are transposed, [V, K], as in the other kernels.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.pallas.splits import count_maps, row_of_split, states_of_splits
from gt_jax.kernels.pallas.tiles import over_rows
from gt_jax.kernels.pallas.warps import BLOCK, BLOCKS
from gt_jax.kernels.wkv6.hopper_levels import log2_decay
from gt_jax.kernels.wkv6.hopper_sizes import SIZE
from gt_jax.kernels.wkv6.portable_levels import (
    FROM_START,
    TO_END,
    WHOLE,
    Masks,
    sum_patterns,
    summed_within,
)


def split_states(
    splits: int,
    x: jax.Array,
    v: jax.Array,
    w: jax.Array,
    state: jax.Array | None,
    *,
    reverse: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The state that each split starts from (ends with if reverse).

    Args:
        splits: how many there are of each row.
        x, v, w: k, v and w, or r, do and w if reverse; [batch * splits, T, H, 64].
        state: [batch, H, V, K] before the first split, or the gradient after the last; None is 0.
        axis_name: of the devices that share the sequence, as for `states_of_splits`.

    Returns:
        [batch * splits, H, V, K] float32.
    """
    maps = count_maps(splits, axis_name)
    by_row = lambda z: z.reshape(-1, maps, *z.shape[1:]).swapaxes(1, 2)
    decay, update = map(by_row, _maps(splits, maps, x, v, w, reverse))  # [batch, H, maps, ...]
    return states_of_splits(decay, update, state, reverse=reverse, axis_name=axis_name)


@lowered_once("splits", "maps", "reverse")
def _maps(splits, maps, x, v, w, reverse):
    """d [rows, H, 1, K] and U [rows, H, V, K] of the first `maps` splits (last if reverse)."""
    _, T, H, _ = x.shape
    rows, chunks = x.shape[0] // splits * maps, T // CHUNK
    square, bf16, f32 = (CHUNK, SIZE), jnp.bfloat16, jnp.float32

    def body(refs):
        x_s, v_s, E_s = refs.x, refs.v, refs.E
        row, h = divide(lax.axis_index("rows"), H)
        source = row_of_split(row, splits, maps, reverse=reverse)
        refs.zero[0] = jnp.int32(0)
        warps.sync()
        masks = Masks(refs.zero.at[0])

        def step(n, carry):
            d, U = carry
            at = (source, tiles.tokens(chunks - 1 - n if reverse else n), h)
            (g,) = log2_decay(tiles.load_from_gmem(refs.w_gmem.at[at]), 1)
            copies.copy_in(refs.x_gmem.at[at], x_s)
            copies.copy_in(refs.v_gmem.at[at], v_s)
            warps.sync_warp()
            sums = summed_within(refs.patterns_gmem, masks, g)
            warps.put_block_rows(E_s, jnp.exp2(sums(WHOLE)), 0)
            decay = jnp.exp2(sums(FROM_START if reverse else TO_END))
            x_s[...] = (warps.load(x_s) * decay).astype(bf16)
            warps.sync()
            for block in reversed(range(BLOCKS)) if reverse else range(BLOCKS):
                E = tiles.load_columns(E_s.at[block])
                rows = slice(block * BLOCK, (block + 1) * BLOCK)
                d, U = d * E, U * over_rows(E, U.shape)
                U = warps.dot(U, warps.load_left(v_s.at[rows].T), x_s.at[rows])
            warps.sync()
            return d, U

        ones = plgpu.layout_cast(jnp.ones(SIZE, f32), plgpu.Layout.WGMMA.reduce(0))
        d, U = loop(chunks, step, (ones, warps.zeros(*square)))
        refs.d_gmem.at[row, h, 0][...] = d
        refs.U_gmem.at[row, h][...] = U

    return kernel(
        body,
        name="wkv6_portable_splits",
        inputs={"x": x, "v": v, "w": w, "patterns": sum_patterns()},
        outputs={
            "d": jax.ShapeDtypeStruct((rows, H, 1, SIZE), f32),
            "U": jax.ShapeDtypeStruct((rows, H, SIZE, SIZE), f32),
        },
        scratch={
            "x": tiles.tile(*square),
            "v": tiles.tile(*square),
            "E": plgpu.SMEM((BLOCKS, SIZE), f32),
            "zero": plgpu.SMEM((1,), jnp.int32),
        },
        grid={"rows": rows * H},
        threads=1,
    )
