"""How calls of scans are divided on GPUs with clusters, for many sizes: all of each sequence is
walked, and what a block holds has room in its shared memory."""

import itertools

import jax
import pytest

from gt_jax.kernels.pallas import devices, warps
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old

MULTIPROCESSORS = 132, 78, 7  # of an H200, a part of one, and few
BATCHES = 1, 2, 3, 8, 17, 33, 132, 1000
LENGTHS = 1, 9, 63, 64, 129, 255, 257, 512, 1023, 1025, 2049, 4097, 16385, 65536
CHANNELS = 4, 12, 16, 20, 32, 48, 80, 100, 128, 192, 208, 272, 320, 768, 1000, 1536, 2048
SHARED = 227 * 1024 - 16  # bytes a block may have, but for what is not dynamic


def inputs_of(dtypes, B, T, C):
    """Inputs of the kernels of gradients, of which tiles are copied."""
    array = lambda parts, dtype: jax.ShapeDtypeStruct((B, T, parts * C), dtype)
    scores, c = dtypes
    gated = {"gates": array(2, scores), "s": array(1, scores)}
    memory = {"scores": array(2, scores), "c": array(1, c)}
    memory |= {"ds": array(1, scores), "s": array(1, scores)}
    return [gated, memory, {name: array(1, "float32") for name in ("decay", "ds", "s")}]


@pytest.mark.parametrize("running", MULTIPROCESSORS)
def test_blocks_walk_all_tokens_and_have_room(running, monkeypatch):
    from gt_jax.kernels.elementwise import linear_scan_copies as copies
    from gt_jax.kernels.elementwise import linear_scan_grids as grids

    monkeypatch.setattr(warps, "blocks_at_once", lambda: running * warps.BLOCKS_AT_ONCE)
    seen = set()
    with devices.simulated("lower"):
        for B, T, C in itertools.product(BATCHES, LENGTHS, CHANNELS):
            calls = {}  # by bytes of a token
            for dtypes in itertools.product(("bfloat16", "float32"), repeat=2):
                for inputs in inputs_of(dtypes, B, T, C):
                    calls[copies.bytes_read(inputs, C)] = inputs
            for read, inputs in calls.items():
                grid = grids.clustered(B, T, C, read) or grids.single_blocks(B, T, C)
                assert grid.slabs * grid.row.channels == C
                assert grid.walked * (grid.splits - 1) < T <= grid.walked * grid.splits
                if not grid.copied:
                    assert grid.cluster == 1
                    continue
                seen.add((grid.cluster, grid.row.lanes))
                assert grid.splits == 1 and grid.cluster * B * grid.slabs <= running
                stash = copies.Stash(grid, inputs, C, ())
                assert 1 <= stash.stages <= grid.tiles
                # As linear_scan_rows.run lays it out: products and ends, of two turns.
                of_cluster = grid.groups + grid.cluster if grid.cluster > 1 else 0
                folds = 2 * 2 * (grid.groups + of_cluster)  # rows
                size = stash.stages * grid.span * stash.token + 4 * grid.row.channels * folds
                assert size <= SHARED, (grid, read)
    assert seen <= set(itertools.product((1, 2, 4, 8), (4, 8))) and len(seen) >= 4


@pytest.mark.parametrize("name, channels, tiles", [("minGRU", 192, 2), ("ParallelScan", 128, 1)])
def test_clusters_are_of_two_blocks_where_those_were_the_fastest(
    name, channels, tiles, monkeypatch
):
    """The sizes of gt_jax/kernels/README.md, on an H200: forward too, if one tile is all of it."""
    from gt_jax.kernels.elementwise import linear_scan_copies as copies
    from gt_jax.kernels.elementwise import linear_scan_grids as grids

    monkeypatch.setattr(warps, "blocks_at_once", lambda: 132 * warps.BLOCKS_AT_ONCE)
    gated, memory, _ = inputs_of(("bfloat16", "bfloat16"), 8, 2048, channels)
    read = copies.bytes_read(gated if name == "minGRU" else memory, channels)
    with devices.simulated("lower"):
        gradient = grids.grid_of_gradient(8, 2048, channels, read)
        states = grids.grid_of_states(8, 2048, channels, read)
    assert gradient.copied and gradient.cluster == 2 and gradient.tiles == tiles
    assert states.cluster == (2 if tiles == 1 else 1)
