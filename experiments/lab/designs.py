"""Designs of one hybrid, compared: their losses, what their branches are worth, who is better.

What the questions about arbiters, residual paths and auxiliary losses share. A design is a name and
the config fields in which it differs from GF-MH. Every design learns at every rate of a sweep; the
first half of the validation text chooses its rate, all that is reported is of the second half.
"""

import dataclasses
import time
from collections.abc import Mapping

import numpy as np

from experiments import lab
from experiments.lab import branches, command, comparisons, formats, parts, results, unfinished
from experiments.lab.statistics import compare, estimate
from gt_jax.errors import InputError

BASE = "GF-MH"
RATES = (1.5e-3, 3e-3, 6e-3)  # around the best of GF-MH
# Auxiliary losses with weights of the original's size, in the forms of gt_jax.training.debate.
REPAIRED = {"debate.arbiter_weight": 0.1, "debate.diversity_weight": 0.1}
BRANCH = {"debate.branch_weight": 0.1}
PUBLISHED = REPAIRED | {"debate.diversity": "published", "debate.arbiter_target": "mix"}
COLUMNS = ["design", "parameters", "last", "best", "training", "rate", "RWKV share", "Mamba share"]
COLUMNS += ["without RWKV", "without Mamba", "gate std, least", "blocks closed", "blocks constant"]

MEANINGS = {
    " path": "A path: the branch adds its input to its output before the fusion.",
    " repaired": "Repaired: losses for weights of the better branch and for unlike branches.",
    " branch losses": "Branch losses: the loss of each branch, decoded alone.",
}


def meanings(names):
    """A sentence for each word of some designs' names that needs one."""
    return [said for word, said in MEANINGS.items() if any(word in name for name in names)]


_OF_STREAM_AND_OUTPUT = ("variance growth", "variance growth, untrained", "entropy", "top")


def fields(fusion, residual="none", terms=None):
    """The config fields of a design of our branches."""
    return {"model.fusion": fusion, "model.residual": residual} | dict(terms or {})


# What questions/search.py tries, and questions/pilot.py trains longer.
SEARCHED = {
    BASE: {},
    "GF-MH + repaired": REPAIRED,
    "GF-MH + Mamba path + branch losses": fields("gf", "mamba", BRANCH),
    "minGRU": fields("mingru"),
    "minGRU + repaired": fields("mingru", terms=REPAIRED),
    "minGRU + Mamba path + repaired": fields("mingru", "mamba", REPAIRED),
    "running mean": fields("linrec"),
    "running mean + branch losses": fields("linrec", terms=BRANCH),
    "GLU": fields("glu"),
    "GLU + Mamba path + repaired": fields("glu", "mamba", REPAIRED),
    "ParallelFusion": fields("parallel"),
    "ParallelFusion + Mamba path": fields("parallel", "mamba"),
    "ParallelScan": fields("pscan"),
    "ParallelScan + branch losses": fields("pscan", terms=BRANCH),
}


def add_flags(parser, *, steps, seeds, source="shakespeare-all"):
    """--steps, --rates, --only and --parts, and defaults of the shared flags."""
    parser.set_defaults(seeds=seeds, source=source)
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from"
    )
    parser.add_argument("--only", help="designs to train, with commas between; default: all")
    parser.add_argument(
        "--parts",
        nargs="+",
        help="take designs from these results, of this question or another one, which had the same "
        "flags; train nothing but what --only names besides",
    )


