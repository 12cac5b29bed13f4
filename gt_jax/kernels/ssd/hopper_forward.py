"""SSD on Hopper GPUs: one fused Pallas kernel walks the chunks of a head with its state on chip.

A block of the grid owns one batch row and two heads of a group: a warpgroup per head computes, one
more keeps bulk copies of the coming chunks in flight. Per chunk, with g the running sum of log2
decays from the chunk's start (so exp2(g_i - g_j) is what passes from j to i >= j):

    y = (exp2(g_i - g_j) * C B^T * dt_j) x + exp2(g_i) (C S^T) + D x
    S <- exp2(g_end) S + (exp2(g_end - g) dt x)^T B

Operands of products are bfloat16 numbers or, where x, B and C are float32, sums of two bfloat16
terms; a chunk is then split where it arrives, and a block owns one head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.launch import (
    CHUNK,
    claim_registers,
    divide,
    kernel,
    loop,
    lowered_once,
    release_registers,
)
from gt_jax.kernels.pallas.products import matmul
from gt_jax.kernels.pallas.terms import (
    difference,
    input_tiles_in_place,
    put,
    split,
    split_in_place,
    terms_of,
    total,
    transpose,
    whole_and_terms,
)
from gt_jax.kernels.pallas.tiles import (
    full,
    iota,
    load,
    load_columns,
    load_from_gmem,
    load_rows,
    over_columns,
    over_rows,
    tile,
    tokens,
)
from gt_jax.kernels.ssd.hopper_decays import decay_to_end, decays, weighed
from gt_jax.kernels.ssd.hopper_sizes import SQUARE, sizes_of


@lowered_once("save")
def forward(
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    D: jax.Array,
    state: jax.Array | None,
    *,
    save: bool,
) -> list[jax.Array]:
    """y, the final state and, with save, what the backward pass reads.

    Args:
        x: [B, T, H, P]; B, C: [B, T, G, N], bfloat16 or float32.
        g: [B, H, chunks, terms, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        D: [H] float32.
        state: [B, H, P, N] float32 that the first chunk starts from, None for zeros.
        save: whether the backward pass follows.

    Returns:
        y like x; the final state [B, H, P, N] float32; with save the state that every chunk starts
        from [B, H, chunks, P, N] float32 or, where x is bfloat16, that every other one starts from
        [B, H, chunks / 2, P, N] bfloat16.
    """
    size = sizes_of(x, B)
    P, N, W, terms, stages = size.P, size.N, size.heads_per_block, size.terms, size.tuning.stages
    saved = pl.cdiv(size.chunks, 2) if terms == 1 else size.chunks
    saved = jax.ShapeDtypeStruct((size.batch, size.heads, saved, P, N), x.dtype)
    return kernel(
        functools.partial(_body, size, save),
        name="ssd_forward",
        inputs={"x": x, "B": B, "C": C, "g": g, "dt": dt, "D": D, "state": state},
        outputs={
            "y": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "final": jax.ShapeDtypeStruct((size.batch, size.heads, P, N), jnp.float32),
            "states": saved if save else None,
        },
        scratch={
            "B_smem": input_tiles_in_place(terms, stages, CHUNK, N),
            "C_smem": input_tiles_in_place(terms, stages, CHUNK, N),
            "S_smem": tile(W, terms, P, N),
            "consumed": plgpu.Barrier(num_arrivals=W, num_barriers=stages),
            "dt_smem": plgpu.SMEM((stages, W, CHUNK), jnp.float32),
            "g_smem": plgpu.SMEM((stages, W, terms, CHUNK), jnp.float32),
            "reads_smem": tile(*SQUARE, dtype=jnp.int16),
            "ready": plgpu.Barrier(num_arrivals=2 + (2 + terms) * W, num_barriers=stages),
            "x_smem": input_tiles_in_place(terms, stages, W, CHUNK, P),
            "y_smem": tile(W, CHUNK, P, dtype=x.dtype),
            "zero_smem": plgpu.SMEM((W,), jnp.int32) if terms > 1 else None,
        },
        grid={"block": size.batch * size.blocks},
        threads=W + 1,
    )


def _body(size, save, refs):
    W, terms = size.heads_per_block, size.terms
    refs.x_smem, refs.x_terms_smem = whole_and_terms(terms, refs.x_smem)
    refs.B_smem, refs.B_terms_smem = whole_and_terms(terms, refs.B_smem)
    refs.C_smem, refs.C_terms_smem = whole_and_terms(terms, refs.C_smem)
    row, block = divide(lax.axis_index("block"), size.blocks)
    head0 = block * W
    group = head0 // size.heads_per_group
    wg = lax.axis_index("wg")
    pl.when(wg == W)(lambda: _copy(size, refs, row, head0, group))
    for n in range(W):  # a plain number: addresses known when compiling save registers
        pl.when(wg == n)(lambda n=n: _compute(size, save, refs, row, head0, n))


def _copy(size, refs, row, head0, group):
    """Keeps copies of the coming chunks in flight."""
    stages = size.tuning.stages
    release_registers()

    def fetch(m, _):
        slot = lax.rem(m, jnp.int32(stages))
        pl.when(m >= stages)(lambda: plgpu.barrier_wait(refs.consumed.at[slot]))
        ready = refs.ready.at[slot]
        for gmem, smem in ((refs.B_gmem, refs.B_smem), (refs.C_gmem, refs.C_smem)):
            plgpu.copy_gmem_to_smem(gmem.at[row, tokens(m), group], smem.at[slot], ready)
        for h in range(size.heads_per_block):
            head = head0 + h
            x = refs.x_gmem.at[row, tokens(m), head]
            plgpu.copy_gmem_to_smem(x, refs.x_smem.at[slot, h], ready)
            for term in range(size.terms):
                g = refs.g_gmem.at[row, head, m, term]
                plgpu.copy_gmem_to_smem(g, refs.g_smem.at[slot, h, term], ready)
            plgpu.copy_gmem_to_smem(refs.dt_gmem.at[row, head, m], refs.dt_smem.at[slot, h], ready)

    loop(size.chunks, fetch, None)
    for m in range(max(0, size.chunks - stages), size.chunks):  # see every chunk out
        plgpu.barrier_wait(refs.consumed.at[m % stages])


def _compute(size, save, refs, row, head0, wg):
    """Walks the chunks of one head with its state in registers."""
    claim_registers()
    head = head0 + wg
    D = refs.D_gmem[head]
    i, j = iota(SQUARE, 0), iota(SQUARE, 1)
    # Bits of which a warp keeps what tokens read; both warpgroups write the same.
    refs.reads_smem[...] = jnp.where(i >= j, -1, 0).astype(jnp.int16)
    if size.terms > 1:
        refs.zero_smem[wg] = jnp.int32(0)
    plgpu.commit_smem()
    step = functools.partial(_step, size, save, refs, row, head, wg, D)
    if refs.state_gmem is not None:
        S = load_from_gmem(refs.state_gmem.at[row, head])
    else:
        S = full((size.P, size.N), 0, jnp.float32)
    refs.final_gmem[row, head] = loop(size.chunks, step, S)
    plgpu.wait_smem_to_gmem(0)


def _step(size, save, refs, row, head, wg, D, m, S):
    """One chunk: writes y and what is saved; the state before it [P, N] -> the state after it."""
    terms = size.terms
    slot = lax.rem(m, jnp.int32(size.tuning.stages))
    x_terms, B, C, S_terms = _operands(terms, refs, slot, wg)
    if save and terms == 1:
        # S_terms is free; y may still be leaving.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    put(S_terms, split(S, terms))
    plgpu.commit_smem()
    if save and terms == 1:

        @pl.when(lax.rem(m, jnp.int32(2)) == 0)
        def _():
            pair = lax.div(m, jnp.int32(2))
            plgpu.copy_smem_to_gmem(S_terms[0], refs.states_gmem.at[row, head, pair])

    elif save:
        refs.states_gmem[row, head, m] = S
    plgpu.barrier_wait(refs.ready.at[slot])
    if terms > 1:
        split_in_place(refs.B_smem.at[slot], B)
        split_in_place(refs.C_smem.at[slot], C)
        x = split_in_place(refs.x_smem.at[slot, wg], x_terms)
        plgpu.commit_smem()
    CB, CS = matmul(
        (SQUARE, (C, transpose(B))),  # [i, j]
        ((CHUNK, size.P), (C, transpose(S_terms))),  # [i, P]
    )
    g_i = decays(refs.g_smem, slot, wg, load_rows)
    g_j = decays(refs.g_smem, slot, wg, load_columns)
    dt_j = load_columns(refs.dt_smem.at[slot, wg])
    g_end = decay_to_end(refs.g_smem, slot, wg)
    passed = difference(
        [over_columns(z, SQUARE) for z in g_i], [over_rows(z, SQUARE) for z in g_j]
    )  # [i, j]
    M = split(jnp.exp2(passed) * CB * over_rows(dt_j, SQUARE), terms)
    M = tuple(_what_is_read(refs, term) for term in M)
    if terms == 1:
        x = load(refs.x_smem.at[slot, wg]).astype(jnp.float32)  # [C, P]
    y = CS * over_columns(jnp.exp2(total(g_i)), x.shape) + x * D
    x_terms, B, *_ = _operands(terms, refs, slot, wg)
    if terms > 1:  # registers do not hold both sums at once
        (y,) = matmul((y, (M, x_terms)))
    kept = weighed(x_terms, jnp.exp2(difference(g_end, g_j)) * dt_j, B)
    of_S = (S * jnp.exp2(total(g_end)), *kept)
    if terms == 1:
        y, S = matmul((y, (M, x_terms)), of_S)  # [C, P], [P, N]
    else:
        (S,) = matmul(of_S)
    plgpu.barrier_arrive(refs.consumed.at[slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y_smem is free
    y_smem = refs.y_smem.at[wg]
    y_smem[...] = y.astype(y_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, refs.y_gmem.at[row, tokens(m), head])
    return S


def _operands(terms, refs, slot, wg):
    """Terms of x, B, C and S."""
    # A 0 read from memory: addresses are then computed where they are used, not once before the
    # loop to occupy registers that two terms need.
    z = refs.zero_smem[wg] if terms > 1 else 0
    tiles = refs.x_terms_smem.at[slot + z, wg], refs.B_terms_smem.at[slot + z]
    return map(terms_of, (*tiles, refs.C_terms_smem.at[slot + z], refs.S_smem.at[wg + z]))


def _what_is_read(refs, M):
    """M [i, j] where i >= j, else 0."""
    bits = lax.bitcast_convert_type(M, jnp.int16) & load(refs.reads_smem)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
