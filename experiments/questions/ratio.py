"""Does the gate's start matter, and do gates that start apart end together?

    python -m experiments ratio --seeds=5
    python -m experiments ratio --branch=legacy --source=tinyshakespeare.txt

GF, the fusion with one gate per position, starts from 3, 30, 50, 70 and 97 % RWKV and learns as in
questions/fusion.py, at the original's learning rate and at one near the best. Losses are of the
second half of the validation text; where the better of the two rates is taken, the first half chose
it. Gates are the mean over the positions of the training batch.

The gates have an attractor if their spread shrinks: with s(t) the standard deviation over the five
starts of a block's gate after t steps, averaged over blocks, and q = s(end) / s(0),
"attractor" if the 95 % interval of q over seeds lies below 1/2, "none" if it lies above.
"""

import numpy as np
from scipy import stats

from experiments import lab
from experiments.lab import command, comparisons, results, variants
from experiments.lab.comparisons import late
from experiments.lab.statistics import compare, estimate
from experiments.lab.variants import RATES

STARTS = (0.03, 0.3, 0.5, 0.7, 0.97)
NAMES = {0.03: "GF-XM 0.03", 0.3: "GF-MH 0.3", 0.5: "GF 0.5", 0.7: "GF-RH 0.7", 0.97: "GF-XR 0.97"}
SHRUNK = 0.5
COLUMNS = ["start", "at 3e-4", "at its best", "whole split, 3e-4", "final gate, 3e-4"]
COLUMNS += ["R/M gradients, 3e-4", "best rate"]
POINTS = 50  # of a drawn trajectory


def main(argv=None):
    parser = command.parser("ratio", __doc__)
    variants.add_flags(parser)
    options = command.parse(parser, argv)
    (config, task), *_ = variants.arms_of(options, "gf", {"GF": {}}).values()
    runs = lab.train(
        {"GF": lab.Arm(config, task)},
        seeds=options.seeds,
        sweep={"optim.lr": RATES, "model.gate_init": STARTS},
        group=options.group,
        compile_fast=options.quick,
    )["GF"]

    starts = {start: runs.at({"model.gate_init": start}) for start in STARTS}
    best = {start: comparisons.best_rate(r) for start, r in starts.items()}
    reference = {
        NAMES[start]: comparisons.final(r.at({"optim.lr": RATES[0]})) for start, r in starts.items()
    }
    tuned = {
        NAMES[start]: comparisons.final(r.at({"optim.lr": best[start]}))
        for start, r in starts.items()
    }
    differences = {"3e-4": compare(reference), "best": compare(tuned)}
    measures, rows = {}, []
    for start, r in starts.items():
        name, mine = NAMES[start], r.at({"optim.lr": RATES[0]})
        found = {
            f"loss {name} at 3e-4": estimate(reference[name]),
            f"loss {name} at its best": estimate(tuned[name]),
            f"whole-split loss {name} at 3e-4": estimate(mine.loss()[:, -1]),
            f"final gate {name} at 3e-4": estimate(mine.metrics["gate"][:, -1].mean(-1)),
            f"R/M gradient ratio {name} at 3e-4": estimate(late(mine, "r_m_ratio")),
        }
        measures |= found | {f"best rate {name}": best[start]}
        rows.append([name, *found.values(), best[start]])
    ratios = [late(r.at({"optim.lr": RATES[0]}), "r_m_ratio") for r in starts.values()]
    ranks = [
        stats.spearmanr(*pair).statistic for pair in zip(zip(*ratios), zip(*reference.values()))
    ]
    measures["rank correlation of loss and R/M at 3e-4"] = estimate(ranks)
    for at, pairs in differences.items():
        measures |= {f"{pair['a']} - {pair['b']} at {at}": pair for pair in pairs}

    gates = {rate: trajectories(runs.at({"optim.lr": rate})) for rate in RATES}
    for rate, gate in gates.items():
        measures[f"gate spread kept at {rate:g}"] = estimate(spread_kept(gate).mean(-1))
    verdicts = {rate: attractor(measures[f"gate spread kept at {rate:g}"]) for rate in RATES}
    unit = "nats per character"
    results.write(
        options,
        name=variants.result_name(options),
        settings=variants.settings_of(options, config) | {"rates": RATES, "starts": STARTS},
        measures=measures | {f"attractor at {rate:g}": v for rate, v in verdicts.items()},
        tables=[
            results.table(
                f"Validation loss after {config.train.steps} steps, {unit}",
                COLUMNS,
                rows,
                "Second half of the validation text where not said otherwise; the gate is the "
                "mean over blocks, R/M the ratio of the branches' gradient norms over the last "
                "tenth of the steps.",
            ),
            comparisons.difference_table("Differences at 3e-4", differences["3e-4"]),
            comparisons.difference_table("Differences, each at its best rate", differences["best"]),
            *(gate_table(f"Gates at the end, {rate:g}", gates[rate]) for rate in RATES),
        ],
        plots=[
            comparisons.dots("Loss at 3e-4", reference),
            *(gate_plot(f"Mean gate, learning rate {rate:g}", gates[rate]) for rate in RATES),
            *(
                gate_plot(f"Gate of block {layer}, 3e-4", gates[RATES[0]][..., layer : layer + 1])
                for layer in range(gates[RATES[0]].shape[-1])
            ),
        ],
        notes=[f"Gates at learning rate {rate:g}: {said(v)}" for rate, v in verdicts.items()]
        + variants.notes_of(options),
    )


def trajectories(runs):
    """[starts, seeds, steps, layers] gates of the runs at one learning rate."""
    return np.stack([runs.at({"model.gate_init": s}).metrics["gate"] for s in STARTS])


def spread_kept(gates):
    """[seeds, layers] standard deviation over starts at the end, over that at the first step."""
    return gates[:, :, -1].std(0) / gates[:, :, 0].std(0)


def attractor(kept):
    """ "attractor", "none" or "undecided", by the stated criterion, from an estimate of q."""
    if kept["low"] is None:
        return "undecided"
    if kept["high"] < SHRUNK:
        return "attractor"
    return "none" if kept["low"] > SHRUNK else "undecided"


def said(verdict):
    return {
        "attractor": "starts that lie apart end together, an attractor by the stated criterion.",
        "none": "starts that lie apart stay apart; no attractor by the stated criterion.",
        "undecided": "undecided whether starts that lie apart end together.",
    }[verdict]


def gate_table(title, gates):
    """Gates at the end, block by block."""
    rows = [
        [f"block {layer}", *(estimate(g) for g in gates[:, :, -1, layer]), estimate(kept)]
        for layer, kept in enumerate(spread_kept(gates).T)
    ]
    columns = ["", *(f"from {start:g}" for start in STARTS), "spread kept"]
    return results.table(title, columns, rows, "Spread kept: 1 means as far apart as at the start.")


def gate_plot(title, gates):
    """Mean over some layers against steps, a line for each start."""
    steps = gates.shape[2]
    shown = np.unique(np.linspace(0, steps - 1, min(POINTS, steps)).astype(int))
    series = [
        results.line(NAMES[start], shown, gate.mean(-1)[:, shown], within=results.SHARE)
        for start, gate in zip(STARTS, gates)
    ]
    return results.plot(title, "step", "share of RWKV", series)


if __name__ == "__main__":
    command.run(main)
