"""Gradient of the portable SSD kernel in three passes; formulas in portable_backward.py.

    ends       walks the chunks of a head from the last to the first and keeps dS of each;
    of_inputs  dx and dB, dC inside chunks: a block has one chunk, and one head after the other;
    of_reads   what dC gets from the states, likewise.

The sums over the heads of a group stay in registers: C B^T and the products of the summed gradient
of C B^T are once a block. Nothing waits for another block.
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
from gt_jax.kernels.ssd import portable_sizes
from gt_jax.kernels.ssd.portable_splits import add_weighed

# Per token: of the step size, of the log decay inside the chunk, of what is kept of it, of D.
INPUT_ROWS = OF_STEP, OF_DECAY, KEPT, OF_D = range(4)
_BEFORE = BLOCKS - 1  # rows of zeros before the sums of blocks


def heads_together(size):
    """Heads of a group whose dB and dC one block adds."""
    most = portable_sizes.TUNING.heads_together
    return max(n for n in range(1, most + 1) if size.heads_per_group % n == 0)


@lowered_once("size", "rows")
def ends(size, rows, first, dy, x, B, C, g, dt, states, dstate):
    """Walks from the end.

    Args:
        size: the call's Sizes; an even number of chunks.
        rows: of the batch, that this call is for; first: [1] int32, the first of them.
        x, dy: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        states: [B, H, chunks / apart, P, N] bfloat16, the states that chunks start from.
        dstate: [B, H, P, N] float32, of the final state.

    Returns:
        Of the rows, dS at the end of every chunk [rows, H, chunks, P, N] bfloat16; the states of
        odd chunks if only those of even ones were saved, else nothing; the gradient of the log
        decay that a chunk carries through, over rows of the state [rows, H, chunks, P]; dS before
        the first chunk.
    """
    P, N, bf16 = size.P, size.N, jnp.bfloat16
    apart = portable_sizes.apart()

    def body(refs):
        row, h = divide(lax.axis_index("heads"), size.heads)
        b = row + refs.first_gmem[0]
        group = h // size.heads_per_group

        def start(m, slot):
            at = (b, tiles.tokens(m))
            copies.start_copy(refs.dy_gmem.at[(*at, h)], refs.dy.at[slot])
            copies.start_copy(refs.C_gmem.at[(*at, group)], refs.C.at[slot])

        def start_odd(m):
            """What the second chunk of a pair needs, and of the first what it follows from."""
            start(m, 1)
            copies.start_copy_row(refs.g_gmem.at[b, h, m, 0], refs.g.at[1])
            copies.start_copy_row(refs.g_gmem.at[b, h, m - 1, 0], refs.g.at[0])
            if apart == 2:
                at = (b, tiles.tokens(m - 1))
                copies.start_copy(refs.x_gmem.at[(*at, h)], refs.x)
                copies.start_copy(refs.B_gmem.at[(*at, group)], refs.B)
                copies.start_copy_row(refs.dt_gmem.at[b, h, m - 1], refs.dt)

        def put(z, target):
            warps.sync_warp()
            refs.out[...] = z.astype(bf16)
            warps.sync_warp()
            copies.copy_out(refs.out, target)

        def pass_through(m, slot, dS, S, decay, weight):
            """dS before a chunk, of which S is the state and all is in shared memory."""
            refs.carried_gmem.at[row, h, m][...] = decay * jnp.sum(S * dS, axis=1)
            put(dS, refs.ends_gmem.at[row, h, m])
            return add_weighed(dS * decay, refs.dy.at[slot], weight, refs.C.at[slot], terms=1)

        def step(back, dS):
            pair = size.chunks // 2 - 1 - back
            even, odd = 2 * pair, 2 * pair + 1
            state = lambda m: tiles.load_from_gmem(
                refs.states_gmem.at[b, h, lax.div(m, jnp.int32(apart))]
            )
            S = state(even)
            following = state(odd) if apart == 1 else None
            copies.arrived()
            warps.sync()
            start(even, 0)
            g, decay = (
                [tiles.load_columns(refs.g.at[n]) for n in range(2)],
                [jnp.exp2(refs.g[n, CHUNK - 1]) for n in range(2)],
            )
            if apart == 2:
                weight = jnp.exp2(refs.g[0, CHUNK - 1] - g[0]) * tiles.load_columns(refs.dt)
                following = S.astype(jnp.float32) * decay[0]
                following = add_weighed(following, refs.x, weight, refs.B, terms=2)
                put(following, refs.odd_gmem.at[row, h, pair])
            dS = pass_through(odd, 1, dS, following.astype(jnp.float32), decay[1], jnp.exp2(g[1]))
            copies.arrived()
            warps.sync()
            pl.when(pair > 0)(lambda: start_odd(odd - 2))
            return pass_through(even, 0, dS, S.astype(jnp.float32), decay[0], jnp.exp2(g[0]))

        start_odd(jnp.int32(size.chunks - 1))
        dS = tiles.load_from_gmem(refs.dlast_gmem.at[b, h])
        refs.dfirst_gmem.at[row, h][...] = loop(size.chunks // 2, step, dS)

    shape = (rows, size.heads, size.chunks, P, N)
    odd = jax.ShapeDtypeStruct((*shape[:2], size.chunks // 2, P, N), bf16)
    once = {"x": x, "B": B, "dt": dt} if apart == 2 else {}
    results = kernel(
        body,
        name="ssd_portable_ends",
        inputs={"first": first, "dy": dy, "C": C, "g": g, "states": states, "dlast": dstate} | once,
        outputs={
            "ends": jax.ShapeDtypeStruct(shape, bf16),
            "carried": jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
            "dfirst": jax.ShapeDtypeStruct((*shape[:2], P, N), jnp.float32),
            "odd": odd if apart == 2 else None,
        },
        scratch={
            "dy": tiles.tile(2, CHUNK, P),
            "C": tiles.tile(2, CHUNK, N),
            "out": tiles.tile(P, N),
            "x": tiles.tile(CHUNK, P) if apart == 2 else None,
            "B": tiles.tile(CHUNK, N) if apart == 2 else None,
            "g": plgpu.SMEM((2, CHUNK), jnp.float32),
            "dt": plgpu.SMEM((CHUNK,), jnp.float32),
        },
        grid={"heads": rows * size.heads},
        threads=1,
    )
    return results if apart == 2 else (*results, None)


def _block(size, together):
    """Row of the batch, chunk and heads of a block: b, m, which of the sums, group, first head."""
    n, of_sum = divide(lax.axis_index("blocks"), size.heads // together)
    b, m = divide(n, size.chunks)
    first = of_sum * together
    return b, m, of_sum, first // size.heads_per_group, first


@lowered_once("size", "rows")
def of_inputs(size, rows, first, x, B, C, g, dt, D, ends, dy):
    """Chunks by themselves, with dS at their ends.

    Args:
        size: the call's Sizes.
        x, dy: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK]; dt: [B, H, chunks, CHUNK]; D: [B, H].
        ends: [B, H, chunks, P, N] bfloat16.

    Returns:
        dx; dB, and dC without what the states give, [B, T, sums, N] float32; INPUT_ROWS
        [B, H, chunks, rows, CHUNK].
    """
    P, N = size.P, size.N
    square, bf16, f32 = (CHUNK, CHUNK), jnp.bfloat16, jnp.float32
    together = heads_together(size)

    def body(refs):
        row, m, of_sum, group, first = _block(size, together)
        b = row + refs.first_gmem[0]
        at, out = (b, tiles.tokens(m)), (row, tiles.tokens(m))
        B_s, other = refs.B, together % 2  # the place that the last head leaves

        def start(h, slot):
            copies.start_copy(refs.x_gmem.at[(*at, h)], refs.x.at[slot])
            copies.start_copy(refs.dy_gmem.at[(*at, h)], refs.dy.at[slot])
            copies.start_copy(refs.ends_gmem.at[row, h, m], refs.dS.at[slot])
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
            g_s = refs.g.at[slot]
            g_j, dt_j, g_end = (
                tiles.load_rows(g_s),
                tiles.load_rows(refs.dt.at[slot]),
                refs.g[slot, CHUNK - 1],
            )

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
            dx = kept * weight + dy * refs.D_gmem[b, h]
            dx = warps.dot(dx, left(M), dy_s)
            dB = warps.dot(dB, left((x * weight).astype(bf16)), dS_s)
            warps.sync_warp()  # only its own warp reads a row of x
            x_s[...] = dx.astype(bf16)
            warps.sync_warp()
            copies.copy_out(x_s, refs.dx_gmem.at[(*out, h)])
            warps.sync()
            before = sum(warps.block_row(refs.sums, _BEFORE, -n, CHUNK) for n in range(1, BLOCKS))
            of_decay += jnp.sum(jnp.where(i >= j, before, 0.0), axis=1)
            of_tokens = of_step + of_weight, of_decay, of_weight * dt_j, of_D
            for n, value in enumerate(of_tokens):
                refs.rows_gmem.at[row, h, m, n][...] = value
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
        refs.dB_gmem.at[(*out, of_sum)][...] = dB
        dC = warps.dot(zeros(CHUNK, N), load_left(dCB_s.T), B_s)
        refs.dC_gmem.at[(*out, of_sum)][...] = dC

    sums = jax.ShapeDtypeStruct((rows, size.length, size.heads // together, N), f32)
    return kernel(
        body,
        name="ssd_portable_of_inputs",
        inputs={
            "first": first,
            "x": x,
            "B": B,
            "C": C,
            "g": g,
            "dt": dt,
            "D": D,
            "ends": ends,
            "dy": dy,
        },
        outputs={
            "dx": jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
            "dB": sums,
            "dC": sums,
            "rows": jax.ShapeDtypeStruct((rows, *dt.shape[1:3], len(INPUT_ROWS), CHUNK), f32),
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
        grid={"blocks": rows * size.chunks * (size.heads // together)},
        threads=1,
    )


@lowered_once("size", "rows")
def of_reads(size, rows, first, C, g, states, odd, dy):
    """What the states give to dC; arguments as of `of_inputs`.

    Returns:
        dC [B, T, sums, N] float32; the gradient of the log decay of what a token reads
        [B, H, chunks, CHUNK].
    """
    P, N, half = size.P, size.N, 64
    together = heads_together(size)

    def body(refs):
        row, m, of_sum, group, first = _block(size, together)
        b = row + refs.first_gmem[0]
        at, out = (b, tiles.tokens(m)), (row, tiles.tokens(m))

        def start(h, slot):
            copies.start_copy(refs.dy_gmem.at[(*at, h)], refs.dy.at[slot])
            copy = lambda state: copies.start_copy(state, refs.S.at[slot])
            if odd is None:
                copy(refs.states_gmem.at[b, h, m])
            else:
                pair, second = divide(m, 2)
                pl.when(second == 0)(lambda: copy(refs.states_gmem.at[b, h, pair]))
                pl.when(second == 1)(lambda: copy(refs.odd_gmem.at[row, h, pair]))
            copies.start_copy_row(refs.g_gmem.at[b, h, m, 0], refs.g.at[slot])

        def step(n, dC):
            h, slot = first + n, lax.rem(n, jnp.int32(2))
            copies.arrived()
            warps.sync()
            start(jnp.minimum(h + 1, first + together - 1), 1 - slot)
            from_start = jnp.exp2(tiles.load_rows(refs.g.at[slot]))
            dy, read, sums = load_left(refs.dy.at[slot]), 0.0, []
            for sum_of_half, n in zip(dC, range(0, N, half), strict=True):
                columns = slice(n, n + half)
                z = warps.dot(zeros(CHUNK, half), dy, refs.S.at[slot, :, columns])
                read += jnp.sum(z * load(refs.C.at[:, columns]), axis=1)
                sums.append(sum_of_half + z * over_columns(from_start, z.shape))
            refs.read_gmem.at[row, h, m][...] = read * from_start
            return tuple(sums)

        start(first, 0)
        copies.start_copy(refs.C_gmem.at[(*at, group)], refs.C)
        dC = loop(together, step, tuple(zeros(CHUNK, half) for _ in range(0, N, half)))
        for n, z in zip(range(0, N, half), dC, strict=True):
            refs.dC_gmem.at[(*out, of_sum, slice(n, n + half))][...] = z
        copies.arrived()

    sums = (rows, size.length, size.heads // together, N)
    return kernel(
        body,
        name="ssd_portable_of_reads",
        inputs={"first": first, "C": C, "g": g, "states": states, "odd": odd, "dy": dy},
        outputs={
            "dC": jax.ShapeDtypeStruct(sums, jnp.float32),
            "read": jax.ShapeDtypeStruct((rows, size.heads, size.chunks, CHUNK), jnp.float32),
        },
        scratch={
            "dy": tiles.tile(2, CHUNK, P),
            "S": tiles.tile(2, P, N),
            "C": tiles.tile(CHUNK, N),
            "g": plgpu.SMEM((2, CHUNK), jnp.float32),
        },
        grid={"blocks": rows * size.chunks * (size.heads // together)},
        threads=1,
    )
