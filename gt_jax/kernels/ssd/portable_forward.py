"""SSD on GPUs since compute capability 8.0: one fused Pallas kernel of products by warps.

A block of the grid is one warpgroup, which walks the chunks of one head with its state in float32
registers and copies the next chunk while it computes. Per chunk, with g the running sum of log2
decays from the chunk's start,

    y = (exp2(g_i - g_j) * C B^T * dt_j) x + exp2(g_i) (C S^T) + D x
    S <- exp2(g_end) S + (exp2(g_end - g) dt x)^T B
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.pallas.tiles import over_columns, over_rows
from gt_jax.kernels.ssd.hopper_sizes import sizes_of
from gt_jax.kernels.ssd.portable_splits import add_weighed
from gt_jax.kernels.ssd.portable_states import held, scaled


@lowered_once("save")
def forward(
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    D: jax.Array,
    state: jax.Array | None,
    *,
    save: bool,
) -> list[jax.Array]:
    """y, the final state and, with save, what the backward pass reads.

    Args:
        x: [B, T, H, 64]; B, C: [B, T, G, 64 or 128], bfloat16; T a multiple of 64.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        D: [H] float32.
        state: [B, H, P, N] float32, what the first chunk starts from; None for zeros.
        save: whether to return what only the backward pass reads.

    Returns:
        y as x; the final state as `state`; with save the state that every other chunk starts
        from, [B, H, chunks / 2, P, N], and the scale of its rows [B, H, chunks / 2, P]; see
        portable_states.py.
    """
    size = sizes_of(x, B)
    P, N = size.P, size.N
    square, bf16 = (CHUNK, CHUNK), jnp.bfloat16

    def body(refs):
        S_s = refs.S
        b, h = divide(lax.axis_index("heads"), size.heads)
        group = h // (size.heads // size.groups)
        D_h = refs.D_gmem[h]

        def start(m, slot):
            """Starts to copy a chunk."""
            at = (b, tiles.tokens(m))
            copies.start_copy(refs.x_gmem.at[(*at, h)], refs.x.at[slot])
            copies.start_copy(refs.B_gmem.at[(*at, group)], refs.B.at[slot])
            copies.start_copy(refs.C_gmem.at[(*at, group)], refs.C.at[slot])
            copies.start_copy_row(refs.g_gmem.at[b, h, m, 0], refs.g.at[slot])
            copies.start_copy_row(refs.dt_gmem.at[b, h, m], refs.dt.at[slot])

        def save_state(S, pair):
            S, scale = scaled(S)
            S_s[...] = held(S)
            refs.scales_gmem.at[b, h, pair][...] = scale
            warps.sync_warp()
            copies.copy_out(S_s, refs.states_gmem.at[b, h, pair])
            warps.sync_warp()

        def step(m, S):
            pair, slot = divide(m, 2)
            copies.arrived()
            warps.sync()
            pl.when(m < size.chunks - 1)(lambda: start(m + 1, 1 - slot))
            x_s, B_s, C_s, g_s = (z.at[slot] for z in (refs.x, refs.B, refs.C, refs.g))
            if save:
                pl.when(slot == 0)(lambda: save_state(S, pair))
            S_s[...] = S.astype(bf16)

            CB = warps.dot(warps.zeros(*square), warps.load_left(C_s), B_s.T)
            warps.sync()
            g_i, g_j = tiles.load_rows(g_s), tiles.load_columns(g_s)
            dt_j, g_end = tiles.load_columns(refs.dt.at[slot]), refs.g[slot, CHUNK - 1]
            i = tiles.iota(square, 0)
            passed = over_columns(g_i, square) - over_rows(g_j, square)
            passed = jnp.exp2(jnp.where(i >= tiles.iota(square, 1), passed, -jnp.inf))
            M = (passed * CB * over_rows(dt_j, square)).astype(bf16)
            y = warps.dot(warps.zeros(CHUNK, P), warps.load_left(C_s), S_s.T)
            y *= over_columns(jnp.exp2(g_i), y.shape)
            y = warps.dot(y + warps.load(x_s) * D_h, warps.left(M), x_s)
            weight = jnp.exp2(g_end - g_j) * dt_j
            S = add_weighed(S * jnp.exp2(g_end), x_s, weight, B_s, terms=2)
            # Only its own warp reads a row of C.
            warps.sync_warp()
            y_s = C_s.at[:, :P]
            y_s[...] = y.astype(bf16)
            warps.sync_warp()
            copies.copy_out(y_s, refs.y_gmem.at[b, tiles.tokens(m), h])
            return S

        start(jnp.int32(0), 0)
        if refs.state_gmem is None:
            S = warps.zeros(P, N)
        else:
            S = tiles.load_from_gmem(refs.state_gmem.at[b, h])
        refs.final_gmem.at[b, h][...] = loop(size.chunks, step, S)

    saved = (size.batch, size.heads, pl.cdiv(size.chunks, 2), P, N)
    return kernel(
        body,
        name="ssd_portable_forward",
        inputs={"x": x, "B": B, "C": C, "g": g, "dt": dt, "D": D, "state": state},
        outputs={
            "y": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "final": jax.ShapeDtypeStruct((size.batch, size.heads, P, N), jnp.float32),
            "states": jax.ShapeDtypeStruct(saved, bf16) if save else None,
            "scales": jax.ShapeDtypeStruct(saved[:-1], jnp.float32) if save else None,
        },
        scratch={
            "x": tiles.tile(2, CHUNK, P),
            "B": tiles.tile(2, CHUNK, N),
            "C": tiles.tile(2, CHUNK, N),  # then y
            "S": tiles.tile(P, N),
            "g": plgpu.SMEM((2, CHUNK), jnp.float32),
            "dt": plgpu.SMEM((2, CHUNK), jnp.float32),
        },
        grid={"heads": size.batch * size.heads},
        threads=1,
    )
