"""SSD as it is defined, one token at a time: slow, obviously right, any float dtype.

S_t = exp(a_t) S_{t-1} + dt_t x_t B_t^T ;  y_t = S_t C_t + D x_t
"""

import jax
import jax.numpy as jnp
from jax import lax


def ssd_reference(x, dt, a, B, C, D, initial_state, resets, precision):
    """Token-by-token SSD in the state's dtype.

    x [B, T, H, P], dt and log decay a [B, T, H], B and C [B, T, G, N], D [H] or None,
    resets [B, T] bool or None.
    """
    del precision  # every product here is already exact to the state's dtype
    dtype = initial_state.dtype
    heads_per_group = x.shape[2] // B.shape[2]
    if resets is None:
        resets = jnp.zeros(x.shape[:2], bool)

    def step(state, inputs):
        *inputs, reset = inputs
        x_t, dt_t, a_t, B_t, C_t = (z.astype(dtype) for z in inputs)
        B_t, C_t = (jnp.repeat(z, heads_per_group, axis=1) for z in (B_t, C_t))  # [B, H, N]
        state = jnp.where(reset[:, None, None, None], 0, state)
        xB = (dt_t[..., None] * x_t)[..., :, None] * B_t[..., None, :]  # [B, H, P, N]
        state = jnp.exp(a_t)[..., None, None] * state + xB
        y_t = jnp.einsum("bhpn,bhn->bhp", state, C_t, precision=lax.Precision.HIGHEST)
        return state, y_t if D is None else y_t + D.astype(dtype)[:, None] * x_t

    over_time = [jnp.moveaxis(z, 1, 0) for z in (x, dt, a, B, C, resets)]
    step = jax.checkpoint(step, prevent_cse=False)  # keeps one state a token, nothing else
    final_state, y = jax.lax.scan(step, initial_state, over_time)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final_state
