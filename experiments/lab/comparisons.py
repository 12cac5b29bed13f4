"""Losses and accuracies that are compared, and the learning rates that are chosen for it.

The first half of the held-out batches chooses a learning rate; the second half is reported.
"""

import numpy as np

from experiments.lab import results
from experiments.lab.statistics import estimate


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


def ranked(losses):
    """Names of a dict of losses [seeds], the lowest mean first; what diverged comes last."""
    return sorted(losses, key=lambda name: np.nan_to_num(np.mean(losses[name]), nan=np.inf))


def final(runs):
    """[runs] last loss on the second half of the validation text."""
    return runs.loss(second_half(runs))[:, -1]


def late(runs, name):
    """[runs] mean of a metric over the last tenth of the steps."""
    values = runs.metrics[name]
    return values[:, -max(values.shape[1] // 10, 1) :].mean(1)


def at_best_rate(runs):
    """The runs at the rate with the best mean last accuracy on the first half of the tests."""
    half = slice(0, len(runs.targets) // 2)
    by_rate = [runs.at({"optim.lr": p["optim.lr"]}) for p in runs.points]
    return max(by_rate, key=lambda r: r.accuracy(half)[:, -1].mean())


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
    shown = [results.dot(name, estimate(losses[name])) for name in ranked(losses)]
    return results.plot(title, "nats per character", "", shown)
