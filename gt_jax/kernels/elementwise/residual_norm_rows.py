"""What the kernels of a residual stream's norm share: how tokens are divided, what a row reads."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas import rows, warps
from gt_jax.kernels.pallas.launch import MULTIPROCESSORS

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

    @property
    def ragged(self) -> bool:
        """Whether rows walk beyond the last token."""
        return self.steps * self.blocks * self.row.number != self.tokens


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


def grid_for(x, direction, gated):
    _, *tokens, width = x.shape
    tokens = math.prod(tokens)
    tuning = TUNING[direction, gated]
    row = row_for(width, gated, tuning.channels)
    assert row is not None, unsupported(width, gated)
    blocks = min(pl.cdiv(tokens, row.number), tuning.blocks)
    steps = pl.cdiv(tokens, blocks * row.number)
    return Grid(row, width // row.channels, blocks, steps, tokens)


def place(grid):
    """Of a row of threads: the model, the token it takes at each step, and whether there is one."""
    own = lax.axis_index("tokens") * grid.row.number + rows.own_row(grid.row)
    token = lambda n: own + n * (grid.blocks * grid.row.number)
    if not grid.ragged:
        return lax.axis_index("models"), token, lambda n: None
    bounded = lambda n: jnp.minimum(token(n), grid.tokens - 1)
    return lax.axis_index("models"), bounded, lambda n: token(n) < grid.tokens


def _columns(grid):
    """Where the sections of a token begin."""
    return [jnp.int32(n * grid.row.channels) for n in range(grid.sections)]


def sigmoid_of_scalar(z):
    """1 / (1 + exp(-z)) of a float32 scalar of a row."""
    return 1 / (1 + jnp.exp2(z * -1.4426950408889634))  # log2(e)


def flat(z):
    """[M, B, T, D] -> [M, B T, D]; None stays None."""
    return None if z is None else z.reshape(z.shape[0], -1, z.shape[-1])


def wide(sections):
    return [z.astype(jnp.float32) for z in sections]


def store_sums(ref, scratch, grid, model, sums):
    """Writes sums over the tokens of a block, [models, blocks, S], of what its rows have summed.

    Args:
        ref: reference in global memory.
        scratch: shared memory, [rows of a block, S] float32.
        grid: of the call.
        model: of the row.
        sums: values of the row, side by side.
    """
    row = grid.row
    own, block = rows.own_row(row), lax.axis_index("tokens")
    columns = [jnp.int32(i * row.channels) for i in range(len(sums))]
    for c, z in zip(columns, sums):
        rows.store(scratch, (own,), c, z, row)
    warps.sync()
    for c in columns:
        total = rows.zeros(row)
        for i in range(row.number):
            total += rows.load(scratch, (jnp.int32(i),), c, row)
        rows.store(ref, (model, block), c, total, row, own == 0)


class Tokens:
    """What a row of threads does to a token, forward and backward."""

    def __init__(self, refs, grid, model):
        self.refs, self.row, self.model = refs, grid.row, model
        self.columns, self.width = _columns(grid), grid.sections * grid.row.channels

    def read(self, ref, token, keep=None, first=0):
        """A token's sections from column `first` on, or a None for a reference that is None."""
        if ref is None:
            return None
        load = lambda c: rows.load(ref, (self.model, token), c + first, self.row, keep)
        return tuple(load(c) for c in self.columns)

    def parameter(self, ref, first=0):
        """Sections of a vector of the model, from column `first` on."""
        load = lambda c: rows.load(ref, (self.model,), c + first, self.row)
        return [load(c) for c in self.columns]

    def gate(self, a, b, score, turn):
        """g of two branches; kernel_a and kernel_b, or None if the score of g is given."""
        refs = self.refs
        if score is not None:
            return sigmoid_of_scalar(score + refs.bias_gmem[self.model, 0]), None
        kernels = [self.parameter(refs.gate_gmem, n * self.width) for n in (0, 1)]
        score = rows.zeros(self.row)
        for z, weights in zip((a, b), kernels):
            for value, weight in zip(wide(z), weights):
                score += value * weight
        (score,) = rows.sums_over_row([score], self.row, refs.score, turn)
        return sigmoid_of_scalar(score + refs.bias_gmem[self.model, 0]), kernels

    def inverses(self, branches, epsilon, turn, *more):
        """1 / sqrt(mean of squares + epsilon) of each of two branches, and the sums of `more`."""
        squares = [sum((z * z for z in x), rows.zeros(self.row)) for x in branches]
        a, b, *more = rows.sums_over_row([*squares, *more], self.row, self.refs.row_sums, turn)
        return *(lax.rsqrt(z * (1 / self.width) + epsilon) for z in (a, b)), *more

    def stream(self, x, a, b, gate):
        """u."""
        u = wide(x)
        if gate is not None:
            return [x + (gate * a + (1 - gate) * b) for x, a, b in zip(u, wide(a), wide(b))]
        return u if a is None else [x + a for x, a in zip(u, wide(a))]
