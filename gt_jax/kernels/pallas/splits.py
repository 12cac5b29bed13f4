"""Splitting a long sequence of few heads, so that a GPU works on its splits at the same time.

A split maps the state S it starts from to d S + U, with d its total decay and U what it adds. One
pass over the inputs finds the d and U of all splits but the last, a scan over them the state that
each split starts from, and then each split is a row of a batch of its own. Backward the same, from
the end, where a split maps the gradient of the state it ends with.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.chunks import carry_chunks

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


def states_of_splits(
    decay: jax.Array, update: jax.Array, state: jax.Array, *, reverse: bool
) -> jax.Array:
    """The state that each split starts from (ends with if reverse).

    Args:
        decay: [batch, H, splits - 1, X or 1, Y or 1] d of all splits but the last, in the order of
            the sequence (but the first if reverse).
        update: [batch, H, splits - 1, X, Y] U of the same splits.
        state: [batch, H, X, Y] before the first split, or the gradient after the last.

    Returns:
        [batch * splits, H, X, Y].
    """
    decay, update = (jnp.moveaxis(x, 2, 0) for x in (decay, update))
    states, last = carry_chunks(state, decay, update, reverse=reverse)
    ends = (last[None], states) if reverse else (states, last[None])
    states = jnp.concatenate(ends)  # [splits, batch, H, X, Y]
    return states.swapaxes(0, 1).reshape(-1, *state.shape[1:])
