"""Chains of blocks that add dB and dC of their heads to one sum, one block after the other.

dB and dC are sums over all heads of a group. A block adds what its heads give for a chunk by a bulk
copy that adds in the second-level cache, once the block before it in the chain, which is a moment
ahead, has passed that chunk on. The order is fixed, so the bits are the same every time.
"""

from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gt_jax.kernels.pallas import launch
from gt_jax.kernels.pallas.devices import interpreting
from gt_jax.kernels.pallas.launch import divide, pass_on_turn, wait_for_turn
from gt_jax.kernels.pallas.tiles import tokens
from gt_jax.kernels.ssd.hopper_sizes import Sizes

SUMS = ("dB", "dC")  # in this order


class Chains(NamedTuple):
    """How the blocks of one call add."""

    together: int  # examples whose blocks run together
    per_group: int  # chains that the blocks of a group form
    links: int  # blocks of a chain
    number: int  # chains of an example


def chains_of(size: Sizes) -> Chains:
    """The chains of a call; no longer than what runs at a time, or the last links would wait."""
    most = size.tuning.examples_together
    together = max(n for n in range(1, most + 1) if size.batch % n == 0)
    blocks = size.heads_per_group // size.heads_per_block
    per_group = blocks  # the interpreter knows no copies that add
    if not interpreting():
        running = min(blocks, launch.MULTIPROCESSORS // together)
        per_group = pl.cdiv(running, size.tuning.longest_chain)
    return Chains(together, per_group, pl.cdiv(blocks, per_group), size.groups * per_group)


class Place(NamedTuple):
    """What a block of the grid works on, traced numbers."""

    row: Any  # example
    head0: Any  # its first head
    group: Any
    chain: Any
    link: Any  # place in the chain


def place_of_block(size: Sizes, chains: Chains) -> Place:
    """The place of this block.

    Blocks start in the order of their numbers, so that none waits for one that has no
    multiprocessor yet.
    """
    place, row = divide(lax.axis_index("block"), chains.together)
    rows, block = divide(place, size.blocks)
    row += rows * chains.together
    head0 = block * size.heads_per_block
    group, of_group = divide(block, size.heads_per_group // size.heads_per_block)
    chain, link = divide(of_group, chains.links)
    chain += group * chains.per_group
    return Place(row, head0, group, chain, link)


def semaphores(size: Sizes, chains: Chains):
    """A semaphore for each chunk of each chain in global memory; None where nobody waits."""
    if chains.links == 1:
        return None
    number = size.batch * chains.number * size.chunks
    return pl.get_global(plgpu.SemaphoreType.REGULAR((number,)))


def add_in_turn(size: Sizes, chains: Chains, turns, refs, place: Place, m, slot):
    """Adds dB and dC of chunk m to the sums of the chain."""

    def store(**how):
        for n, smems in enumerate((refs.dB_smems, refs.dC_smems)):
            for smem, columns in by_columns(size, smems):
                target = refs.sums_gmem.at[place.row, n, tokens(m), place.chain, columns]
                plgpu.copy_smem_to_gmem(smem.at[slot], target, **how)
        plgpu.wait_smem_to_gmem(0)

    pl.when(place.link == 0)(store)
    if chains.links > 1:
        turn = (place.row * chains.number + place.chain) * size.chunks + m

        @pl.when(place.link > 0)
        def _():
            wait_for_turn(turns, turn, place.link)
            store(reduction_op="add")

        pass_on_turn(turns, turn)


def by_columns(size: Sizes, smems):
    """The tiles that together hold a sum [C, N], each with the columns it holds."""
    width = size.N // len(smems)
    return [(smem, slice(n * width, (n + 1) * width)) for n, smem in enumerate(smems)]
