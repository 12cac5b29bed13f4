"""Gradient of the Hopper SSD kernel: one pass over the chunks from the last to the first.

Per chunk, with dS the gradient of the state that leaves it, and everything the forward pass knows:

    dM = dy x^T                      (of the matrix that multiplies x; i reads j)
    dx = (L * C B^T * dt_j)^T dy + weight (B dS^T) + D dy
    dC = (L * dM * dt_j) B + (exp2(g) dy) S          summed over the heads of a group
    dB = (L * dM * dt_j)^T C + (weight x) dS         likewise
    dS <- exp2(g_end) dS + (exp2(g) dy)^T C

Squares are held transposed, [j, i], so that M^T is an operand in registers. The two warpgroups of a
block swap operands through shared memory and sum their two heads: one takes dC, the other dB.
The gradient of the log decay sums the rectangle i >= t > j of L * C B^T * dt_j * dM by a product
with ones, never as a difference of sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.mosaic import CHUNK, matmul, over_columns, over_rows, tokens

_STAGES = 2  # chunks in flight
ROWS = ("ddt", "kept", "read", "carried", "between")  # vectors over the tokens of a chunk


@mosaic.lowered_once("size")
def backward(size, x, B, C, scalars, D, states, dy, dstate):
    """Gradients, the sums over heads and over time still to be finished.

    Args:
        size: the call's Sizes.
        scalars: [B, H, chunks, 2, CHUNK] g and dt.
        states: [B, H, chunks, P, N] bfloat16, the state each chunk starts from.
        dy: [B, T, H, P] bfloat16; dstate: [B, H, P, N] float32.

    Returns:
        dx; dB and dC [B, chunks * CHUNK, H / heads_per_block, N] by block; rows [B, H, chunks, 5,
        CHUNK] as named in ROWS; dD [B, H, CHUNK]; the gradient of the initial state.
    """
    P, N, W = size.P, size.N, size.heads_per_block
    square, wide = (CHUNK, CHUNK), (CHUNK, N)

    def body(x_, B_, C_, scalars_, D_, states_, dy_, dlast_, dx_, dB_, dC_, rows_, dD_, dfirst_,
             x_s, dy_s, B_s, C_s, scalars_s, S_s, dS_s, dCB_s, before_s, zero_s, rows_s,
             ready, consumed, S_ready, S_consumed, operands_ready, operands_read):  # fmt: skip
        row, block = lax.axis_index("row"), lax.axis_index("heads")
        head0 = block * W
        group = head0 // (size.heads // size.groups)
        wg = lax.axis_index("wg")

        @pl.when(wg == W)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")

            def fetch(k, _):
                m, slot = size.chunks - 1 - k, lax.rem(k, jnp.int32(_STAGES))

                @pl.when(k >= _STAGES)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                there = ready.at[slot]
                plgpu.copy_gmem_to_smem(B_.at[row, tokens(m), group], B_s.at[slot], there)
                plgpu.copy_gmem_to_smem(C_.at[row, tokens(m), group], C_s.at[slot], there)
                for h in range(W):
                    head = head0 + h
                    plgpu.copy_gmem_to_smem(x_.at[row, tokens(m), head], x_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(dy_.at[row, tokens(m), head], dy_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(scalars_.at[row, head, m], scalars_s.at[slot, h], there)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_wait(S_consumed)

                for h in range(W):
                    plgpu.copy_gmem_to_smem(states_.at[row, head0 + h, m], S_s.at[h], S_ready)

            mosaic.loop(size.chunks, fetch, None)
            plgpu.barrier_wait(S_consumed)
            if size.chunks > 1:
                plgpu.barrier_wait(consumed.at[size.chunks % _STAGES])

        def compute(wg):  # a plain number: addresses known when compiling save registers
            plgpu.set_max_registers(240, action="increase")
            head = head0 + wg
            rows_b = rows_s.at[wg]
            D_h = D_[head]

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

            def step(k, carry):
                dS, dD = carry
                per_token = {}
                m, slot = size.chunks - 1 - k, lax.rem(k, jnp.int32(_STAGES))
                x_b, dy_b, B_b, C_b, *_ = operands(slot)
                plgpu.barrier_wait(ready.at[slot])
                BC, dM = matmul((square, (B_b, C_b.T)), (square, (x_b, dy_b.T)))

                @pl.when(k > 0)
                def _():  # dx of the chunk before has left its slot
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(consumed.at[lax.rem(k + 1, jnp.int32(_STAGES))])

                g_ref, dt_ref = scalars_s.at[slot, wg, 0], scalars_s.at[slot, wg, 1]
                g, dt = mosaic.load_rows(g_ref), mosaic.load_rows(dt_ref)
                g_i = mosaic.load_columns(g_ref)
                g_end = scalars_s[slot, wg, 0, CHUNK - 1]
                L = jnp.exp2(jnp.minimum(over_rows(g_i, square) - over_columns(g, square), 0.0))
                L = not_before(L)
                dt_j = over_columns(dt, square)
                M = (L * BC * dt_j).astype(jnp.bfloat16)
                dM *= L
                dCB = (dM * dt_j).astype(jnp.bfloat16)
                of_dt = dM * BC
                per_token["ddt"] = jnp.sum(of_dt, axis=1)
                x_b, dy_b, B_b, C_b, S_b, dS_b, dCB_b = operands(slot)
                dCB_b[...] = (of_dt * dt_j).astype(jnp.bfloat16)  # lends its place until below

                plgpu.barrier_wait(S_ready)
                CS, kept = matmul(((CHUNK, P), (C_b, S_b.T)), ((CHUNK, P), (B_b, dS_b.T)))
                x_b, dy_b, _, C_b, S_b, dS_b, dCB_b = operands(slot)
                from_start = jnp.exp2(g)
                dy = mosaic.load(dy_b).astype(jnp.float32)
                per_token["read"] = jnp.sum(CS * dy, axis=1) * from_start
                x = mosaic.load(x_b).astype(jnp.float32)
                per_token["kept"] = jnp.sum(kept * x, axis=1)
                dD += jnp.sum(dy * x, axis=1)
                weight = over_columns(jnp.exp2(g_end - g) * dt, x.shape)
                x_b[...] = (x * weight).astype(jnp.bfloat16)
                plgpu.commit_smem()
                between, dx = matmul(
                    (square, (before_s.at[zero()], dCB_b)),  # [t, i], summed over j < t
                    (kept * weight + dy * D_h, (M, dy_b)),
                )
                x_b, dy_b, B_b, C_b, S_b, dS_b, dCB_b = operands(slot)
                per_token["between"] = jnp.sum(not_before(between), axis=1)
                dx = dx.astype(jnp.bfloat16)
                dCB_b[...] = dCB
                dy = mosaic.load(dy_b).astype(jnp.float32)
                dy_b[...] = (dy * over_columns(from_start, dy.shape)).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(operands_ready)
                through = jnp.exp2(g_end)
                S = mosaic.load(S_b).astype(jnp.float32)
                per_token["carried"] = jnp.sum(S * dS, axis=1) * through
                (dS,) = matmul((dS * through, (dy_b.T, C_b)))

                plgpu.barrier_wait(operands_ready)
                sums, z = [], zero()
                B_b, C_b = B_s.at[slot + z], C_s.at[slot + z]
                if wg == 0:
                    pairs = [(dy_s.at[slot + z, h], S_s.at[h + z]) for h in range(W)]
                    pairs += [(dCB_s.at[h + z].T, B_b) for h in range(W)]
                    sums.append((matmul((wide, *pairs))[0].astype(jnp.bfloat16), C_b, dC_))
                if wg == W - 1:
                    pairs = [(x_s.at[slot + z, h], dS_s.at[h + z]) for h in range(W)]
                    pairs += [(dCB_s.at[h + z], C_b) for h in range(W)]
                    sums.append((matmul((wide, *pairs))[0].astype(jnp.bfloat16), B_b, dB_))
                plgpu.barrier_arrive(operands_read)
                plgpu.barrier_wait(operands_read)
                x_b, _, B_b, C_b, _, dS_b, _ = operands(slot)
                x_b[...] = dx  # results leave from the places of operands
                dS_b[...] = dS.astype(jnp.bfloat16)
                for value, place, _ in sums:
                    place[...] = value
                for n, name in enumerate(ROWS):
                    rows_b[n] = per_token[name]
                plgpu.commit_smem()
                plgpu.barrier_arrive(S_consumed)
                plgpu.copy_smem_to_gmem(x_b, dx_.at[row, tokens(m), head])
                plgpu.copy_smem_to_gmem(rows_b, rows_.at[row, head, m])
                for _, place, out_ in sums:
                    plgpu.copy_smem_to_gmem(place, out_.at[row, tokens(m), block])
                return dS, dD

            dS = plgpu.load(dlast_.at[row, head], layout=plgpu.Layout.WGMMA, optimized=False)
            dS_s[wg] = dS.astype(jnp.bfloat16)
            plgpu.commit_smem()
            dD = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            dS, dD = mosaic.loop(size.chunks, step, (dS, dD))
            dfirst_[row, head] = dS
            dD_[row, head] = dD
            plgpu.wait_smem_to_gmem(0)

        for n in range(W):
            pl.when(wg == n)(functools.partial(compute, n))

    blocks = size.heads // W
    partial = jax.ShapeDtypeStruct((size.batch, size.chunks * CHUNK, blocks, N), jnp.bfloat16)
    return mosaic.kernel(
        body,
        threads=W + 1,
        grid=(size.batch, blocks),
        grid_names=("row", "heads"),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            partial,
            partial,
            jax.ShapeDtypeStruct((*scalars.shape[:3], len(ROWS), CHUNK), jnp.float32),
            jax.ShapeDtypeStruct((size.batch, size.heads, CHUNK), jnp.float32),
            jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
        ),
        scratch_types=(
            mosaic.tile(_STAGES, W, CHUNK, P),
            mosaic.tile(_STAGES, W, CHUNK, P),
            mosaic.tile(_STAGES, CHUNK, N),
            mosaic.tile(_STAGES, CHUNK, N),
            plgpu.SMEM((_STAGES, W, 2, CHUNK), jnp.float32),
            mosaic.tile(W, P, N),
            mosaic.tile(W, P, N),
            mosaic.tile(W, CHUNK, CHUNK),
            mosaic.tile(1, CHUNK, CHUNK),
            plgpu.SMEM((W,), jnp.int32),
            plgpu.SMEM((W, len(ROWS), CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + 3 * W, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=W, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(num_arrivals=W),
        ),
    )(x, B, C, scalars, D, states, dy, dstate)
