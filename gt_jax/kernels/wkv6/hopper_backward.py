"""Backward pass of WKV6 on Hopper GPUs: one fused Pallas kernel walks the chunks in reverse.

It reads the state each chunk starts from and the matrix A from the forward pass, and carries dS,
the gradient of the state that leaves the chunk. With Q = r exp(E) and Kh = k exp(F),

    dv = A^T do + Kh dS^T      dQ = do S^T      dKh = v dS^T      dS <- exp(sum w) dS + Q^T do

and per level dY = M Y, where M holds the entries of do v^T (both ways round) of the tokens that the
level separates. A log decay gets the sum of all products Y * dY, Q * dQ and Kh * dKh in whose
exponent it stands, and the column sums of exp(sum w) S * dS: products of the 0/1 patterns again, in
which nothing cancels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import (
    CHUNK,
    claim_registers,
    kernel,
    loop,
    lowered_once,
    release_registers,
)
from gt_jax.kernels.pallas.products import matmul
from gt_jax.kernels.pallas.terms import (
    input_tiles,
    input_tiles_in_place,
    join,
    put,
    split,
    terms_of,
    transpose,
    whole_and_terms,
)
from gt_jax.kernels.pallas.tiles import (
    full,
    load,
    load_columns,
    load_from_gmem,
    over_columns,
    over_rows,
    tile,
    tokens,
)
from gt_jax.kernels.wkv6.hopper_gradients import (
    gather,
    gradient_one,
    load_float32,
    operands,
    stow,
    sums,
    through_levels,
)
from gt_jax.kernels.wkv6.hopper_levels import (
    FROM_START,
    LEVELS,
    ONE,
    TO_END,
    Masks,
    log2_decay,
    sum_patterns,
)
from gt_jax.kernels.wkv6.hopper_sizes import (
    SCORES,
    SIZE,
    SQUARE,
    STATE,
    Sizes,
    channels,
    sizes_of,
)

# 16 rows of ones; with the zeros behind them XLA stores the array instead of launching a fill.
_ONES = np.repeat([[1.0], [0.0]], (16, 8), axis=0).repeat(CHUNK, axis=1)


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
        r, k: [B, T, H, K]; v, do: [B, T, H, V], bfloat16 or float32; w: [B, T, H, K] float32;
            u: [H, 64] float32.
        states: [B, M, H, terms, V, K] bfloat16, transposed state each chunk starts from.
        scores: [B, M, H, terms, C, C] bfloat16, the matrix A of each chunk.
        dstate: [B, H, 64, 64] float32, gradient of the final state, transposed; None
            for zeros.

    Returns:
        dr, dk, dv, dw like r, k, v, w; du [B, H, 64] float32, of each example; the gradient of the
        initial state [B, H, 64, 64] float32, transposed.
    """
    size = sizes_of(r, v)
    heads, terms = size.heads_per_block, size.terms
    bf16, f32 = jnp.bfloat16, jnp.float32
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    patterns = tile(LEVELS + 1, CHUNK, CHUNK, dtype=jnp.float16)
    if not interpreting():
        patterns = plgpu.RefUnion(patterns, tile(LEVELS + 1, CHUNK, CHUNK))
    return kernel(
        functools.partial(_body, size),
        name="wkv6_backward",
        inputs=dict(
            r=r, k=k, v=v, w=w, u=u, states=states, scores=scores, do=do, dfinal=dstate,
            patterns=sum_patterns(terms), ones=_ONES.astype(bf16),
        ),
        outputs={
            "dr": like(r),
            "dk": like(k),
            "dv": like(v),
            "dw": like(w),
            "du": jax.ShapeDtypeStruct((size.batch, size.heads, SIZE), f32),
            "dinitial": jax.ShapeDtypeStruct((size.batch, size.heads, *STATE), f32),
        },
        # Where a tile has served, its room is used again; _step says how.
        scratch={
            "patterns_smem": patterns,
            "r_smem": tile(heads, *SQUARE, dtype=r.dtype),  # r, dr
            "k_smem": tile(heads, *SQUARE, dtype=r.dtype),  # k, dk
            "v_smem": input_tiles(terms, heads, *SQUARE),  # v, dv
            "do_smem": input_tiles_in_place(terms, heads, *SQUARE),  # do, in two terms dw
            "Y_smem": tile(heads, terms, *STATE),  # S, Q, Y of a level
            "Z_smem": tile(heads, terms, *SCORES),  # A, products in whose exponents w stands
            "dS_smem": tile(heads, terms, *STATE),  # dS, exp(sum w) S * dS, M
            "w_smem": tile(heads, *SQUARE, dtype=f32),  # w, dS carried, dw
            "log2_w_smem": tile(heads, terms, *SQUARE, dtype=jnp.float16),
            "u_smem": plgpu.SMEM((heads, SIZE), f32),  # u, du
            "ones_smem": tile(16, CHUNK),
            "zero_smem": plgpu.SMEM((heads,), jnp.int32),
            "constants_ready": plgpu.Barrier(num_arrivals=2),
            "ready": plgpu.Barrier(num_barriers=heads, num_arrivals=5 + 2 * terms),
            "done": plgpu.Barrier(num_barriers=heads),
        },
        grid=size.grid,
        threads=heads + 1,
    )  # fmt: skip


