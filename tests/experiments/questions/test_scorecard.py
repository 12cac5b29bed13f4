"""Grades and verdicts follow from the thresholds, on runs made up for it."""

import json

import pytest

from experiments.lab import scorecard
from experiments.questions import scorecard as question
from gt_jax.errors import InputError


def rows(steps=30, validation=lambda s: 2 - s / 40, **fields):
    """A run that is evaluated at every row; fields replace its numbers."""
    made = []
    for step in range(1, steps + 1):
        loss = validation(step)
        row = {"step": step, "loss": loss - 0.1, "validation_loss": loss, "r_m_ratio": 0.9}
        row |= {"rwkv_variance": [1.0, 1.2], "mamba_variance": [0.9, 0.7]}
        row |= {"gate": [0.3, 0.4], "gate_std": [0.1, 0.2]}
        made.append(row | fields)
    return made


def verdicts(made):
    return {c.name: c.verdict for c in scorecard.criteria(made)}


def test_a_run_that_passes_everything_is_graded_a():
    found = scorecard.criteria(rows())
    assert {c.verdict for c in found} == {"pass"}
    assert scorecard.grade(found) == ("A", "all five criteria passed")
    assert scorecard.collapse(rows()) == {}


@pytest.mark.parametrize(
    ("fields", "name", "verdict", "letter"),
    [
        ({"r_m_ratio": 0.2}, "gradient ratio", "warn", "B"),
        ({"r_m_ratio": 0.05}, "gradient ratio", "fail", "F"),
        ({"mamba_variance": [0.2, 0.2]}, "variances", "warn", "B"),
        ({"rwkv_variance": [23.0, 24.0]}, "variances", "fail", "F"),
        ({"rwkv_variance": None}, "variances", "not measured", "B"),
        ({"loss": 0.9}, "generalisation gap", "warn", "B"),
        ({"loss": 0.5}, "generalisation gap", "fail", "F"),
    ],
)
def test_each_criterion_has_its_band(fields, name, verdict, letter):
    made = rows(**fields)
    assert verdicts(made)[name] == verdict
    assert scorecard.grade(scorecard.criteria(made))[0] == letter


def test_a_loss_that_rises_and_stays_fails_its_trend_and_its_interval():
    found = verdicts(rows(validation=lambda s: 2 - s / 40 if s < 15 else 1.8))
    assert found["validation trend"] == "fail" and found["improvement interval"] == "fail"


@pytest.mark.parametrize(
    ("axes", "verdict", "because"),
    [
        ({"loss": 0.98}, "pass", "1 excellent"),
        ({"loss": 1.04, "speed": 1.6}, "pass", "2 promising"),
        ({"loss": 1.04}, "undecided", "not measured: statefulness, speed, memory"),
        ({"loss": 1.4, "speed": 3.0}, "fail", "red line: loss 1.4 against 1.3"),
        ({"loss": 1.0, "statefulness": 0.9}, "fail", "red line: statefulness"),
        ({"loss": 1.1, "statefulness": 1.1, "speed": 1.2, "memory": 1.0}, "fail", "0 excellent"),
    ],
)
def test_v5_gate(axes, verdict, because):
    found = scorecard.v5(axes, rows())
    assert found.verdict == verdict and because in "; ".join(found.reasons)


def test_a_loss_spike_is_a_red_line():
    made = rows()
    made[25]["loss"] = 9.0
    assert scorecard.v5({"loss": 0.9}, made).verdict == "fail"


@pytest.mark.parametrize(
    ("letter", "values", "verdict"),
    [
        ("A", {"canaries": 90.0, "scaling": 0.97, "resources": 0.05}, "go"),
        ("B", {"canaries": 80.0, "scaling": 0.92, "resources": 0.15}, "go"),
        ("C", {"canaries": 80.0, "scaling": 0.92, "resources": 0.15}, "caution"),
        ("C", {"canaries": 60.0, "scaling": 0.85, "resources": 0.4}, "hold"),
        ("F", {"canaries": 90.0, "scaling": 0.97, "resources": 0.05}, "hold"),
        ("A", {"canaries": 90.0}, "undecided"),
    ],
)
def test_decision_matrix(letter, values, verdict):
    assert scorecard.matrix(values, letter).verdict == verdict


def test_scorecard_of_a_folder_with_a_baseline(tmp_path, capsys):
    for name, scale in (("run", 1.0), ("gpt2", 1.1)):
        (tmp_path / name).mkdir()
        made = rows(validation=lambda s, scale=scale: scale * (2 - s / 40))
        text = "".join(json.dumps(row) + "\n" for row in made)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    flags = [str(tmp_path / "run"), f"--baseline={tmp_path / 'gpt2'}"]
    assert question.main(flags) is None
    said = capsys.readouterr().out
    assert "grade A: all five criteria passed" in said and "V5 gate pass: 1 excellent" in said
    assert "next scale undecided" in said and "none closed or constant" in said
    with pytest.raises(InputError, match=r"nothing has no metrics\.jsonl with rows"):
        question.main([str(tmp_path / "nothing")])
