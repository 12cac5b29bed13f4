"""Segment embeddings: what part of a document a token belongs to, by the control token before it.

Three token ids begin an input, a thinking and an output segment; the tokens of a segment, that one
included, get the learned vector of its kind added to their embeddings. Tokens before the first
control token of a document have no kind. (`segment_ids`, elsewhere, number packed documents.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gt_jax.kernels.segments import resets

ROLES = ("input", "thinking", "output")


class RoleState(NamedTuple):
    """role [B] int32 of the last token: 0 for none, else 1 + its place in ROLES."""

    role: jax.Array


def roles(
    tokens: jax.Array,
    first: int,
    state: RoleState | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, RoleState]:
    """The role of every token.

    Args:
        tokens: [B, T] int.
        first: the id that begins an input segment; the next two begin the others.
        state: RoleState before the first token; None is no role.
        segment_ids: [B, T] int, or None for one document a row.

    Returns:
        [B, T] int32, 0 for none, else 1 + its place in ROLES; and the RoleState after the last.
    """
    B, T = tokens.shape
    begun = jnp.where((tokens >= first) & (tokens < first + len(ROLES)), tokens - first + 1, 0)
    event = (begun > 0) | resets(segment_ids, (B, T))
    last = jax.lax.cummax(jnp.where(event, jnp.arange(1, T + 1), 0), axis=1)  # 0 before any
    before = jnp.zeros(B, jnp.int32) if state is None else state.role
    known = jnp.concatenate([before[:, None], begun.astype(jnp.int32)], axis=1)  # [B, 1 + T]
    found = jnp.take_along_axis(known, last, axis=1)
    return found, RoleState(found[:, -1])
