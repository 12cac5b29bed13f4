"""The Pallas kernels of gated_norm.py: a row of threads (pallas/rows.py) holds all channels of a
token, reads it once and sums over it inside its warp.

With x = y silu(z), r = 1 / sqrt(mean(x^2) + epsilon) and g = d out * scale,

    d x = r g - x r^3 mean(g x),   d scale = sum over tokens of d out * x r
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import row_functions, rows, warps
from gt_jax.kernels.pallas.launch import kernel, loop, lowered_once


class Tuning(NamedTuple):
    """The most channels that a thread should hold, and the most tokens that a row walks."""

    forward: tuple[int, int] = (16, 8)
    backward: tuple[int, int] = (16, 16)


TUNING = Tuning()
_MOST_CHANNELS = 32  # of a thread, which has 255 registers


class Grid(NamedTuple):
    """How tokens and channels are divided among rows of threads."""

    row: rows.Row
    steps: int  # tokens that a row walks
    blocks: int
    sections: int  # parts of a token that a row reads at once


def grid_for(width: int, tokens: int, tuning: tuple[int, int]) -> Grid:
    """The most tokens per row that fit.

    Raises:
        NotImplementedError: a row of threads cannot hold a token.
    """
    most, steps = tuning
    row = _row_for(width, most) or _row_for(width, _MOST_CHANNELS)
    while row is not None and steps:
        blocks, rest = divmod(tokens, steps * row.number)
        if rest == 0:
            return Grid(row, steps, blocks, width // row.channels)
        steps //= 2
    raise NotImplementedError(f"the fused norm is not for {tokens} tokens of {width} channels")


def _row_for(width, most):
    """The shortest row whose threads hold at most `most` channels each, or None."""
    choices = (rows.Row(lanes, vector) for lanes in (8, 16, 32, 64, 128) for vector in (8, 4))
    fits = lambda row: width % row.channels == 0 and width // row.lanes <= most
    return next(filter(fits, choices), None)


def unsupported(width: int, tokens: int) -> str | None:
    """Why the kernels do not take these sizes, or None."""
    try:
        for tuning in TUNING:
            grid_for(width, tokens, tuning)
    except NotImplementedError as reason:
        return str(reason)
    return None


@lowered_once("epsilon")
def forward(y: jax.Array, projected: jax.Array, scale: jax.Array, *, epsilon: float):
    """RMSNorm(y silu(z)) * scale, [M, B, T, E], in a list.

    Args:
        y: [M, B, T, E] of M models.
        projected: [M, B, T, width], z first.
        scale: [M, E] float32.
        epsilon: added to the mean of squares.
    """
    models, tokens, width = _flat(y).shape
    grid = grid_for(width, tokens, TUNING.forward)
    row = grid.row

    def body(refs):
        columns = _columns(grid)
        m, token_of = _place(grid)
        scales = [rows.load(refs.scale_gmem, (m,), c, row) for c in columns]

        def read(n):
            at = (m, token_of(jnp.minimum(n, grid.steps - 1)))
            return _read((refs.y_gmem, refs.z_gmem), at, columns, row)

        def step(n, here):
            following = read(n + 1)  # arrives while this token is computed
            xs = []
            for y, z in zip(*here):
                z = z.astype(jnp.float32)
                xs.append(y.astype(jnp.float32) * (z * row_functions.sigmoid(z)))
            squares = sum((x * x for x in xs), rows.zeros(row))
            (squares,) = rows.sums_over_row([squares], row, refs.sums, lax.rem(n, jnp.int32(2)))
            inverse = lax.rsqrt(squares * (1 / width) + epsilon)
            for c, x, scale in zip(columns, xs, scales):
                out = (x * (inverse * scale)).astype(jnp.bfloat16)
                rows.store(refs.out_gmem, (m, token_of(n)), c, out, row)
            return following

        loop(grid.steps, step, read(jnp.int32(0)))

    (out,) = kernel(
        body,
        name="gated_norm_forward",
        inputs={"y": _flat(y), "z": _flat(projected), "scale": scale},
        outputs={"out": jax.ShapeDtypeStruct((models, tokens, width), y.dtype)},
        scratch={"sums": rows.sums_scratch(1)},
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    return [out.reshape(y.shape)]


@lowered_once("epsilon", "again")
def backward(
    y: jax.Array,
    projected: jax.Array,
    scale: jax.Array,
    d_out: jax.Array,
    *,
    epsilon: float,
    again: bool = False,
):
    """dy as y; d_projected as projected, of which only the columns of z are written; of the scale
    [M, blocks, E] float32, to be summed over the blocks; if `again`, what `forward` gives.

    Args:
        y, projected, scale, epsilon: as of `forward`.
        d_out: as y.
        again: whether to compute the norm again.
    """
    models, tokens, width = _flat(y).shape
    grid = grid_for(width, tokens, TUNING.backward)
    row = grid.row

    def body(refs):
        columns = _columns(grid)
        m, token_of = _place(grid)

        scales = [rows.load(refs.scale_gmem, (m,), c, row) for c in columns]

        def read(n):
            at = (m, token_of(jnp.minimum(n, grid.steps - 1)))
            return _read((refs.d_out_gmem, refs.y_gmem, refs.z_gmem), at, columns, row)

        def step(n, carry):
            here, sums = carry
            at = (m, token_of(n))
            following = read(n + 1)  # arrives while this token is computed
            # Multiplied out again for the second pass, which saves registers.
            wide = lambda i: [z[i].astype(jnp.float32) for z in here]
            squares = along = rows.zeros(row)
            for i, scale in enumerate(scales):
                g, y, z = wide(i)
                x = y * (z * row_functions.sigmoid(z))
                squares += x * x
                along += g * x * scale
            squares, along = rows.sums_over_row(
                [squares, along], row, refs.row_sums, lax.rem(n, jnp.int32(2))
            )
            inverse = lax.rsqrt(squares * (1 / width) + epsilon)
            along *= inverse * inverse * inverse * (1 / width)
            results = []
            for i, c in enumerate(columns):
                g, y, z = wide(i)
                share = row_functions.sigmoid(z)
                silu = z * share
                x, g = y * silu, g * inverse
                if again:
                    out = (x * (inverse * scales[i])).astype(jnp.bfloat16)
                    rows.store(refs.out_gmem, at, c, out, row)
                results.append(sums[i] + g * x)
                dx = g * scales[i] - x * along
                rows.store(refs.dy_gmem, at, c, (dx * silu).astype(jnp.bfloat16), row)
                dz = dx * y * (share * (1 + z * (1 - share)))
                rows.store(refs.d_gmem, at, c, dz.astype(jnp.bfloat16), row)
            return following, tuple(results)

        start = read(jnp.int32(0)), tuple(rows.zeros(row) for _ in columns)
        _, sums = loop(grid.steps, step, start)
        own, block = rows.own_row(row), lax.axis_index("tokens")
        for c, z in zip(columns, sums):
            rows.store(refs.sums, (own,), c, z, row)
        warps.sync()
        for c in columns:
            total = rows.zeros(row)
            for n in range(row.number):
                total += rows.load(refs.sums, (jnp.int32(n),), c, row)
            rows.store(refs.sums_gmem, (m, block), c, total, row, own == 0)

    narrow = jax.ShapeDtypeStruct((models, tokens, width), y.dtype)
    dy, d_projected, sums, *out = kernel(
        body,
        name="gated_norm_backward",
        inputs={
            "y": _flat(y),
            "z": _flat(projected),
            "scale": scale,
            "d_out": _flat(d_out),
        },
        outputs={
            "dy": narrow,
            "d": jax.ShapeDtypeStruct(_flat(projected).shape, projected.dtype),
            "sums": jax.ShapeDtypeStruct((models, grid.blocks, width), jnp.float32),
            "out": narrow if again else None,
        },
        scratch={
            "sums": plgpu.SMEM((row.number, width), jnp.float32),
            "row_sums": rows.sums_scratch(2),
        },
        grid={"models": models, "tokens": grid.blocks},
        threads=1,
    )
    out = [z.reshape(y.shape) for z in out]
    return [dy.reshape(y.shape), d_projected.reshape(projected.shape), sums, *out]


def _flat(z):
    return z.reshape(z.shape[0], -1, z.shape[-1])


def _columns(grid):
    """Where the sections of a token begin."""
    return [jnp.int32(n * grid.row.channels) for n in range(grid.sections)]


def _place(grid):
    """Of a row of threads: the model, and the token it takes at each step."""
    first = lax.axis_index("tokens") * (grid.steps * grid.row.number) + rows.own_row(grid.row)
    return lax.axis_index("models"), lambda n: first + n * grid.row.number


def _read(refs, at, columns, row):
    """A token of every reference, by sections."""
    return tuple(tuple(rows.load(ref, at, c, row) for c in columns) for ref in refs)
