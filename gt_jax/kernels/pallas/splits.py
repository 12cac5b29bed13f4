"""Splitting a long sequence of few heads, so that a GPU works on its splits at the same time.

A split maps the state S it starts from to d S + U, with d its total decay and U what it adds. One
pass over the inputs finds the d and U of all splits but the last, a scan over them the state that
each split starts from, and then each split is a row of a batch of its own. Backward the same, from
the end, where a split maps the gradient of the state it ends with.

Where devices share a sequence (see context_parallel.py), the map of a device's tokens is that of
its splits one after another: the pass then finds the maps of all of them.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels import context_parallel
from gt_jax.kernels.chunks import carry_chunks
from gt_jax.kernels.pallas.launch import divide

LEAST_CHUNKS = 8  # of a split


def choose_splits(blocks: int, chunks: int, *, running: int) -> int:
    """Into how many splits each row of `chunks` chunks is cut: 1 where `blocks` fill the GPU.

    Args:
        blocks: of the grid, of a call without splits.
        chunks: of a row.
        running: blocks that the GPU runs at a time.
    """
    splits = 1
    while 2 * splits * blocks <= running and chunks >= 2 * splits * LEAST_CHUNKS:
        splits *= 2
    return splits


def count_maps(splits: int, axis_name: str | None) -> int:
    """How many splits of each row need a map: on one device nothing follows the last split."""
    return splits - 1 if axis_name is None else splits


def row_of_split(row: jax.Array, splits: int, maps: int, *, reverse: bool) -> jax.Array:
    """The row of the inputs that holds the split whose map has this row of the maps.

    Args:
        row: int32 scalar, less than batch * maps.
        splits, maps: of each row of the batch, see `count_maps`.
        reverse: whether maps are those of the last splits, not of the first.
    """
    example, split = divide(row, maps)
    return example * splits + split + (splits - maps if reverse else 0)


def states_of_splits(
    decay: jax.Array,
    update: jax.Array,
    state: jax.Array | None,
    *,
    reverse: bool,
    axis_name: str | None = None,
) -> jax.Array:
    """The state that each split starts from (ends with if reverse).

    Args:
        decay: [batch, H, maps, X or 1, Y or 1] d of all splits but the last, in the order of the
            sequence (but the first if reverse); of all splits with axis_name.
        update: [batch, H, maps, X, Y] U of the same splits.
        state: [batch, H, X, Y] before the first split, or the gradient after the last; None is 0.
        axis_name: of the devices that share the sequence, or None; each adds its `state` to what
            the devices before it (after it if reverse) pass on.

    Returns:
        [batch * splits, H, X, Y].
    """
    decay, update = (jnp.moveaxis(x, 2, 0) for x in (decay, update))
    state = jnp.zeros_like(update[0]) if state is None else state
    if axis_name is not None:
        _, added = carry_chunks(jnp.zeros_like(state), decay, update, reverse=reverse)
        state = context_parallel.receive_state(
            jnp.prod(decay, axis=0), added, state, axis_name, reverse=reverse
        )
        others = slice(1, None) if reverse else slice(-1)
        decay, update = decay[others], update[others]
    states, last = carry_chunks(state, decay, update, reverse=reverse)
    ends = (last[None], states) if reverse else (states, last[None])
    states = jnp.concatenate(ends)  # [splits, batch, H, X, Y]
    return states.swapaxes(0, 1).reshape(-1, *state.shape[1:])
