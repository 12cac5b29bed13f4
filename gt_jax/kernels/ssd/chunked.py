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

from gt_jax.kernels import context_parallel
from gt_jax.kernels.chunks import (
    LOWEST_LOG_DECAY,
    carry_chunks,
    cotangents_or_none,
    exact,
    levels,
    make_plan,
    map_rows,
    named,
    product,
    scan_tokens,
    sum_channels,
    values,
    zeros_if_none,
)
from gt_jax.kernels.ssd.reference import log_decay

_CPU_NUMBERS = 2**17  # of x that a CPU works on at once

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
    axis_name: str | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """SSD by chunks of chunk_size tokens, a power of two; the rest as in `ssd_reference`."""
    a = log_decay(dt, a)
    if axis_name is not None:
        initial_state = context_parallel.ssd_state_before(
            x, dt, a, B, initial_state, resets, axis_name, precision
        )
    batch, T, H, P = x.shape
    plan = make_plan(
        T, chunk_size, x.dtype, precision, dt.dtype, batch=batch, cpu_tokens=_CPU_NUMBERS // (H * P)
    )
    initial_state = zeros_if_none(initial_state, (batch, H, P, B.shape[-1]), plan)
    if resets is not None:
        a = jnp.where(resets[..., None], -jnp.inf, a)  # nothing earlier is passed on or read
    return _ssd(x, dt, a, B, C, D, initial_state, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _ssd(x, dt, a, B, C, D, state, plan):
    return _forward(plan, x, dt, a, B, C, D, state)[0]


def _forward(plan, x, dt, a, B, C, D, state):
    def group(state, _, *inputs):
        y, final_state = _group_forward(*inputs, D, state, plan)
        return final_state, state, (y,)

    def rows(x, dt, a, B, C, state):
        final_state, states, (y,) = scan_tokens(group, state, (x, dt, a, B, C), plan)
        return y, final_state, states if states is None else states.swapaxes(0, 1)

    y, final_state, states = named(map_rows(rows, plan, x, dt, a, B, C, state))
    return (y, final_state), (x, dt, a, B, C, D, states)


def _backward(plan, residuals, cotangents):
    *inputs, D, states = residuals
    dy, dstate = cotangents_or_none(cotangents)
    x, B = inputs[0], inputs[3]
    dy = jnp.zeros_like(x) if dy is None else dy
    if states is not None:
        shape = (x.shape[0], *x.shape[2:], B.shape[-1])
        dstate = jnp.zeros(shape, plan.dtype) if dstate is None else dstate

    def group(carry, state, *inputs):
        dstate, dD = carry
        *grads, dD_group, dstate = _group_backward(state, *inputs, D, dstate, plan)
        return (dstate, None if D is None else dD + dD_group), None, tuple(grads)

    def rows(states, dstate, *arrays):
        carry = (dstate, None if D is None else jnp.zeros(D.shape, plan.dtype))
        per_group = None if states is None else states.swapaxes(0, 1)
        (dstate, dD), _, grads = scan_tokens(
            group, carry, arrays, plan, per_group=per_group, reverse=True
        )
        return *grads, None if D is None else dD[None], None if states is None else dstate

    *grads, dD, dstate = map_rows(rows, plan, states, dstate, *inputs, dy)
    dD = None if D is None else jnp.sum(dD, axis=0).astype(D.dtype)
    return *grads, dD, dstate


_ssd.defvjp(lambda *args: _forward(args[-1], *values(args[:-1])), _backward, symbolic_zeros=True)


def _decays(a, plan):
    """L [..., C, C], and the factors from the chunk's start, to its end and in total [..., C]."""
    level, C = levels(plan.steps), plan.steps
    a = jnp.maximum(a, LOWEST_LOG_DECAY)
    sums = exact("lts,...s->l...t", level.through, a)
    between = sum(
        jnp.where(pair, s[..., :, None] + s[..., None, :], 0) for pair, s in zip(level.pair, sums)
    )
    L = jnp.where(np.tri(C, dtype=bool), jnp.exp(between), 0)
    from_start = jnp.exp(exact("ts,...s->...t", np.tri(C), a))
    to_end = jnp.exp(exact("ts,...s->...t", np.tri(C, k=-1).T, a))
    return L, from_start, to_end, jnp.exp(jnp.sum(a, axis=-1))


def _by_group(z, groups):
    """[M, B, H, ...] -> [M, B, G, R, ...]: R heads share the projections of one group."""
    return z.reshape(*z.shape[:2], groups, -1, *z.shape[3:])


def _by_head(z):
    """[M, B, G, R, ...] -> [M, B, H, ...]."""
    return z.reshape(*z.shape[:2], -1, *z.shape[4:])


def _carry(state, total, update, **options):
    """State each chunk starts from [M, B, G, R, P, N], and the one after them [B, H, P, N]."""
    decay, G = _by_head(total)[..., None, None], update.shape[2]
    states, final = carry_chunks(state, decay, _by_head(update), **options)
    return _by_group(states, G), final


def _group_forward(x, dt, a, B, C, D, state, plan):
    """One group: x [M, B, H, C, P], dt and a [M, B, H, C], B and C [M, B, G, C, N]."""
    dtype = plan.dtype
    dot = functools.partial(product, plan=plan, dtype=dtype)
    x_, dt, a = (_by_group(z.astype(dtype), B.shape[2]) for z in (x, dt, a))
    L, from_start, to_end, total = _decays(a, plan)
    CB = dot("...in,...jn->...ij", C, B)[..., None, :, :]  # [M, B, G, 1, C, C]
    y = dot("...rij,...rjp->...rip", L * CB * dt[..., None, :], x_)
    update = dot("...rjp,...jn->...rpn", x_ * (to_end * dt)[..., None], B)
    if state is None:
        final_state = _by_head(update)[0]
    else:
        states, final_state = _carry(state, total, update, starts_dtype=plan.operand_dtype)
        y += dot("...in,...rpn->...rip", C, states) * from_start[..., None]
    y = _by_head(y)
    if D is not None:
        y += D.astype(dtype)[:, None, None] * x.astype(dtype)
    return y.astype(x.dtype), final_state


def _group_backward(state, x, dt, a, B, C, dy, D, dstate, plan):
    """Gradients of one group: dx, ddt, da, dB, dC, dD and that of the state it started from."""
    dtype, G, steps = plan.dtype, B.shape[2], plan.steps
    dot = functools.partial(product, plan=plan, dtype=dtype)
    x_, dt_, a_, dy_ = (_by_group(z.astype(dtype), G) for z in (x, dt, a, dy))
    L, from_start, to_end, total = _decays(a_, plan)
    earlier, later = np.tri(steps, k=-1).T, np.tri(steps).T  # [j, t]: j < t; [t, i]: i >= t

    LCB = L * dot("...in,...jn->...ij", C, B)[..., None, :, :]
    dM = dot("...ip,...jp->...ij", dy_, x_)  # gradient of L * C B^T * dt_j, the matrix of y
    dx = dot("...ij,...ip->...jp", LCB, dy_) * dt_[..., None]
    dCB = exact("r,...rij->...ij", np.ones(L.shape[-3]), L * dM * dt_[..., None, :])
    dC = dot("...ij,...jn->...in", dCB, B)
    dB = dot("...ij,...in->...jn", dCB, C)
    d_dt_times_L = LCB * dM
    ddt = jnp.sum(d_dt_times_L, axis=-2)
    # a_t decays every pair j < t <= i, reads at i >= t, tokens kept from j < t, and the state.
    # These sums stay exact: rounding their terms alike would add up over time in the gradient of A.
    by_end = exact("jt,...ij->...it", earlier, d_dt_times_L * dt_[..., None, :])
    da = jnp.sum(jnp.where(later.T > 0, by_end, 0), axis=-2)

    if state is not None or dstate is not None:
        state = jnp.zeros_like(dstate) if state is None else state
        weight = to_end * dt_  # of a token in the outgoing state
        kept_x, read = x_ * weight[..., None], dy_ * from_start[..., None]  # of C S^T, a cotangent
        states, _ = _carry(state, total, dot("...rjp,...jn->...rpn", kept_x, B))
        dstates, dstate = _carry(dstate, total, dot("...rip,...in->...rpn", read, C), reverse=True)
        # dstates[m] is the gradient of the state that leaves chunk m
        kept = dot("...jn,...rpn->...rjp", B, dstates)  # gradient of weight * x
        dx += kept * weight[..., None]
        dC += dot("...rip,...rpn->...in", read, states)
        dB += dot("...rjp,...rpn->...jn", kept_x, dstates)
        d_weight = sum_channels(kept * x_)[..., 0]
        ddt += d_weight * to_end
        from_state = dot("...in,...rpn->...rip", C, states, terms=2)
        d_read = sum_channels(from_state * read)[..., 0]
        da += exact("ti,...i->...t", later, d_read)
        da += exact("jt,...j->...t", earlier, d_weight * weight)
        of_state = states * dstates  # [M, B, G, R, P, N]
        da += (total * sum_channels(of_state.reshape(*total.shape, -1))[..., 0])[..., None]
    dx, dD = _by_head(dx), None
    if D is not None:
        dx += D.astype(dtype)[:, None, None] * _by_head(dy_)
        dD = jnp.sum(sum_channels(dy_ * x_), axis=(0, 1, 4, 5)).reshape(-1)  # [H]
    grads = (dx, _by_head(ddt), _by_head(da), dB, dC)
    return (*(g.astype(z.dtype) for g, z in zip(grads, (x, dt, a, B, C))), dD, dstate)
