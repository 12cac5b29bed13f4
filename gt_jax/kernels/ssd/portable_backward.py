"""Gradient of the portable SSD kernel: one walk over the chunks from the last to the first.

Per chunk, with dS the gradient of the state that leaves it, L = exp2(g_i - g_j) where i >= j:

    dM = dy x^T                      (of the matrix that multiplies x; i reads j)
    dx = (L * C B^T * dt_j)^T dy + weight (B dS^T) + D dy
    dC = (L * dM * dt_j) B + (exp2(g) dy) S          summed over the heads of a group
    dB = (L * dM * dt_j)^T C + (weight x) dS         likewise
    dS <- exp2(g_end) dS + (exp2(g) dy)^T C

Squares are held transposed, [j, i], so that M^T is a left operand. The gradient of the log decay
sums the rectangle i >= t > j of L * C B^T * dt_j * dM by a product with ones, never as a difference
of sums.

The state that every other chunk starts from was saved; the one between follows from it. dB and dC
are sums over heads whose blocks form chains: each adds its own to what the block before left, when
that has passed the chunk on (a semaphore in global memory). The order is fixed, so the bits are the
same every time. Blocks start in the order of their numbers, and wait only for lower ones.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import (
    CHUNK,
    batched_as_rows,
    divide,
    kernel,
    loop,
    lowered_once,
    pass_on_turn,
    wait_for_turn,
)
from gt_jax.kernels.pallas.terms import split_truncated
from gt_jax.kernels.pallas.tiles import over_columns, over_rows
from gt_jax.kernels.pallas.warps import left, load, load_columns, load_left, load_rows, zeros
from gt_jax.kernels.ssd import portable_passes as passes
from gt_jax.kernels.ssd import portable_sizes
from gt_jax.kernels.ssd.hopper_sizes import Sizes
from gt_jax.kernels.ssd.portable_splits import add_weighed

# Gradients of the step size and of the log decay of each token, the latter of the rectangle inside
# the chunk alone; terms of a token's read, of what is kept of it, and of a row of the state.
_ROWS = _OF_STEP, _OF_DECAY, _READ, _KEPT, _CARRIED = range(5)


def backward(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    D: jax.Array,
    states: jax.Array,
    dy: jax.Array,
    dstate: jax.Array,
    *,
    of_start: bool,
) -> tuple[jax.Array, ...]:
    """Gradients, the sums over chains and over time still to be finished.

    Args:
        size: the call's Sizes; an even number of chunks.
        x: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        D: [H] float32.
        states: [B, H, chunks / 2, P, N] bfloat16, the state every other chunk starts from.
        dy: [B, T, H, P] as x; dstate: [B, H, P, N] float32.
        of_start: whether the gradient of the initial state is asked for.

    Returns:
        dx; dB and dC [B, T, chains, N] float32; the gradients of the step size and of the log decay
        [B, H, chunks, CHUNK]; dD [B, H, CHUNK]; with of_start the gradient of the initial state.
    """
    D = jnp.broadcast_to(D, (size.batch, size.heads))
    if portable_sizes.TUNING.passes:
        return _in_passes(size, x, B, C, g, dt, D, states, dy, dstate, of_start)

    @batched_as_rows
    def rows(x, *arrays):
        return _backward(size._replace(batch=x.shape[0]), x, *arrays)

    dx, dB, dC, of_rows, dD, dstart = rows(x, B, C, g, dt, D, states, dy, dstate)
    # A decay at t decays what is read at i >= t, what is kept from j < t, and all that is carried.
    until = jnp.tri(CHUNK, dtype=jnp.float32)  # [i, t]: t <= i
    sums = lambda row, over: jnp.matmul(of_rows[..., row, :], over, precision=lax.Precision.HIGHEST)
    da = of_rows[..., _OF_DECAY, :] + sums(_READ, until) + sums(_KEPT, 1 - until)
    da += jnp.sum(of_rows[..., _CARRIED, :], axis=-1, keepdims=True)
    return dx, dB, dC, of_rows[..., _OF_STEP, :], da, dD, *((dstart,) if of_start else ())


def _in_passes(size, x, B, C, g, dt, D, states, dy, dstate, of_start):
    most = portable_sizes.TUNING.parts
    parts = max(n for n in range(1, most + 1) if size.batch % n == 0)
    rows, found = size.batch // parts, []
    for part in range(parts):
        first = jnp.full(1, part * rows, jnp.int32)
        ends, carried, dstart, *odd = passes.ends(
            size, rows, first, dy, x, B, C, g, dt, states, dstate
        )
        dx, dB, dC, of_rows = passes.of_inputs(size, rows, first, x, B, C, g, dt, D, ends, dy)
        dC_read, read = passes.of_reads(size, rows, first, C, g, states, *odd, dy)
        found.append((dx, dB, dC + dC_read, of_rows, carried, read, dstart))
    dx, dB, dC, of_rows, carried, read, dstart = (
        z[0] if parts == 1 else jnp.concatenate(z) for z in zip(*found)
    )
    until = jnp.tri(CHUNK, dtype=jnp.float32)  # [i, t]: t <= i
    sums = lambda row, over: jnp.matmul(row, over, precision=lax.Precision.HIGHEST)
    of_step, of_decay, kept, of_D = (of_rows[..., n, :] for n in passes.INPUT_ROWS)
    da = of_decay + sums(read, until) + sums(kept, 1 - until)
    da += jnp.sum(carried, axis=-1, keepdims=True)
    dD = jnp.sum(of_D, axis=2)
    return dx, dB, dC, of_step, da, dD, *((dstart,) if of_start else ())


def _links(size):
    """Blocks of a chain: all heads of a group, or a divisor of them."""
    heads = size.heads // size.groups
    if interpreting():  # knows no waiting
        return 1
    return max(n for n in range(1, portable_sizes.TUNING.longest_chain + 1) if heads % n == 0)


@lowered_once("size")
def _backward(size, x, B, C, g, dt, D, states, dy, dstate):
    P, N = size.P, size.N
    square, wide, bf16, f32 = (CHUNK, CHUNK), (CHUNK, N), jnp.bfloat16, jnp.float32
    links = _links(size)
    chains = size.heads // links

    def body(refs):
        x_s, dy_s, B_s, C_s, S_s, dS_s, Z_s, dCB_s = (
            getattr(refs, name) for name in ("x", "dy", "B", "C", "S", "dS", "Z", "dCB")
        )
        b, h = divide(lax.axis_index("heads"), size.heads)
        group = h // (size.heads // size.groups)
        chain, link = divide(h, links)
        D_h = refs.D_gmem[b, h]
        if links > 1:
            turns = pl.get_global(plgpu.SemaphoreType.REGULAR((size.batch * chains * size.chunks,)))

        def fetch(m, *names):
            for name in names:
                source = getattr(refs, f"{name}_gmem")
                source = source.at[b, tiles.tokens(m), h if name in ("x", "dy") else group]
                copies.copy_in(source, getattr(refs, name))

        def add_in_turn(m, sums):
            """Adds to the sums of a chain, behind the blocks before."""
            if links > 1:
                turn = (b * chains + chain) * size.chunks + m
                wait_for_turn(turns, turn, link)
            for to, value in sums:
                to = to.at[b, tiles.tokens(m), chain]

                @pl.when(link == 0)
                def _(to=to, value=value):
                    to[...] = value

                @pl.when(link > 0)
                def _(to=to, value=value):
                    to[...] = value + tiles.load_from_gmem(to)

            if links > 1:
                warps.sync()  # all warps have written it
                pass_on_turn(turns, turn)

        def fetch_state(m):
            """The state that chunk m starts from, into S_s; no warp reads any tile any more."""
            pair, odd = divide(m, 2)
            pl.when(odd == 0)(lambda: copies.copy_in(refs.states_gmem.at[b, h, pair], S_s))

            @pl.when(odd == 1)
            def _():
                before = m - 1
                fetch(before, "x", "B")
                warps.sync()
                g_m = load_columns(refs.g_gmem.at[b, h, before, 0])
                g_end = refs.g_gmem[b, h, before, 0, CHUNK - 1]
                weight = jnp.exp2(g_end - g_m) * load_columns(refs.dt_gmem.at[b, h, before])
                S = tiles.load_from_gmem(refs.states_gmem.at[b, h, pair]).astype(f32)
                S *= jnp.exp2(g_end)
                S_s[...] = add_weighed(S, x_s, weight, B_s, terms=2).astype(bf16)
                warps.sync()

        def step(back, carry):
            m = size.chunks - 1 - back
            fetch_state(m)
            dS, dD = carry
            fetch(m, "x", "dy", "B", "C")
            g_m, dt_m = refs.g_gmem.at[b, h, m, 0], refs.dt_gmem.at[b, h, m]
            g_end = refs.g_gmem[b, h, m, 0, CHUNK - 1]
            g_rows, dt_j = load_rows(g_m), load_rows(dt_m)
            dS_s[...] = dS.astype(bf16)
            warps.sync()

            if portable_sizes.TUNING.prefetch:
                earlier = tiles.tokens(jnp.maximum(m - 1, 0))
                for name, head in (("x", h), ("dy", h), ("B", group), ("C", group)):
                    copies.prefetch(getattr(refs, f"{name}_gmem").at[b, earlier, head])
            BC = warps.dot(zeros(*square), load_left(B_s), C_s.T)
            dM = warps.dot(zeros(*square), load_left(x_s), dy_s.T)
            i = tiles.iota(square, 1)
            passed = over_rows(load_columns(g_m), square) - over_columns(g_rows, square)
            L = jnp.exp2(jnp.where(i >= tiles.iota(square, 0), passed, -jnp.inf))
            by_step = over_columns(dt_j, square)
            M = (L * BC * by_step).astype(bf16)
            dM *= L
            dCB = (dM * by_step).astype(bf16)
            dCB_s[...] = dCB
            of_step = dM * BC
            # Two terms: what the log decay gets is one number a token, of sums that may cancel.
            Z = split_truncated(of_step * by_step)
            Z_s[...] = Z[0]
            of_step = jnp.sum(of_step, axis=1)

            kept = warps.dot(zeros(CHUNK, P), load_left(B_s), dS_s.T)
            to_end, from_start = jnp.exp2(g_end - g_rows), jnp.exp2(g_rows)
            x, dy = load(x_s), load(dy_s)
            of_weight = jnp.sum(kept * x, axis=1)
            of_step += of_weight * to_end
            dD += jnp.sum(dy * x, axis=1)
            weight = over_columns(to_end * dt_j, x.shape)
            dx = warps.dot(kept * weight + dy * D_h, left(M), dy_s).astype(bf16)
            dB = warps.dot(zeros(*wide), load_left(x_s), dS_s)
            dB *= over_columns(to_end * dt_j, wide)
            warps.sync_warp()  # only its own warp reads a row of x
            x_s[...] = Z[1]
            warps.sync()

            t = tiles.iota(square, 0)
            ones = jnp.where(tiles.iota(square, 1) < t, 1.0, 0.0).astype(bf16)
            between = warps.dot(zeros(*square), left(ones), x_s)  # [t, i]: sum over j < t
            between = warps.dot(between, left(ones), Z_s)
            of_decay = jnp.sum(jnp.where(tiles.iota(square, 1) >= t, between, 0.0), axis=1)
            warps.sync()
            x_s[...] = dx
            warps.sync_warp()
            copies.copy_out(x_s, refs.dx_gmem.at[b, tiles.tokens(m), h])
            carried = jnp.sum(load(S_s) * dS, axis=1) * jnp.exp2(g_end)
            dC = warps.dot(zeros(*wide), load_left(dy_s), S_s)
            dC *= over_columns(from_start, wide)
            read = jnp.sum(dC * load(C_s), axis=1)
            dC = warps.dot(dC, load_left(dCB_s.T), B_s)
            dB = warps.dot(dB, left(dCB), C_s)
            add_in_turn(m, ((refs.dB_gmem, dB), (refs.dC_gmem, dC)))
            for n, row in enumerate((of_step, of_decay, read, of_weight * to_end * dt_j, carried)):
                refs.rows_gmem.at[b, h, m, n][...] = row
            from_start = jnp.exp2(load_columns(g_m))
            dS = add_weighed(dS * jnp.exp2(g_end), dy_s, from_start, C_s, terms=1)
            warps.sync()
            return dS, dD

        dD = plgpu.layout_cast(jnp.zeros(CHUNK, f32), plgpu.Layout.WGMMA.reduce(1))
        carry = tiles.load_from_gmem(refs.dlast_gmem.at[b, h]), dD
        refs.dfirst_gmem.at[b, h][...], refs.dD_gmem.at[b, h][...] = loop(size.chunks, step, carry)

    sums = jax.ShapeDtypeStruct((size.batch, size.length, chains, N), f32)
    inputs = {"x": x, "B": B, "C": C, "g": g, "dt": dt, "D": D, "states": states, "dy": dy}
    return kernel(
        body,
        name="ssd_portable_backward",
        inputs=inputs | {"dlast": dstate},
        outputs={
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "dB": sums,
            "dC": sums,
            "rows": jax.ShapeDtypeStruct((*dt.shape[:3], len(_ROWS), CHUNK), f32),
            "dD": jax.ShapeDtypeStruct((size.batch, size.heads, CHUNK), f32),
            "dfirst": jax.ShapeDtypeStruct(dstate.shape, f32),
        },
        scratch={
            "x": tiles.tile(CHUNK, P),  # then the low term of Z, then dx
            "dy": tiles.tile(CHUNK, P),
            "B": tiles.tile(CHUNK, N),
            "C": tiles.tile(CHUNK, N),
            "S": tiles.tile(P, N),
            "dS": tiles.tile(P, N),
            "Z": tiles.tile(*square),
            "dCB": tiles.tile(*square),
        },
        grid={"heads": size.batch * size.heads},
        threads=1,
    )