def study(
    options,
    designs: Mapping[str, Mapping],
    *,
    title,
    judge=None,
    few=2,
    measures=(),
    tables=(),
    notes=(),
):
    """Train and compare designs, the first of them with all others, and write the result.

    Args:
        options: of a parser with `add_flags`.
        designs: name -> config changes.
        title: what the designs are.
        judge: a design's name -> [seeds] measures -> (verdict, why), for a table of them.
        few: how many designs --quick trains if --only is not given.
        measures, tables, notes: more of the result.

    Returns:
        design -> name -> [seeds], as `measured`.
    """
    against = next(iter(designs))
    names = names_of(options, designs, few)
    found, settings, given = taken(options, designs)
    here, kept, missing = [], None, {name: designs[name] for name in names if name not in found}
    if missing:
        trained, settings, kept = measured(options, missing)
        found |= trained
        here.append(results.origin() | {"seconds": time.perf_counter() - options.began})
    found = {name: found[name] for name in designs if name in found}
    losses = {name: values["loss"] for name, values in found.items()}
    pairs = compare(losses, against=against) if against in losses and len(losses) > 1 else []
    measures = dict(measures) | {
        f"{key} {name}": estimate(values)
        for name, of_design in found.items()
        for key, values in of_design.items()
    }
    measures |= {f"{pair['a']} - {pair['b']}": pair for pair in pairs}
    judged = {name: judge(found[name]) for name in found} if judge else {}
    measures |= {f"verdict {name}": word for name, (word, _) in judged.items()}
    verdicts = [[name, *said] for name, said in judged.items()]
    shares = {n: found[n]["RWKV share"] for n in ranked(found) if "RWKV share" in found[n]}
    results.write(
        options,
        settings=settings
        | {"designs": {name: designs[name] for name in found}}
        | ({"parts": parts.commands(given)} if given else {}),
        measures=measures,
        tables=[
            *tables,
            results.table(
                f"{title}, validation loss after {settings['steps']} steps",
                COLUMNS,
                [row(name, found[name]) for name in ranked(found)],
                "Nats per character on the second half of the validation text, after the last step "
                "and at the evaluation that was best on the first half; the training loss is the "
                "mean of the last tenth of the steps. What the loss rises by if a branch says "
                "nothing in all blocks. Each at the rate that was best on the first half.",
            ),
            results.table(
                "Residual stream and output",
                ["design", "variance growth", "untrained", "entropy", "top"],
                [
                    [n, *(estimate(found[n][key]) for key in _OF_STREAM_AND_OUTPUT)]
                    for n in ranked(found)
                ],
                "Growth is the variance behind the last block over that behind the first; "
                "untrained, of the initial weights. Entropy in nats, and the largest probability, "
                "of the prediction: means over positions.",
            ),
            comparisons.difference_table(f"Differences from {against}", pairs),
            *([results.table("By the rule", ["design", "", "because"], verdicts)] if judge else []),
        ],
        plots=[
            comparisons.dots("Validation loss", losses),
            *([share_plot(shares)] if shares else []),
        ],
        notes=[*([verdict(pairs, against)] if pairs else []), *meanings(found), *notes],
        origin_of=parts.joint_origin(given, *here),
    )
    if kept is not None:
        kept.forget()
    return found


def share_plot(shares):
    """RWKV's share of the update, name -> [seeds]."""
    dots = [results.dot(n, estimate(v), within=results.SHARE) for n, v in shares.items()]
    return results.plot("RWKV's share of the update", "mean over blocks", "", dots)


def names_of(options, designs, few):
    """The designs that the flags want trained, in their order; none of them if all are in parts."""
    if options.only is not None:
        return command.one_of(designs, options.only, "--only")
    return [] if options.parts else list(designs)[: few if options.quick else None]


