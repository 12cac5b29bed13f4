"""SSD on Hopper GPUs: one fused Pallas kernel walks the chunks of a head with its state on chip.

A block of the grid owns one batch row and two heads of a group: a warpgroup per head computes, one
more keeps bulk copies of the coming chunks in flight. Per chunk, with g the running sum of log2
decays from the chunk's start (so exp2(g_i - g_j) is what passes from j to i >= j):

    y = (exp2(g_i - g_j) * C B^T * dt_j) x + exp2(g_i) (C S^T) + D x
    S <- exp2(g_end) S + (exp2(g_end - g) dt x)^T B

Operands of products are bfloat16 numbers or, where x, B and C are float32, sums of two of them; a
chunk is then split where it arrives, and a block owns one head.
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
from gt_jax.kernels.mosaic import (
    CHUNK,
    PARTS,
    difference,
    divide,
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
from gt_jax.kernels.ssd.mosaic_backward import ROWS, backward
from gt_jax.kernels.ssd.mosaic_pieces import piece_states, weighed

# exp of this is 0 in float32, and a chunk's sum of it is finite
_LOWEST_LOG_DECAY = -104.0
_LOG2_E = math.log2(math.e)
_STAGES = {1: 3, 2: 2}  # parts of an operand -> chunks in flight


class Sizes(NamedTuple):
    """Extents of one call."""

    batch: int
    length: int
    heads: int
    groups: int
    P: int
    N: int
    parts: int  # bfloat16 numbers whose sum an operand is

    @property
    def chunks(self):
        return -(-self.length // CHUNK)

    @property
    def heads_per_block(self):
        return 2 if self.parts == 1 and self.heads // self.groups % 2 == 0 else 1


def _sizes(x, B):
    return Sizes(*x.shape[:3], B.shape[2], x.shape[3], B.shape[3], PARTS[x.dtype])


def _by_chunk(v, size):
    """[B, T, H] -> [B, H, chunks, CHUNK] float32, zero past the end."""
    # Or XLA, where a transpose is all there is to do, would lay out as its result everything that v
    # is computed from, and with it x, B and C.
    v = mosaic.row_major(v.astype(jnp.float32))
    v = jnp.pad(v, ((0, 0), (0, size.chunks * CHUNK - size.length), (0, 0)))
    return v.transpose(0, 2, 1).reshape(size.batch, size.heads, size.chunks, CHUNK)


def _log2_decays(a, size):
    """[B, H, chunks, parts, CHUNK]: g, the running sum of log2 decays in each chunk.

    Two parts are the sums of whole numbers, which are exact, and of what is left, which are small:
    where one decay is strong, the differences of others' sums would lose digits that float32 needs.
    """
    a = _by_chunk(jnp.maximum(a, _LOWEST_LOG_DECAY), size) * _LOG2_E
    whole = jnp.round(a)
    a = jnp.stack((a,) if size.parts == 1 else (whole, a - whole), axis=-2)
    until = jnp.tri(CHUNK, dtype=jnp.float32).T  # [s, t]: s <= t
    return jnp.matmul(a, until, precision=lax.Precision.HIGHEST)


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
    if x.dtype not in PARTS or dt.dtype != jnp.float32:
        return (
            "the kernel is for bfloat16 or float32 x with a float32 state; "
            f"these are {x.dtype}, {dt.dtype}"
        )
    if precision == "highest":
        return "the kernel multiplies bfloat16 parts; precision='highest' asks for float32"
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
    """y, the final state, and with save_states what every chunk starts from, in float32; where x is
    bfloat16, what every other one starts from, in bfloat16.

    state is what the first chunk starts from, None for zeros.
    """
    size = _sizes(x, B)
    P, N, W, parts = size.P, size.N, size.heads_per_block, size.parts
    stages = _STAGES[parts]
    square = (CHUNK, CHUNK)
    inputs = (x, B, C, g, dt, D, *(() if state is None else (state,)))
    results = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((size.batch, size.heads, P, N), jnp.float32),
    ]
    if save_states:
        chunks = pl.cdiv(size.chunks, 2) if parts == 1 else size.chunks
        saved = (size.batch, size.heads, chunks, P, N)
        results.append(jax.ShapeDtypeStruct(saved, x.dtype))

    def body(*refs, x_s, B_s, C_s, g_s, dt_s, S_s, y_s, reads_s, ready, consumed, zero_s=None):
        x_, B_, C_, g_, dt_, D_, *state_ = refs[: len(inputs)]
        y_, final_, *states_ = refs[len(inputs) :]
        x_s, x_split_s = mosaic.whole_and_split(parts, x_s)
        B_s, B_split_s = mosaic.whole_and_split(parts, B_s)
        C_s, C_split_s = mosaic.whole_and_split(parts, C_s)
        row, block = divide(lax.axis_index("block"), size.heads // W)
        head0 = block * W
        group = head0 // (size.heads // size.groups)
        wg = lax.axis_index("wg")

        @pl.when(wg == W)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")

            def fetch(m, _):
                slot = lax.rem(m, jnp.int32(stages))

                @pl.when(m >= stages)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                there = ready.at[slot]
                plgpu.copy_gmem_to_smem(B_.at[row, tokens(m), group], B_s.at[slot], there)
                plgpu.copy_gmem_to_smem(C_.at[row, tokens(m), group], C_s.at[slot], there)
                for h in range(W):
                    head = head0 + h
                    plgpu.copy_gmem_to_smem(x_.at[row, tokens(m), head], x_s.at[slot, h], there)
                    for part in range(parts):
                        sums = g_.at[row, head, m, part]
                        plgpu.copy_gmem_to_smem(sums, g_s.at[slot, h, part], there)
                    plgpu.copy_gmem_to_smem(dt_.at[row, head, m], dt_s.at[slot, h], there)

            mosaic.loop(size.chunks, fetch, None)
            for m in range(max(0, size.chunks - stages), size.chunks):  # see every chunk out
                plgpu.barrier_wait(consumed.at[m % stages])

        def compute(wg):  # a plain number: addresses known when compiling save registers
            plgpu.set_max_registers(240, action="increase")
            head = head0 + wg
            y_b = y_s.at[wg]
            D_h = D_[head]
            i, j = mosaic.iota(square, 0), mosaic.iota(square, 1)
            # Bits of which a warp keeps what tokens read; both warpgroups write the same.
            reads_s[...] = jnp.where(i >= j, -1, 0).astype(jnp.int16)
            if parts > 1:
                zero_s[wg] = jnp.int32(0)
            plgpu.commit_smem()

            def operands(slot):
                # A 0 read from memory: addresses are then computed where they are used, not once
                # before the loop to occupy registers that two parts need.
                z = zero_s[wg] if parts > 1 else 0
                tiles = x_split_s.at[slot + z, wg], B_split_s.at[slot + z], C_split_s.at[slot + z]
                return map(parts_of, (*tiles, S_s.at[wg + z]))

            def what_is_read(M):
                bits = lax.bitcast_convert_type(M, jnp.int16) & mosaic.load(reads_s)
                return lax.bitcast_convert_type(bits, jnp.bfloat16)

            def step(m, S):
                slot = lax.rem(m, jnp.int32(stages))
                x_b, B_b, C_b, S_b = operands(slot)
                if save_states and parts == 1:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # S_b is free; y may be leaving
                put(S_b, mosaic.split(S, parts))
                plgpu.commit_smem()
                if save_states and parts == 1:

                    @pl.when(lax.rem(m, jnp.int32(2)) == 0)
                    def _():
                        pair = lax.div(m, jnp.int32(2))
                        plgpu.copy_smem_to_gmem(S_b[0], states_[0].at[row, head, pair])

                elif save_states:
                    states_[0][row, head, m] = S
                plgpu.barrier_wait(ready.at[slot])
                if parts > 1:
                    split_in_place(B_s.at[slot], B_b)
                    split_in_place(C_s.at[slot], C_b)
                    x = split_in_place(x_s.at[slot, wg], x_b)
                    plgpu.commit_smem()
                CB, CS = matmul(
                    (square, (C_b, transpose(B_b))),
                    ((CHUNK, P), (C_b, transpose(S_b))),
                )
                g_b = parts_of(g_s.at[slot, wg])
                g_i = [mosaic.load_rows(ref) for ref in g_b]
                g_j = [mosaic.load_columns(ref) for ref in g_b]
                dt_j = mosaic.load_columns(dt_s.at[slot, wg])
                g_end = [g_s[slot, wg, part, CHUNK - 1] for part in range(parts)]
                between = difference(
                    [over_columns(z, square) for z in g_i], [over_rows(z, square) for z in g_j]
                )
                M = mosaic.split(jnp.exp2(between) * CB * over_rows(dt_j, square), parts)
                M = tuple(map(what_is_read, M))
                if parts == 1:
                    x = mosaic.load(x_s.at[slot, wg]).astype(jnp.float32)
                y = CS * over_columns(jnp.exp2(total(g_i)), x.shape) + x * D_h
                x_b, B_b, *_ = operands(slot)
                if parts > 1:  # registers do not hold both sums at once
                    (y,) = matmul((y, (M, x_b)))
                kept = weighed(x_b, jnp.exp2(difference(g_end, g_j)) * dt_j, B_b)
                of_S = (S * jnp.exp2(total(g_end)), *kept)
                if parts == 1:
                    y, S = matmul((y, (M, x_b)), of_S)
                else:
                    (S,) = matmul(of_S)
                plgpu.barrier_arrive(consumed.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y_b is free
                y_b[...] = y.astype(x_.dtype)
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
            "x_s": mosaic.input_tiles_in_place(parts, stages, W, CHUNK, P),
            "B_s": mosaic.input_tiles_in_place(parts, stages, CHUNK, N),
            "C_s": mosaic.input_tiles_in_place(parts, stages, CHUNK, N),
            "g_s": plgpu.SMEM((stages, W, parts, CHUNK), jnp.float32),
            "dt_s": plgpu.SMEM((stages, W, CHUNK), jnp.float32),
            "S_s": mosaic.tile(W, parts, P, N),
            "y_s": mosaic.tile(W, CHUNK, P, dtype=x.dtype),
            "reads_s": mosaic.tile(CHUNK, CHUNK, dtype=jnp.int16),
            **({"zero_s": plgpu.SMEM((W,), jnp.int32)} if parts > 1 else {}),
            "ready": plgpu.Barrier(num_arrivals=2 + (2 + parts) * W, num_barriers=stages),
            "consumed": plgpu.Barrier(num_arrivals=W, num_barriers=stages),
        },
    )(*inputs)
