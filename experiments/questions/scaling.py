"""Does the hybrid's loss follow a power law in compute, and does that foretell a larger model?

    python -m experiments scaling --seeds=3
    python -m experiments scaling --source=PREPARED --steps=200
    python -m experiments scaling --preset=gpt2

GF-MH from half a million to 30 million parameters in its blocks, on all of Shakespeare in
characters, or on PREPARED, a folder of `python -m gt_jax.prepare`. Tokens grow with the root of the
parameters in the blocks, so that compute grows with about their power 1.5: too few tokens for what
a size could learn, but the same rule for all. From 150 steps on, the largest reads Shakespeare
once; of a smaller text, 30 million parameters learn by heart. The head's product with the
vocabulary counts in the compute. In the rule embeddings do not count: with 16,384 ids the smallest
has more of them than of all else. A twentieth of the steps warms up. Each size has the rate of a
small sweep with the lowest mean loss on the first half of the held-out text; losses are of the
second half. To all sizes but the largest is fitted

    loss = c + a (compute / smallest compute) ** -b

whose value at the largest compute is then compared with the loss measured there. Intervals are
bootstrapped over seeds, size by size: they hold what chance does to the fit, not the error of the
formula. Another --preset has the same widths and blocks, and so other numbers of parameters than
the names of the sizes say.
"""

import numpy as np
from scipy.optimize import curve_fit

from experiments import lab
from experiments.lab import command, results
from experiments.lab.comparisons import best_rate, final
from experiments.lab.families import counted_parameters
from experiments.lab.statistics import CONFIDENCE, estimate
from gt_jax.errors import InputError
from gt_jax.training.model import make_model_config
from gt_jax.training.utilization import flops_per_token

# Parameters in blocks -> width and blocks; the last one is predicted from the others
SIZES = {
    "0.5M": (64, 4),
    "1.4M": (96, 6),
    "3M": (128, 8),
    "5M": (160, 8),
    "7M": (192, 8),
    "30M": (384, 10),
}
QUICK = {"a": (32, 1), "b": (64, 1), "c": (96, 1), "d": (128, 1)}
HYBRID = "gf-mh"
HEAD = 32  # channels of an RWKV head
STEPS, QUICK_STEPS = 150, 2  # of the smallest
RATES = (2e-3, 4e-3, 8e-3)
COLUMNS = ["model", "shape", "parameters", "in blocks", "tokens", "TFLOPs", "rate", "loss", "law"]
RESAMPLES = 1000
ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
TOLERANCE = 0.05  # within which the original project wanted its predictions


def main(argv=None):
    parser = command.parser("scaling", __doc__)
    parser.set_defaults(seeds=3, source="shakespeare-all")
    parser.add_argument("--preset", default=HYBRID, help="of gt_jax.models, in the sizes here")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the smallest size")
    options = command.parse(parser, argv)
    arms, rates = arms_of(options), RATES[:1] if options.quick else RATES
    trained = lab.train(
        dict(reversed(arms.items())),  # the largest takes longest to compile
        seeds=options.seeds,
        sweep={"optim.lr": rates},
        group=options.group,
        compile_fast=options.quick,
    )
    *smaller, largest = arms
    train = {name: arm.config.train for name, arm in arms.items()}
    tokens = {n: t.steps * t.batch_size * t.seq_len for n, t in train.items()}
    flops = np.array(
        [
            tokens[name] * flops_per_token(trained[name].model_config, train[name].seq_len)
            for name in arms
        ],
        float,
    )
    best = {name: best_rate(runs) for name, runs in trained.items()}
    losses = np.stack([final(trained[n].at({"optim.lr": best[n]})) for n in arms])  # [sizes, seeds]

    found = fit(flops[:-1], losses[:-1].mean(1))
    resampled, failed = bootstrap(flops, losses)
    predicted = interval(law(flops[-1] / flops[0], *found), resampled["predicted"])
    error = interval(losses[-1].mean() / predicted["mean"] - 1, resampled["error"])
    fitted = law(flops / flops[0], *found)
    r2 = r_squared(losses[:-1].mean(1), fitted[:-1])
    measures = {f"loss {name}": estimate(row) for name, row in zip(arms, losses)}
    measures |= {
        "exponent": interval(found[1], resampled["exponent"]),
        "loss at endless compute": interval(found[2], resampled["floor"]),
        "R2": r2,
        f"predicted loss {largest}": predicted,
        f"measured / predicted - 1, {largest}": error,
    }
    rows = [
        [
            name,
            f"{trained[name].model_config.dim} x {trained[name].model_config.layers}",
            trained[name].parameters,
            counted_parameters(trained[name].model_config, "blocks"),
            tokens[name],
            flops[i] / 1e12,
            best[name],
            measures[f"loss {name}"],
            predicted if name == largest else fitted[i],
        ]
        for i, name in enumerate(arms)
    ]
    unit = next(iter(arms.values())).task.unit
    results.write(
        options,
        name="scaling" if options.preset == HYBRID else f"scaling-{options.preset}",
        settings={
            "preset": options.preset,
            "steps": {name: t.steps for name, t in train.items()},
            "rates": rates,
        },
        measures=measures,
        tables=[
            results.table(
                "Sizes",
                COLUMNS,
                rows,
                f"Nats per {unit}, after training. The law of {largest} is a prediction: it was "
                "fitted to the others.",
            ),
            results.table("Law", ["what", "value"], law_rows(measures, largest)),
        ],
        plots=[
            results.plot(
                "Loss and compute",
                "model FLOPs",
                f"nats per {unit}",
                [
                    results.line("measured", flops, losses.T),
                    {
                        "name": f"law, fitted without {largest}",
                        "x": [float(x) for x in flops],
                        "y": [float(y) for y in fitted],
                        "low": [float(y) for y in resampled["curve"][0]],
                        "high": [float(y) for y in resampled["curve"][1]],
                    },
                ],
                log="x",
            )
        ],
        notes=[
            f"A law of three constants through {len(smaller)} sizes: its R2 says little, the "
            "prediction is the test.",
            "Bootstrap intervals of so few seeds are too narrow rather than too wide.",
            "Another rule for tokens per size would give another law.",
            f"{failed} of {RESAMPLES} resamples had no fit and are left out.",
        ],
    )


