"""Do RWKV-6, Mamba-2, GPT and the hybrid differ in how their activations grow with depth?

    python -m experiments characterize --seeds=3

Spreads (standard deviations over all entries) of the embedding, of the residual stream after every
block and of every raw mixer, and the health of the logits, before and after training, of models of
one width and depth. Growth is the spread after the last block over that of a reference.

Under "project" each family has the init and learning rate that the original project gave it, a
reference of its own (GPT and Mamba-2 the embedding, RWKV the first block), and the original's RWKV
mixer. It reported 782 for GPT, 5.5 for RWKV and 2.0 for Mamba-2. Under every other setting all
families have the same init, optimizer, data and reference, the embedding.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import command, programs, results
from experiments.lab.statistics import estimate
from gt_jax.models import make_model
from gt_jax.training import backend
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state

FAMILIES = {
    "RWKV-6": {"model.preset": "rwkv6", "model.tie_embeddings": True},
    "Mamba-2": {"model.preset": "mamba2", "model.state_size": 64},
    "Mamba-2 with feed-forward": {
        "model.preset": "mamba2",
        "model.state_size": 64,
        "model.mamba_feed_forward": True,
    },
    "GPT": {"model.preset": "gpt1"},
    "GF-MH": {"model.preset": "gf-mh"},
}
MIXERS = ("rwkv", "mamba", "attention")
# Of every model; subwords, as the original project had.
COMMON = {
    "model.dim": 128,
    "model.layers": 8,
    "model.heads": 4,
    "data.tokenizer": "sentencepiece",
    "data.vocab_size": 4096,
}
QUICK_VOCABULARY = 300  # the bytes, and the characters of a short text
PROFILED = 2048  # tokens


class Setting(NamedTuple):
    """model.init, other config changes, and whether the embedding starts scaled to a spread of 1.

    The first and the last do not matter to a program that trains: settings share it.
    """

    init: str
    changes: dict
    unit_embedding: bool = False


def brief(init, lr, weight_decay, **options):
    """The project's 50 steps on consecutive windows of 64 tokens, one row, constant rate."""
    changes = {"optim.lr": lr, "optim.weight_decay": weight_decay}
    changes |= {"optim.warmup_steps": 0, "optim.min_lr_ratio": 1.0, "data.order": "tracks"}
    changes |= {"train.steps": 50, "train.batch_size": 1, "train.seq_len": 64}
    return Setting(init, changes, **options)


def trained(init):
    """500 steps of 64 rows."""
    return Setting(init, {"optim.lr": 1e-3})


SETTINGS = {
    "normal init, trained": trained("normal"),
    "official init, trained": trained("official"),
    "normal init, 50 steps": brief("normal", 3e-4, 0.1),
    "unit embedding, 50 steps": brief("normal", 3e-4, 0.1, unit_embedding=True),
    "BlinkDL init, 50 steps": brief("blinkdl", 3e-4, 0.1),
    "BlinkDL init, 50 steps at 1e-3": brief("blinkdl", 1e-3, 0.01),
}
MATCHED = "normal init, trained"  # the one that claims are held against
PROJECT = {
    "RWKV-6": brief("official", 3e-4, 0.1, unit_embedding=True),
    "Mamba-2": brief("official", 3e-4, 0.1, unit_embedding=True),
    "GPT": brief("blinkdl", 1e-3, 0.01),
}
PROJECT["RWKV-6"].changes.update({"model.branch": "legacy", "model.legacy_wkv": "c"})
PAIRS = (("GPT", "RWKV-6"), ("RWKV-6", "Mamba-2"))


