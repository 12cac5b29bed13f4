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
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.hopper import interpreting
from gt_jax.kernels.mosaic import CHUNK, divide, matmul, over_columns, over_rows, tokens

_STAGES = 2  # chunks in flight
_LONGEST_CHAIN = 16  # blocks running at a time; each starts a moment after the one before
_ROWS_TOGETHER = 8  # rows of a batch whose blocks run at a time, at most
ROWS = ("ddt", "da")  # gradients of the step size and of the log decay


def backward(size, x, B, C, g, dt, D, states, dy, dstate, *, of_start):
    """Gradients, the sums over chains and over time still to be finished.

    Args:
        size: the call's Sizes.
        g, dt: [B, H, chunks, CHUNK] sums of log2 decays in the chunk, and step sizes.
        states: [B, H, chunks / 2, P, N] bfloat16, the state every other chunk starts from.
        dy: [B, T, H, P] bfloat16; dstate: [B, H, P, N] float32.
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
    P, N, W = size.P, size.N, size.heads_per_block
    square, half = (CHUNK, CHUNK), N // 2
    together, chains_of_group = _order(size)
    blocks, blocks_of_group = size.heads // W, size.heads // size.groups // W
    links = pl.cdiv(blocks_of_group, chains_of_group)
    chains, last = size.groups * chains_of_group, size.chunks - 1

    def body(x_, B_, C_, g_, dt_, D_, states_, dy_, dlast_, dx_, dB_, dC_, rows_, dD_, *dfirst_,
             x_and_dB, dy_and_dC, B_and_dB, C_and_dC, g_s, dt_s, S_s, dS_s, dCB_s, before_s, zero_s,
             rows_s, ready, S_ready, done, operands_ready, operands_read):  # fmt: skip
        # Where a chunk's inputs were, its dB and dC leave from, in halves of columns.
        (x_s, dB_right), (dy_s, dC_right) = x_and_dB, dy_and_dC
        (B_s, dB_left), (C_s, dC_left) = B_and_dB, C_and_dC
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
                m, slot = last - k, lax.rem(k, jnp.int32(_STAGES))
                there = ready.at[slot]
                plgpu.copy_gmem_to_smem(B_.at[row, tokens(m), group], B_s.at[slot], there)
                plgpu.copy_gmem_to_smem(C_.at[row, tokens(m), group], C_s.at[slot], there)
                for h in range(W):
                    head = head0 + h
                    plgpu.copy_gmem_to_smem(x_.at[row, tokens(m), head], x_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(dy_.at[row, tokens(m), head], dy_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(g_.at[row, head, m], g_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(dt_.at[row, head, m], dt_s.at[slot, h], there)

            def fetch_states(k):
                pair = lax.div(last - k, jnp.int32(2))
                for h in range(W):
                    plgpu.copy_gmem_to_smem(states_.at[row, head0 + h, pair], S_s.at[h], S_ready)

            def store(m, slot, **how):
                for halves, sums in (((dB_left, dB_right), dB_), ((dC_left, dC_right), dC_)):
                    for n, ref in enumerate(halves):
                        part = ref.at[slot] if n == 0 else ref.at[slot, 0]
                        columns = pl.ds(n * half, half)
                        to = sums.at[row, tokens(m), chain, columns]
                        plgpu.copy_smem_to_gmem(part, to, **how)
                plgpu.wait_smem_to_gmem(0)

            def step(k, _):
                m, slot = last - k, lax.rem(k, jnp.int32(_STAGES))
                plgpu.barrier_wait(done)
                pl.when(k < last)(lambda: fetch_states(k + 1))
                pl.when(link == 0)(lambda: store(m, slot))
                if links > 1:
                    turn = (row * chains + chain) * size.chunks + m

                    @pl.when(link > 0)
                    def _():
                        mosaic.wait_for_turn(turns, turn, link)
                        store(m, slot, reduction_op="add")

                    mosaic.pass_on_turn(turns, turn)
                pl.when(k + _STAGES <= last)(lambda: fetch(k + _STAGES))

            mosaic.loop(min(_STAGES, size.chunks), fetch, None)
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

            def operands(slot):
                z = zero()
                own = (x.at[slot + z, wg + z] for x in (x_s, dy_s))
                of_group = (x.at[slot + z] for x in (B_s, C_s))
                return *own, *of_group, *(x.at[wg + z] for x in (S_s, dS_s, dCB_s))

            def state_between(slot):
                """What an odd chunk starts from, in place of what the one before starts from."""
                plgpu.barrier_wait(ready.at[slot])
                x_b, _, B_b, _, S_b, *_ = operands(slot)
                g, dt = (mosaic.load_columns(v.at[slot, wg]) for v in (g_s, dt_s))
                g_end = g_s[slot, wg, CHUNK - 1]
                weight = over_rows(jnp.exp2(g_end - g) * dt, square)
                kept = mosaic.cut(mosaic.load_transposed(x_b).astype(jnp.float32) * weight)
                S = mosaic.load(S_b).astype(jnp.float32) * jnp.exp2(g_end)
                (S,) = matmul((S, *((z, B_b) for z in kept)))
                S_s[wg] = S.astype(jnp.bfloat16)

            def step(k, carry):
                dS, dD = carry
                m, slot = last - k, lax.rem(k, jnp.int32(_STAGES))
                odd = lax.rem(m, jnp.int32(2)) == 1
                x_b, dy_b, B_b, C_b, *_ = operands(slot)
                pl.when(odd | (k == 0))(lambda: plgpu.barrier_wait(ready.at[slot]))
                BC, dM = matmul((square, (B_b, C_b.T)), (square, (x_b, dy_b.T)))

                g, dt = (mosaic.load_rows(v.at[slot, wg]) for v in (g_s, dt_s))
                g_i = mosaic.load_columns(g_s.at[slot, wg])
                g_end = g_s[slot, wg, CHUNK - 1]
                L = jnp.exp2(jnp.minimum(over_rows(g_i, square) - over_columns(g, square), 0.0))
                L = not_before(L)
                dt_j = over_columns(dt, square)
                M = (L * BC * dt_j).astype(jnp.bfloat16)
                dM *= L
                dCB = (dM * dt_j).astype(jnp.bfloat16)
                of_dt = dM * BC
                ddt = jnp.sum(of_dt, axis=1)
                x_b, dy_b, B_b, C_b, S_b, dS_b, dCB_b = operands(slot)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dx of the chunk before has left
                dCB_b[...] = (of_dt * dt_j).astype(jnp.bfloat16)  # lends its place until below

                (kept,) = matmul(((CHUNK, P), (B_b, dS_b.T)))
                x_b, dy_b, *_, dCB_b = operands(slot)
                dy = mosaic.load(dy_b).astype(jnp.float32)
                x = mosaic.load(x_b).astype(jnp.float32)
                to_end = jnp.exp2(g_end - g)
                of_weight = jnp.sum(kept * x, axis=1)
                ddt += of_weight * to_end
                dD += jnp.sum(dy * x, axis=1)
                weight = over_columns(to_end * dt, x.shape)
                x_b[...] = (x * weight).astype(jnp.bfloat16)
                plgpu.commit_smem()
                between, dx = matmul(
                    (square, (before_s.at[zero()], dCB_b)),  # [t, i], summed over j < t
                    (kept * weight + dy * D_h, (M, dy_b)),
                )
                x_b, dy_b, B_b, C_b, S_b, dS_b, dCB_b = operands(slot)
                da = jnp.sum(not_before(between), axis=1)
                dx = dx.astype(jnp.bfloat16)
                plgpu.commit_smem()  # every warp's products have read dCB_b and dy_b
                dCB_b[...] = dCB

                plgpu.barrier_wait(S_ready)
                pl.when(odd)(lambda: state_between(1 - slot))
                x_b, dy_b, B_b, C_b, S_b, dS_b, dCB_b = operands(slot)
                dy = mosaic.load(dy_b).astype(jnp.float32)
                from_start = jnp.exp2(g)
                dy_b[...] = (dy * over_columns(from_start, dy.shape)).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(operands_ready)
                through = jnp.exp2(g_end)
                S = mosaic.load(S_b).astype(jnp.float32)
                carried = jnp.sum(S * dS, axis=1) * through
                CS, dS = matmul(((CHUNK, P), (C_b, S_b.T)), (dS * through, (dy_b.T, C_b)))
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
                B_b, C_b = B_s.at[slot + z], C_s.at[slot + z]
                if wg == 0:
                    pairs = [(dy_s.at[slot + z, h], S_s.at[h + z]) for h in range(W)]
                    pairs += [(dCB_s.at[h + z].T, B_b) for h in range(W)]
                    sums.append((*matmul((wide, *pairs)), dC_left, dC_right))
                if wg == W - 1:
                    pairs = [(x_s.at[slot + z, h], dS_s.at[h + z]) for h in range(W)]
                    pairs += [(dCB_s.at[h + z], C_b) for h in range(W)]
                    sums.append((*matmul((wide, *pairs)), dB_left, dB_right))
                plgpu.barrier_arrive(operands_read)
                plgpu.barrier_wait(operands_read)
                *_, dS_b, dx_b = operands(slot)
                dx_b[...] = dx  # results leave from the places of operands
                dS_b[...] = dS.astype(jnp.bfloat16)
                for value, left, right in sums:
                    left[slot] = value[:, :half]
                    right[slot, 0] = value[:, half:]
                rows_b[0], rows_b[1] = ddt, da
                plgpu.commit_smem()
                plgpu.barrier_arrive(done)
                plgpu.copy_smem_to_gmem(dx_b, dx_.at[row, tokens(m), head])
                plgpu.copy_smem_to_gmem(rows_b, rows_.at[row, head, m])
                return dS, dD

            dS = plgpu.load(dlast_.at[row, head], layout=plgpu.Layout.WGMMA, optimized=False)
            dS_s[wg] = dS.astype(jnp.bfloat16)
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
    heads = max(W, N // 64)  # room of dB_right and dC_right, where one head has less
    f32 = functools.partial(mosaic.tile, dtype=jnp.float32)
    right = f32(_STAGES, heads * 64 // N, CHUNK, half)
    of_heads = mosaic.overlay(mosaic.tile(_STAGES, heads, CHUNK, P), right)
    of_group = mosaic.overlay(mosaic.tile(_STAGES, CHUNK, N), f32(_STAGES, CHUNK, half))
    sums = jax.ShapeDtypeStruct((size.batch, size.chunks * CHUNK, chains, N), jnp.float32)
    return mosaic.kernel(
        body,
        threads=W + 1,
        manual_barriers=True,
        grid=(size.batch * blocks,),
        grid_names=("block",),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            sums,
            sums,
            jax.ShapeDtypeStruct((*g.shape[:3], len(ROWS), CHUNK), jnp.float32),
            jax.ShapeDtypeStruct((size.batch, size.heads, CHUNK), jnp.float32),
            *([jax.ShapeDtypeStruct(dstate.shape, jnp.float32)] if of_start else []),
        ),
        scratch_types={
            "x_and_dB": of_heads,
            "dy_and_dC": of_heads,
            "B_and_dB": of_group,
            "C_and_dC": of_group,
            "g_s": plgpu.SMEM((_STAGES, W, CHUNK), jnp.float32),
            "dt_s": plgpu.SMEM((_STAGES, W, CHUNK), jnp.float32),
            "S_s": mosaic.tile(W, P, N),
            "dS_s": mosaic.tile(W, P, N),
            "dCB_s": mosaic.tile(W, CHUNK, CHUNK),
            "before_s": mosaic.tile(1, CHUNK, CHUNK),
            "zero_s": plgpu.SMEM((W,), jnp.int32),
            "rows_s": plgpu.SMEM((W, len(ROWS), CHUNK), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=2 + 4 * W, num_barriers=_STAGES),
            "S_ready": plgpu.Barrier(num_arrivals=W),
            "done": plgpu.Barrier(num_arrivals=W),
            "operands_ready": plgpu.Barrier(num_arrivals=W),
            "operands_read": plgpu.Barrier(num_arrivals=W),
        },
    )(x, B, C, g, dt, D, states, dy, dstate)
