"""SSD, the recurrence of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).

A matrix state per head decays by one scalar per token; the read includes the present token:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T ;  y_t = S_t C_t + D x_t
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels import checks, context_parallel
from gt_jax.kernels.dispatch import dispatch


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    precision: str = "default",
    impl: str = "auto",
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """SSD over a sequence; the argument order is mamba_ssm's.

    Args:
        x: [B, T, H, P] input, any float dtype.
        dt: [B, T, H] step size, at least 0 once bias, softplus and limit are applied.
        A: [H] decay rate, below 0, float32 recommended.
        B: [B, T, G, N] input projection, shared by the H/G heads of a group; the dtype of x.
        C: [B, T, G, N] output projection; the dtype of x.
        D: [H] skip connection, or None.
        dt_bias: [H] added to dt first, or None.
        dt_softplus: apply softplus to dt (after the bias).
        dt_limit: (low, high), dt is clipped to it last.
        initial_state: [B, H, P, N] state before the first token; zeros if None.
        segment_ids: [B, T] int; where an id differs from the token before, the state is zero before
            that token. initial_state belongs to the first segment, the final state to the last.
        precision: "default" multiplies in the dtype of x (bfloat16 with float32 accumulation, or
            float32, which "mosaic" takes as sums of bfloat16 terms: good to 1e-5); "highest"
            multiplies in true float32 whatever the inputs.
        impl: "auto", "mosaic" (Pallas kernels for Hopper GPUs: bfloat16 or float32, P = 64, N = 64
            or 128), "portable" (the same for NVIDIA GPUs since compute capability 8.0: bfloat16,
            any P and N), "chunked" or "reference".
        axis_name: of a shard_map axis whose devices hold consecutive stretches of T tokens each
            (context parallelism), or None. initial_state is then the state before the first
            device's tokens, the same on all, and so is the final state, after the last device's.

    Returns:
        y [B, T, H, P] in x.dtype, and the state after the last token [B, H, P, N] in float32
        (float64 for float64 inputs). Gradients flow to every array argument and from both results.

    Raises:
        ValueError: shapes or dtypes disagree, or an explicit impl cannot run here (says why).
    """
    batch, T, H, P = checks.rank("ssd", x=(x, 4))
    G, N = checks.rank("ssd", B=(B, 4))[2:]
    checks.shapes(
        "ssd",
        dt=(dt, (batch, T, H)),
        A=(A, (H,)),
        B=(B, (batch, T, G, N)),
        C=(C, (batch, T, G, N)),
        D=(D, (H,)),
        dt_bias=(dt_bias, (H,)),
        initial_state=(initial_state, (batch, H, P, N)),
        segment_ids=(segment_ids, (batch, T)),
    )
    if H % G:
        raise ValueError(f"ssd: heads={H} (axis 2 of x) must be a multiple of groups={G} (of B)")
    checks.same_float_dtype("ssd", x=x, B=B, C=C)
    checks.precision("ssd", precision)
    state_dtype = checks.state_dtype(x, dt, A, B, C)
    if initial_state is not None:
        initial_state = initial_state.astype(state_dtype)
    dt = _step_size(dt, dt_bias, dt_softplus, dt_limit, state_dtype)
    resets = context_parallel.resets(segment_ids, axis_name)
    A = A.astype(state_dtype)
    if axis_name is None:
        return dispatch("ssd", impl, x, dt, A, B, C, D, initial_state, resets, precision)
    if initial_state is not None:
        initial_state = context_parallel.of_first_device(initial_state, axis_name)
    y, state = dispatch("ssd", impl, x, dt, A, B, C, D, initial_state, resets, precision, axis_name)
    return y, context_parallel.of_last_device(state, axis_name)


def ssd_step(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    *,
    D: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[jax.Array, jax.Array]:
    """SSD for one token.

    Args:
        x: [B, H, P] input; dt: [B, H] step size; A: [H] decay rate; B, C: [B, G, N].
        D, dt_bias, dt_softplus, dt_limit: as in `ssd`.
        state: [B, H, P, N] state before this token, float32.

    Returns:
        y [B, H, P] in x.dtype, and the state after the token, in the dtype of `state`.
    """
    dtype = state.dtype
    heads_per_group = x.shape[1] // B.shape[1]
    dt = _step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    B, C = (jnp.repeat(z.astype(dtype), heads_per_group, axis=1) for z in (B, C))  # [B, H, N]
    decay = jnp.exp(dt * A.astype(dtype))[..., None, None]
    xB = (dt[..., None] * x.astype(dtype))[..., :, None] * B[..., None, :]  # [B, H, P, N]
    state = decay * state + xB
    y = jnp.sum(state * C[..., None, :], axis=-1)  # [B, H, P]
    if D is not None:
        y += D.astype(dtype)[:, None] * x.astype(dtype)
    return y.astype(x.dtype), state


def _step_size(dt, bias, softplus, limit, dtype):
    """dt after bias, softplus and limit, in the dtype of the state."""
    dt = dt.astype(dtype)
    if bias is not None:
        dt = dt + bias.astype(dtype)
    if softplus:
        dt = jax.nn.softplus(dt)
    if tuple(limit) != (0.0, float("inf")):
        dt = jnp.clip(dt, *limit)
    return dt