def main(argv=None):
    parser = command.parser("characterize", __doc__)
    parser.set_defaults(seeds=3)
    options = command.parse(parser, argv)
    backend.prepare()
    settings = dict(itertools.islice(SETTINGS.items(), 1 if options.quick else None))
    jobs = {("project", family): setting for family, setting in PROJECT.items()}
    jobs |= {(name, family): setting for name, setting in settings.items() for family in FAMILIES}

    arms, tasks = {}, {}
    for (name, family), setting in jobs.items():
        changes = COMMON | FAMILIES[family] | setting.changes | command.common(options)
        if options.quick:
            changes["data.vocab_size"] = QUICK_VOCABULARY
        config = lab.make_config(changes)
        text = config.data, config.train
        if text not in tasks:
            tasks[text] = lab.text_task(config)
        arms[name, family] = lab.Arm(config, tasks[text])
    planned = programs.plan(arms, options.seeds, {})
    look = lambda program: profiles(program, jobs, options.quick)
    found = {
        job: profiled
        for each in programs.side_by_side(look, planned)
        for job, profiled in each.items()
    }

    measures, tables, plots = {}, [], []
    for name in ("project", *settings):
        mine = {family: found[key, family] for key, family in jobs if key == name}
        suffix = {"project": "unmatched", MATCHED: "matched"}.get(name, name)
        growths = {
            family: growth(by_time["after"], first=(name, family) == ("project", "RWKV-6"))
            for family, by_time in mine.items()
        }
        for family, by_time in mine.items():
            measures[f"growth {family}, {suffix}"] = estimate(growths[family])
            measures[f"saturated {family}, {suffix}"] = estimate(by_time["after"]["saturated"])
            for mixer in MIXERS:
                for when, time in (("untrained", "before"), ("trained", "after")):
                    if f"{mixer}_gain" in by_time[time]:
                        variance = np.square(by_time[time][f"{mixer}_gain"]).mean(-1)
                        name_of_it = f"mixer variance {family} {mixer}, {when}, {suffix}"
                        measures[name_of_it] = estimate(variance)
        for a, b in PAIRS:
            measures[f"growth {a} / {b}, {suffix}"] = estimate(growths[a] / growths[b])
        tables += tables_of(name, mine)
        series = [
            results.line(
                family,
                range(by_time["after"]["block_std"].shape[-1]),
                by_time["after"]["block_std"],
            )
            for family, by_time in mine.items()
        ]
        plots.append(
            results.plot(f"{name}: spread", "block", "standard deviation", series, log="y")
        )
    results.write(
        options,
        settings={"settings": {name: s._asdict() for name, s in settings.items()}},
        measures=measures,
        tables=tables,
        plots=plots,
        notes=[
            f'"Matched" measures are of the setting "{MATCHED}", "unmatched" ones of "project".',
            "The spread of an embedding that starts near zero stands in the denominator of growth: "
            "it, not the family, sets the size of that number.",
            "The project's Mamba-2 prototype and its vocabulary of 16 000 are not reproduced.",
        ],
    )


