"""How a run went, by the thresholds of gt_jax/thresholds.py: criteria, grade, verdicts.

Rows are those of a run's metrics.jsonl, oldest first.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gt_jax import thresholds
from gt_jax.thresholds import inside
from gt_jax.training.watch import collapsed, training_loss

NOT_MEASURED = "not measured"


class Criterion(NamedTuple):
    """One line of a scorecard: its name, number, "pass", "warn", "fail" or NOT_MEASURED, reason."""

    name: str
    value: float | None
    verdict: str
    reason: str


class Judgement(NamedTuple):
    """A verdict, what it rests on as [name, number, points or grade] rows, and why."""

    verdict: str
    rows: list[list]
    reasons: list[str]


def criteria(rows: Sequence[Mapping]) -> list[Criterion]:
    """The training guide's five criteria of a run."""
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    if not evaluated:
        missing = "the run was never evaluated"
        names = ("validation trend", "generalisation gap", "gradient ratio", "variances")
        return [
            Criterion(name, None, NOT_MEASURED, missing)
            for name in (*names, "improvement interval")
        ]
    return [
        _trend(evaluated),
        _gap(rows, evaluated),
        _ratio(rows),
        _variances(rows),
        _interval(evaluated),
    ]


def grade(found: Sequence[Criterion]) -> tuple[str, str]:
    """The grade of a run, A to F, and why. What was not measured does not pass."""
    failed = [c.name for c in found if c.verdict == "fail"]
    if failed:
        return "F", f"{', '.join(failed)} failed"
    others = [f"{c.name}: {c.verdict}" for c in found if c.verdict != "pass"]
    last = len(thresholds.GRADES) - 1
    letter = thresholds.GRADES[min(len(others), last)]
    return letter, "; ".join(others) or "all five criteria passed"


def _banded(name, value, band, reason) -> Criterion:
    """By an upper band."""
    verdict = "pass" if value <= band["pass"] else "warn" if value <= band["warn"] else "fail"
    return Criterion(name, value, verdict, reason)


def _trend(evaluated):
    losses = [row["validation_loss"] for row in evaluated]
    best = min(losses)
    reason = f"last {losses[-1]:.4f}, best {best:.4f}"
    return _banded("validation trend", losses[-1] / best - 1, thresholds.TREND, reason)


def _gap(rows, evaluated):
    name, last = "generalisation gap", evaluated[-1]
    training = training_loss(rows, last["step"])
    if training is None:
        return Criterion(name, None, NOT_MEASURED, "no training loss was logged")
    gap = last["validation_loss"] - training
    reason = f"validation {last['validation_loss']:.4f}, training {training:.4f}"
    return _banded(name, gap, thresholds.GAP, reason)


def _ratio(rows):
    name = "gradient ratio"
    ratios = [row["r_m_ratio"] for row in rows if row.get("r_m_ratio")]
    if not ratios:
        return Criterion(name, None, NOT_MEASURED, "the model has no two kinds of branch")
    good, fair = thresholds.GRADIENT_RATIO["pass"], thresholds.GRADIENT_RATIO["warn"]
    share = statistics.fmean(inside(r, good) for r in ratios)
    mean = statistics.geometric_mean(ratios)
    reason = f"{share:.0%} of the rows within {good[0]:g} to {good[1]:g}, mean {mean:.3g}"
    verdict = "fail" if not inside(mean, fair) else "warn"
    if share > thresholds.GRADIENT_RATIO_SHARE:
        verdict = "pass"
    return Criterion(name, share, verdict, reason)


