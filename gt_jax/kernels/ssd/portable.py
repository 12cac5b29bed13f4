"""SSD on NVIDIA GPUs since compute capability 8.0: which kernels, and how other sizes use them.

The kernels are for P = 64 and N = 64 or 128. The recurrence is a sum over what the N channels of B
and C contribute, and rows of P know nothing of each other: a wider head is several heads.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas import warps
from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.ssd import fused
from gt_jax.kernels.ssd.portable_backward import backward
from gt_jax.kernels.ssd.portable_forward import forward
from gt_jax.kernels.ssd.portable_splits import split_states

WIDTH = 64  # channels of a head of the kernels
STATE = 128  # channels of its state, or half as many


def ssd_portable(
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
    """SSD on a GPU since compute capability 8.0; arguments and results as of `ssd_reference`.

    Raises:
        NotImplementedError: a dtype is not supported (says which).
    """
    P, N, groups = x.shape[-1], B.shape[-1], B.shape[2]
    parts, halves = pl.cdiv(P, WIDTH), pl.cdiv(N, STATE)
    if D is None:
        D = jnp.zeros(x.shape[2], jnp.float32)
    # [..., groups, halves of N, heads of a group, parts of P]
    x = _padded(x, WIDTH).reshape(*x.shape[:2], groups, 1, -1, parts, WIDTH)
    by_head = lambda z: z.reshape(*z.shape[:-1], groups, 1, -1, 1)
    everywhere = lambda z: jnp.broadcast_to(z, (*z.shape[:-3], halves, z.shape[-2], parts))
    flat = lambda z: everywhere(by_head(z)).reshape(*z.shape[:-1], -1)
    shape = (*x.shape[:3], halves, *x.shape[4:])
    once = jnp.arange(halves) == 0
    D = jnp.where(once[:, None, None], everywhere(by_head(D)), 0).reshape(-1)
    width = STATE if N > STATE // 2 else STATE // 2
    B, C = (_padded(z, width).reshape(*z.shape[:2], -1, width) for z in (B, C))
    if initial_state is not None:
        initial_state = _split_state(initial_state, groups, parts, halves, width)
    x = jnp.broadcast_to(x, shape).reshape(*x.shape[:2], -1, WIDTH)
    y, state = fused.call(
        _KERNELS, x, flat(dt), flat(a), B, C, D, initial_state, resets, precision, axis_name
    )
    y = y.reshape(shape)
    y = y[:, :, :, 0] if halves == 1 else jnp.sum(y.astype(jnp.float32), axis=3).astype(y.dtype)
    y = y.reshape(*y.shape[:2], -1, parts * WIDTH)[..., :P]
    return y, _join_state(state, groups, parts, halves, P, N)


def _padded(z, multiple):
    """z, whose last axis zeros fill up to a multiple."""
    end = -z.shape[-1] % multiple
    return z if end == 0 else jnp.pad(z, ((0, 0),) * (z.ndim - 1) + ((0, end),))


def _split_state(state, groups, parts, halves, width):
    """[batch, H, P, N] -> [batch, the kernel's heads, 64, width]."""
    state = _padded(_padded(state, width).swapaxes(2, 3), WIDTH).swapaxes(2, 3)
    state = state.reshape(state.shape[0], groups, -1, parts, WIDTH, halves, width)
    return jnp.moveaxis(state, 5, 2).reshape(state.shape[0], -1, WIDTH, width)


def _join_state(state, groups, parts, halves, P, N):
    """[batch, the kernel's heads, 64, width] -> [batch, H, P, N]."""
    batch, _, _, width = state.shape
    state = state.reshape(batch, groups, halves, -1, parts, WIDTH, width)
    state = jnp.moveaxis(state, 2, 5).reshape(batch, -1, parts * WIDTH, halves * width)
    return state[:, :, :P, :N]


_KERNELS = fused.Kernels(
    forward,
    backward,
    split_states,
    dtypes=(jnp.dtype(jnp.bfloat16),),
    tokens=2 * CHUNK,  # the gradient works on pairs of chunks
    splits=lambda size: warps.choose_splits(size.batch * size.heads, size.chunks),
)
TAKES = f"{_KERNELS.dtypes[0]}, any P and N"
