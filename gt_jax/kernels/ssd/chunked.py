"""SSD as matmuls over chunks, in plain JAX for any device.

In a chunk with incoming state S, per head, with G = inclusive prefix sum of the log decay a and
F = exclusive suffix sum:

    L_ij = exp(sum of a over (j, i])  for i >= j,  else 0
    y = (L * C B^T) (dt x) + exp(G) (C S^T)         S' = exp(sum a) S + (exp(F) dt x)^T B

C B^T is shared by the heads of a group. The sums inside L are split at the level that separates i
and j (chunks.py), never taken as differences of prefix sums; the gradient of a sums the rectangle
i >= t > j of L * C B^T * d(...) directly, so it does not cancel either.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.kernels.chunks import (
    LOWEST_LOG_DECAY,
    carry_state,
    exact,
    from_chunks,
    levels,
    make_plan,
    named,
    product,
    scan_groups,
    to_chunks,
)
from gt_jax.kernels.ssd.reference import given_or_zeros

TAKES = None  # every floating dtype and size


def ssd_chunked(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    precision: str,
    *,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """SSD by chunks of chunk_size tokens, a power of two; the rest as in `ssd_reference`."""
    initial_state = given_or_zeros(initial_state, x, dt, B)
    plan = make_plan(x.shape[1], chunk_size, x.dtype, precision, initial_state.dtype)
    if resets is not None:
        a = jnp.where(resets[..., None], -jnp.inf, a)  # nothing earlier is passed on or read
    y, final_state = _ssd(x, dt, a, B, C, initial_state, plan)
    if D is not None:
        y += D.astype(y.dtype)[:, None] * x.astype(y.dtype)
    return y.astype(x.dtype), final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _ssd(x, dt, a, B, C, state, plan):
    return _forward(x, dt, a, B, C, state, plan)[0]


def _forward(x, dt, a, B, C, state, plan):
    def group(state, inputs):
        y, final_state = _group_forward(*inputs, state, plan)
        return final_state, (y, state)

    groups = tuple(to_chunks(z, plan) for z in (x, dt, a, B, C))
    final_state, (y, states) = scan_groups(group, state, groups)
    y, final_state, states = named(from_chunks(y, plan), final_state, states)
    return (y, final_state), (x, dt, a, B, C, states)


def _backward(plan, residuals, cotangents):
    *inputs, states = residuals
    dy, dstate = cotangents

    def group(dstate, group_inputs):
        *grads, dstate = _group_backward(*group_inputs, dstate, plan)
        return dstate, tuple(grads)

    groups = (states, *(to_chunks(z, plan) for z in (*inputs, dy)))
    dstate, grads = scan_groups(group, dstate, groups, reverse=True)
    return (*(from_chunks(g, plan) for g in grads), dstate)


_ssd.defvjp(_forward, _backward)


def _decays(a, plan):
    """L [..., C, C], and the factors from the chunk's start, to its end and in total [..., C]."""
    level, C = levels(plan.steps), plan.steps
    a = jnp.maximum(a, LOWEST_LOG_DECAY)
    sums = exact("lts,bgrms->lbgrmt", level.through, a)
    between = sum(
        jnp.where(pair, s[..., :, None] + s[..., None, :], 0) for pair, s in zip(level.pair, sums)
    )
    L = jnp.where(np.tri(C, dtype=bool), jnp.exp(between), 0)
    from_start = jnp.exp(exact("ts,bgrms->bgrmt", np.tri(C), a))
    to_end = jnp.exp(exact("ts,bgrms->bgrmt", np.tri(C, k=-1).T, a))
    return L, from_start, to_end, jnp.exp(jnp.sum(a, axis=-1))


def _by_group(z, groups):
    """[B, H, ...] -> [B, G, R, ...]: R heads share the projections of one group."""
    return z.reshape(z.shape[0], groups, -1, *z.shape[2:])


def _by_head(z):
    """[B, G, R, ...] -> [B, H, ...]."""
    return z.reshape(z.shape[0], -1, *z.shape[3:])


def _states(state, x, weight, B, total, dot):
    """State each chunk starts from [B, G, R, M, P, N], and the one after them [B, H, P, N]."""
    update = dot("bgrmjp,bgmjn->bgrmpn", x * weight[..., None], B)
    states, final = carry_state(state, _by_head(total)[..., None, None], _by_head(update))
    return _by_group(states, B.shape[1]), final


