"""Gradient kernel of SSD for float32; the formulas are in hopper_backward.py.

Operands of products are sums of two bfloat16 terms, so a block owns one head, and shared memory
holds one chunk; the state of every chunk was saved, in float32. C B^T, dy x^T and what is summed
over the rectangle have three terms, as the gradient of the log decay, one number a token, may be
small beside its terms.
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
    input_tiles,
    input_tiles_in_place,
    put,
    split,
    split_in_place,
    total,
    transpose,
)
from gt_jax.kernels.pallas.tiles import load, over_columns, overlay, tile, tokens
from gt_jax.kernels.ssd import hopper_gradients as gradient
from gt_jax.kernels.ssd.hopper_chains import chains_of, place_of_block
from gt_jax.kernels.ssd.hopper_sizes import SQUARE, Sizes


def gradients(size: Sizes, inputs: dict, *, of_start: bool) -> list[jax.Array]:
    """Results of hopper_backward.backward, of inputs by name, in float32."""
    P, N = size.P, size.N
    chains = chains_of(size)
    x, x_terms = input_tiles(2, 1, 1, CHUNK, P)
    third = tile(1, CHUNK, N)  # third terms of B and C, before others need the place
    return kernel(
        functools.partial(_body, size, chains),
        name="ssd_backward_float32",
        inputs=inputs,
        outputs=gradient.output_types(size, chains, inputs, of_start=of_start),
        scratch={
            "B_and_dB_smem": input_tiles_in_place(2, 1, CHUNK, N),
            "C_and_dC_smem": input_tiles_in_place(2, 1, CHUNK, N),
            "S_ready": plgpu.Barrier(num_arrivals=1),
            "S_smem": input_tiles_in_place(2, 1, P, N),
            "before_smem": tile(1, *SQUARE),
            "dCB_smem": overlay(tile(1, 2, *SQUARE), third),
            "dS_smem": tile(1, 2, P, N),
            "done": plgpu.Barrier(num_arrivals=1),
            "dt_smem": plgpu.SMEM((1, 1, CHUNK), jnp.float32),
            "dy_smem": input_tiles(2, 1, 1, CHUNK, P),
            "g_smem": plgpu.SMEM((1, 1, 2, CHUNK), jnp.float32),
            "operands_read": plgpu.Barrier(num_arrivals=1),
            "operands_ready": plgpu.Barrier(num_arrivals=1),
            "ready": plgpu.Barrier(num_arrivals=7, num_barriers=1),
            "rows_smem": plgpu.SMEM((1, len(gradient.ROWS), CHUNK), jnp.float32),
            "x_smem": (x, overlay(x_terms, third)),
            "zero_smem": plgpu.SMEM((1,), jnp.int32),
        },
        grid={"block": size.batch * size.blocks},
        threads=2,
    )


def _body(size, chains, refs):
    (refs.x_smem, x_terms), (refs.dy_smem, refs.dy_terms_smem) = refs.x_smem, refs.dy_smem
    refs.x_terms_smem, refs.B_third_smem = x_terms
    refs.dCB_smem, refs.C_third_smem = refs.dCB_smem
    refs.B_smem, refs.B_terms_smem = refs.B_and_dB_smem
    refs.C_smem, refs.C_terms_smem = refs.C_and_dC_smem
    refs.S_smem, refs.S_terms_smem = refs.S_smem
    refs.dB_smems, refs.dC_smems = (refs.B_smem,), (refs.C_smem,)
    place = place_of_block(size, chains)
    wg = lax.axis_index("wg")
    make_step = functools.partial(_make_step, size, refs, place)
    pl.when(wg == 1)(lambda: _copy(size, chains, refs, place))
    pl.when(wg == 0)(lambda: gradient.walk(size, refs, place, 0, make_step))


def _copy(size, chains, refs, place):
    def store_dx(m, slot):
        target = refs.dx_gmem.at[place.row, tokens(m), place.head0]
        plgpu.copy_smem_to_gmem(refs.x_smem.at[slot, 0], target)

    gradient.copy(size, chains, refs, place, state_of=lambda m: m, store_dx=store_dx)


def _make_step(size, refs, place, head, D):
    return functools.partial(_step, size, refs, place, head, D)


def _step(size, refs, place, head, D, k, carry):
    """One chunk: from dS of the state after it to dS of the state before it; adds to dD."""
    dS, dD = carry
    wg = 0
    m, slot = size.chunks - 1 - k, lax.rem(k, jnp.int32(1))
    at = gradient.operands(refs, slot, wg)
    plgpu.barrier_wait(refs.ready.at[slot])
    in_three = functools.partial(_in_three, refs, slot, wg)
    BC = _split_and_multiply(
        refs.B_smem.at[slot], refs.C_smem.at[slot], lambda: in_three()[:2]
    )  # [j, i]
    dM = _split_and_multiply(at.x_smem, at.dy_smem, lambda: in_three()[2:])  # [j, i]
    decay = gradient.load_decays(refs, slot, wg)
    dt_j = over_columns(decay.dt, SQUARE)
    M = split(decay.L * BC * dt_j)
    dM *= decay.L
    dCB = split(dM * dt_j)
    of_dt = dM * BC  # [j, i]
    ddt = jnp.sum(of_dt, axis=1)  # [j]
    at = gradient.operands(refs, slot, wg)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results left; all warps are here
    of_dt_terms = *at.dCB, at.x[0]  # dCB and x need these places later
    put(of_dt_terms, split(of_dt * dt_j, 3))

    plgpu.commit_smem()
    kept, between = matmul(
        ((CHUNK, size.P), (at.B, transpose(at.dS))),  # [j, P]
        gradient.sum_before(refs, wg, of_dt_terms),  # [t, i]
    )
    da = jnp.sum(gradient.not_before(refs, wg, between), axis=1)  # [t]
    plgpu.commit_smem()  # every warp's products have read of_dt_terms
    put(at.dCB, dCB)  # which leaves the registers
    at = gradient.operands(refs, slot, wg)
    dy, x = gradient.load_float32(at.dy_smem), gradient.load_float32(at.x_smem)  # [C, P]
    to_end = jnp.exp2(difference(decay.g_end, decay.g_j))
    of_weight = jnp.sum(kept * x, axis=1)
    ddt += of_weight * to_end
    dD += jnp.sum(dy * x, axis=1)
    weight = over_columns(to_end * decay.dt, x.shape)
    put(at.x, split(x * weight))
    plgpu.commit_smem()
    at.x_smem[...] = kept * weight + dy * D  # dx leaves from there
    (at.x_smem[...],) = matmul((at.x_smem, (M, at.dy)))  # [j, P]
    plgpu.commit_smem()  # every warp's products have read dy

    plgpu.barrier_wait(refs.S_ready)
    at = gradient.operands(refs, slot, wg)
    S = split_in_place(refs.S_smem.at[wg], at.S)  # [P, N]
    dy = gradient.load_float32(at.dy_smem)
    from_start = jnp.exp2(total(decay.g_j))
    put(at.dy, split(dy * over_columns(from_start, dy.shape)))
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.operands_ready)
    through = jnp.exp2(total(decay.g_end))
    carried = jnp.sum(S * dS, axis=1) * through  # [P]
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
    put(at.dS, split(dS))
    gradient.put_sums(size, slot, sums)
    rows_smem = refs.rows_smem.at[wg]
    rows_smem[0], rows_smem[1] = ddt, da
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.done)
    plgpu.copy_smem_to_gmem(rows_smem, refs.rows_gmem.at[place.row, head, m])
    return dS, dD


def _in_three(refs, slot, wg):
    """Places of three terms of B, C, x and dy; until dM, x and dCB spare the third."""
    at, z = gradient.operands(refs, slot, wg), gradient.zero(refs, wg)
    thirds = refs.B_third_smem.at[z], refs.C_third_smem.at[z], *at.dCB
    return [(*two, third) for two, third in zip((at.B, at.C, at.x, at.dy), thirds)]


def _split_and_multiply(a, b, places):
    """a b^T of float32 tiles, of which places() are the places of three terms."""
    for z, refs in zip((a, b), places()):
        z = load(z)
        plgpu.commit_smem()  # every warp has read it: its terms may take its place
        put(refs, split(z, 3))
    plgpu.commit_smem()
    a, b = places()
    (product,) = matmul((SQUARE, (a[2], b[0].T), (a[0], b[2].T)))
    a, b = places()  # in one go the addresses alone would fill the registers
    (product,) = matmul((product, *every_product(a[:2], transpose(b[:2]))))
    return product
