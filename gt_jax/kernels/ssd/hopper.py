"""SSD on Hopper GPUs: which kernels, and what they take; what is around them is in fused.py."""

import jax

from gt_jax.kernels.pallas import launch
from gt_jax.kernels.pallas.splits import choose_splits
from gt_jax.kernels.pallas.terms import TERMS
from gt_jax.kernels.ssd import fused
from gt_jax.kernels.ssd.hopper_backward import backward
from gt_jax.kernels.ssd.hopper_forward import forward
from gt_jax.kernels.ssd.hopper_splits import split_states

TAKES = f"{' or '.join(map(str, TERMS))}, {fused.SIZES}"


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
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """SSD on a Hopper GPU; arguments and results as of `ssd_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    return fused.call(_KERNELS, x, dt, a, B, C, D, initial_state, resets, precision, axis_name)


def _splits(size):
    return choose_splits(size.batch * size.blocks, size.chunks, running=launch.MULTIPROCESSORS)


_KERNELS = fused.Kernels(
    forward,
    backward,
    split_states,
    dtypes=tuple(TERMS),
    tokens=8,  # that bulk copies move at least
    splits=_splits,
)
