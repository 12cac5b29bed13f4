"""Interventions change what they name."""

import numpy as np
import pytest

from experiments.lab import command, results, variants
from experiments.lab.statistics import compare
from experiments.questions import interventions
from gt_jax.errors import InputError


def test_numbers_of_steps_are_shares_of_all(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be that is the question\n" * 50)
    parser = command.parser("interventions", "")
    variants.add_flags(parser)
    options = command.parse(parser, [f"--source={tmp_path / 'text.txt'}", "--steps=200"])
    names = ["ramp and delay", "gate frozen at first", "balanced", interventions.PLAIN]
    optims = [arms_without_subwords(options, names)[name].config.optim for name in names]
    assert (optims[0].part_warmup_steps.rwkv, optims[0].frozen_steps.mamba) == (100, 20)
    assert [optim.frozen_steps.gate for optim in optims] == [0, 40, 0, 0]
    assert {optim.warmup_steps for optim in optims} == {20}


def arms_without_subwords(options, names):
    """The arms of some interventions; the tokenizer of subwords takes seconds to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interventions, "TEXTS", {"subwords": {}})
        return interventions.arms_of(options, names)


def test_verdict_names_what_is_real():
    plain = np.array([1.6, 1.61, 1.59, 1.6])
    losses = {"plain": plain, "a": plain - 0.1 + [0, 1e-3, 0, 1e-3], "b": plain * [1.1, 0.9, 1, 1]}
    said = interventions.verdict(compare(losses, against="plain"))
    assert said == "better than the plain run: a; worse: none."


def test_experiment_runs(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "interventions.json"
    text.write_text("whether it is nobler in the mind to suffer the slings of fortune\n" * 200)
    flags = ["--quick", "--seeds=2", "--only=mamba rate 0.5,gate frozen", f"--source={text}"]
    interventions.main([*flags, "--impl=reference", f"--out={out}"])
    result = results.read(out)
    assert out.with_suffix(".png").exists()
    measures, (losses, *_) = result["measures"], result["tables"]
    assert [row[0] for row in losses["rows"]] == ["plain", "Mamba rate 0.5", "gate frozen"]
    for at, name in (("at 3e-4", "3e-4"), ("at its best", "best")):
        ends = [measures[f"loss {n} {at}"]["mean"] for n in ("Mamba rate 0.5", "plain")]
        pair = measures[f"Mamba rate 0.5 - plain at {name}"]
        assert pair["mean"] == pytest.approx(ends[0] - ends[1], abs=1e-4) and pair["mean"] != 0
    assert measures["R/M gradient ratio, subwords / characters"]["n"] == 2
    assert 0 < measures["Mamba share plain"]["mean"] <= 1
    assert {"loss added without RWKV plain", "loss added without Mamba plain"} <= set(measures)


def test_interventions_reach_the_config():
    options = interventions.command.parser("interventions", "?")
    variants.add_flags(options)
    options = command.parse(options, ["--quick"])
    arms = interventions.arms_of(options, interventions.INTERVENTIONS)
    plain = arms["plain"].config
    for name, (config, task) in arms.items():
        assert (config != plain) == (name != "plain"), name
        assert (task is arms["plain"].task) == (name != interventions.SUBWORDS)
    assert arms["warm-up 50 %"].config.optim.warmup_steps == 3  # of six steps
    assert arms["no warm-up"].config.optim.warmup_steps == 0 < plain.optim.warmup_steps


def test_unknown_intervention_is_one_line():
    with pytest.raises(InputError, match="--only=prayer must be of plain, RWKV rate"):
        interventions.main(["--only=prayer"])
