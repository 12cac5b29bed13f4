"""Intervals and corrected differences, against values worked out by hand and scipy's own tests."""

import numpy as np
import pytest
from scipy import stats

from experiments.lab.statistics import compare, estimate, holm, seeds_until


def test_estimate_by_hand():
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # t of two degrees of freedom at 97.5 %, sd 1
    assert found["mean"] == 2 and found["n"] == 3 and found["values"] == [1, 2, 3]
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_estimate_without_an_interval():
    assert estimate([1.5]) == {"mean": 1.5, "low": None, "high": None, "n": 1, "values": [1.5]}
    broken = estimate([1.0, float("nan")])
    assert broken["mean"] is None and broken["low"] is None and broken["n"] == 2


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_seeds_until_an_interval_is_short_enough_are_the_fewest(confidence):
    """By scipy's interval of as many values with the same mean and standard deviation."""
    values = np.array([1.0, 2.0, 4.0])

    def half(count):
        found = np.linspace(-1, 1, count)
        found = values.mean() + values.std(ddof=1) * found / found.std(ddof=1)
        return np.diff(stats.ttest_1samp(found, 0).confidence_interval(confidence)) / 2

    low, high = values.mean() - half(3), values.mean() + half(3)
    found = {"mean": values.mean(), "low": low.item(), "high": high.item(), "n": 3}
    count = seeds_until(found | {"confidence": confidence}, 0.8)
    assert half(count) < 0.8 <= half(count - 1) and count > 10
    assert seeds_until(found, 1e-3) is None


def test_one_comparison_is_the_paired_t_test():
    a, b = [1.0, 2.1, 3.2, 3.9], [0.8, 1.7, 3.1, 3.2]
    (found,) = compare({"a": a, "b": b})
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert found["p"] == pytest.approx(test.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["real"] == (test.pvalue < 0.05) and found["confidence"] == pytest.approx(0.95)


def test_holm_multiplies_the_smallest_first_and_never_falls():
    rng = np.random.default_rng(0)
    sets = [rng.normal(m, 1, 8).tolist() for m in (0.0, 3.0, 1.0, 0.9, 0.2)]
    raw = [stats.ttest_1samp(values, 0).pvalue for values in sets]
    wanted, worst = [None] * 5, 0.0
    for rank, i in enumerate(np.argsort(raw)):
        worst = wanted[i] = max(worst, min(1, (5 - rank) * raw[i]))
    found = holm([{"values": values} for values in sets])
    assert [f["p"] for f in found] == pytest.approx(wanted)
    assert any(f["real"] for f in found) and not all(f["real"] for f in found)
    for f in found:  # interval, corrected p and verdict agree
        assert f["real"] == (f["p"] < 0.05) == (not f["low"] <= 0 <= f["high"])


def test_nothing_is_real_after_the_first_that_is_not():
    # p of 0.03 and 0.04: alone each is below 0.05; together the smaller must be below 0.025.
    def with_p(p, n=6):
        t, base = stats.t.isf(p / 2, n - 1), np.array([-1.0, 1] * (n // 2))
        return (base + t * base.std(ddof=1) / n**0.5).tolist()

    found = holm([{"values": with_p(0.04)}, {"values": with_p(0.03)}])
    assert [f["p"] for f in found] == pytest.approx([0.06, 0.06])
    assert not any(f["real"] for f in found)
    assert all(f["confidence"] == pytest.approx(0.975) for f in found)


def test_pairs_are_all_or_against_one():
    samples = {"x": [1, 2], "y": [2, 4], "z": [3, 6]}
    assert [(c["a"], c["b"]) for c in compare(samples)] == [("x", "y"), ("x", "z"), ("y", "z")]
    against = compare(samples, against="y")
    assert [(c["a"], c["b"], c["mean"]) for c in against] == [("x", "y", -1.5), ("z", "y", 1.5)]


@pytest.mark.parametrize("values", [[0.3], [1.0, float("nan"), 2.0], [1.0, float("inf")]])
def test_what_cannot_be_tested_is_not_real(values):
    (found,) = compare({"a": values, "b": [0.0] * len(values)})
    assert not found["real"] and found["p"] is None


def test_differences_without_spread():
    same, other = compare({"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [2.0, 3.0]}, against="a")
    assert not same["real"] and same["p"] == 1
    assert other["real"] and other["low"] == other["high"] == 1


def test_seeds_must_match():
    with pytest.raises(ValueError, match="zip"):
        compare({"a": [1.0, 2.0], "b": [1.0]})
