"""First pass of the gradient of the portable SSD kernel; see portable_backward.py."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once
from gt_jax.kernels.ssd.hopper_sizes import Sizes
from gt_jax.kernels.ssd.portable_splits import add_weighed


@lowered_once("size")
def ends(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    states: jax.Array,
    dy: jax.Array,
    dstate: jax.Array,
) -> list[jax.Array]:
    """Walks the chunks of a head from the last to the first, two at a time.

    Args:
        size: the call's Sizes; an even number of chunks.
        x, dy: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        states: [B, H, chunks / 2, P, N] bfloat16, the states that even chunks start from.
        dstate: [B, H, P, N] float32, of the final state.

    Returns:
        dS at the end of every chunk [B, H, chunks, P, N] bfloat16; the states that odd chunks start
        from, as `states`; the gradient of the log decay that a chunk carries through, over rows of
        the state [B, H, chunks, P]; dS before the first chunk, as `dstate`.
    """
    P, N, bf16 = size.P, size.N, jnp.bfloat16

    def body(refs):
        b, h = divide(lax.axis_index("heads"), size.heads)
        group = h // size.heads_per_group

        def start(m, slot):
            at = (b, tiles.tokens(m))
            copies.start_copy(refs.dy_gmem.at[(*at, h)], refs.dy.at[slot])
            copies.start_copy(refs.C_gmem.at[(*at, group)], refs.C.at[slot])

        def start_odd(m):
            """What odd chunk m needs, and of the even one before it what its state follows from."""
            start(m, 1)
            at = (b, tiles.tokens(m - 1))
            copies.start_copy(refs.x_gmem.at[(*at, h)], refs.x)
            copies.start_copy(refs.B_gmem.at[(*at, group)], refs.B)
            copies.start_copy_row(refs.dt_gmem.at[b, h, m - 1], refs.dt)
            for slot in range(2):
                copies.start_copy_row(refs.g_gmem.at[b, h, m - 1 + slot, 0], refs.g.at[slot])

        def put(z, target):
            warps.sync_warp()
            refs.out[...] = z.astype(bf16)
            warps.sync_warp()
            copies.copy_out(refs.out, target)

        def pass_through(m, slot, dS, S, decay, from_start):
            """dS before chunk m, which starts from S; decays of the whole chunk and to tokens."""
            refs.carried_gmem.at[b, h, m][...] = decay * jnp.sum(S * dS, axis=1)
            put(dS, refs.ends_gmem.at[b, h, m])
            return add_weighed(dS * decay, refs.dy.at[slot], from_start, refs.C.at[slot], terms=1)

        def step(back, dS):
            pair = size.chunks // 2 - 1 - back
            even, odd = 2 * pair, 2 * pair + 1
            S = tiles.load_from_gmem(refs.states_gmem.at[b, h, pair])
            copies.arrived()
            warps.sync()
            start(even, 0)
            g = [tiles.load_columns(refs.g.at[slot]) for slot in range(2)]
            g_end = [refs.g[slot, CHUNK - 1] for slot in range(2)]
            decay = [jnp.exp2(z) for z in g_end]
            weight = jnp.exp2(g_end[0] - g[0]) * tiles.load_columns(refs.dt)
            S_odd = S.astype(jnp.float32) * decay[0]
            S_odd = add_weighed(S_odd, refs.x, weight, refs.B, terms=2)
            put(S_odd, refs.odd_gmem.at[b, h, pair])
            dS = pass_through(odd, 1, dS, S_odd, decay[1], jnp.exp2(g[1]))
            copies.arrived()
            warps.sync()
            pl.when(pair > 0)(lambda: start_odd(odd - 2))
            S = S.astype(jnp.float32)
            return pass_through(even, 0, dS, S, decay[0], jnp.exp2(g[0]))

        start_odd(jnp.int32(size.chunks - 1))
        dS = tiles.load_from_gmem(refs.dlast_gmem.at[b, h])
        refs.dfirst_gmem.at[b, h][...] = loop(size.chunks // 2, step, dS)

    shape = (size.batch, size.heads, size.chunks, P, N)
    return kernel(
        body,
        name="ssd_portable_ends",
        inputs={
            "x": x,
            "B": B,
            "C": C,
            "g": g,
            "dt": dt,
            "states": states,
            "dy": dy,
            "dlast": dstate,
        },
        outputs={
            "ends": jax.ShapeDtypeStruct(shape, bf16),
            "odd": jax.ShapeDtypeStruct(states.shape, bf16),
            "carried": jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
            "dfirst": jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
        },
        scratch={
            "dy": tiles.tile(2, CHUNK, P),
            "C": tiles.tile(2, CHUNK, N),
            "out": tiles.tile(P, N),
            "x": tiles.tile(CHUNK, P),
            "B": tiles.tile(CHUNK, N),
            "g": plgpu.SMEM((2, CHUNK), jnp.float32),
            "dt": plgpu.SMEM((CHUNK,), jnp.float32),
        },
        grid={"heads": size.batch * size.heads},
        threads=1,
    )
