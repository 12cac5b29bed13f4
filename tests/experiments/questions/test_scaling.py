"""The law is found where there is one, and its prediction judged against what was measured."""

import json

import numpy as np
import pytest

from experiments.lab import results
from experiments.questions import scaling
from gt_jax.errors import InputError

FLOPS = np.array([1e12, 4e12, 9e12, 2e13, 3e13, 3e14])


def test_fit_finds_the_law_that_made_the_losses():
    constants = 1.2, 0.3, 1.1
    losses = scaling.law(FLOPS / FLOPS[0], *constants)
    np.testing.assert_allclose(losses[0], 2.3)
    np.testing.assert_allclose(losses[-1], 1.1 + 1.2 * 300**-0.3)
    np.testing.assert_allclose(scaling.fit(FLOPS[:-1], losses[:-1]), constants, rtol=1e-3)


def test_bootstrap_holds_the_truth_and_widens_with_the_seeds(monkeypatch):
    monkeypatch.setattr(scaling, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    truth = scaling.law(FLOPS / FLOPS[0], 1.2, 0.3, 1.1)

    def width(spread):
        losses = truth[:, None] + spread * rng.standard_normal((len(FLOPS), 5))
        resampled, failed = scaling.bootstrap(FLOPS, losses)
        assert failed < 2
        found = scaling.interval(truth[-1], resampled["predicted"])
        assert found["low"] < truth[-1] < found["high"]
        return found["high"] - found["low"]

    assert width(0.001) < width(0.01) / 3


def test_r_squared_of_a_line_by_hand():
    # Squares of errors 0.01 x 3, of deviations 1 + 0 + 1.
    assert scaling.r_squared(np.array([1.0, 2, 3]), np.array([1.1, 2.1, 2.9])) == pytest.approx(
        1 - 0.03 / 2
    )


@pytest.mark.parametrize(("low", "near"), [(-0.049, True), (-0.051, False)])
def test_prediction_counts_if_its_whole_interval_is_near(low, near):
    error = {"mean": 0.0, "low": low, "high": 0.01}
    measures = dict.fromkeys(("exponent", "loss at endless compute", "R2"), 1.0)
    measures |= {"predicted loss x": 1.0, "loss x": 1.0, "measured / predicted - 1, x": error}
    assert scaling.law_rows(measures, "x")[-1] == ["within 5%, interval and all", near]


def test_experiment_runs(tmp_path, monkeypatch, toys):
    monkeypatch.setattr(scaling, "RESAMPLES", 20)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be that is the question\n" * 100)
    out = tmp_path / "scaling.json"
    scaling.main(["--quick", "--seeds=2", "--preset=gpt2", f"--source={text}", f"--out={out}"])
    result = results.read(out)
    assert result["name"] == "scaling-gpt2"
    measures, (sizes, _) = result["measures"], result["tables"]
    assert [row[0] for row in sizes["rows"]] == ["a", "b", "c", "d"]
    # Tokens grow with the root of the parameters in blocks: 2 rows of 16 a step, 2 steps at first.
    ratios = [row[4] / 64 / (row[3] / sizes["rows"][0][3]) ** 0.5 for row in sizes["rows"]]
    assert all(row[3] < row[2] for row in sizes["rows"])
    assert ratios == pytest.approx([1] * 4, rel=0.15)
    error = measures["measured / predicted - 1, d"]["mean"]
    measured, predicted = measures["loss d"]["mean"], measures["predicted loss d"]["mean"]
    assert error == pytest.approx(measured / predicted - 1, abs=1e-4)
    assert json.loads(out.read_text())["settings"]["steps"]["a"] == 2


def test_wrong_flags_are_one_line():
    with pytest.raises(InputError, match=r"model\.preset='gf-hm' must be one of"):
        scaling.main(["--preset=gf-hm", "--quick"])
    with pytest.raises(InputError, match="--seeds=0 must be at least 1"):
        scaling.main(["--seeds=0"])
