"""The linear recurrence s_t = decay_t s_{t-1} + x_t of every channel, parallel over time.

The sequence is cut into chunks of 8 tokens, which are computed side by side from zero states. The
states between chunks follow the same recurrence over chunks. Everything is sums and products of
what each token gives, as token by token: no logarithm of a long product is ever undone, so a
decay of 0 or 1 is exact and no length loses digits.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.elementwise import gated_scan as fused_gates
from gt_jax.kernels.elementwise import linear_scan as fused
from gt_jax.kernels.elementwise import memory_scan as fused_memory
from gt_jax.kernels.segments import resets

_CHUNK = 8


def linear_scan(
    decay: jax.Array,
    x: jax.Array,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    impl: str = "auto",
) -> jax.Array:
    """s_t = decay_t s_{t-1} + x_t over axis 1; one token costs one multiplication and one sum.

    Args:
        decay: [B, T, C] float32, in [0, 1].
        x: [B, T, C] float32.
        state: [B, C] float32, s before the first token; zeros if None.
        segment_ids: [B, T] int; s is zero before a token whose id differs from the token before.
        impl: as model.impl; "chunked" and "reference" keep to plain JAX where "auto" takes the
            kernels of gt_jax/kernels/elementwise/linear_scan.py, on GPUs.

    Returns:
        s [B, T, C] float32. Gradients flow to decay, x and state.
    """
    B, T, channels = x.shape
    if state is None:
        state = jnp.zeros((B, channels), x.dtype)
    if segment_ids is not None:
        decay = jnp.where(resets(segment_ids, (B, T))[..., None], 0, decay)
    if fused.fits(impl, decay, x, state):
        return fused.scan(decay, x, state)
    return _scan(decay, x, state)


def gated_scan(
    gates: jax.Array,
    head: jax.Array,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """s_t . head of a minGRU, s_t = (1 - z_t) s_{t-1} + z_t g(candidate_t), z = sigmoid(update).

    g(x) is x + 1/2 from zero on and sigmoid(x) below (Feng et al. 2024).

    Args:
        gates: [B, T, 2 C], [candidate | update].
        head: [C] float32.
        state: [B, C] float32, s before the first token.
        segment_ids, impl: as of linear_scan.

    Returns:
        [B, T] float32, and the last token's s [B, C] float32. Gradients flow to gates, head and
        state.
    """
    if state is None:
        state = jnp.zeros((gates.shape[0], gates.shape[2] // 2), jnp.float32)
    if fused_gates.fits(impl, gates, state):
        starts = None if segment_ids is None else resets(segment_ids).astype(jnp.int32)
        return fused_gates.scan(gates, head, state, starts)
    candidate, update = jnp.split(gates.astype(jnp.float32), 2, axis=-1)
    value = jnp.where(candidate >= 0, candidate + 0.5, jax.nn.sigmoid(candidate))
    # 1 - sigmoid(x) would round to zero from x = 17 on.
    keep, take = jax.nn.sigmoid(-update), jax.nn.sigmoid(update)
    s = linear_scan(keep, take * value, state, segment_ids, impl=impl)
    return s @ head, s[:, -1]


def memory_scan(
    scores: jax.Array,
    c: jax.Array,
    bias: jax.Array,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """s_t = a_t s_{t-1} + (1 - a_t) i_t c_t for a = sigmoid(forget + bias), i = sigmoid(read).

    Args:
        scores: [B, T, 2 C], [forget | read].
        c: [B, T, C].
        bias: [C] float32.
        state: [B, C] float32, s before the first token.
        segment_ids, impl: as of linear_scan.

    Returns:
        s [B, T, C], in float32 or as the kernels write it, in the dtype of scores; the last token's
        s [B, C] float32. Gradients flow to scores, c, bias and state.
    """
    if state is None:
        state = jnp.zeros((c.shape[0], c.shape[2]), jnp.float32)
    if fused_memory.fits(impl, scores, c, state):
        starts = None if segment_ids is None else resets(segment_ids).astype(jnp.int32)
        return fused_memory.scan(scores, c, bias, state, starts)
    forget, read = jnp.split(scores.astype(jnp.float32), 2, axis=-1)
    forget += bias
    scale = jax.nn.sigmoid(-forget) * jax.nn.sigmoid(read)
    s = linear_scan(jax.nn.sigmoid(forget), scale * c, state, segment_ids, impl=impl)
    return s, s[:, -1]


@jax.custom_vjp
def _scan(decay, x, state):
    B, T, channels = x.shape
    if T <= _CHUNK:
        s = []
        for t in range(T):
            state = decay[:, t] * state + x[:, t]
            s.append(state)
        return jnp.stack(s, axis=1)
    padding = ((0, 0), (0, -T % _CHUNK), (0, 0))
    chunked = lambda z: jnp.pad(z, padding).reshape(B, -1, _CHUNK, channels)
    decay, x = chunked(decay), chunked(x)
    s, kept = [x[:, :, 0]], [decay[:, :, 0]]  # [B, M, C]: from zero states, and of states before
    for t in range(1, _CHUNK):
        s.append(decay[:, :, t] * s[-1] + x[:, :, t])
        kept.append(decay[:, :, t] * kept[-1])
    ends = _scan(kept[-1], s[-1], state)
    before = jnp.concatenate([state[:, None], ends[:, :-1]], axis=1)
    whole = jnp.stack([s_t + kept_t * before for s_t, kept_t in zip(s, kept)], axis=2)
    return whole.reshape(B, -1, channels)[:, :T]


def _forward(decay, x, state):
    s = _scan(decay, x, state)
    return s, (decay, s, state)


def _backward(residuals, g):
    # ds_t = g_t + decay_{t+1} ds_{t+1}: the same recurrence, from the end.
    decay, s, state = residuals
    later = jnp.flip(jnp.roll(decay, -1, axis=1), axis=1)
    ds = jnp.flip(_scan(later, jnp.flip(g, axis=1), jnp.zeros_like(state)), axis=1)
    before = jnp.concatenate([state[:, None], s[:, :-1]], axis=1)
    return ds * before, ds, decay[:, 0] * ds[:, 0]


_scan.defvjp(_forward, _backward)
