"""WKV6 as matmuls over chunks, in plain JAX for any device.

In a chunk with incoming state S, E = exclusive prefix sum of w, F = exclusive suffix sum:

    A_ij = sum_k r_ik k_jk exp(sum of w over (j, i))   for i > j,     A_ii = r_i . (u * k_i)
    o = A v + (r exp(E)) S                              S' = exp(sum w) S + (k exp(F))^T v

The decay of A is split at the level that separates i and j (see chunks.py), which turns each level
into one matmul of Y_l = [r or k] * exp(x_l) with itself, whatever the decays are. The backward pass
recomputes all of this from the inputs; the gradient of w is a sum of products Y * dY, without the
difference of large sums that the usual identity takes.
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

TAKES = None  # every floating dtype and size


def wkv6_chunked(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    initial_state: jax.Array,
    resets: jax.Array | None,
    precision: str,
    *,
    chunk_size: int = 16,
) -> tuple[jax.Array, jax.Array]:
    """WKV6 by chunks of chunk_size tokens, a power of two; the rest as in `wkv6_reference`."""
    plan = make_plan(r.shape[1], chunk_size, r.dtype, precision, initial_state.dtype)
    if resets is None:
        return _wkv6(r, k, v, w, u, initial_state, plan)
    # A token that starts a segment reads nothing but itself, and passes nothing earlier on.
    resets = resets[..., None, None]  # [B, T, 1, 1]
    own = jnp.sum((r * k).astype(u.dtype) * u, axis=-1, keepdims=True) * v  # [B, T, H, V]
    w = jnp.where(resets, -jnp.inf, w)
    o, final_state = _wkv6(jnp.where(resets, 0, r), k, v, w, u, initial_state, plan)
    return o + jnp.where(resets, own, 0).astype(o.dtype), final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _wkv6(r, k, v, w, u, state, plan):
    return _forward(r, k, v, w, u, state, plan)[0]


def _forward(r, k, v, w, u, state, plan):
    def group(state, inputs):
        o, final_state = _group_forward(*inputs, u, state, plan)
        return final_state, (o, state)

    groups = tuple(to_chunks(x, plan) for x in (r, k, v, w))
    final_state, (o, states) = scan_groups(group, state, groups)
    o, final_state, states = named(from_chunks(o, plan), final_state, states)
    return (o, final_state), (r, k, v, w, u, states)


def _backward(plan, residuals, cotangents):
    r, k, v, w, u, states = residuals
    do, dstate = cotangents

    def group(carry, inputs):
        dstate, du = carry
        *grads, du_group, dstate = _group_backward(*inputs, u, dstate, plan)
        return (dstate, du + du_group), tuple(grads)

    groups = (states, *(to_chunks(x, plan) for x in (r, k, v, w, do)))
    carry = (dstate, jnp.zeros(u.shape, dstate.dtype))
    (dstate, du), grads = scan_groups(group, carry, groups, reverse=True)
    dr, dk, dv, dw = (from_chunks(g, plan) for g in grads)
    return dr, dk, dv, dw, du.astype(u.dtype), dstate


_wkv6.defvjp(_forward, _backward)


def _decays(w, plan, dtype):
    """Factors exp(sum of w): per level [L, ..., C, K], from the start, to the end, and in total."""
    C = plan.steps
    w = jnp.maximum(w.astype(dtype), LOWEST_LOG_DECAY)
    decay = jnp.exp(exact("lts,bhmsk->lbhmtk", _sum_patterns(C), w))
    total = jnp.exp(jnp.sum(w, axis=-2))  # [B, H, M, K]
    return decay[:-2], decay[-2], decay[-1], total


@functools.cache
def _sum_patterns(C):
    """[L + 2, C, C]: the sums of each level, then those from the chunk's start and to its end."""
    from_start = np.tri(C, k=-1, dtype=bool)
    return np.concatenate([levels(C).before, [from_start, from_start.T]])


def _by_role(query, r, k):
    """[L, ..., C, K]: r where a token is a query at that level, k where it is a key."""
    return jnp.where(query[:, None, None, None, :, None], r, k)


