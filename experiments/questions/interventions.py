"""Does any remedy for the imbalance of the branches lower the loss?

    python -m experiments interventions --seeds=3
    python -m experiments interventions --only="Mamba rate 0.5,warm-up 50 %" --steps=1000

GF-MH of width 128 and 8 blocks with one thing changed: the learning rate of a branch, a gate that
stays where it starts, a longer or no warm-up, of all or of a branch, a branch that waits, larger
gradients of Mamba, a dropped RWKV branch, a loss that balances the branches, another init. All
read the same batches of characters, 64 x 64 a step, at the original's 3e-4 and at 3e-3, which suits
a plain run best. They are held against the plain run of the same seed: all at 3e-4, and each at the
rate of the two that is better for it on the first half of the validation text. Losses are of the
second half.
"""

import dataclasses

import jax
import numpy as np

from experiments import lab
from experiments.lab import ablation, command, comparisons, results, variants
from experiments.lab.comparisons import late
from experiments.lab.families import TEXTS
from experiments.lab.programs import stacked
from experiments.lab.statistics import compare, estimate
from experiments.lab.variants import RATES
from gt_jax.models import make_model

PLAIN = "plain"
WARMUP = "optim.warmup_steps"
WEIGHT = 0.1  # of the balancing loss of a block
MAMBA_WARMUP, RWKV_WARMUP = "optim.part_warmup_steps.mamba", "optim.part_warmup_steps.rwkv"
MAMBA_FROZEN, GATE_FROZEN = "optim.frozen_steps.mamba", "optim.frozen_steps.gate"
STEPS = (WARMUP, MAMBA_WARMUP, RWKV_WARMUP, MAMBA_FROZEN, GATE_FROZEN)  # given as shares of all
# name -> config changes
INTERVENTIONS = {
    PLAIN: {},
    "RWKV rate 0.5": {"optim.lr_multipliers.rwkv": 0.5},
    "RWKV rate 2": {"optim.lr_multipliers.rwkv": 2.0},
    "Mamba rate 0.5": {"optim.lr_multipliers.mamba": 0.5},
    "Mamba rate 2": {"optim.lr_multipliers.mamba": 2.0},
    "gate frozen": {"optim.lr_multipliers.gate": 0.0},
    "gate frozen at first": {GATE_FROZEN: 0.2},
    "Mamba gradients 10": {"optim.mamba_grad_scale": 10.0},
    "Mamba warm-up 2": {MAMBA_WARMUP: 0.2},
    "RWKV ramp": {RWKV_WARMUP: 0.5},
    "Mamba delayed": {MAMBA_FROZEN: 0.5},
    "ramp and delay": {RWKV_WARMUP: 0.5, MAMBA_WARMUP: 0.2, MAMBA_FROZEN: 0.1},
    "no warm-up": {WARMUP: 0.0},
    "warm-up 50 %": {WARMUP: 0.5},
    "RWKV dropout": {"train.rwkv_dropout_start": 0.4, "train.rwkv_dropout_end": 0.1},
    "balanced": {"debate.balance_weight": WEIGHT},
    "normal init": {"model.init": "normal"},
    "BlinkDL init": {"model.init": "blinkdl"},
}
QUICK = ("gate frozen", "warm-up 50 %", "balanced")
PUBLISHED_WARMUP = 0.1
SUBWORDS = "plain, subwords"
QUICK_VOCABULARY = 320  # the bytes, the characters, and some more
ABLATIONS = [("nothing", "zero", "all"), ("RWKV", "mean", "all"), ("Mamba", "mean", "all")]
COLUMNS = ["", "at 3e-4", "at its best", "best rate", "R/M at 3e-4", "R/M at its best"]
COLUMNS += ["Mamba's share", "RWKV's worth", "Mamba's worth"]


