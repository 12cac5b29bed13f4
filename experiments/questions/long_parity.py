"""Does the original's 8 M model learn subwords as well as GPT-2, when both train for long?

    python -m experiments long_parity --source=PREPARED --seeds=3
    python -m experiments long_parity --source=PREPARED --seeds=3 --steps=5000

GF-MH (width 192, 8 blocks: 6.5 million parameters without its embedding, 7.9 million with the
original's RWKV branch) and a GPT-2 with at least as many, embeddings counted. PREPARED is a folder
of `python -m gt_jax.prepare`, with a byte-level BPE of 16,384 ids for example. The original planned
50,000 steps and never took them; of 32 x 128 tokens they are 205 million. First one seed of each
family trains for a tenth of the steps at every rate. The rate with the lowest loss on the first
half of the validation text then trains every seed in full. Losses are of the second half. A
twentieth of the steps warms up.

The trained GF-MH then reads some tokens of the validation text twice, from the 64 tokens before
them and from the 512. GPT-2 has 128 positions.

It takes half an hour of an H200. Interrupted, the same command continues where it was, but for the
last minute. Parts of it run on several GPUs, or one after another:

    python -m experiments long_parity --source=PREPARED --rates_only --out=rates.json
    python -m experiments long_parity --only=GPT-2 --seed=0 --parts rates.json --out=gpt-0.json
    python -m experiments long_parity --parts rates.json gpt-0.json ...
"""

import argparse
import dataclasses
import functools
import math
import time

import jax
import numpy as np

from experiments import lab
from experiments.lab import command, parts, results, unfinished
from experiments.lab.comparisons import best_rate, difference_table, second_half
from experiments.lab.contexts import by_context
from experiments.lab.families import HYBRID, counted_parameters, match
from experiments.lab.statistics import compare, estimate
from gt_jax.errors import InputError
from gt_jax.models import make_model
from gt_jax.training.model import make_model_config
from gt_jax.training.text import read_text
from gt_jax.training.utilization import flops_per_token

SIZE = (192, 8)  # width and blocks of the hybrid
RATES = (1e-3, 2e-3, 4e-3)
GPT = "GPT-2"
FAMILIES = (HYBRID, GPT)
BATCH = {"train.batch_size": 32, "train.seq_len": 128}
COLUMNS = ["model", "shape", "parameters", "in blocks", "rate", "loss", "MFLOPs per token"]
COLUMNS += ["seconds of all seeds"]
CONTEXTS, QUICK_CONTEXTS = (64, 512), (8, 16)
EVALUATIONS = 50  # of a run; between two of them its state is kept
GROUPS, TARGETS = 4, 256  # read side by side, and predicted tokens in each
# Names of measures of a family: of a seed after a number of steps, of contexts, of its time.
AFTER, LONGER, SECONDS = "loss {}, step ", "perplexity ratio {}, ", "seconds {}"
BEST, CHOOSING = "best rate {}", "choosing loss {}, "


def main(argv=None):
    options = parse(argv)
    given = parts.read(options.parts)
    runs, chosen = taken(given)
    settings = parts.shared_settings(given, own=("seeds", "parts"))
    if settings:
        options.quick, options.source = settings.pop("quick"), settings.pop("source")
        options.steps = settings["steps"]
    here, kept = [], None
    wanted = [*FAMILIES] if options.only is None and not given else []
    if options.only is not None:
        wanted = command.one_of(FAMILIES, options.only, "--only")
    if wanted:
        settings, kept = train(options, wanted, runs, chosen)
        here = [results.origin() | {"seconds": time.perf_counter() - options.began}]
    seeds = sorted(set.intersection(*(set(of) for of in runs.values()))) if runs else []
    options.seeds = seeds or [0]
    write(
        options,
        {name: [of[seed] for seed in seeds] for name, of in runs.items()},
        chosen,
        settings | ({"parts": parts.commands(given)} if given else {}),
        parts.joint_origin(given, *here),
    )
    if kept is not None:
        kept.forget()


