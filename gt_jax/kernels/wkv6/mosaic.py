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
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.mosaic import CHUNK, matmul, over_columns, over_rows
from gt_jax.kernels.wkv6.mosaic_backward import backward
from gt_jax.kernels.wkv6.mosaic_levels import (
    FROM_START,
    HEADS,
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
    blocks = pl.cdiv(r.shape[0] * r.shape[2], HEADS)
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
    if r.dtype != jnp.bfloat16 or state.dtype != jnp.float32:
        return (
            f"the kernel is for bfloat16 r with a float32 state; these are {r.dtype}, {state.dtype}"
        )
    if precision == "highest":
        return "the kernel multiplies bfloat16; precision='highest' asks for float32"
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
        [B, M, H, V, K] and A [B, M, H, C, C], both bfloat16 (one chunk long without save).
    """
    batch, T, H, K = r.shape
    V = v.shape[-1]
    chunks, rows = pl.cdiv(T, CHUNK), batch * H
    heads = min(HEADS, rows)
    levels = CHUNK.bit_length() - 1
    bf16, square = jnp.bfloat16, (CHUNK, SIZE)

    def body(r_, k_, v_, w_, u_, state_, patterns_, o_, final_, states_, scores_,
             patterns_s, r_s, k_s, v_s, w_s, g_s, y_s, S_s, o_s, u_s, zero_s,
             start, ready, ready_v, taken, taken_v):  # fmt: skip
        wg = lax.axis_index("wg")

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
            ones = mosaic.full((SIZE, CHUNK), 1, g_s.dtype)

            def step(m, S):
                at = wg + fresh.zero()
                g = g_s.at[at]
                plgpu.barrier_wait(ready.at[at])
                g[...] = log2_decay(mosaic.load(w_s.at[at])).astype(g.dtype)
                r, k = (mosaic.load(x.at[at]).astype(jnp.float32) for x in (r_s, k_s))
                S_s.at[at][...] = S.astype(bf16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(taken.at[at])
                if save:
                    plgpu.copy_smem_to_gmem(S_s.at[at], states_.at[b, m, h, channels(), channels()])

                def by_role(level, exponent):
                    Y = jnp.where(fresh.query(level), r, k)
                    return (Y if exponent is None else Y * jnp.exp2(exponent)).astype(bf16)

                def sums(place):
                    zero = fresh.zero()
                    return square, (patterns_s.at[place + zero], g_s.at[wg + zero])

                Y = y_s.at[wg + fresh.zero(), 0]
                Y[...] = by_role(0, None)
                plgpu.commit_smem()
                met, exponent = matmul(((CHUNK, CHUNK), (Y, Y.T)), sums(levels - 2))
                A = jnp.where(fresh.pair(0), met, 0.0)
                for level in reversed(range(1, levels)):
                    Y = y_s.at[wg + fresh.zero(), level % 2]
                    Y[...] = by_role(level, exponent)
                    plgpu.commit_smem()
                    following = sums(level - 2 if level > 1 else FROM_START)
                    met, exponent = matmul(((CHUNK, CHUNK), (Y, Y.T)), following)
                    A = jnp.where(fresh.pair(level), met, A)

                at = wg + fresh.zero()
                Y, Q, S_n, o_n = y_s.at[at, 1], y_s.at[at, 0], S_s.at[at], o_s.at[at]
                u = over_rows(mosaic.load_columns(u_s.at[at]), square)
                own = over_columns(jnp.sum(r * k * u, axis=1), (CHUNK, CHUNK))
                A = jnp.where(fresh.diagonal(), own, A).astype(bf16)
                Q[...] = (r * jnp.exp2(exponent)).astype(bf16)
                if save:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_n[...] = A
                plgpu.commit_smem()
                if save:
                    plgpu.copy_smem_to_gmem(o_n, scores_.at[b, m, h])
                plgpu.barrier_wait(ready_v.at[at])
                o, exponent, total = matmul(
                    (square, (Q, S_n.T), (A, v_s.at[at])),
                    sums(TO_END),
                    ((SIZE, SIZE), (ones, g_s.at[at])),  # the chunk's whole sum, in every row
                )
                at = wg + fresh.zero()
                Y, o_n = y_s.at[at, 1], o_s.at[at]
                Y[...] = (k * jnp.exp2(exponent)).astype(bf16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_n[...] = o.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_n, o_.at[b, mosaic.tokens(m), h, channels()])
                (S,) = matmul((S * jnp.exp2(total), (v_s.at[at].T, Y)))
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
            jax.ShapeDtypeStruct(v.shape, bf16),
            jax.ShapeDtypeStruct((batch, H, SIZE, SIZE), jnp.float32),
            jax.ShapeDtypeStruct((*saved, H, V, K), bf16),
            jax.ShapeDtypeStruct((*saved, H, CHUNK, CHUNK), bf16),
        ),
        scratch_types=[
            mosaic.tile(levels + 1, CHUNK, CHUNK, dtype=jnp.float16),
            mosaic.tile(heads, *square),  # r
            mosaic.tile(heads, *square),  # k
            mosaic.tile(heads, *square),  # v
            mosaic.tile(heads, *square, dtype=jnp.float32),  # w
            mosaic.tile(heads, *square, dtype=jnp.float16),  # log2 decays
            mosaic.tile(heads, 2, *square),  # Y
            mosaic.tile(heads, SIZE, SIZE),  # state
            mosaic.tile(heads, *square),  # o
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
    )(r, k, v, w, u, state, sum_patterns())
