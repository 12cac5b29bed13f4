"""How did a run go: five criteria, a grade from A to F, the V5 gate, and the decision matrix.

    python -m experiments scorecard runs/gf_mh
    python -m experiments scorecard runs/gf_mh --baseline=runs/gpt2 --speed=1.6 --memory=1.3
    python -m experiments scorecard runs/gf_mh --canaries=70 --scaling-fit=0.97

It reads a run's metrics.jsonl and computes nothing else: train with --config.log.activations=True
for the variances. The exit status is 1 if the grade is F.

The V5 gate compares with a baseline, as a rule GPT-2 of the same size: the best validation losses
of the two runs, and what --statefulness, --speed and --memory say (better is above 1). The decision
matrix is about the next scale: the grade, the share of canaries passed (python -m gt_jax.canaries),
R^2 of the power law (python -m experiments scaling) and the error of the predicted cost.
"""

from pathlib import Path

from experiments.lab import command, formats, results, scorecard
from gt_jax.errors import InputError
from gt_jax.training import metrics


def main(argv=None):
    parser = command.plain_parser("scorecard", __doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--baseline", type=Path, help="the folder of the run to compare with")
    for name in ("statefulness", "speed", "memory"):
        parser.add_argument(f"--{name}", type=float, help=f"the run's {name} over the baseline's")
    parser.add_argument("--canaries", type=float, help="share of canaries passed, in %%")
    parser.add_argument("--scaling-fit", type=float, help="R^2 of the power law of losses")
    parser.add_argument(
        "--prediction-error",
        type=float,
        help="relative error of the predicted resources, 0.1 for 10 %%",
    )
    options = parser.parse_args(argv)
    rows = read(options.run)
    axes = {name: getattr(options, name) for name in ("statefulness", "speed", "memory")}
    if options.baseline:
        axes["loss"] = best_loss(options.run, rows) / best_loss(
            options.baseline, read(options.baseline)
        )
    found = scorecard.criteria(rows)
    letter, why = scorecard.grade(found)
    gate = scorecard.v5(axes, rows)
    next_scale = scorecard.matrix(
        {
            "canaries": options.canaries,
            "scaling": options.scaling_fit,
            "resources": options.prediction_error,
        },
        letter,
    )
    tables = [
        results.table(
            f"{options.run}: {letter}", ["criterion", "", "", "because"], map(list, found)
        ),
        results.table(f"V5 gate: {gate.verdict}", ["axis", "ratio", ""], gate.rows),
        results.table(
            f"The next scale: {next_scale.verdict}", ["", "", "points", "weight"], next_scale.rows
        ),
    ]
    print("\n\n".join(map(formats.as_text, tables)))
    collapsed = scorecard.collapse(rows)
    blocks = ", ".join(f"block {layer} {kind}" for layer, kind in collapsed.items())
    print(
        f"\ngrade {letter}: {why}\nV5 gate {gate.verdict}: {'; '.join(gate.reasons)}\n"
        f"next scale {next_scale.verdict}: {'; '.join(next_scale.reasons)}\n"
        f"gates: {blocks or 'none closed or constant'}"
    )
    return 1 if letter == "F" else None


def read(folder: Path) -> list[dict]:
    """The rows of a run.

    Raises:
        InputError: there are none.
    """
    rows = metrics.read(folder)
    if not rows:
        raise InputError(f"{folder} has no metrics.jsonl with rows: it is no run's folder")
    return rows


def best_loss(folder: Path, rows: list[dict]) -> float:
    losses = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    if not losses:
        raise InputError(f"{folder} was never evaluated: train it with train.eval_every above 0")
    return min(losses)


if __name__ == "__main__":
    command.run(main)
