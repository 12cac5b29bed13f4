"""How claims are judged: rules that give a verdict from measures that experiments wrote.

    reproduced   it holds in our measurement too
    refuted      our measurement contradicts it
    artefact     its number comes out under the original's conditions, and not under fair ones
    undecided    neither can be said, for the reason given

"Better" means a difference between runs with the same seeds whose corrected 95 % interval leaves
out zero (lab/statistics.py). Two variants that are alike never have one, however many seeds: a
published difference is contradicted too where the interval rules out half of it. A judge takes
value_of(a Measure of lab/measures.py), which raises NotMeasured for what is not there.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.lab import formats, measures, statistics
from experiments.lab.measures import difference
from gt_jax.models import count_parameters, make_config

VERDICTS = ("reproduced", "refuted", "artefact", "undecided")


class NotMeasured(Exception):
    """A measure is not there; the message says which."""


class Verdict(NamedTuple):
    """One of VERDICTS, our numbers as lines of text, and why where the rule does not say it.

    `takes` is what would decide an undecided claim.
    """

    verdict: str
    ours: str = ""
    because: str = ""
    takes: str = ""


class Claim(NamedTuple):
    """One published claim.

    Attributes:
        id: short name.
        text: the claim, in our words.
        published: its figure.
        source: where it is said.
        results: names of the results that answer it.
        rule: how the verdict follows from our numbers.
        judge: takes a function of a Measure that gives its value -> Verdict.
    """

    id: str
    text: str
    published: str
    source: str
    results: tuple[str, ...]
    rule: str
    judge: Callable[[Callable], Verdict]


def better(a, b, name="fusion", *, by):
    """(results, rule, judge) of the claim that variant a has the lower loss.

    Args:
        a, b: variants of the result `name`.
        by: published loss of b less that of a, nats.
    """
    settings = {
        "best rates": (name, "best"),
        "3e-4": (name, "3e-4"),
        "3e-4, original's branch": (f"{name}-legacy", "3e-4"),
        "best rates, original's branch": (f"{name}-legacy", "best"),
    }
    rule = (
        f"Each at its best rate: reproduced if {a} is better, refuted if {b} is. Otherwise "
        f"artefact if {a} is better at 3e-4, with ours or the original's branch, and the interval "
        f"at the best rates leaves out half of that difference; refuted if it leaves out half of "
        f"the published one, {by:g}; else undecided."
    )

    def judge(value_of):
        found = {}
        for label, setting in settings.items():
            try:
                found[label] = _difference(value_of, *setting, a, b)
            except NotMeasured:
                if label == "best rates":
                    raise
        lines = [f"{label}: {_signed(*difference[:3])}" for label, difference in found.items()]
        ours = "\n".join([f"{a} − {b}, {lines[0]}", *lines[1:]])
        mean, half, real, pair = found["best rates"]
        if real and mean < 0:
            smaller = "in its direction: half of the published difference is ruled out"
            return Verdict("reproduced", ours, smaller if mean - half > -by / 2 else "")
        if real:
            return Verdict("refuted", ours)
        if half is None:
            return Verdict("undecided", ours, "a single seed has no interval", "more seeds")
        for label, gone in (
            ("3e-4", "gone where each has the rate that suits it"),
            ("3e-4, original's branch", "gone with RWKV-6, each at the rate that suits it"),
        ):
            there, _, real_there, _ = found.get(label, (0.0, None, False, None))
            if real_there and there < 0 and mean - half > there / 2:
                return Verdict("artefact", ours, gone)
        if mean - half > -by / 2:
            return Verdict("refuted", ours, "half of the published difference is ruled out")
        room = max(abs(mean), mean + by / 2)  # to zero, or to half of what was published
        chance = "no difference that chance would not explain"
        return Verdict("undecided", ours, chance, _seeds(pair, room))

    return (name, f"{name}-legacy"), rule, judge


def _difference(value_of, name, at, a, b):
    """Mean and half interval of a - b, whether it is real, and the comparison."""
    try:
        pair, sign = value_of(difference(name, a, b, at)), 1
    except NotMeasured:
        pair, sign = value_of(difference(name, b, a, at)), -1
    half = None if pair["low"] is None else (pair["high"] - pair["low"]) / 2
    return sign * pair["mean"], half, pair["real"], pair


def _seeds(found, room):
    """How many seeds would decide what needs an interval less than `room` to each side."""
    count = statistics.seeds_until(found, room) if room > 0 else None
    if count is None:
        return f"more than {statistics.MOST_SEEDS} seeds, if mean and spread stay as they are"
    return f"{count} seeds in place of {found['n']}, if mean and spread stay as they are"


def _signed(mean, half, real):
    """A difference as text, and whether chance would explain it."""
    spread = "" if half is None else f" ± {half:.3f}"
    return f"{mean:+.3f}{spread}{'' if real else ', chance'}".replace("-", "−")


def within(measure, low, high, *, unit="", otherwise=None):
    """(results, rule, judge) of a claim that a measure is in a range; None is an open end.

    Args:
        otherwise: the Measure that is judged where the first is not there.
    """
    instead = f' Where {measure.result} has none: "{otherwise.name}".' if otherwise else ""
    rule = (
        f'reproduced if the 95 % interval of "{measure.name}" is {_range(low, high)}, refuted if '
        f"it is outside, undecided if it reaches over an end.{instead}"
    )

    def judge(value_of):
        if otherwise is not None:
            with contextlib.suppress(NotMeasured):
                return _by_interval(value_of(measure), low, high, unit)
        verdict = _by_interval(value_of(otherwise or measure), low, high, unit)
        if otherwise is None or not verdict.takes:
            return verdict
        takes = f"the result {measure.result}, or of {otherwise.result} {verdict.takes}"
        return verdict._replace(takes=takes)

    return tuple(m.result for m in (measure, otherwise) if m is not None), rule, judge


def _range(low, high):
    if low is None or high is None:
        return f"at most {high:g}" if low is None else f"at least {low:g}"
    return f"within {low:g} to {high:g}"


def _by_interval(found, low, high, unit=""):
    ours = f"{formats.show(found)}{unit}"
    if found["low"] is None:
        return Verdict("undecided", ours, "a single seed has no interval", "more seeds")
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if low <= found["low"] and found["high"] <= high:
        return Verdict("reproduced", ours)
    if found["high"] < low or found["low"] > high:
        return Verdict("refuted", ours)
    room = min(abs(found["mean"] - low), abs(found["mean"] - high))  # to the nearer end
    over = "the interval reaches over an end of what was claimed"
    return Verdict("undecided", ours, over, _seeds(found, room))


def all_within(bounds: Sequence[tuple]):
    """(results, rule, judge) of a claim of several figures: (Measure, low, high) of each."""
    said = ", ".join(f'"{m.name}" {_range(low, high)}' for m, low, high in bounds)
    rule = (
        f"reproduced if every 95 % interval is where it was claimed, {said}; refuted if one is "
        "outside; else undecided."
    )

    def judge(value_of):
        judged = [_by_interval(value_of(m), low, high) for m, low, high in bounds]
        ours = "\n".join(f"{m.name}: {v.ours}" for (m, *_), v in zip(bounds, judged))
        words = {v.verdict for v in judged}
        word = next(w for w in ("refuted", "undecided", "reproduced") if w in words)
        outside = [m.name for (m, *_), v in zip(bounds, judged) if v.verdict == word]
        because = "" if word == "reproduced" else f"of {', '.join(outside)}"
        takes = "; ".join(v.takes for v in judged if v.takes and word == "undecided")
        return Verdict(word, ours, because, takes)

    return tuple(dict.fromkeys(m.result for m, *_ in bounds)), rule, judge


def unlike(published, fair, low, high):
    """(results, rule, judge) of a claim that may hold under the original's conditions alone."""
    rule = (
        f'reproduced if the 95 % interval of "{fair.name}" is {_range(low, high)}, undecided if it '
        f'reaches over an end. If it is outside, artefact if that of "{published.name}" is in it, '
        "else refuted."
    )

    def judge(value_of):
        ours = _by_interval(value_of(fair), low, high)
        theirs = _by_interval(value_of(published), low, high)
        text = f"{ours.ours}\nunder the original's conditions: {theirs.ours}"
        if ours.verdict == "refuted" and theirs.verdict == "reproduced":
            return Verdict("artefact", text)
        return ours._replace(ours=text)

    return (fair.result,), rule, judge


