"""WKV6, the recurrence of RWKV-6 (Finch; Peng et al. 2024, arXiv:2404.05892).

A matrix state per head decays by a data-dependent rate per key channel; the present token is read
through a bonus u instead of the state:

    o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
    S_t = diag(exp w_t) S_{t-1} + k_t v_t^T
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels import checks, context_parallel
from gt_jax.kernels.dispatch import dispatch


def wkv6(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    precision: str = "default",
    impl: str = "auto",
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """WKV6 over a sequence.

    Args:
        r: [B, T, H, K] receptance (query), any float dtype.
        k: [B, T, H, K] key, the dtype of r.
        v: [B, T, H, V] value, the dtype of r.
        w: [B, T, H, K] log decay, at most 0 (-inf forgets everything); float32 recommended.
            RWKV-6's raw decay omega gives w = -exp(omega).
        u: [H, K] bonus of the present token.
        initial_state: [B, H, K, V] state before the first token; zeros if None.
        segment_ids: [B, T] int; where an id differs from the token before, the state is zero before
            that token. initial_state belongs to the first segment, the final state to the last.
        precision: "default" multiplies in the dtype of r (bfloat16 with float32 accumulation, or
            float32, which "mosaic" takes as sums of two bfloat16 terms: good to 1e-5); "highest"
            multiplies in true float32 whatever the inputs.
        impl: "auto", "mosaic" (Pallas kernels for Hopper GPUs: bfloat16 or float32, K and V up to
            64), "portable" (the same for NVIDIA GPUs since compute capability 8.0: bfloat16, K and
            V up to 64), "chunked" or "reference".
        axis_name: of a shard_map axis whose devices hold consecutive stretches of T tokens each
            (context parallelism), or None. initial_state is then the state before the first
            device's tokens, the same on all, and so is the final state, after the last device's.

    Returns:
        o [B, T, H, V] in v.dtype, and the state after the last token [B, H, K, V] in float32
        (float64 for float64 inputs). Gradients flow to every array argument and from both results.
        There is no 1/sqrt(K) scale (flash-linear-attention's default has one).

    Raises:
        ValueError: shapes or dtypes disagree, or an explicit impl cannot run here (says why).
    """
    B, T, H, K = checks.rank("wkv6", r=(r, 4))
    V = checks.rank("wkv6", v=(v, 4))[-1]
    checks.shapes(
        "wkv6",
        k=(k, (B, T, H, K)),
        v=(v, (B, T, H, V)),
        w=(w, (B, T, H, K)),
        u=(u, (H, K)),
        initial_state=(initial_state, (B, H, K, V)),
        segment_ids=(segment_ids, (B, T)),
    )
    checks.same_float_dtype("wkv6", r=r, k=k, v=v)
    checks.precision("wkv6", precision)
    state_dtype = checks.state_dtype(r, k, v, w, u)
    state = None if initial_state is None else initial_state.astype(state_dtype)
    resets = context_parallel.resets(segment_ids, axis_name)
    if axis_name is None:
        return dispatch("wkv6", impl, r, k, v, w, u, state, resets, precision)
    if state is not None:
        state = context_parallel.of_first_device(state, axis_name)
    o, state = dispatch("wkv6", impl, r, k, v, w, u, state, resets, precision, axis_name)
    return o, context_parallel.of_last_device(state, axis_name)


def wkv6_step(
    r: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array, u: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """WKV6 for one token.

    Args:
        r, k, w: [B, H, K]; v: [B, H, V]; w is the log decay, at most 0.
        u: [H, K] bonus.
        state: [B, H, K, V] state before this token, float32.

    Returns:
        o [B, H, V] in v.dtype, and the state after the token, in the dtype of `state`.
    """
    r_, k_, v_, w_, u_ = (x.astype(state.dtype) for x in (r, k, v, w, u))
    kv = k_[..., :, None] * v_[..., None, :]  # [B, H, K, V]
    o = jnp.sum(r_[..., None] * (state + u_[..., None] * kv), axis=-2)  # [B, H, V]
    # Held together, or XLA would read the state once for each.
    o, state = jax.lax.optimization_barrier((o, jnp.exp(w_)[..., None] * state + kv))
    return o.astype(v.dtype), state
