"""The comparisons of fusions and of gate starts run, choose fairly, and say what they may."""

import numpy as np
import pytest

from experiments import lab
from experiments.lab import comparisons, results
from experiments.lab.statistics import estimate
from experiments.questions import fusion, ratio
from gt_jax.errors import InputError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be that is the question\n" * 100)
    return path


def fake_runs(points, nats, gates=None):
    """Runs with these losses on two held-out batches of one target each: nats [runs, 2]."""
    nats = np.asarray(nats, float)[:, None]
    empty = np.zeros((len(points), 1))
    return lab.Runs(
        points=tuple(points),
        metrics={"loss": empty} | ({} if gates is None else {"gate": gates}),
        steps=np.array([1]),
        nats=nats,
        correct=nats,
        targets=np.array([1, 1]),
        params=None,
        model_config=None,
        parameters=0,
        seconds=0.0,
        compile_seconds=0.0,
    )


def test_rate_is_chosen_on_one_half_and_reported_on_the_other():
    points = [{"optim.lr": rate, "seed": seed} for rate in (1e-3, 1e-2) for seed in (0, 1)]
    runs = fake_runs(points, [[1, 9], [2, 8], [3, 5], [4, 4]])
    assert (
        comparisons.best_rate(runs) == 1e-3
    )  # though the other is better where losses are reported
    np.testing.assert_allclose(comparisons.final(runs.at({"optim.lr": 1e-3})), [9, 8])


def test_rate_that_diverged_is_not_chosen():
    points = [{"optim.lr": rate, "seed": 0} for rate in (1e-3, 1e-2)]
    assert comparisons.best_rate(fake_runs(points, [[5, 5], [np.nan, np.nan]])) == 1e-3


def test_fusions_are_compared_at_both_rates(text, tmp_path, capsys):
    out = tmp_path / "fusion.json"
    fusion.main(["--quick", "--seeds=2", "--only=rf,GF", f"--source={text}", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists() and "Differences at 3e-4" in capsys.readouterr().out
    measures, (losses, *_) = result["measures"], result["tables"]
    assert {row[0] for row in losses["rows"]} == {"RF", "GF"}
    for name in ("RF", "GF"):
        assert measures[f"loss {name} at 3e-4"]["n"] == 2
        assert measures[f"best rate {name}"] in fusion.RATES
    values = [measures[f"loss {name} at its best"]["values"] for name in ("RF", "GF")]
    difference = measures["RF - GF at best"]
    assert difference["mean"] == pytest.approx(np.mean(np.subtract(*values)), rel=1e-3)
    assert result["settings"]["steps"] == 6 and result["quick"]
    assert len(result["plots"][2]["series"][0]["x"]) == 2


def test_gates_are_followed(text, tmp_path):
    out = tmp_path / "ratio.json"
    ratio.main(["--quick", "--seeds=2", "--branch=legacy", f"--source={text}", f"--out={out}"])
    result = results.read(out)
    assert result["name"] == "ratio-legacy"
    for start, series in zip(ratio.STARTS, result["plots"][1]["series"]):
        # The original's gate has weights at the start, and its branch an input of unit variance.
        assert series["y"][0] == pytest.approx(start, abs=0.05)
    kept = result["measures"]["gate spread kept at 0.0003"]
    assert 0.9 < kept["mean"] < 1.1
    assert result["measures"]["attractor at 0.0003"] == ratio.attractor(kept)


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [
        ([0.1, 0.12, 0.11], "attractor"),
        ([0.9, 0.92, 0.91], "none"),
        ([0.2, 0.8, 0.5], "undecided"),
        ([0.1], "undecided"),
    ],
)
def test_attractor_follows_its_criterion(kept, verdict):
    assert ratio.attractor(estimate(kept)) == verdict


def test_spread_is_over_starts_and_relative_to_the_first_step():
    gates = np.zeros((2, 1, 3, 1))  # starts, seeds, steps, layers
    gates[0, 0, :, 0], gates[1, 0, :, 0] = (0.1, 0.2, 0.4), (0.9, 0.7, 0.6)
    np.testing.assert_allclose(ratio.spread_kept(gates), [[0.25]])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only=gf,gff"], "--only=gff must be of HY, GF, CP, WS, RF, HGF"),
        (["--branch=mine"], "--branch: invalid choice: 'mine'"),
        (["--source=nowhere.txt"], "data.source='nowhere.txt' is no file"),
        (["--steps=0"], "train.steps=0 must be at least 1"),
        (["--impl=fast"], "model.impl='fast' must be one of"),
    ],
)
def test_mistake_is_one_line(argv, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        fusion.main(argv)
    assert message in str(error.value)


def test_lists_of_pairs_say_who_is_better():
    losses = {"A": [1.0, 1.1, 1.2], "B": [2.0, 2.11, 2.2], "C": [1.0, 1.3, 1.1]}
    rows = comparisons.difference_table("", fusion.compare(losses))["rows"]
    assert [row[3] for row in rows] == ["A is better", "cannot be told apart", "C is better"]