def measured(options, designs):
    """design -> name -> [seeds], the settings and what is kept, of designs that are trained here.

    What is measured of a design is kept as soon as it is there, so that a command that was
    interrupted trains the others when it is given again.
    """
    shared = {"model.preset": "gf-mh"} | command.common(options, evaluations=10)
    steps = command.QUICK["train.steps"] if options.quick else options.steps
    shared["optim.warmup_steps"] = max(steps // 20, 1)
    configs = {n: lab.make_config(shared | dict(changes)) for n, changes in designs.items()}
    config = next(iter(configs.values()))
    rates = tuple(options.rates)
    settings = lab.settings(config) | {"rates": rates}
    task = lab.text_task(config)
    unnamed = dataclasses.replace(config.data, source="")  # the text is known by its hash
    texts = {
        n: f"{dataclasses.replace(c, data=unnamed)}, rates {rates}" for n, c in configs.items()
    }
    kept = unfinished.Kept(options, texts, task.text)
    missing = {n: lab.Arm(c, task) for n, c in configs.items() if n not in kept.measured}
    lab.train(
        missing,
        seeds=options.seeds,
        sweep={"optim.lr": rates},
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
        finished=lambda name, runs: kept.add(
            name, of_design(runs, missing[name], quick=options.quick)
        ),
    )
    return {name: kept.measured[name] for name in configs}, settings, kept


def of_design(runs, arm, *, quick):
    """name -> [seeds] of a design: losses at its best rate, and what its branches are worth."""
    rate = comparisons.best_rate(runs)
    best = runs.at({"optim.lr": rate})
    half = comparisons.second_half(best)
    first, second = best.loss(slice(0, half.start)), best.loss(half)  # [seeds, evaluations]
    seeds = np.arange(len(best.points))
    found = {
        "loss": second[:, -1],
        "best loss": second[seeds, np.nan_to_num(first, nan=np.inf).argmin(-1)],
        "choosing loss": first[:, -1],
        "training loss": comparisons.late(best, "loss"),
        "best rate": np.full(len(seeds), rate),
        "parameters": np.full(len(seeds), best.parameters),
        "seconds": np.full(len(seeds), runs.seconds),
    }
    terms = [name for name in best.metrics if name.startswith("debate_")]
    found |= {name: comparisons.late(best, name) for name in terms}
    if best.model_config.architecture == "hybrid":
        found |= branches.measure(best, arm, quick=quick)
    return found


def taken(options, designs):
    """What --parts hold of the designs of a question.

    A design is known by its changes, whatever another question calls it; of several parts that hold
    it, the first one counts. Seeds, text, steps, rates and --quick of the options become those of
    the parts.

    Args:
        options: uses parts, the paths of the results, or None.
        designs: name -> config changes, of the question.

    Returns:
        design -> name -> [seeds]; the settings; and the parts, path -> result; all empty without
        parts.

    Raises:
        InputError: a file is no such result, is given twice, or its flags are not those of the
            others.
    """
    found, given = {}, parts.read(options.parts)
    for path, part in given.items():
        of_part = part["settings"].get("designs")
        names = _own_names(of_part, designs) if isinstance(of_part, dict) else {}
        if not names:
            raise InputError(f"--parts: {path} holds no design of this question")
        values = _values_by_design(part["measures"], of_part)
        for theirs, ours in names.items():
            found.setdefault(ours, values[theirs])
    settings = parts.shared_settings(given, own=("designs", "parts"))
    if settings:
        options.quick, options.seeds = settings.pop("quick"), settings["seeds"]
        options.source, options.rates = settings["source"], settings["rates"]
        options.steps = settings["steps"]
    return found, settings, given


def _own_names(of_part, designs):
    """Name in a result -> name here, of the designs with the same changes."""
    ours = {name: formats.plain(dict(changes)) for name, changes in designs.items()}
    pairs = ((n, [o for o in ours if ours[o] == changes]) for n, changes in of_part.items())
    return {theirs: here[0] for theirs, here in pairs if here}


def _values_by_design(measures, names):
    """design -> measure -> [seeds] of a result, whose measures end in the design's name."""
    found = {name: {} for name in names}
    for key, value in measures.items():
        of = max((n for n in names if key.endswith(f" {n}")), key=len, default=None)
        if of is not None and isinstance(value, dict) and "values" in value:
            found[of][key.removesuffix(f" {of}")] = np.array(value["values"], float)
    return found


def ranked(found):
    """Names, the lowest loss first."""
    return comparisons.ranked({name: values["loss"] for name, values in found.items()})


def chosen(found, count, *, without=(BASE,)):
    """The designs with the lowest mean loss on the first half of the validation text."""
    losses = {n: values["choosing loss"] for n, values in found.items() if n not in without}
    return comparisons.ranked(losses)[:count]


def row(name, found):
    """A design's line of the table."""
    keys = ["loss", "best loss", "training loss", "best rate", "RWKV share", "Mamba share"]
    keys += ["loss added without RWKV", "loss added without Mamba", "gate std, least"]
    keys += ["blocks closed", "blocks constant"]
    shown = [estimate(found[key]) if key in found else None for key in keys]
    if "best rate" in found:  # one for all seeds
        shown[keys.index("best rate")] = float(found["best rate"][0])
    return [name, int(found["parameters"][0]), *shown]


def verdict(pairs, against):
    """Who is better than the first design, and who is worse, as a sentence."""
    real = {s: [p["a"] for p in pairs if p["real"] and p["mean"] * s > 0] for s in (-1, 1)}
    better, worse = (", ".join(real[sign]) or "none" for sign in (-1, 1))
    return f"Better than {against} beyond its interval: {better}; worse: {worse}."
