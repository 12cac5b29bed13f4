"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): train.tune=lora.

    W' = W + alpha / rank * A B,   W [in, out] frozen, A [in, rank] Gaussian, B [rank, out] zero

The adapters stand beside the base in the tree of parameters, {**base, "lora": {...}}, each pair at
the path of its matrix. Models are applied to `merged` parameters, which have the base's layout.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from gt_jax.config import Lora
from gt_jax.errors import InputError
from gt_jax.models import fsdp

KEY = "lora"  # of the adapters among the parameters
A, B, SCALE = "lora_a", "lora_b", "scale"


def matched(params: Any, lora: Lora) -> list[str]:
    """The paths of the matrices that lora.matrices matches, as "blocks_0/rwkv/key/kernel".

    Args:
        params: of a model, arrays or their shapes.
        lora: uses matrices and rank.

    Raises:
        InputError: it matches none, or one with a side shorter than the rank.
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    found = [name for name, x in flat.items() if x.ndim == 2 and re.search(lora.matrices, name)]
    if not found:
        every = sorted(
            {re.sub(r"blocks_\d+", "blocks_*", n) for n, x in flat.items() if x.ndim == 2}
        )
        raise InputError(
            f"train.lora.matrices={lora.matrices!r} matches no matrix; there are {', '.join(every)}"
        )
    narrow = min(found, key=lambda name: min(flat[name].shape))
    if lora.rank > min(flat[narrow].shape):
        raise InputError(
            f"train.lora.rank={lora.rank} must be at most {min(flat[narrow].shape)}, the shorter "
            f"side of {narrow}, or leave that out of train.lora.matrices"
        )
    return found


def added(params: Any, lora: Lora, key: jax.Array) -> Any:
    """The parameters with new adapters, which change nothing: B is zero.

    A is N(0, 1 / in), so that x A has the variance of x; the paper leaves the variance open.

    Args:
        params: of a model, float32.
        lora: rank, alpha and matrices.
        key: random key.

    Raises:
        InputError: as of `matched`.
    """
    adapters: dict[tuple, jax.Array] = {(SCALE,): jnp.float32(lora.alpha / lora.rank)}
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for index, name in enumerate(sorted(matched(params, lora))):
        rows, columns = flat[name].shape
        of_matrix = jax.random.fold_in(key, index)
        path = tuple(name.split("/"))
        adapters[*path, A] = jax.random.normal(of_matrix, (rows, lora.rank)) * rows**-0.5
        adapters[*path, B] = jnp.zeros((lora.rank, columns))
    return {**params, KEY: unflatten_dict(adapters)}


def base(params: Any) -> Any:
    """The parameters without adapters, if they have any."""
    return {name: x for name, x in params.items() if name != KEY} if KEY in params else params


def merged(params: Any) -> Any:
    """Parameters of the base's layout that compute what base and adapters do; as they are without.

    Products are in float32. Under shard_map over "fsdp" the base's matrices are parts, and so are
    the merged ones.
    """
    if KEY not in params:
        return params
    flat, adapters = flatten_dict(base(params)), flatten_dict(params[KEY])
    scale = adapters[SCALE,]
    for *path, last in adapters:
        if last == A:
            path = tuple(path)
            flat[path] = _adapted(path, flat[path], adapters[*path, A], adapters[*path, B], scale)
    return unflatten_dict(flat)


def _adapted(path, kernel, a, b, scale):
    """kernel + scale * a b, of the part of the kernel that is here."""
    axis = fsdp.cut_axis(tuple(map(jax.tree_util.DictKey, path)), 2)
    if fsdp.is_cut() and axis is not None:
        a, b = (fsdp.own_part(a, 0), b) if axis == 0 else (a, fsdp.own_part(b, 1))
    return kernel + scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
