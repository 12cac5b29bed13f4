"""Context parallelism: a sequence whose tokens are spread over the devices of a shard_map axis.

Each device holds T of the n T tokens. What a recurrence makes of a state by the tokens of a device
is affine, S -> decay S + added, so devices exchange these maps instead of tokens: each composes the
maps of the devices before it, and runs its own tokens from the state that results. The result is
that of one device, but for the order of float sums; the exchange is n states a device, whatever T.

The fused kernels find the map of a device's tokens from those of its splits (pallas/splits.py). For
the others it is computed here: with zero state before the device's tokens, `added` is the state
after them, which one product over all of them gives: every token is weighed by the decays after it,
exp of a sum that is at most 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels import segments
from gt_jax.kernels.chunks import LOWEST_LOG_DECAY, carry_chunks

AXIS = "sequence"
_GROUP = 64  # tokens summed by one product


def current_axis() -> str | None:
    """ "sequence" while a function is traced by shard_map over an axis of that name, else None."""
    return AXIS if AXIS in jax.sharding.get_abstract_mesh().manual_axes else None


def first_token_resets(segment_ids: jax.Array | None, axis_name: str) -> jax.Array | None:
    """Whether the state is reset before this device's first token.

    Args:
        segment_ids: [B, T] int, of this device's tokens, or None.
        axis_name: of the devices.

    Returns:
        [B] bool; False on the first device, which a caller's state belongs to. None for None.
    """
    if segment_ids is None:
        return None
    before = from_device_before(segment_ids[:, -1], None, axis_name)
    return (segment_ids[:, 0] != before) & (lax.axis_index(axis_name) > 0)


def resets(segment_ids: jax.Array | None, axis_name: str | None) -> jax.Array | None:
    """The tokens before which a state is reset to zero, as `segments.resets`.

    Args:
        segment_ids: [B, T] int, of this device's tokens, or None.
        axis_name: of the devices, or None for one.

    Returns:
        [B, T] bool; None for None.
    """
    if segment_ids is None:
        return None
    within = segments.resets(segment_ids)
    if axis_name is None:
        return within
    return within.at[:, 0].set(first_token_resets(segment_ids, axis_name))


def from_device_before(
    x: jax.Array, first: jax.Array | None, axis_name: str, starts: jax.Array | None = None
) -> jax.Array:
    """What the device before this one holds in its x.

    Args:
        x: [B, ...].
        first: [B, ...], the result on the first device; zeros if None.
        axis_name: of the devices.
        starts: [B] bool from `first_token_resets`: where True the result is zero.
    """
    devices = lax.axis_size(axis_name)
    before = lax.ppermute(x, axis_name, [(i, i + 1) for i in range(devices - 1)])
    if first is not None:
        before = jnp.where(lax.axis_index(axis_name) == 0, first.astype(x.dtype), before)
    return before if starts is None else jnp.where(_per_row(starts, before), 0, before)


def of_last_device(tree: Any, axis_name: str) -> Any:
    """The last device's arrays, on every device."""
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name)[-1], tree)


def of_first_device(x: jax.Array, axis_name: str) -> jax.Array:
    """The first device's x, and zeros on the others."""
    return jnp.where(lax.axis_index(axis_name) == 0, x, 0)


def receive_state(
    decay: jax.Array, added: jax.Array, state: jax.Array, axis_name: str, *, reverse: bool = False
) -> jax.Array:
    """The state before this device's tokens (its gradient after them if reverse).

    Args:
        decay, added: of the map S -> decay S + added of this device's tokens; added [B, H, X, Y],
            decay of a shape that broadcasts to it. If reverse, of the map of the gradient.
        state: [B, H, X, Y], to which what the devices before (after if reverse) pass on is added.
        axis_name: of the devices.

    Returns:
        [B, H, X, Y].
    """
    maps = lax.all_gather((decay, decay * state + added), axis_name)
    received, _ = carry_chunks(jnp.zeros_like(state), *maps, reverse=reverse)  # [devices, B, ...]
    return state + received[lax.axis_index(axis_name)]