def _variances(rows):
    name = "variances"
    measured = [row for row in rows if row.get("rwkv_variance") and row.get("mamba_variance")]
    if not measured:
        reason = "train with log.activations=True"
        return Criterion(name, None, NOT_MEASURED, reason)
    late = measured[-max(len(measured) // 10, 1) :]
    both = {
        part: statistics.fmean(np.mean(row[f"{part}_variance"]) for row in late)
        for part in ("rwkv", "mamba")
    }
    verdict = "fail"
    for word in ("warn", "pass"):
        if all(inside(v, thresholds.VARIANCE[word]) for v in both.values()):
            verdict = word
    reason = f"RWKV {both['rwkv']:.3g}, Mamba {both['mamba']:.3g}, mean over blocks at the end"
    return Criterion(name, both["rwkv"] / both["mamba"], verdict, reason)


def _interval(evaluated):
    """Evaluations since the best, in mean intervals between bests early in the run."""
    name, best, places = "improvement interval", float("inf"), []
    for i, row in enumerate(evaluated):
        if row["validation_loss"] < best:
            best = row["validation_loss"]
            places.append(i)
    early = max(thresholds.PATIENCE_FROM * len(evaluated), 2)
    usual = max(early / max(sum(place < early for place in places), 1), 1)
    since = len(evaluated) - 1 - places[-1]
    reason = f"{since} evaluations since the best; early on one came every {usual:.1f}"
    return _banded(name, since / usual, thresholds.PATIENCE, reason)


def v5(axes: Mapping[str, float | None], rows: Sequence[Mapping]) -> Judgement:
    """The V5 gate of a model against a baseline.

    Args:
        axes: key of thresholds.V5_AXES -> ratio to the baseline's, None if not measured. A better
            loss is lower, another axis better if higher.
        rows: of the model's run, for its loss spikes.
    """
    table, red, grades = [], [], {}
    for name, bounds in thresholds.V5_AXES.items():
        value = axes.get(name)
        if value is None:
            table.append([name, None, NOT_MEASURED])
            continue
        sign = -1 if name == "loss" else 1
        reached = sum(sign * value >= sign * bound for bound in bounds)
        grades[name] = reached
        table.append([name, value, thresholds.V5_GRADES[reached]])
        line = thresholds.V5_RED_LINES.get(name)
        if line is not None and sign * value < sign * line:
            red.append(f"red line: {name} {value:.3g} against {line:g}")
    spike = largest_spike(rows)
    if spike is not None and spike > thresholds.V5_SPIKE:
        red.append(f"red line: a training loss {spike:.2f} times the mean before it")
    excellent = sum(grade == 3 for grade in grades.values())
    promising = sum(grade >= 2 for grade in grades.values())
    enough = f"{excellent} excellent and {promising} promising or better; 1 or 2 are needed"
    if red:
        return Judgement("fail", table, red)
    if excellent or promising >= 2:
        return Judgement("pass", table, [enough])
    missing = [name for name in thresholds.V5_AXES if name not in grades]
    if missing:
        return Judgement("undecided", table, [enough, f"not measured: {', '.join(missing)}"])
    return Judgement("fail", table, [enough])


def largest_spike(rows: Sequence[Mapping], before: int = 20) -> float | None:
    """The largest training loss over the mean of the `before` logged before it."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    pairs = [(losses[i], losses[i - before : i]) for i in range(before, len(losses))]
    return max((loss / statistics.fmean(mean) for loss, mean in pairs), default=None)


def matrix(values: Mapping[str, float | None], letter: str) -> Judgement:
    """Whether to build the next scale: points 0 to 3 on four axes, weighted.

    Args:
        values: "canaries" (% passed), "scaling" (R^2 of the power law) and "resources" (relative
            error of the predicted cost); None if not measured.
        letter: the run's grade, for stability: A gives 3 points, B 2, C 1.
    """
    points = {"stability": max(3 - "ABC".find(letter), 0) if letter in "ABC" else 0}
    for name, bounds in (("canaries", thresholds.CANARIES), ("scaling", thresholds.SCALING_FIT)):
        if values.get(name) is not None:
            points[name] = sum(values[name] > bound for bound in bounds)
    if values.get("resources") is not None:
        bounds = thresholds.PREDICTION_ERROR
        points["resources"] = sum(values["resources"] <= bound for bound in bounds)
    weights = thresholds.MATRIX_WEIGHTS
    table = [
        [name, values.get(name, letter), points.get(name, NOT_MEASURED), weight]
        for name, weight in weights.items()
    ]
    missing = [name for name in weights if name not in points]
    total = sum(weights[name] * p for name, p in points.items())
    reasons = [f"{total:g} of {3 * sum(weights.values()):g} points"]
    if missing:
        return Judgement("undecided", table, [*reasons, f"not measured: {', '.join(missing)}"])
    zero = [name for name, p in points.items() if p == 0]
    if zero:
        return Judgement("hold", table, [*reasons, f"no point for {', '.join(zero)}"])
    word = "go" if total >= thresholds.MATRIX_GO else "hold"
    if thresholds.MATRIX_CAUTION <= total < thresholds.MATRIX_GO:
        word = "caution"
    return Judgement(word, table, reasons)


def collapse(rows: Sequence[Mapping]) -> dict[int, str]:
    """Block -> how its gate collapsed, in the last row that has gates."""
    gates = [row for row in rows if row.get("gate")]
    return collapsed(gates[-1]) if gates else {}
