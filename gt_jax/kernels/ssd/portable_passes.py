"""Passes of the gradient of the portable SSD kernel over chunks by themselves.

A block of the grid has one chunk, and one head of a group after the other; see
portable_backward.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.pallas.terms import split_truncated
from gt_jax.kernels.pallas.tiles import over_columns, over_rows
from gt_jax.kernels.pallas.warps import BLOCK, BLOCKS, left, load, load_left, zeros
from gt_jax.kernels.ssd import portable_ends
from gt_jax.kernels.ssd.hopper_sizes import Sizes
from gt_jax.kernels.ssd.portable_ends import parts, places_of_end
from gt_jax.kernels.ssd.portable_splits import add_weighed
from gt_jax.kernels.ssd.portable_states import float16, held, scaled

# Of each token: the gradients of the step size and of the log decay inside the chunk, the term of
# what the state keeps of the token, and the token's term of the gradient of D.
INPUT_ROWS = 4
_BEFORE = BLOCKS - 1  # rows of zeros before the sums of blocks
MOST_TOGETHER = 32  # heads whose dB and dC a block adds, chosen by measuring


def heads_together(size: Sizes) -> int:
    """Heads of a group whose dB and dC one block adds: the largest divisor of their number."""
    return max(n for n in range(1, MOST_TOGETHER + 1) if size.heads_per_group % n == 0)


def _block(size, together):
    """Row of the batch, chunk and heads of a block: b, m, which of the sums, group, first head."""
    n, of_sum = divide(lax.axis_index("blocks"), size.heads // together)
    b, m = divide(n, size.chunks)
    first = of_sum * together
    return b, m, of_sum, first // size.heads_per_group, first


@lowered_once("size")
def of_inputs(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    D: jax.Array,
    dy: jax.Array,
    dx: jax.Array,
    states: jax.Array,
    dC: jax.Array,
) -> list[jax.Array]:
    """dx and dB, and dC with what it gets from tokens of the same chunk.

    Args:
        size: the call's Sizes.
        x, dy: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        D: [H] float32.
        dx, states: where `ends` has put dS at the end of each chunk.
        dC: [B, T, sums, N] float32, what `of_reads` gave.

    Returns:
        dB [B, T, sums, N] float32; INPUT_ROWS [B, H, chunks, rows, CHUNK]; dx as x; dC.
    """
    P, N = size.P, size.N
    square, bf16, f32 = (CHUNK, CHUNK), jnp.bfloat16, jnp.float32
    together = heads_together(size)

    def body(refs):
        b, m, of_sum, group, first = _block(size, together)
        at = (b, tiles.tokens(m))
        B_s, other = refs.B, together % 2  # the place that the last head leaves

        def start(h, slot):
            copies.start_copy(refs.x_gmem.at[(*at, h)], refs.x.at[slot])
            copies.start_copy(refs.dy_gmem.at[(*at, h)], refs.dy.at[slot])
            for part, place in zip(parts(refs.dS.at[slot]), places_of_end(refs, size, b, h, m)):
                copies.start_copy(place, part)
            copies.start_copy_row(refs.g_gmem.at[b, h, m, 0], refs.g.at[slot])
            copies.start_copy_row(refs.dt_gmem.at[b, h, m], refs.dt.at[slot])

        def start_C(slot):
            copies.start_copy(refs.C_gmem.at[(*at, group)], refs.dS.at[slot])

        def step(n, sums):
            dB, dCB = sums
            h, slot = first + n, lax.rem(n, jnp.int32(2))
            copies.arrived()
            warps.sync()
            pl.when(n < together - 1)(lambda: start(h + 1, 1 - slot))
            pl.when(n == together - 1)(lambda: start_C(other))
            x_s, dy_s, dS_s = refs.x.at[slot], refs.dy.at[slot], refs.dS.at[slot]
            g_s, g_end = refs.g.at[slot], refs.g[slot, CHUNK - 1]
            g_j, dt_j = tiles.load_rows(g_s), tiles.load_rows(refs.dt.at[slot])

            i, j = tiles.iota(square, 1), tiles.iota(square, 0)
            dM = warps.dot(zeros(*square), load_left(x_s), dy_s.T)
            passed = over_rows(tiles.load_columns(g_s), square) - over_columns(g_j, square)
            L = jnp.exp2(jnp.where(i >= j, passed, -jnp.inf))
            by_step = over_columns(dt_j, square)
            LBC = L * BC
            M = (LBC * by_step).astype(bf16)
            of_step = dM * LBC
            dCB += dM * L * by_step
            Z = split_truncated(of_step * by_step)
            of_step = jnp.sum(of_step, axis=1)

            # The rectangle i >= t > j: j in the block of t, then in the blocks before.
            Z = [warps.right(z) for z in Z]
            pattern = jnp.where(
                tiles.iota(thin, 1) < lax.rem(tiles.iota(thin, 0), jnp.int32(BLOCK)), 1.0, 0.0
            )
            between, whole = zeros(*square), zeros(*square)
            for z in Z[::-1]:
                between = warps.block_dot(between, left(pattern.astype(bf16)), z)
                whole = warps.block_dot(whole, warps.constant_left(thin, 1.0, bf16), z)
            warps.put_block_rows(refs.sums, whole, _BEFORE)
            of_decay = jnp.sum(jnp.where(i >= j, between, 0.0), axis=1)

            kept = warps.dot(zeros(CHUNK, P), load_left(B_s), dS_s.T)
            to_end = jnp.exp2(g_end - g_j)
            x, dy = load(x_s), load(dy_s)
            of_weight = jnp.sum(kept * x, axis=1) * to_end
            of_D = jnp.sum(dy * x, axis=1)
            weight = over_columns(to_end * dt_j, x.shape)
            dx = kept * weight + dy * refs.D_gmem[h]
            dx = warps.dot(dx, left(M), dy_s)
            dB = warps.dot(dB, left((x * weight).astype(bf16)), dS_s)
            warps.sync_warp()  # only its own warp reads a row of x
            x_s[...] = dx.astype(bf16)
            warps.sync_warp()
            copies.copy_out(x_s, refs.dx_gmem.at[(*at, h)])
            warps.sync()
            before = sum(warps.block_row(refs.sums, _BEFORE, -n, CHUNK) for n in range(1, BLOCKS))
            of_decay += jnp.sum(jnp.where(i >= j, before, 0.0), axis=1)
            of_tokens = of_step + of_weight, of_decay, of_weight * dt_j, of_D
            for n, value in enumerate(of_tokens):
                refs.rows_gmem.at[b, h, m, n][...] = value
            return dB, dCB

        thin = (CHUNK, BLOCK)
        start(first, 0)
        copies.start_copy(refs.B_gmem.at[(*at, group)], B_s)
        start_C(1)
        for n in range(_BEFORE):
            refs.sums.at[n][...] = plgpu.layout_cast(
                jnp.zeros(CHUNK, f32), plgpu.Layout.WGMMA.reduce(0)
            )
        copies.arrived()
        warps.sync()
        BC = warps.dot(zeros(*square), load_left(B_s), refs.dS.at[1].T)
        dB, dCB = loop(together, step, (zeros(CHUNK, N), zeros(*square)))
        dCB = dCB.astype(bf16)
        dCB_s = refs.x.at[other]
        dCB_s[...] = dCB
        copies.arrived()
        warps.sync()
        dB = warps.dot(dB, left(dCB), refs.dS.at[other])
        refs.dB_gmem.at[(*at, of_sum)][...] = dB
        dC_g = refs.dC_gmem.at[(*at, of_sum)]
        dC_g[...] = warps.dot(tiles.load_from_gmem(dC_g), load_left(dCB_s.T), B_s)

    sums = jax.ShapeDtypeStruct((size.batch, size.length, size.heads // together, N), f32)
    return kernel(
        body,
        name="ssd_portable_of_inputs",
        inputs={
            "x": x,
            "B": B,
            "C": C,
            "g": g,
            "dt": dt,
            "D": D,
            "dy": dy,
            "states": states,
        },
        updates={"dx": dx, "dC": dC},
        outputs={
            "dB": sums,
            "rows": jax.ShapeDtypeStruct((*dt.shape[:3], INPUT_ROWS, CHUNK), f32),
        },
        scratch={
            "x": tiles.tile(2, CHUNK, P),  # then dx
            "dy": tiles.tile(2, CHUNK, P),
            "dS": tiles.tile(2, P, N),  # before and behind all heads C
            "B": tiles.tile(CHUNK, N),
            "g": plgpu.SMEM((2, CHUNK), f32),
            "dt": plgpu.SMEM((2, CHUNK), f32),
            "sums": plgpu.SMEM((_BEFORE + BLOCKS, CHUNK), f32),
        },
        grid={"blocks": size.batch * size.chunks * (size.heads // together)},
        threads=1,
    )


@lowered_once("size")
def of_reads(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    states: jax.Array,
    scales: jax.Array,
    dy: jax.Array,
) -> list[jax.Array]:
    """What dC gets from the states.

    Args:
        size, x, B, C, g, dt, dy: as of `of_inputs`.
        states, scales: of the states that even chunks start from, as `forward` saved them; a block
            of an odd chunk finds its states from them and from the tokens before.

    Returns:
        dC [B, T, sums, N] float32; the gradient of the log decay of what a token reads
        [B, H, chunks, CHUNK].
    """
    P, N, half = size.P, size.N, 64
    together = heads_together(size)

    def body(refs):
        b, m, of_sum, group, first = _block(size, together)
        at = (b, tiles.tokens(m))
        pair, odd = divide(m, 2)
        before = (b, tiles.tokens(m - odd))

        def start_x(h):
            pl.when(odd == 1)(lambda: copies.start_copy(refs.x_gmem.at[(*before, h)], refs.x))

        def start_before(h, slot):
            copies.start_copy_row(refs.g_gmem.at[b, h, m - 1, 0], refs.g_before.at[slot])
            copies.start_copy_row(refs.dt_gmem.at[b, h, m - 1], refs.dt.at[slot])

        def start(h, slot):
            copies.start_copy(refs.dy_gmem.at[(*at, h)], refs.dy.at[slot])
            copies.start_copy(refs.states_gmem.at[b, h, pair], refs.S.at[slot])
            copies.start_copy_row(refs.scales_gmem.at[b, h, pair], refs.scale.at[slot])
            copies.start_copy_row(refs.g_gmem.at[b, h, m, 0], refs.g.at[slot])
            pl.when(odd == 1)(lambda: start_before(h, slot))

        def pass_chunk(slot):
            """The state before the chunk in the place of the one before the chunk before."""
            g_end = refs.g_before[slot, CHUNK - 1]
            weight = jnp.exp2(g_end - tiles.load_columns(refs.g_before.at[slot]))
            weight *= tiles.load_columns(refs.dt.at[slot])
            S_s = refs.S.at[slot]
            S = float16(tiles.load(S_s)).astype(jnp.float32)
            S *= over_columns(tiles.load_rows(refs.scale.at[slot]) * jnp.exp2(g_end), S.shape)
            S, scale = scaled(add_weighed(S, refs.x, weight, refs.B, terms=portable_ends.TERMS))
            warps.sync_warp()  # only its own warp reads a row here
            S_s[...] = held(S)
            refs.scale.at[slot][...] = scale
            warps.sync()

        def step(n, dC):
            h, slot = first + n, lax.rem(n, jnp.int32(2))
            copies.arrived()
            warps.sync()
            start(jnp.minimum(h + 1, first + together - 1), 1 - slot)
            pl.when(odd == 1)(lambda: pass_chunk(slot))
            start_x(jnp.minimum(h + 1, first + together - 1))
            # Rows of S and of dy have a scale, so that a product of float16 loses no digits.
            dy = load(refs.dy.at[slot])
            dy *= over_rows(tiles.load_columns(refs.scale.at[slot]), dy.shape)
            dy, scale = scaled(dy)
            dy, from_start = left(dy), jnp.exp2(tiles.load_rows(refs.g.at[slot])) * scale
            read, sums = 0.0, []
            for sum_of_half, n in zip(dC, range(0, N, half), strict=True):
                columns = slice(n, n + half)
                z = warps.dot(zeros(CHUNK, half), dy, refs.S.at[slot, :, columns], float16)
                read += jnp.sum(z * load(refs.C.at[:, columns]), axis=1)
                sums.append(sum_of_half + z * over_columns(from_start, z.shape))
            refs.read_gmem.at[b, h, m][...] = read * from_start
            return tuple(sums)

        start(first, 0)
        start_x(first)
        copies.start_copy(refs.C_gmem.at[(*at, group)], refs.C)
        pl.when(odd == 1)(lambda: copies.start_copy(refs.B_gmem.at[(*before, group)], refs.B))
        dC = loop(together, step, tuple(zeros(CHUNK, half) for _ in range(0, N, half)))
        for n, z in zip(range(0, N, half), dC, strict=True):
            refs.dC_gmem.at[(*at, of_sum, slice(n, n + half))][...] = z
        copies.arrived()

    sums = (size.batch, size.length, size.heads // together, N)
    return kernel(
        body,
        name="ssd_portable_of_reads",
        inputs={
            "x": x,
            "B": B,
            "C": C,
            "g": g,
            "dt": dt,
            "states": states,
            "scales": scales,
            "dy": dy,
        },
        outputs={
            "dC": jax.ShapeDtypeStruct(sums, jnp.float32),
            "read": jax.ShapeDtypeStruct((size.batch, size.heads, size.chunks, CHUNK), jnp.float32),
        },
        scratch={
            "dy": tiles.tile(2, CHUNK, P),
            "S": tiles.tile(2, P, N),
            "C": tiles.tile(CHUNK, N),
            "x": tiles.tile(CHUNK, P),
            "B": tiles.tile(CHUNK, N),
            "g": plgpu.SMEM((2, CHUNK), jnp.float32),
            "g_before": plgpu.SMEM((2, CHUNK), jnp.float32),
            "dt": plgpu.SMEM((2, CHUNK), jnp.float32),
            "scale": plgpu.SMEM((2, P), jnp.float32),
        },
        grid={"blocks": size.batch * size.chunks * (size.heads // together)},
        threads=1,
    )
