"""Cutting a long sequence of few heads into pieces that a Hopper GPU works on at the same time.

A piece maps the state S it starts from to diag(d) S + U, with d its total decay and U what it adds.
One pass over k, v and w finds the d and U of all but the last piece, a scan over them the states
pieces start from, and then each piece is a row of a batch of its own. Backward the same, from the
end, with r, do and w. States are transposed, [V, K], as in the kernels.

The pass walks towards the end the map is applied from: a chunk's part of U then needs no later
decay, and what was read last, and may still be in the second-level cache, is what the kernel behind
it reads first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.chunks import carry_state
from gt_jax.kernels.mosaic import CHUNK, PARTS, matmul, parts_of, put, transpose
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

_STAGES = 2  # chunks in flight


def piece_states(pieces, x, V, w, state, *, reverse=False):
    """State each piece starts from (ends with if reverse), [batch * pieces, H, V, K] float32.

    Args:
        pieces: how many there are of each row.
        x, V, w: k, v and w, or r, do and w if reverse; [batch * pieces, T, H, up to 64].
        state: [batch, H, V, K] before the first piece, or the gradient after the last.
    """
    by_row = lambda z: z.reshape(-1, pieces - 1, *z.shape[1:]).swapaxes(1, 2)  # [batch, H, pieces]
    decay, update = _maps(pieces, x, V, w, reverse)
    states, last = carry_state(state, by_row(decay), by_row(update), reverse=reverse)
    ends = (last[:, :, None], states) if reverse else (states, last[:, :, None])
    return jnp.concatenate(ends, axis=2).swapaxes(1, 2).reshape(-1, *state.shape[1:])


@mosaic.lowered_once("pieces", "reverse")
def _maps(pieces, x, V, w, reverse):
    """d (the same in every row) and U of all but the last piece met, [rows, H, V, K] float32."""
    _, T, H, _ = x.shape
    rows = x.shape[0] // pieces * (pieces - 1)
    parts = PARTS[x.dtype]
    chunks, heads = pl.cdiv(T, CHUNK), min(HEADS // parts, rows * H)
    square, state = (CHUNK, SIZE), (SIZE, SIZE)
    pattern = sum_patterns(parts)[FROM_START if reverse else TO_END]

    def body(x_, V_, w_, pattern_, d_, U_,
             pattern_s, x_s, V_s, w_s, g_s, y_s, zero_s, start, ready, consumed):  # fmt: skip
        wg = lax.axis_index("wg")
        V_s, V_split_s = mosaic.whole_and_split(parts, V_s)
        place = functools.partial(place_of, heads, rows, H)

        def source_row(row):
            """Where the piece whose map has this row is among all pieces."""
            others = jnp.int32(pieces - 1)
            return lax.div(row, others) * pieces + lax.rem(row, others) + int(reverse)

        @pl.when(wg == heads)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(pattern_, pattern_s, start)

            def fetch(step, _):
                m = step if reverse else chunks - 1 - step
                slot = lax.rem(step, jnp.int32(_STAGES))
                for n in range(heads):
                    b, h = place(n)
                    at = n * _STAGES + slot
                    pl.when(step >= _STAGES)(lambda at=at: plgpu.barrier_wait(consumed.at[at]))
                    for source, target in ((x_, x_s), (V_, V_s), (w_, w_s)):
                        tile = source.at[source_row(b), mosaic.tokens(m), h, channels()]
                        plgpu.copy_gmem_to_smem(tile, target.at[n, slot], ready.at[at])

            mosaic.loop(chunks, fetch, None)
            for step in range(max(0, chunks - _STAGES), chunks):  # see every chunk out
                for n in range(heads):
                    plgpu.barrier_wait(consumed.at[n * _STAGES + step % _STAGES])

        @pl.when(wg < heads)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            b, h = place(wg)
            zero_s[wg] = jnp.int32(0)
            plgpu.commit_smem()
            plgpu.barrier_wait(start)
            fresh = Fresh(zero_s.at[wg])
            ones = mosaic.full((SIZE, CHUNK), ONE[parts], g_s.dtype)

            def step(m, carry):
                met, U = carry  # log2 decays of the chunks met, summed, in every row
                slot, at = lax.rem(m, jnp.int32(_STAGES)), wg + fresh.zero()
                g, Y, V_n = map(parts_of, (g_s.at[at], y_s.at[at], V_split_s.at[at, slot]))
                plgpu.barrier_wait(ready.at[at * _STAGES + slot])
                put(g, log2_decay(mosaic.load(w_s.at[at, slot]), parts))
                plgpu.commit_smem()
                exponent, met = matmul((met, (pattern_s, g)), (met, (ones, g)))
                tile = mosaic.load(x_s.at[at, slot]).astype(jnp.float32)
                put(Y, mosaic.split(tile * jnp.exp2(exponent), parts))
                if parts > 1:
                    put(V_n, mosaic.split(mosaic.load(V_s.at[at, slot]), parts))
                plgpu.commit_smem()
                (U,) = matmul((U, (transpose(V_n), Y)))
                plgpu.barrier_arrive(consumed.at[at * _STAGES + slot])
                return met, U

            zeros = mosaic.full(state, 0, jnp.float32)
            met, U = mosaic.loop(chunks, step, (zeros, zeros))
            d_.at[b, h][...] = jnp.exp2(met)
            U_.at[b, h][...] = U

    result = jax.ShapeDtypeStruct((rows, H, *state), jnp.float32)
    return mosaic.kernel(
        body,
        threads=heads + 1,
        manual_barriers=True,
        out_type=(result, result),
        scratch_types=[
            mosaic.tile(CHUNK, CHUNK, dtype=jnp.float16),
            mosaic.tile(heads, _STAGES, *square, dtype=x.dtype),
            mosaic.input_tiles(parts, heads, _STAGES, *square),  # V
            mosaic.tile(heads, _STAGES, *square, dtype=jnp.float32),  # w
            mosaic.tile(heads, parts, *square, dtype=jnp.float16),  # log2 decays
            mosaic.tile(heads, parts, *square),  # Y
            plgpu.SMEM((heads,), jnp.int32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=heads * _STAGES, num_arrivals=3),
            plgpu.Barrier(num_barriers=heads * _STAGES),
        ],
        grid=(pl.cdiv(rows * H, heads),),
        grid_names=("rows",),
    )(x, V, w, pattern)
