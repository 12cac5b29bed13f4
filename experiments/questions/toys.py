"""What each family learns of six toy tasks, and whether a hybrid beats its best branch alone.

    python -m experiments toys --seeds=3
    python -m experiments toys --tasks=synergy,reversal --steps=10000

GF-MH (width 64, 4 blocks) beside pure RWKV-6, pure Mamba-2 and GPT-2 with at least as many
parameters. All learn from the same batches, made anew for every step, at every learning rate of one
small sweep. The rate is chosen by the mean accuracy on half of the test sequences, the other half
is reported: the share of answers that are right, beside that of the commonest answer.

There is synergy in a task if the hybrid is ahead of its best branch alone by more than 0.1: if the
95 % interval of that difference, paired by seed, lies above 0.1.
"""

from collections import Counter

import numpy as np

from experiments import lab
from experiments.lab import command, results, tasks
from experiments.lab.comparisons import at_best_rate, second_half
from experiments.lab.families import FAMILIES, HYBRID, match
from experiments.lab.statistics import compare, estimate

SIZE = (64, 4)  # width and blocks of the hybrid
BRANCHES = ("RWKV-6", "Mamba-2")
RATES = (1e-3, 3e-3)
ROWS = 32  # sequences in a batch
SYNERGY = 0.1


def main(argv=None):
    parser = command.parser("toys", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--tasks", default=",".join(tasks.TASKS), help="tasks, with commas between")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    options = command.parse(parser, argv)
    names = command.one_of(tasks.TASKS, options.tasks, "--tasks")
    shared = {"train.steps": options.steps, "train.batch_size": ROWS}
    shared |= {"train.eval_every": max(options.steps // 20, 1)} | command.common(options)
    config = lab.make_config(shared)
    size = (config.model.dim, config.model.layers) if options.quick else SIZE

    arms = {}
    for name in names:
        toy = tasks.TASKS[name]
        task = lab.drawn_task(
            name, toy.generate, toy.vocab_size, toy.length, config.train.batch_size
        )
        for family in FAMILIES:
            shape = match(family, size, vocab_size=toy.vocab_size, length=toy.length)
            arms[f"{name} {family}"] = lab.Arm(lab.make_config(shared | shape), task)
    runs = lab.train(
        arms,
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
    )

    measures, rows, leads, plots = {}, [], [], []
    for name in names:
        chosen = {family: at_best_rate(runs[f"{name} {family}"]) for family in FAMILIES}
        curves = {family: r.accuracy(second_half(r)) for family, r in chosen.items()}
        right = {family: curve[:, -1] for family, curve in curves.items()}
        measures |= {f"accuracy {f}, {name}": estimate(values) for f, values in right.items()}
        guessed = commonest(arms[f"{name} {HYBRID}"].task.held_out)
        rows.append([name, *map(estimate, right.values()), guessed])
        alone = max(BRANCHES, key=lambda family: right[family].mean())
        (lead,) = compare({HYBRID: right[HYBRID], alone: right[alone]})
        measures[f"lead of {HYBRID}, {name}"] = lead
        leads.append([name, alone, lead, synergy(lead)])
        series = [
            results.line(f, chosen[f].steps, curve, within=results.SHARE)
            for f, curve in curves.items()
        ]
        plots.append(results.plot(f"{name}: {tasks.TASKS[name].about}", "step", "right", series))
    results.write(
        options,
        settings={
            "steps": config.train.steps,
            "batch": config.train.batch_size,
            "lengths": {name: tasks.TASKS[name].length for name in names},
            "parameters": {name: r.parameters for name, r in runs.items()},
            "rates": RATES,
        },
        measures=measures,
        tables=[
            results.table(
                "Share of right answers",
                ["task", *FAMILIES, "commonest answer"],
                rows,
                "Mean and half its 95 % interval over seeds, each family at its best rate.",
            ),
            results.table(
                f"Is {HYBRID} ahead of its best branch alone?",
                ["task", "best branch", "lead", "synergy"],
                leads,
                f"Synergy is a lead of more than {SYNERGY}, by its 95 % interval over seeds.",
            ),
        ],
        plots=plots,
        notes=["No sequence that is tested was trained on."],
    )


def commonest(batches):
    """Share of the answer that is right most often."""
    answers = np.concatenate([batch.targets[batch.targets >= 0] for batch in batches])
    return Counter(answers.tolist()).most_common(1)[0][1] / len(answers)


def synergy(lead):
    """ "yes", "no" or "undecided", from the difference of the hybrid and its best branch."""
    if lead["low"] is None:
        return "undecided"
    if lead["low"] > SYNERGY:
        return "yes"
    return "no" if lead["high"] < SYNERGY else "undecided"


if __name__ == "__main__":
    command.run(main)
