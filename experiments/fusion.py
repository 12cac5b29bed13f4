"""Which way of joining RWKV-6 and Mamba-2 learns best, and which differences are real.

    python -m experiments.fusion --seeds=5
    python -m experiments.fusion --branch=legacy --source=tinyshakespeare.txt
    python -m experiments.fusion --only=GF,HY --steps=5000

Six fusions of width 128 and 8 blocks read the same batches of characters, 64 x 64 a step, at every
learning rate of one small sweep. They are held against each other twice: all at the original's
3e-4, and each at the rate that suits it best, chosen by its mean loss on the first half of the
validation text. All losses that are compared are of the second half, at the last step.
--branch=legacy takes the original's RWKV branch, init, split and order of the text instead.
"""

import numpy as np

from experiments import lab, results
from experiments.statistics import compare, estimate

FUSIONS = ("HY", "GF", "CP", "WS", "RF", "HGF")
REFERENCE_RATE = 3e-4
RATES = (REFERENCE_RATE, 3e-3, 9e-3)  # at 1e-3, tried before, none was at its best
BRANCHES = {
    "official": {},
    "legacy": {
        "model.branch": "legacy",
        "model.init": "normal",
        "data.split": "tracks",
        "data.order": "tracks",
    },
}


def main(argv=None):
    parser = results.parser("fusion", __doc__)
    add_flags(parser)
    parser.add_argument("--only", default=",".join(FUSIONS), help="fusions, with commas between")
    options = results.parse(parser, argv)
    names = results.one_of(FUSIONS, options.only, "--only")
    changes = {name: {"model.fusion": name.lower()} for name in names}
    arms = {name: lab.Arm(*each) for name, each in arms_of(options, "gf", changes).items()}
    runs = lab.train(
        arms,
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
    )

    best = {name: best_rate(r) for name, r in runs.items()}
    at_reference = {name: r.at({"optim.lr": REFERENCE_RATE}) for name, r in runs.items()}
    at_best = {name: r.at({"optim.lr": best[name]}) for name, r in runs.items()}
    reference = {name: final(r) for name, r in at_reference.items()}
    tuned = {name: final(r) for name, r in at_best.items()}
    whole = {name: estimate(r.loss()[:, -1]) for name, r in at_reference.items()}
    differences = {"3e-4": compare(reference), "best": compare(tuned)}

    measures = {}
    for name in names:
        measures[f"loss {name} at 3e-4"] = estimate(reference[name])
        measures[f"loss {name} at its best"] = estimate(tuned[name])
        measures[f"whole-split loss {name} at 3e-4"] = whole[name]
        measures[f"best rate {name}"] = best[name]
        measures[f"parameters {name}"] = runs[name].parameters
    for at, pairs in differences.items():
        measures |= {f"{pair['a']} - {pair['b']} at {at}": pair for pair in pairs}
    unit = "nats per character"
    results.write(
        options,
        name=result_name(options),
        settings=settings_of(options, arms[names[0]].config) | {"rates": RATES},
        measures=measures,
        tables=[
            results.table(
                f"Validation loss after {arms[names[0]].config.train.steps} steps, {unit}",
                ["fusion", "parameters", "at 3e-4", "at its best rate", "best rate"],
                [
                    [n, runs[n].parameters, estimate(reference[n]), estimate(tuned[n]), best[n]]
                    for n in sorted(names, key=lambda n: np.mean(tuned[n]))
                ],
                "Second half of the validation text, mean and half its 95 % interval over seeds.",
            ),
            difference_table("Differences at 3e-4", differences["3e-4"]),
            difference_table("Differences, each at its best rate", differences["best"]),
        ],
        plots=[
            dots("All at 3e-4", reference),
            dots("Each at its best rate", tuned),
            results.plot(
                "Validation loss at the best rate",
                "step",
                unit,
                [results.line(n, r.steps, r.loss(second_half(r))) for n, r in at_best.items()],
            ),
        ],
        notes=[
            "Learning rates are chosen on the first half of the validation text; all losses but "
            "the whole-split ones are of its second half.",
            *notes_of(options),
        ],
    )


def add_flags(parser):
    """Flags that fusion and ratio have in common."""
    parser.add_argument("--branch", choices=BRANCHES, default="official")
    parser.add_argument("--steps", type=int, default=500)


def arms_of(options, preset, changes):
    """name -> (config, task) of a preset with some changes, under the flags' settings."""
    shared = {"model.preset": preset, "optim.lr": REFERENCE_RATE} | BRANCHES[options.branch]
    shared |= results.common(options, evaluations=5)
    configs = {name: lab.make_config(shared | change) for name, change in changes.items()}
    task = lab.text_task(next(iter(configs.values())))
    return {name: (config, task) for name, config in configs.items()}


def second_half(runs):
    """The held-out batches that losses are reported of; the others choose learning rates."""
    return slice(len(runs.targets) // 2, None)


def best_rate(runs):
    """The learning rate with the lowest mean last loss on the first half of the validation text."""
    half = slice(0, len(runs.targets) // 2)
    means = {
        rate: np.mean(runs.at({"optim.lr": rate}).loss(half)[:, -1])
        for rate in dict.fromkeys(point["optim.lr"] for point in runs.points)
    }
    finite = {rate: mean for rate, mean in means.items() if np.isfinite(mean)}
    return min(finite or means, key=means.get)


def final(runs):
    """[runs] last loss on the second half of the validation text."""
    return runs.loss(second_half(runs))[:, -1]


def difference_table(title, pairs):
    """Who is better than whom, and who cannot be told apart."""
    rows = []
    for pair in pairs:
        a, b, mean = pair["a"], pair["b"], pair["mean"]
        verdict = "cannot be told apart"
        if pair["real"]:
            verdict = f"{a} is better" if mean < 0 else f"{b} is better"
        rows.append([f"{a} − {b}", pair, pair["p"], verdict])
    note = (
        "Paired by seed. p and the intervals are Holm-corrected over the rows of this table; a "
        "variant is called better only if the corrected interval leaves out zero."
    )
    return results.table(title, ["pair", "difference", "p", "verdict"], rows, note)


def dots(title, losses):
    ranked = sorted(losses, key=lambda name: np.mean(losses[name]))
    return results.plot(
        title, "nats per character", "", [results.dot(n, estimate(losses[n])) for n in ranked]
    )


def result_name(options):
    """The experiment's name, with what was changed about it."""
    parts = [options.experiment]
    parts += ["legacy"] if options.branch == "legacy" else []
    parts += [str(options.steps)] if options.steps != 500 else []
    return "-".join(parts)


def settings_of(options, config):
    return {"branch": options.branch} | lab.settings(config)


def notes_of(options):
    """What the data and the numbers of steps mean for comparison with published figures."""
    if options.branch == "legacy":
        text = "The ends of 64 slices of the text validate, as in the original project; the text "
        return [text + "is read in the original's order, so seeds differ in their first weights."]
    return ["A tenth of the text at its end validates, which is harder than the original's split."]


if __name__ == "__main__":
    results.run(main)
