"""The update of a gated hybrid block as a sum of parts, and the model with some of them replaced.

    fused = g (rwkv - n) + (1 - g) mamba + g n

n is the block's normalised input, which the original project's branch adds to its own output: that
third part is no work of either branch, and it is zero in the official branch.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.training.step import summed_loss

# name -> the parts of a block's update that go together
ABLATIONS = {"RWKV": [0], "Mamba": [1], "RWKV and its input": [0, 2]}


def apply_with(model, params, batch, change):
    """Logits of a gated hybrid whose blocks add change(layer, parts, gate) for their update.

    Args:
        batch: Batch of [B, T].
        change: (layer, parts [3, B, T, D] float32, gate [B, T, 1]) -> [B, T, D].
    """
    c, inputs = model.config, {}

    def intervene(call, args, kwargs, context):
        result = call(*args, **kwargs)
        block, *within = context.module.path or ("",)
        if within == ["rwkv"]:
            inputs[block] = args[0].astype(jnp.float32) * (c.branch == "legacy")
        if within != ["fusion"] or context.method_name != "__call__":
            return result
        rwkv, mamba = (branch.astype(jnp.float32) for branch in args[:2])
        (gate,) = context.module.get_variable("activations", "gate")
        n = inputs[block]
        parts = jnp.stack([gate * (rwkv - n), (1 - gate) * mamba, gate * n])
        return change(int(block.removeprefix("blocks_")), parts, gate), result[1]

    with nn.intercept_methods(intervene):
        output, _ = model.apply(
            {"params": params},
            batch.inputs,
            segment_ids=batch.segment_ids,
            mutable=["activations"],
        )
    return output.logits


def contributions(model, params, batches):
    """Means over all tokens of batches, Batch of [N, B, T].

    Returns a dict: mean [layers, 3, D] of every part; gate and gate_square [layers]; share [layers]
    of RWKV in the update, and share_with_input, which counts the identity part as RWKV's.
    """

    def of_batch(batch):
        found = [None] * model.config.layers

        def change(layer, parts, gate):
            norm = lambda x: jnp.linalg.norm(x, axis=-1)
            rwkv, mamba, both = norm(parts[0]), norm(parts[1]), norm(parts[0] + parts[2])
            found[layer] = {
                "mean": parts.mean((1, 2)),
                "gate": gate.mean(),
                "gate_square": jnp.square(gate).mean(),
                "share": jnp.mean(rwkv / jnp.maximum(rwkv + mamba, 1e-12)),
                "share_with_input": jnp.mean(both / jnp.maximum(both + mamba, 1e-12)),
            }
            return parts.sum(0)

        apply_with(model, params, batch, change)
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(of_batch, batches))


def losses(model, params, batches, keep, fill):
    """Loss of a model in which some parts are replaced: part -> keep part + fill.

    Args:
        batches: Batch of [N, B, T].
        keep: [S, layers, 3], and fill [S, layers, 3, D], of S settings.

    Returns:
        [S] float32, nats per counted target.
    """

    def of_batch(setting, batch):
        keep, fill = setting

        def change(layer, parts, gate):
            del gate
            kept = keep[layer][:, None, None, None] * parts
            return (kept + fill[layer][:, None, None]).sum(0)

        return summed_loss(apply_with(model, params, batch, change), batch.targets)

    def of_setting(setting):
        return jax.lax.map(functools.partial(of_batch, setting), batches).sum()

    return jax.lax.map(of_setting, (keep, fill)) / jnp.sum(batches.targets >= 0)


def every_ablation(model_config, means):
    """names, keep, fill of every ablation; the first leaves all as it is.

    A name is (what is replaced, "zero" or "mean", "all" or such as "block 3").
    """
    layers = model_config.layers
    legacy = model_config.branch == "legacy"
    names, keeps = [("nothing", "zero", "all")], [np.ones((layers, 3), np.float32)]
    fills = [np.zeros_like(means)]
    for what, parts in ABLATIONS.items():
        if 2 in parts and not legacy:
            continue
        for how in ("zero", "mean"):
            for layer in ["all", *range(layers)]:
                which = np.ix_(range(layers) if layer == "all" else [layer], parts)
                keep, fill = np.ones((layers, 3), np.float32), np.zeros_like(means)
                keep[which] = 0
                if how == "mean":
                    fill[which] = means[which]
                names.append((what, how, "all" if layer == "all" else f"block {layer}"))
                keeps.append(keep)
                fills.append(fill)
    return names, np.stack(keeps), np.stack(fills)