def wkv6_state_before(
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    initial_state: jax.Array,
    resets: jax.Array | None,
    axis_name: str,
    precision: str,
) -> jax.Array:
    """The state of WKV6 before this device's first token.

    Args:
        k, w: [B, T, H, K] key and log decay of this device's tokens.
        v: [B, T, H, V] value.
        initial_state: [B, H, K, V] before the first device's first token; zeros on others.
        resets: [B, T] bool, True at the first token of a segment, or None.
        axis_name: of the devices.
        precision: as in `wkv6`.

    Returns:
        [B, H, K, V] in the dtype of initial_state.
    """
    dtype = initial_state.dtype
    weights, decay = _weights_and_decay(w.astype(dtype), resets)
    added = _product("bthk,bthv->bhkv", weights * k, v, k.dtype, precision)
    return receive_state(decay[..., None], added, initial_state, axis_name)


def ssd_state_before(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    B: jax.Array,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    axis_name: str,
    precision: str,
) -> jax.Array:
    """The state of SSD before this device's first token.

    Args:
        x: [B, T, H, P] input of this device's tokens.
        dt, a: [B, T, H] step size and log decay, in the dtype of the state.
        B: [B, T, G, N] input projection.
        initial_state: [B, H, P, N] before the first device's first token; zeros on others, and if
            None.
        resets: [B, T] bool, True at the first token of a segment, or None.
        axis_name: of the devices.
        precision: as in `ssd`.

    Returns:
        [B, H, P, N] in the dtype of dt.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    if initial_state is None:
        initial_state = jnp.zeros((batch, H, P, N), dt.dtype)
    weights, decay = _weights_and_decay(a, resets)
    weighed = ((weights * dt)[..., None] * x).reshape(batch, T, G, H // G, P)
    added = _product("btghp,btgn->bghpn", weighed, B, x.dtype, precision)
    added = added.reshape(batch, H, P, N)
    return receive_state(decay[..., None, None], added, initial_state, axis_name)


def _weights_and_decay(log_decay, resets):
    """[B, T, ...] log decays -> decay after each token, [B, T, ...], and of all, [B, ...].

    A token before a segment's start has weight 0, and such a start makes the whole decay 0.
    """
    log_decay = jnp.maximum(log_decay, LOWEST_LOG_DECAY)
    weights = jnp.exp(_sums_after(log_decay))
    decay = jnp.exp(jnp.sum(log_decay, axis=1))
    if resets is None:
        return weights, decay
    starts = jnp.cumsum(resets, axis=1)
    counts = _per_row(starts == starts[:, -1:], weights)
    return jnp.where(counts, weights, 0), jnp.where(_per_row(starts[:, -1] > 0, decay), 0, decay)


def _sums_after(x):
    """[B, T, ...] -> for each token the sum over the tokens after it.

    Groups of tokens are summed by a product, and groups by the same again. With lax.cumsum instead,
    WKV6 and its gradient over 2 x 65 536 tokens, 32 heads, took 2.9 s on two H200 (JAX 0.11.2), and
    7 ms on one, which needs no such sum.
    """
    T = x.shape[1]
    group = min(T, _GROUP)
    rest = [(0, 0)] * (x.ndim - 2)
    groups = jnp.pad(x, [(0, 0), (0, -T % group), *rest])
    groups = groups.reshape(x.shape[0], -1, group, *x.shape[2:])  # [B, n, group, ...]
    later = jnp.triu(jnp.ones((group, group), x.dtype), 1)
    within = jnp.einsum("ij,bnj...->bni...", later, groups, precision=lax.Precision.HIGHEST)
    if group < T:
        within = within + _sums_after(jnp.sum(groups, axis=2))[:, :, None]
    return within.reshape(x.shape[0], -1, *x.shape[2:])[:, :T]


def _product(equation, left, right, operands, precision):
    """einsum in the dtype of `left`, exact unless the operands are bfloat16 by nature."""
    rounded = operands == jnp.bfloat16 and precision == "default"
    return lax.optimization_barrier(  # a compiler that fuses it computes it many times
        jnp.einsum(
            equation,
            left,
            right.astype(left.dtype),
            precision=lax.Precision.DEFAULT if rounded else lax.Precision.HIGHEST,
        )
    )


def _per_row(rows, like):
    """[B, ...] -> the same with axes of size 1 up to the rank of `like`."""
    return rows.reshape(*rows.shape, *[1] * (like.ndim - rows.ndim))
