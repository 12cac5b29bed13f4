"""WKV6 on NVIDIA GPUs since compute capability 8.0: which kernels, and what they take.

What is around them is in fused.py.
"""

import jax
import jax.numpy as jnp

from gt_jax.kernels.pallas import warps
from gt_jax.kernels.pallas.launch import CHUNK
from gt_jax.kernels.wkv6 import fused
from gt_jax.kernels.wkv6.hopper_sizes import SIZE
from gt_jax.kernels.wkv6.portable_backward import backward
from gt_jax.kernels.wkv6.portable_forward import forward
from gt_jax.kernels.wkv6.portable_splits import split_states


def wkv6_portable(
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
    """WKV6 on a GPU since compute capability 8.0; arguments and results as of `wkv6_reference`.

    Raises:
        NotImplementedError: a dtype or a size is not supported (says which).
    """
    return fused.call(_KERNELS, r, k, v, w, u, initial_state, resets, precision, axis_name)


_KERNELS = fused.Kernels(
    forward,
    backward,
    split_states,
    dtypes=(jnp.dtype(jnp.bfloat16),),
    tokens=CHUNK,
    width=lambda channels: SIZE,
    splits=lambda dtype, rows, chunks: warps.choose_splits(rows, chunks),
)
TAKES = _KERNELS.takes
