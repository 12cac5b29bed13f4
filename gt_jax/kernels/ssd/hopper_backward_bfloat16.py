"""Gradient kernel of SSD for bfloat16; the formulas are in hopper_backward.py.

The two warpgroups of a block swap operands through shared memory and sum their two heads: one takes
dC, the other dB. The state that every other chunk starts from was saved; the one between follows
from it and from the x and B that are needed next anyway.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.launch import CHUNK, kernel
from gt_jax.kernels.pallas.products import every_product, matmul
from gt_jax.kernels.pallas.terms import (
    difference,
    join,
    put,
    split,
    terms_of,
    total,
    transpose,
    whole_and_terms,
)
from gt_jax.kernels.pallas.tiles import (
    load_columns,
    over_columns,
    overlay,
    tile,
    tokens,
)
from gt_jax.kernels.ssd import hopper_gradients as gradient
from gt_jax.kernels.ssd.hopper_chains import chains_of, place_of_block
from gt_jax.kernels.ssd.hopper_decays import decay_to_end, decays, weighed
from gt_jax.kernels.ssd.hopper_sizes import SQUARE, Sizes


def gradients(size: Sizes, inputs: dict, *, of_start: bool) -> list[jax.Array]:
    """Results of hopper_backward.backward, of inputs by name, in bfloat16."""
    P, N, W, stages = size.P, size.N, size.heads_per_block, size.tuning.backward_stages
    chains = chains_of(size)
    # Where a chunk's inputs were, its dB and dC leave from, in halves of columns.
    heads = max(W, N // 64)  # room of the right halves, where one head has less
    f32 = functools.partial(tile, dtype=jnp.float32)
    right = f32(stages, heads * 64 // N, CHUNK, N // 2)
    of_head = overlay(tile(stages, heads, 1, CHUNK, P), right)
    of_group = overlay(tile(stages, 1, CHUNK, N), f32(stages, CHUNK, N // 2))
    return kernel(
        functools.partial(_body, size, chains),
        name="ssd_backward_bfloat16",
        inputs=inputs,
        outputs=gradient.output_types(size, chains, inputs, of_start=of_start),
        scratch={
            "B_and_dB_smem": of_group,
            "C_and_dC_smem": of_group,
            "S_ready": plgpu.Barrier(num_arrivals=W),
            "S_terms_smem": tile(W, 1, P, N),
            "before_smem": tile(1, *SQUARE),
            "dCB_smem": tile(W, 1, *SQUARE),
            "dS_smem": tile(W, 1, P, N),
            "done": plgpu.Barrier(num_arrivals=W),
            "dt_smem": plgpu.SMEM((stages, W, CHUNK), jnp.float32),
            "dy_and_dC_smem": of_head,
            "g_smem": plgpu.SMEM((stages, W, 1, CHUNK), jnp.float32),
            "operands_read": plgpu.Barrier(num_arrivals=W),
            "operands_ready": plgpu.Barrier(num_arrivals=W),
            "ready": plgpu.Barrier(num_arrivals=2 + 4 * W, num_barriers=stages),
            "rows_smem": plgpu.SMEM((W, len(gradient.ROWS), CHUNK), jnp.float32),
            "x_and_dB_smem": of_head,
            "zero_smem": plgpu.SMEM((W,), jnp.int32),
        },
        grid={"block": size.batch * size.blocks},
        threads=W + 1,
    )


def _body(size, chains, refs):
    refs.x_terms_smem, dB_right = refs.x_and_dB_smem
    refs.dy_terms_smem, dC_right = refs.dy_and_dC_smem
    refs.B_terms_smem, dB_left = refs.B_and_dB_smem
    refs.C_terms_smem, dC_left = refs.C_and_dC_smem
    refs.dB_smems = dB_left, dB_right.at[:, 0]
    refs.dC_smems = dC_left, dC_right.at[:, 0]
    for name in ("x", "dy", "B", "C", "S"):
        whole, _ = whole_and_terms(1, getattr(refs, f"{name}_terms_smem"))
        setattr(refs, f"{name}_smem", whole)
    W = size.heads_per_block
    place = place_of_block(size, chains)
    wg = lax.axis_index("wg")
    pl.when(wg == W)(lambda: _copy(size, chains, refs, place))
    for n in range(W):
        make_step = functools.partial(_make_step, size, refs, place, n)
        pl.when(wg == n)(lambda n=n, f=make_step: gradient.walk(size, refs, place, n, f))


def _copy(size, chains, refs, place):
    state_of = lambda m: lax.div(m, jnp.int32(2))
    gradient.copy(size, chains, refs, place, state_of=state_of)


def _make_step(size, refs, place, wg, head, D):
    return functools.partial(_step, size, refs, place, wg, head, D)


def _step(size, refs, place, wg, head, D, k, carry):
    """One chunk: from dS of the state after it to dS of the state before it; adds to dD."""
    dS, dD = carry
    last, stages = size.chunks - 1, size.tuning.backward_stages
    m, slot = last - k, lax.rem(k, jnp.int32(stages))
    odd = lax.rem(m, jnp.int32(2)) == 1
    at = gradient.operands(refs, slot, wg)
    pl.when(odd | (k == 0))(lambda: plgpu.barrier_wait(refs.ready.at[slot]))
    BC, dM = matmul(
        (SQUARE, (at.B, transpose(at.C))),  # [j, i]
        (SQUARE, (at.x, transpose(at.dy))),  # [j, i]
    )
    decay = gradient.load_decays(refs, slot, wg)
    dt_j = over_columns(decay.dt, SQUARE)
    M = split(decay.L * BC * dt_j, 1)
    dM *= decay.L
    dCB = split(dM * dt_j, 1)
    of_dt = dM * BC  # [j, i]
    ddt = jnp.sum(of_dt, axis=1)  # [j]
    at = gradient.operands(refs, slot, wg)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results left; all warps are here
    put(at.dCB, split(of_dt * dt_j, 1))  # in a place that dCB needs later

    (kept,) = matmul(((CHUNK, size.P), (at.B, transpose(at.dS))))  # [j, P]
    at = gradient.operands(refs, slot, wg)
    dy, x = gradient.load_float32(at.dy_smem), gradient.load_float32(at.x_smem)  # [C, P]
    to_end = jnp.exp2(difference(decay.g_end, decay.g_j))
    of_weight = jnp.sum(kept * x, axis=1)
    ddt += of_weight * to_end
    dD += jnp.sum(dy * x, axis=1)
    weight = over_columns(to_end * decay.dt, x.shape)
    put(at.x, split(x * weight, 1))
    plgpu.commit_smem()
    dx = kept * weight + dy * D
    between, dx = matmul(gradient.sum_before(refs, wg, at.dCB), (dx, (M, at.dy)))  # [t, i], [j, P]
    at = gradient.operands(refs, slot, wg)
    da = jnp.sum(gradient.not_before(refs, wg, between), axis=1)  # [t]
    dx = dx.astype(jnp.bfloat16)
    plgpu.commit_smem()  # every warp's products have read dCB and dy
    put(at.dCB, dCB)

    plgpu.barrier_wait(refs.S_ready)
    pl.when(odd)(lambda: _state_between(refs, 1 - slot, wg))
    at = gradient.operands(refs, slot, wg)
    dy = gradient.load_float32(at.dy_smem)
    from_start = jnp.exp2(total(decay.g_j))
    put(at.dy, split(dy * over_columns(from_start, dy.shape), 1))
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.operands_ready)
    through = jnp.exp2(total(decay.g_end))
    carried = jnp.sum(join(at.S) * dS, axis=1) * through  # [P]
    CS, dS = matmul(
        ((CHUNK, size.P), *every_product(at.C, transpose(at.S))),  # [i, P]
        (dS * through, *every_product(transpose(at.dy), at.C)),  # [P, N]
    )
    read = jnp.sum(CS * dy, axis=1) * from_start
    da += gradient.through_state(refs, wg, decay, to_end, of_weight, read, carried)

    plgpu.barrier_wait(refs.operands_ready)
    sums = gradient.sum_over_heads(size, refs, slot, wg)
    plgpu.barrier_arrive(refs.operands_read)
    plgpu.barrier_wait(refs.operands_read)
    at = gradient.operands(refs, slot, wg)  # results leave from the places of operands
    at.dCB[0][...] = dx
    put(at.dS, split(dS, 1))
    gradient.put_sums(size, slot, sums)
    rows_smem = refs.rows_smem.at[wg]
    rows_smem[0], rows_smem[1] = ddt, da
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.done)
    plgpu.copy_smem_to_gmem(at.dCB[0], refs.dx_gmem.at[place.row, tokens(m), head])
    plgpu.copy_smem_to_gmem(rows_smem, refs.rows_gmem.at[place.row, head, m])
    return dS, dD


def _state_between(refs, slot, wg):
    """Puts the state an odd chunk starts from in place of what the chunk before starts from."""
    plgpu.barrier_wait(refs.ready.at[slot])
    at = gradient.operands(refs, slot, wg)
    g, dt = decays(refs.g_smem, slot, wg, load_columns), load_columns(refs.dt_smem.at[slot, wg])
    g_end = decay_to_end(refs.g_smem, slot, wg)
    kept = weighed(at.x, jnp.exp2(difference(g_end, g)) * dt, at.B)
    (S,) = matmul((join(at.S) * jnp.exp2(total(g_end)), *kept))  # [P, N]
    put(terms_of(refs.S_terms_smem.at[wg]), split(S, 1))
