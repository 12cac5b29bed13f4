"""WKV6 on Hopper GPUs: one fused Pallas kernel walks the chunks of a head with its state on chip.

A block of the grid owns two heads: a warpgroup per head computes, one more keeps bulk copies of the
coming chunks in flight. Per chunk, with E and F the sums of log decays from the chunk's start and
to its end,

    A_ij = sum_k r_ik k_jk exp(sum of w over (j, i))   for i > j,     A_ii = r_i . (u * k_i)
    o = A v + (r exp(E)) S                              S <- exp(sum w) S + (k exp(F))^T v

A is built level by level as in chunks.py: at each level one 64 x 64 product of the sums' 0/1
pattern with the log decays gives every exponent, and one product of Y = [r or k] exp(.) with itself
gives the entries of A whose tokens that level separates. The state is held transposed, [V, K], so
that the decay of a key channel runs along its columns, which is how the products deliver it.

Operands of products are bfloat16 numbers or, where r, k and v are float32, sums of two bfloat16
terms; a block then owns one head.
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
    kernel,
    loop,
    lowered_once,
    release_registers,
)
from gt_jax.kernels.pallas.products import matmul
from gt_jax.kernels.pallas.terms import (
    input_tiles,
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
    overlay,
    tile,
    tokens,
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


@lowered_once("save")
def forward(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    state: jax.Array | None,
    *,
    save: bool,
) -> list[jax.Array]:
    """o, the final state and, with save, what the backward pass reads.

    Args:
        r, k: [B, T, H, K]; v: [B, T, H, V], bfloat16 or float32; w: [B, T, H, K] float32.
        u: [H, 64] float32.
        state: [B, H, 64, 64] float32, V before K; None for zeros.
        save: whether the backward pass follows.

    Returns:
        o [B, T, H, V]; the final state [B, H, 64, 64]; the state each chunk starts from
        [B, M, H, terms, V, K] and A [B, M, H, terms, C, C], both bfloat16 (of one chunk, and
        undefined, without save).
    """
    size = sizes_of(r, v)
    heads, terms = size.heads_per_block, size.terms
    saved = (size.batch, size.chunks) if save else (1, 1)
    saved = (*saved, size.heads, terms)
    bf16, f32 = jnp.bfloat16, jnp.float32
    return kernel(
        functools.partial(_body, size, save),
        name="wkv6_forward",
        inputs=dict(r=r, k=k, v=v, w=w, u=u, state=state, patterns=sum_patterns(terms)),
        outputs={
            "o": jax.ShapeDtypeStruct(v.shape, v.dtype),
            "final": jax.ShapeDtypeStruct((size.batch, size.heads, *STATE), f32),
            "states": jax.ShapeDtypeStruct((*saved, size.V, size.K), bf16),
            "scores": jax.ShapeDtypeStruct((*saved, *SCORES), bf16),
        },
        scratch={
            "patterns_smem": tile(LEVELS + 1, CHUNK, CHUNK, dtype=jnp.float16),
            "r_smem": tile(heads, *SQUARE, dtype=r.dtype),
            "k_smem": tile(heads, *SQUARE, dtype=r.dtype),
            "v_smem": input_tiles(terms, heads, *SQUARE),
            "w_smem": tile(heads, *SQUARE, dtype=f32),
            "log2_w_smem": tile(heads, terms, *SQUARE, dtype=jnp.float16),
            "Y_smem": tile(heads, 2, terms, *SQUARE),
            "S_smem": tile(heads, terms, *STATE),
            "o_and_A_smem": overlay(
                tile(heads, *SQUARE, dtype=v.dtype), tile(heads, terms, *SCORES)
            ),
            "u_smem": plgpu.SMEM((heads, SIZE), f32),
            "zero_smem": plgpu.SMEM((heads,), jnp.int32),
            "patterns_ready": plgpu.Barrier(),
            "ready": plgpu.Barrier(num_barriers=heads, num_arrivals=3),  # r, k, w
            "v_ready": plgpu.Barrier(num_barriers=heads),
            "consumed": plgpu.Barrier(num_barriers=heads),
            "v_consumed": plgpu.Barrier(num_barriers=heads),
        },
        grid=size.grid,
        threads=heads + 1,
    )


def _body(size: Sizes, save, refs):
    wg = lax.axis_index("wg")
    refs.v_smem, refs.v_terms_smem = whole_and_terms(size.terms, refs.v_smem)
    refs.o_smem, refs.A_smem = refs.o_and_A_smem
    pl.when(wg == size.heads_per_block)(lambda: _copy(size, refs))
    pl.when(wg < size.heads_per_block)(lambda: _compute(size, save, refs, wg))


def _copy(size, refs):
    """Keeps copies of the coming chunk in flight; v is needed last and may arrive last."""
    release_registers()
    plgpu.copy_gmem_to_smem(refs.patterns_gmem, refs.patterns_smem, refs.patterns_ready)

    def fetch(n, m, gmems, smems, ready):
        b, h = size.place(n)
        for gmem, smem in zip(gmems, smems):
            source = gmem.at[b, tokens(m), h, channels()]
            plgpu.copy_gmem_to_smem(source, smem.at[n], ready.at[n])

    r_k_w = (refs.r_gmem, refs.k_gmem, refs.w_gmem), (refs.r_smem, refs.k_smem, refs.w_smem)
    fetch_r_k_w = lambda n, m: fetch(n, m, *r_k_w, refs.ready)
    fetch_v = lambda n, m: fetch(n, m, (refs.v_gmem,), (refs.v_smem,), refs.v_ready)
    for n in range(size.heads_per_block):
        fetch_r_k_w(n, jnp.int32(0))
        fetch_v(n, jnp.int32(0))

    def step(m, _):
        for n in range(size.heads_per_block):
            plgpu.barrier_wait(refs.consumed.at[n])
            pl.when(m + 1 < size.chunks)(lambda n=n: fetch_r_k_w(n, m + 1))
        for n in range(size.heads_per_block):
            plgpu.barrier_wait(refs.v_consumed.at[n])
            pl.when(m + 1 < size.chunks)(lambda n=n: fetch_v(n, m + 1))

    loop(size.chunks, step, None)


def _compute(size, save, refs, wg):
    """Walks the chunks of one head with its state in registers."""
    claim_registers()
    b, h = size.place(wg)
    in_columns = plgpu.Layout.WGMMA.reduce(0)
    u = plgpu.load(refs.u_gmem.at[h], layout=in_columns, optimized=False)
    refs.u_smem.at[wg][...] = u
    refs.zero_smem[wg] = jnp.int32(0)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.patterns_ready)
    masks = Masks(refs.zero_smem.at[wg])
    ones = full((SIZE, CHUNK), ONE[size.terms], refs.log2_w_smem.dtype)
    step = functools.partial(_step, size, save, refs, wg, masks, ones, b, h)
    if refs.state_gmem is None:
        S = full(STATE, 0, jnp.float32)
    else:
        S = load_from_gmem(refs.state_gmem.at[b, h])
    refs.final_gmem.at[b, h][...] = loop(size.chunks, step, S)
    plgpu.wait_smem_to_gmem(0)


def _step(size, save, refs, wg, masks, ones, b, h, m, S):
    """One chunk: writes o and what is saved; the state before it [V, K] -> the state after it."""
    terms = size.terms
    at = wg + masks.zero()
    plgpu.barrier_wait(refs.ready.at[at])
    log2_w, S_terms = terms_of(refs.log2_w_smem.at[at]), terms_of(refs.S_smem.at[at])
    put(log2_w, log2_decay(load(refs.w_smem.at[at]), terms))
    r, k = (load(ref.at[at]).astype(jnp.float32) for ref in (refs.r_smem, refs.k_smem))  # [C, K]
    put(S_terms, split(S, terms))
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.consumed.at[at])
    if save:
        for term in range(terms):
            target = refs.states_gmem.at[b, m, h, term, channels(), channels()]
            plgpu.copy_smem_to_gmem(S_terms[term], target)

    A, exponent = _scores(terms, refs, wg, masks, r, k)  # [C, C], [C, K]

    at = wg + masks.zero()
    tiles = (refs.Y_smem.at[at, 0], refs.S_smem.at[at], refs.A_smem.at[at])
    tiles = (*tiles, refs.v_terms_smem.at[at], refs.log2_w_smem.at[at])
    Q, S_terms, A_terms, v, log2_w = map(terms_of, tiles)
    u = over_rows(load_columns(refs.u_smem.at[at]), SQUARE)
    own = over_columns(jnp.sum(r * k * u, axis=1), SCORES)
    A = split(jnp.where(masks.diagonal(), own, A), terms)
    put(Q, split(r * jnp.exp2(exponent), terms))
    if save:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(A_terms, A)
    plgpu.commit_smem()
    if save:
        for term in range(terms):
            plgpu.copy_smem_to_gmem(A_terms[term], refs.scores_gmem.at[b, m, h, term])
    plgpu.barrier_wait(refs.v_ready.at[at])
    if terms > 1:
        put(v, split(load(refs.v_smem.at[at]), terms))
        plgpu.commit_smem()
    o, exponent, log2_d = matmul(
        (SQUARE, (Q, transpose(S_terms)), (A, v)),  # [C, V]
        _sums(refs, wg, masks, TO_END),  # [C, K]
        (STATE, (ones, log2_w)),  # [V, K], the chunk's whole sum in every row
    )

    at = wg + masks.zero()
    Kh, v = terms_of(refs.Y_smem.at[at, 1]), terms_of(refs.v_terms_smem.at[at])
    o_smem = refs.o_smem.at[at]
    put(Kh, split(k * jnp.exp2(exponent), terms))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    o_smem[...] = o.astype(o_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem, refs.o_gmem.at[b, tokens(m), h, channels()])
    (S,) = matmul((S * jnp.exp2(log2_d), (transpose(v), Kh)))  # [V, K]
    plgpu.barrier_arrive(refs.v_consumed.at[at])
    return S


def _scores(terms, refs, wg, masks, r, k):
    """A [C, C] below its diagonal, and the sums of log2 decays from the chunk's start [C, K].

    The exponents of the next level are in flight with the product of this one.
    """

    def put_by_role(level, exponent):
        """Y [C, K]: r where a token is a query at this level, k where it is a key, decayed."""
        Y = terms_of(refs.Y_smem.at[wg + masks.zero(), level % 2])
        value = jnp.where(masks.query(level), r, k)
        put(Y, split(value if exponent is None else value * jnp.exp2(exponent), terms))
        plgpu.commit_smem()
        return Y

    Y = put_by_role(0, None)  # no decay lies between neighbours
    scores, exponent = matmul(
        (SCORES, (Y, transpose(Y))), _sums(refs, wg, masks, LEVELS - 2)
    )  # [C, C], [C, K]
    A = jnp.where(masks.pair(0), scores, 0.0)
    for level in reversed(range(1, LEVELS)):
        Y = put_by_role(level, exponent)
        following = _sums(refs, wg, masks, level - 2 if level > 1 else FROM_START)
        scores, exponent = matmul((SCORES, (Y, transpose(Y))), following)
        A = jnp.where(masks.pair(level), scores, A)
    return A, exponent


def _sums(refs, wg, masks, pattern):
    """For matmul: the log2 decays summed as a pattern says, [C, K]."""
    zero = masks.zero()
    operands = refs.patterns_smem.at[pattern + zero], terms_of(refs.log2_w_smem.at[wg + zero])
    return SQUARE, operands
