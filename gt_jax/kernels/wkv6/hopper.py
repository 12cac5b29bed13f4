"""WKV6 on Hopper GPUs: which kernels, and what they take; what is around them is in fused.py."""

import jax
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas import launch
from gt_jax.kernels.pallas.splits import choose_splits
from gt_jax.kernels.pallas.terms import TERMS
from gt_jax.kernels.wkv6 import fused
from gt_jax.kernels.wkv6.hopper_backward import backward
from gt_jax.kernels.wkv6.hopper_forward import forward
from gt_jax.kernels.wkv6.hopper_sizes import TUNING
from gt_jax.kernels.wkv6.hopper_splits import split_states


def wkv6_mosaic(
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
    """WKV6 on a Hopper GPU; arguments and results as of `wkv6_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    return fused.call(_KERNELS, r, k, v, w, u, initial_state, resets, precision, axis_name)


def _width(channels):
    """The channels that bulk copies move for a head of so many: powers of two from 8 up."""
    return max(8, pl.next_power_of_2(channels))


def _splits(dtype, rows, chunks):
    blocks = pl.cdiv(rows, TUNING[TERMS[dtype]].heads)
    return choose_splits(blocks, chunks, running=launch.MULTIPROCESSORS)


_KERNELS = fused.Kernels(
    forward,
    backward,
    split_states,
    dtypes=tuple(TERMS),
    tokens=8,  # that bulk copies move at least
    width=_width,
    splits=_splits,
)
TAKES = _KERNELS.takes
