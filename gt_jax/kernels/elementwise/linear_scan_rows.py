"""How the kernels of linear scans divide their work, and what a row of threads does.

A block of the grid owns a few channels of a sequence, or of a split of it, and walks its tokens in
few tiles: each waits once for all rows of threads, and the next is read meanwhile. Each row
(pallas/rows.py) takes the next `span` tokens of a tile and computes

    e_t = decay_t e_{t-1} + x_t from e = 0,   p = the product of their decays

all rows at a time. A row starts from p s + e, folded over the rows before it, and computes its
tokens again from there: s. The threads hold decay and x meanwhile. Folding takes two steps, over
the rows of a warp, which exchange registers, and over the warps before.

In a cluster (linear_scan_grids.py) blocks own the same channels, and each takes its part of a tile.
Each tells the others the product and e of its part, and a third step is over the blocks before.
Tiles are then not read into registers ahead but copied to shared memory (linear_scan_copies.py).

In the interpreter the rows of a block are the threads of the kernel, and two of them a group.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.elementwise.linear_scan_grids import INTERPRETED, Grid
from gt_jax.kernels.pallas import clusters, row_folds, rows
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import divide, kernel


class Place:
    """What a row of threads works on, and how it does what all kernels do.

    `parameter` is what the row's channels have of an input of this name, [M, C] float32 of M models
    whose sequences lie one after the other, or None.
    """

    def __init__(self, grid, refs, batch, reverse):
        self.grid, self.refs, self.reverse = grid, refs, reverse
        block, slab = divide(lax.axis_index("blocks"), grid.slabs)
        self.sequence, self.split = divide(block, grid.splits)
        self.column = slab * grid.row.channels
        self.channels = grid.slabs * grid.row.channels  # of a token
        self.own = lax.axis_index("wg") if interpreting() else rows.own_row(grid.row)
        self.rank = None if grid.cluster == 1 else clusters.rank()
        self.stash = None  # see linear_scan_copies.py
        self.parameter = None
        of_models = getattr(refs, "parameter_gmem", None)
        if of_models is not None:
            model, _ = divide(self.sequence, batch // of_models.shape[0])
            self.parameter = rows.load(of_models, (model,), self.column, grid.row)

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
        n = n if self.rank is None else n * grid.cluster + self.rank
        for j in range(grid.span):
            token = (n * grid.number + self.own) * grid.span + j
            token = grid.walked - 1 - token if self.reverse else token
            token, inside = token + self.split * grid.walked, None
            if grid.length % grid.walked:
                token, inside = jnp.minimum(token, grid.length - 1), token < grid.length
            tokens.append((token, inside))
        return tokens

    def tokens_after(self, n):
        """Of the tile after tile n, to read them ahead; after the last tile its own again."""
        return self.tokens(jnp.minimum(n + 1, self.grid.tiles - 1))

    def state_earlier(self, tokens, j, before):
        """s of the token before tokens[j], of a tile that is walked from the end, as it lies in
        memory; `before` the first."""
        token, inside = tokens[j]
        if j < len(tokens) - 1:
            return self.load("s", (token - 1, inside))
        # The only one that may be the first of all.
        later = token > 0 if inside is None else inside & (token > 0)
        s = self.load("s", (jnp.maximum(token - 1, 0), later))
        return s.astype(jnp.float32) + rows.masked(before, token == 0)

    def load(self, name, token, offset=0):
        """The row's channels of a token, from column `offset` of the input of this name on."""
        ref, (token, inside) = getattr(self.refs, f"{name}_gmem"), token
        at = ref, (self.sequence, token), self.column + offset, self.grid.row
        if self.stash is None:
            return rows.load(*at, inside)
        x = self.stash.channels(name, offset // self.channels, *at)
        return rows.masked(x, inside)

    def number(self, name, token):
        """A scalar of the token, [B, T] of 32 bits."""
        ref, at = getattr(self.refs, f"{name}_gmem"), (self.sequence, token[0])
        return ref[at] if self.stash is None else self.stash.number(name, ref, at)

    def store(self, ref, token, value, offset=0):
        """Writes the row's channels of a token, from column `offset` of the array on."""
        token, inside = token
        at = self.sequence, token
        rows.store(ref, at, self.column + offset, value, self.grid.row, inside)

    def store_of_split(self, ref, value):
        """Writes [B, splits, C], of which all rows hold the same."""
        at = self.sequence, self.split
        first = self.own == 0 if self.rank is None else (self.own == 0) & (self.rank == 0)
        rows.store(ref, at, self.column, value, self.grid.row, first)

    def store_sum(self, ref, value, turn):
        """Writes [B, splits, C], the sum over the rows of what each of them holds."""
        zeros = rows.zeros(self.grid.row)
        self.store_of_split(ref, self.fold([(zeros + 1, value)], zeros, turn)[1])

    def of_sequence(self, ref):
        """The row's channels of [B, C]."""
        return rows.load(ref, (self.sequence,), self.column, self.grid.row)

    def reset(self, token):
        """1 where the state is zero before the token, int32; None if it never is."""
        return None if self.refs.resets_gmem is None else self.number("resets", token)

    def unless_reset(self, value, reset):
        """The value, or zeros where `reset` says that the state is zero."""
        return value if reset is None else rows.masked(value, reset == 0)

    def existing(self, token, decay, x):
        """Decay and x of the token, ones and zeros where there is none: the state stays."""
        inside = token[1]
        if inside is None:
            return decay, x
        return rows.masked(decay, inside, 1), rows.masked(x, inside)

    def fold(self, terms, carry, turn):
        """The state before the row's tokens and that after the tile, from `carry` before it; and
        the product of the tile's decays.

        Args:
            terms: decay and x of each token of the row.
            carry: the state.
            turn: int32 scalar that alternates between 0 and 1 from call to call, so that one
                barrier a call is enough.
        """
        refs, grid = self.refs, self.grid
        product = end = None
        for decay, x in terms:
            if product is None:
                product, end = decay, decay * x if self.reverse else x
            else:
                end = decay * (x + end) if self.reverse else decay * end + x
                product = product * decay
        group, within = divide(self.own, grid.group)
        kept, before, product, end = self._fold_group(within, product, end)
        first, last = turn * grid.groups, within == grid.group - 1
        self._put(refs.products, first + group, product, last)
        self._put(refs.ends, first + group, end, last)
        self._sync()
        if self.rank is not None:
            state, carry = self._fold_cluster(group, first, carry, turn)
            return kept * state + before, carry, None
        state, total = carry, rows.zeros(grid.row) + 1
        for n in range(grid.groups):
            p, e = self._taken(refs.products, refs.ends, first + n)
            carry, total = p * carry + e, p * total
            state = row_folds.either(n + 1 == group, carry, state)
        return kept * state + before, carry, total

    def _fold_cluster(self, group, first, carry, turn):
        """The state before the row's group and that after the cluster, from `carry` before it.

        The first warp folds the groups and tells all blocks of the cluster what the whole block is.
        """
        refs, grid = self.refs, self.grid
        together = row_folds.of_warp(grid.row)
        each = pl.cdiv(grid.groups, together)  # groups that a row of the first warp folds

        @pl.when(self.own < together)
        def _():
            of_groups, product, end = [], rows.zeros(grid.row) + 1, rows.zeros(grid.row)
            for n in range(each):
                at, exists = self.own * each + n, None
                if each * together > grid.groups:
                    at, exists = jnp.minimum(at, grid.groups - 1), at < grid.groups
                of_groups.append((first + at, exists, product, end))
                p, e = self._taken(refs.products, refs.ends, first + at)
                p, e = rows.masked(p, exists, 1), rows.masked(e, exists)
                product, end = p * product, p * end + e
            kept, before, product, end = row_folds.fold_of_warp(product, end, grid.row)
            for at, exists, p, e in of_groups:
                self._put(refs.products_before, at, p * kept, exists)
                self._put(refs.ends_before, at, p * before + e, exists)
            at, last = turn * grid.cluster + self.rank, self.own == together - 1
            for block in range(grid.cluster):
                clusters.push(refs.block_products, at, product, grid.row, block, last)
                clusters.push(refs.block_ends, at, end, grid.row, block, last)

        clusters.sync()
        state = carry
        for n in range(grid.cluster):
            p, e = self._taken(refs.block_products, refs.block_ends, turn * grid.cluster + n)
            carry = p * carry + e
            state = row_folds.either(n + 1 == self.rank, carry, state)
        p, e = self._taken(refs.products_before, refs.ends_before, first + group)
        return p * state + e, carry

    def _fold_group(self, within, product, end):
        """Product and end of the rows of the group before this one, and of all up to this one."""
        if not interpreting():
            return row_folds.fold_of_warp(product, end, self.grid.row)
        refs = self.refs
        self._put(refs.row_products, self.own, product)
        self._put(refs.row_ends, self.own, end)
        self._sync()
        kept, before = rows.zeros(self.grid.row) + 1, rows.zeros(self.grid.row)
        for n in range(self.grid.group - 1):
            at = jnp.minimum(self.own - within + n, self.own)
            p, e = self._taken(refs.row_products, refs.row_ends, at)
            kept = rows.masked(p, n < within, 1) * kept
            before = rows.masked(p, n < within, 1) * before + rows.masked(e, n < within)
        return kept, before, product * kept, product * before + end

    def _put(self, ref, at, value, keep=None):
        rows.store(ref, (at,), jnp.int32(0), value, self.grid.row, keep)

    def _taken(self, products, ends, at):
        return (rows.load(ref, (at,), jnp.int32(0), self.grid.row) for ref in (products, ends))

    def _sync(self):
        """What any row has put is there for all rows behind."""
        if interpreting():
            plgpu.barrier_arrive(self.refs.barrier)
            plgpu.barrier_wait(self.refs.barrier)
        else:
            row_folds.sync()


def run(
    grid: Grid,
    body: Callable,
    name: str,
    batch: int,
    inputs: dict,
    outputs: dict,
    stash: Any = None,
) -> list[jax.Array]:
    """The outputs of a kernel; see launch.kernel. `stash` is of linear_scan_copies.py, or None."""
    scratch = lambda number: plgpu.SMEM((number, grid.row.channels), jnp.float32)
    of_groups = scratch(2 * grid.groups)
    of_blocks, before = None, None
    if grid.cluster > 1:
        of_blocks, before = scratch(2 * grid.cluster), of_groups
    rows_of = scratch(grid.number) if interpreting() else None
    return kernel(
        body,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scratch={
            "products": of_groups,
            "ends": of_groups,
            "products_before": before,
            "ends_before": before,
            "block_products": of_blocks,
            "block_ends": of_blocks,
            "stash": stash and stash.scratch(),
            "row_products": rows_of,
            "row_ends": rows_of,
            "barrier": plgpu.Barrier(num_arrivals=INTERPRETED) if interpreting() else None,
        },
        grid={"blocks": batch * grid.splits * grid.slabs},
        threads=INTERPRETED if interpreting() else grid.warpgroups,
        cluster=grid.cluster,
    )
