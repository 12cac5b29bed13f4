"""How kernels of linear scans read ahead: tiles go to shared memory while others are computed.

The assembler puts off loads of the next tile until the tile is computed, or they occupy registers;
copies (pallas/row_copies.py) do neither, and what is computed twice reads its inputs twice.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.elementwise.linear_scan_grids import ROOM
from gt_jax.kernels.pallas import row_copies, rows
from gt_jax.kernels.pallas.launch import loop


def bytes_read(inputs: dict, channels: int) -> int:
    """Bytes of a token's inputs for each channel; see Stash."""
    return sum(parts * size for parts, size in _of_channels(inputs, channels).values())


def parts_of(inputs: dict, channels: int) -> list[tuple]:
    """(name, n) of the n-th C channels of every input [B, T, ... C]: all that a Stash may copy."""
    of_channels = _of_channels(inputs, channels)
    return [(name, n) for name, (parts, _) in of_channels.items() for n in range(parts)]


def _of_channels(inputs, channels):
    """name -> how often an input [B, T, n C] has a channel, and bytes of a number."""
    found = {name: z for name, z in inputs.items() if z is not None and z.ndim == 3}
    return {name: (z.shape[2] // channels, z.dtype.itemsize) for name, z in found.items()}


class Stash:
    """Where tiles of a kernel's inputs lie in shared memory.

    Args:
        grid: of the call.
        inputs: of the kernel, of which [B, T, n C] are copied.
        channels: C.
        early: `Terms.reads`, of which the copies begin first: what is computed of it alone need not
            wait for the others.
    """

    def __init__(self, grid, inputs, channels, early):
        self.grid, self.early, self.places, end = grid, early, {}, 0
        for name, (parts, size) in _of_channels(inputs, channels).items():
            self.places[name] = end
            end += parts * size * grid.row.vector
        self.threads = 128 * grid.warpgroups
        self.token = end * self.threads  # bytes
        self.stages = max(1, min(grid.tiles, ROOM // (grid.span * self.token)))
        self.doing, self.first = None, None  # what a read does, and the token's first byte
        self.starts_early = True  # whether it starts the copies of `early`, or the others
        self.numbers = [{} for _ in range(grid.span)]  # scalars of the tokens of a tile

    def scratch(self):
        """The shared memory."""
        size = self.stages * self.grid.span * self.token
        return plgpu.SMEM((size // 4,), jnp.float32)

    def walk(self, place, read: Callable, step: Callable, carry):
        """carry after step(n, tokens, values, carry) of every tile n, whose tokens are `tokens`.

        read(tokens, j) reads through the place what the step needs of tokens[j], and values(j) are
        its results: at its first call `early` has arrived, then all. The place's refs have the
        scratch as `stash`.
        """
        self.place, self.read_of_token = place, read
        for n in range(self.stages):
            self._start(jnp.int32(n), True)

        def one(n, carry):
            tokens, calls = place.tokens(n), [0] * self.grid.span
            for j in range(self.grid.span):
                self._through("scalars", n, tokens, j)  # while copies arrive

            def values(j):
                group = min(calls[j], 1) * self.grid.span + j  # in the order of `_start`
                row_copies.wait(self.stages * 2 * self.grid.span - 1 - group)
                calls[j] += 1
                return self._through("read", n, tokens, j)

            carry = step(n, tokens, values, carry)
            if self.grid.tiles > 1:
                following, more = n + self.stages, self.stages < self.grid.tiles
                self._start(following, more and following < self.grid.tiles)
            return carry

        return loop(self.grid.tiles, one, carry)

    def _start(self, n, exists):
        """Copies of tile n, two groups for each token: of nothing if there is no such tile, so that
        `wait` counts as many."""
        tokens = self.place.tokens(n)

        def start(j):
            self._through("start", n, tokens, j)

        for self.starts_early in (True, False):
            for j in range(self.grid.span):
                if exists is not False:
                    pl.when(exists)(functools.partial(start, j))
                row_copies.commit()

    def _through(self, doing, n, tokens, j):
        stage = lax.rem(n, jnp.int32(self.stages)) if self.stages > 1 else 0
        self.doing, self.first = doing, jnp.int32((stage * self.grid.span + j) * self.token)
        self.place.stash, self.of_token = self, self.numbers[j]
        found = self.read_of_token(tokens, j)
        self.place.stash = None
        return found

    def channels(self, name: str, part: int, ref, index, column, row):
        """What rows.load reads, of part `part` of an input, where `read` is what is done."""
        slot = self.first + (self.places[name] + part * row_copies.size_of(ref, row)) * self.threads
        memory = self.place.refs.stash
        if self.doing == "read":
            return row_copies.read(memory, slot, ref.dtype, row)
        if self.doing == "start" and self.starts_early == ((name, part) in self.early):
            row_copies.start(ref, index, column, row, memory, slot)
        return rows.zeros(row).astype(ref.dtype)

    def number(self, name: str, ref, index):
        """As `channels`, a scalar."""
        if self.doing == "scalars":
            self.of_token[name] = ref[index]
        return self.of_token[name] if self.doing == "read" else jnp.zeros((), ref.dtype)
