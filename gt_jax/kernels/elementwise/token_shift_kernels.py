"""Pallas kernels of token shifts: the blends, and their gradients by input and by parameter.

With `before` the token before (zero where keep is 0) and d = before - x, output j is

    y_j = x + d s_j,    s_j = mu_j + hidden_j w_j

and so, of cotangents g_j with p_j = g_j d and e = keep sum_j s_j g_j,

    dx_t = sum_j (1 - s_j) g_j + e_{t+1};   dhidden_j = p_j w_j^T;   dw_j = hidden_j^T p_j
    dmu_j = sum_t p_j

Everything is computed once in float32 and rounded at the end; operands of products are bfloat16.
Layouts and the order of channels: token_shift_layout.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.elementwise import token_shift_layout as layout
from gt_jax.kernels.elementwise.token_shift_layout import GROUP
from gt_jax.kernels.pallas import copies, tiles, warps
from gt_jax.kernels.pallas.launch import CHUNK, divide, kernel, loop, lowered_once

SLAB = 64  # channels a block of the grid works on at once: a cache line of bfloat16


class Tuning(NamedTuple):
    """How the work is cut."""

    forward_tiles: int = 2  # of 64 tokens, that a block of the grid walks at most
    sums_blocks: int = 264  # of the grid, that sum over tokens: two for each multiprocessor
    sums_tiles: int = 2  # of 64 tokens, that one of them walks at least


TUNING = Tuning()


def _divisor(n, most):
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _load_pair(refs, first, columns):
    """The tile of tokens from `first`, and of the tokens before."""
    x = layout.load(refs.x_gmem.at[pl.ds(first, CHUNK), columns])
    return x, layout.load_before(refs.x_gmem, first, columns)


def _difference(refs, first, x, before):
    """x and before - x in float32."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    keep = layout.load_rows(refs.keep_gmem.at[pl.ds(first, CHUNK)], x.shape[1])
    return x, before * keep - x


def _prefetch(refs, tokens, columns, n):
    """Asks for what a later step reads: that comes from the second-level cache then."""
    for name in ("x", *(f"g{j}" for j in range(n))):
        copies.prefetch(getattr(refs, f"{name}_gmem").at[tokens, columns])


def _hidden(refs, first, j, rank):
    """hidden_j as a left operand."""
    columns = pl.ds(j * rank, rank)
    return layout.left(layout.load(refs.hidden_gmem.at[pl.ds(first, CHUNK), columns]))


def _share(refs, j, hidden, columns, of_slab, rank):
    """s_j, a float32 tile."""
    share = layout.in_every_row(layout.load_columns(refs.mu_gmem.at[j, columns]))
    w = refs.w.at[pl.ds(j * rank, rank), of_slab]
    return share + layout.from_product(warps.dot(warps.zeros(CHUNK, columns.size), hidden, w))


