"""Means with intervals, and which differences are real.

Every interval is Student's t. Differences are paired by seed. When several are looked at together,
Holm's step-down correction holds the chance of any false one at 5 %; an interval is then the one
whose ends decide its test, so a difference is real exactly when its interval leaves out zero.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MOST_SEEDS = 1000  # that anybody would run


def estimate(values: Sequence[float]) -> dict:
    """Mean and 95 % t interval of independent values, one per seed.

    Returns:
        {"mean", "low", "high", "n", "values"}; low and high are None for a single value, and mean
        too if any value is not finite.
    """
    values = [float(v) for v in values]
    return _interval(values, CONFIDENCE) | {"n": len(values), "values": values}


def compare(samples: Mapping[str, Sequence[float]], *, against: str | None = None) -> list[dict]:
    """Paired differences between variants, Holm-corrected over all that are returned.

    Args:
        samples: variant -> its values, in the same order of seeds for all.
        against: compare every other variant with this one; None compares every pair.

    Returns:
        A dict for each pair, in the order of samples: "a" and "b" (names), "mean", "low" and "high"
        of a - b, "confidence" of that interval alone, corrected "p", "n" and "real". With one
        seed, or values that are not finite, nothing is real and "p" is None.
    """
    pairs = itertools.combinations(samples, 2)
    if against is not None:
        pairs = [(name, against) for name in samples if name != against]
    found = []
    for a, b in pairs:
        differences = [float(x) - float(y) for x, y in zip(samples[a], samples[b], strict=True)]
        found.append({"a": a, "b": b, "values": differences, "n": len(differences)})
    return holm(found)


def holm(comparisons: Sequence[Mapping]) -> list[dict]:
    """Test each comparison's "values" against a mean of zero, all of them together.

    Returns:
        The comparisons without "values", with "mean", "low", "high", "confidence", "p", "real".
    """
    raw = [_p_value(c["values"]) for c in comparisons]
    order = sorted(range(len(raw)), key=lambda i: 2.0 if raw[i] is None else raw[i])
    level = {i: (1 - CONFIDENCE) / (len(raw) - rank) for rank, i in enumerate(order)}
    corrected, stopped = {}, None
    for rank, i in enumerate(order):
        before = corrected[order[rank - 1]] if rank else 0.0
        corrected[i] = None
        if raw[i] is not None:
            corrected[i] = min(max(before, raw[i] * (len(raw) - rank)), 1.0)
        if stopped is None and (raw[i] is None or raw[i] >= level[i]):
            stopped = level[i]
        if stopped is not None:  # nothing after the first failure is real: keep its level
            level[i] = stopped
    results = []
    for i, comparison in enumerate(comparisons):
        interval = _interval(comparison["values"], 1 - level[i])
        real = interval["low"] is not None and not interval["low"] <= 0 <= interval["high"]
        rest = {name: v for name, v in comparison.items() if name != "values"}
        results.append(
            rest | interval | {"confidence": 1 - level[i], "p": corrected[i], "real": real}
        )
    return results


def seeds_until(found: Mapping, half: float) -> int | None:
    """Seeds with which an interval would be less than `half` to each side, if its spread stays.

    Args:
        found: an estimate, or a comparison, of which the "confidence" stays too.

    Returns:
        The number, above the seeds there are; None if `MOST_SEEDS` are not enough.
    """
    n, level = found["n"], (1 + found.get("confidence", CONFIDENCE)) / 2
    deviation = (found["high"] - found["low"]) / 2 * math.sqrt(n) / stats.t.ppf(level, n - 1)
    counts = range(n + 1, MOST_SEEDS + 1)
    return next(
        (k for k in counts if stats.t.ppf(level, k - 1) * deviation < half * math.sqrt(k)), None
    )


def _p_value(values) -> float | None:
    """Two-sided, of a mean of zero; None where it cannot be tested."""
    if len(values) < 2 or not np.all(np.isfinite(values)):
        return None
    if np.ptp(values) == 0:
        return float(values[0] == 0)
    return float(stats.ttest_1samp(values, 0).pvalue)


def _interval(values, confidence) -> dict:
    if not values or not np.all(np.isfinite(values)):
        return {"mean": None, "low": None, "high": None}
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}
