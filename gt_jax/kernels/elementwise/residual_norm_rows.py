"""How kernels of whole tokens divide their work: norms of the residual stream and of branches.

A block of the grid walks tokens that lie as far apart as all blocks together are long. A row of its
threads (pallas/rows.py) holds all channels of a token, reads them once, and reads the next token
while it computes this one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import row_numbers, rows, warps
from gt_jax.kernels.pallas.launch import MULTIPROCESSORS, kernel, loop

_VECTOR = 4  # neighbouring channels of a thread: 16 bytes of float32


class Tuning(NamedTuple):
    """The most channels that a thread should hold, and the most blocks of the grid."""

    channels: int
    blocks: int


# By direction and whether a gate joins two branches.
TUNING = {
    ("forward", False): Tuning(24, 5 * MULTIPROCESSORS),
    ("forward", True): Tuning(12, 4 * MULTIPROCESSORS),
    ("backward", False): Tuning(12, 4 * MULTIPROCESSORS),
    ("backward", True): Tuning(12, 2 * MULTIPROCESSORS),
}
_MOST_CHANNELS = {False: 24, True: 16}  # of a thread, which has 255 registers


class Grid(NamedTuple):
    """How tokens and channels are divided among rows of threads."""

    row: rows.Row
    sections: int  # parts of a token that a row reads at once
    blocks: int
    steps: int  # tokens that a row walks
    tokens: int
    models: int

    @property
    def ragged(self) -> bool:
        """Whether rows walk beyond the last token."""
        return self.steps * self.blocks * self.row.number != self.tokens


class Token(NamedTuple):
    """A token that a row of threads walks."""

    at: tuple  # its index in arrays [models, tokens, ...]
    exists: jax.Array | None  # whether it does, or None for sure; else the last one is in its place
    turn: jax.Array  # alternates between 0 and 1 from token to token


def row_for(width: int, gated: bool, most: int) -> rows.Row | None:
    """The shortest row whose threads hold at most `most` channels if that can be; None if no row
    holds a token of this width."""
    choices = [rows.Row(lanes, _VECTOR) for lanes in (8, 16, 32, 64, 128)]
    choices = [row for row in choices if width % row.channels == 0]
    short = [row for row in choices if width // row.lanes <= most]
    possible = [row for row in choices if width // row.lanes <= _MOST_CHANNELS[gated]]
    return (short or possible[-1:] or [None])[0]


def unsupported(width: int, gated: bool) -> str | None:
    """Why the kernels do not take tokens of this width, or None."""
    if row_for(width, gated, _MOST_CHANNELS[gated]):
        return None
    return f"the fused residual norm is not for {width} channels"


def grid_for(x: jax.Array, direction: str, gated: bool) -> Grid:
    """Of a call for x [models, ..., D]; the other arguments are the key of TUNING."""
    models, *tokens, width = x.shape
    tokens = math.prod(tokens)
    tuning = TUNING[direction, gated]
    row = row_for(width, gated, tuning.channels)
    assert row is not None, unsupported(width, gated)
    blocks = min(pl.cdiv(tokens, row.number), tuning.blocks)
    steps = pl.cdiv(tokens, blocks * row.number)
    return Grid(row, width // row.channels, blocks, steps, tokens, models)


def sigmoid_of_scalar(z):
    """1 / (1 + exp(-z)) of a float32 scalar of a row."""
    return 1 / (1 + jnp.exp2(z * -1.4426950408889634))  # log2(e)


def plus(sums, values):
    """The sum of each with its value."""
    return tuple(x + y for x, y in zip(sums, values, strict=True))


def wide(sections):
    return [z.astype(jnp.float32) for z in sections]


class Tokens:
    """What a row of threads does to its tokens, forward and backward."""

    def __init__(self, refs, grid):
        self.refs, self.grid, self.row = refs, grid, grid.row
        self.columns = [jnp.int32(n * grid.row.channels) for n in range(grid.sections)]
        self.width = grid.sections * grid.row.channels
        self.first = lax.axis_index("tokens") * grid.row.number + rows.own_row(grid.row)
        self.model = lax.axis_index("models")

    def walk(self, read: Callable, compute: Callable):
        """compute(token, *read(token)) for all tokens of the row.

        `read` runs for the next token before this one is computed.
        """

        def each(token, sums, *values):
            compute(token, *values)
            return sums

        self._walk(read, each, ())

    def walk_and_sum(self, read: Callable, compute: Callable, summed: int):
        """Like `walk`, with sums over tokens, which `run` returns.

        Args:
            read: function of a Token.
            compute: function of a Token, sums and what `read` gave; it returns the next sums. A
                token that does not exist must add zeros.
            summed: channels of all sums.
        """
        zeros = tuple(rows.zeros(self.row) for _ in range(summed // self.row.channels))
        self._store_sums(self._walk(read, compute, zeros))

    def _walk(self, read, compute, sums):
        def step(n, carry):
            values, sums = carry
            following = read(self._token(jnp.minimum(n + 1, self.grid.steps - 1)))
            return following, compute(self._token(n), sums, *values)

        first = read(self._token(jnp.int32(0)))
        return loop(self.grid.steps, step, (first, sums))[1]

    def _token(self, n):
        """The token that the row takes at step n."""
        token, exists = self.first + n * (self.grid.blocks * self.row.number), None
        if self.grid.ragged:
            token, exists = jnp.minimum(token, self.grid.tokens - 1), token < self.grid.tokens
        return Token((self.model, token), exists, lax.rem(n, jnp.int32(2)))

    def read(self, ref, token, first=0, or_zeros=False):
        """A token's sections from column `first` on, or a None for a reference that is None.

        `or_zeros`: zeros where there is no token, which then adds nothing to any sum.
        """
        if ref is None:
            return None
        keep = token.exists if or_zeros else None
        load = lambda c: rows.load(ref, token.at, c + first, self.row, keep)
        return tuple(load(c) for c in self.columns)

    def store(self, ref, token, section, value, first=0):
        """Writes one section of a token, from column `first` on, in the dtype of ref."""
        column = self.columns[section] + first
        rows.store(ref, token.at, column, value.astype(ref.dtype), self.row, token.exists)

    def store_number(self, ref, token, value):
        """Writes [models, tokens], one float32 number of the token."""
        row_numbers.store(ref, token.at, value, token.exists)

    def parameter(self, ref, first=0):
        """Sections of a vector of the model, from column `first` on."""
        load = lambda c: rows.load(ref, (self.model,), c + first, self.row)
        return [load(c) for c in self.columns]

    def existing(self, number, token):
        """A number of the token in all channels of a section, or zeros where there is no token."""
        spread = rows.zeros(self.row) + number
        return spread if token.exists is None else rows.masked(spread, token.exists)

    def _store_sums(self, sums):
        """Writes sums over the tokens of a block of what its rows have summed, side by side."""
        row, scratch = self.row, self.refs.sums
        own, block = rows.own_row(row), lax.axis_index("tokens")
        columns = [jnp.int32(i * row.channels) for i in range(len(sums))]
        for c, z in zip(columns, sums):
            rows.store(scratch, (own,), c, z, row)
        warps.sync()
        for c in columns:
            total = rows.zeros(row)
            for i in range(row.number):
                total += rows.load(scratch, (jnp.int32(i),), c, row)
            rows.store(self.refs.sums_gmem, (self.model, block), c, total, row, own == 0)


def run(
    grid: Grid,
    body: Callable,
    name: str,
    inputs: dict,
    outputs: dict,
    scratch: dict,
    summed: int = 0,
) -> list[jax.Array]:
    """The outputs of a kernel; see launch.kernel.

    Args:
        grid: of the call.
        body: function of the references.
        name: of the kernel.
        inputs: arrays or None. The kernel sees those of [M, B, T, D] as [M, B T, D].
        outputs: name -> jax.ShapeDtypeStruct or None, likewise.
        scratch: of the kernel.
        summed: as of `Tokens.walk_and_sum`, if it is called; the last result is then the sums over
            the tokens of each block, [M, blocks, summed] float32.
    """
    flat = lambda shape: (shape[0], grid.tokens, shape[-1]) if len(shape) == 4 else shape
    seen = lambda z: None if z is None else jax.ShapeDtypeStruct(flat(z.shape), z.dtype)
    sums = jax.ShapeDtypeStruct((grid.models, grid.blocks, summed), jnp.float32)
    results = kernel(
        body,
        name=name,
        inputs={key: None if z is None else z.reshape(flat(z.shape)) for key, z in inputs.items()},
        outputs={key: seen(z) for key, z in outputs.items()} | {"sums": sums if summed else None},
        scratch={"sums": plgpu.SMEM((grid.row.number, summed), jnp.float32) if summed else None}
        | scratch,
        grid={"models": grid.models, "tokens": grid.blocks},
        threads=1,
    )
    shapes = [z.shape for z in outputs.values() if z is not None]
    return [*(z.reshape(shape) for z, shape in zip(results, shapes)), *results[len(shapes) :]]