def profiles(program, settings, quick):
    """{"before", "after"} of every arm of a program: what `profile` says, [seeds, ...].

    Args:
        program: of lab/programs.py, with the keys of `settings` as names.
        settings: name -> Setting.
    """
    jit = lab.jit(quick)
    config, task = program.config, program.task
    tx = make_optimizer(config.optim, make_schedule(config.optim, config.train.steps))
    _, values, of_run, seeds = programs.inputs_of(program, slice(None), len(program.points))

    def initial(setting, seed):
        model_config = make_model_config(config, task.vocab_size)
        model = make_model(dataclasses.replace(model_config, init=setting.init))
        state = init_state(model, tx, config, jax.random.key(seed))
        if not setting.unit_embedding:
            return state
        table = state.params["embedding"]["embedding"]
        scaled = {"embedding": {"embedding": table / table.std()}}
        return state.replace(params=state.params | scaled)

    def init(seeds):
        parts = [
            jax.vmap(functools.partial(initial, settings[name]))(seeds) for name in program.names
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)  # [arms * seeds]

    feeds = [task.batches(seed) for seed in seeds]
    steps = [programs.stacked(map(next, feeds)) for _ in range(config.train.steps)]
    texts = np.concatenate([batch.inputs for batch in task.held_out])
    texts = texts[: max(PROFILED // config.train.seq_len, 1)]
    model = make_model(program.model_config)
    look = jit(jax.vmap(functools.partial(profile, model), in_axes=(0, None)))
    advance = programs.functions(program)[1]
    learn = jit(lambda *given: advance(*given)[0])

    states = jit(init)(np.array(seeds, np.uint32))
    found = {"before": jax.device_get(look(states.params, texts))}
    states = learn(states, values, of_run, programs.stacked(steps))
    found["after"] = jax.device_get(look(states.params, texts))
    by_arm = jax.tree.map(lambda x: x.reshape(len(program.names), len(seeds), *x.shape[1:]), found)
    return {name: jax.tree.map(lambda x, i=i: x[i], by_arm) for i, name in enumerate(program.names)}


def profile(model, params, tokens):
    """Spread of a model's activations on some tokens [B, T], over all of their entries.

    Returns:
        A dict of float32: embedding_std []; block_std [layers] of the residual stream after each
        block; rwkv_gain, mamba_gain or attention_gain [layers], the std of a mixer's output over
        that of its normalised input; and of the logits logit_low, logit_high, logit_std, entropy
        (mean, nats), top (mean of the largest probability) and saturated (share of positions where
        it exceeds 0.99), all [].
    """
    output, kept = model.apply(
        {"params": params}, tokens, capture_intermediates=_is_measured, mutable=["intermediates"]
    )
    kept = kept["intermediates"]
    blocks = [kept[f"blocks_{layer}"] for layer in range(model.config.layers)]
    std = lambda x: jnp.std(x.astype(jnp.float32))
    # What the residual stream begins with; RWKV-6 normalises the embedding first.
    start = params["embedding"]["embedding"][tokens]  # [B, T, D]
    if "embedding_norm" in blocks[0]:
        start = blocks[0]["embedding_norm"]["__call__"][0]
    # A block and a mixer return (output, state).
    found = {
        "embedding_std": std(start),
        "block_std": jnp.stack([std(block["__call__"][0][0]) for block in blocks]),
    }
    for mixer in MIXERS:
        if mixer in blocks[0]:
            gains = [
                std(block[mixer]["__call__"][0][0]) / std(block["mixer_norm"]["__call__"][0])
                for block in blocks
            ]
            found[f"{mixer}_gain"] = jnp.stack(gains)
    log_p = jax.nn.log_softmax(output.logits)
    top = jnp.exp(log_p.max(axis=-1))
    return found | {
        "logit_low": output.logits.min(),
        "logit_high": output.logits.max(),
        "logit_std": std(output.logits),
        "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1).mean(),
        "top": top.mean(),
        "saturated": jnp.mean(top > 0.99),
    }


def _is_measured(module, method):
    name = module.name or ""
    measured = name.startswith("blocks_") or name in ("embedding_norm", "mixer_norm", *MIXERS)
    return measured and method == "__call__"


def growth(profiled, *, first=False):
    """[seeds] spread after the last block over that of the embedding, or after the first block."""
    blocks = profiled["block_std"]
    return blocks[:, -1] / (blocks[:, 0] if first else profiled["embedding_std"])


def tables_of(title, mine):
    """Growth of every family, and the health of its logits."""
    spreads, logits = [], []
    for family, by_time in mine.items():
        for when, p in by_time.items():
            blocks = p["block_std"]
            found = [p["embedding_std"], blocks[:, 0], blocks[:, -1], blocks[:, -1] ** 2]
            found += [growth(p), growth(p, first=True)]
            gains = [
                f"{mixer} {p[f'{mixer}_gain'].mean():.3g}"
                for mixer in MIXERS
                if f"{mixer}_gain" in p
            ]
            spreads.append([family, when, *map(estimate, found), ", ".join(gains)])
            names = ("logit_low", "logit_high", "logit_std", "entropy", "top", "saturated")
            logits.append([family, when, *(estimate(p[name]) for name in names)])
    columns = ["", "", "embedding", "first block", "last block", "last, variance"]
    columns += ["last / embedding", "last / first", "raw mixer"]
    return [
        results.table(
            f"{title}: spread",
            columns,
            spreads,
            "Standard deviations where not said otherwise; of a raw mixer that of its output over "
            "that of its normalised input, mean over blocks and seeds. RWKV-6 normalises its "
            "embedding, and what comes of that is taken for it.",
        ),
        results.table(
            f"{title}: logits",
            ["", "", "least", "largest", "spread", "entropy, nats", "top probability", "saturated"],
            logits,
            "Saturated: share of positions where a token has a probability above 0.99.",
        ),
    ]


if __name__ == "__main__":
    command.run(main)
