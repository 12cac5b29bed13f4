"""The pass over the splits of a long sequence of few heads; see pallas/splits.py.

A split maps its state S to diag(d) S + U. d and U of a split follow from k, v and w; backward from
r, do and w. States are transposed, [V, K], as in the other kernels.

The pass walks towards the end from which the map is applied: what a chunk adds to U then needs no
later decay, and what it reads last, and may still be in the second-level cache, is what the kernel
after it reads first.
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
from gt_jax.kernels.pallas.splits import count_maps, row_of_split, states_of_splits
from gt_jax.kernels.pallas.terms import (
    input_tiles,
    put,
    split,
    terms_of,
    transpose,
    whole_and_terms,
)
from gt_jax.kernels.pallas.tiles import full, load, tile, tokens
from gt_jax.kernels.wkv6.hopper_levels import (
    FROM_START,
    ONE,
    TO_END,
    Masks,
    log2_decay,
    sum_patterns,
)
from gt_jax.kernels.wkv6.hopper_sizes import (
    SIZE,
    SQUARE,
    STATE,
    TUNING,
    Sizes,
    channels,
    sizes_of,
)


def split_states(
    splits: int,
    x: jax.Array,
    v: jax.Array,
    w: jax.Array,
    state: jax.Array | None,
    *,
    reverse: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The state that each split starts from (ends with if reverse).

    Args:
        splits: how many there are of each row.
        x, v, w: k, v and w, or r, do and w if reverse; [batch * splits, T, H, up to 64].
        state: [batch, H, V, K] before the first split, or the gradient after the last; None is 0.
        axis_name: of the devices that share the sequence, as for `states_of_splits`.

    Returns:
        [batch * splits, H, V, K] float32.
    """
    maps = count_maps(splits, axis_name)
    by_row = lambda z: z.reshape(-1, maps, *z.shape[1:]).swapaxes(1, 2)
    decay, update = map(by_row, _maps(splits, maps, x, v, w, reverse))  # [batch, H, maps, V, K]
    decay = decay[..., :1, :]
    return states_of_splits(decay, update, state, reverse=reverse, axis_name=axis_name)


@lowered_once("splits", "maps", "reverse")
def _maps(splits, maps, x, v, w, reverse):
    """d (the same in every row) and U of the first `maps` splits of each row (last if reverse).

    Both are [rows, H, V, K] float32.
    """
    size = sizes_of(x, v)._replace(batch=x.shape[0] // splits * maps)
    stages = TUNING[size.terms].split_stages
    heads, terms = size.heads_per_block, size.terms
    pattern = sum_patterns(terms)[FROM_START if reverse else TO_END]
    result = jax.ShapeDtypeStruct((size.batch, size.heads, *STATE), jnp.float32)
    return kernel(
        functools.partial(_body, size, splits, maps, reverse),
        name="wkv6_splits",
        inputs=dict(x=x, v=v, w=w, pattern=pattern),
        outputs={"d": result, "U": result},
        scratch={
            "pattern_smem": tile(CHUNK, CHUNK, dtype=jnp.float16),
            "x_smem": tile(heads, stages, *SQUARE, dtype=x.dtype),
            "v_smem": input_tiles(terms, heads, stages, *SQUARE),
            "w_smem": tile(heads, stages, *SQUARE, dtype=jnp.float32),
            "log2_w_smem": tile(heads, terms, *SQUARE, dtype=jnp.float16),
            "Y_smem": tile(heads, terms, *SQUARE),
            "zero_smem": plgpu.SMEM((heads,), jnp.int32),
            "pattern_ready": plgpu.Barrier(),
            "ready": plgpu.Barrier(num_barriers=heads * stages, num_arrivals=3),
            "consumed": plgpu.Barrier(num_barriers=heads * stages),
        },
        grid=size.grid,
        threads=heads + 1,
    )


def _body(size: Sizes, splits, maps, reverse, refs):
    stages = TUNING[size.terms].split_stages
    wg = lax.axis_index("wg")
    refs.v_smem, refs.v_terms_smem = whole_and_terms(size.terms, refs.v_smem)
    pl.when(wg == size.heads_per_block)(lambda: _copy(size, splits, maps, reverse, refs))
    pl.when(wg < size.heads_per_block)(lambda: _compute(size, stages, refs, wg))


def _copy(size, splits, maps, reverse, refs):
    """Keeps copies of the coming chunks in flight."""
    stages = TUNING[size.terms].split_stages
    release_registers()
    plgpu.copy_gmem_to_smem(refs.pattern_gmem, refs.pattern_smem, refs.pattern_ready)

    def fetch(step, _):
        m = step if reverse else size.chunks - 1 - step
        slot = lax.rem(step, jnp.int32(stages))
        for n in range(size.heads_per_block):
            b, h = size.place(n)
            at = n * stages + slot
            pl.when(step >= stages)(lambda at=at: plgpu.barrier_wait(refs.consumed.at[at]))
            for gmem, smem in (
                (refs.x_gmem, refs.x_smem),
                (refs.v_gmem, refs.v_smem),
                (refs.w_gmem, refs.w_smem),
            ):
                row = row_of_split(b, splits, maps, reverse=reverse)
                source = gmem.at[row, tokens(m), h, channels()]
                plgpu.copy_gmem_to_smem(source, smem.at[n, slot], refs.ready.at[at])

    loop(size.chunks, fetch, None)
    for step in range(max(0, size.chunks - stages), size.chunks):  # see every chunk out
        for n in range(size.heads_per_block):
            plgpu.barrier_wait(refs.consumed.at[n * stages + step % stages])


def _compute(size, stages, refs, wg):
    """Walks the chunks of one head with log2 d and U in registers."""
    terms = size.terms
    claim_registers()
    b, h = size.place(wg)
    refs.zero_smem[wg] = jnp.int32(0)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.pattern_ready)
    masks = Masks(refs.zero_smem.at[wg])
    ones = full((SIZE, CHUNK), ONE[terms], refs.log2_w_smem.dtype)

    def step(m, carry):
        log2_d, U = carry  # [V, K]; log2_d is the same in every row
        slot, at = lax.rem(m, jnp.int32(stages)), wg + masks.zero()
        tiles = (refs.log2_w_smem.at[at], refs.Y_smem.at[at], refs.v_terms_smem.at[at, slot])
        log2_w, Y, v = map(terms_of, tiles)
        plgpu.barrier_wait(refs.ready.at[at * stages + slot])
        put(log2_w, log2_decay(load(refs.w_smem.at[at, slot]), terms))
        plgpu.commit_smem()
        # The sums of a token and of the chunk, both behind those of the chunks before: [C, K].
        exponent, log2_d = matmul((log2_d, (refs.pattern_smem, log2_w)), (log2_d, (ones, log2_w)))
        x = load(refs.x_smem.at[at, slot]).astype(jnp.float32)
        put(Y, split(x * jnp.exp2(exponent), terms))
        if terms > 1:
            put(v, split(load(refs.v_smem.at[at, slot]), terms))
        plgpu.commit_smem()
        (U,) = matmul((U, (transpose(v), Y)))  # [V, K]
        plgpu.barrier_arrive(refs.consumed.at[at * stages + slot])
        return log2_d, U

    zeros = full(STATE, 0, jnp.float32)
    log2_d, U = loop(size.chunks, step, (zeros, zeros))
    refs.d_gmem.at[b, h][...] = jnp.exp2(log2_d)
    refs.U_gmem.at[b, h][...] = U
