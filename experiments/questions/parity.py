"""Does a hybrid learn text better than GPT-2, RWKV-6, Mamba-2 or two alike branches of its size?

    python -m experiments parity --seeds=3
    python -m experiments parity --texts=characters --steps=2000

GF-MH (width 128, 8 blocks) beside every other family with at least as many parameters: once with
embeddings counted, once without. Its controls are the same block, gate included, around two RWKV-6
or two Mamba-2 branches: what it gains on these comes of joining two kinds, not of two branches, a
gate and a feed-forward. All read the same batches, of characters and of SentencePiece
tokens, at every learning rate of one small sweep. The rate, and the evaluation at which a run would
have been stopped, are chosen by the mean loss on the first half of the validation text; losses are
of the second half. They are drawn against tokens, model FLOPs, and the device's seconds that a run
takes among those beside it.
"""

import itertools
from typing import NamedTuple

import numpy as np

from experiments import lab
from experiments.lab import command, results
from experiments.lab.comparisons import difference_table, second_half
from experiments.lab.families import (
    CONTROLS,
    COUNTED,
    FAMILIES,
    HYBRID,
    TEXTS,
    WIDTH_STEP,
    counted_parameters,
    match,
)
from experiments.lab.statistics import compare, estimate
from gt_jax.training.utilization import flops_per_token

SIZE = (128, 8)  # width and blocks of the hybrid
RATES = (1e-3, 2e-3, 4e-3)
QUICK_VOCABULARY = 350  # bytes, the characters of a text and a few subwords
COLUMNS = ["model", "shape", "parameters", "in blocks", "loss", f"{HYBRID} / it", "rate"]
COLUMNS += ["stopped at", "MFLOPs per token", "seconds a run"]


class Outcome(NamedTuple):
    """What became of an arm: all its runs, and those at the chosen rate."""

    runs: lab.Runs
    chosen: lab.Runs
    rate: float
    stop: int  # index of the evaluation
    flops: int  # of the model, per token

    @property
    def losses(self):
        """[seeds] on the second half of the validation text."""
        return self.curve[:, self.stop]

    @property
    def curve(self):
        """[seeds, evaluations] of them."""
        return self.chosen.loss(second_half(self.chosen))

    @property
    def seconds(self):
        """The device's for one run, of those that trained side by side."""
        return self.runs.seconds / len(self.runs.points)


def main(argv=None):
    parser = command.parser("parity", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--texts", help=f"of {', '.join(TEXTS)}; all, or one if --quick")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    options = command.parse(parser, argv)
    usual = list(TEXTS)[: 1 if options.quick else None]
    texts = command.one_of(TEXTS, options.texts or ",".join(usual), "--texts")
    arms = {}
    for text in texts:
        arms |= arms_of(options, text)
    # A family whose shape is the same under both counts trains once.
    names = {arm.config: " ".join(key) for key, arm in arms.items()}
    trained = lab.train(
        {names[arm.config]: arm for arm in arms.values()},
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
    )
    config = next(iter(arms.values())).config
    outcomes = {key: outcome(arm.config, trained[names[arm.config]]) for key, arm in arms.items()}

    measures, tables, plots = {}, [], []
    per_step = config.train.batch_size * config.train.seq_len
    for text, counted in dict.fromkeys((text, counted) for text, _, counted in arms):
        title = text if counted == "all" else f"{text}, blocks matched"
        unit = arms[text, HYBRID, counted].task.unit
        found = compared(
            title, {f: outcomes[text, f, counted] for f in FAMILIES | CONTROLS}, per_step, unit
        )
        measures |= found[0]
        tables += found[1]
        plots += found[2]
    results.write(
        options,
        settings=lab.settings(config) | {"rates": RATES, "texts": texts},
        measures=measures,
        tables=tables,
        plots=plots,
        notes=[
            "Learning rate and stopping point are chosen on the first half of the validation text; "
            "losses are of its second half.",
            f"No baseline has fewer parameters than {HYBRID}; widths go in steps of {WIDTH_STEP}.",
            "Seconds are the device's for one of the runs that train side by side.",
        ],
    )


def arms_of(options, text):
    """(text, family, counted) -> Arm of every family under every count."""
    shared = TEXTS[text] | command.common(options, evaluations=20)
    if options.quick:
        shared["data.vocab_size"] = QUICK_VOCABULARY
    size = command.size(options, SIZE)
    config = lab.make_config(shared)
    task = lab.text_task(config)
    fit = {"vocab_size": task.vocab_size, "length": config.train.seq_len}
    return {
        (text, family, counted): lab.Arm(
            lab.make_config(shared | match(family, size, counted=counted, **fit)), task
        )
        for family, counted in itertools.product(
            FAMILIES | CONTROLS, ["all"] if options.quick else COUNTED
        )
    }


def outcome(config, runs):
    """Takes the rate and the evaluation with the lowest mean loss on the first half of the text."""
    half = slice(0, len(runs.targets) // 2)
    curves = {
        rate: np.nan_to_num(runs.at({"optim.lr": rate}).loss(half).mean(0), nan=np.inf)
        for rate in RATES
    }
    rate = min(curves, key=lambda rate: curves[rate].min())
    return Outcome(
        runs=runs,
        chosen=runs.at({"optim.lr": rate}),
        rate=rate,
        stop=int(curves[rate].argmin()),
        flops=flops_per_token(runs.model_config, config.train.seq_len),
    )


def compared(title, outcomes, per_step, unit):
    """measures, tables and plots of the families on one text, under one count of parameters."""
    measures, rows = {}, []
    for family, o in outcomes.items():
        c = o.runs.model_config
        loss = measures[f"loss {family}, {title}"] = estimate(o.losses)
        ratio = estimate(outcomes[HYBRID].losses / o.losses)
        if family != HYBRID:
            measures[f"loss ratio {HYBRID} / {family}, {title}"] = ratio
        row = [family, f"{c.dim} x {c.layers}", o.runs.parameters, counted_parameters(c, "blocks")]
        row += [loss, ratio, o.rate, int(o.runs.steps[o.stop]), o.flops / 1e6, o.seconds]
        rows.append(row)
    pairs = compare({family: o.losses for family, o in outcomes.items()}, against=HYBRID)
    measures |= {f"{pair['a']} - {HYBRID}, {title}": pair for pair in pairs}
    tables = [
        results.table(f"Loss, {title}", COLUMNS, rows, f"Nats per {unit}."),
        difference_table(f"Differences, {title}", pairs),
    ]
    axes = {
        "tokens": lambda o: o.runs.steps * per_step,
        "model FLOPs": lambda o: o.runs.steps * per_step * o.flops,
        "seconds on the device": lambda o: o.runs.steps / o.runs.steps[-1] * o.seconds,
    }
    plots = [
        results.plot(
            title,
            axis,
            f"nats per {unit}",
            [results.line(family, of(o), o.curve) for family, o in outcomes.items()],
            log="x",
        )
        for axis, of in axes.items()
    ]
    return measures, tables, plots


if __name__ == "__main__":
    command.run(main)
