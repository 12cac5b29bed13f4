"""Cutting a long sequence of few heads into pieces that a Hopper GPU works on at the same time.

A piece maps the state S it starts from to d S + U, with d its total decay and U what it adds. One
pass over x and B finds the U of all but the last piece, a scan over them the states pieces start
from, and then each piece is a row of a batch of its own. Backward the same, from the end, with dy
and C.

The pass walks towards the end the map is applied from: a chunk's part of U then needs no later
decay, and what was read last, and may still be in the second-level cache, is what the kernel behind
it reads first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels import mosaic
from gt_jax.kernels.chunks import carry_state
from gt_jax.kernels.mosaic import (
    CHUNK,
    difference,
    divide,
    join,
    matmul,
    over_rows,
    parts_of,
    split_in_place,
    tokens,
    total,
    transpose,
)

_STAGES = 4  # chunks in flight


def weighed(x, weight, B):
    """Operands of the products that sum to (weight x)^T B; x and B are parts."""
    z = join(transpose(x))  # [P, C]
    z *= over_rows(weight, z.shape)
    if len(B) == 1:
        return [(part, B) for part in mosaic.cut(z)]
    return [(mosaic.split(z, len(B)), B)]


def piece_states(size, pieces, z, V, g, dt, state, *, reverse=False):
    """State each piece starts from (ends with if reverse), [rows, H, P, N], rows = batch * pieces.

    Args:
        size: Sizes of the pieces as rows.
        z, V: x and B, or dy and C if reverse; [rows, T, ...].
        g: [rows, H, chunks, parts, CHUNK].
        dt: [rows, H, chunks, CHUNK], or None if reverse.
        state: [batch, H, P, N] before the first piece, or the gradient after the last; None is 0.
    """
    if state is None:
        state = jnp.zeros((size.batch // pieces, size.heads, size.P, size.N), jnp.float32)
    decay = jnp.exp2(jnp.sum(g[..., -1], axis=(-2, -1)))  # [rows, H]
    others = slice(1, None) if reverse else slice(-1)  # nothing follows the last piece met
    decay = decay.reshape(-1, pieces, size.heads)[:, others]
    update = _additions(size, pieces, z, V, g, dt, reverse)
    update = update.reshape(-1, pieces - 1, *update.shape[1:])
    states, last = carry_state(
        state, decay.swapaxes(1, 2)[..., None, None], update.swapaxes(1, 2), reverse=reverse
    )
    ends = (last[:, :, None], states) if reverse else (states, last[:, :, None])
    return jnp.concatenate(ends, axis=2).swapaxes(1, 2).reshape(-1, *state.shape[1:])


@mosaic.lowered_once("size", "pieces", "reverse")
def _additions(size, pieces, z, V, g, dt, reverse):
    """What all but the last piece met add to their states, [rows, H, P, N] float32."""
    P, N, W, parts = size.P, size.N, size.heads_per_block, size.parts
    rows = size.batch // pieces * (pieces - 1)

    scalars = (g,) if reverse else (g, dt[:, :, :, None])  # [rows, H, chunks, numbers, CHUNK]
    given, numbers = len(scalars), sum(v.shape[3] for v in scalars)

    def body(z_, V_, *refs):
        scalars_, (U_, z_s, V_s, *scalars_s, ready, consumed) = refs[:given], refs[given:]
        g_s, *dt_s = scalars_s
        z_s, z_split_s = mosaic.whole_and_split(parts, z_s)
        V_s, V_split_s = mosaic.whole_and_split(parts, V_s)
        row, block = divide(lax.axis_index("block"), size.heads // W)
        head0 = block * W
        group = head0 // (size.heads // size.groups)
        wg = lax.axis_index("wg")

        @pl.when(wg == W)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            whole, piece = divide(row, pieces - 1)
            source = whole * pieces + piece + int(reverse)

            def fetch(k, _):
                m = k if reverse else size.chunks - 1 - k
                slot = lax.rem(k, jnp.int32(_STAGES))

                @pl.when(k >= _STAGES)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                there = ready.at[slot]
                plgpu.copy_gmem_to_smem(V_.at[source, tokens(m), group], V_s.at[slot], there)
                for h in range(W):
                    head = head0 + h
                    plgpu.copy_gmem_to_smem(z_.at[source, tokens(m), head], z_s.at[slot, h], there)
                    for v_, v_s in zip(scalars_, scalars_s):
                        for n in range(v_s.shape[2]):
                            vector = v_.at[source, head, m, n]
                            plgpu.copy_gmem_to_smem(vector, v_s.at[slot, h, n], there)

            mosaic.loop(size.chunks, fetch, None)
            for k in range(max(0, size.chunks - _STAGES), size.chunks):
                plgpu.barrier_wait(consumed.at[k % _STAGES])

        def compute(wg):
            plgpu.set_max_registers(240, action="increase")

            def step(k, carry):
                met, U = carry  # log2 decays of the chunks met, summed
                slot = lax.rem(k, jnp.int32(_STAGES))
                z_b, V_b = parts_of(z_split_s.at[slot, wg]), parts_of(V_split_s.at[slot])
                plgpu.barrier_wait(ready.at[slot])
                if parts > 1:
                    split_in_place(z_s.at[slot, wg], z_b)
                    split_in_place(V_s.at[slot], V_b)
                    plgpu.commit_smem()
                g = [mosaic.load_columns(ref) for ref in parts_of(g_s.at[slot, wg])]
                g_end = [g_s[slot, wg, part, CHUNK - 1] for part in range(parts)]
                if reverse:
                    weight = jnp.exp2(total(g) + met)
                else:
                    weight = jnp.exp2(difference(g_end, g) + met)
                    weight *= mosaic.load_columns(dt_s[0].at[slot, wg, 0])
                (U,) = matmul((U, *weighed(z_b, weight, V_b)))
                plgpu.barrier_arrive(consumed.at[slot])
                return met + total(g_end), U

            start = (jnp.float32(0), mosaic.full((P, N), 0, jnp.float32))
            _, U_[row, head0 + wg] = mosaic.loop(size.chunks, step, start)

        for n in range(W):
            pl.when(wg == n)(functools.partial(compute, n))

    return mosaic.kernel(
        body,
        threads=W + 1,
        manual_barriers=True,
        grid=(rows * size.heads // W,),
        grid_names=("block",),
        out_type=jax.ShapeDtypeStruct((rows, size.heads, P, N), jnp.float32),
        scratch_types=(
            mosaic.input_tiles_in_place(parts, _STAGES, W, CHUNK, P),  # z
            mosaic.input_tiles_in_place(parts, _STAGES, CHUNK, N),  # V
            *(plgpu.SMEM((_STAGES, W, v.shape[3], CHUNK), jnp.float32) for v in scalars),
            plgpu.Barrier(num_arrivals=1 + (1 + numbers) * W, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=W, num_barriers=_STAGES),
        ),
    )(z, V, *scalars)
