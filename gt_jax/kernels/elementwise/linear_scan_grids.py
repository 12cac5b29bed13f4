"""How kernels of linear scans divide channels and tokens among blocks; see linear_scan_rows.py."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from gt_jax.kernels.pallas import clusters, row_folds, rows, warps
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.splits import LEAST_CHUNKS, choose_splits

_VECTOR = 4  # neighbouring channels of a thread: 16 bytes
_SPAN = 8  # most tokens of a row in a tile
_WARPGROUPS = 2  # most of a block: a multiprocessor then holds one, with 255 registers a thread
_LEAST_TILES = 2  # of a split
INTERPRETED = 4  # rows of a block in the interpreter

# Of blocks in clusters
_LANES = 8, 4  # threads of a row: 64 bytes of bfloat16, or the 32 that memory is read by
_CLUSTERED = 4  # warpgroups: a multiprocessor holds one block, with 128 registers a thread
ROOM = 208 * 1024  # bytes for copies of tiles, of a block's 227 KiB


class Grid(NamedTuple):
    """How a call's channels and tokens are divided."""

    row: rows.Row
    warpgroups: int  # of a block
    span: int  # tokens of a row in a tile
    tiles: int  # of a split
    splits: int  # of a sequence
    slabs: int  # of a token's channels
    length: int  # tokens of a sequence
    cluster: int = 1  # blocks that walk a split together, each its part of a tile
    copied: bool = False  # whether tiles are read ahead as linear_scan_copies.py does it

    @property
    def number(self) -> int:
        """Rows of a block."""
        return INTERPRETED if interpreting() else self.warpgroups * self.row.number

    @property
    def group(self) -> int:
        """Rows of a group: those of a warp."""
        return 2 if interpreting() else row_folds.of_warp(self.row)

    @property
    def groups(self) -> int:
        """Of a block."""
        return self.number // self.group

    @property
    def walked(self) -> int:
        """Tokens of a split; the last may have fewer."""
        return self.tiles * self.cluster * self.number * self.span


def grid_of_gradient(batch: int, length: int, channels: int, read: int) -> Grid:
    """How a gradient is divided on the GPU that is there: in clusters where they fill it.

    Args:
        batch, length, channels: of the arrays; channels is a multiple of 4.
        read: bytes of a token's inputs for each channel.
    """
    grid = clustered(batch, length, channels, read) if clusters.available() else None
    return grid or single_blocks(batch, length, channels)


def grid_of_states(batch: int, length: int, channels: int, read: int) -> Grid:
    """The same of a forward walk: in clusters where one tile is all of it, or single blocks are
    faster."""
    grid = grid_of_gradient(batch, length, channels, read)
    return grid if grid.tiles == 1 and grid.copied else single_blocks(batch, length, channels)


def _running() -> int:
    """Blocks that run at a time: one a multiprocessor."""
    return pl.cdiv(warps.blocks_at_once(), warps.BLOCKS_AT_ONCE)


def clustered(batch: int, length: int, channels: int, read: int) -> Grid | None:
    """Clusters that run all at a time, of blocks whose slabs are wide and whose tiles are copied
    ahead.

    With fewer channels a block reads a part of what memory gives it, and others read it again; yet
    clusters of two blocks are faster than those of four with twice the channels. None where half of
    the multiprocessors or more would have nothing to do, and where a row would have one token.
    """
    lanes = [n for n in _LANES if channels % (n * _VECTOR) == 0]
    if not lanes:
        return None
    widest, *narrower = (_clusters_of(n, batch, length, channels) for n in lanes)
    if widest is None:
        return None
    smaller = (grid for grid in narrower if grid and 1 < grid.cluster < widest.cluster)
    grid = next(smaller, widest)
    of_token = 128 * _CLUSTERED * _VECTOR * read  # bytes, for a token of each row
    spans = [n for n in (2, 4, 8) if n * of_token <= ROOM]
    whole = (n for n in spans if grid._replace(span=n).walked >= length)
    two = (n for n in spans[::-1] if 2 * n * of_token <= ROOM)
    grid = grid._replace(span=next(whole, next(two, 1)))
    return grid._replace(tiles=pl.cdiv(length, grid.walked))


def _clusters_of(lanes, batch, length, channels):
    """The largest clusters of such rows that run all at a time, if they fill half of the GPU."""
    row, running = rows.Row(lanes, _VECTOR), _running()
    grid = Grid(row, _CLUSTERED, 1, 1, 1, channels // row.channels, length, copied=True)
    blocks = batch * grid.slabs
    fits = lambda n: n * blocks <= running and 2 * n * grid.number <= length
    cluster = max(filter(fits, clusters.SIZES), default=0)
    return grid._replace(cluster=cluster) if 2 * cluster * blocks > running else None


def single_blocks(batch: int, length: int, channels: int) -> Grid:
    """Slabs as wide as give no multiprocessor a quarter more to do than narrower ones, 32 bytes of
    float32 or more where that can be; splits of a sequence where blocks are too few nevertheless.
    """
    running = _running()
    rows_of = [rows.Row(n, _VECTOR) for n in (32, 16, 8, 4, 2) if channels % (n * _VECTOR) == 0]
    rows_of = rows_of or [rows.Row(1, _VECTOR)]
    most = [  # channels of a multiprocessor
        row.channels * pl.cdiv(batch * channels // row.channels, running) for row in rows_of
    ]
    row = next(row for row, n in zip(rows_of, most) if n <= 1.25 * min(most))
    grid = Grid(row, 1, 1, 1, 1, channels // row.channels, length)
    while grid.span < _SPAN and grid.walked < length:
        grid = grid._replace(span=2 * grid.span)
    full = lambda grid: batch * grid.slabs * grid.warpgroups >= _WARPGROUPS * running
    while grid.warpgroups < _WARPGROUPS and grid.walked < length and not full(grid):
        grid = grid._replace(warpgroups=2 * grid.warpgroups)
    tiles = pl.cdiv(length, grid.walked)
    chunks = tiles * LEAST_CHUNKS // _LEAST_TILES
    tiles = pl.cdiv(tiles, choose_splits(batch * grid.slabs, chunks, running=running))
    grid = grid._replace(tiles=tiles)
    return grid._replace(splits=pl.cdiv(length, grid.walked))
