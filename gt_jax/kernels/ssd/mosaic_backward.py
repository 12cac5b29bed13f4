"""Gradient of the Hopper SSD kernel: one pass over the chunks from the last to the first.

Per chunk, with dS the gradient of the state that leaves it, and everything the forward pass knows:

    dM = dy x^T                      (of the matrix that multiplies x; i reads j)
    dx = (L * C B^T * dt_j)^T dy + weight (B dS^T) + D dy
    dC = (L * dM * dt_j) B + (exp2(g) dy) S          summed over the heads of a group
    dB = (L * dM * dt_j)^T C + (weight x) dS         likewise
    dS <- exp2(g_end) dS + (exp2(g) dy)^T C

Squares are held transposed, [j, i], so that M^T is an operand in registers. The two warpgroups of a
block swap operands through shared memory and sum their two heads: one takes dC, the other dB. The
blocks of a group add theirs to the same float32 sums, one after the other (a chain): what a block
adds to a chunk waits for the block before, which is a moment ahead of it.
The gradient of the log decay sums the rectangle i >= t > j of L * C B^T * dt_j * dM by a product
with ones, never as a difference of sums.
The state that every other chunk starts from was saved; the one between follows from it and from the
x and B that are needed next anyway.

Where operands have two parts, a block owns one head, and shared memory holds one chunk; the state
of every chunk was saved, in float32. C B^T, dy x^T and what is summed over the rectangle have three
parts, as the gradient of the log decay, one number a token, may be small beside its terms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.hopper import interpreting
from gt_jax.kernels.mosaic import (
    CHUNK,
    difference,
    divide,
    join,
    matmul,
    over_columns,
    over_rows,
    parts_of,
    put,
    split_in_place,
    tokens,
    total,
    transpose,
)
from gt_jax.kernels.ssd.mosaic_pieces import weighed

_STAGES = {1: 2, 2: 1}  # parts of an operand -> chunks in flight
_LONGEST_CHAIN = 16  # blocks running at a time; each starts a moment after the one before
_ROWS_TOGETHER = 8  # rows of a batch whose blocks run at a time, at most
ROWS = ("ddt", "da")  # gradients of the step size and of the log decay


def _every_product(a, b):
    """Operands of all products of two parts each, where matmul drops the smallest.

    For what enters the gradient of the log decay.
    """
    return [*zip(a[1:], b[1:]), (a, b)]


class _Tiles(NamedTuple):
    """Shared memory of a chunk and a head: x and dy as they arrived, and parts of operands."""

    x: Any
    dy: Any
    x_b: tuple
    dy_b: tuple
    B_b: tuple
    C_b: tuple
    S_b: tuple
    dS_b: tuple
    dCB_b: tuple


def backward(size, x, B, C, g, dt, D, states, dy, dstate, *, of_start):
    """Gradients, the sums over chains and over time still to be finished.

    Args:
        size: the call's Sizes.
        g: [B, H, chunks, parts, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        states: [B, H, chunks / 2, P, N] bfloat16, the state every other chunk starts from, or
            [B, H, chunks, P, N] float32, of every chunk, where x is float32.
        dy: [B, T, H, P] as x; dstate: [B, H, P, N] float32.
        of_start: whether the gradient of the initial state is asked for.

    Returns:
        dx; dB and dC [B, chunks * CHUNK, chains, N] float32; rows [B, H, chunks, 2, CHUNK] as named
        in ROWS; dD [B, H, CHUNK]; with of_start the gradient of the initial state.
    """
    D = jnp.broadcast_to(D, (size.batch, size.heads))

    @mosaic.batched_as_rows
    def rows(x, *arrays):
        return _backward(size._replace(batch=x.shape[0]), of_start, x, *arrays)

    return rows(x, B, C, g, dt, D, states, dy, dstate)


def _order(size):
    """How many rows of the batch run together, and into how many chains a group's blocks form."""
    together = max(n for n in range(1, _ROWS_TOGETHER + 1) if size.batch % n == 0)
    blocks = size.heads // size.groups // size.heads_per_block
    if interpreting():  # knows no copies that add
        return together, blocks
    running = min(blocks, mosaic.MULTIPROCESSORS // together)
    return together, pl.cdiv(running, _LONGEST_CHAIN)


@mosaic.lowered_once("size", "of_start")
def _backward(size, of_start, x, B, C, g, dt, D, states, dy, dstate):
    P, N, W, parts = size.P, size.N, size.heads_per_block, size.parts
    square, half, stages = (CHUNK, CHUNK), N // 2, _STAGES[parts]
    split = functools.partial(mosaic.split, parts=parts)
    together, chains_of_group = _order(size)
    blocks, blocks_of_group = size.heads // W, size.heads // size.groups // W
    links = pl.cdiv(blocks_of_group, chains_of_group)
    chains, last = size.groups * chains_of_group, size.chunks - 1

    def by_columns(refs):
        """The places of a sum, each with the columns it holds."""
        width = N // len(refs)
        return [(ref, slice(n * width, (n + 1) * width)) for n, ref in enumerate(refs)]

    def body(x_, B_, C_, g_, dt_, D_, states_, dy_, dlast_, dx_, dB_, dC_, rows_, dD_, *dfirst_,
             x_and_dB, dy_and_dC, B_and_dB, C_and_dC, g_s, dt_s, S_s, dS_s, dCB_s, before_s, zero_s,
             rows_s, ready, S_ready, done, operands_ready, operands_read):  # fmt: skip
        # Where a chunk's inputs were, its dB and dC leave from.
        if parts == 1:  # in halves of columns
            (x_split_s, dB_right), (dy_split_s, dC_right) = x_and_dB, dy_and_dC
            (B_split_s, dB_left), (C_split_s, dC_left) = B_and_dB, C_and_dC
            dB_s, dC_s = (dB_left, dB_right.at[:, 0]), (dC_left, dC_right.at[:, 0])
            x_s, dy_s, B_s, C_s = (
                mosaic.whole_and_split(parts, z)[0]
                for z in (x_split_s, dy_split_s, B_split_s, C_split_s)
            )
        else:
            (x_s, x_split_s), (dy_s, dy_split_s) = x_and_dB, dy_and_dC
            (B_s, B_split_s), (C_s, C_split_s) = B_and_dB, C_and_dC
            dB_s, dC_s = (B_s,), (C_s,)
            (x_split_s, B_third_s), (dCB_s, C_third_s) = x_split_s, dCB_s
        S_s, S_split_s = mosaic.whole_and_split(parts, S_s)
        # Blocks start in this order, so that none waits for one that has no place yet.
        place, row = divide(lax.axis_index("block"), together)
        rows, block = divide(place, blocks)
        row += rows * together
        head0 = block * W
        group, of_group = divide(block, blocks_of_group)
        chain, link = divide(of_group, links)
        chain += group * chains_of_group
        wg = lax.axis_index("wg")

        @pl.when(wg == W)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            if links > 1:
                number = size.batch * chains * size.chunks
                turns = pl.get_global(plgpu.SemaphoreType.REGULAR((number,)))

            def fetch(k, _=None):
                m, slot = last - k, lax.rem(k, jnp.int32(stages))
                there = ready.at[slot]
                plgpu.copy_gmem_to_smem(B_.at[row, tokens(m), group], B_s.at[slot], there)
                plgpu.copy_gmem_to_smem(C_.at[row, tokens(m), group], C_s.at[slot], there)
                for h in range(W):
                    head = head0 + h
                    plgpu.copy_gmem_to_smem(x_.at[row, tokens(m), head], x_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(dy_.at[row, tokens(m), head], dy_s.at[slot, h], there)
                    for part in range(parts):
                        sums = g_.at[row, head, m, part]
                        plgpu.copy_gmem_to_smem(sums, g_s.at[slot, h, part], there)
                    plgpu.copy_gmem_to_smem(dt_.at[row, head, m], dt_s.at[slot, h], there)

            def fetch_states(k):
                n = lax.div(last - k, jnp.int32(2)) if parts == 1 else last - k
                for h in range(W):
                    plgpu.copy_gmem_to_smem(states_.at[row, head0 + h, n], S_s.at[h], S_ready)

            def store(m, slot, **how):
                for refs, sums in ((dB_s, dB_), (dC_s, dC_)):
                    for ref, columns in by_columns(refs):
                        to = sums.at[row, tokens(m), chain, columns]
                        plgpu.copy_smem_to_gmem(ref.at[slot], to, **how)
                plgpu.wait_smem_to_gmem(0)

            def step(k, _):
                m, slot = last - k, lax.rem(k, jnp.int32(stages))
                plgpu.barrier_wait(done)
                pl.when(k < last)(lambda: fetch_states(k + 1))
                if parts > 1:
                    dx = dx_.at[row, tokens(m), head0]
                    plgpu.copy_smem_to_gmem(x_s.at[slot, 0], dx)
                pl.when(link == 0)(lambda: store(m, slot))
                if links > 1:
                    turn = (row * chains + chain) * size.chunks + m

                    @pl.when(link > 0)
                    def _():
                        mosaic.wait_for_turn(turns, turn, link)
                        store(m, slot, reduction_op="add")

                    mosaic.pass_on_turn(turns, turn)
                pl.when(k + stages <= last)(lambda: fetch(k + stages))

            mosaic.loop(min(stages, size.chunks), fetch, None)
            fetch_states(jnp.int32(0))
            mosaic.loop(size.chunks, step, None)

        def compute(wg):  # a plain number: addresses known when compiling save registers
            plgpu.set_max_registers(240, action="increase")
            head = head0 + wg
            rows_b = rows_s.at[wg]
            D_h = D_[row, head]

            zero_s[wg] = jnp.int32(0)

            def zero():
                """0, read from memory: an address it is added to is computed where it is used, not
                once before the loop to occupy registers it needs."""
                return zero_s[wg]

            if wg == 0:
                t, j = mosaic.iota(square, 0), mosaic.iota(square, 1)
                before_s[0] = (j < t).astype(jnp.bfloat16)
                plgpu.commit_smem()

            plgpu.barrier_arrive(operands_read)
            plgpu.barrier_wait(operands_read)

            def not_before(z):
                """z [j, i] where i >= j, else 0; a mask from iotas would hold registers."""
                before = mosaic.load(before_s.at[zero()]).astype(jnp.float32)
                return z - z * before

            def sum_before(refs):
                """For [t, i], the sum of [j, i] over j < t."""
                return square, (before_s.at[zero()], refs)

            def operands(slot):
                z = zero()
                x, dy, *own = (x.at[slot + z, wg + z] for x in (x_s, dy_s, x_split_s, dy_split_s))
                of_group = (x.at[slot + z] for x in (B_split_s, C_split_s))
                of_states = (x.at[wg + z] for x in (S_split_s, dS_s, dCB_s))
                return _Tiles(x, dy, *map(parts_of, (*own, *of_group, *of_states)))

            def decays(slot, load):
                return [load(ref) for ref in parts_of(g_s.at[slot, wg])]

            def whole_decay(slot):
                return [g_s[slot, wg, part, CHUNK - 1] for part in range(parts)]

            def in_three(slot):
                """Places of three parts of B, C, x and dy; until dM, x and dCB lend the third."""
                at, z = operands(slot), zero()
                thirds = B_third_s.at[z], C_third_s.at[z], *at.dCB_b
                return [
                    (*two, third) for two, third in zip((at.B_b, at.C_b, at.x_b, at.dy_b), thirds)
                ]

            def split_and_multiply(a, b, places):
                """a b^T of float32 tiles, of which places() are the places of three parts."""
                for z, refs in zip((a, b), places()):
                    z = mosaic.load(z)
                    plgpu.commit_smem()  # every warp has read it: its parts may take its place
                    put(refs, mosaic.split(z, 3))
                plgpu.commit_smem()
                a, b = places()
                (product,) = matmul((square, (a[2], b[0].T), (a[0], b[2].T)))
                a, b = places()  # in one go the addresses alone would fill the registers
                (product,) = matmul((product, *_every_product(a[:2], transpose(b[:2]))))
                return product

            def state_between(slot):
                """What an odd chunk starts from, in place of what the one before starts from."""
                plgpu.barrier_wait(ready.at[slot])
                at = operands(slot)
                g, dt = decays(slot, mosaic.load_columns), mosaic.load_columns(dt_s.at[slot, wg])
                g_end = whole_decay(slot)
                kept = weighed(at.x_b, jnp.exp2(difference(g_end, g)) * dt, at.B_b)
                (S,) = matmul((join(at.S_b) * jnp.exp2(total(g_end)), *kept))
                put(parts_of(S_split_s.at[wg]), split(S))

            def step(k, carry):
                dS, dD = carry
                m, slot = last - k, lax.rem(k, jnp.int32(stages))
                odd = lax.rem(m, jnp.int32(2)) == 1
                at = operands(slot)
                if parts == 1:
                    pl.when(odd | (k == 0))(lambda: plgpu.barrier_wait(ready.at[slot]))
                    BC, dM = matmul(
                        (square, (at.B_b, transpose(at.C_b))),
                        (square, (at.x_b, transpose(at.dy_b))),
                    )
                else:
                    plgpu.barrier_wait(ready.at[slot])
                    BC = split_and_multiply(B_s.at[slot], C_s.at[slot], lambda: in_three(slot)[:2])
                    dM = split_and_multiply(at.x, at.dy, lambda: in_three(slot)[2:])

                g, dt = decays(slot, mosaic.load_rows), mosaic.load_rows(dt_s.at[slot, wg])
                g_i, g_end = decays(slot, mosaic.load_columns), whole_decay(slot)
                passed = difference(
                    [over_rows(z, square) for z in g_i], [over_columns(z, square) for z in g]
                )
                L = jnp.exp2(jnp.minimum(passed, 0.0))
                L = not_before(L)
                dt_j = over_columns(dt, square)
                M = split(L * BC * dt_j)
                dM *= L
                dCB = split(dM * dt_j)
                of_dt = dM * BC
                ddt = jnp.sum(of_dt, axis=1)
                at = operands(slot)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results left; all warps are here
                # dCB and, where there are three parts, x lend their places until below.
                lent = at.dCB_b if parts == 1 else (*at.dCB_b, at.x_b[0])
                put(lent, mosaic.split(of_dt * dt_j, len(lent)))

                of_kept = ((CHUNK, P), (at.B_b, transpose(at.dS_b)))
                if parts == 1:
                    (kept,) = matmul(of_kept)
                else:  # dCB leaves the registers
                    plgpu.commit_smem()
                    kept, between = matmul(of_kept, sum_before(lent))
                    da = jnp.sum(not_before(between), axis=1)
                    plgpu.commit_smem()  # every warp's products have read dCB_b
                    put(at.dCB_b, dCB)
                at = operands(slot)
                dy = mosaic.load(at.dy).astype(jnp.float32)
                x = mosaic.load(at.x).astype(jnp.float32)
                to_end = jnp.exp2(difference(g_end, g))
                of_weight = jnp.sum(kept * x, axis=1)
                ddt += of_weight * to_end
                dD += jnp.sum(dy * x, axis=1)
                weight = over_columns(to_end * dt, x.shape)
                put(at.x_b, split(x * weight))
                plgpu.commit_smem()
                dx = kept * weight + dy * D_h
                if parts == 1:
                    between, dx = matmul(sum_before(at.dCB_b), (dx, (M, at.dy_b)))
                    at = operands(slot)
                    da = jnp.sum(not_before(between), axis=1)
                    dx = dx.astype(jnp.bfloat16)
                    plgpu.commit_smem()  # every warp's products have read dCB_b and dy_b
                    put(at.dCB_b, dCB)
                else:
                    at.x[...] = dx
                    (at.x[...],) = matmul((at.x, (M, at.dy_b)))
                    plgpu.commit_smem()  # every warp's products have read dy_b

                plgpu.barrier_wait(S_ready)
                if parts == 1:
                    pl.when(odd)(lambda: state_between(1 - slot))
                at = operands(slot)
                if parts > 1:
                    S = split_in_place(S_s.at[wg], at.S_b)
                dy = mosaic.load(at.dy).astype(jnp.float32)
                from_start = jnp.exp2(total(g))
                put(at.dy_b, split(dy * over_columns(from_start, dy.shape)))
                plgpu.commit_smem()
                plgpu.barrier_arrive(operands_ready)
                through = jnp.exp2(total(g_end))
                if parts == 1:
                    S = join(at.S_b)
                carried = jnp.sum(S * dS, axis=1) * through
                CS, dS = matmul(
                    ((CHUNK, P), *_every_product(at.C_b, transpose(at.S_b))),
                    (dS * through, *_every_product(transpose(at.dy_b), at.C_b)),
                )
                read = jnp.sum(CS * dy, axis=1) * from_start
                # a_t decays what is read at i >= t, what was kept from j < t, and all that the
                # state carries; its parts may stand with either, as every one of them is met.
                rows_b[0] = read + carried
                rows_b[1] = of_weight * to_end * dt + carried
                plgpu.commit_smem()
                read, kept = (over_rows(mosaic.load_columns(rows_b.at[n]), square) for n in (0, 1))
                before = mosaic.load(before_s.at[zero()]).astype(jnp.float32)
                da += jnp.sum(read - before * read + before * kept, axis=1)

                plgpu.barrier_wait(operands_ready)
                sums, z = [], zero()
                B_b, C_b = (parts_of(x.at[slot + z]) for x in (B_split_s, C_split_s))
                of_chunk = lambda x: [parts_of(x.at[slot + z, h]) for h in range(W)]
                of_head = lambda x: [parts_of(x.at[h + z]) for h in range(W)]
                if wg == 0:
                    pairs = [*zip(of_chunk(dy_split_s), of_head(S_split_s))]
                    pairs += [(transpose(dCB), B_b) for dCB in of_head(dCB_s)]
                    sums.append((*matmul((wide, *pairs)), dC_s))
                if wg == W - 1:
                    pairs = [*zip(of_chunk(x_split_s), of_head(dS_s))]
                    pairs += [(dCB, C_b) for dCB in of_head(dCB_s)]
                    sums.append((*matmul((wide, *pairs)), dB_s))
                plgpu.barrier_arrive(operands_read)
                plgpu.barrier_wait(operands_read)
                at = operands(slot)  # results leave from the places of operands
                if parts == 1:
                    at.dCB_b[0][...] = dx
                put(at.dS_b, split(dS))
                for value, refs in sums:
                    for ref, columns in by_columns(refs):
                        ref[slot] = value[:, columns]
                rows_b[0], rows_b[1] = ddt, da
                plgpu.commit_smem()
                plgpu.barrier_arrive(done)
                if parts == 1:
                    plgpu.copy_smem_to_gmem(at.dCB_b[0], dx_.at[row, tokens(m), head])
                plgpu.copy_smem_to_gmem(rows_b, rows_.at[row, head, m])
                return dS, dD

            dS = plgpu.load(dlast_.at[row, head], layout=plgpu.Layout.WGMMA, optimized=False)
            put(parts_of(dS_s.at[wg]), split(dS))
            plgpu.commit_smem()
            dD = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            dS, dD = mosaic.loop(size.chunks, step, (dS, dD))
            if of_start:
                dfirst_[0][row, head] = dS
            dD_[row, head] = dD
            plgpu.wait_smem_to_gmem(0)

        for n in range(W):
            pl.when(wg == n)(functools.partial(compute, n))

    wide = (CHUNK, N)
    of_squares = mosaic.tile(W, parts, CHUNK, CHUNK)
    if parts == 1:
        heads = max(W, N // 64)  # room of dB_right and dC_right, where one head has less
        f32 = functools.partial(mosaic.tile, dtype=jnp.float32)
        right = f32(stages, heads * 64 // N, CHUNK, half)
        of_x = of_dy = mosaic.overlay(mosaic.tile(stages, heads, parts, CHUNK, P), right)
        of_group = mosaic.overlay(mosaic.tile(stages, parts, CHUNK, N), f32(stages, CHUNK, half))
    else:
        of_x = of_dy = mosaic.input_tiles(parts, stages, W, CHUNK, P)
        of_x = of_x[0], mosaic.overlay(of_x[1], mosaic.tile(1, CHUNK, N))
        of_group = mosaic.input_tiles_in_place(parts, stages, CHUNK, N)
        of_squares = mosaic.overlay(of_squares, mosaic.tile(1, CHUNK, N))
    sums = jax.ShapeDtypeStruct((size.batch, size.chunks * CHUNK, chains, N), jnp.float32)
    return mosaic.kernel(
        body,
        threads=W + 1,
        manual_barriers=True,
        grid=(size.batch * blocks,),
        grid_names=("block",),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            sums,
            sums,
            jax.ShapeDtypeStruct((*dt.shape[:3], len(ROWS), CHUNK), jnp.float32),
            jax.ShapeDtypeStruct((size.batch, size.heads, CHUNK), jnp.float32),
            *([jax.ShapeDtypeStruct(dstate.shape, jnp.float32)] if of_start else []),
        ),
        scratch_types={
            "x_and_dB": of_x,
            "dy_and_dC": of_dy,
            "B_and_dB": of_group,
            "C_and_dC": of_group,
            "g_s": plgpu.SMEM((stages, W, parts, CHUNK), jnp.float32),
            "dt_s": plgpu.SMEM((stages, W, CHUNK), jnp.float32),
            "S_s": mosaic.input_tiles_in_place(parts, W, P, N),
            "dS_s": mosaic.tile(W, parts, P, N),
            "dCB_s": of_squares,
            "before_s": mosaic.tile(1, CHUNK, CHUNK),
            "zero_s": plgpu.SMEM((W,), jnp.int32),
            "rows_s": plgpu.SMEM((W, len(ROWS), CHUNK), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=2 + (3 + parts) * W, num_barriers=stages),
            "S_ready": plgpu.Barrier(num_arrivals=W),
            "done": plgpu.Barrier(num_arrivals=W),
            "operands_ready": plgpu.Barrier(num_arrivals=W),
            "operands_read": plgpu.Barrier(num_arrivals=W),
        },
    )(x, B, C, g, dt, D, states, dy, dstate)
