"""SSD on Hopper GPUs: one fused Pallas kernel walks the chunks of a head with its state on chip.

A block of the grid owns one batch row and two heads of a group: a warpgroup per head computes, one
more keeps bulk copies of the coming chunks in flight. Per chunk, with g the running sum of log2
decays from the chunk's start (so exp2(g_i - g_j) is what passes from j to i >= j):

    y = (exp2(g_i - g_j) * C B^T * dt_j) x + exp2(g_i) (C S^T) + D x
    S <- exp2(g_end) S + (exp2(g_end - g) dt x)^T B
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.mosaic import CHUNK, divide, matmul, over_columns, over_rows, tokens
from gt_jax.kernels.ssd.mosaic_backward import ROWS, backward
from gt_jax.kernels.ssd.mosaic_pieces import piece_states

# exp of this is 0 in float32, and a chunk's sum of it is finite
_LOWEST_LOG_DECAY = -104.0
_LOG2_E = math.log2(math.e)
_STAGES = 3  # chunks in flight


class Sizes(NamedTuple):
    """Extents of one call."""

    batch: int
    length: int
    heads: int
    groups: int
    P: int
    N: int

    @property
    def chunks(self):
        return -(-self.length // CHUNK)

    @property
    def heads_per_block(self):
        return 2 if self.heads // self.groups % 2 == 0 else 1


def _sizes(x, B):
    return Sizes(*x.shape[:3], B.shape[2], x.shape[3], B.shape[3])


def _by_chunk(v, size):
    """[B, T, H] -> [B, H, chunks, CHUNK] float32, zero past the end."""
    # Or XLA, where a transpose is all there is to do, would lay out as its result everything that v
    # is computed from, and with it x, B and C.
    v = mosaic.row_major(v.astype(jnp.float32))
    v = jnp.pad(v, ((0, 0), (0, size.chunks * CHUNK - size.length), (0, 0)))
    return v.transpose(0, 2, 1).reshape(size.batch, size.heads, size.chunks, CHUNK)


def _log2_decays(a, size):
    """[B, H, chunks, CHUNK]: g, the running sum of log2 decays in each chunk."""
    a = _by_chunk(jnp.maximum(a, _LOWEST_LOG_DECAY), size)
    until = jnp.tri(CHUNK, dtype=jnp.float32).T  # [s, t]: s <= t
    return jnp.matmul(a * _LOG2_E, until, precision=lax.Precision.HIGHEST)


def ssd_mosaic(x, dt, a, B, C, D, initial_state, resets, precision):
    """SSD on a Hopper GPU; arguments as `ssd_reference`, initial_state may be None.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    reason = _refusal(x, dt, B, precision)
    if reason is not None:
        raise NotImplementedError(reason)
    if resets is not None:
        a = jnp.where(resets[..., None], -jnp.inf, a)  # nothing earlier is passed on or read
    D = jnp.zeros(x.shape[2], jnp.float32) if D is None else D.astype(jnp.float32)
    length = x.shape[1]
    size = _sizes(x, B)
    blocks = size.batch * (size.heads // size.heads_per_block)
    pieces = mosaic.choose_pieces(blocks, size.chunks)
    # Pieces are whole chunks, and bulk copies move 8 rows at least.
    end = (0, -length % (8 if pieces == 1 else pieces * CHUNK))
    x, dt, a, B, C = (_cut(z, end, pieces) for z in (x, dt, a, B, C))
    y, final_state = _ssd(pieces, x, dt, a, B, C, D, initial_state)
    return y.reshape(-1, length + end[1], *y.shape[2:])[:, :length], final_state


def _cut(z, end, pieces):
    """[B, T, ...] -> [B * pieces, T / pieces, ...] after padding."""
    if end != (0, 0):
        z = jnp.pad(z, ((0, 0), end) + ((0, 0),) * (z.ndim - 2))
    return z.reshape(z.shape[0] * pieces, -1, *z.shape[2:])


def _refusal(x, dt, B, precision):
    """What of a call the kernel does not do, or None; states have the dtype of dt."""
    P, N = x.shape[-1], B.shape[-1]
    if x.dtype != jnp.bfloat16 or dt.dtype != jnp.float32:
        return f"the kernel is for bfloat16 x with a float32 state; these are {x.dtype}, {dt.dtype}"
    if precision == "highest":
        return "the kernel multiplies bfloat16; precision='highest' asks for float32"
    if P != 64 or N not in (64, 128):
        return f"the kernel is for P=64 and N=64 or 128; this call has P={P}, N={N}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(pieces, x, dt, a, B, C, D, state):
    return _ssd_forward(pieces, x, dt, a, B, C, D, state, save_states=False)[0]


def _ssd_forward(pieces, x, dt, a, B, C, D, state, *, save_states=True):
    size = _sizes(x, B)
    g, dt = _log2_decays(a, size), _by_chunk(dt, size)
    start = state
    if pieces > 1:
        start = piece_states(size, pieces, x, B, g, dt, start)
    y, final, *states = mosaic.keep(_forward(x, B, C, g, dt, D, start, save_states=save_states))
    wanted = None if state is None else ()  # residuals tell apart by structure what is not traced
    return (y, final[pieces - 1 :: pieces]), (x, B, C, g, dt, D, wanted, states)


def _ssd_backward(pieces, residuals, cotangents):
    x, B, C, g, dt, D, wanted, states = residuals
    size = _sizes(x, B)
    dy, dstate = cotangents
    if pieces > 1:
        dstate = piece_states(size, pieces, dy, C, g, None, dstate, reverse=True)
    dx, dB, dC, rows, dD, *dstart = backward(
        size, x, B, C, g, dt, D, *states, dy, dstate, of_start=wanted is not None
    )
    dB, dC = (_sum_chains(z, size).astype(B.dtype) for z in (dB, dC))
    ddt, da = (_by_token(rows[..., n, :], size) for n in range(len(ROWS)))
    dstate = dstart[0][::pieces] if dstart else None
    return dx, ddt, da, dB, dC, jnp.sum(dD, axis=(0, 2)), dstate


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _by_token(v, size):
    """[B, H, chunks, CHUNK] -> [B, T, H]."""
    v = v.reshape(size.batch, size.heads, -1).transpose(0, 2, 1)[:, : size.length]
    return mosaic.row_major(v)


def _sum_chains(z, size):
    """[B, T, chains, N] -> [B, T, G, N], summed over the chains of a group."""
    z = z[:, : size.length].reshape(size.batch, size.length, size.groups, -1, size.N)
    return jnp.sum(z, axis=3)


@mosaic.lowered_once("save_states")
def _forward(x, B, C, g, dt, D, state, *, save_states):
    """y, the final state, and with save_states what every other chunk starts from, in bfloat16.

    state is what the first chunk starts from, None for zeros.
    """
    size = _sizes(x, B)
    P, N, W = size.P, size.N, size.heads_per_block
    square = (CHUNK, CHUNK)
    inputs = (x, B, C, g, dt, D, *(() if state is None else (state,)))
    results = [
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((size.batch, size.heads, P, N), jnp.float32),
    ]
    if save_states:
        saved = (size.batch, size.heads, pl.cdiv(size.chunks, 2), P, N)
        results.append(jax.ShapeDtypeStruct(saved, jnp.bfloat16))

    def body(*refs, x_s, B_s, C_s, g_s, dt_s, S_s, y_s, reads_s, ready, consumed):
        x_, B_, C_, g_, dt_, D_, *state_ = refs[: len(inputs)]
        y_, final_, *states_ = refs[len(inputs) :]
        row, block = divide(lax.axis_index("block"), size.heads // W)
        head0 = block * W
        group = head0 // (size.heads // size.groups)
        wg = lax.axis_index("wg")

        @pl.when(wg == W)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")

            def fetch(m, _):
                slot = lax.rem(m, jnp.int32(_STAGES))

                @pl.when(m >= _STAGES)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                there = ready.at[slot]
                plgpu.copy_gmem_to_smem(B_.at[row, tokens(m), group], B_s.at[slot], there)
                plgpu.copy_gmem_to_smem(C_.at[row, tokens(m), group], C_s.at[slot], there)
                for h in range(W):
                    head = head0 + h
                    plgpu.copy_gmem_to_smem(x_.at[row, tokens(m), head], x_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(g_.at[row, head, m], g_s.at[slot, h], there)
                    plgpu.copy_gmem_to_smem(dt_.at[row, head, m], dt_s.at[slot, h], there)

            mosaic.loop(size.chunks, fetch, None)
            for m in range(max(0, size.chunks - _STAGES), size.chunks):  # see every chunk out
                plgpu.barrier_wait(consumed.at[m % _STAGES])

        def compute(wg):  # a plain number: addresses known when compiling save registers
            plgpu.set_max_registers(240, action="increase")
            head = head0 + wg
            S_b, y_b = S_s.at[wg], y_s.at[wg]
            D_h = D_[head]
            i, j = mosaic.iota(square, 0), mosaic.iota(square, 1)
            # Bits of which a warp keeps what tokens read; both warpgroups write the same.
            reads_s[...] = jnp.where(i >= j, -1, 0).astype(jnp.int16)
            plgpu.commit_smem()

            def step(m, S):
                slot = lax.rem(m, jnp.int32(_STAGES))
                x_b, B_b, C_b = x_s.at[slot, wg], B_s.at[slot], C_s.at[slot]
                if save_states:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # S_b is free; y may be leaving
                S_b[...] = S.astype(jnp.bfloat16)
                plgpu.commit_smem()
                if save_states:

                    @pl.when(lax.rem(m, jnp.int32(2)) == 0)
                    def _():
                        pair = lax.div(m, jnp.int32(2))
                        plgpu.copy_smem_to_gmem(S_b, states_[0].at[row, head, pair])

                plgpu.barrier_wait(ready.at[slot])
                CB, CS = matmul(
                    (square, (C_b, B_b.T)),
                    ((CHUNK, P), (C_b, S_b.T)),
                )
                g_b, dt_b = g_s.at[slot, wg], dt_s.at[slot, wg]
                g_i = mosaic.load_rows(g_b)
                g_j, dt_j = mosaic.load_columns(g_b), mosaic.load_columns(dt_b)
                g_end = g_s[slot, wg, CHUNK - 1]
                between = over_columns(g_i, square) - over_rows(g_j, square)
                M = (jnp.exp2(between) * CB * over_rows(dt_j, square)).astype(jnp.bfloat16)
                M = lax.bitcast_convert_type(M, jnp.int16) & mosaic.load(reads_s)
                M = lax.bitcast_convert_type(M, jnp.bfloat16)
                x = mosaic.load(x_b).astype(jnp.float32)
                y = CS * over_columns(jnp.exp2(g_i), x.shape) + x * D_h
                weight = over_rows(jnp.exp2(g_end - g_j) * dt_j, square)
                kept = mosaic.cut(mosaic.load_transposed(x_b).astype(jnp.float32) * weight)
                y, S = matmul((y, (M, x_b)), (S * jnp.exp2(g_end), *((z, B_b) for z in kept)))
                plgpu.barrier_arrive(consumed.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y_b is free
                y_b[...] = y.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_b, y_.at[row, tokens(m), head])
                return S

            if state_:
                start = state_[0].at[row, head]
                S = plgpu.load(start, layout=plgpu.Layout.WGMMA, optimized=False)
            else:
                S = mosaic.full((P, N), 0, jnp.float32)
            final_[row, head] = mosaic.loop(size.chunks, step, S)
            plgpu.wait_smem_to_gmem(0)

        for n in range(W):
            pl.when(wg == n)(functools.partial(compute, n))

    return mosaic.kernel(
        body,
        threads=W + 1,
        manual_barriers=True,
        grid=(size.batch * size.heads // W,),
        grid_names=("block",),
        out_type=results,
        scratch_types={
            "x_s": mosaic.tile(_STAGES, W, CHUNK, P),
            "B_s": mosaic.tile(_STAGES, CHUNK, N),
            "C_s": mosaic.tile(_STAGES, CHUNK, N),
            "g_s": plgpu.SMEM((_STAGES, W, CHUNK), jnp.float32),
            "dt_s": plgpu.SMEM((_STAGES, W, CHUNK), jnp.float32),
            "S_s": mosaic.tile(W, P, N),
            "y_s": mosaic.tile(W, CHUNK, P),
            "reads_s": mosaic.tile(CHUNK, CHUNK, dtype=jnp.int16),
            "ready": plgpu.Barrier(num_arrivals=2 + 3 * W, num_barriers=_STAGES),
            "consumed": plgpu.Barrier(num_arrivals=W, num_barriers=_STAGES),
        },
    )(*inputs)
