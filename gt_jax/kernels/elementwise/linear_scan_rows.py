"""How the kernels of linear scans divide their work, and what a row of threads does.

A block of the grid owns a few channels of a sequence, or of a split of it, and walks its tokens in
tiles. Each row of its threads (pallas/rows.py) takes the next `span` tokens of a tile and computes

    e_t = decay_t e_{t-1} + x_t from e = 0,   p = the product of their decays

all rows at a time. A row starts from p s + e, folded over the rows before it, and computes its
tokens again from there: s. The threads hold decay and x meanwhile. Folding takes two steps, over
the rows of a group and over the groups before, of about the square root of the rows each.

In the interpreter the rows of a block are the threads of the kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import rows, warps
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import divide, kernel
from gt_jax.kernels.pallas.splits import LEAST_CHUNKS, choose_splits

_VECTOR = 4  # neighbouring channels of a thread: 16 bytes
_SPAN = 8  # most tokens of a row in a tile
_LEAST_TILES = 4  # of a split
_INTERPRETED = 4  # rows of a block in the interpreter


class Grid(NamedTuple):
    """How a call's channels and tokens are divided."""

    row: rows.Row
    span: int  # tokens of a row in a tile
    tiles: int  # of a split
    splits: int  # of a sequence
    slabs: int  # of a token's channels
    length: int  # tokens of a sequence

    @property
    def number(self) -> int:
        """Rows of a block."""
        return _INTERPRETED if interpreting() else self.row.number

    @property
    def group(self) -> int:
        """Rows of a group."""
        return 2 ** (self.number.bit_length() // 2)

    @property
    def walked(self) -> int:
        """Tokens of a split; the last may have fewer."""
        return self.tiles * self.number * self.span


def grid_for(batch: int, length: int, channels: int) -> Grid:
    """Slabs as wide as leave enough blocks to fill the GPU, 32 bytes or more where that can be;
    splits of a sequence where blocks are too few nevertheless.

    Args:
        batch, length, channels: of the arrays; channels is a multiple of 4.
    """
    running = warps.blocks_at_once()
    rows_of = [rows.Row(n, _VECTOR) for n in (32, 16, 8, 4, 2) if channels % (n * _VECTOR) == 0]
    rows_of = rows_of or [rows.Row(1, _VECTOR)]
    filling = [row for row in rows_of if batch * channels // row.channels >= running]
    row = (filling or rows_of[-1:])[0]
    grid = Grid(row, 1, 1, 1, channels // row.channels, length)
    while grid.span < _SPAN and grid.walked < length:
        grid = grid._replace(span=2 * grid.span)
    tiles = pl.cdiv(length, grid.walked)
    chunks = tiles * LEAST_CHUNKS // _LEAST_TILES
    tiles = pl.cdiv(tiles, choose_splits(batch * grid.slabs, chunks, running=running))
    grid = grid._replace(tiles=tiles)
    return grid._replace(splits=pl.cdiv(length, grid.walked))


class Place:
    """What a row of threads works on, and how it does what all kernels do."""

    def __init__(self, grid, refs, reverse):
        self.grid, self.refs, self.reverse = grid, refs, reverse
        block, slab = divide(lax.axis_index("blocks"), grid.slabs)
        self.sequence, self.split = divide(block, grid.splits)
        self.column = slab * grid.row.channels
        self.channels = grid.slabs * grid.row.channels  # of a token
        self.own = lax.axis_index("wg") if interpreting() else rows.own_row(grid.row)

    def start(self):
        """The state before the split's first tile."""
        return rows.load(
            self.refs.states_gmem, (self.sequence, self.split), self.column, self.grid.row
        )

    def tokens(self, n):
        """Of tile n the row's tokens in the order of the walk, each with whether it exists, or None
        for sure."""
        grid = self.grid
        tokens = []
        for j in range(grid.span):
            token = (n * grid.number + self.own) * grid.span + j
            token = grid.walked - 1 - token if self.reverse else token
            token, inside = token + self.split * grid.walked, None
            if grid.length % grid.walked:
                token, inside = jnp.minimum(token, grid.length - 1), token < grid.length
            tokens.append((token, inside))
        return tokens

    def read(self, n, terms):
        """`tokens` of tile n, their decays and their x, by terms(place, token) -> (decay, x)."""
        tokens = self.tokens(n)
        return tokens, *zip(*(terms(self, token) for token in tokens))

    def states_earlier(self, tokens, before):
        """s of the token before each of `tokens`, of a walk from the end; `before` the first."""
        refs = self.refs
        load = lambda token, inside: self.load(refs.s_gmem, (token, inside)).astype(jnp.float32)
        earlier = [load(token - 1, inside) for token, inside in tokens[:-1]]
        token, inside = tokens[-1]  # the only one that may be the first of all
        later = token > 0 if inside is None else inside & (token > 0)
        s = load(jnp.maximum(token - 1, 0), later)
        return [*earlier, s + rows.masked(before, token == 0)]

    def load(self, ref, token, offset=0):
        """The row's channels of a token, from column `offset` of the array on."""
        token, inside = token
        return rows.load(ref, (self.sequence, token), self.column + offset, self.grid.row, inside)

    def store(self, ref, token, value, offset=0):
        """Writes what `load` would read."""
        token, inside = token
        at = self.sequence, token
        rows.store(ref, at, self.column + offset, value, self.grid.row, inside)

    def store_of_split(self, ref, value):
        """Writes [B, splits, C], of which all rows hold the same."""
        at = self.sequence, self.split
        rows.store(ref, at, self.column, value, self.grid.row, self.own == 0)

    def store_of_row(self, ref, value):
        """Writes [B, splits, rows, C], sums over the tokens of this row of threads."""
        rows.store(ref, (self.sequence, self.split, self.own), self.column, value, self.grid.row)

    def of_sequence(self, ref):
        """The row's channels of [B, C]."""
        return rows.load(ref, (self.sequence,), self.column, self.grid.row)

    def kept(self, token, x):
        """x, or zeros where the token starts a segment."""
        resets = self.refs.resets_gmem
        return x if resets is None else rows.masked(x, resets[self.sequence, token[0]] == 0)

    def existing(self, token, decay, x):
        """Decay and x of the token, ones and zeros where there is none: the state stays."""
        inside = token[1]
        if inside is None:
            return decay, x
        return rows.masked(decay, inside, 1), rows.masked(x, inside)

    def fold(self, decays, xs, carry):
        """The state before the row's tokens and that after the tile, from `carry` before it; and
        the product of the tile's decays."""
        refs, grid, own = self.refs, self.grid, self.own
        product, end = decays[0], decays[0] * xs[0] if self.reverse else xs[0]
        for decay, x in zip(decays[1:], xs[1:]):
            end = decay * (x + end) if self.reverse else decay * end + x
            product = product * decay
        self._put(refs.products, refs.ends, own, product, end)
        self._sync()
        first = own - lax.rem(own, jnp.int32(grid.group))
        kept, before = rows.zeros(grid.row) + 1, rows.zeros(grid.row)  # by rows of the group
        for n in range(grid.group - 1):
            p, e = self._taken(refs.products, refs.ends, first + n, first + n < own)
            kept, before = p * kept, p * before + e
        last = own == first + (grid.group - 1)
        group, _ = divide(own, grid.group)
        product, end = product * kept, product * before + end
        self._put(refs.group_products, refs.group_ends, group, product, end, last)
        self._sync()
        state, total = carry, rows.zeros(grid.row) + 1
        for n in range(grid.number // grid.group):
            p, e = self._taken(refs.group_products, refs.group_ends, jnp.int32(n), n < group)
            state = p * state + e
            p, e = self._taken(refs.group_products, refs.group_ends, jnp.int32(n), None)
            carry, total = p * carry + e, p * total
        return kept * state + before, carry, total

    def _put(self, products, ends, at, product, end, keep=None):
        for ref, z in ((products, product), (ends, end)):
            rows.store(ref, (at,), jnp.int32(0), z, self.grid.row, keep)

    def _taken(self, products, ends, at, keep):
        """Product and end of a row or group, or 1 and 0 where not `keep`."""
        p, e = (rows.load(ref, (at,), jnp.int32(0), self.grid.row) for ref in (products, ends))
        return (p, e) if keep is None else (rows.masked(p, keep, 1), rows.masked(e, keep))

    def _sync(self):
        """What any row has put is there for all rows behind."""
        if interpreting():
            plgpu.barrier_arrive(self.refs.barrier)
            plgpu.barrier_wait(self.refs.barrier)
        else:
            warps.sync()


def run(
    grid: Grid, body: Callable, name: str, batch: int, inputs: dict, outputs: dict
) -> list[jax.Array]:
    """The outputs of a kernel; see launch.kernel."""
    of_rows = plgpu.SMEM((grid.number, grid.row.channels), jnp.float32)
    of_groups = plgpu.SMEM((grid.number // grid.group, grid.row.channels), jnp.float32)
    interpreted = interpreting()
    return kernel(
        body,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scratch={
            "products": of_rows,
            "ends": of_rows,
            "group_products": of_groups,
            "group_ends": of_groups,
            "barrier": plgpu.Barrier(num_arrivals=_INTERPRETED) if interpreted else None,
        },
        grid={"blocks": batch * grid.splits * grid.slabs},
        threads=_INTERPRETED if interpreted else 1,
    )
