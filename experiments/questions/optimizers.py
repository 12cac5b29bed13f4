"""Does a hybrid, or its single-family controls, learn better under Muon than under AdamW?

    python -m experiments optimizers --seeds=3 --source=tinyshakespeare.txt

GF-MH (width 128, 8 blocks) and its controls, the same block around two RWKV-6 or two Mamba-2
branches with at least as many parameters, under each optimizer at every rate of one sweep. Updates
of Muon have the size of AdamW's (gt_jax/training/optimizer.py), so that one sweep serves both. The
first half of the validation text chooses the rate; losses are of its second half. Differences are
paired by seed. R/M is the norm of the RWKV branches' gradients over that of the Mamba branches' in
the last tenth of the steps, which says whether an optimizer shifts the balance.
"""

import itertools

from experiments import lab
from experiments.lab import command, results
from experiments.lab.comparisons import best_rate, difference_table, dots, final, late
from experiments.lab.families import CONTROLS, HYBRID, match
from experiments.lab.statistics import compare, estimate

SIZE = (128, 8)  # width and blocks of the hybrid
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
OPTIMIZERS = {"AdamW": "adamw", "Muon": "muon"}
FAMILIES = (HYBRID, *CONTROLS)


def main(argv=None):
    parser = command.parser("optimizers", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    options = command.parse(parser, argv)
    arms = arms_of(options)
    trained = lab.train(
        {name_of(*key): arm for key, arm in arms.items()},
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
    )
    rates = {key: best_rate(trained[name_of(*key)]) for key in arms}
    chosen = {key: trained[name_of(*key)].at({"optim.lr": rates[key]}) for key in arms}
    losses = {key: final(runs) for key, runs in chosen.items()}
    config = next(iter(arms.values())).config

    measures, rows = {}, []
    for key, runs in chosen.items():
        name, loss = name_of(*key), estimate(losses[key])
        measures |= {f"loss {name}": loss, f"best rate {name}": rates[key]}
        ratio = "-"
        if "r_m_ratio" in runs.metrics:
            ratio = measures[f"R/M gradient ratio {name}"] = estimate(late(runs, "r_m_ratio"))
        seconds = trained[name].seconds / len(trained[name].points)
        rows.append([*key, runs.parameters, loss, rates[key], ratio, round(seconds, 1)])
    compared = {
        f"{family}, Muon beside AdamW": {o: losses[family, o] for o in OPTIMIZERS}
        for family in FAMILIES
    }
    compared |= {
        f"families under {optimizer}": {family: losses[family, optimizer] for family in FAMILIES}
        for optimizer in OPTIMIZERS
    }
    differences = {title: compare(group) for title, group in compared.items()}
    for title, pairs in differences.items():
        measures |= {f"{pair['a']} - {pair['b']}, {title}": pair for pair in pairs}
    columns = ["model", "optimizer", "parameters", "loss", "best rate", "R/M"]
    results.write(
        options,
        settings=lab.settings(config) | {"rates": RATES},
        measures=measures,
        tables=[
            results.table(
                f"Validation loss after {config.train.steps} steps, each at its best rate",
                [*columns, "seconds a run"],
                rows,
                "Second half of the validation text. Seconds are the device's for one of the runs "
                "that train side by side.",
            ),
            *(difference_table(title, pairs) for title, pairs in differences.items()),
        ],
        plots=[
            dots("Loss at the best rate", {name_of(*key): loss for key, loss in losses.items()}),
            results.plot(
                "Loss against learning rate",
                "learning rate",
                "nats per character",
                [results.line(name, RATES, by_rate(runs)) for name, runs in trained.items()],
                log="x",
            ),
        ],
        notes=edges(rates),
    )


def arms_of(options):
    """(family, optimizer) -> Arm; all read the same batches."""
    shared = command.common(options, evaluations=5)
    task = lab.text_task(lab.make_config(shared))
    size, length = command.size(options, SIZE), lab.make_config(shared).train.seq_len
    return {
        (family, optimizer): lab.Arm(
            lab.make_config(
                shared
                | match(family, size, vocab_size=task.vocab_size, length=length)
                | {"optim.name": OPTIMIZERS[optimizer]}
            ),
            task,
        )
        for family, optimizer in itertools.product(FAMILIES, OPTIMIZERS)
    }


def name_of(family, optimizer):
    return f"{family}, {optimizer}"


def by_rate(runs):
    """[seeds, rates] last losses on the second half of the validation text."""
    return [list(column) for column in zip(*(final(runs.at({"optim.lr": rate})) for rate in RATES))]


def edges(rates):
    """A line for every arm whose best rate is the end of the sweep: a better one may lie beyond."""
    ends = {RATES[0]: "lowest", RATES[-1]: "highest"}
    return [
        f"{name_of(*key)}: the {ends[rate]} rate of the sweep, {rate:g}, is its best."
        for key, rate in rates.items()
        if rate in ends
    ]


if __name__ == "__main__":
    command.run(main)
