"""WKV6 on GPUs since compute capability 8.0: one fused Pallas kernel of products by warps.

A block of the grid is one warpgroup, which walks the chunks of one head with the state, transposed
[V, K], in float32 registers. Per chunk, in the notation of portable_levels.py, block x of 16 tokens
does

    o_x = A_x v_x + sum over y < x of (Q_x E_{x-1} ... E_{y+1} Kh_y^T) v_y + Q_x E_{x-1} ... E_0 S
    S <- E_x S + Kh_x^T v_x        for x = 0, 1, 2, 3

with A_x from the levels inside the block. All but Kh, v, S and E stays inside a warp, so that a
chunk takes two barriers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.pallas.tiles import over_columns, over_rows
from gt_jax.kernels.pallas.warps import BLOCK, BLOCKS, block_dot, left
from gt_jax.kernels.wkv6 import portable_levels
from gt_jax.kernels.wkv6.hopper_levels import log2_decay
from gt_jax.kernels.wkv6.hopper_sizes import SIZE
from gt_jax.kernels.wkv6.portable_levels import (
    E_ROWS,
    FIRST,
    FROM_START,
    LEVELS,
    TO_END,
    WHOLE,
    Masks,
    sum_patterns,
    summed_within,
)


@lowered_once("save")
def forward(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    state: jax.Array | None,
    *,
    save: bool,
) -> list[jax.Array]:
    """o, the final state and, with save, what the backward pass reads.

    Args:
        r, k, v: [B, T, H, 64] bfloat16, T a multiple of 64; w: the same in float32;
            u: [H, 64] float32.
        state: [B, H, V, K] float32; None for zeros.
        save: whether to return what only the backward pass reads.

    Returns:
        o like v; the final state; with save the state each chunk starts from [B, M, H, V, K] and
        the entries of A [B, M, H, C, C], both bfloat16: columns 16 d to 16 d + 15 of the rows of a
        block hold what it reads of the block d before.
    """
    batch, T, H, _ = r.shape
    chunks, square = T // CHUNK, (CHUNK, SIZE)
    bf16, f32 = jnp.bfloat16, jnp.float32

    def body(refs):
        r_s, k_s, v_s, S_s, E_s, u_s = refs.r, refs.k, refs.v, refs.S, refs.E, refs.u
        b, h = divide(lax.axis_index("rows"), H)
        u_s[...] = warps.load_columns(refs.u_gmem.at[h])
        refs.zero[0] = jnp.int32(0)
        masks = Masks(refs.zero.at[0])
        warps.put_block_rows(E_s, tiles.full(square, 1.0, f32), 0)
        warps.sync()

        def step(m, S):
            at = (b, tiles.tokens(m), h)
            (g,) = log2_decay(tiles.load_from_gmem(refs.w_gmem.at[at]), 1)
            for source, tile in ((refs.r_gmem, r_s), (refs.k_gmem, k_s), (refs.v_gmem, v_s)):
                copies.copy_in(source.at[at], tile)
            S_s[...] = S.astype(bf16)
            warps.sync_warp()
            if save:
                copies.copy_out(S_s, refs.states_gmem.at[b, m, h])
            sums = summed_within(refs.patterns_gmem, masks, g)
            warps.put_block_rows(E_s, jnp.exp2(sums(WHOLE)), FIRST)

            r, k = warps.load(r_s), warps.load(k_s)
            u = over_rows(tiles.load_columns(u_s), square)
            A = over_columns(jnp.sum(r * k * u, axis=1), (CHUNK, BLOCK))
            for level in range(LEVELS):
                Y = jnp.where(masks.query(level, SIZE), warps.load(r_s), warps.load(k_s))
                Y = (Y * jnp.exp2(sums(level - 1)) if level else Y).astype(bf16)
                product = warps.block_dot_transposed(
                    warps.zeros(CHUNK, BLOCK), left(Y), warps.right_transposed(Y)
                )
                A = jnp.where(masks.apart(level), product, A)
            A = [(A * masks.not_before()).astype(bf16)]

            Q = warps.load(r_s) * jnp.exp2(sums(FROM_START))
            k_s[...] = (warps.load(k_s) * jnp.exp2(sums(TO_END))).astype(bf16)  # Kh from here
            warps.sync()
            if portable_levels.TUNING.prefetch:
                following = (b, tiles.tokens(jnp.minimum(m + 1, chunks - 1)), h)
                for source in (refs.r_gmem, refs.k_gmem, refs.v_gmem, refs.w_gmem):
                    copies.prefetch(source.at[following])
            o = block_dot(warps.zeros(*square), left(A[0]), warps.rows_right(v_s, 0))
            for back in range(1, BLOCKS):
                product = warps.block_dot_transposed(
                    warps.zeros(CHUNK, BLOCK),
                    left(Q.astype(bf16)),
                    warps.rows_right_transposed(k_s, -back),
                )
                A.append((product * masks.has_block(-back)).astype(bf16))
                o = block_dot(o, left(A[-1]), warps.rows_right(v_s, -back))
                Q *= warps.block_row(E_s, FIRST, -back, SIZE)
            o = warps.dot(o, left(Q.astype(bf16)), S_s.T)
            if save:
                r_s[...] = warps.beside(*A)
                warps.sync_warp()
                copies.copy_out(r_s, refs.scores_gmem.at[b, m, h])
                warps.sync_warp()
            r_s[...] = o.astype(bf16)
            warps.sync_warp()
            copies.copy_out(r_s, refs.o_gmem.at[at])
            for x in range(BLOCKS):
                S *= over_rows(tiles.load_columns(E_s.at[FIRST + x]), S.shape)
                rows = slice(x * BLOCK, (x + 1) * BLOCK)
                S = warps.dot(S, warps.load_left(v_s.at[rows].T), k_s.at[rows])
            warps.sync()
            return S

        if state is None:
            S = tiles.full((SIZE, SIZE), 0, jnp.float32)
        else:
            S = tiles.load_from_gmem(refs.state_gmem.at[b, h])
        refs.final_gmem.at[b, h][...] = loop(chunks, step, S)

    saved = jax.ShapeDtypeStruct((batch, chunks, H, SIZE, SIZE), bf16) if save else None
    return kernel(
        body,
        name="wkv6_portable_forward",
        inputs={"r": r, "k": k, "v": v, "w": w, "u": u, "state": state, "patterns": sum_patterns()},
        outputs={
            "o": jax.ShapeDtypeStruct(v.shape, v.dtype),
            "final": jax.ShapeDtypeStruct((batch, H, SIZE, SIZE), f32),
            "states": saved,
            "scores": saved,
        },
        scratch={
            "r": tiles.tile(*square),  # then A, then o
            "k": tiles.tile(*square),  # then Kh
            "v": tiles.tile(*square),
            "S": tiles.tile(SIZE, SIZE),
            "E": plgpu.SMEM((E_ROWS, SIZE), f32),
            "u": plgpu.SMEM((SIZE,), f32),
            "zero": plgpu.SMEM((1,), jnp.int32),
        },
        grid={"rows": batch * H},
        threads=1,
    )
