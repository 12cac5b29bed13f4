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

from gt_jax.kernels.chunks import (
    carry_chunks,
    halves,
    level_sums,
    levels,
    make_plan,
    map_rows,
    named,
    product,
    scan_tokens,
    sum_channels,
)

_BLOCK = 16  # tokens whose levels share matrices of this size

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
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """WKV6 by chunks of chunk_size tokens, a power of two; the rest as in `wkv6_reference`."""
    B, T, H, K = r.shape
    width = H * max(K, v.shape[-1])
    plan = make_plan(
        T, chunk_size, r.dtype, precision, initial_state.dtype, batch=B, token_width=width
    )
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
    def group(state, _, *inputs):
        o, final_state = _group_forward(*inputs, u, state, plan)
        return final_state, state, (o,)

    def rows(r, k, v, w, state):
        final_state, states, (o,) = scan_tokens(group, state, (r, k, v, w), plan)
        return o, final_state, states.swapaxes(0, 1)

    o, final_state, states = map_rows(rows, plan, r, k, v, w, state)
    o, final_state, states = named(o, final_state, states)
    return (o, final_state), (r, k, v, w, u, states)


def _backward(plan, residuals, cotangents):
    r, k, v, w, u, states = residuals
    do, dstate = cotangents

    def group(carry, state, *inputs):
        dstate, du = carry
        *grads, du_group, dstate = _group_backward(state, *inputs, u, dstate, plan)
        return (dstate, du + du_group), None, tuple(grads)

    def rows(states, r, k, v, w, do, dstate):
        carry = (dstate, jnp.zeros(u.shape, dstate.dtype))
        (dstate, du), _, grads = scan_tokens(
            group, carry, (r, k, v, w, do), plan, per_group=states.swapaxes(0, 1), reverse=True
        )
        return *grads, du[None], dstate

    *grads, du, dstate = map_rows(rows, plan, states, r, k, v, w, do, dstate)
    return *grads, jnp.sum(du, axis=0).astype(u.dtype), dstate


_wkv6.defvjp(_forward, _backward)


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
    """One group: r, k, w [M, B, H, C, K], v [M, B, H, C, V], state [B, H, K, V]."""
    dtype, block = state.dtype, min(_BLOCK, plan.steps)
    dot = functools.partial(product, plan=plan, dtype=dtype)
    r, k, v32, u = (x.astype(dtype) for x in (r, k, v, u))
    decay = jax.tree.map(jnp.exp, level_sums(w.astype(dtype), block))

    update = dot("...ck,...cv->...kv", k * decay.to_end, v)
    total = decay.total[..., None]
    states, final_state = carry_chunks(state, total, update, starts_dtype=plan.operand_dtype)
    o = dot("...ck,...kv->...cv", r * decay.from_start, states)
    products = (dot("...ik,...jk->...ij", Y, Y) for Y in _within(r, k, decay.within, block))
    A = sum(jnp.where(pair, p, 0) for pair, p in zip(levels(block).pair, products))
    o += dot("...ij,...jv->...iv", A, _blocks(v, block)).reshape(o.shape)
    for query, key in decay.above:
        Q, Kh = halves(r, query)[1] * query, halves(k, key)[0] * key
        A = dot("...ik,...jk->...ij", Q, Kh)
        o += _in_half(dot("...ij,...jv->...iv", A, halves(v, key)[0]), 1)
    own = sum_channels(r * u[:, None] * k)
    return (o + own * v32).astype(v.dtype), final_state


def _group_backward(state, r, k, v, w, do, u, dstate, plan):
    """Gradients of one group: dr, dk, dv, dw, du and that of the state it started from."""
    dtype, block = dstate.dtype, min(_BLOCK, plan.steps)
    dot = functools.partial(product, plan=plan, dtype=dtype)
    r_, k_, v_, w_, do_, u_ = (x.astype(dtype) for x in (r, k, v, w, do, u))
    u_ = u_[:, None]  # [H, 1, K]
    sums = functools.partial(level_sums, block=block)
    decay = jax.tree.map(jnp.exp, sums(w_))
    log = jax.tree.map(jnp.zeros_like, decay)  # gradients of the sums

    Q, Kh = r_ * decay.from_start, k_ * decay.to_end
    total = decay.total[..., None]
    states, _ = carry_chunks(state, total, dot("...ck,...cv->...kv", Kh, v))
    dstates, dstate = carry_chunks(
        dstate, total, dot("...ck,...cv->...kv", Q, do), reverse=True
    )  # dstates[m] is the gradient of the state that leaves chunk m
    dr = dot("...cv,...kv->...ck", do, states) * decay.from_start
    dk = dot("...cv,...kv->...ck", v, dstates) * decay.to_end
    dv = dot("...ck,...kv->...cv", Kh, dstates)
    d_total = decay.total * sum_channels(states * dstates)[..., 0]
    log = log._replace(from_start=r_ * dr, to_end=k_ * dk, total=d_total)

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
    (dw,) = jax.linear_transpose(sums, w_)(log._replace(within=within, above=above))

    own, down = sum_channels(r_ * u_ * k_), sum_channels(do_ * v_)
    dr += down * u_ * k_
    dk += down * u_ * r_
    dv += own * do_
    du = jnp.sum(down * r_ * k_, axis=(0, 1, 3))
    grads = (g.astype(x.dtype) for g, x in zip((dr, dk, dv, dw), (r, k, v, w)))
    return (*grads, du, dstate)