def judge_persistence(value_of):
    """Judge of whether GF-MH keeps facts; not of models that never learnt to answer."""
    verdict = _by_interval(value_of(measures.PERSISTENCE), 99, None)
    learnt = value_of(measures.FACT_LEARNT)["values"]
    if min(learnt) < 0.5:
        because = f"{sum(v < 0.5 for v in learnt)} of {len(learnt)} did not learn what is asked"
        return Verdict("undecided", verdict.ours, because, "a run that all seeds learn it in")
    return verdict


def judge_extremes(value_of):
    """Judge of whether both extreme starts of the gate are worse than 30 %."""
    published = {"GF-XM 0.03": 0.23, "GF-XR 0.97": 0.38}
    judges = [better("GF-MH 0.3", other, "ratio", by=by)[2] for other, by in published.items()]
    both = [judge(value_of) for judge in judges]
    ours = f"{both[0].ours}\n{both[1].ours}"
    if both[0].verdict == both[1].verdict:
        return both[0]._replace(ours=ours)
    because = f"{both[0].verdict} for 3 %, {both[1].verdict} for 97 %"
    takes = "; ".join(v.takes for v in both if v.takes) or "no run: its two halves differ"
    return Verdict("undecided", ours, because, takes)


def judge_attractor(value_of):
    """Judge of whether gates converge, by the criterion of questions/ratio.py at both rates."""

    def read(spread, criterion):
        kept = {at: value_of(measure) for at, measure in spread.items()}
        text = "\n".join(f"spread kept at {at}: {formats.show(k)}" for at, k in kept.items())
        return text, [value_of(measure) for measure in criterion.values()]

    ours, found = read(measures.SPREAD_KEPT, measures.ATTRACTOR)
    if set(found) == {"attractor"}:
        return Verdict("reproduced", ours)
    with contextlib.suppress(NotMeasured):
        theirs, published = read(measures.SPREAD_KEPT_PUBLISHED, measures.ATTRACTOR_PUBLISHED)
        if set(found) == {"none"} and set(published) == {"attractor"}:
            return Verdict("artefact", f"{ours}\nwith the original's branch:\n{theirs}")
    if set(found) == {"none"}:
        return Verdict("refuted", ours)
    because = f"the criterion says {' and '.join(found)} at the two rates"
    return Verdict("undecided", ours, because, "more seeds, or rates that agree")


