"""What each branch of a trained hybrid is worth, whatever joins them.

A branch is replaced before the fusion (gt_jax/analysis/ablation.py), by zero or by its mean over
the text, in all blocks; gates, arbiters and norms then see what is left.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab.programs import stacked
from gt_jax import thresholds
from gt_jax.analysis import (
    ablated_losses,
    ablations,
    measure_block,
    measure_health,
    output_means,
)
from gt_jax.config_hybrid import Debate
from gt_jax.models import make_model
from gt_jax.training.model import make_model_config
from gt_jax.training.step import init_state, summed_loss

# Ablations of gt_jax/analysis/ablation.py -> what is measured of them.
WITHOUT = {
    ("nothing", "zero", "all"): "",
    ("RWKV", "zero", "all"): "loss added without RWKV",
    ("Mamba", "zero", "all"): "loss added without Mamba",
    ("RWKV", "mean", "all"): "loss added without RWKV but its mean",
    ("Mamba", "mean", "all"): "loss added without Mamba but its mean",
}
IDLE = 0.05  # share of the update below which a branch does not count as alive


def look(model, params, batch):
    """Of one batch: shares of the update, gates and spread of activations, as float32 arrays.

    Returns:
        A dict: share [layers] of RWKV in the update; gate and gate_std [layers], NaN where a fusion
        has none, or none a position; and what `measure_health` says.
    """
    _, sown = model.apply(
        {"params": params}, batch.inputs, segment_ids=batch.segment_ids, mutable=["activations"]
    )
    found = {"share": [], "gate": [], "gate_std": []}
    for layer in range(model.config.layers):
        block = sown["activations"][f"blocks_{layer}"]
        own = params[f"blocks_{layer}"].get("fusion", {})
        measured = measure_block(model.config, own, block)
        gate = block.get("fusion", {}).get("gate", [jnp.full((1,), jnp.nan)])[0]
        found["share"].append(jnp.nanmean(measured.share))
        found["gate"].append(jnp.mean(gate, dtype=jnp.float32))
        by_position = jnp.mean(gate, axis=-1) if gate.ndim == 3 else jnp.full((1,), jnp.nan)
        found["gate_std"].append(jnp.std(by_position.astype(jnp.float32)))
    health = measure_health(model, params, batch.inputs, batch.segment_ids)
    return {name: jnp.stack(x) for name, x in found.items()} | health


def gradient_by_position(model, params, batch):
    """[B, T] norms of the gradient of a batch's summed loss in what the first block reads."""
    shift = jnp.zeros((*batch.inputs.shape, model.config.dim))

    def loss(shift):
        def intervene(call, args, kwargs, context):
            if context.module.path == ("blocks_0",) and context.method_name == "__call__":
                args = (args[0] + shift, *args[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(intervene):
            logits = model.apply({"params": params}, batch.inputs).logits
        return summed_loss(logits, batch.targets)

    return jnp.linalg.norm(jax.grad(loss)(shift), axis=-1)


def collapsed(gate, deviation):
    """Where gates are closed, and where they are constant, of any shape; never where NaN."""
    closed = (gate < thresholds.GATE_CLOSED) | (gate > 1 - thresholds.GATE_CLOSED)
    return closed, ~closed & (deviation < thresholds.GATE_CONSTANT)


def initial_params(arm, seeds, *, quick=False):
    """The parameters that runs of an arm begin with, NumPy leaves [seeds, ...]."""
    config = dataclasses.replace(arm.config, debate=Debate())
    init = _initial(make_model_config(config, arm.task.vocab_size), config, quick)
    found = [jax.device_get(init(np.uint32(seed))) for seed in seeds]
    return jax.tree.map(lambda *x: np.stack(x), *found)


@functools.cache  # designs that differ in their losses alone share it
def _initial(model_config, config, quick):
    """jitted: seed -> parameters that a run begins with."""
    state = functools.partial(init_state, make_model(model_config), optax.identity(), config)
    return lab.jit(quick)(lambda seed: state(jax.random.key(seed)).params)


def measure(runs, arm, *, quick):
    """name -> [seeds] of the trained hybrids of an arm.

    Args:
        runs: lab.Runs with their parameters, of one learning rate.
        arm: the lab.Arm that they are of; the held-out text of its task measures.

    Returns:
        A dict: "RWKV share" and "Mamba share" of the update, means over blocks; "loss added
        without" each branch, and "... but its mean"; "gate std, least" over blocks, "blocks closed"
        and "blocks constant"; "variance growth", of the residual stream behind the last block over
        the first, and the same "untrained"; "entropy" (nats) and "top", the mean largest
        probability.
    """
    seen_of, lost_of, spread = _programs(runs.model_config, quick)
    held_out = jax.device_put(stacked(arm.task.held_out))

    def of_one(params):
        seen, means = jax.device_get(seen_of(params, held_out))
        names, keep, fill = ablations(runs.model_config, means)
        places = [names.index(name) for name in WITHOUT]
        return seen, jax.device_get(lost_of(params, held_out, keep[places], fill[places]))

    one = lambda params, i: jax.tree.map(lambda x: x[i], params)
    found = [of_one(one(runs.params, i)) for i in range(len(runs.points))]
    growth = lambda variance: variance[-1] / variance[0]
    seen = {name: np.stack([each[name] for each, _ in found]) for name in found[0][0]}
    lost = np.stack([values for _, values in found])  # [seeds, S]
    closed, constant = collapsed(seen["gate"], seen["gate_std"])
    initial = initial_params(arm, [point["seed"] for point in runs.points], quick=quick)
    tokens = held_out.inputs[0]
    untrained = [jax.device_get(spread(one(initial, i), tokens)) for i in range(len(runs.points))]
    measures = {
        "RWKV share": seen["share"].mean(-1),
        "Mamba share": 1 - seen["share"].mean(-1),
        "gate std, least": seen["gate_std"].min(-1),
        "blocks closed": closed.sum(-1),
        "blocks constant": constant.sum(-1),
        "variance growth": np.array([growth(v) for v in seen["stream_variance"]]),
        "variance growth, untrained": np.array([growth(v) for v in untrained]),
        "entropy": seen["entropy"],
        "top": seen["top"],
    }
    for column, name in enumerate(WITHOUT.values()):
        if name:
            measures[name] = lost[:, column] - lost[:, 0]
    return {name: np.asarray(values, float) for name, values in measures.items()}


@functools.cache  # designs that differ in their losses alone share them
def _programs(model_config, quick):
    """The jitted parts of `measure`: what is seen of a batch, losses without branches, variances.

    The text is an argument: XLA would compute with a constant while it compiles.
    """
    model, jit = make_model(model_config), lab.jit(quick)

    def seen_of(params, held_out):
        first = jax.tree.map(lambda x: x[0], held_out)
        return look(model, params, first), output_means(model, params, held_out)

    def spread(params, tokens):
        return measure_health(model, params, tokens)["stream_variance"]

    return jit(seen_of), jit(functools.partial(ablated_losses, model)), jit(spread)
