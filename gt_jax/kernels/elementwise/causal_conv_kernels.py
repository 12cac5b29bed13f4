"""The Pallas kernels of causal_conv.py, forward and backward.

A row of threads (pallas/rows.py) walks SPAN tokens with a block of channels: forward in time, with
the three tokens before in registers, and backward in time for the gradient, which reads

    d xBC_t = sum over d = 0..3 of weight_{3-d} g_{t+d},   g = d y * silu'(conv)

so that the last three g are in registers. Threads sum the gradients of their channels' weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.elementwise.causal_conv_sizes import WIDTH, Sizes
from gt_jax.kernels.pallas import row_functions, rows, warps
from gt_jax.kernels.pallas.launch import kernel, loop, lowered_once

_TAPS = WIDTH - 1  # tokens before


class Tuning(NamedTuple):
    """Channels of a thread, tokens that a row walks, tokens that it reads at once (4 or more)."""

    forward: tuple[int, int, int] = (4, 32, 4)
    backward: tuple[int, int, int] = (8, 64, 4)


TUNING = Tuning()


class Grid(NamedTuple):
    """How tokens and channels are divided among rows of threads."""

    row: rows.Row
    span: int  # tokens that a row walks
    group: int  # tokens that it reads at once
    per_sequence: int  # rows that share a sequence
    blocks: int  # along the tokens


def grid_for(sizes: Sizes, batch: int, length: int, tuning: tuple[int, int, int]) -> Grid:
    """The longest spans that fit.

    Raises:
        NotImplementedError: none does.
    """
    vector, span, group = tuning
    row = rows.widest_row(vector, sizes.inner, sizes.state)
    while row is not None and span >= group:
        if length % span == 0 and batch * length // span % row.number == 0:
            return Grid(row, span, group, length // span, batch * length // span // row.number)
        span //= 2
    raise NotImplementedError(
        f"the fused convolution cannot divide {batch} x {length} tokens of {sizes} among threads"
    )


def unsupported(sizes: Sizes, batch: int, length: int) -> str | None:
    """Why the kernels do not take these sizes, or None."""
    try:
        for tuning in TUNING:
            grid_for(sizes, batch, length, tuning)
    except NotImplementedError as reason:
        return str(reason)
    return None


@lowered_once("sizes")
def forward(projected: jax.Array, taps: jax.Array, seen: jax.Array | None, *, sizes: Sizes):
    """silu(conv(xBC)) as values [M, B, T, inner], B and C [M, B, T, state].

    Args:
        projected: [M, B, T, width] of M models.
        taps: [M, 5, channels] float32.
        seen: [M, B, T] int32 or None.
        sizes: the columns.
    """
    models, batch, length, width = projected.shape
    grid = grid_for(sizes, batch, length, TUNING.forward)
    row, span, group = grid.row, grid.span, grid.group

    def body(refs):
        m, number, column, first = _place(grid)
        weights = _weights(refs, m, column, row)
        x = lambda token, keep=None: rows.load(
            refs.x_gmem, (m, token), sizes.inner + column, row, keep
        )
        begin = number * span
        before = [x(jnp.maximum(begin + n - _TAPS, 0), ~first) for n in range(_TAPS)]
        outputs = _beside(sizes, refs.values_gmem, refs.B_gmem, refs.C_gmem)

        def read(n):
            n = jnp.minimum(n, span // group - 1)
            return tuple(x(begin + n * group + j) for j in range(group))

        def step(n, carry):
            before, here = carry
            at = begin + n * group
            following = read(n + 1)  # arrives while this group is computed
            window = [*before, *here]
            for j in range(group):
                marks = None if refs.seen_gmem is None else refs.seen_gmem[m, at + j]
                y = _convolve(weights, window[j : j + WIDTH], marks)
                y = (y * row_functions.sigmoid(y)).astype(jnp.bfloat16)
                rows.store(outputs, (m, at + j), column, y, row)
            return tuple(window[group:]), following

        loop(span // group, step, (tuple(before), read(jnp.int32(0))))

    tokens = batch * length
    array = lambda width: jax.ShapeDtypeStruct((models, tokens, width), projected.dtype)
    results = kernel(
        body,
        name="causal_conv_forward",
        inputs={
            "x": projected.reshape(models, tokens, width),
            "taps": taps,
            "seen": None if seen is None else seen.reshape(models, tokens),
        },
        outputs={
            "values": array(sizes.inner),
            "B": array(sizes.state),
            "C": array(sizes.state),
        },
        scratch={},
        grid=_axes(models, grid, sizes),
        threads=1,
    )
    return [z.reshape(models, batch, length, -1) for z in results]


@lowered_once("sizes")
def backward(
    projected: jax.Array,
    taps: jax.Array,
    seen: jax.Array | None,
    d_projected: jax.Array,
    d_values: jax.Array,
    dB: jax.Array,
    dC: jax.Array,
    *,
    sizes: Sizes,
):
    """d_projected [M, B, T, width] with the columns of xBC filled in, and of the taps
    [M, blocks, 5, channels] float32, to be summed over the blocks.

    Args:
        projected, taps, seen, sizes: as of `forward`.
        d_projected: as projected; only the columns of z have to be valid.
        d_values, dB, dC: as the results of `forward`.
    """
    models, batch, length, _ = projected.shape
    grid = grid_for(sizes, batch, length, TUNING.backward)
    row, span, group = grid.row, grid.span, grid.group
    tokens = batch * length
    flat = lambda z: z.reshape(models, tokens, -1)

    def body(refs):
        m, number, column, first = _place(grid)
        last = lax.rem(number, jnp.int32(grid.per_sequence)) == grid.per_sequence - 1
        weights = _weights(refs, m, column, row)
        x = lambda token, keep=None: rows.load(
            refs.x_gmem, (m, token), sizes.inner + column, row, keep
        )
        outputs = _beside(sizes, refs.d_values_gmem, refs.dB_gmem, refs.dC_gmem)
        dy = lambda token, keep=None: rows.load(outputs, (m, token), column, row, keep)
        marks = lambda token: None if refs.seen_gmem is None else refs.seen_gmem[m, token]
        begin, end = number * span, (number + 1) * span

        def slope(window, seen, dy):
            """g of the window's last token."""
            y = _convolve(weights, window, seen)
            share = row_functions.sigmoid(y)
            return dy.astype(jnp.float32) * (share * (1 + y * (1 - share)))

        # The next row's first tokens; this row's last stand before them.
        beyond = [jnp.minimum(end + n, tokens - 1) for n in range(_TAPS)]
        window = [x(end - _TAPS + n) for n in range(_TAPS)]
        after = window  # x of the tokens before those of which g is known
        window = [*window, *(x(token, ~last) for token in beyond)]
        known, known_seen = [], []
        for n, token in enumerate(beyond):
            known_seen.append(marks(token))
            known.append(slope(window[n : n + WIDTH], known_seen[-1], dy(token, ~last)))

        def read(n):
            """x of the three tokens before a group, those of its own that `after` lacks, and dy."""
            n = jnp.maximum(n, 0)
            at = begin + n * group
            inside = ~first | (n > 0)
            xs = [x(jnp.maximum(at - _TAPS + j, 0), inside) for j in range(_TAPS)]
            xs += [x(at + j) for j in range(group - _TAPS)]
            return tuple(xs), tuple(dy(at + j) for j in range(group))

        def step(n, carry):
            (xs, dys), after, known, known_seen, sums = carry
            n = span // group - 1 - n
            at = begin + n * group
            following = read(n - 1)  # arrives while this group is computed
            window = [*xs, *after]  # the tokens at - 3 ... at + group - 1
            known, known_seen, sums = list(known), list(known_seen), list(sums)
            for j in reversed(range(group)):
                seen = marks(at + j)
                seeing = window[j : j + WIDTH]
                g = slope(seeing, seen, dys[j])
                known, known_seen = [g, *known], [seen, *known_seen]
                for i, z in enumerate(_as_seen(seeing, seen)):
                    sums[i] += z.astype(jnp.float32) * g
                sums[WIDTH] += g
                dx = weights[_TAPS] * g
                for d in range(1, WIDTH):
                    z = known[d] if seen is None else rows.masked(known[d], known_seen[d] >= d)
                    dx += weights[_TAPS - d] * z
                dx = dx.astype(jnp.bfloat16)
                rows.store(refs.d_gmem, (m, at + j), sizes.inner + column, dx, row)
                known, known_seen = known[:_TAPS], known_seen[:_TAPS]
            carry = window[:_TAPS], known, known_seen, sums
            return following, *(tuple(z) for z in carry)

        start = tuple(rows.zeros(row) for _ in range(WIDTH + 1))
        carry = read(jnp.int32(span // group - 1)), tuple(after), tuple(known)
        carry = (*carry, tuple(known_seen), start)
        *_, sums = loop(span // group, step, carry)
        _write_sums(refs, grid, m, column, sums)

    channels = sizes.channels
    d_taps, rest = kernel(
        body,
        name="causal_conv_backward",
        inputs={
            "x": flat(projected),
            "taps": taps,
            "seen": None if seen is None else seen.reshape(models, tokens),
            "d_values": flat(d_values),
            "dB": flat(dB),
            "dC": flat(dC),
        },
        updates={"d": flat(d_projected)},
        outputs={
            "sums": jax.ShapeDtypeStruct((models, grid.blocks, WIDTH + 1, channels), jnp.float32)
        },
        scratch={
            "sums": plgpu.SMEM((WIDTH + 1, grid.row.number, row.channels), jnp.float32),
        },
        grid=_axes(models, grid, sizes),
        threads=1,
    )
    return rest.reshape(projected.shape), d_taps


def _axes(models, grid, sizes):
    columns = sizes.channels // (grid.row.channels)
    return {"models": models, "tokens": grid.blocks, "columns": columns}


def _place(grid):
    """Of a row of threads: model, number among all rows, first channel, and whether it walks the
    first tokens of a sequence."""
    m, block, column = (lax.axis_index(name) for name in ("models", "tokens", "columns"))
    number = block * grid.row.number + rows.own_row(grid.row)
    first = lax.rem(number, jnp.int32(grid.per_sequence)) == 0
    return m, number, column * (grid.row.channels), first


def _weights(refs, m, column, row):
    return [rows.load(refs.taps_gmem, (m, jnp.int32(i)), column, row) for i in range(WIDTH + 1)]


def _beside(sizes, values, B, C):
    return [(values, 0), (B, sizes.inner), (C, sizes.inner + sizes.state)]


def _as_seen(window, seen):
    """The four tokens that a token reads, zeros for those of another document."""
    if seen is None:
        return window
    before = [rows.masked(x, seen >= _TAPS - i) for i, x in enumerate(window[:-1])]
    return [*before, window[-1]]


def _convolve(weights, window, seen):
    *weights, y = weights
    for x, weight in zip(_as_seen(window, seen), weights, strict=True):
        y = y + x.astype(jnp.float32) * weight
    return y


def _write_sums(refs, grid, m, column, sums):
    """Adds what the rows of a block have summed and writes it."""
    own, block = rows.own_row(grid.row), lax.axis_index("tokens")
    zero = jnp.int32(0)
    for i, z in enumerate(sums):
        rows.store(refs.sums, (jnp.int32(i), own), zero, z, grid.row)
    warps.sync()
    for begin in range(0, len(sums), grid.row.number):
        i = begin + own
        at = jnp.minimum(i, len(sums) - 1)
        total = rows.zeros(grid.row)
        for n in range(grid.row.number):
            total += rows.load(refs.sums, (at, jnp.int32(n)), zero, grid.row)
        target = (m, block, at)
        rows.store(refs.sums_gmem, target, column, total, grid.row, i < len(sums))
