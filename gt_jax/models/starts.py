"""Documents that begin with a learned state, not with zero (model.learned_states).

A recurrence is linear in its state: after a reset to S_0 it gives what it gives after a reset to
zero, and what S_0 leaves by itself, which is S_0 times the decays since the reset:

    WKV6  y_t += S_0^T (p_t * r_t),   p_t = prod w_s of the document's tokens before t
    SSD   y_t += p_t S_0 C_t,         p_t = prod w_s of these and of t itself

So the kernels reset to zero and these terms are added, exactly, at the cost of a product of each
token with one matrix. A row's first document needs none of it: kernels take its initial state.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.segments import resets
from gt_jax.models.scans import linear_scan


def repeated(start: jax.Array, rows: int) -> jax.Array:
    """A learned state [...] as the initial state of each row, [rows, ...]."""
    return jnp.broadcast_to(start, (rows, *start.shape))


def add_to_wkv6(
    y: jax.Array,
    state: jax.Array,
    start: jax.Array,
    r: jax.Array,
    log_w: jax.Array,
    segment_ids: jax.Array,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """What `wkv6` gives with resets to `start` in place of zero.

    Args:
        y, state: [B, T, H, V] and [B, H, K, V], of `wkv6` with these segments.
        start: [H, K, V] the state before the first token of all documents but a row's first.
        r, log_w: [B, T, H, K] as `wkv6` took them.
        segment_ids: [B, T] int.
        impl: as of linear_scan.

    Returns:
        y and the state after the last token, in the dtype of `state`.
    """
    B, T, H, K = r.shape
    w = jnp.exp(log_w.astype(state.dtype)).reshape(B, T, H * K)
    before = jnp.pad(w[:, :-1], ((0, 0), (1, 0), (0, 0)))
    begins = jnp.broadcast_to(resets(segment_ids)[..., None], w.shape).astype(w.dtype)
    # 1 where a document begins, and 0 in a row's first document.
    kept = linear_scan(before, begins, segment_ids=segment_ids, impl=impl)
    seen = r.astype(state.dtype) * kept.reshape(r.shape)
    y = y + jnp.einsum("bthk,hkv->bthv", seen, start, precision="highest")
    left = (kept[:, -1] * w[:, -1]).reshape(B, H, K, 1)
    return y, state + left * start


def add_to_ssd(
    y: jax.Array,
    state: jax.Array,
    start: jax.Array,
    log_w: jax.Array,
    C: jax.Array,
    segment_ids: jax.Array,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """What `ssd` gives with resets to `start` in place of zero.

    Args:
        y, state: [B, T, H, P] and [B, H, P, N], of `ssd` with these segments.
        start: [H, P, N] the state before the first token of all documents but a row's first.
        log_w: [B, T, H], the step sizes times A.
        C: [B, T, G, N] as `ssd` took it.
        segment_ids: [B, T] int.
        impl: as of linear_scan.

    Returns:
        y and the state after the last token, in the dtype of `state`.
    """
    G = C.shape[2]
    w = jnp.exp(log_w.astype(state.dtype))  # [B, T, H]
    begins = resets(segment_ids)[..., None]
    kept = linear_scan(w, jnp.where(begins, w, 0), segment_ids=segment_ids, impl=impl)
    by_group = start.reshape(G, -1, *start.shape[1:])  # [G, H / G, P, N]
    read = jnp.einsum("btgn,gjpn->btgjp", C.astype(state.dtype), by_group, precision="highest")
    y = y + kept[..., None] * read.reshape(y.shape)
    return y, state + kept[:, -1, :, None, None] * start