@functools.cache  # to count a model's parameters is to trace it
def _sizes(name, **changes):
    """Parameters of a preset, and those in its blocks."""
    parts = count_parameters(make_config(name, vocab_size=16000, **changes))
    ends = sum(parts.get(part, 0) for part in ("embedding", "positions", "head"))
    return parts["total"], parts["total"] - ends


def judge_size(value_of):
    """Judge of what GPT-2 has more parameters in; counts them, and measures nothing."""
    del value_of  # a matter of arithmetic
    ours, our_blocks = _sizes("gf-mh", branch="legacy", init="normal")
    theirs, their_blocks = _sizes("gpt2")
    text = (
        f"{ours:,} against {theirs:,} in all ({ours / theirs - 1:+.1%}), but {our_blocks:,} "
        f"against {their_blocks:,} in the blocks ({our_blocks / their_blocks - 1:+.1%})"
    ).replace("-", "−")
    fewer, blocks_fewer = ours < 0.9 * theirs, our_blocks < 0.95 * their_blocks
    if fewer and not blocks_fewer:
        return Verdict("artefact", text, "GPT-2 was given wider embeddings and a position table")
    return Verdict("reproduced" if fewer else "refuted", text)


def judge_premise(value_of):
    """Judge of whether GF-MH is ahead of two branches of either kind, on both texts."""
    pairs = {name: value_of(measure) for name, measure in measures.CONTROLS.items()}
    lines = []
    for name, pair in pairs.items():
        half = None if pair["low"] is None else (pair["high"] - pair["low"]) / 2
        lines.append(f"GF-MH − {name}: {_signed(-pair['mean'], half, pair['real'])}")
    ours = "\n".join(lines)
    ahead = [pair["real"] and pair["mean"] > 0 for pair in pairs.values()]
    behind = [pair["real"] and pair["mean"] < 0 for pair in pairs.values()]
    if all(ahead) or any(behind):
        return Verdict("reproduced" if all(ahead) else "refuted", ours)
    because = f"ahead in {sum(ahead)} of {len(pairs)} comparisons"
    if any(pair["low"] is None for pair in pairs.values()):
        return Verdict("undecided", ours, because, "more seeds")
    clear = lambda pair: abs(pair["mean"]) / (pair["high"] - pair["low"])
    lost = [pair for pair in pairs.values() if pair["mean"] < 0]  # any of them decides it
    last = max(lost, key=clear) if lost else min(pairs.values(), key=clear)
    return Verdict("undecided", ours, because, _seeds(last, abs(last["mean"])))
