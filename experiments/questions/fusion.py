"""Which way of joining RWKV-6 and Mamba-2 learns best, and which differences are real.

    python -m experiments fusion --seeds=5
    python -m experiments fusion --branch=legacy --source=tinyshakespeare.txt
    python -m experiments fusion --only=GF,HY --steps=5000

Six fusions of width 128 and 8 blocks read the same batches of characters, 64 x 64 a step, at every
learning rate of one small sweep. They are held against each other twice: all at the original's
3e-4, and each at the rate that suits it best, chosen by its mean loss on the first half of the
validation text. All losses that are compared are of the second half, at the last step.
--branch=legacy takes the original's RWKV branch, init, split and order of the text instead.
"""

from experiments import lab
from experiments.lab import command, results
from experiments.lab.comparisons import (
    best_rate,
    difference_table,
    dots,
    final,
    ranked,
    second_half,
)
from experiments.lab.statistics import compare, estimate
from experiments.lab.variants import (
    REFERENCE_RATE,
    add_flags,
    arms_of,
    notes_of,
    result_name,
    settings_of,
)

FUSIONS = ("HY", "GF", "CP", "WS", "RF", "HGF")
RATES = (REFERENCE_RATE, 3e-3, 9e-3)  # at 1e-3, tried before, none was at its best


def main(argv=None):
    parser = command.parser("fusion", __doc__)
    add_flags(parser)
    parser.add_argument("--only", default=",".join(FUSIONS), help="fusions, with commas between")
    options = command.parse(parser, argv)
    names = command.one_of(FUSIONS, options.only, "--only")
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
                    for n in ranked(tuned)
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


if __name__ == "__main__":
    command.run(main)