def main(argv=None):
    parser = command.parser("interventions", __doc__)
    parser.set_defaults(seeds=3)
    variants.add_flags(parser)
    parser.add_argument("--only", help="with commas between; default: all, or some if --quick")
    options = command.parse(parser, argv)
    known = ",".join(QUICK if options.quick else INTERVENTIONS)
    names = command.one_of(INTERVENTIONS, f"{PLAIN},{options.only or known}", "--only")
    arms = arms_of(options, dict.fromkeys(names))
    runs = lab.train(
        arms,
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
    )
    at_reference = {name: r.at({"optim.lr": variants.REFERENCE_RATE}) for name, r in runs.items()}
    characters = {name: r for name, r in runs.items() if name != SUBWORDS}
    best = {name: comparisons.best_rate(r) for name, r in characters.items()}
    at_best = {name: r.at({"optim.lr": best[name]}) for name, r in characters.items()}
    reference = {name: comparisons.final(at_reference[name]) for name in characters}
    tuned = {name: comparisons.final(r) for name, r in at_best.items()}
    differences = {
        "3e-4": compare(reference, against=PLAIN),
        "best": compare(tuned, against=PLAIN),
    }
    contributed = contributions(at_best, arms[PLAIN].task, quick=options.quick)

    measures, rows = {}, []
    for name in characters:
        found = {
            f"loss {name} at 3e-4": estimate(reference[name]),
            f"loss {name} at its best": estimate(tuned[name]),
            f"best rate {name}": best[name],
            f"R/M gradient ratio {name} at 3e-4": estimate(late(at_reference[name], "r_m_ratio")),
            f"R/M gradient ratio {name} at its best": estimate(late(at_best[name], "r_m_ratio")),
        }
        found |= {f"{key} {name}": estimate(v) for key, v in contributed[name].items()}
        measures |= found
        rows.append([name, *found.values()])
    ratios = (late(at_reference[name], "r_m_ratio") for name in (SUBWORDS, PLAIN))
    measures["R/M gradient ratio, subwords / characters"] = estimate(np.divide(*ratios))
    for at, pairs in differences.items():
        measures |= {f"{pair['a']} - {PLAIN} at {at}": pair for pair in pairs}
    config = arms[PLAIN].config
    unit = "nats per character"
    results.write(
        options,
        name=variants.result_name(options),
        settings=variants.settings_of(options, config) | {"rates": RATES},
        measures=measures,
        tables=[
            results.table(
                f"Validation loss after {config.train.steps} steps, {unit}",
                COLUMNS,
                rows,
                "R/M is the ratio of the branches' gradient norms over the last tenth of the "
                "steps. The rest is at the best rate: Mamba's share of the norm of the update, "
                "and what the loss rises by if a branch is replaced by its mean in all blocks.",
            ),
            comparisons.difference_table("Differences at 3e-4", differences["3e-4"]),
            comparisons.difference_table("Differences, each at its best rate", differences["best"]),
        ],
        plots=[
            comparisons.dots("All at 3e-4", reference),
            comparisons.dots("Each at its best rate", tuned),
            results.plot(
                "R/M gradient ratio at 3e-4",
                "step",
                "",
                [results.line(n, *smooth(at_reference[n])) for n in characters],
                log="y",
            ),
        ],
        notes=[
            f"At the best rates, {verdict(differences['best'])}",
            f"A plain run warms up for {PUBLISHED_WARMUP:.0%} of its steps. The balancing loss is "
            f"{WEIGHT:g} (s - 1/2)^2 in every block, s being RWKV's part of the squared norm of "
            "the update, averaged over a row; losses do not count it in.",
            "R/M of subwords and characters is compared at 3e-4.",
            *variants.notes_of(options),
        ],
    )


def arms_of(options, names):
    """name -> Arm of the interventions, and of the plain run on SentencePiece tokens."""
    changes = {}
    for name in names:
        steps = command.QUICK["train.steps"] if options.quick else options.steps
        changes[name] = {WARMUP: PUBLISHED_WARMUP} | INTERVENTIONS[name]
        for field in set(STEPS) & set(changes[name]):
            changes[name][field] = round(changes[name][field] * steps)
    subwords = TEXTS["subwords"] | ({"data.vocab_size": QUICK_VOCABULARY} if options.quick else {})
    made = variants.arms_of(options, "gf-mh", changes)
    made |= variants.arms_of(options, "gf-mh", {SUBWORDS: changes[PLAIN] | subwords})
    return {name: lab.Arm(*each) for name, each in made.items()}


def contributions(runs, task, *, quick):
    """name -> {"Mamba share", "loss added without RWKV", "... Mamba": [seeds]}, of trained hybrids.

    A branch is replaced by its mean over the text in all blocks.
    """
    # One program for all: they differ in what their training was, not in what they compute.
    model = make_model(dataclasses.replace(runs[PLAIN].model_config, gate_init=None))
    held_out = jax.device_put(stacked(task.held_out))
    jit = lab.jit(quick)

    @jit
    def contributed(params, held_out):
        of_one = lambda each: ablation.contributions(model, each, held_out)
        found = jax.lax.map(of_one, params)
        return {name: found[name] for name in ("mean", "share")}

    @jit
    def lost(params, held_out, keep, fill):
        of_one = lambda each: ablation.losses(model, each[0], held_out, *each[1:])
        return jax.lax.map(of_one, (params, keep, fill))

    found = {}
    for name, r in runs.items():
        one = jax.device_get(contributed(r.params, held_out))
        keeps, fills = [], []
        for means in one["mean"]:
            names, keep, fill = ablation.every_ablation(model.config, means)
            chosen = [names.index(wanted) for wanted in ABLATIONS]
            keeps.append(keep[chosen])
            fills.append(fill[chosen])
        lost_in = lost(r.params, held_out, np.stack(keeps), np.stack(fills))
        whole, *without = np.asarray(lost_in).T
        found[name] = {"Mamba share": 1 - one["share"].mean(-1)}
        for (branch, *_), loss in zip(ABLATIONS[1:], without):
            found[name][f"loss added without {branch}"] = loss - whole
    return found


def smooth(runs, stretches=25):
    """Steps, and R/M gradient ratios [runs, stretches] over them, means over equal stretches."""
    ratios = np.array_split(runs.metrics["r_m_ratio"], min(stretches, runs.steps[-1]), axis=1)
    ends = np.cumsum([r.shape[1] for r in ratios])
    return ends, np.stack([r.mean(1) for r in ratios], axis=1)


def verdict(pairs):
    """What became of the loss, as the rest of a sentence."""
    real = {sign: [p["a"] for p in pairs if p["real"] and p["mean"] * sign > 0] for sign in (-1, 1)}
    better, worse = (", ".join(real[sign]) or "none" for sign in (-1, 1))
    return f"better than the plain run: {better}; worse: {worse}."


if __name__ == "__main__":
    command.run(main)
