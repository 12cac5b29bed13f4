"""Pallas kernels of token shifts: the blends, and their gradients by input and by parameter.

With `before` the token before (zero where keep is 0) and d = before - x, output j is

    y_j = x + d s_j,    s_j = mu_j + hidden_j w_j

and so, of cotangents g_j with p_j = g_j d and e = keep sum_j s_j g_j,

    dx_t = sum_j (1 - s_j) g_j + e_{t+1};   dhidden_j = p_j w_j^T;   dw_j = hidden_j^T p_j
    dmu_j = sum_t p_j

Everything is computed once in float32 and rounded at the end; operands of products are bfloat16.
The blends and the gradients by input walk the channels of 64 tokens, the gradients by parameter the
tokens of 64 channels: each keeps in registers what it sums, and the operands that stay the same.
Layouts and the order of channels: token_shift_layout.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.elementwise import token_shift_layout as layout
from gt_jax.kernels.elementwise.token_shift_copies import Tile, staged, start_copy, walk
from gt_jax.kernels.elementwise.token_shift_layout import GROUP
from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, lowered_once

SLAB = 64  # channels a block of the grid sums over tokens: a cache line of bfloat16
ROWS = 32  # tokens it takes at once: two blocks of a multiprocessor have room for two tiles each


class Tuning(NamedTuple):
    """How the work is cut."""

    forward_blocks: int = 3072  # of the grid, at least, where there are channels enough
    sums_blocks: int = 264  # of the grid, that sum over tokens: two for each multiprocessor
    sums_tiles: int = 4  # of 32 tokens, that one of them walks at least


TUNING = Tuning()


def _inputs(x, keep, mu, hidden, w):
    return {"x": x, "keep": keep, "mu": mu, "hidden": hidden, "w": w}


def _cotangents(refs, n):
    return [getattr(refs, f"g{j}_gmem") for j in range(n)]


def _tiles(n, rank):
    """What a step over channels reads beside the cotangents."""
    return {
        "x": Tile((CHUNK + 1, GROUP)),
        "mu": Tile((n, GROUP), jnp.float32),
        "w": Tile((n * rank, GROUP), width=GROUP),
    }


def _start(refs, first, columns, stage):
    """Starts to copy what `_tiles` names."""
    start_copy(refs.x_gmem, first, columns, refs.x.at[stage], before=True)
    start_copy(refs.mu_gmem, 0, columns, refs.mu.at[stage])
    start_copy(refs.w_gmem, 0, columns, refs.w.at[stage], width=GROUP)


def _hidden(refs, tokens, n, rank):
    """hidden_j for every j, as left operands."""
    parts = [refs.hidden_gmem.at[tokens, pl.ds(j * rank, rank)] for j in range(n)]
    return [layout.left(layout.load(z)) for z in parts]


def _difference(refs, stage, keep):
    """x and before - x in float32."""
    x = layout.as_float32(layout.load(refs.x.at[stage, pl.ds(1, CHUNK)]))
    before = layout.as_float32(layout.load(refs.x.at[stage, pl.ds(0, CHUNK)]))
    return x, before * keep - x


def _matrix(refs, stage, j, rank):
    return refs.w.at[stage, pl.ds(j * rank, rank)]


def _share(refs, stage, j, hidden):
    """s_j, a float32 tile."""
    share = layout.in_every_row(layout.load_columns(refs.mu.at[stage, j]))
    w = _matrix(refs, stage, j, hidden.shape[1])
    return share + layout.from_product(warps.dot(warps.zeros(CHUNK, GROUP), hidden, w))


@lowered_once("tuning")
def blends(
    x: jax.Array,
    keep: jax.Array,
    mu: jax.Array,
    hidden: jax.Array,
    w: jax.Array,
    *,
    tuning: Tuning,
) -> list[jax.Array]:
    """The blends.

    Args:
        x: [N, D] bfloat16, N and D multiples of 64.
        keep: [N] float32: 1, or 0 where the token before is another sequence's.
        mu: [n, D] float32.
        hidden: [N, n rank] bfloat16, rank a multiple of 32.
        w: [n rank, D] bfloat16, each rank and D in the order of products.
        tuning: how the work is cut.

    Returns:
        n arrays [N, D] bfloat16.
    """
    (N, D), n = x.shape, mu.shape[0]
    rank = hidden.shape[1] // n
    groups = D // GROUP
    wanted = pl.cdiv(tuning.forward_blocks, N // CHUNK)
    parts = next(z for z in range(1, groups + 1) if groups % z == 0 and z >= min(wanted, groups))
    stages, scratch = staged(_tiles(n, rank))

    def body(refs):
        first = lax.axis_index("tokens") * CHUNK
        tokens = pl.ds(first, CHUNK)
        of_part = lax.axis_index("parts") * (D // parts)
        columns = lambda i: pl.ds(of_part + i * GROUP, GROUP)
        hidden = _hidden(refs, tokens, n, rank)
        keep = layout.load_rows(refs.keep_gmem.at[tokens], GROUP)

        def start(i, stage):
            _start(refs, first, columns(i), stage)

        def step(i, stage, carry):
            x, d = _difference(refs, stage, keep)
            for j in range(n):
                y = x + d * _share(refs, stage, j, hidden[j])
                to = getattr(refs, f"y{j}_gmem").at[tokens, columns(i)]
                layout.store(to, y.astype(jnp.bfloat16))
            return carry

        walk(stages, groups // parts, start, step, jnp.int32(0))

    return kernel(
        body,
        name="token_shift",
        inputs=_inputs(x, keep, mu, hidden, w),
        outputs={f"y{j}": jax.ShapeDtypeStruct(x.shape, x.dtype) for j in range(n)},
        scratch=scratch,
        grid={"tokens": N // CHUNK, "parts": parts},
        threads=1,
    )


@lowered_once()
def input_gradients(
    x: jax.Array,
    keep: jax.Array,
    mu: jax.Array,
    hidden: jax.Array,
    w: jax.Array,
    cotangents: list[jax.Array],
) -> list[jax.Array]:
    """Gradients by x and hidden; a block of the grid walks the channels of 64 tokens.

    Args:
        x, keep, mu, hidden, w: as of `blends`.
        cotangents: n arrays [N, D] bfloat16.

    Returns:
        dx [N, D] bfloat16, without what e of the next tile adds to a tile's last token; e of each
        tile's first token [N / 64, D] float32; dhidden like hidden.
    """
    (N, D), n = x.shape, mu.shape[0]
    rank = hidden.shape[1] // n
    f32, bf16 = jnp.float32, jnp.bfloat16
    columns = lambda i: pl.ds(i * GROUP, GROUP)
    e = plgpu.SMEM((CHUNK + 8, GROUP), f32)
    tiles_of_step = _tiles(n, rank) | {"g": Tile((n, CHUNK, GROUP))}
    stages, scratch = staged(tiles_of_step, beside=math.prod(e.shape) * 4)

    def body(refs):
        tile = lax.axis_index("tokens")
        first = tile * CHUNK
        tokens = pl.ds(first, CHUNK)
        hidden = _hidden(refs, tokens, n, rank)
        keep = layout.load_rows(refs.keep_gmem.at[tokens], GROUP)
        # The last token's next one is in another tile.
        refs.e[pl.ds(CHUNK, 8)] = jnp.zeros((8, GROUP), f32)

        def start(i, stage):
            _start(refs, first, columns(i), stage)
            for j, g in enumerate(_cotangents(refs, n)):
                start_copy(g, first, columns(i), refs.g.at[stage, j])

        def step(i, stage, dhidden):
            dhidden = list(dhidden)
            _, d = _difference(refs, stage, keep)
            total, e = layout.zeros(GROUP), layout.zeros(GROUP)
            for j in range(n):
                g = layout.as_float32(layout.load(refs.g.at[stage, j]))
                share = _share(refs, stage, j, hidden[j])
                total, e = total + g, e + share * g
                p = layout.left((g * d).astype(bf16))
                dhidden[j] = warps.dot(dhidden[j], p, _matrix(refs, stage, j, rank).T)
            layout.store(refs.e.at[pl.ds(0, CHUNK)], e * keep)
            warps.sync()
            following = layout.load(refs.e.at[pl.ds(1, CHUNK)])
            dx = (total - e + following).astype(bf16)
            layout.store(refs.dx_gmem.at[tokens, columns(i)], dx)
            edge = layout.load_columns(refs.e.at[0])
            layout.store(refs.edges_gmem.at[tile, columns(i)], edge)
            return tuple(dhidden)

        sums = tuple(warps.zeros(CHUNK, rank) for _ in range(n))
        for j, z in enumerate(walk(stages, D // GROUP, start, step, sums)):
            to = refs.dhidden_gmem.at[tokens, pl.ds(j * rank, rank)]
            layout.store(to, layout.from_product(z).astype(bf16))

    return kernel(
        body,
        name="token_shift_input_gradients",
        inputs=_inputs(x, keep, mu, hidden, w) | {f"g{j}": g for j, g in enumerate(cotangents)},
        outputs={
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "edges": jax.ShapeDtypeStruct((N // CHUNK, D), f32),
            "dhidden": jax.ShapeDtypeStruct(hidden.shape, bf16),
        },
        scratch=scratch | {"e": e},
        grid={"tokens": N // CHUNK},
        threads=1,
    )


@lowered_once("tuning")
def parameter_gradients(
    x: jax.Array,
    keep: jax.Array,
    hidden: jax.Array,
    cotangents: list[jax.Array],
    *,
    tuning: Tuning,
) -> list[jax.Array]:
    """Sums over tokens of p_j, and of p_j by hidden_j; a block of the grid owns 64 channels.

    Tiles are read transposed: a thread holds two tokens of a channel, as the products want p.

    Args:
        x, keep, hidden: as of `blends`.
        cotangents: n arrays [N, D] bfloat16.
        tuning: how the work is cut.

    Returns:
        Sums of stretches of tokens, to be added over the first axis: of p, [S, n, D, 8] float32,
        eight times the same; of p by hidden, [S, n, D, rank] float32.
    """
    (N, D), n = x.shape, len(cotangents)
    rank = hidden.shape[1] // n
    f32, bf16 = jnp.float32, jnp.bfloat16
    count, slabs = N // ROWS, D // SLAB
    stretches = min(pl.cdiv(tuning.sums_blocks, slabs), pl.cdiv(count, tuning.sums_tiles))
    tile = lambda *shape: Tile((*shape, ROWS, SLAB), width=SLAB)
    stages, scratch = staged(
        {
            "x": tile(),
            "before": tile(),
            "g": tile(n),
            "hidden": Tile((ROWS, n * rank), width=GROUP),
            "keep": Tile((ROWS,), f32),
        }
    )

    def body(refs):
        stretch = lax.axis_index("tokens")
        beginning, _ = divide(stretch * count, stretches)
        end, _ = divide((stretch + 1) * count, stretches)
        columns = pl.ds(lax.axis_index("slabs") * SLAB, SLAB)
        everything = pl.ds(0, n * rank)

        def start(i, stage):
            at = (beginning + i) * ROWS
            start_copy(refs.x_gmem, at, columns, refs.x.at[stage], width=SLAB)
            start_copy(refs.x_gmem, at, columns, refs.before.at[stage], width=SLAB, before=True)
            start_copy(refs.hidden_gmem, at, everything, refs.hidden.at[stage], width=GROUP)
            copies.start_copy_row(refs.keep_gmem.at[pl.ds(at, ROWS)], refs.keep.at[stage])
            for j, g in enumerate(_cotangents(refs, n)):
                start_copy(g, at, columns, refs.g.at[stage, j], width=SLAB)

        def step(i, stage, sums):
            dmu, dw = map(list, sums)
            # [channels, tokens]
            load = lambda ref: layout.as_float32(tiles.load(ref.T), plgpu.Layout.WGMMA)
            keep = tiles.over_rows(tiles.load_columns(refs.keep.at[stage]), (SLAB, ROWS))
            d = load(refs.before.at[stage]) * keep - load(refs.x.at[stage])
            for j in range(n):
                p = warps.left((load(refs.g.at[stage, j]) * d).astype(bf16))
                dmu[j] = layout.row_sums(dmu[j], p)
                of_rank = refs.hidden.at[stage, :, pl.ds(j * rank, rank)]
                dw[j] = warps.dot(dw[j], p, of_rank)
            return tuple(dmu), tuple(dw)

        zeros = lambda columns: tuple(warps.zeros(SLAB, columns) for _ in range(n))
        sums = zeros(8), zeros(rank)
        dmu, dw = walk(stages, end - beginning, start, step, sums)
        for j in range(n):
            layout.store(refs.dmu_gmem.at[stretch, j, columns], dmu[j])
            layout.store(refs.dw_gmem.at[stretch, j, columns], dw[j])

    return kernel(
        body,
        name="token_shift_parameter_gradients",
        inputs={"x": x, "keep": keep, "hidden": hidden}
        | {f"g{j}": g for j, g in enumerate(cotangents)},
        outputs={
            "dmu": jax.ShapeDtypeStruct((stretches, n, D, 8), f32),
            "dw": jax.ShapeDtypeStruct((stretches, n, D, rank), f32),
        },
        scratch=scratch,
        grid={"tokens": stretches, "slabs": slabs},
        threads=1,
    )
