"""Losses of presets are compared with older ones by what seeds scatter."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments.questions import presets
from gt_jax.errors import InputError


def runs(losses, steps=500):
    return [
        {"config": name, "seed": seed, "steps": steps, "loss": loss}
        for name, each in losses.items()
        for seed, loss in enumerate(each)
    ]


NOW = {"a": [1.60, 1.61, 1.62], "b": [1.70, 1.72, 1.71], "new": [2.0, 2.1, 2.2]}
BEFORE = {"a": [1.605], "b": [1.80], "gone": [1.0]}


def test_differences_are_held_against_the_scatter_of_seeds():
    table = presets.comparison(runs(NOW), runs(BEFORE))
    a, b = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (a["config"], b["config"], a["seeds"]) == ("a", "b", "3, 1")
    assert (a["within"], b["within"]) == (True, False)
    assert a["difference"] == pytest.approx(0.005) and a["same seed"] == pytest.approx(-0.005)
    # Of one config it is half the interval of Student's test for groups that scatter alike.
    one = presets.comparison(runs({"a": NOW["a"]}), runs({"a": [1.0, 1.3]}))
    (row,) = (dict(zip(one["columns"], row, strict=True)) for row in one["rows"])
    test = stats.ttest_ind(NOW["a"], [1.0, 1.3], equal_var=True)
    low, high = test.confidence_interval(0.95)
    assert row["by chance up to"] == pytest.approx((high - low) / 2, rel=1e-5)
    assert row["within"] == (test.pvalue >= 0.05)


def test_no_more_than_1_of_20_comparisons_finds_a_difference_that_is_none():
    random, names, wrong = np.random.default_rng(0), "abcdefghijkl", 0
    for _ in range(300):
        draw = lambda n: {name: random.normal(1.6, 0.01, n) for name in names}
        table = presets.comparison(runs(draw(3)), runs(draw(1)))
        wrong += not all(row[table["columns"].index("within")] for row in table["rows"])
    assert wrong / 300 < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(InputError, match="with as many steps"):
        presets.comparison(runs(NOW, steps=20), runs(BEFORE))
    with pytest.raises(InputError, match="--seeds=2 or more"):
        presets.comparison(runs({"a": [1.0]}), runs(BEFORE))
    path = tmp_path / "other.json"
    for text in ("", "[]", "{}", json.dumps({"rows": [{"config": "a"}]})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"other\.json is no result of presets"):
            presets.main(["tiny", f"--against={path}"])


def test_seeds_are_trained_in_turn_and_compared(monkeypatch, tmp_path, capsys):
    asked = []

    def run_all(tasks, jobs):
        asked.extend(tasks)
        for _, _, seed in tasks:
            known = {"loss": 1.6 + seed / 100, "steps": 5, "tokens_per_second": 1, "seconds": 1}
            yield {"seed": seed, "device": "cpu"} | known

    monkeypatch.setattr(presets, "run_all", run_all)
    old, out = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"rows": runs({"tiny": [1.6]}, steps=5)}))
    flags = ["--seeds=2", "--steps=5", f"--out={out}", f"--against={old}"]
    presets.main(["tiny", "gpt2", *flags])
    changes = {"train.steps": 5}
    assert asked == [(name, changes, seed) for seed in (0, 1) for name in ("tiny", "gpt2")]
    assert "seeds scatter by 0.0071" in capsys.readouterr().out
    assert len(presets.read_rows(out)) == 4
