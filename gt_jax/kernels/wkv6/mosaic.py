"""WKV6 on Hopper GPUs: one fused Pallas kernel walks the chunks of a head with its state on chip.

A block of the grid owns two heads: a warpgroup per head computes, one more keeps bulk copies of the
coming chunks in flight. Per chunk, with E and F the sums of log decays from the chunk's start and
to its end,

    A_ij = sum_k r_ik k_jk exp(sum of w over (j, i))   for i > j,     A_ii = r_i . (u * k_i)
    o = A v + (r exp(E)) S                              S <- exp(sum w) S + (k exp(F))^T v

A is built level by level as in chunks.py: at each level one 64 x 64 product of the sums' 0/1
pattern with the log decays gives every exponent, and one product of Y = [r or k] exp(.) with itself
gives the entries of A whose tokens part there. The state is held transposed, [V, K], so that the
decay of a key channel runs along its columns, which is how the products deliver it.

Operands of products are bfloat16 numbers or, where r, k and v are float32, sums of two of them; a
block then owns one head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.mosaic import (
    CHUNK,
    PARTS,
    matmul,
    over_columns,
    over_rows,
    parts_of,
    put,
    transpose,
)
from gt_jax.kernels.wkv6.mosaic_backward import backward
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
from gt_jax.kernels.wkv6.mosaic_pieces import piece_states


def wkv6_mosaic(r, k, v, w, u, initial_state, resets, precision):
    """WKV6 on a Hopper GPU; arguments as `wkv6_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    reason = _refusal(r, v, initial_state, precision)
    if reason is not None:
        raise NotImplementedError(reason)
    length, K, V = r.shape[1], r.shape[-1], v.shape[-1]
    inputs, own = (r, k, v, w), 0
    if resets is not None:
        # A token that starts a segment reads nothing but itself, and passes nothing earlier on.
        resets = resets[..., None, None]  # [B, T, 1, 1]
        own = jnp.sum((r * k).astype(u.dtype) * u, axis=-1, keepdims=True) * v  # [B, T, H, V]
        own = jnp.where(resets, own, 0).astype(v.dtype)
        inputs = (jnp.where(resets, 0, r), k, v, jnp.where(resets, -jnp.inf, w))
    blocks = pl.cdiv(r.shape[0] * r.shape[2], HEADS // PARTS[r.dtype])
    pieces = mosaic.choose_pieces(blocks, pl.cdiv(length, CHUNK))
    # Pieces are whole chunks, and bulk copies move 8 rows at least; the zeros that fill up tokens
    # and channels change nothing.
    end = (0, -length % (8 if pieces == 1 else pieces * CHUNK))
    cut = lambda z: z.reshape(z.shape[0] * pieces, -1, *z.shape[2:])
    r, k, v, w = (cut(_pad(z, end, (0, 0), (0, _width(z.shape[-1]) - z.shape[-1]))) for z in inputs)
    u = _pad(u.astype(jnp.float32), (0, SIZE - K))
    state = _pad(initial_state, (0, SIZE - K), (0, SIZE - V)).mT
    o, final_state = _wkv6(pieces, r, k, v, w.astype(jnp.float32), u, state)
    o = o.reshape(-1, length + end[1], *o.shape[2:])
    return o[:, :length, :, :V] + own, final_state.mT[..., :K, :V]


def _refusal(r, v, state, precision):
    """What of a call the kernel does not do, or None."""
    K, V = r.shape[-1], v.shape[-1]
    if r.dtype not in PARTS or state.dtype != jnp.float32:
        return (
            "the kernel is for bfloat16 or float32 r with a float32 state; "
            f"these are {r.dtype}, {state.dtype}"
        )
    if precision == "highest":
        return "the kernel multiplies bfloat16 parts; precision='highest' asks for float32"
    if max(K, V) > SIZE:
        return f"the kernel is for K and V up to {SIZE}; this call has K={K}, V={V}"
    return None


def _width(channels):
    """The channels that bulk copies move for a head of so many: powers of two from 8 up."""
    return max(8, pl.next_power_of_2(channels))


def _pad(z, *last):
    """z with its last axes padded by (before, after) zeros; z itself where there are none."""
    if not any(map(any, last)):
        return z
    return jnp.pad(z, ((0, 0),) * (z.ndim - len(last)) + last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv6(pieces, *inputs):
    """o and final state.

    r, k, v, w are [batch * pieces, T, H, 8 to 64 channels], u [H, 64], the state [batch, H, 64, 64]
    with V before K.
    """
    return _pieces_forward(pieces, *inputs, save=False)[0]


def _pieces_forward(pieces, r, k, v, w, u, state, *, save=True):
    if pieces > 1:
        state = piece_states(pieces, k, v, w, state)
    o, final_states, *saved = mosaic.keep(_forward(r, k, v, w, u, state, save=save))
    return (o, final_states[pieces - 1 :: pieces]), (r, k, v, w, u, *saved)


def _pieces_backward(pieces, residuals, cotangents):
    r, _, _, w, *_ = residuals
    do, dstate = cotangents
    if pieces > 1:
        dstate = piece_states(pieces, r, do, w, dstate, reverse=True)
    *grads, du, dstates = backward(*residuals, do, dstate)
    return *grads, jnp.sum(du, axis=0), dstates[::pieces]


_wkv6.defvjp(_pieces_forward, _pieces_backward)


@mosaic.lowered_once("save")
def _forward(r, k, v, w, u, state, *, save):
    """o, the final state and, with save, what the backward pass reads; states are [V, K].

    Returns:
        o [B, T, H, V]; the final state [B, H, 64, 64]; the state each chunk starts from
        [B, M, H, parts, V, K] and A [B, M, H, parts, C, C], both bfloat16 (one chunk long without
        save).
    """
    batch, T, H, K = r.shape
    V, parts = v.shape[-1], PARTS[r.dtype]
    chunks, rows = pl.cdiv(T, CHUNK), batch * H
    heads = min(HEADS // parts, rows)
    levels = CHUNK.bit_length() - 1
    bf16, f32, square = jnp.bfloat16, jnp.float32, (CHUNK, SIZE)
    split = functools.partial(mosaic.split, parts=parts)

    def body(r_, k_, v_, w_, u_, state_, patterns_, o_, final_, states_, scores_,
             patterns_s, r_s, k_s, v_s, w_s, g_s, y_s, S_s, o_A_s, u_s, zero_s,
             start, ready, ready_v, taken, taken_v):  # fmt: skip
        wg = lax.axis_index("wg")
        v_s, v_split_s = mosaic.whole_and_split(parts, v_s)
        o_s, A_s = o_A_s

        place = functools.partial(place_of, heads, batch, H)

        @pl.when(wg == heads)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(patterns_, patterns_s, start)

            def fetch(n, m, sources, targets, barrier):
                b, h = place(n)
                for source, target in zip(sources, targets):
                    tokens = mosaic.tokens(m)
                    tile = source.at[b, tokens, h, channels()]
                    plgpu.copy_gmem_to_smem(tile, target.at[n], barrier.at[n])

            fetch_inputs = functools.partial(
                fetch, sources=(r_, k_, w_), targets=(r_s, k_s, w_s), barrier=ready
            )
            fetch_v = functools.partial(fetch, sources=(v_,), targets=(v_s,), barrier=ready_v)
            for n in range(heads):
                fetch_inputs(n, jnp.int32(0))
                fetch_v(n, jnp.int32(0))

            def step(m, _):
                for n in range(heads):
                    plgpu.barrier_wait(taken.at[n])
                    pl.when(m + 1 < chunks)(lambda n=n: fetch_inputs(n, m + 1))
                for n in range(heads):
                    plgpu.barrier_wait(taken_v.at[n])
                    pl.when(m + 1 < chunks)(lambda n=n: fetch_v(n, m + 1))

            mosaic.loop(chunks, step, None)

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
            ones = mosaic.full((SIZE, CHUNK), ONE[parts], g_s.dtype)

            def step(m, S):
                at = wg + fresh.zero()
                plgpu.barrier_wait(ready.at[at])
                g, S_n = parts_of(g_s.at[at]), parts_of(S_s.at[at])
                put(g, log2_decay(mosaic.load(w_s.at[at]), parts))
                r, k = (mosaic.load(x.at[at]).astype(f32) for x in (r_s, k_s))
                put(S_n, split(S))
                plgpu.commit_smem()
                plgpu.barrier_arrive(taken.at[at])
                if save:
                    for part in range(parts):
                        target = states_.at[b, m, h, part, channels(), channels()]
                        plgpu.copy_smem_to_gmem(S_n[part], target)

                def by_role(level, exponent):
                    Y = jnp.where(fresh.query(level), r, k)
                    return split(Y if exponent is None else Y * jnp.exp2(exponent))

                def sums(place):
                    zero = fresh.zero()
                    return square, (patterns_s.at[place + zero], parts_of(g_s.at[wg + zero]))

                Y = parts_of(y_s.at[wg + fresh.zero(), 0])
                put(Y, by_role(0, None))
                plgpu.commit_smem()
                met, exponent = matmul(((CHUNK, CHUNK), (Y, transpose(Y))), sums(levels - 2))
                A = jnp.where(fresh.pair(0), met, 0.0)
                for level in reversed(range(1, levels)):
                    Y = parts_of(y_s.at[wg + fresh.zero(), level % 2])
                    put(Y, by_role(level, exponent))
                    plgpu.commit_smem()
                    following = sums(level - 2 if level > 1 else FROM_START)
                    met, exponent = matmul(((CHUNK, CHUNK), (Y, transpose(Y))), following)
                    A = jnp.where(fresh.pair(level), met, A)

                at = wg + fresh.zero()
                tiles = (y_s.at[at, 0], S_s.at[at], A_s.at[at], v_split_s.at[at], g_s.at[at])
                Q, S_n, A_n, v_n, g = map(parts_of, tiles)
                u = over_rows(mosaic.load_columns(u_s.at[at]), square)
                own = over_columns(jnp.sum(r * k * u, axis=1), (CHUNK, CHUNK))
                A = split(jnp.where(fresh.diagonal(), own, A))
                put(Q, split(r * jnp.exp2(exponent)))
                if save:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    put(A_n, A)
                plgpu.commit_smem()
                if save:
                    for part in range(parts):
                        plgpu.copy_smem_to_gmem(A_n[part], scores_.at[b, m, h, part])
                plgpu.barrier_wait(ready_v.at[at])
                if parts > 1:
                    put(v_n, split(mosaic.load(v_s.at[at])))
                    plgpu.commit_smem()
                o, exponent, total = matmul(
                    (square, (Q, transpose(S_n)), (A, v_n)),
                    sums(TO_END),
                    ((SIZE, SIZE), (ones, g)),  # the chunk's whole sum, in every row
                )
                at = wg + fresh.zero()
                Y, v_n, o_n = parts_of(y_s.at[at, 1]), parts_of(v_split_s.at[at]), o_s.at[at]
                put(Y, split(k * jnp.exp2(exponent)))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_n[...] = o.astype(o_n.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_n, o_.at[b, mosaic.tokens(m), h, channels()])
                (S,) = matmul((S * jnp.exp2(total), (transpose(v_n), Y)))
                plgpu.barrier_arrive(taken_v.at[at])
                return S

            S = plgpu.load(state_.at[b, h], layout=plgpu.Layout.WGMMA, optimized=False)
            final_.at[b, h][...] = mosaic.loop(chunks, step, S)
            plgpu.wait_smem_to_gmem(0)

    saved = (batch, chunks) if save else (1, 1)
    return mosaic.kernel(
        body,
        threads=heads + 1,
        manual_barriers=True,
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, H, SIZE, SIZE), f32),
            jax.ShapeDtypeStruct((*saved, H, parts, V, K), bf16),
            jax.ShapeDtypeStruct((*saved, H, parts, CHUNK, CHUNK), bf16),
        ),
        scratch_types=[
            mosaic.tile(levels + 1, CHUNK, CHUNK, dtype=jnp.float16),
            mosaic.tile(heads, *square, dtype=r.dtype),  # r
            mosaic.tile(heads, *square, dtype=r.dtype),  # k
            mosaic.input_tiles(parts, heads, *square),  # v
            mosaic.tile(heads, *square, dtype=f32),  # w
            mosaic.tile(heads, parts, *square, dtype=jnp.float16),  # log2 decays
            mosaic.tile(heads, 2, parts, *square),  # Y
            mosaic.tile(heads, parts, SIZE, SIZE),  # state
            mosaic.overlay(
                mosaic.tile(heads, *square, dtype=v.dtype),  # o
                mosaic.tile(heads, parts, CHUNK, CHUNK),  # A
            ),
            plgpu.SMEM((heads, SIZE), jnp.float32),
            plgpu.SMEM((heads,), jnp.int32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=heads, num_arrivals=3),
            plgpu.Barrier(num_barriers=heads),
            plgpu.Barrier(num_barriers=heads),
            plgpu.Barrier(num_barriers=heads),
        ],
        grid=(pl.cdiv(rows, heads),),
        grid_names=("rows",),
    )(r, k, v, w, u, state, sum_patterns(parts))
