"""Backward pass of the portable WKV6 kernel: one walk over the chunks in reverse.

It reads the state each chunk starts from and the entries of A from the forward pass, and carries
dS, the gradient of the state that leaves the chunk. In the notation of portable_levels.py, what
block x reads of earlier blocks has the gradient (dM = do v^T)

    dQ_x = (...((do_x S) E_0 + dM_{x,0} Kh_0) E_1 + ...) E_{x-1} + dM_{x,x-1} Kh_{x-1}

and dKh_x likewise, from v_x dS and the blocks behind. The gradient of a block's whole sum of log
decays is, after each multiplication by its E, the column sums of Q times that intermediate value
and the E still to come; then those of Kh times its part of dKh from dS, and of the state: sums of
products, in which nothing cancels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.pallas.tiles import over_columns, over_rows
from gt_jax.kernels.pallas.warps import (
    BLOCK,
    BLOCKS,
    block_dot,
    block_dot_transposed,
    left,
    rows_right,
    rows_right_transposed,
)
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
    gradient_patterns,
    sum_patterns,
    summed_within,
)

# Rows of the column sums in shared memory, each group with one of every block: of Q by how many
# blocks back, of Kh, of the state. Between groups are zeros for blocks that do not exist.
_GROUP = 2 * BLOCKS - 1
_OF_Q, _OF_K, _OF_STATE = 0, (BLOCKS - 1) * _GROUP, BLOCKS * _GROUP
_SUM_ROWS = _OF_STATE + BLOCKS


def _gather(refs, masks, start, place, Z):
    """start + the transposed pattern times Z, block by block."""
    pattern = warps.load_left(refs.transposed_gmem.at[place + masks.zero()], optimized=False)
    return block_dot(start, pattern, warps.right(Z.astype(jnp.bfloat16)))


def _column_sums(Z):
    """Sums over the rows of each block, the same in all of them."""
    ones = warps.constant_left((CHUNK, BLOCK), 1.0, jnp.bfloat16)
    return block_dot(warps.zeros(CHUNK, SIZE), ones, warps.right(Z.astype(jnp.bfloat16)))


def _cross_block(masks, dY, a, b_s, partner_s, shift):
    """Adds to dQ or dKh, which E has multiplied, what its block has with that at `shift`.

    a, b_s: operands of dM, of the row's and of the other token; partner_s: Kh or Q.
    """
    dM = block_dot_transposed(warps.zeros(CHUNK, BLOCK), a, rows_right_transposed(b_s, shift))
    dM = (dM * masks.has_block(shift)).astype(jnp.bfloat16)
    return block_dot(dY, left(dM), rows_right(partner_s, shift))


@lowered_once()
def backward(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    states: jax.Array,
    scores: jax.Array,
    do: jax.Array,
    dstate: jax.Array | None,
) -> list[jax.Array]:
    """Gradients of one call.

    Args:
        r, k, v, do: [B, T, H, 64] bfloat16; w: the same in float32; u: [H, 64] float32.
        states, scores: [B, M, H, 64, 64] bfloat16, of the forward pass.
        dstate: [B, H, V, K] float32, gradient of the final state; None for zeros.

    Returns:
        dr, dk, dv, dw like r, k, v, w; du [B, H, 64] float32, of each batch row; the gradient of
        the initial state [B, H, V, K] float32.
    """
    batch, T, H, _ = r.shape
    chunks, square = T // CHUNK, (CHUNK, SIZE)
    bf16, f32 = jnp.bfloat16, jnp.float32
    zeros, load = warps.zeros, warps.load

    def body(refs):
        r_s, k_s, v_s, do_s, S_s, A_s, dS_s = (
            getattr(refs, name) for name in ("r", "k", "v", "do", "S", "A", "dS")
        )
        E_s, sums_s, u_s, du_s = refs.E, refs.sums, refs.u, refs.du
        Q_K_s, parked_s = refs.Q_K_or_dS
        Q_s, K_s = Q_K_s.at[0], Q_K_s.at[1]
        b, h = divide(lax.axis_index("rows"), H)
        u_s[...] = warps.load_columns(refs.u_gmem.at[h])
        refs.zero[0] = jnp.int32(0)
        masks = Masks(refs.zero.at[0])
        for first in (0, 2 * FIRST):
            warps.put_block_rows(E_s, tiles.full(square, 1.0, f32), first)
        warps.put_block_rows(du_s, zeros(*square), 0)
        for first in range(0, _SUM_ROWS, BLOCKS):
            warps.put_block_rows(sums_s, zeros(*square), first)
        warps.sync()

        gather = functools.partial(_gather, refs, masks)
        cross_block = functools.partial(_cross_block, masks)

        def step(back, dS):
            m = chunks - 1 - back
            at = (b, tiles.tokens(m), h)
            (g,) = log2_decay(tiles.load_from_gmem(refs.w_gmem.at[at]), 1)
            for name, tile in (("r", r_s), ("k", k_s), ("v", v_s), ("do", do_s)):
                copies.copy_in(getattr(refs, f"{name}_gmem").at[at], tile)
            copies.copy_in(refs.states_gmem.at[b, m, h], S_s)
            copies.copy_in_narrow(refs.scores_gmem.at[b, m, h], A_s)
            dS_s[...] = dS.astype(bf16)
            warps.sync_warp()
            sums = summed_within(refs.patterns_gmem, masks, g)
            warps.put_block_rows(E_s, jnp.exp2(sums(WHOLE)), FIRST)
            Q_s[...] = (load(r_s) * jnp.exp2(sums(FROM_START))).astype(bf16)
            K_s[...] = (load(k_s) * jnp.exp2(sums(TO_END))).astype(bf16)
            warps.sync()

            if portable_levels.TUNING.prefetch:
                earlier = jnp.maximum(m - 1, 0)
                for name in ("r", "k", "v", "do", "w"):
                    source = getattr(refs, f"{name}_gmem")
                    copies.prefetch(source.at[b, tiles.tokens(earlier), h])
                for source in (refs.states_gmem, refs.scores_gmem):
                    copies.prefetch(source.at[b, earlier, h])
            dQ = warps.dot(zeros(*square), warps.load_left(do_s), S_s)
            for back in reversed(range(1, BLOCKS)):
                dQ *= warps.block_row(E_s, FIRST, -back, SIZE)
                passed = dQ * load(Q_s)
                for nearer in range(1, back):  # what still multiplies dQ
                    passed *= warps.block_row(E_s, FIRST, -nearer, SIZE)
                rows = _OF_Q + (back - 1) * _GROUP
                warps.put_block_rows(sums_s, _column_sums(passed), rows)
                dQ = cross_block(dQ, warps.load_left(do_s), v_s, K_s, -back)
            dr = dQ * jnp.exp2(sums(FROM_START))
            dw = gather(zeros(*square), FROM_START, dQ * load(Q_s))

            Kh_end = load(K_s)
            for ahead in range(1, BLOCKS):
                Kh_end *= warps.block_row(E_s, FIRST, ahead, SIZE)
            dK = warps.dot(zeros(*square), warps.load_left(v_s), dS_s)
            warps.put_block_rows(sums_s, _column_sums(dK * Kh_end), _OF_K)
            dv = warps.dot(zeros(*square), left(Kh_end.astype(bf16)), dS_s.T)
            for ahead in range(BLOCKS):
                A = A_s.at[:, ahead * BLOCK : (ahead + 1) * BLOCK]
                A = warps.transposed_block(A, ahead)
                dv = block_dot(dv, A, rows_right(do_s, ahead))
            dv = dv.astype(bf16)
            for ahead in reversed(range(1, BLOCKS)):
                dK *= warps.block_row(E_s, FIRST, ahead, SIZE)
                dK = cross_block(dK, warps.load_left(v_s), do_s, Q_s, ahead)
            dk = dK * jnp.exp2(sums(TO_END))
            dw = gather(dw, TO_END, dK * load(K_s))

            decays = [
                over_rows(tiles.load_columns(E_s.at[FIRST + x]), square) for x in range(BLOCKS)
            ]
            through = decays[0] * decays[1] * decays[2] * decays[3]
            warps.put_block_rows(sums_s, _column_sums(dS * load(S_s) * through), _OF_STATE)
            for x in reversed(range(BLOCKS)):
                rows = slice(x * BLOCK, (x + 1) * BLOCK)
                dS = warps.dot(dS * decays[x], warps.load_left(do_s.at[rows].T), Q_s.at[rows])

            down, across = (
                block_dot_transposed(
                    zeros(CHUNK, BLOCK), warps.load_left(a), rows_right_transposed(b, 0)
                )
                for a, b in ((do_s, v_s), (v_s, do_s))
            )
            own = jnp.sum(jnp.where(masks.diagonal(), down, 0.0), axis=1)
            dM = jnp.where(masks.later(), down, across)
            warps.sync()

            # From here on warps are on their own again. Their registers do not hold dS as well.
            parked_s[...] = dS
            v_s[...] = dv
            warps.sync_warp()
            copies.copy_out(v_s, refs.dv_gmem.at[at])
            for level in range(LEVELS):
                query = masks.query(level, SIZE)
                Y = jnp.where(query, load(r_s), load(k_s))
                decay = jnp.exp2(sums(level - 1)) if level else 1.0
                Y = warps.rounded(Y * decay)
                of_level = (dM * masks.part(level)).astype(bf16)
                dY = block_dot(zeros(*square), left(of_level), warps.right(Y))
                dx = dY * decay
                dr, dk = jnp.where(query, dr + dx, dr), jnp.where(query, dk, dk + dx)
                if level:  # no decay lies between neighbours
                    dw = gather(dw, level - 1, dY * Y.astype(f32))
            of_block = over_rows(
                sum(tiles.load_columns(sums_s.at[_OF_STATE + x]) for x in range(BLOCKS)), square
            )
            for distance in range(1, BLOCKS):
                rows = _OF_Q + (distance - 1) * _GROUP
                of_block += warps.block_row(sums_s, rows, distance, SIZE)
                of_block += warps.block_row(sums_s, _OF_K, -distance, SIZE)
            refs.dw_gmem.at[at][...] = dw + of_block

            r, k, own = load(r_s), load(k_s), over_columns(own, square)
            du = warps.block_row(du_s, 0, 0, SIZE) + _column_sums(own * r * k)
            u = over_rows(tiles.load_columns(u_s), square)
            warps.sync_warp()
            warps.put_block_rows(du_s, du, 0)
            for tile, target, z in (
                (r_s, refs.dr_gmem, dr + own * u * k),
                (k_s, refs.dk_gmem, dk + own * u * r),
            ):
                tile[...] = z.astype(bf16)
                warps.sync_warp()
                copies.copy_out(tile, target.at[at])
            dS = load(parked_s)
            warps.sync()
            return dS

        if dstate is None:
            dS = tiles.full((SIZE, SIZE), 0, jnp.float32)
        else:
            dS = tiles.load_from_gmem(refs.dfinal_gmem.at[b, h])
        refs.dinitial_gmem.at[b, h][...] = loop(chunks, step, dS)
        warps.sync()
        refs.du_gmem.at[b, h][...] = sum(tiles.load_columns(du_s.at[x]) for x in range(BLOCKS))

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": u, "states": states, "scores": scores}
    inputs |= {"do": do, "dfinal": dstate}
    return kernel(
        body,
        name="wkv6_portable_backward",
        inputs=inputs | {"patterns": sum_patterns(), "transposed": gradient_patterns()},
        outputs={
            **{f"d{name}": like(inputs[name]) for name in ("r", "k", "v", "w")},
            "du": jax.ShapeDtypeStruct((batch, H, SIZE), f32),
            "dinitial": jax.ShapeDtypeStruct((batch, H, SIZE, SIZE), f32),
        },
        scratch={
            **{name: tiles.tile(*square) for name in ("r", "k", "v", "do", "S")},
            "A": copies.narrow_tile(CHUNK, CHUNK),
            "dS": tiles.tile(*square),
            "Q_K_or_dS": tiles.overlay(tiles.tile(2, *square), tiles.tile(*square, dtype=f32)),
            "E": plgpu.SMEM((E_ROWS, SIZE), f32),
            "sums": plgpu.SMEM((_SUM_ROWS, SIZE), f32),
            "u": plgpu.SMEM((SIZE,), f32),
            "du": plgpu.SMEM((BLOCKS, SIZE), f32),
            "zero": plgpu.SMEM((1,), jnp.int32),
        },
        grid={"rows": batch * H},
        threads=1,
    )
