"""SSD as it is defined, one token at a time: slow, obviously right, any float dtype.

S_t = exp(a_t) S_{t-1} + dt_t x_t B_t^T ;  y_t = S_t C_t + D x_t
"""

import jax
import jax.numpy as jnp
from jax import lax

from gt_jax.kernels import context_parallel

TAKES = None  # every floating dtype and size


def ssd_reference(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    precision: str,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Token-by-token SSD in the dtype of dt, which is that of the state.

    Args:
        x: [B, T, H, P] input.
        dt: [B, T, H] step size, after bias, softplus and limit.
        a: [B, T, H] log decay, or rates [H]; the log decay is then dt a.
        B, C: [B, T, G, N] projections.
        D: [H] skip connection, or None.
        initial_state: [B, H, P, N]; None for zeros.
        resets: [B, T] bool, True at the first token of a segment, or None.
        precision: as in `ssd`; every product here is exact to the dtype of the state anyway.
        axis_name: of the devices that share the sequence, or None. initial_state is then zero on
            all devices but the first; resets also marks a segment that starts with a device's first
            token; the final state is the one after this device's tokens.

    Returns:
        y [B, T, H, P] in x.dtype, and the final state [B, H, P, N].
    """
    a = log_decay(dt, a)
    if axis_name is not None:
        initial_state = context_parallel.ssd_state_before(
            x, dt, a, B, initial_state, resets, axis_name, precision
        )
    dtype = dt.dtype
    initial_state = given_or_zeros(initial_state, x, dt, B)
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


def log_decay(dt: jax.Array, a: jax.Array) -> jax.Array:
    """The log decay [B, T, H]: a itself, or dt a for rates a [H]."""
    return dt * a if a.ndim == 1 else a


def given_or_zeros(state: jax.Array | None, x: jax.Array, dt: jax.Array, B: jax.Array) -> jax.Array:
    """The initial state [B, H, P, N] in the dtype of dt, zeros if None."""
    if state is not None:
        return state
    return jnp.zeros((x.shape[0], *x.shape[2:], B.shape[-1]), dt.dtype)
