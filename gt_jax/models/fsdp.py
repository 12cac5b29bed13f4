"""Fully sharded parameters: each device of an axis keeps a part, and gathers a block to apply it.

Under shard_map over an axis "fsdp" a model's large matrices (dense kernels, embedding, head) arrive
as parts. Each block gathers its own when it runs, in the dtype that it multiplies in, and gathers
them again for the backward pass instead of keeping them; gradients are summed over devices in
float32 as they are scattered (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054).

Which axis of a matrix is cut follows from its name alone: the one of the model's width, or the one
that a block's hidden width lies on. Vectors and low-rank factors are small, and copied.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gt_jax.models.config import ModelConfig

AXIS = "fsdp"
_CUT = {"kernel": 0, "embedding": 1, "head": 0}  # the last name of a path -> axis


def cut_axis(path: tuple[Any, ...], rank: int) -> int | None:
    """The axis of a parameter, or of an array shaped like it, that devices share; None for none.

    Args:
        path: of a leaf, as jax.tree_util gives it; keys may be whole paths with slashes.
        rank: of the leaf.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1]
    return _CUT.get(name) if rank == 2 else None


def is_cut() -> bool:
    """Whether a function is traced by shard_map over an axis "fsdp"."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def gather(params: Any, dtype: str = "float32") -> Any:
    """Whole parameters from the parts that this device holds, dense kernels in `dtype`."""
    if not is_cut():
        return params

    def whole(path, leaf):
        axis = cut_axis(path, leaf.ndim)
        return leaf if axis is None else _gather(leaf, axis, dtype)

    return jax.tree_util.tree_map_with_path(whole, params)


def gather_outside_blocks(params: Any) -> Any:
    """Parameters whose embedding and head are whole; blocks gather their own (see `gathering`)."""
    blocks = {name: leaf for name, leaf in params.items() if name.startswith("blocks_")}
    others = {name: leaf for name, leaf in params.items() if name not in blocks}
    return gather(others) | blocks


def gathering(block: Callable, config: ModelConfig) -> Callable:
    """A block that gathers its parameters where they are cut, and is remembered by config.remat."""
    if not is_cut():
        return block
    whole = functools.partial(gather, dtype=config.dtype)
    block = nn.map_variables(block, "params", trans_in_fn=whole)
    return nn.remat(block, policy=_is_kept) if config.remat == "none" else block


def _is_kept(primitive, *_, **settings) -> bool:
    """Whether the backward pass keeps a result: all but what was gathered, under either name."""
    if primitive.name == "name":
        return settings["name"] != "gathered"
    return primitive.name != "all_gather" or AXIS not in settings["axis_name"]


def _all_gather(part, axis, dtype):
    whole = lax.all_gather(part.astype(dtype), AXIS, axis=axis, tiled=True)
    return checkpoint_name(whole, "gathered")


def _gather_forward(part, axis, dtype):
    return _all_gather(part, axis, dtype), None


def _gather_backward(axis, dtype, _, g):
    del dtype
    scattered = lax.psum_scatter(g.astype(jnp.float32), AXIS, scatter_dimension=axis, tiled=True)
    return (scattered,)


_gather = jax.custom_vjp(_all_gather, nondiff_argnums=(1, 2))
_gather.defvjp(_gather_forward, _gather_backward)


def own_part(x: jax.Array, axis: int) -> jax.Array:
    """The part of an axis that this device holds, under shard_map over "fsdp", of a whole array."""
    size = x.shape[axis] // lax.axis_size(AXIS)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size, axis)


def indivisible(params: Any, devices: int) -> str | None:
    """A size of these parameters (arrays or shapes) that so many devices cannot share, or None."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axis = cut_axis(path, leaf.ndim)
        if axis is not None and leaf.shape[axis] % devices:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"{leaf.shape[axis]}, a size of {name}"
    return None


def sum_gradients(grads: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Gradients summed over devices; those of cut parameters are summed over "fsdp" already."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name

    def over(path, leaf):
        cut = cut_axis(path, leaf.ndim) is not None
        return lax.psum(leaf, tuple(axis for axis in axes if axis != AXIS) if cut else axes)

    return jax.tree_util.tree_map_with_path(over, grads) if AXIS in axes else lax.psum(grads, axes)
