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
from gt_jax.kernels.ssd.portable_states import float16

HALF = 64  # channels of the state that stand together
TERMS = 2  # bfloat16 numbers whose sum a token adds to the state of an odd chunk


def parts(tile):
    """dS in shared memory [P, N] as it lies in global memory: by 64 channels."""
    return [tile.at[:, n : n + HALF] for n in range(0, tile.shape[1], HALF)]


def places_of_end(refs, size, b, h, m):
    """Where dS at the end of chunk m lies, by 64 channels; see `ends`."""
    pair, second = divide(m, 2)
    first = refs.dx_gmem.at[b, tiles.tokens(m), h]
    columns = pl.ds(pl.multiple_of(second * HALF, HALF), HALF)
    return [first] if size.N == HALF else [first, refs.states_gmem.at[b, h, pair, :, columns]]


@lowered_once("size")
def ends(
    size: Sizes,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    g: jax.Array,
    dt: jax.Array,
    states: jax.Array,
    scales: jax.Array,
    dy: jax.Array,
    dstate: jax.Array | None,
    read: jax.Array,
) -> list[jax.Array]:
    """Walks the chunks of a head from the last to the first, two at a time.

    dS at the end of chunk m takes no memory of its own. Of its N channels the first 64 stand where
    dx of the chunk and head will be, the others in the place of the saved states.

    Args:
        size: the call's Sizes; an even number of chunks.
        x, dy: [B, T, H, P]; B, C: [B, T, G, N], bfloat16.
        g: [B, H, chunks, 1, CHUNK] sums of log2 decays in the chunk.
        dt: [B, H, chunks, CHUNK] step sizes.
        states, scales: of the states that even chunks start from, as `forward` saved them.
        dstate: [B, H, P, N] float32, of the final state; None for zeros.
        read: not used; it comes from the last kernel that needs `states`, overwritten here.

    Returns:
        The gradient of the log decay that a chunk carries through, over rows of the state
        [B, H, chunks, P]; dS before the first chunk, as `dstate`; of dS at the end of every chunk
        the first 64 channels as x, with the rows of the state in the place of tokens, and the other
        ones of chunk m as `states`, [B, H, m / 2, P, 64 (m % 2) to 64 (m % 2 + 1)].
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

        def pass_through(m, slot, dS, S, decay, from_start):
            """dS before chunk m, which starts from S; decays of the whole chunk and to tokens."""
            refs.carried_gmem.at[b, h, m][...] = decay * jnp.sum(S * dS, axis=1)
            warps.sync_warp()
            refs.out[...] = dS.astype(bf16)
            warps.sync_warp()  # S, whose place this may be, is in registers
            for part, target in zip(parts(refs.out), places_of_end(refs, size, b, h, m)):
                copies.copy_out(part, target)
            return add_weighed(dS * decay, refs.dy.at[slot], from_start, refs.C.at[slot], terms=1)

        def step(back, dS):
            pair = size.chunks // 2 - 1 - back
            even, odd = 2 * pair, 2 * pair + 1
            S = tiles.load_from_gmem(refs.states_gmem.at[b, h, pair])
            scale = tiles.over_columns(warps.load_rows(refs.scales_gmem.at[b, h, pair]), (P, N))
            copies.arrived()
            warps.sync()
            start(even, 0)
            g = [tiles.load_columns(refs.g.at[slot]) for slot in range(2)]
            g_end = [refs.g[slot, CHUNK - 1] for slot in range(2)]
            decay = [jnp.exp2(z) for z in g_end]
            weight = jnp.exp2(g_end[0] - g[0]) * tiles.load_columns(refs.dt)
            S_odd = float16(S).astype(jnp.float32) * scale * decay[0]
            S_odd = add_weighed(S_odd, refs.x, weight, refs.B, terms=TERMS)
            dS = pass_through(odd, 1, dS, S_odd, decay[1], jnp.exp2(g[1]))
            copies.arrived()
            warps.sync()
            pl.when(pair > 0)(lambda: start_odd(odd - 2))
            S = float16(S).astype(jnp.float32) * scale
            return pass_through(even, 0, dS, S, decay[0], jnp.exp2(g[0]))

        start_odd(jnp.int32(size.chunks - 1))
        if dstate is None:
            dS = tiles.full((size.P, size.N), 0, jnp.float32)
        else:
            dS = tiles.load_from_gmem(refs.dlast_gmem.at[b, h])
        refs.dfirst_gmem.at[b, h][...] = loop(size.chunks // 2, step, dS)

    return kernel(
        body,
        name="ssd_portable_ends",
        inputs={
            "x": x,
            "B": B,
            "C": C,
            "g": g,
            "dt": dt,
            "scales": scales,
            "dy": dy,
            "dlast": dstate,
            "read": read,
        },
        updates={"states": states},
        outputs={
            "carried": jax.ShapeDtypeStruct((*dt.shape[:3], P), jnp.float32),
            "dfirst": jax.ShapeDtypeStruct((size.batch, size.heads, size.P, size.N), jnp.float32),
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
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
