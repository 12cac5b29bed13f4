"""What both gradient kernels of SSD do alike: copies, the walk over chunks, masks, and sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas.launch import (
    CHUNK,
    claim_registers,
    divide,
    loop,
    release_registers,
)
from gt_jax.kernels.pallas.products import matmul
from gt_jax.kernels.pallas.terms import difference, put, split, terms_of, transpose
from gt_jax.kernels.pallas.tiles import (
    full,
    iota,
    load,
    load_columns,
    load_from_gmem,
    load_rows,
    over_columns,
    over_rows,
    tokens,
)
from gt_jax.kernels.ssd.hopper_chains import (
    SUMS,
    Chains,
    Place,
    add_in_turn,
    by_columns,
    semaphores,
)
from gt_jax.kernels.ssd.hopper_decays import decay_to_end, decays
from gt_jax.kernels.ssd.hopper_sizes import SQUARE, Sizes

ROWS = ("ddt", "da")  # gradients of the step size and of the log decay


class Operands(NamedTuple):
    """Shared memory of a chunk and a head: x and dy as they arrived, and terms of operands."""

    x_smem: Any
    dy_smem: Any
    x: tuple
    dy: tuple
    B: tuple
    C: tuple
    S: tuple
    dS: tuple
    dCB: tuple


class Decays(NamedTuple):
    """Decays of a chunk and a head, of the tokens j of rows and i of columns."""

    g_j: list  # terms of [j]
    g_end: list  # terms of a number
    dt: jax.Array  # [j]
    L: jax.Array  # [j, i]: what passes from j to i >= j, else 0


def output_types(size: Sizes, chains: Chains, inputs: dict, *, of_start: bool) -> dict:
    """Types of the results of a gradient kernel."""
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {
        "dx": like(inputs["x"]),
        "sums": f32(size.batch, len(SUMS), size.chunks * CHUNK, chains.number, size.N),
        "rows": f32(*inputs["dt"].shape[:3], len(ROWS), CHUNK),
        "dD": f32(size.batch, size.heads, CHUNK),
        "dfirst": f32(size.batch, size.heads, size.P, size.N) if of_start else None,
    }


def copy(size: Sizes, chains: Chains, refs, place: Place, *, state_of, store_dx=None):
    """Copies chunks in, from the last to the first, and adds what a chunk sends out.

    Args:
        size, chains, refs, place: of the block.
        state_of: function of a chunk, the index of the saved state it needs.
        store_dx: function of (m, slot) that copies dx of chunk m out, if this warpgroup shall.
    """
    last, stages = size.chunks - 1, size.tuning.backward_stages
    row, head0 = place.row, place.head0
    release_registers()
    turns = semaphores(size, chains)

    def fetch(k, _=None):
        m, slot = last - k, lax.rem(k, jnp.int32(stages))
        ready = refs.ready.at[slot]
        for gmem, smem in ((refs.B_gmem, refs.B_smem), (refs.C_gmem, refs.C_smem)):
            plgpu.copy_gmem_to_smem(gmem.at[row, tokens(m), place.group], smem.at[slot], ready)
        for h in range(size.heads_per_block):
            head = head0 + h
            for gmem, smem in ((refs.x_gmem, refs.x_smem), (refs.dy_gmem, refs.dy_smem)):
                plgpu.copy_gmem_to_smem(gmem.at[row, tokens(m), head], smem.at[slot, h], ready)
            for term in range(size.terms):
                g = refs.g_gmem.at[row, head, m, term]
                plgpu.copy_gmem_to_smem(g, refs.g_smem.at[slot, h, term], ready)
            plgpu.copy_gmem_to_smem(refs.dt_gmem.at[row, head, m], refs.dt_smem.at[slot, h], ready)

    def fetch_states(k):
        n = state_of(last - k)
        for h in range(size.heads_per_block):
            state = refs.states_gmem.at[row, head0 + h, n]
            plgpu.copy_gmem_to_smem(state, refs.S_smem.at[h], refs.S_ready)

    def step(k, _):
        m, slot = last - k, lax.rem(k, jnp.int32(stages))
        plgpu.barrier_wait(refs.done)
        pl.when(k < last)(lambda: fetch_states(k + 1))
        if store_dx is not None:
            store_dx(m, slot)
        add_in_turn(size, chains, turns, refs, place, m, slot)
        pl.when(k + stages <= last)(lambda: fetch(k + stages))

    loop(min(stages, size.chunks), fetch, None)
    fetch_states(jnp.int32(0))
    loop(size.chunks, step, None)


def walk(size: Sizes, refs, place: Place, wg: int, make_step):
    """Walks the chunks of one head with dS [P, N] and the terms of dD [C] in registers.

    Args:
        size, refs, place: of the block.
        wg: number of the warpgroup; a plain one, as addresses known when compiling save registers.
        make_step: function of (head, D) giving the step (k, (dS, dD)) -> (dS, dD).
    """
    claim_registers()
    head = place.head0 + wg
    D = refs.D_gmem[divide(place.row, size.batch // refs.D_gmem.shape[0])[0], head]
    refs.zero_smem[wg] = jnp.int32(0)
    if wg == 0:
        t, j = iota(SQUARE, 0), iota(SQUARE, 1)
        refs.before_smem[0] = (j < t).astype(jnp.bfloat16)
        plgpu.commit_smem()
    plgpu.barrier_arrive(refs.operands_read)
    plgpu.barrier_wait(refs.operands_read)
    if refs.dlast_gmem is None:
        dS = full((size.P, size.N), 0, jnp.float32)
    else:
        dS = load_from_gmem(refs.dlast_gmem.at[place.row, head])
    put(terms_of(refs.dS_smem.at[wg]), split(dS, size.terms))
    plgpu.commit_smem()
    dD = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    dS, dD = loop(size.chunks, make_step(head, D), (dS, dD))
    if refs.dfirst_gmem is not None:
        refs.dfirst_gmem[place.row, head] = dS
    refs.dD_gmem[place.row, head] = dD
    plgpu.wait_smem_to_gmem(0)


def zero(refs, wg):
    """0, read from memory: an address it is added to is computed where it is used, not once before
    the loop to occupy registers that the loop needs."""
    return refs.zero_smem[wg]


def operands(refs, slot, wg) -> Operands:
    """Tiles of a chunk and a head."""
    z = zero(refs, wg)
    of_head = (refs.x_smem, refs.dy_smem, refs.x_terms_smem, refs.dy_terms_smem)
    x_smem, dy_smem, *own = (ref.at[slot + z, wg + z] for ref in of_head)
    of_group = (ref.at[slot + z] for ref in (refs.B_terms_smem, refs.C_terms_smem))
    of_states = (ref.at[wg + z] for ref in (refs.S_terms_smem, refs.dS_smem, refs.dCB_smem))
    return Operands(x_smem, dy_smem, *map(terms_of, (*own, *of_group, *of_states)))


def load_float32(ref):
    """A tile from shared memory as float32."""
    return load(ref).astype(jnp.float32)


def load_decays(refs, slot, wg) -> Decays:
    """Decays of a chunk and a head."""
    g_j = decays(refs.g_smem, slot, wg, load_rows)
    dt = load_rows(refs.dt_smem.at[slot, wg])
    g_i = decays(refs.g_smem, slot, wg, load_columns)
    g_end = decay_to_end(refs.g_smem, slot, wg)
    passed = difference(
        [over_rows(z, SQUARE) for z in g_i], [over_columns(z, SQUARE) for z in g_j]
    )  # [j, i]
    L = not_before(refs, wg, jnp.exp2(jnp.minimum(passed, 0.0)))
    return Decays(g_j, g_end, dt, L)


def not_before(refs, wg, z):
    """z [j, i] where i >= j, else 0; a mask from iotas would hold registers."""
    before = load_float32(refs.before_smem.at[zero(refs, wg)])
    return z - z * before


def sum_before(refs, wg, z):
    """For matmul: at [t, i] the sum of z [j, i] over j < t."""
    return SQUARE, (refs.before_smem.at[zero(refs, wg)], z)


def through_state(refs, wg, decay: Decays, to_end, of_weight, read, carried):
    """What reaches the log decay of each token t by way of the state, [t].

    a_t decays what is read at i >= t, what was kept from j < t, and all that the state carries; the
    terms of the latter may stand with either, as every one of them is counted once.

    Args:
        refs, wg, decay: of the warpgroup.
        to_end: [j] decay from a token to the chunk's end.
        of_weight: [j] gradient of what the state keeps of a token, over x.
        read: [i] of what a token reads.
        carried: [P] terms of what the state carries.
    """
    rows_smem = refs.rows_smem.at[wg]
    rows_smem[0] = read + carried
    rows_smem[1] = of_weight * to_end * decay.dt + carried
    plgpu.commit_smem()
    read, kept = (over_rows(load_columns(rows_smem.at[n]), SQUARE) for n in (0, 1))
    before = load_float32(refs.before_smem.at[zero(refs, wg)])
    return jnp.sum(read - before * read + before * kept, axis=1)


def sum_over_heads(size: Sizes, refs, slot, wg):
    """dC or dB of the block's heads, in float32 with the tiles they leave from.

    The first warpgroup sums dC, the last one dB, of operands that both have put there.
    """
    W = size.heads_per_block
    sums, z = [], zero(refs, wg)
    B, C = (terms_of(ref.at[slot + z]) for ref in (refs.B_terms_smem, refs.C_terms_smem))
    of_chunk = lambda ref: [terms_of(ref.at[slot + z, h]) for h in range(W)]
    of_head = lambda ref: [terms_of(ref.at[h + z]) for h in range(W)]
    if wg == 0:
        pairs = [*zip(of_chunk(refs.dy_terms_smem), of_head(refs.S_terms_smem))]
        pairs += [(transpose(dCB), B) for dCB in of_head(refs.dCB_smem)]
        sums.append((*matmul(((CHUNK, size.N), *pairs)), refs.dC_smems))
    if wg == W - 1:
        pairs = [*zip(of_chunk(refs.x_terms_smem), of_head(refs.dS_smem))]
        pairs += [(dCB, C) for dCB in of_head(refs.dCB_smem)]
        sums.append((*matmul(((CHUNK, size.N), *pairs)), refs.dB_smems))
    return sums


def put_sums(size: Sizes, slot, sums):
    """Writes what sum_over_heads gave to its tiles."""
    for value, smems in sums:
        for smem, columns in by_columns(size, smems):
            smem[slot] = value[:, columns]