def _group_forward(x, dt, a, B, C, state, plan):
    """One group: x [B, H, M, C, P], dt and a [B, H, M, C], B and C [B, G, M, C, N]."""
    dtype = state.dtype
    dot = functools.partial(product, plan=plan, dtype=dtype)
    x_, dt, a = (_by_group(z.astype(dtype), B.shape[1]) for z in (x, dt, a))
    L, from_start, to_end, total = _decays(a, plan)
    states, final_state = _states(state, x_, to_end * dt, B, total, dot)
    CB = dot("bgmin,bgmjn->bgmij", C, B)[:, :, None]  # [B, G, 1, M, C, C]
    y = dot("bgrmij,bgrmjp->bgrmip", L * CB * dt[..., None, :], x_)
    y += dot("bgmin,bgrmpn->bgrmip", C, states) * from_start[..., None]
    return _by_head(y), final_state


def _group_backward(state, x, dt, a, B, C, dy, dstate, plan):
    """Gradients of one group: dx, ddt, da, dB, dC and that of the state it started from."""
    dtype, G, steps = dstate.dtype, B.shape[1], plan.steps
    dot = functools.partial(product, plan=plan, dtype=dtype)
    x_, dt_, a_, dy_ = (_by_group(z.astype(dtype), G) for z in (x, dt, a, dy))

    L, from_start, to_end, total = _decays(a_, plan)
    weight = to_end * dt_  # of a token in the outgoing state
    states, _ = _states(state, x_, weight, B, total, dot)
    read = dy_ * from_start[..., None]  # cotangent of C S^T
    dstates, dstate = carry_state(
        dstate,
        _by_head(total)[..., None, None],
        _by_head(dot("bgrmip,bgmin->bgrmpn", read, C)),
        reverse=True,
    )
    dstates = _by_group(dstates, G)  # dstates[m] is the gradient of the state that leaves chunk m

    LCB = L * dot("bgmin,bgmjn->bgmij", C, B)[:, :, None]
    dM = dot("bgrmip,bgrmjp->bgrmij", dy_, x_)  # gradient of L * C B^T * dt_j, the matrix of y
    kept = dot("bgmjn,bgrmpn->bgrmjp", B, dstates)  # gradient of weight * x
    dx = dot("bgrmij,bgrmip->bgrmjp", LCB, dy_) * dt_[..., None] + kept * weight[..., None]
    dCB = exact("r,bgrmij->bgmij", np.ones(L.shape[2]), L * dM * dt_[..., None, :])
    dC = dot("bgmij,bgmjn->bgmin", dCB, B) + dot("bgrmip,bgrmpn->bgmin", read, states)
    dB = dot("bgmij,bgmin->bgmjn", dCB, C)
    dB += dot("bgrmjp,bgrmpn->bgmjn", x_ * weight[..., None], dstates)

    d_weight = exact("bgrmjp,bgrmjp->bgrmj", kept, x_)
    d_dt_times_L = LCB * dM
    ddt = jnp.sum(d_dt_times_L, axis=-2) + d_weight * to_end

    # a_t decays every pair j < t <= i, reads at i >= t, tokens kept from j < t, and the state.
    # These sums stay exact: rounding their terms alike would add up over time in the gradient of A.
    earlier, later = np.tri(steps, k=-1).T, np.tri(steps).T  # [j, t]: j < t; [t, i]: i >= t
    by_end = exact("jt,bgrmij->bgrmit", earlier, d_dt_times_L * dt_[..., None, :])
    from_state = dot("bgmin,bgrmpn->bgrmip", C, states, terms=2)
    d_read = exact("bgrmip,bgrmip->bgrmi", from_state, read)
    da = jnp.sum(jnp.where(later.T > 0, by_end, 0), axis=-2)
    da += exact("ti,bgrmi->bgrmt", later, d_read)
    da += exact("jt,bgrmj->bgrmt", earlier, d_weight * weight)
    da += (total * exact("bgrmpn,bgrmpn->bgrm", states, dstates))[..., None]
    grads = (_by_head(dx), _by_head(ddt), _by_head(da), dB, dC)
    return (*(g.astype(z.dtype) for g, z in zip(grads, (x, dt, a, B, C))), dstate)
