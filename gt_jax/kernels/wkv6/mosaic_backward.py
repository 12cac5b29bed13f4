"""Backward pass of WKV6 on Hopper GPUs: one fused Pallas kernel walks the chunks in reverse.

It reads the state each chunk starts from and the matrix A from the forward pass, and carries dS,
the gradient of the state that leaves the chunk. With Q = r exp(E) and Kh = k exp(F),

    dv = A^T do + Kh dS^T      dQ = do S^T      dKh = v dS^T      dS <- exp(sum w) dS + Q^T do

and per level dY = M Y, where M holds the entries of do v^T (both ways round) of the tokens that
part there. A log decay gets the sum of all products Y * dY, Q * dQ and Kh * dKh in whose exponent
it stands, and the column sums of exp(sum w) S * dS: products of the 0/1 patterns again, in which
nothing cancels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.hopper import interpreting
from gt_jax.kernels.mosaic import (
    CHUNK,
    PARTS,
    join,
    matmul,
    over_columns,
    over_rows,
    parts_of,
    put,
    transpose,
)
from gt_jax.kernels.wkv6.mosaic_levels import (
    FROM_START,
    HEADS,
    ONE,
    SIZE,
    TO_END,
    Fresh,
    channels,
    log2_decay,
    place_of,
    sum_patterns,
)


def _gradient_one(parts):
    """What a 1 of the patterns is in products with gradients, which need the range of bfloat16.

    One table serves both, as the bits of a power of two in float16 are one in bfloat16 too.
    """
    one = np.float16(ONE[parts])
    return float(one if interpreting() else one.view(jnp.bfloat16))


@mosaic.lowered_once()
def backward(r, k, v, w, u, states, scores, do, dstate):
    """Gradients of one call.

    Args:
        r, k: [B, T, H, K]; v, do: [B, T, H, V], bfloat16 or float32; w: [B, T, H, K] float32;
            u: [H, 64] float32.
        states: [B, M, H, parts, V, K] bfloat16, transposed state each chunk starts from.
        scores: [B, M, H, parts, C, C] bfloat16, the matrix A of each chunk.
        dstate: [B, H, 64, 64] float32, gradient of the final state, transposed.

    Returns:
        dr, dk, dv, dw like r, k, v, w; du [B, H, 64] float32, of each batch row; the gradient of
        the initial state [B, H, 64, 64] float32, transposed.
    """
    batch, T, H, _ = r.shape
    chunks, rows = pl.cdiv(T, CHUNK), batch * H
    parts = PARTS[r.dtype]
    heads = min(HEADS // parts, rows)
    levels = CHUNK.bit_length() - 1
    bf16, f32 = jnp.bfloat16, jnp.float32
    square = (CHUNK, SIZE)
    one = _gradient_one(parts)
    split = functools.partial(mosaic.split, parts=parts)

    def body(r_, k_, v_, w_, u_, states_, scores_, do_, dfinal_, patterns_, ones_,
             dr_, dk_, dv_, dw_, du_, dinitial_,
             patterns_s, r_s, k_s, v_s, do_s, y_s, z_s, d_s, w_s, g_s, u_s, ones_s, zero_s,
             start, ready, done):  # fmt: skip
        sums_s, dsums_s = (patterns_s,) * 2 if interpreting() else patterns_s
        wg = lax.axis_index("wg")
        v_s, v_split_s = mosaic.whole_and_split(parts, v_s)
        do_s, do_split_s = mosaic.whole_and_split(parts, do_s)

        place = functools.partial(place_of, heads, batch, H)

        @pl.when(wg == heads)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(patterns_, sums_s, start)
            plgpu.copy_gmem_to_smem(ones_, ones_s, start)

            def fetch(n, m):
                b, h = place(n)
                by_token = ((r_, r_s), (k_, k_s), (v_, v_s), (do_, do_s), (w_, w_s))
                for source, target in by_token:
                    tile = source.at[b, mosaic.tokens(m), h, channels()]
                    plgpu.copy_gmem_to_smem(tile, target.at[n], ready.at[n])
                for part in range(parts):
                    state = states_.at[b, m, h, part, channels(), channels()]
                    plgpu.copy_gmem_to_smem(state, y_s.at[n, part], ready.at[n])
                    plgpu.copy_gmem_to_smem(scores_.at[b, m, h, part], z_s.at[n, part], ready.at[n])

            def store(n, m):
                b, h = place(n)
                for source, target in ((r_s, dr_), (k_s, dk_), (v_s, dv_), (w_s, dw_)):
                    tile = target.at[b, mosaic.tokens(m), h, channels()]
                    plgpu.copy_smem_to_gmem(source.at[n], tile)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            for n in range(heads):
                fetch(n, jnp.int32(chunks - 1) + lax.axis_index("rows") * 0)

            def step(back, _):
                m = chunks - 1 - back
                for n in range(heads):
                    plgpu.barrier_wait(done.at[n])
                    store(n, m)
                    pl.when(m > 0)(lambda n=n: fetch(n, m - 1))

            mosaic.loop(chunks, step, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg < heads)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            b, h = place(wg)
            initial_u = plgpu.load(u_.at[h], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            u_s.at[wg][...] = initial_u
            zero_s[wg] = jnp.int32(0)
            plgpu.commit_smem()
            plgpu.barrier_wait(start)
            fresh = Fresh(zero_s.at[wg])
            ones_g = mosaic.full((SIZE, CHUNK), ONE[parts], g_s.dtype)
            ones = mosaic.full((CHUNK, SIZE), one, bf16)
            load = lambda ref: mosaic.load(ref).astype(f32)

            def sums(place):
                zero = fresh.zero()
                return square, (sums_s.at[place + zero], parts_of(g_s.at[wg + zero]))

            def gather(start, place, Z):
                return start, (dsums_s.at[place + fresh.zero()].T, Z)

            def stow(tile, z):
                """z or, as operands of two parts take the registers, where it lies from now on."""
                if parts == 1:
                    return z
                ref = tile.at[wg + fresh.zero()]
                ref[...] = z
                return ref

            recall = lambda z: z if parts == 1 else mosaic.load(z)

            def step(back, carry):
                # Where a tile has served, its room is used again: the state's by Q and Y, A's by
                # Z, that of dS by M, w's by the carried dS, those of r, k, v, w by their gradients
                # and, with operands of two parts, do's by dw.
                dS, du = carry
                at = wg + fresh.zero()
                v_n, d_n = parts_of(v_split_s.at[at]), parts_of(d_s.at[at])
                plgpu.barrier_wait(ready.at[at])
                put(parts_of(g_s.at[at]), log2_decay(mosaic.load(w_s.at[at]), parts))
                put(d_n, split(dS))
                if parts > 1:
                    put(v_n, split(mosaic.load(v_s.at[at])))
                    do = mosaic.load(do_s.at[at])
                    plgpu.commit_smem()  # all of it is read before it is overwritten
                    put(parts_of(do_split_s.at[at]), split(do))
                plgpu.commit_smem()
                exponent, dKh = matmul(sums(TO_END), (square, (v_n, d_n)))

                def operands():
                    at = wg + fresh.zero()
                    tiles = (do_split_s.at[at], y_s.at[at], z_s.at[at], d_s.at[at])
                    return at, *map(parts_of, tiles)

                at, do_n, y_n, z_n, d_n = operands()
                decay, k = jnp.exp2(exponent), load(k_s.at[at])
                dk = dKh * decay
                Z_end, Kh = split(k * dk), split(k * decay)
                dv, total = matmul(
                    (square, (transpose(z_n), do_n), (Kh, transpose(d_n))),
                    ((SIZE, SIZE), (ones_g, parts_of(g_s.at[at]))),
                )

                at, do_n, y_n, z_n, d_n = operands()
                dS = dS * jnp.exp2(total)
                dv, Z_total = dv.astype(v_s.dtype), split(join(y_n) * dS)
                if parts > 1:  # and v lies elsewhere, split
                    v_s.at[at][...] = dv
                dS = stow(w_s, dS)
                plgpu.commit_smem()
                put(z_n, Z_end)
                put(d_n, Z_total)
                exponent, dQ = matmul(sums(FROM_START), (square, (do_n, y_n)))

                at, do_n, y_n, z_n, d_n = operands()
                decay, r = jnp.exp2(exponent), load(r_s.at[at])
                dr = dQ * decay
                Z_start, Q = split(r * dr), split(r * decay)
                plgpu.commit_smem()
                put(y_n, Q)
                plgpu.commit_smem()
                dw, dS = matmul(
                    (*gather(square, TO_END, z_n), (ones, d_n)),
                    (dS, (transpose(do_n), y_n)),
                )

                at, do_n, _, z_n, _ = operands()
                v_n = parts_of(v_split_s.at[at])
                w_s.at[at][...] = dS
                plgpu.commit_smem()
                put(z_n, Z_start)
                plgpu.commit_smem()
                dw, down, across = matmul(
                    gather(dw, FROM_START, z_n),
                    ((CHUNK, CHUNK), (do_n, transpose(v_n))),
                    ((CHUNK, CHUNK), (v_n, transpose(do_n))),
                )

                at = wg + fresh.zero()
                own = jnp.sum(jnp.where(fresh.diagonal(), down, 0.0), axis=1)  # do . v
                put(parts_of(d_s.at[at]), split(jnp.where(fresh.later(), down, across)))
                plgpu.commit_smem()
                if parts == 1:
                    v_s.at[at][...] = dv
                dw = stow(do_s, dw)

                (exponent,) = matmul(sums(levels - 2))
                for level in reversed(range(levels)):
                    at = wg + fresh.zero()
                    y_n = parts_of(y_s.at[at])
                    decay = jnp.exp2(exponent) if level else 1.0
                    r, k = load(r_s.at[at]) * decay, load(k_s.at[at]) * decay
                    put(y_n, split(jnp.where(fresh.query(level), r, k)))
                    plgpu.commit_smem()
                    partners, M = fresh.partners(level), parts_of(d_s.at[at])
                    M = tuple(jnp.where(partners, load(part), 0.0).astype(bf16) for part in M)
                    (dY,) = matmul((square, (M, y_n)))
                    dx, query = dY * decay, fresh.query(level)
                    dr, dk = jnp.where(query, dr + dx, dr), jnp.where(query, dk, dk + dx)
                    if level == 0:
                        break  # no decay lies between neighbours
                    at = wg + fresh.zero()
                    y_n, z_n = parts_of(y_s.at[at]), parts_of(z_s.at[at])
                    put(z_n, split(dY * join(y_n)))
                    plgpu.commit_smem()
                    gathered = gather(dw, level - 1, z_n)
                    if level > 1:
                        dw, exponent = matmul(gathered, sums(level - 2))
                    else:
                        (dw,) = matmul(gathered)
                    dw = stow(do_s, dw)

                at = wg + fresh.zero()
                r_n, k_n, w_n, y_n = r_s.at[at], k_s.at[at], w_s.at[at], parts_of(y_s.at[at])
                r, k = load(r_n), load(k_n)
                own, u = (
                    over_columns(own, square),
                    over_rows(mosaic.load_columns(u_s.at[at]), square),
                )
                plgpu.commit_smem()
                put(y_n, split(own * r * k))
                r_n[...] = (dr + own * u * k).astype(r_n.dtype)
                k_n[...] = (dk + own * u * r).astype(k_n.dtype)
                dS = mosaic.load(w_n)
                w_n[...] = recall(dw) * (1 / one)
                plgpu.commit_smem()
                (du,) = matmul((du, (transpose(y_n), ones_s.T)))
                plgpu.barrier_arrive(done.at[at])
                return dS, du

            dS = plgpu.load(dfinal_.at[b, h], layout=plgpu.Layout.WGMMA, optimized=False)
            du = mosaic.full((SIZE, 16), 0, f32)
            dS, du = mosaic.loop(chunks, step, (dS, du))
            dinitial_.at[b, h][...] = dS
            u_s.at[wg][...] = jnp.sum(du, axis=1) * (1 / 16)  # 16 equal columns
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(u_s.at[wg], du_.at[b, h])
            plgpu.wait_smem_to_gmem(0)

    do_tiles = mosaic.input_tiles(parts, heads, *square)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    patterns = mosaic.tile(levels + 1, CHUNK, CHUNK, dtype=jnp.float16)
    if not interpreting():
        patterns = plgpu.RefUnion(patterns, mosaic.tile(levels + 1, CHUNK, CHUNK))
    return mosaic.kernel(
        body,
        threads=heads + 1,
        manual_barriers=True,
        out_type=(
            *map(like, (r, k, v, w)),
            jax.ShapeDtypeStruct((batch, H, SIZE), f32),
            jax.ShapeDtypeStruct((batch, H, SIZE, SIZE), f32),
        ),
        scratch_types=[
            patterns,
            mosaic.tile(heads, *square, dtype=r.dtype),  # r
            mosaic.tile(heads, *square, dtype=r.dtype),  # k
            mosaic.input_tiles(parts, heads, *square),  # v
            do_tiles if parts == 1 else mosaic.overlay(*do_tiles),  # split where it arrives
            mosaic.tile(heads, parts, SIZE, SIZE),  # states, Q, Y
            mosaic.tile(heads, parts, CHUNK, CHUNK),  # A, Z
            mosaic.tile(heads, parts, SIZE, SIZE),  # dS, M
            mosaic.tile(heads, *square, dtype=f32),  # w
            mosaic.tile(heads, parts, *square, dtype=jnp.float16),  # log2 decays
            plgpu.SMEM((heads, SIZE), f32),
            mosaic.tile(16, CHUNK),
            plgpu.SMEM((heads,), jnp.int32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=heads, num_arrivals=5 + 2 * parts),
            plgpu.Barrier(num_barriers=heads),
        ],
        grid=(pl.cdiv(rows, heads),),
        grid_names=("rows",),
    )(r, k, v, w, u, states, scores, do, dstate, sum_patterns(parts), jnp.ones((16, CHUNK), bf16))