def _body(size: Sizes, refs):
    patterns = refs.patterns_smem
    refs.sums_smem, refs.dsums_smem = (patterns,) * 2 if interpreting() else patterns
    wg = lax.axis_index("wg")
    refs.v_smem, refs.v_terms_smem = whole_and_terms(size.terms, refs.v_smem)
    refs.do_smem, refs.do_terms_smem = whole_and_terms(size.terms, refs.do_smem)
    pl.when(wg == size.heads_per_block)(lambda: _copy(size, refs))
    pl.when(wg < size.heads_per_block)(lambda: _compute(size, refs, wg))


def _copy(size, refs):
    """Copies a chunk in once the one after it has left, as its gradients leave from its tiles."""
    release_registers()
    plgpu.copy_gmem_to_smem(refs.patterns_gmem, refs.sums_smem, refs.constants_ready)
    plgpu.copy_gmem_to_smem(refs.ones_gmem.at[:16], refs.ones_smem, refs.constants_ready)
    inputs = (
        (refs.r_gmem, refs.r_smem),
        (refs.k_gmem, refs.k_smem),
        (refs.v_gmem, refs.v_smem),
        (refs.do_gmem, refs.do_smem),
        (refs.w_gmem, refs.w_smem),
    )
    outputs = (
        (refs.r_smem, refs.dr_gmem),
        (refs.k_smem, refs.dk_gmem),
        (refs.v_smem, refs.dv_gmem),
        (refs.w_smem, refs.dw_gmem),
    )

    def fetch(n, m):
        b, h = size.place(n)
        ready = refs.ready.at[n]
        for gmem, smem in inputs:
            plgpu.copy_gmem_to_smem(gmem.at[b, tokens(m), h, channels()], smem.at[n], ready)
        for term in range(size.terms):
            state = refs.states_gmem.at[b, m, h, term, channels(), channels()]
            plgpu.copy_gmem_to_smem(state, refs.Y_smem.at[n, term], ready)
            scores = refs.scores_gmem.at[b, m, h, term]
            plgpu.copy_gmem_to_smem(scores, refs.Z_smem.at[n, term], ready)

    def store(n, m):
        b, h = size.place(n)
        for smem, gmem in outputs:
            plgpu.copy_smem_to_gmem(smem.at[n], gmem.at[b, tokens(m), h, channels()])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    for n in range(size.heads_per_block):
        fetch(n, jnp.int32(size.chunks - 1) + lax.axis_index("rows") * 0)

    def step(back, _):
        m = size.chunks - 1 - back
        for n in range(size.heads_per_block):
            plgpu.barrier_wait(refs.done.at[n])
            store(n, m)
            pl.when(m > 0)(lambda n=n: fetch(n, m - 1))

    loop(size.chunks, step, None)
    plgpu.wait_smem_to_gmem(0)


def _compute(size, refs, wg):
    """Walks the chunks of one head from the last to the first with dS and du in registers."""
    claim_registers()
    b, h = size.place(wg)
    in_columns = plgpu.Layout.WGMMA.reduce(0)
    u = plgpu.load(refs.u_gmem.at[h], layout=in_columns, optimized=False)
    refs.u_smem.at[wg][...] = u
    refs.zero_smem[wg] = jnp.int32(0)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.constants_ready)
    masks = Masks(refs.zero_smem.at[wg])
    log2_ones = full((SIZE, CHUNK), ONE[size.terms], refs.log2_w_smem.dtype)
    ones = full(SQUARE, gradient_one(size.terms), jnp.bfloat16)
    step = functools.partial(_step, size.terms, refs, wg, masks, log2_ones, ones)
    if refs.dfinal_gmem is None:
        dS = full(STATE, 0, jnp.float32)  # [V, K]
    else:
        dS = load_from_gmem(refs.dfinal_gmem.at[b, h])
    du = full((SIZE, 16), 0, jnp.float32)  # 16 equal columns
    dS, du = loop(size.chunks, step, (dS, du))
    refs.dinitial_gmem.at[b, h][...] = dS
    refs.u_smem.at[wg][...] = jnp.sum(du, axis=1) * (1 / 16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.u_smem.at[wg], refs.du_gmem.at[b, h])
    plgpu.wait_smem_to_gmem(0)


