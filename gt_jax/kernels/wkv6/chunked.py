"""WKV6 as matmuls over chunks, in plain JAX for any device.

In a chunk with incoming state S, E = exclusive prefix sum of w, F = exclusive suffix sum:

    A_ij = sum_k r_ik k_jk exp(sum of w over (j, i))   for i > j,     A_ii = r_i . (u * k_i)
    o = A v + (r exp(E)) S                              S' = exp(sum w) S + (k exp(F))^T v

The decay of A is split at the level that separates i and j (see chunks.py), whatever the decays
are. Inside blocks of 16 tokens each level is one matmul of Y_l = [r or k] * exp(x_l) with itself,
masked; at the levels above, the queries of one half block meet the keys of the other in a matmul of
their own. The backward pass recomputes all of this from the inputs; the gradient of a sum of w is
a product like r * dr, and that of w adds these up, without the difference of large sums that the
usual identity takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.kernels import checks, context_parallel
from gt_jax.kernels.chunks import (
    carry_chunks,
    cotangents_or_none,
    halves,
    level_sums,
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
from gt_jax.kernels.wkv6.reference import given_or_zeros

_CPU_NUMBERS = 2**16  # of r that a CPU works on at once
_BLOCK = 16  # tokens whose levels share matrices of this size

TAKES = None  # every floating dtype and size


def wkv6_chunked(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    precision: str,
    axis_name: str | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """WKV6 by chunks of chunk_size tokens, a power of two; the rest as in `wkv6_reference`."""
    B, T, H, K = r.shape
    if axis_name is not None:
        state = given_or_zeros(initial_state, r, k, v, w, u)
        initial_state = context_parallel.wkv6_state_before(
            k, v, w, state, resets, axis_name, precision
        )
    cpu_tokens = _CPU_NUMBERS // (H * K)
    dtype = checks.state_dtype(r, k, v, w, u) if initial_state is None else initial_state.dtype
    plan = make_plan(T, chunk_size, r.dtype, precision, dtype, batch=B, cpu_tokens=cpu_tokens)
    initial_state = zeros_if_none(initial_state, (B, H, K, v.shape[-1]), plan)
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
    return _forward(plan, r, k, v, w, u, state)[0]


def _forward(plan, r, k, v, w, u, state):
    def group(state, _, *inputs):
        o, final_state = _group_forward(*inputs, u, state, plan)
        return final_state, state, (o,)

    def rows(r, k, v, w, state):
        final_state, states, (o,) = scan_tokens(group, state, (r, k, v, w), plan)
        return o, final_state, states if states is None else states.swapaxes(0, 1)

    o, final_state, states = named(map_rows(rows, plan, r, k, v, w, state))
    return (o, final_state), (r, k, v, w, u, states)


def _backward(plan, residuals, cotangents):
    r, k, v, w, u, states = residuals
    do, dstate = cotangents_or_none(cotangents)
    do = jnp.zeros_like(v) if do is None else do
    B, _, H, K = r.shape
    if states is not None:
        dstate = jnp.zeros((B, H, K, v.shape[-1]), plan.dtype) if dstate is None else dstate

    def group(carry, state, *inputs):
        dstate, du = carry
        *grads, du_group, dstate = _group_backward(state, *inputs, u, dstate, plan)
        return (dstate, du + du_group), None, tuple(grads)

    def rows(states, r, k, v, w, do, dstate):
        carry = (dstate, jnp.zeros(u.shape, plan.dtype))
        per_group = None if states is None else states.swapaxes(0, 1)
        (dstate, du), _, grads = scan_tokens(
            group, carry, (r, k, v, w, do), plan, per_group=per_group, reverse=True
        )
        return *grads, du[None], None if states is None else dstate

    *grads, du, dstate = map_rows(rows, plan, states, r, k, v, w, do, dstate)
    return *grads, jnp.sum(du, axis=0).astype(u.dtype), dstate


_wkv6.defvjp(lambda *args: _forward(args[-1], *values(args[:-1])), _backward, symbolic_zeros=True)


def _blocks(x, block):
    """[..., C, X] -> [..., C / block, block, X]."""
    return x.reshape(*x.shape[:-2], -1, block, x.shape[-1])


def _in_half(x, which):
    """[..., n, b, X] -> [..., 2 n b, X]: x in the first (0) or second (1) half of each block."""
    zero = jnp.zeros_like(x)
    x = jnp.stack((x, zero) if which == 0 else (zero, x), axis=-3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _by_role(query, r, k):
    """r where a token is a query at a level, k where it is a key."""
    length = max(jnp.shape(r), jnp.shape(k), key=len)[-2]
    return jnp.where(np.resize(query, length)[:, None], r, k)


def _within(r, k, decays, block):
    """Y_l [..., n, block, K] of the levels inside blocks."""
    queries = levels(block).query
    return [_blocks(_by_role(q, r, k) * d, block) for q, d in zip(queries, decays, strict=True)]


def _group_forward(r, k, v, w, u, state, plan):
    """One group: r, k, w [M, B, H, C, K], v [M, B, H, C, V], state [B, H, K, V] or None."""
    dtype, block = plan.dtype, min(_BLOCK, plan.steps)
    dot = functools.partial(product, plan=plan, dtype=dtype)
    r, k, v32, u = (x.astype(dtype) for x in (r, k, v, u))
    decay = jax.tree.map(jnp.exp, level_sums(w.astype(dtype), block))

    products = (dot("...ik,...jk->...ij", Y, Y) for Y in _within(r, k, decay.within, block))
    A = sum(jnp.where(pair, p, 0) for pair, p in zip(levels(block).pair, products))
    o = dot("...ij,...jv->...iv", A, _blocks(v, block)).reshape(v.shape)
    update = dot("...ck,...cv->...kv", k * decay.to_end, v)
    if state is None:
        final_state = update[0]
    else:
        total = decay.total[..., None]
        states, final_state = carry_chunks(state, total, update, starts_dtype=plan.operand_dtype)
        o += dot("...ck,...kv->...cv", r * decay.from_start, states)
    for query, key in decay.above:
        Q, Kh = halves(r, query)[1] * query, halves(k, key)[0] * key
        A = dot("...ik,...jk->...ij", Q, Kh)
        o += _in_half(dot("...ij,...jv->...iv", A, halves(v, key)[0]), 1)
    own = sum_channels(r * u[:, None] * k)
    return (o + own * v32).astype(v.dtype), final_state


def _group_backward(state, r, k, v, w, do, u, dstate, plan):
    """Gradients of one group: dr, dk, dv, dw, du and that of the state it started from."""
    dtype, block = plan.dtype, min(_BLOCK, plan.steps)
    dot = functools.partial(product, plan=plan, dtype=dtype)
    r_, k_, v_, w_, do_, u_ = (x.astype(dtype) for x in (r, k, v, w, do, u))
    u_ = u_[:, None]  # [H, 1, K]
    sums = functools.partial(level_sums, block=block)
    decay = jax.tree.map(jnp.exp, sums(w_))

    own, down = sum_channels(r_ * u_ * k_), sum_channels(do_ * v_)
    dr, dk, dv = down * u_ * k_, down * u_ * r_, own * do_
    du = jnp.sum(down * r_ * k_, axis=(0, 1, 3))
    d_sums = jax.tree.map(jnp.zeros_like, decay)
    if state is not None or dstate is not None:
        if state is None:
            state = jnp.zeros_like(dstate)
        Q, Kh, total = r_ * decay.from_start, k_ * decay.to_end, decay.total[..., None]
        states, _ = carry_chunks(state, total, dot("...ck,...cv->...kv", Kh, v))
        dstates, dstate = carry_chunks(
            dstate, total, dot("...ck,...cv->...kv", Q, do), reverse=True
        )  # dstates[m] is the gradient of the state that leaves chunk m
        dr_state = dot("...cv,...kv->...ck", do, states) * decay.from_start
        dk_state = dot("...cv,...kv->...ck", v, dstates) * decay.to_end
        dr, dk, dv = dr + dr_state, dk + dk_state, dv + dot("...ck,...kv->...cv", Kh, dstates)
        d_total = decay.total * sum_channels(states * dstates)[..., 0]
        d_sums = d_sums._replace(from_start=r_ * dr_state, to_end=k_ * dk_state, total=d_total)

    level = levels(block)
    v_blocks, do_blocks = _blocks(v, block), _blocks(do, block)
    dA = dot("...iv,...jv->...ij", do_blocks, v_blocks)
    dA_T = dot("...jv,...iv->...ji", v_blocks, do_blocks)
    dA = jnp.where(np.tri(block, k=-1, dtype=bool), dA, dA_T)  # both ways round
    A_T, within = 0, []
    Ys = _within(r_, k_, decay.within, block)
    for pair, query, Y, d in zip(level.pair, level.query, Ys, decay.within):
        A_T += jnp.where(pair.T, dot("...ik,...jk->...ij", Y, Y), 0)
        dY = dot("...ij,...jk->...ik", jnp.where(pair | pair.T, dA, 0), Y)
        by_role = dY.reshape(d.shape) * d
        dr += _by_role(query, by_role, 0)
        dk += _by_role(query, 0, by_role)
        within.append(by_role * _by_role(query, r_, k_))
    dv += dot("...ji,...iv->...jv", A_T, do_blocks).reshape(dv.shape)

    above = []
    for query, key in decay.above:
        r_half, k_half = halves(r_, query)[1], halves(k_, key)[0]
        v_half, do_half = halves(v, key)[0], halves(do, query)[1]
        Q, Kh = r_half * query, k_half * key
        dv += _in_half(dot("...ji,...iv->...jv", dot("...jk,...ik->...ji", Kh, Q), do_half), 0)
        dQ = dot("...ij,...jk->...ik", dot("...iv,...jv->...ij", do_half, v_half), Kh) * query
        dKh = dot("...ji,...ik->...jk", dot("...jv,...iv->...ji", v_half, do_half), Q) * key
        dr += _in_half(dQ, 1)
        dk += _in_half(dKh, 0)
        above.append((r_half * dQ, k_half * dKh))
    (dw,) = jax.linear_transpose(sums, w_)(d_sums._replace(within=within, above=above))
    grads = (g.astype(x.dtype) for g, x in zip((dr, dk, dv, dw), (r, k, v, w)))
    return (*grads, du, dstate)