def parse(argv) -> argparse.Namespace:
    """The command line."""
    parser = command.parser("long_parity", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--steps", type=int, default=50_000, help="training steps")
    parser.add_argument("--only", help="families to train, with commas between; default: both")
    parser.add_argument("--seed", type=int, help="train this seed alone")
    parser.add_argument("--rates_only", action="store_true", help="choose the rates, and stop")
    parser.add_argument(
        "--parts",
        nargs="+",
        help="take rates and runs from these results of the same flags; train nothing but what "
        "--only names besides",
    )
    options = command.parse(parser, argv)
    if options.seed is not None:
        if options.seed < 0:
            raise InputError(f"--seed={options.seed} must be at least 0")
        options.seeds = [options.seed]
    return options


def taken(given):
    """What results of this question hold.

    Args:
        given: path -> result.

    Returns:
        family -> seed -> measure -> value of runs, and measure -> value of the rates.

    Raises:
        InputError: a result is another question's, or two have the same run.
    """
    runs, chosen = {}, {}
    for path, part in given.items():
        if part["experiment"] != "long_parity":
            raise InputError(f"--parts: {path} is of {part['experiment']}, not of long_parity")
        for name, value in part["measures"].items():
            if name.startswith((CHOOSING.split(" {")[0], BEST.split(" {")[0])):
                chosen[name] = value
        for family in FAMILIES:
            names = tuple(kind.format(family) for kind in (AFTER, LONGER, SECONDS))
            values = {n: v["values"] for n, v in part["measures"].items() if n.startswith(names)}
            for i, seed in enumerate(part["settings"]["seeds"] if values else ()):
                if seed in runs.setdefault(family, {}):
                    raise InputError(f"--parts: {path} holds seed {seed} of {family} once more")
                runs[family][seed] = {name: value[i] for name, value in values.items()}
    return {name: runs[name] for name in FAMILIES if name in runs}, chosen


def train(options, families, runs, chosen):
    """Choose the rates of families, where they are not known, and train their seeds.

    What is measured is kept at once, and the state of training now and then, so that a command that
    was interrupted does the rest when it is given again.

    Args:
        options: the command line.
        families: names.
        runs, chosen: of `taken`; what is trained here is added.

    Returns:
        the settings, and what is kept.
    """
    warmup = {"optim.warmup_steps": max(options.steps // 20, 1)}
    shared = BATCH | warmup | command.common(options, evaluations=EVALUATIONS)
    config = lab.make_config(shared)
    task = lab.text_task(config)
    size = {"vocabulary": task.vocab_size, "quick": options.quick}
    settings = lab.settings(config) | {"rates": RATES, "vocabulary": task.vocab_size}
    settings["unit"] = task.unit
    short = shared | {"train.steps": max(config.train.steps // 10, 1)}
    short["optim.warmup_steps"] = max(config.optim.warmup_steps // 10, 1)
    jobs = {f"rates of {f}": config_of(f, short, **size) for f in families}
    unnamed = dataclasses.replace(config.data, source="")  # the text is known by its hash
    texts = {
        job: f"{dataclasses.replace(of, data=unnamed)}, {RATES}, {sorted(chosen.items())}"
        for job, of in (jobs | {f: config_of(f, shared, **size) for f in families}).items()
    }
    kept = unfinished.Kept(options, texts, task.text)
    rows = rows_of(config, quick=options.quick)
    lab.train(
        {
            job: lab.Arm(of, task)
            for job, of in jobs.items()
            if BEST.format(job.removeprefix("rates of ")) not in chosen and job not in kept.measured
        },
        seeds=[0],
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
        finished=lambda job, of: kept.add(job, rates_of(job.removeprefix("rates of "), of)),
        kept=kept,
    )
    for job in jobs:
        chosen |= {name: float(v[0]) for name, v in kept.measured.get(job, {}).items()}
    if not options.rates_only:
        rates = {f: {"optim.lr": chosen[BEST.format(f)]} for f in families}
        lab.train(
            {
                f: lab.Arm(config_of(f, shared | rates[f], **size), task)
                for f in families
                if f not in kept.measured
            },
            seeds=options.seeds,
            group=options.group,
            compile_fast=options.quick,
            keep_params=True,
            finished=lambda family, of: kept.add(
                family, run_of(family, of, rows, quick=options.quick)
            ),
            kept=kept,
        )
        for family in families:
            for i, seed in enumerate(options.seeds):
                of_seed = {name: float(v[i]) for name, v in kept.measured[family].items()}
                runs.setdefault(family, {})[seed] = of_seed
    return settings, kept


def config_of(family, shared, *, vocabulary, quick):
    """The Config of the hybrid, or of a GPT-2 with as many parameters."""
    size = (command.QUICK["model.dim"], command.QUICK["model.layers"]) if quick else SIZE
    length = lab.make_config(shared).train.seq_len
    return lab.make_config(shared | match(family, size, vocab_size=vocabulary, length=length))


def rates_of(family, runs):
    """measure -> [1] of a sweep: losses on the first half, and the rate with the lowest."""
    first = runs.loss(slice(0, second_half(runs).start))[:, -1]
    losses = {f"{p['optim.lr']:g}": [x] for p, x in zip(runs.points, first)}
    of_rates = {f"{CHOOSING.format(family)}{rate}": loss for rate, loss in losses.items()}
    return of_rates | {BEST.format(family): [best_rate(runs)]}


def run_of(family, runs, rows, *, quick):
    """measure -> [seeds] of runs in full: losses on the second half, and each seed's seconds."""
    losses = runs.loss(second_half(runs))
    found = {f"{AFTER.format(family)}{n}": losses[:, i] for i, n in enumerate(runs.steps)}
    found[SECONDS.format(family)] = np.full(len(losses), runs.seconds / len(losses))
    if family == HYBRID:
        short, long = QUICK_CONTEXTS if quick else CONTEXTS
        ratio = longer(runs, rows, (short, long), quick=quick)
        found[f"{LONGER.format(family)}{long} / {short}"] = ratio
    return found


def rows_of(config, *, quick):
    """[groups, targets, T + 1] rows of the validation text, T the longer context.

    Raises:
        InputError: it is too short.
    """
    text = np.concatenate(read_text(config).tokens.validation)
    long, targets = (QUICK_CONTEXTS[1], 2) if quick else (CONTEXTS[1], TARGETS)
    if len(text) <= long + 1:
        raise InputError(f"{len(text)} validation tokens are too few for a context of {long}")
    places = np.linspace(long, len(text) - 1, GROUPS * targets).astype(int)
    rows = np.stack([text[place - long : place + 1] for place in places])
    return rows.reshape(GROUPS, targets, -1).astype(np.int32)


def longer(runs, rows, contexts, *, quick):
    """[seeds] perplexity of the rows' last tokens from a longer context over a shorter one."""
    model = make_model(runs.model_config)

    def of_one(params):
        read = functools.partial(by_context, model, params, lengths=contexts, window=contexts[0])
        return jax.lax.map(lambda group: read(rows=group), rows).mean(0)  # [2]

    losses = lab.jit(quick)(functools.partial(jax.lax.map, of_one))(runs.params)  # [seeds, 2]
    return np.exp(np.asarray(losses[:, 1] - losses[:, 0], float))


def write(options, runs, chosen, settings, origin):
    """Write the result.

    Args:
        options: the command line.
        runs: family -> [seeds] of measure -> value.
        chosen: measure -> value of the rates.
        settings: of the result.
        origin: of the result, None if it is of here alone.
    """
    values = {
        name: np.array([seed[name] for seed in seeds])
        for seeds in runs.values()
        for name in (seeds[0] if seeds else ())
    }
    of_family = lambda family, kind: {
        int(name.removeprefix(kind.format(family))): value
        for name, value in values.items()
        if name.startswith(kind.format(family))
    }
    curves = {family: of_family(family, AFTER) for family in runs if runs[family]}
    losses = {family: curve[max(curve)] for family, curve in curves.items()}
    measures = {name: estimate(value) for name, value in values.items()} | chosen
    measures |= {f"loss {family}": estimate(loss) for family, loss in losses.items()}
    pairs = []
    if len(losses) == len(FAMILIES):
        pairs = compare(losses, against=HYBRID)
        ratio = estimate(losses[HYBRID] / losses[GPT])
        measures |= {f"loss ratio {HYBRID} / {GPT}": ratio, f"{GPT} - {HYBRID}": pairs[0]}
    unit, length = settings["unit"], settings["length"]
    tokens = settings["batch"] * length
    shared = BATCH | {"train.seq_len": length}
    rows = []
    for family in losses:
        vocabulary = settings["vocabulary"]
        config = config_of(family, shared, vocabulary=vocabulary, quick=options.quick)
        c = make_model_config(config, vocabulary)
        row = [family, f"{c.dim} x {c.layers}", counted_parameters(c, "all")]
        row += [counted_parameters(c, "blocks"), chosen[BEST.format(family)]]
        row += [measures[f"loss {family}"], flops_per_token(c, length) / 1e6]
        rows.append([*row, math.fsum(values[SECONDS.format(family)])])
    tried = {f: of for f in FAMILIES if (of := choosing(chosen, f))}
    sweep = [[family, *of.values(), chosen[BEST.format(family)]] for family, of in tried.items()]
    ratio_of = LONGER.split("{")[0]
    ratios = [[n.removeprefix(ratio_of), v] for n, v in measures.items() if n.startswith(ratio_of)]
    columns = ["model", *(f"at {rate:g}" for rate in settings["rates"]), "best rate"]
    tables = [results.table("Loss", COLUMNS, rows, f"Nats per {unit}.")] if rows else []
    tables += [difference_table("Difference", pairs)] if pairs else []
    about = "Of tokens that are read from a longer context, over the same from a shorter one."
    ratio_table = results.table("Perplexity by context", ["", "ratio"], ratios, about)
    tables += [ratio_table] if ratios else []
    tables += [results.table("Losses that chose the rates", columns, sweep, "One seed.")]
    lines = [
        results.line(f, [n * tokens for n in curve], np.stack([*curve.values()], 1))
        for f, curve in curves.items()
    ]
    loss_plot = results.plot("Loss", "tokens", f"nats per {unit}", lines, log="x")
    results.write(
        options,
        settings=settings,
        measures=measures,
        tables=tables,
        plots=[loss_plot] if lines else [],
        notes=[
            "Rates are chosen by one seed in a tenth of the steps, on the first half of the "
            "validation text; losses are of its second half, after the last step.",
            f"{settings['steps'] * tokens:,} tokens a run.",
        ],
        origin_of=origin,
    )


def choosing(chosen, family):
    """rate -> the loss that chose, of a family."""
    start = CHOOSING.format(family)
    return {n.removeprefix(start): v for n, v in chosen.items() if n.startswith(start)}


if __name__ == "__main__":
    command.run(main)
