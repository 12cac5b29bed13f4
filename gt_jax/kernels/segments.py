"""Where segments of a sequence start."""

import jax
import jax.numpy as jnp


def resets(segment_ids: jax.Array | None, shape: tuple[int, int] | None = None) -> jax.Array:
    """The tokens before which a state is reset to zero.

    Args:
        segment_ids: [B, T] int, or None for one segment a row.
        shape: (B, T); needed where segment_ids is None.

    Returns:
        [B, T] bool: True where the id differs from the token before, so never at t = 0.
    """
    if segment_ids is None:
        return jnp.zeros(shape, bool)
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