def arms_of(options):
    """name -> Arm, from the smallest to the largest."""
    sizes = QUICK if options.quick else SIZES
    shared = {"model.preset": options.preset} | command.common(options) | {"train.eval_every": 0}
    task = lab.text_task(lab.make_config(shared))
    arms, smallest = {}, None
    for name, (dim, layers) in sizes.items():
        shape = {"model.dim": dim, "model.layers": layers, "model.heads": dim // HEAD}
        config = lab.make_config(shared | shape)
        parameters = counted_parameters(make_model_config(config, task.vocab_size), "blocks")
        smallest = smallest or parameters
        first = QUICK_STEPS if options.quick else options.steps
        steps = round(first * (parameters / smallest) ** 0.5)
        shape |= {"train.steps": steps, "optim.warmup_steps": max(steps // 20, 1)}
        arms[name] = lab.Arm(lab.make_config(shared | shape), task)
    return arms


def law(times, a, b, c):
    """Loss at `times` the smallest compute."""
    return c + a * times**-b


def fit(flops, losses):
    """a, b and c, none of them negative, by least squares.

    Raises:
        RuntimeError: there is no such law.
    """
    times, lowest = flops / flops[0], losses.min()
    start = (losses[0] - lowest / 2, 0.1, lowest / 2)
    bounds = ((0, 0, 0), (np.inf, 2, lowest))
    return curve_fit(law, times, losses, start, bounds=bounds, max_nfev=2000)[0]


def bootstrap(flops, losses):
    """Refit with the seeds of every size drawn anew; losses [sizes, seeds], the largest last.

    Returns:
        name -> [resamples] "exponent", "floor", "predicted" and "error", and "curve", the ends
        [2, sizes] of the law's interval; and the number of resamples without a law.
    """
    rng = np.random.default_rng(0)
    drawn, found = rng.integers(losses.shape[1], size=(RESAMPLES, *losses.shape)), []
    for seeds in drawn:
        means = np.take_along_axis(losses, seeds, axis=1).mean(1)
        try:
            curve = law(flops / flops[0], *(constants := fit(flops[:-1], means[:-1])))
        except RuntimeError:
            continue
        found.append([*constants, *curve, means[-1] / curve[-1] - 1])
    if not found:
        raise InputError("no law fits these losses: give more --steps or --seeds")
    found = np.array(found)
    names = {"exponent": 1, "floor": 2, "predicted": -2, "error": -1}
    resampled = {name: found[:, place] for name, place in names.items()}
    resampled["curve"] = np.quantile(found[:, 3:-1], ENDS, axis=0)
    return resampled, RESAMPLES - len(found)


def interval(value, resampled):
    """An estimate with the ends of its bootstrap interval."""
    low, high = np.quantile(resampled, ENDS)
    return {"mean": float(value), "low": float(low), "high": float(high), "n": len(resampled)}


def r_squared(found, fitted):
    return float(1 - np.sum((found - fitted) ** 2) / np.sum((found - found.mean()) ** 2))


def law_rows(measures, largest):
    """The law's constants, and what became of its prediction."""
    error = measures[f"measured / predicted - 1, {largest}"]
    near = abs(error["low"]) <= TOLERANCE and abs(error["high"]) <= TOLERANCE
    rows = [[name, measures[name]] for name in ("exponent", "loss at endless compute", "R2")]
    rows += [[f"predicted loss {largest}", measures[f"predicted loss {largest}"]]]
    rows += [[f"measured loss {largest}", measures[f"loss {largest}"]]]
    rows += [[f"measured / predicted - 1, {largest}", error]]
    return [*rows, [f"within {TOLERANCE:.0%}, interval and all", near]]


if __name__ == "__main__":
    command.run(main)
