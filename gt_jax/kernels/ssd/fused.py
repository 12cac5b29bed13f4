"""What is alike around all fused SSD kernels: padding, splits, the gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gt_jax.kernels.chunks import cotangents_or_none, values
from gt_jax.kernels.pallas.launch import CHUNK, keep, row_major
from gt_jax.kernels.pallas.splits import count_maps, states_of_splits
from gt_jax.kernels.ssd.decay_sums import decay_sums
from gt_jax.kernels.ssd.hopper_sizes import Sizes, sizes_of
from gt_jax.kernels.ssd.reference import log_decay

_P, _N = 64, (64, 128)
SIZES = f"P={_P} and N={' or '.join(map(str, _N))}"


class Kernels(NamedTuple):
    """The kernels for one kind of GPU, and what they ask of a call."""

    forward: Callable[..., Any]  # (x, B, C, g, dt, D, state, save=) -> (y, final state, *saved)
    # (size, x, B, C, g, dt, D, *saved, dy, dstate or None, of_start=) -> gradients
    backward: Callable[..., Any]
    # (size, splits, x, B, g, dt, state, reverse=, axis_name=) -> states
    split_states: Callable[..., Any]
    dtypes: tuple[jnp.dtype, ...]  # of x, B and C
    tokens: int  # their number is a multiple of it
    splits: Callable[[Sizes], int]  # of a sequence


def call(
    kernels: Kernels,
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
    """SSD by fused kernels; arguments and results as of `ssd_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    reason = _refusal(kernels, x, dt, B, precision)
    if reason is not None:
        raise NotImplementedError(reason)
    D = jnp.zeros(x.shape[2], jnp.float32) if D is None else D.astype(jnp.float32)
    length = x.shape[1]
    size = sizes_of(x, B)
    splits = kernels.splits(size)
    # Splits are whole chunks.
    end = (0, -length % (kernels.tokens if splits == 1 else splits * max(CHUNK, kernels.tokens)))
    per_token = (x, dt, B, C, resets, None if a.ndim == 1 else a)
    x, dt, B, C, resets, log_decays = (
        None if z is None else _as_rows(z, end, splits) for z in per_token
    )
    a = a if log_decays is None else log_decays
    y, final_state = _ssd(kernels, splits, axis_name, x, dt, a, B, C, D, resets, initial_state)
    return y.reshape(-1, length + end[1], *y.shape[2:])[:, :length], final_state


def _as_rows(z, end, splits):
    """[B, T, ...] -> [B * splits, T / splits, ...] after padding."""
    if end != (0, 0):
        z = jnp.pad(z, ((0, 0), end) + ((0, 0),) * (z.ndim - 2))
    return z.reshape(z.shape[0] * splits, -1, *z.shape[2:])


def _refusal(kernels, x, dt, B, precision):
    """What of a call the kernel does not do, or None; states have the dtype of dt."""
    P, N = x.shape[-1], B.shape[-1]
    if x.dtype not in kernels.dtypes or dt.dtype != jnp.float32:
        dtypes = " or ".join(map(str, kernels.dtypes))
        return f"the kernel is for {dtypes} x with a float32 state; these are {x.dtype}, {dt.dtype}"
    if precision == "highest":
        return "the kernel multiplies bfloat16 terms; precision='highest' asks for float32"
    if P != _P or N not in _N:
        return f"the kernel is for {SIZES}; this call has P={P}, N={N}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ssd(kernels, splits, axis_name, *arrays):
    """y and final state; whatever has tokens has the splits as rows of the batch."""
    return _ssd_forward(kernels, splits, axis_name, *arrays, save=False)[0]


def _ssd_forward(kernels, splits, axis_name, x, dt, a, B, C, D, resets, state, *, save=True):
    size, rates = sizes_of(x, B), a if a.ndim == 1 else None
    if resets is not None:  # nothing earlier is passed on or read
        a = jnp.where(resets[..., None], -jnp.inf, log_decay(dt, a))
    g, dt = decay_sums(size, dt, a.astype(jnp.float32))
    start = state
    if count_maps(splits, axis_name):
        start = kernels.split_states(size, splits, x, B, g, dt, start, axis_name=axis_name)
    y, final, *states = keep(kernels.forward(x, B, C, g, dt, D, start, save=save))
    wanted = None if state is None else ()  # residuals tell apart by structure what is not traced
    return (y, final[splits - 1 :: splits]), (x, B, C, g, dt, rates, D, wanted, states)


def _ssd_backward(kernels, splits, axis_name, residuals, cotangents):
    x, B, C, g, dt, rates, D, wanted, states = residuals
    size = sizes_of(x, B)
    dy, dstate = cotangents_or_none(cotangents)
    dy = jnp.zeros_like(x) if dy is None else dy
    if count_maps(splits, axis_name):
        dstate = kernels.split_states(
            size, splits, dy, C, g, None, dstate, reverse=True, axis_name=axis_name
        )
    dx, dB, dC, ddt, da, dD, *dstart = kernels.backward(
        size, x, B, C, g, dt, D, *states, dy, dstate, of_start=wanted is not None
    )
    dB, dC = (_sum_chains(z, size).astype(B.dtype) for z in (dB, dC))
    # The log decay of a reset is a constant, and da is 0 there, as all that a token decays is.
    if rates is None:
        da = _by_token(da, size)
    else:
        ddt += da * rates[:, None, None]
        # [H], by way of [B, H, chunks]: in one step XLA would join the sum with the transpose of
        # ddt, and few threads would walk all tokens (H200, 64 x 64 tokens: 50 us a layer).
        da = jnp.sum(jax.lax.optimization_barrier(jnp.sum(da * dt, axis=3)), axis=(0, 2))
    dstate = dstart[0][::splits] if dstart else None
    return dx, _by_token(ddt, size), da, dB, dC, jnp.sum(dD, axis=(0, 2)), None, dstate


_ssd.defvjp(
    lambda *args: _ssd_forward(*args[:3], *values(args[3:])), _ssd_backward, symbolic_zeros=True
)


def _by_token(z, size):
    """[B, H, chunks, CHUNK] -> [B, T, H]."""
    z = z.reshape(size.batch, size.heads, -1).transpose(0, 2, 1)[:, : size.length]
    # Row-major, or XLA, where a transpose is all there is to do, would lay out as its operand all
    # that is computed from it.
    return row_major(z)


def _sum_chains(z, size):
    """[B, T, chains, N] -> [B, T, G, N], summed over the chains of a group."""
    z = z[:, : size.length].reshape(size.batch, size.length, size.groups, -1, size.N)
    return jnp.sum(z, axis=3)


def states_between(size, splits, additions, x, B, g, dt, state, *, reverse, axis_name):
    """The state that each split starts from (ends with if reverse); see hopper_splits.py.

    additions: (size, splits, maps, x, B, g, dt, reverse) -> what the first `maps` splits of each
        row (last if reverse) add to their states, [rows, H, P, N] float32.
    """
    decay = jnp.exp2(jnp.sum(g[..., -1], axis=(-2, -1)))  # [batch * splits, H]
    maps = count_maps(splits, axis_name)
    mapped = slice(splits - maps, None) if reverse else slice(maps)
    decay = decay.reshape(-1, splits, size.heads)[:, mapped]
    decay = decay.swapaxes(1, 2)[..., None, None]  # [batch, H, maps, 1, 1]
    update = additions(size, splits, maps, x, B, g, dt, reverse)
    update = update.reshape(-1, maps, *update.shape[1:]).swapaxes(1, 2)  # [batch, H, maps, P, N]
    return states_of_splits(decay, update, state, reverse=reverse, axis_name=axis_name)
