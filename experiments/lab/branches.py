"""What each branch of a trained hybrid is worth, whatever joins them.

A branch is replaced before the fusion, by zero or by its mean over the text, in all blocks; gates,
arbiters and norms then see what is left. So the measure needs no formula of the fusion, and holds
for sums, projections and residual paths alike. Of the original's branch, which contains its input,
only the rest is replaced.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab.programs import stacked
from gt_jax import thresholds
from gt_jax.analysis import measure_block, measure_health
from gt_jax.models import make_model
from gt_jax.training.model import make_model_config
from gt_jax.training.step import init_state, summed_loss

# name -> (what of both branches is kept, whether their means take its place)
REPLACED = {
    "nothing": ((1, 1), False),
    "RWKV": ((0, 1), False),
    "Mamba": ((1, 0), False),
    "RWKV by its mean": ((0, 1), True),
    "Mamba by its mean": ((1, 0), True),
}
IDLE = 0.05  # share of the update below which a branch does not count as alive


def apply_replaced(model, params, batch, replace):
    """Logits of a hybrid whose branches say something else.

    Args:
        batch: Batch of [B, T].
        replace: (layer, branch 0 or 1, output without its input [B, T, D]) -> [B, T, D].
    """
    names, whole = model.config.branch_names, model.config.branch == "legacy"

    def intervene(call, args, kwargs, context):
        result = call(*args, **kwargs)
        block, *within = context.module.path or ("",)
        if len(within) != 1 or within[0] not in names or context.method_name != "__call__":
            return result
        own = args[0] if whole and within[0].startswith("rwkv") else 0.0
        layer, branch = int(block.removeprefix("blocks_")), names.index(within[0])
        said = replace(layer, branch, result[0] - own) + own
        return said.astype(result[0].dtype), result[1]

    with nn.intercept_methods(intervene):
        output = model.apply({"params": params}, batch.inputs, segment_ids=batch.segment_ids)
    return output.logits


def means(model, params, batches):
    """[layers, 2, D] of what branches add, over batches of [N, B, T]."""

    def of_batch(batch):
        found = {}

        def keep(layer, branch, said):
            found[layer, branch] = jnp.mean(said, axis=(0, 1), dtype=jnp.float32)
            return said

        apply_replaced(model, params, batch, keep)
        layers = range(model.config.layers)
        return jnp.stack([jnp.stack([found[layer, b] for b in (0, 1)]) for layer in layers])

    return jax.lax.map(of_batch, batches).mean(0)


def losses(model, params, batches, keep, fill):
    """[S] nats per counted target under S settings: branch -> keep branch + fill.

    Args:
        batches: of [N, B, T].
        keep: [S, 2], and fill [S, layers, 2, D].
    """

    def of_batch(setting, batch):
        keep, fill = setting
        replace = lambda layer, branch, said: keep[branch] * said + fill[layer, branch]
        return summed_loss(apply_replaced(model, params, batch, replace), batch.targets)

    of_setting = lambda s: jax.lax.map(functools.partial(of_batch, s), batches).sum()
    return jax.lax.map(of_setting, (keep, fill)) / jnp.sum(batches.targets >= 0)


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


def initial_params(arm, seeds):
    """The parameters that runs of an arm begin with, NumPy leaves [seeds, ...]."""
    model = make_model(make_model_config(arm.config, arm.task.vocab_size))
    state = functools.partial(init_state, model, optax.identity(), arm.config)
    init = jax.jit(lambda seed: state(jax.random.key(seed)).params)
    found = [jax.device_get(init(np.uint32(seed))) for seed in seeds]
    return jax.tree.map(lambda *x: np.stack(x), *found)


def measure(runs, arm, *, quick):
    """name -> [seeds] of the trained hybrids of an arm.

    Args:
        runs: lab.Runs with their parameters, of one learning rate.
        arm: the lab.Arm that they are of; the held-out text of its task measures.

    Returns:
        A dict: "RWKV share" and "Mamba share" of the update, means over blocks; "loss added
        without" each branch, and "... by its mean"; "gate std, least" over blocks, "blocks closed"
        and "blocks constant"; "variance growth", of the residual stream behind the last block over
        the first, and the same "untrained"; "entropy" (nats) and "top", the mean largest
        probability.
    """
    model = make_model(runs.model_config)
    held_out = stacked(arm.task.held_out)
    first = jax.tree.map(lambda x: x[0], held_out)
    jit = lab.jit(quick)

    @jit
    def of_one(params):
        filled = means(model, params, held_out)
        keep = jnp.array([kept for kept, _ in REPLACED.values()], jnp.float32)  # [S, 2]
        takes = jnp.array([mean for _, mean in REPLACED.values()], jnp.float32)
        fill = (takes[:, None] * (1 - keep))[:, None, :, None] * filled  # [S, layers, 2, D]
        return look(model, params, first), losses(model, params, held_out, keep, fill)

    @jit
    def spread(params):
        return measure_health(model, params, first.inputs)["stream_variance"]

    one = lambda params, i: jax.tree.map(lambda x: x[i], params)
    found = [jax.device_get(of_one(one(runs.params, i))) for i in range(len(runs.points))]
    growth = lambda variance: variance[-1] / variance[0]
    seen = {name: np.stack([each[name] for each, _ in found]) for name in found[0][0]}
    lost = np.stack([values for _, values in found])  # [seeds, S]
    closed, constant = collapsed(seen["gate"], seen["gate_std"])
    fresh = initial_params(arm, [point["seed"] for point in runs.points])
    untrained = [jax.device_get(spread(one(fresh, i))) for i in range(len(runs.points))]
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
    for column, name in enumerate(REPLACED):
        if column:
            measures[f"loss added without {name}"] = lost[:, column] - lost[:, 0]
    return {name: np.asarray(values, float) for name, values in measures.items()}
