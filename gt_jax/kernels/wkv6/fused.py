"""What is alike around all fused WKV6 kernels: segments, padding, splits, the gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gt_jax.kernels import checks
from gt_jax.kernels.chunks import cotangents_or_none, values
from gt_jax.kernels.pallas.launch import CHUNK, keep
from gt_jax.kernels.pallas.splits import count_maps
from gt_jax.kernels.wkv6.hopper_sizes import SIZE


class Kernels(NamedTuple):
    """The kernels for one kind of GPU, and what they ask of a call."""

    forward: Callable[..., Any]  # (r, k, v, w, u, state, save=) -> (o, final state, *saved)
    backward: Callable[..., Any]  # (r, k, v, w, u, *saved, do, dstate or None) -> gradients
    split_states: Callable[..., Any]  # (splits, x, v, w, state, reverse=, axis_name=) -> states
    dtypes: tuple[jnp.dtype, ...]  # of r, k and v
    tokens: int  # their number is a multiple of it
    width: Callable[[int], int]  # channels of a head -> channels in memory, at least as many
    splits: Callable[[jnp.dtype, int, int], int]  # dtype, B * H, chunks -> splits of a sequence

    @property
    def takes(self) -> str:
        """For which dtypes and sizes they are."""
        return f"{' or '.join(map(str, self.dtypes))}, K and V up to {SIZE}"


def call(
    kernels: Kernels,
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    precision: str,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """WKV6 by fused kernels; arguments and results as of `wkv6_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    state_dtype = checks.state_dtype(r, k, v, w, u)
    reason = _refusal(kernels, r, v, state_dtype, precision)
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
    splits = kernels.splits(r.dtype, r.shape[0] * r.shape[2], pl.cdiv(length, CHUNK))
    # Splits are whole chunks; the zeros that fill up tokens and channels change nothing.
    end = (0, -length % (kernels.tokens if splits == 1 else splits * CHUNK))
    as_rows = lambda z: z.reshape(z.shape[0] * splits, -1, *z.shape[2:])
    width = lambda z: (0, kernels.width(z.shape[-1]) - z.shape[-1])
    r, k, v, w = (as_rows(_pad(z, end, (0, 0), width(z))) for z in inputs)
    u = _pad(u.astype(jnp.float32), (0, SIZE - K))
    state = initial_state
    if state is not None:
        state = _pad(state, (0, SIZE - K), (0, SIZE - V)).mT  # [B, H, 64, 64], V before K
    o, final_state = _wkv6(kernels, splits, axis_name, r, k, v, w.astype(jnp.float32), u, state)
    o = o.reshape(-1, length + end[1], *o.shape[2:])  # [B, T padded, H, V padded]
    return o[:, :length, :, :V] + own, final_state.mT[..., :K, :V]


def _refusal(kernels, r, v, state_dtype, precision):
    """What of a call the kernels do not do, or None."""
    K, V = r.shape[-1], v.shape[-1]
    if r.dtype not in kernels.dtypes or state_dtype != jnp.float32:
        dtypes = " or ".join(map(str, kernels.dtypes))
        return (
            f"the kernel is for {dtypes} r with a float32 state; these are {r.dtype}, {state_dtype}"
        )
    if precision == "highest":
        return "the kernel multiplies bfloat16 terms; precision='highest' asks for float32"
    if max(K, V) > SIZE:
        return f"the kernel is for K and V up to {SIZE}; this call has K={K}, V={V}"
    return None


def _pad(z, *last):
    """z with its last axes padded by (before, after) zeros; z itself where there are none."""
    if not any(map(any, last)):
        return z
    return jnp.pad(z, ((0, 0),) * (z.ndim - len(last)) + last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _wkv6(kernels, splits, axis_name, *inputs):
    """o and final state.

    r, k, v, w are [batch * splits, T, H, up to 64 channels], u [H, 64], the state
    [batch, H, 64, 64] with V before K, or None for zeros.
    """
    return _wkv6_forward(kernels, splits, axis_name, *inputs, save=False)[0]


def _wkv6_forward(kernels, splits, axis_name, r, k, v, w, u, state, *, save=True):
    start = state
    if count_maps(splits, axis_name):
        start = kernels.split_states(splits, k, v, w, start, axis_name=axis_name)
    o, final_states, *saved = keep(kernels.forward(r, k, v, w, u, start, save=save))
    wanted = None if state is None else ()  # residuals tell apart by structure what is not traced
    return (o, final_states[splits - 1 :: splits]), (wanted, r, k, v, w, u, *saved)


def _wkv6_backward(kernels, splits, axis_name, residuals, cotangents):
    wanted, *residuals = residuals
    r, _, v, w, *_ = residuals
    do, dstate = cotangents_or_none(cotangents)
    do = jnp.zeros_like(v) if do is None else do
    if count_maps(splits, axis_name):
        dstate = kernels.split_states(splits, r, do, w, dstate, reverse=True, axis_name=axis_name)
    *grads, du, dstates = kernels.backward(*residuals, do, dstate)
    return *grads, jnp.sum(du, axis=0), None if wanted is None else dstates[::splits]


_wkv6.defvjp(
    lambda *args: _wkv6_forward(*args[:3], *values(args[3:])), _wkv6_backward, symbolic_zeros=True
)
