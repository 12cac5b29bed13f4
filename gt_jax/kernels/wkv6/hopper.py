"""WKV6 on Hopper GPUs: what the kernels take, how inputs are cut and padded, and the gradient.

The kernels are in hopper_forward.py, hopper_backward.py and, for long sequences of few heads,
hopper_splits.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas.launch import CHUNK, keep
from gt_jax.kernels.pallas.splits import choose_splits
from gt_jax.kernels.pallas.terms import TERMS
from gt_jax.kernels.wkv6.hopper_backward import backward
from gt_jax.kernels.wkv6.hopper_forward import forward
from gt_jax.kernels.wkv6.hopper_sizes import SIZE, TUNING
from gt_jax.kernels.wkv6.hopper_splits import split_states

_DTYPES = " or ".join(map(str, TERMS))
TAKES = f"{_DTYPES}, K and V up to {SIZE}"


def wkv6_mosaic(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    initial_state: jax.Array,
    resets: jax.Array | None,
    precision: str,
) -> tuple[jax.Array, jax.Array]:
    """WKV6 on a Hopper GPU; arguments and results as of `wkv6_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    reason = _refusal(r, v, initial_state, precision)
    if reason is not None:
        raise NotImplementedError(reason)
    length, K, V = r.shape[1], r.shape[-1], v.shape[-1]
    inputs, own = (r, k, v, w), 0
    if resets is not None:
        # A token that starts a segment reads nothing but itself, and passes nothing earlier on.
        resets = resets[..., None, None]  # [B, T, 1, 1]
        own = jnp.sum((r * k).astype(u.dtype) * u, axis=-1, keepdims=True) * v  # [B, T, H, V]
        own = jnp.where(resets, own, 0).astype(v.dtype)
        inputs = (jnp.where(resets, 0, r), k, v, jnp.where(resets, -jnp.inf, w))
    blocks = pl.cdiv(r.shape[0] * r.shape[2], TUNING[TERMS[r.dtype]].heads)
    splits = choose_splits(blocks, pl.cdiv(length, CHUNK))
    # Splits are whole chunks, and bulk copies move at least 8 rows; the zeros that fill up tokens
    # and channels change nothing.
    end = (0, -length % (8 if splits == 1 else splits * CHUNK))
    as_rows = lambda z: z.reshape(z.shape[0] * splits, -1, *z.shape[2:])
    width = lambda z: (0, _width(z.shape[-1]) - z.shape[-1])
    r, k, v, w = (as_rows(_pad(z, end, (0, 0), width(z))) for z in inputs)
    u = _pad(u.astype(jnp.float32), (0, SIZE - K))
    state = _pad(initial_state, (0, SIZE - K), (0, SIZE - V)).mT  # [B, H, 64, 64], V before K
    o, final_state = _wkv6(splits, r, k, v, w.astype(jnp.float32), u, state)
    o = o.reshape(-1, length + end[1], *o.shape[2:])  # [B, T padded, H, V padded]
    return o[:, :length, :, :V] + own, final_state.mT[..., :K, :V]


def _refusal(r, v, state, precision):
    """What of a call the kernel does not do, or None."""
    K, V = r.shape[-1], v.shape[-1]
    if r.dtype not in TERMS or state.dtype != jnp.float32:
        return (
            f"the kernel is for {_DTYPES} r with a float32 state; "
            f"these are {r.dtype}, {state.dtype}"
        )
    if precision == "highest":
        return "the kernel multiplies bfloat16 terms; precision='highest' asks for float32"
    if max(K, V) > SIZE:
        return f"the kernel is for K and V up to {SIZE}; this call has K={K}, V={V}"
    return None


def _width(channels):
    """The channels that bulk copies move for a head of so many: powers of two from 8 up."""
    return max(8, pl.next_power_of_2(channels))


def _pad(z, *last):
    """z with its last axes padded by (before, after) zeros; z itself where there are none."""
    if not any(map(any, last)):
        return z
    return jnp.pad(z, ((0, 0),) * (z.ndim - len(last)) + last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv6(splits, *inputs):
    """o and final state.

    r, k, v, w are [batch * splits, T, H, 8 to 64 channels], u [H, 64], the state [batch, H, 64, 64]
    with V before K.
    """
    return _wkv6_forward(splits, *inputs, save=False)[0]


def _wkv6_forward(splits, r, k, v, w, u, state, *, save=True):
    if splits > 1:
        state = split_states(splits, k, v, w, state)
    o, final_states, *saved = keep(forward(r, k, v, w, u, state, save=save))
    return (o, final_states[splits - 1 :: splits]), (r, k, v, w, u, *saved)


def _wkv6_backward(splits, residuals, cotangents):
    r, _, _, w, *_ = residuals
    do, dstate = cotangents
    if splits > 1:
        dstate = split_states(splits, r, do, w, dstate, reverse=True)
    *grads, du, dstates = backward(*residuals, do, dstate)
    return *grads, jnp.sum(du, axis=0), dstates[::splits]


_wkv6.defvjp(_wkv6_forward, _wkv6_backward)
