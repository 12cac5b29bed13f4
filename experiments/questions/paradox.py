"""What each branch of a trained hybrid contributes, against the gradient it gets.

    python -m experiments paradox --seeds=5

The update of a gated block is a sum of parts [B, T, D]. The branch of the original project holds
its own input n, so that a third part is no work of either branch; it is zero in the official one:

    fused = g (rwkv - n) + (1 - g) mamba + g n

Measured on held-out text, before and after training: the loss when a part is zeroed or replaced by
its mean over positions, in one block or in all; the same where a branch's output is replaced before
the fusion, so that the gate answers (without its answer the two agree); RWKV's share of the update,
|R| / (|R| + |M|) of the first two parts; the gate's mean and spread; and the gradient of each
branch, and what Adam makes of it, as root mean squares over parameters so that sizes do not matter.

Beside it, what the original project measured: the norms of an RWKV state with weights of its own
and of Mamba's output, and gradients, all of an untrained model that reads random tokens.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import ablation, command, results
from experiments.lab.programs import stacked
from experiments.lab.statistics import estimate
from gt_jax.analysis import ablated_losses, ablations, output_means
from gt_jax.models import make_config, make_model
from gt_jax.training import optimizer
from gt_jax.training.model import make_model_config
from gt_jax.training.step import summed_loss

VARIANTS = {
    "official": {"model.preset": "gf-mh"},
    "legacy": {"model.preset": "gf-mh", "model.branch": "legacy", "model.init": "normal"},
}
STARTS = ("init", "both", "neither")
GRADIENTS = 64  # batches over which Adam's moments settle
BRANCHES = ("rwkv", "mamba")


def main(argv=None):
    parser = command.parser("paradox", __doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument(
        "--start", choices=STARTS, default="init", help="outputs at zero, as model.branch_start"
    )
    options = command.parse(parser, argv)
    shared = command.common(options, evaluations=1)
    configs = {name: lab.make_config(shared | changes) for name, changes in VARIANTS.items()}
    if options.start != "init":  # the output of the legacy branch contains its input
        changes = VARIANTS["official"] | {"model.branch_start": options.start}
        configs = {"official": lab.make_config(shared | changes)}
    config = configs["official"]
    task = lab.text_task(config)
    trained = lab.train(
        {name: lab.Arm(each, task) for name, each in configs.items()},
        seeds=options.seeds,
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
    )
    jit, seeds = lab.jit(options.quick), options.seeds
    count = 4 if options.quick else GRADIENTS
    size = {"dim": 32, "layers": 1, "heads": 1} if options.quick else {}
    with ThreadPoolExecutor(len(trained) + 1) as pool:  # programs compile side by side
        published = pool.submit(as_published, seeds, size, jit)
        look = lambda name: measure(configs[name], task, trained[name], seeds, count, jit)
        found = dict(zip(trained, pool.map(look, trained)))
    measures, tables, plots = {}, [], []
    for name, each in found.items():
        suffix = "" if name == "official" else f", {name}"
        measures |= measures_of(each, suffix)
        tables += tables_of(f"{name} branch", each, task.unit)
        plots += plots_of(f"{name} branch", each, task.unit)
    shares, ratios = published.result()
    measures["Mamba share, published"] = estimate(shares)
    measures["gradient Mamba / RWKV, untrained"] = estimate(ratios)
    results.write(
        options,
        name="-".join(["paradox", *([options.start] if options.start != "init" else [])]),
        settings=lab.settings(config) | {"rate": options.lr, "gradient batches": count},
        measures=measures,
        tables=tables,
        plots=plots,
        notes=[
            "Losses are of the whole validation text. A mean replaces a part by its mean over that "
            "text; the gate keeps the value it has with both branches. Where an output is replaced "
            "before the fusion, the gate sees that.",
            '"Mamba share, published" and "gradient Mamba / RWKV, untrained" are what the original '
            "project measured: an untrained model on random tokens, state norm against output norm "
            "and gradients of a single batch, averaged over tensors.",
        ],
    )


def measure(config, task, runs, seeds, count, jit):
    """What the module says of runs, before ("untrained") and after training ("trained").

    Returns:
        {when: {"share", "share_with_input", "gate", "gate_spread": [seeds, layers]; "gradient",
        "update": {branch: [seeds]}}}; the trained ones also have "added": {(what, how, place):
        [seeds] nats}, as `every_ablation` names them, and "added before" the fusion, as `ablations`
        does.
    """
    model = make_model(runs.model_config)
    at_first = make_model(make_model_config(config, task.vocab_size))
    held_out = stacked(task.held_out)
    inits = jit(lambda key: at_first.init(jax.random.fold_in(key, 0), held_out.inputs[0]))
    contributed = jit(functools.partial(ablation.contributions, model))
    lost = jit(functools.partial(ablation.losses, model))
    means_before = jit(functools.partial(output_means, model))
    lost_before = jit(functools.partial(ablated_losses, model))
    norms = jit(functools.partial(gradient_norms, model, config))

    found = {"untrained": [], "trained": []}
    for i, seed in enumerate(seeds):
        feed = task.batches(seed)
        some = stacked([next(feed) for _ in range(count)])
        params = {
            "untrained": inits(jax.random.key(seed))["params"],
            "trained": jax.tree.map(lambda x, i=i: x[i], runs.params),
        }
        for when, each in params.items():
            one = jax.device_get(contributed(each, held_out) | norms(each, some))
            variance = one.pop("gate_square") - np.square(one["gate"])
            one["gate_spread"] = np.sqrt(np.maximum(variance, 0))
            means = one.pop("mean")
            if when == "trained":
                names, keep, fill = ablation.every_ablation(model.config, means)
                loss = jax.device_get(lost(each, held_out, keep, fill))
                one["added"] = dict(zip(names[1:], loss[1:] - loss[0]))
                means = jax.device_get(means_before(each, held_out))
                names, keep, fill = ablations(model.config, means)
                loss = jax.device_get(lost_before(each, held_out, keep, fill))
                one["added before"] = dict(zip(names[1:], loss[1:] - loss[0]))
            found[when].append(one)
    return {when: jax.tree.map(lambda *x: np.stack(x), *each) for when, each in found.items()}


def measures_of(found, suffix):
    """name -> estimate, by the names that claims use."""
    measures = {}
    for when, f in found.items():
        time = "before training" if when == "untrained" else when
        measures[f"Mamba share, {time}{suffix}"] = estimate(1 - f["share"].mean(-1))
        for kind in ("gradient", "update"):
            ratio = f[kind]["mamba"] / f[kind]["rwkv"]
            measures[f"{kind} Mamba / RWKV, {time}{suffix}"] = estimate(ratio)
    for (what, how, place), values in found["trained"]["added"].items():
        if place == "all":
            instead = ", its mean instead" if how == "mean" else ""
            measures[f"loss added without {what}{instead}{suffix}"] = estimate(values)
    for (what, how, place), values in found["trained"]["added before"].items():
        if place == "all":
            instead = ", its mean instead" if how == "mean" else ""
            name = f"loss added without {what} before the fusion{instead}{suffix}"
            measures[name] = estimate(values)
    return measures


def tables_of(title, found, unit):
    """Losses added and shares, block by block; norms before and after training."""
    trained = found["trained"]
    layers = range(trained["gate"].shape[-1])
    names = ("gate", "gate_spread", "share", "share_with_input")
    shares = [
        [f"block {layer}", when, *(estimate(f[name][:, layer]) for name in names)]
        for layer in layers
        for when, f in found.items()
    ]
    sizes = [
        [
            when,
            kind,
            *(estimate(f[kind][b]) for b in BRANCHES),
            estimate(f[kind]["mamba"] / f[kind]["rwkv"]),
        ]
        for kind in ("gradient", "update")
        for when, f in found.items()
    ]
    return [
        added_table(f"{title}: loss added without", trained["added"], unit),
        results.table(
            f"{title}: gate, and RWKV's share of the update",
            ["", "", "gate", "spread over positions", "share", "share, input counted"],
            shares,
            "Shares are means over positions of norms.",
        ),
        results.table(
            f"{title}: gradients and updates",
            ["", "", "RWKV", "Mamba", "Mamba / RWKV"],
            sizes,
            "Root mean square over parameters; updates are Adam's at learning rate 1.",
        ),
        added_table(
            f"{title}: loss added without, before the fusion", trained["added before"], unit
        ),
    ]


def added_table(title, added, unit):
    """Losses added by place and kind of ablation."""
    kinds = list(dict.fromkeys((what, how) for what, how, _ in added))
    columns = [what if how == "zero" else f"{what}, mean instead" for what, how in kinds]
    places = dict.fromkeys(place for *_, place in added)
    rows = [[place, *(estimate(added[*kind, place]) for kind in kinds)] for place in places]
    note = f"Nats per {unit} that the validation loss rises by; means and half 95 % intervals."
    return results.table(title, ["", *columns], rows, note)


def plots_of(title, found, unit):
    """Losses added and shares over depth."""
    trained = found["trained"]
    layers = range(trained["gate"].shape[-1])
    lines = [
        results.line(
            what,
            layers,
            np.stack([trained["added"][what, "mean", f"block {layer}"] for layer in layers], 1),
        )
        for what in ("RWKV", "Mamba")
    ]
    shares = [
        results.line(when, layers, 1 - f["share"], within=results.SHARE)
        for when, f in found.items()
    ]
    return [
        results.plot(
            f"{title}: one branch replaced by its mean", "block", f"nats per {unit} added", lines
        ),
        results.plot(f"{title}: Mamba's share of the update", "block", "share", shares),
    ]


def gradient_norms(model, config, params, batches):
    """Root mean square per parameter of each branch's gradient, and of its Adam update.

    The update is AdamW's at learning rate 1, decay left out, after its moments took in the gradient
    of every batch [N, B, T] at these parameters; the gradient is the last batch's, clipped as in
    training.

    Returns:
        {"gradient": {"rwkv": ..., "mamba": ...}, "update": {...}} float32.
    """
    adam = optax.scale_by_adam(config.optim.b1, config.optim.b2, config.optim.eps)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch.inputs, segment_ids=batch.segment_ids).logits
        return summed_loss(logits, batch.targets) / jnp.sum(batch.targets >= 0)

    def step(state, batch):
        grads = jax.grad(loss)(params, batch)
        grads = optimizer.clip(grads, optax.tree.norm(grads), config.optim.clip)
        updates, state = adam.update(grads, state)
        norms = {"gradient": grads, "update": updates}
        return state, {kind: optimizer.norms_by_label(tree) for kind, tree in norms.items()}

    _, norms = jax.lax.scan(step, adam.init(params), batches)
    ones = optimizer.norms_by_label(jax.tree.map(jnp.ones_like, params))  # roots of the sizes
    return {kind: {b: found[b][-1] / ones[b] for b in BRANCHES} for kind, found in norms.items()}


def as_published(seeds, size, jit, *, vocab_size=16000, length=128):
    """What the original project measured, of untrained models on random tokens.

    Returns:
        [seeds] each: Mamba's share |m| / (|m| + |s|), with m its output at the last position of the
        last block and s the state of a vector recurrence whose weights belong to no model; and the
        mean norm of the gradients of Mamba's tensors over that of RWKV's.
    """
    make = functools.partial(make_config, "gf-mh", vocab_size=vocab_size, branch="legacy", **size)
    model = make_model(make(init="normal", legacy_wkv="a"))
    other = make_model(make(init="official", legacy_wkv="b1"))  # whose RWKV keeps its own init

    def of_seed(given):
        key, tokens = given
        params, others = (each.init(key, tokens[:1])["params"] for each in (model, other))

        def loss(params):
            logits = model.apply({"params": params}, tokens[:, :-1]).logits
            return summed_loss(logits, tokens[:, 1:]) / tokens[:, 1:].size

        norms = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
            norms.setdefault(optimizer.label(path), []).append(jnp.linalg.norm(leaf))
        rwkv, mamba = (jnp.stack(norms[branch]).mean() for branch in BRANCHES)

        mixed = {
            name: part | {"rwkv": others[name]["rwkv"]} if "rwkv" in part else part
            for name, part in params.items()
        }
        output, sown = other.apply({"params": mixed}, tokens, mutable=["activations"])
        last = sown["activations"][f"blocks_{model.config.layers - 1}"]
        m = jnp.linalg.norm(last["mamba_out"][0][:, -1], axis=-1)
        s = jnp.linalg.norm(output.state[-1].rwkv.numerator, axis=-1)
        return jnp.mean(m / (m + s)), mamba / rwkv

    draw = lambda seed: np.random.default_rng(seed).integers(vocab_size, size=(4, length))
    tokens = np.stack([draw(seed) for seed in seeds]).astype(np.int32)
    keys = jax.vmap(jax.random.key)(np.array(seeds))
    return jax.device_get(jit(functools.partial(jax.lax.map, of_seed))((keys, tokens)))


if __name__ == "__main__":
    command.run(main)
