"""Several weights in the computation dtype, rounded by one kernel.

A small step is bound by the number of its kernels, and each weight takes one to be rounded. Those
of several blocks are rounded into one vector, whose parts products read where they lie; those that
one product reads side by side, into one matrix.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from gt_jax.models.layers import ROUNDED

# Matrices that nothing but products in the computation dtype reads, by the last name of their path.
# A fusion may read its own in float32: it says which it does not.
_NAMES = ("kernel", "time_maa_w1", "time_decay_w1", "time_decay_w2")

# Arrays that one kernel reads: XLA fuses at most 96 operands and results.
_MOST = 88


def rounded_together(
    blocks: list[Any],
    dtype: str,
    of_fusion: Sequence[tuple[str, ...]] = (),
    in_differences: Sequence[str] = (),
) -> list[Any]:
    """The parameters of blocks with their weights in `dtype`; gradients are float32, each rounded
    once, as of weights that are rounded one by one.

    Args:
        blocks: trees of parameters, float32.
        dtype: of products.
        of_fusion: `only_in_products` of the fusion, see gt_jax/models/fusion.py.
        in_differences: its `only_in_differences`. Their first column becomes what it is more than
            the second, and the second zero.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(blocks)
    found = [leaf for _, leaf in leaves]
    wide = [leaf.ndim == 2 and leaf.dtype == jnp.float32 for leaf in found]
    places = {_names(path): n for n, (path, _) in enumerate(leaves) if wide[n]}
    chosen = [(n,) for z, n in places.items() if z[-1] in _NAMES and "fusion" not in z]
    fusions = dict.fromkeys(names[:-1] for names in places if names[-2:-1] == ("fusion",))
    beside = [[(*z, name) for name in names] for z in fusions for names in of_fusion]
    chosen += [
        tuple(places[z] for z in names) for names in beside if all(z in places for z in names)
    ]
    heads = [places[(*z, name)] for z in fusions for name in in_differences if (*z, name) in places]
    if heads:
        for place, head in zip(heads, _differences([found[n] for n in heads])):
            found[place] = head
    while chosen:
        places = [chosen.pop(0)]
        while chosen and sum(map(len, [*places, chosen[0]])) <= _MOST:
            places.append(chosen.pop(0))
        weights = _rounded(dtype, [[found[n] for n in beside] for beside in places])
        for beside, together in zip(places, weights):
            for place, weight in zip(beside, together):
                found[place] = weight
    return jax.tree.unflatten(structure, found)


def side_by_side(kernels: Sequence[jax.Array], dtype: DTypeLike) -> jax.Array:
    """Kernels [in, out] of one shape as one [in, len(kernels) out] in `dtype`, for one product.

    XLA would round each by a kernel of its own and join them in the product: its own product, which
    takes 11 us for 16384 x 256 x 384 on an H200, where a library's is to be had.

    Args:
        kernels: of one dtype, as their gradients.
        dtype: of the product; as `rounded` of layers.py, model.remat=dots keeps the result. Kernels
            that have it lie side by side already, see `rounded_together`.
    """
    if kernels[0].dtype == dtype:
        return jnp.concatenate(kernels, axis=-1)
    return checkpoint_name(_joined(dtype, kernels[0].dtype, tuple(kernels)), ROUNDED)


@jax.custom_vjp
def _differences(matrices: list[jax.Array]) -> list[jax.Array]:
    """[W_0 - W_1, 0] of each [D, 2] matrix W."""
    joined = jnp.concatenate([w[:, 0] - w[:, 1] for w in matrices])
    joined = jax.lax.optimization_barrier(joined)  # as in `_value`
    each = jnp.split(joined, len(matrices))
    return [jnp.stack([z, jnp.zeros_like(z)], axis=1) for z in each]


_differences.defvjp(
    lambda matrices: (_differences(matrices), None),
    lambda _, grads: ([jnp.stack([g[:, 0], -g[:, 0]], axis=1) for g in grads],),
)


def _names(path):
    """Numbers of blocks and names, as text."""
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


def _value(dtype, weights) -> list[list[jax.Array]]:
    # Without the barrier XLA would round in every reader instead.
    wide = [jnp.concatenate(beside, axis=-1) for beside in weights]
    joined = jnp.concatenate([z.ravel().astype(dtype) for z in wide])
    joined = jax.lax.optimization_barrier(joined)
    parts, start = [], 0
    for beside, z in zip(weights, wide):
        whole = joined[start : start + z.size].reshape(z.shape)
        parts.append(jnp.split(whole, len(beside), axis=-1))
        start += z.size
    return parts


_rounded = jax.custom_vjp(_value, nondiff_argnums=(0,))
_rounded.defvjp(
    lambda dtype, weights: (_value(dtype, weights), None),
    lambda dtype, _, grads: (jax.tree.map(lambda grad: grad.astype(jnp.float32), grads),),
)


def _side_by_side(dtype, _, kernels):
    joined = jnp.concatenate([kernel.astype(dtype) for kernel in kernels], axis=-1)
    return jax.lax.optimization_barrier(joined)  # as in `_value`


def _joined_forward(dtype, given, kernels):
    return _side_by_side(dtype, given, kernels), kernels


def _joined_backward(_, given, kernels, grad):
    return (tuple(jnp.split(grad.astype(given), len(kernels), axis=-1)),)


_joined = jax.custom_vjp(_side_by_side, nondiff_argnums=(0, 1))
_joined.defvjp(_joined_forward, _joined_backward)
