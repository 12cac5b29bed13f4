"""SSD on Hopper GPUs: what the kernels take, how inputs are cut and padded, and the gradient.

The kernels are in hopper_forward.py, hopper_backward_bfloat16.py, hopper_backward_float32.py and,
for long sequences of few heads, hopper_splits.py.
"""

import functools

import jax
import jax.numpy as jnp

from gt_jax.kernels.pallas.launch import CHUNK, keep
from gt_jax.kernels.pallas.splits import choose_splits
from gt_jax.kernels.pallas.terms import TERMS
from gt_jax.kernels.ssd.hopper_backward import ROWS, backward
from gt_jax.kernels.ssd.hopper_decays import by_chunk, by_token, log2_decays
from gt_jax.kernels.ssd.hopper_forward import forward
from gt_jax.kernels.ssd.hopper_sizes import sizes_of
from gt_jax.kernels.ssd.hopper_splits import split_states

_DTYPES = " or ".join(map(str, TERMS))
_P, _N = 64, (64, 128)
_SIZES = f"P={_P} and N={' or '.join(map(str, _N))}"
TAKES = f"{_DTYPES}, {_SIZES}"


def ssd_mosaic(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    initial_state: jax.Array | None,
    resets: jax.Array | None,
    precision: str,
) -> tuple[jax.Array, jax.Array]:
    """SSD on a Hopper GPU; arguments and results as of `ssd_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    reason = _refusal(x, dt, B, precision)
    if reason is not None:
        raise NotImplementedError(reason)
    if resets is not None:
        a = jnp.where(resets[..., None], -jnp.inf, a)  # nothing earlier is passed on or read
    D = jnp.zeros(x.shape[2], jnp.float32) if D is None else D.astype(jnp.float32)
    length = x.shape[1]
    size = sizes_of(x, B)
    splits = choose_splits(size.batch * size.blocks, size.chunks)
    # Splits are whole chunks, and bulk copies move at least 8 rows.
    end = (0, -length % (8 if splits == 1 else splits * CHUNK))
    x, dt, a, B, C = (_as_rows(z, end, splits) for z in (x, dt, a, B, C))
    y, final_state = _ssd(splits, x, dt, a, B, C, D, initial_state)
    return y.reshape(-1, length + end[1], *y.shape[2:])[:, :length], final_state


def _as_rows(z, end, splits):
    """[B, T, ...] -> [B * splits, T / splits, ...] after padding."""
    if end != (0, 0):
        z = jnp.pad(z, ((0, 0), end) + ((0, 0),) * (z.ndim - 2))
    return z.reshape(z.shape[0] * splits, -1, *z.shape[2:])


def _refusal(x, dt, B, precision):
    """What of a call the kernel does not do, or None; states have the dtype of dt."""
    P, N = x.shape[-1], B.shape[-1]
    if x.dtype not in TERMS or dt.dtype != jnp.float32:
        return (
            f"the kernel is for {_DTYPES} x with a float32 state; these are {x.dtype}, {dt.dtype}"
        )
    if precision == "highest":
        return "the kernel multiplies bfloat16 terms; precision='highest' asks for float32"
    if P != _P or N not in _N:
        return f"the kernel is for {_SIZES}; this call has P={P}, N={N}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(splits, x, dt, a, B, C, D, state):
    """y and final state; x, dt, a, B and C have the splits as rows of the batch."""
    return _ssd_forward(splits, x, dt, a, B, C, D, state, save=False)[0]


def _ssd_forward(splits, x, dt, a, B, C, D, state, *, save=True):
    size = sizes_of(x, B)
    g, dt = log2_decays(a, size), by_chunk(dt, size)
    start = state
    if splits > 1:
        start = split_states(size, splits, x, B, g, dt, start)
    y, final, *states = keep(forward(x, B, C, g, dt, D, start, save=save))
    wanted = None if state is None else ()  # residuals tell apart by structure what is not traced
    return (y, final[splits - 1 :: splits]), (x, B, C, g, dt, D, wanted, states)


def _ssd_backward(splits, residuals, cotangents):
    x, B, C, g, dt, D, wanted, states = residuals
    size = sizes_of(x, B)
    dy, dstate = cotangents
    if splits > 1:
        dstate = split_states(size, splits, dy, C, g, None, dstate, reverse=True)
    dx, dB, dC, rows, dD, *dstart = backward(
        size, x, B, C, g, dt, D, *states, dy, dstate, of_start=wanted is not None
    )
    dB, dC = (_sum_chains(z, size).astype(B.dtype) for z in (dB, dC))
    ddt, da = (by_token(rows[..., n, :], size) for n in range(len(ROWS)))
    dstate = dstart[0][::splits] if dstart else None
    return dx, ddt, da, dB, dC, jnp.sum(dD, axis=(0, 2)), dstate


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _sum_chains(z, size):
    """[B, T, chains, N] -> [B, T, G, N], summed over the chains of a group."""
    z = z[:, : size.length].reshape(size.batch, size.length, size.groups, -1, size.N)
    return jnp.sum(z, axis=3)