def _intra(r, k, level_decay, plan, dtype):
    """Y [L, B, H, M, C, K] and the strictly lower part of A [B, H, M, C, C]."""
    level = levels(plan.steps)
    Y = (_by_role(level.query, r, k) * level_decay).astype(plan.operand_dtype)
    per_level = product("lbhmik,lbhmjk->lbhmij", Y, Y, plan=plan, dtype=dtype)
    A = sum(jnp.where(pair, a, 0) for pair, a in zip(level.pair, per_level))
    return Y, A


def _group_forward(r, k, v, w, u, state, plan):
    """One group: r, k, w [B, H, M, C, K], v [B, H, M, C, V], state [B, H, K, V]."""
    dtype = state.dtype
    r, k, v32, u = (x.astype(dtype) for x in (r, k, v, u))
    level_decay, from_start, to_end, total = _decays(w, plan, dtype)
    _, A = _intra(r, k, level_decay, plan, dtype)
    own = exact("bhmck,bhmck->bhmc", r * u[:, None, None], k)[..., None]
    update = product("bhmck,bhmcv->bhmkv", k * to_end, v, plan=plan, dtype=dtype)
    states, final_state = carry_state(state, total[..., None], update)
    o = product("bhmij,bhmjv->bhmiv", A, v, plan=plan, dtype=dtype)
    o += product("bhmck,bhmkv->bhmcv", r * from_start, states, plan=plan, dtype=dtype)
    return (o + own * v32).astype(v.dtype), final_state


def _group_backward(state, r, k, v, w, do, u, dstate, plan):
    """Gradients of one group: dr, dk, dv, dw, du and that of the state it started from."""
    dtype = dstate.dtype
    dot = functools.partial(product, plan=plan, dtype=dtype)
    r_, k_, v_, do_, u_ = (x.astype(dtype) for x in (r, k, v, do, u))
    u_ = u_[:, None, None]  # [H, 1, 1, K]

    level_decay, from_start, to_end, total = _decays(w, plan, dtype)
    Y, A = _intra(r_, k_, level_decay, plan, dtype)
    Q, Kh = r_ * from_start, k_ * to_end
    states, _ = carry_state(state, total[..., None], dot("bhmck,bhmcv->bhmkv", Kh, v))
    dstates, dstate = carry_state(
        dstate, total[..., None], dot("bhmck,bhmcv->bhmkv", Q, do), reverse=True
    )  # dstates[m] is the gradient of the state that leaves chunk m

    own = exact("bhmck,bhmck->bhmc", r_ * u_, k_)[..., None]
    down = exact("bhmcv,bhmcv->bhmc", do_, v_)[..., None]
    dv = dot("bhmij,bhmiv->bhmjv", A, do) + dot("bhmck,bhmkv->bhmcv", Kh, dstates) + own * do_
    dQ = dot("bhmcv,bhmkv->bhmck", do, states)
    dKh = dot("bhmcv,bhmkv->bhmck", v, dstates)

    level = levels(plan.steps)
    dA = dot("bhmiv,bhmjv->bhmij", do, v)
    dA = jnp.where(np.tri(plan.steps, k=-1, dtype=bool), dA, dA.mT)  # both ways round
    pair = (level.pair | level.pair.mT)[:, None, None, None]
    dY = dot("lbhmij,lbhmjk->lbhmik", jnp.where(pair, dA, 0), Y)
    by_role = dY * level_decay
    query = level.query[:, :, None]
    dr = dQ * from_start + down * u_ * k_
    dr += sum(jnp.where(q, d, 0) for q, d in zip(query, by_role))
    dk = dKh * to_end + down * u_ * r_
    dk += sum(jnp.where(q, 0, d) for q, d in zip(query, by_role))
    du = jnp.sum(down * r_ * k_, axis=(0, 2, 3))

    dsums = jnp.concatenate([Y.astype(dtype) * dY, (Q * dQ)[None], (Kh * dKh)[None]])
    dw = exact("lts,lbhmtk->bhmsk", _sum_patterns(plan.steps), dsums)
    dw += (total * exact("bhmkv,bhmkv->bhmk", states, dstates))[..., None, :]
    grads = (g.astype(x.dtype) for g, x in zip((dr, dk, dv, dw), (r, k, v, w)))
    return (*grads, du, dstate)
