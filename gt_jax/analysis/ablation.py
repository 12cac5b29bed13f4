"""What a hybrid loses without a branch, whatever joins both: replace outputs before the fusion.

An output y [B, T, D] of a mixer becomes keep y + fill. The fusion reads that, and its gate with it,
so the measure holds for every fusion, with residual paths and norms behind it. Replaced at the
fusion's end instead, a sum g rwkv + (1 - g) mamba keeps the gate that it has with both branches:
`experiments/lab/ablation.py` does that for gated fusions.

The input that the legacy branch adds to its own output is no work of the branch and stays.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.models import LanguageModel, ModelConfig, Params


def apply_with_outputs(
    model: LanguageModel, params: Params, change: Callable, *inputs: Any, **options: Any
) -> Any:
    """model.apply with the branches' outputs changed before they are fused.

    Args:
        model, params: a hybrid.
        change: (layer, branch, y [B, T, D]) -> [B, T, D] of the dtype of y; branch is 0 for the
            first, RWKV, and 1 for the second, Mamba. y is without an input that it contains.
        *inputs, **options: of model.apply after the parameters.
    """
    c = model.config
    whole = c.branch == "legacy" and c.legacy_wkv != "c"

    def intervene(call, args, kwargs, context):
        result = call(*args, **kwargs)
        block, *within = context.module.path or ("",)
        if len(within) != 1 or within[0] not in c.branch_names or context.method_name != "__call__":
            return result
        y, state = result
        added = args[0] if whole and within[0].startswith("rwkv") else jnp.zeros((), y.dtype)
        layer, branch = int(block.removeprefix("blocks_")), c.branch_names.index(within[0])
        return added + change(layer, branch, y - added), state

    with nn.intercept_methods(intervene):
        return model.apply({"params": params}, *inputs, **options)


def output_means(model: LanguageModel, params: Params, batches: Any) -> jax.Array:
    """[layers, 2, D] float32 mean output of every branch over all tokens.

    Args:
        model, params: a hybrid.
        batches: inputs [N, B, T] and segment_ids, as a data.batches.Batch has them.
    """

    def of_batch(batch):
        found = {}

        def change(layer, branch, y):
            found[layer, branch] = jnp.mean(y, axis=(0, 1), dtype=jnp.float32)
            return y

        apply_with_outputs(model, params, change, batch.inputs, segment_ids=batch.segment_ids)
        return jnp.stack([jnp.stack([found[i, j] for j in (0, 1)]) for i in range(layers)])

    layers = model.config.layers
    return jnp.mean(jax.lax.map(of_batch, batches), axis=0)


def ablations(
    config: ModelConfig, means: np.ndarray
) -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    """Every ablation of one branch, in one block and in all.

    Args:
        config: the ModelConfig of a hybrid.
        means: [layers, 2, D] from output_means.

    Returns:
        S names (what, how, place), the first ("nothing", "zero", "all"): what is "RWKV" or "Mamba",
        how "zero" or "mean", place "all" or "block 3"; keep [S, layers, 2], fill [S, layers, 2, D].
    """
    names, keeps = [("nothing", "zero", "all")], [np.ones((config.layers, 2), np.float32)]
    fills = [np.zeros_like(means)]
    for branch, what in enumerate(("RWKV", "Mamba")):
        for how in ("zero", "mean"):
            for layer in ("all", *range(config.layers)):
                blocks = slice(None) if layer == "all" else layer
                keep, fill = np.ones_like(keeps[0]), np.zeros_like(means)
                keep[blocks, branch] = 0
                if how == "mean":
                    fill[blocks, branch] = means[blocks, branch]
                names.append((what, how, "all" if layer == "all" else f"block {layer}"))
                keeps.append(keep)
                fills.append(fill)
    return names, np.stack(keeps), np.stack(fills)


def ablated_losses(
    model: LanguageModel, params: Params, batches: Any, keep: jax.Array, fill: jax.Array
) -> jax.Array:
    """Loss of a hybrid whose branches say keep y + fill for their output y.

    Args:
        model, params: a hybrid.
        batches: inputs and targets [N, B, T] and segment_ids, as a data.batches.Batch has them.
        keep: [S, layers, 2] of S ablations; fill: [S, layers, 2, D].

    Returns:
        [S] float32, nats per counted target.
    """

    def of_batch(setting, batch):
        keep, fill = setting

        def change(layer, branch, y):
            return (keep[layer, branch] * y + fill[layer, branch]).astype(y.dtype)

        given = batch.inputs, batch.targets
        options = {"segment_ids": batch.segment_ids, "method": "loss"}
        return apply_with_outputs(model, params, change, *given, **options).nats

    def of_setting(setting):
        return jnp.sum(jax.lax.map(functools.partial(of_batch, setting), batches))

    return jax.lax.map(of_setting, (keep, fill)) / jnp.sum(batches.targets >= 0)