def _inputs(x, keep, mu, hidden, w):
    return {"x": x, "keep": keep, "mu": mu, "hidden": hidden, "w": w}


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
    walked = _divisor(N // CHUNK, tuning.forward_tiles)

    def body(refs):
        first = lax.axis_index("tokens") * (walked * CHUNK)
        slab = lax.axis_index("slabs")
        layout.copy_in(refs.w_gmem.at[:, pl.ds(slab * SLAB, SLAB)], refs.w)
        warps.sync()

        def step(i, carry):
            at = first + i * CHUNK
            tokens = pl.ds(at, CHUNK)
            # All loads come first: none may pass a store, which could be to the same place.
            hidden = [_hidden(refs, at, j, rank) for j in range(n)]
            halves = [pl.ds(slab * SLAB + start, GROUP) for start in range(0, SLAB, GROUP)]
            loaded = [_load_pair(refs, at, columns) for columns in halves]
            for half, (columns, pair) in enumerate(zip(halves, loaded)):
                x, d = _difference(refs, at, *pair)
                of_slab = pl.ds(half * GROUP, GROUP)
                for j in range(n):
                    y = x + d * _share(refs, j, hidden[j], columns, of_slab, rank)
                    to = getattr(refs, f"y{j}_gmem").at[tokens, columns]
                    layout.store(to, y.astype(jnp.bfloat16))
            return carry

        loop(walked, step, jnp.int32(0))

    return kernel(
        body,
        name="token_shift",
        inputs=_inputs(x, keep, mu, hidden, w),
        outputs={f"y{j}": jax.ShapeDtypeStruct(x.shape, x.dtype) for j in range(n)},
        scratch={"w": layout.matrix(n * rank, SLAB)},
        grid={"tokens": N // (walked * CHUNK), "slabs": D // SLAB},
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

    def body(refs):
        tile = lax.axis_index("tokens")
        first = tile * CHUNK
        tokens = pl.ds(first, CHUNK)
        # The last token's next one is in another tile.
        refs.e[pl.ds(CHUNK, 8)] = jnp.zeros((8, SLAB), f32)

        def step(slab, dhidden):
            dhidden = list(dhidden)
            warps.sync()  # all have read what the step before wrote
            layout.copy_in(refs.w_gmem.at[:, pl.ds(slab * SLAB, SLAB)], refs.w)
            warps.sync()
            following = jnp.minimum(slab + 1, D // SLAB - 1)
            _prefetch(refs, tokens, pl.ds(following * SLAB, SLAB), n)
            own = []
            for start in range(0, SLAB, GROUP):
                of_slab = pl.ds(start, GROUP)
                columns = pl.ds(slab * SLAB + start, GROUP)
                _, d = _difference(refs, first, *_load_pair(refs, first, columns))
                total, e = layout.zeros(GROUP), layout.zeros(GROUP)
                at = tokens, columns
                cotangents = [layout.load(getattr(refs, f"g{j}_gmem").at[at]) for j in range(n)]
                for j, g in enumerate(cotangents):
                    z = _hidden(refs, first, j, rank)
                    share = _share(refs, j, z, columns, of_slab, rank)
                    g = g.astype(f32)
                    total, e = total + g, e + share * g
                    w = refs.w.at[pl.ds(j * rank, rank), of_slab]
                    p = layout.left((g * d).astype(bf16))
                    dhidden[j] = warps.dot(dhidden[j], p, w.T)
                own.append(total - e)
                keep = layout.load_rows(refs.keep_gmem.at[tokens], GROUP)
                layout.store(refs.e.at[pl.ds(0, CHUNK), of_slab], e * keep)
            warps.sync()
            for start, z in zip(range(0, SLAB, GROUP), own):
                of_slab = pl.ds(start, GROUP)
                columns = pl.ds(slab * SLAB + start, GROUP)
                following = layout.load(refs.e.at[pl.ds(1, CHUNK), of_slab])
                layout.store(refs.dx_gmem.at[tokens, columns], (z + following).astype(bf16))
                edge = layout.load_columns(refs.e.at[0, of_slab])
                layout.store(refs.edges_gmem.at[tile, columns], edge)
            return tuple(dhidden)

        sums = tuple(warps.zeros(CHUNK, rank) for _ in range(n))
        for j, z in enumerate(loop(D // SLAB, step, sums)):
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
        scratch={
            "w": layout.matrix(n * rank, SLAB),
            "e": plgpu.SMEM((CHUNK + 8, SLAB), f32),
        },
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
    count, slabs = N // CHUNK, D // SLAB
    stretches = min(pl.cdiv(tuning.sums_blocks, slabs), pl.cdiv(count, tuning.sums_tiles))

    def body(refs):
        stretch = lax.axis_index("tokens")
        start, _ = divide(stretch * count, stretches)
        end, _ = divide((stretch + 1) * count, stretches)
        columns = pl.ds(lax.axis_index("slabs") * SLAB, SLAB)

        def step(i, sums):
            dmu, dw = map(list, sums)
            at = (start + i) * CHUNK
            tokens = pl.ds(at, CHUNK)
            _, d = _difference(refs, at, *_load_pair(refs, at, columns))
            layout.copy_in(refs.hidden_gmem.at[tokens], refs.hidden)
            for j in range(n):
                g = layout.load(getattr(refs, f"g{j}_gmem").at[tokens, columns])
                refs.p.at[j][...] = (g.astype(f32) * d).astype(bf16)
            warps.sync()
            following = pl.ds(jnp.minimum(start + i + 1, end - 1) * CHUNK, CHUNK)
            _prefetch(refs, following, columns, n)
            for j in range(n):
                p = warps.load_left(refs.p.at[j].T)  # [channels, tokens]
                dmu[j] = layout.row_sums(dmu[j], p)
                dw[j] = warps.dot(dw[j], p, refs.hidden.at[:, pl.ds(j * rank, rank)])
            warps.sync()
            return tuple(dmu), tuple(dw)

        zeros = lambda columns: tuple(warps.zeros(SLAB, columns) for _ in range(n))
        dmu, dw = loop(end - start, step, (zeros(8), zeros(rank)))
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
        scratch={
            "p": tiles.tile(n, CHUNK, SLAB),
            "hidden": layout.matrix(CHUNK, n * rank),
        },
        grid={"tokens": stretches, "slabs": slabs},
        threads=1,
    )