def _step(terms, refs, wg, masks, log2_ones, ones, back, carry):
    """One chunk: from dS of the state after it to dS of the state before it; adds to du.

    The place of the state is used again by Q and Y, that of A by Z, that of dS by M, that of w by
    the carried dS, those of r, k, v and w by their gradients and, with operands of two terms, that
    of do by dw.
    """
    del back
    dS, du = carry
    split_ = functools.partial(split, terms=terms)
    at = wg + masks.zero()
    v, dS_terms = terms_of(refs.v_terms_smem.at[at]), terms_of(refs.dS_smem.at[at])
    plgpu.barrier_wait(refs.ready.at[at])
    put(terms_of(refs.log2_w_smem.at[at]), log2_decay(load(refs.w_smem.at[at]), terms))
    put(dS_terms, split_(dS))
    if terms > 1:
        put(v, split_(load(refs.v_smem.at[at])))
        do = load(refs.do_smem.at[at])
        plgpu.commit_smem()  # all of it is read before it is overwritten
        put(terms_of(refs.do_terms_smem.at[at]), split_(do))
    plgpu.commit_smem()
    exponent, dKh = matmul(sums(refs, wg, masks, TO_END), (SQUARE, (v, dS_terms)))  # [C, K]

    at, do, Y, Z, dS_terms = operands(refs, wg, masks)
    decay, k = jnp.exp2(exponent), load_float32(refs.k_smem.at[at])
    dk = dKh * decay
    Z_end, Kh = split_(k * dk), split_(k * decay)
    dv, log2_d = matmul(
        (SQUARE, (transpose(Z), do), (Kh, transpose(dS_terms))),  # [C, V]
        (STATE, (log2_ones, terms_of(refs.log2_w_smem.at[at]))),  # [V, K], the same in every row
    )

    at, do, Y, Z, dS_terms = operands(refs, wg, masks)
    dS = dS * jnp.exp2(log2_d)
    dv, Z_through = dv.astype(refs.v_smem.dtype), split_(join(Y) * dS)
    if terms > 1:  # and the terms of v lie elsewhere
        refs.v_smem.at[at][...] = dv
    dS = stow(terms, refs.w_smem, wg, masks, dS)
    plgpu.commit_smem()
    put(Z, Z_end)
    put(dS_terms, Z_through)
    exponent, dQ = matmul(sums(refs, wg, masks, FROM_START), (SQUARE, (do, Y)))  # [C, K]

    at, do, Y, Z, dS_terms = operands(refs, wg, masks)
    decay, r = jnp.exp2(exponent), load_float32(refs.r_smem.at[at])
    dr = dQ * decay
    Z_start, Q = split_(r * dr), split_(r * decay)
    plgpu.commit_smem()
    put(Y, Q)
    plgpu.commit_smem()
    dw, dS = matmul(
        (*gather(refs, masks, SQUARE, TO_END, Z), (ones, dS_terms)),  # [C, K]
        (dS, (transpose(do), Y)),  # [V, K]
    )

    at, do, _, Z, _ = operands(refs, wg, masks)
    v = terms_of(refs.v_terms_smem.at[at])
    refs.w_smem.at[at][...] = dS
    plgpu.commit_smem()
    put(Z, Z_start)
    plgpu.commit_smem()
    dw, dA, dA_transposed = matmul(
        gather(refs, masks, dw, FROM_START, Z),  # [C, K]
        (SCORES, (do, transpose(v))),  # [C, C]
        (SCORES, (v, transpose(do))),  # [C, C]
    )

    at = wg + masks.zero()
    own = jnp.sum(jnp.where(masks.diagonal(), dA, 0.0), axis=1)  # do . v, [C]
    M = split_(jnp.where(masks.later(), dA, dA_transposed))
    put(terms_of(refs.dS_smem.at[at]), M)
    plgpu.commit_smem()
    if terms == 1:
        refs.v_smem.at[at][...] = dv
    dw = stow(terms, refs.do_smem, wg, masks, dw)
    dr, dk, dw = through_levels(terms, refs, wg, masks, dr, dk, dw)

    at = wg + masks.zero()
    r_smem, k_smem, w_smem = refs.r_smem.at[at], refs.k_smem.at[at], refs.w_smem.at[at]
    Y = terms_of(refs.Y_smem.at[at])
    r, k = load_float32(r_smem), load_float32(k_smem)
    own = over_columns(own, SQUARE)
    u = over_rows(load_columns(refs.u_smem.at[at]), SQUARE)
    plgpu.commit_smem()
    put(Y, split_(own * r * k))
    r_smem[...] = (dr + own * u * k).astype(r_smem.dtype)
    k_smem[...] = (dk + own * u * r).astype(k_smem.dtype)
    dS = load(w_smem)
    w_smem[...] = (dw if terms == 1 else load(dw)) * (1 / gradient_one(terms))
    plgpu.commit_smem()
    (du,) = matmul((du, (transpose(Y), refs.ones_smem.T)))  # [K, 16]
    plgpu.barrier_arrive(refs.done.at[at])
    return dS, du
