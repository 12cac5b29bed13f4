"""The pass over the splits of a long sequence of few heads; see pallas/splits.py.

A split maps its state S to d S + U. U follows from x and B; backward from dy and C.

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
    divide,
    kernel,
    loop,
    lowered_once,
    release_registers,
)
from gt_jax.kernels.pallas.products import matmul
from gt_jax.kernels.pallas.splits import row_of_split
from gt_jax.kernels.pallas.terms import (
    difference,
    input_tiles_in_place,
    split_in_place,
    terms_of,
    total,
    whole_and_terms,
)
from gt_jax.kernels.pallas.tiles import full, load_columns, tokens
from gt_jax.kernels.ssd.fused import states_between
from gt_jax.kernels.ssd.hopper_decays import decay_to_end, decays, weighed
from gt_jax.kernels.ssd.hopper_sizes import Sizes


def split_states(
    size: Sizes,
    splits: int,
    x: jax.Array,
    B: jax.Array,
    g: jax.Array,
    dt: jax.Array | None,
    state: jax.Array | None,
    *,
    reverse: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The state that each split starts from (ends with if reverse).

    Args:
        size: Sizes with the splits as rows of the batch.
        splits: how many there are of each row.
        x, B: x and B, or dy and C if reverse; [batch * splits, T, ...].
        g: [batch * splits, H, chunks, terms, CHUNK].
        dt: [batch * splits, H, chunks, CHUNK], or None if reverse.
        state: [batch, H, P, N] before the first split, or the gradient after the last; None is 0.
        axis_name: of the devices that share the sequence, as for `states_of_splits`.

    Returns:
        [batch * splits, H, P, N] float32.
    """
    return states_between(
        size, splits, _additions, x, B, g, dt, state, reverse=reverse, axis_name=axis_name
    )


@lowered_once("size", "splits", "maps", "reverse")
def _additions(size, splits, maps, x, B, g, dt, reverse):
    """U of the first `maps` splits of each row (last if reverse), [rows, H, P, N] float32."""
    W, terms, stages = size.heads_per_block, size.terms, size.tuning.split_stages
    rows = size.batch // splits * maps
    dt_smem, numbers = None, terms  # scalars that a token has
    if not reverse:
        dt = dt[:, :, :, None]  # [rows, H, chunks, 1, CHUNK]
        dt_smem, numbers = plgpu.SMEM((stages, W, 1, CHUNK), jnp.float32), terms + 1
    (U,) = kernel(
        functools.partial(_body, size, splits, maps, reverse),
        name="ssd_splits",
        inputs={"x": x, "B": B, "g": g, "dt": None if reverse else dt},
        outputs={"U": jax.ShapeDtypeStruct((rows, size.heads, size.P, size.N), jnp.float32)},
        scratch={
            "x_smem": input_tiles_in_place(terms, stages, W, CHUNK, size.P),
            "B_smem": input_tiles_in_place(terms, stages, CHUNK, size.N),
            "g_smem": plgpu.SMEM((stages, W, terms, CHUNK), jnp.float32),
            "dt_smem": dt_smem,
            "ready": plgpu.Barrier(num_arrivals=1 + (1 + numbers) * W, num_barriers=stages),
            "consumed": plgpu.Barrier(num_arrivals=W, num_barriers=stages),
        },
        grid={"block": rows * size.blocks},
        threads=W + 1,
    )
    return U


def _body(size, splits, maps, reverse, refs):
    W = size.heads_per_block
    refs.x_smem, refs.x_terms_smem = whole_and_terms(size.terms, refs.x_smem)
    refs.B_smem, refs.B_terms_smem = whole_and_terms(size.terms, refs.B_smem)
    row, block = divide(lax.axis_index("block"), size.blocks)
    head0 = block * W
    group = head0 // size.heads_per_group
    wg = lax.axis_index("wg")
    pl.when(wg == W)(lambda: _copy(size, splits, maps, reverse, refs, row, head0, group))
    for n in range(W):
        pl.when(wg == n)(lambda n=n: _compute(size, reverse, refs, row, head0, n))


def _copy(size, splits, maps, reverse, refs, row, head0, group):
    """Keeps copies of the coming chunks in flight."""
    W, stages = size.heads_per_block, size.tuning.split_stages
    release_registers()
    source = row_of_split(row, splits, maps, reverse=reverse)

    def fetch(k, _):
        m = k if reverse else size.chunks - 1 - k
        slot = lax.rem(k, jnp.int32(stages))
        pl.when(k >= stages)(lambda: plgpu.barrier_wait(refs.consumed.at[slot]))
        ready = refs.ready.at[slot]
        B = refs.B_gmem.at[source, tokens(m), group]
        plgpu.copy_gmem_to_smem(B, refs.B_smem.at[slot], ready)
        for h in range(W):
            head = head0 + h
            x = refs.x_gmem.at[source, tokens(m), head]
            plgpu.copy_gmem_to_smem(x, refs.x_smem.at[slot, h], ready)
            for term in range(size.terms):
                g = refs.g_gmem.at[source, head, m, term]
                plgpu.copy_gmem_to_smem(g, refs.g_smem.at[slot, h, term], ready)
            if not reverse:
                dt = refs.dt_gmem.at[source, head, m, 0]
                plgpu.copy_gmem_to_smem(dt, refs.dt_smem.at[slot, h, 0], ready)

    loop(size.chunks, fetch, None)
    for k in range(max(0, size.chunks - stages), size.chunks):  # see every chunk out
        plgpu.barrier_wait(refs.consumed.at[k % stages])


def _compute(size, reverse, refs, row, head0, wg):
    """Walks the chunks of one head with U in registers."""
    claim_registers()

    def step(k, carry):
        log2_d, U = carry  # log2_d is the sum of the log2 decays of the chunks before
        slot = lax.rem(k, jnp.int32(size.tuning.split_stages))
        x, B = terms_of(refs.x_terms_smem.at[slot, wg]), terms_of(refs.B_terms_smem.at[slot])
        plgpu.barrier_wait(refs.ready.at[slot])
        if size.terms > 1:
            split_in_place(refs.x_smem.at[slot, wg], x)
            split_in_place(refs.B_smem.at[slot], B)
            plgpu.commit_smem()
        g = decays(refs.g_smem, slot, wg, load_columns)
        g_end = decay_to_end(refs.g_smem, slot, wg)
        if reverse:
            weight = jnp.exp2(total(g) + log2_d)
        else:
            weight = jnp.exp2(difference(g_end, g) + log2_d)
            weight *= load_columns(refs.dt_smem.at[slot, wg, 0])
        (U,) = matmul((U, *weighed(x, weight, B)))  # [P, N]
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return log2_d + total(g_end), U

    start = (jnp.float32(0), full((size.P, size.N), 0, jnp.float32))
    _, refs.U_gmem[row, head0 + wg] = loop(size.chunks, step, start)
