"""WKV6 as it is defined, one token at a time: slow, obviously right, any float dtype.

o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
S_t = diag(exp w_t) S_{t-1} + k_t v_t^T
"""

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels import checks, context_parallel

TAKES = None  # every floating dtype and size


def wkv6_reference(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    precision: str,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token WKV6 in the state's dtype.

    Args:
        r, k, w: [B, T, H, K] receptance, key and log decay.
        v: [B, T, H, V] value.
        u: [H, K] bonus of the present token.
        initial_state: [B, H, K, V]; None for zeros.
        resets: [B, T] bool, True at the first token of a segment, or None.
        precision: as in `wkv6`; every product here is exact to the dtype of the state anyway.
        axis_name: of the devices that share the sequence, or None. initial_state is then zero on
            all devices but the first; resets also marks a segment that starts with a device's first
            token; the final state is the one after this device's tokens.

    Returns:
        o [B, T, H, V] in v.dtype, and the final state [B, H, K, V].
    """
    state = given_or_zeros(initial_state, r, k, v, w, u)
    if axis_name is not None:
        state = context_parallel.wkv6_state_before(k, v, w, state, resets, axis_name, precision)
    dtype = state.dtype
    if resets is None:
        resets = jnp.zeros(r.shape[:2], bool)
    u = u.astype(dtype)

    def step(state, inputs):
        *inputs, reset = inputs
        r_t, k_t, v_t, w_t = (x.astype(dtype) for x in inputs)  # [B, H, K] and [B, H, V]
        state = jnp.where(reset[:, None, None, None], 0, state)
        kv = k_t[..., :, None] * v_t[..., None, :]  # [B, H, K, V]
        o_t = jnp.einsum(
            "bhk,bhkv->bhv", r_t, state + u[..., None] * kv, precision=lax.Precision.HIGHEST
        )
        return jnp.exp(w_t)[..., None] * state + kv, o_t

    over_time = [jnp.moveaxis(x, 1, 0) for x in (r, k, v, w, resets)]
    step = jax.checkpoint(step, prevent_cse=False)  # keeps one state a token, nothing else
    final_state, o = jax.lax.scan(step, state, over_time)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final_state


def given_or_zeros(
    state: jax.Array | None, r: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array, u: jax.Array
) -> jax.Array:
    """The initial state [B, H, K, V], zeros if None."""
    if state is not None:
        return state
    B, _, H, K = r.shape
    return jnp.zeros((B, H, K, v.shape[-1]), checks.state_dtype(r, k, v, w, u))
