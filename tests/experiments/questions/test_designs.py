"""Designs are what their names say, are compared by one rule, and parts join to the whole."""

import errno
import json
import shutil

import numpy as np
import pytest

from experiments import lab
from experiments.lab import command, designs, phase1, results, rules, unfinished
from experiments.lab.statistics import compare, estimate
from experiments.questions import arbiters, debate, pilot, residual, search, stability
from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, make_model
from gt_jax.training.debate import make_terms
from gt_jax.training.model import make_model_config

EVERY = {
    "arbiters": arbiters.DESIGNS,
    "debate": debate.DESIGNS,
    "pilot": pilot.REFERENCES,
    "residual": residual.DESIGNS,
    "search": designs.SEARCHED,
    "stability": stability.DESIGNS,
}


@pytest.mark.parametrize("question", EVERY)
def test_every_design_is_a_model_with_its_auxiliary_losses(question):
    for name, changes in EVERY[question].items():
        config = lab.make_config({"model.preset": "gf-mh", "model.dim": 32} | dict(changes))
        model_config = make_model_config(config, 11)
        terms = make_terms(make_model(model_config), config)
        wanted = {field for field, value in changes.items() if field.endswith("_weight") and value}
        assert bool(terms) == bool(wanted), name
    assert "," not in "".join(EVERY[question]), "names are given with commas between them"


def test_the_search_is_large_enough_and_names_what_it_changes():
    assert len(designs.SEARCHED) >= 9 and next(iter(designs.SEARCHED)) == designs.BASE
    for name, changes in designs.SEARCHED.items():
        assert ("Mamba path" in name) == (changes.get("model.residual") == "mamba"), name
        assert ("repaired" in name) == ("debate.arbiter_weight" in changes), name
        assert ("branch losses" in name) == ("debate.branch_weight" in changes), name
    assert set(arbiters.ARBITERS) == set(FUSIONS) - {"hy", "gf", "ws", "rf", "cp", "hgf"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The question about auxiliary losses, as a trial: its result, and its file.

    Its first command ends before the result is written, and it is given again.
    """
    folder = tmp_path_factory.mktemp("debate")
    text, out = folder / "text.txt", folder / "debate.json"
    text.write_text("whether it is nobler in the mind to suffer the slings of fortune\n" * 200)
    flags = [
        "--quick",
        "--seeds=2",
        "--only=GF-MH,repaired",
        "--impl=reference",
        f"--source={text}",
    ]
    flags.append(f"--out={out}")
    trained, train = [], lab.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lab, "train", lambda arms, **more: trained.append(set(arms)) or train(arms, **more)
        )
        with patch.context() as broken:
            broken.setattr(results, "write", full_disk)
            with pytest.raises(OSError, match="No space"):
                debate.main(flags)
        assert not out.exists()
        # As on another machine, whose text and results lie elsewhere, after another commit.
        (kept,) = folder.glob("*.unfinished")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        kept.rename(elsewhere / kept.name)
        moved = text.rename(elsewhere / "moved.txt")
        out = elsewhere / out.name
        patch.setattr(results, "_commit", lambda: "0" * 40)
        debate.main([*flags[:-2], f"--source={moved}", f"--out={out}"])
    assert trained == [{"GF-MH", "repaired"}, set()], "what was kept is not trained again"
    assert not list(folder.rglob("*.unfinished*"))
    return results.read(out), out


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_only_what_the_same_command_measured_of_the_same_config_is_kept(tmp_path, monkeypatch):
    options, text = debate_options(tmp_path), "hash of a text"
    kept = unfinished.Kept(options, {"a": "config of a", "b": "config of b"}, text)
    kept.add("a", {"loss": [1.5, np.nan], "seconds": 3})
    kept.add("b", {"loss": [2.5, 1 / 3]})
    found = lambda text=text: unfinished.Kept(options, {"a": "config of a"}, text).measured
    again = unfinished.Kept(options, {"a": "config of a", "b": "another", "c": ""}, text).measured
    assert set(again) == {"a"}
    np.testing.assert_array_equal(again["a"]["loss"], [1.5, np.nan])
    np.testing.assert_array_equal(again["a"]["seconds"], 3)
    assert not found("hash of another text")
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "_code", lambda: "another")
        assert not found()
    options.quick = True  # a trial meanwhile, to its end
    trial = unfinished.Kept(options, {"a": "config of a"}, text)
    assert not trial.measured
    trial.add("a", {"loss": [1.0]})
    trial.forget()
    options.quick = False
    assert set(found()) == {"a"}
    whole = kept.path.read_text("utf-8")
    listed = whole[: whole.index('"arms"')] + '"arms": []}'
    for damaged in ("", "{", "[]", '{"of": 1}', listed, whole[:-9], whole.replace("1.5", '"x"')):
        kept.path.write_text(damaged, "utf-8")
        assert not found(), damaged


def debate_options(folder):
    parser = command.parser("debate", "About.")
    designs.add_flags(parser, steps=6, seeds=2)
    return command.parse(parser, [f"--out={folder / 'debate.json'}"])


def test_a_trial_measures_losses_and_what_branches_are_worth(run):
    result, out = run
    assert out.with_suffix(".png").exists()
    for name in ("GF-MH", "repaired"):
        for key in ("loss", "best loss", "training loss", "variance growth, untrained", "top"):
            assert np.isfinite(result["measures"][f"{key} {name}"]["values"]).all(), key
        shares = (result["measures"][f"{b} share {name}"]["mean"] for b in ("RWKV", "Mamba"))
        assert sum(shares) == pytest.approx(1)
    assert "debate_arbiter repaired" in result["measures"]
    assert "debate_arbiter GF-MH" not in result["measures"]
    assert result["measures"]["repaired - GF-MH"]["n"] == 2
    # The entropy of a model that has seen six batches is that of the alphabet, nearly.
    assert 2 < result["measures"]["entropy GF-MH"]["mean"] < np.log(27)


def test_parts_join_to_the_result_that_they_are_of(run, tmp_path, monkeypatch):
    result, out = run
    monkeypatch.setattr(results, "origin", lambda: dict.fromkeys(result_origin(result), "here"))
    other = tmp_path / out.name
    shutil.copy(out, other)
    debate.main([f"--out={tmp_path / 'whole.json'}", "--parts", str(out), str(other)])
    whole = results.read(tmp_path / "whole.json")
    assert set(whole["measures"]) == set(result["measures"])
    for name, measure in result["measures"].items():  # files hold six digits
        assert whole["measures"][name]["mean"] == pytest.approx(measure["mean"], abs=1e-4), name
    commands = {f"{out.name}, {number}": result["command"] for number in (1, 2)}
    assert whole["settings"] == result["settings"] | {"parts": commands}
    assert whole["quick"] and result_origin(whole) == result_origin(result)
    assert whole["seconds"] == pytest.approx(2 * result["seconds"], abs=0.11)


def test_a_part_that_is_given_twice_and_no_name_at_all_are_refused(run, tmp_path):
    _, out = run
    again = out.parent / ".." / out.parent.name / out.name
    for flags, message in (
        (["--parts", str(out), str(again)], "is given twice"),
        (["--only="], "--only= must be of GF-MH, "),
    ):
        with pytest.raises(InputError, match=message):
            debate.main([f"--out={tmp_path / 'whole.json'}", *flags])
    assert not (tmp_path / "whole.json").exists()


def result_origin(result):
    return {name: result[name] for name in ("commit", "device", "jax", "python")}


def test_designs_of_another_question_are_taken_by_their_changes(run, tmp_path, monkeypatch):
    result, out = run
    arms = []
    monkeypatch.setattr(lab, "train", lambda missing, **more: arms.extend(missing))
    kept = unfinished.Kept
    made_up = {"loss": np.array([1.0, 2.0]), "choosing loss": np.ones(2), "parameters": np.ones(2)}
    made_up |= {"best loss": np.ones(2), "training loss": np.ones(2), "best rate": np.ones(2)}
    for name in ("variance growth", "variance growth, untrained", "entropy", "top"):
        made_up[name] = np.ones(2)

    def found(*given):
        made = kept(*given)
        made.measured = {"minGRU": made_up}
        return made

    monkeypatch.setattr(unfinished, "Kept", found)
    whole = tmp_path / "search.json"
    search.main(["--impl=reference", "--only=minGRU", f"--out={whole}", "--parts", str(out)])
    assert not arms, "what is kept or taken is not trained"
    joined = results.read(whole)
    assert list(joined["settings"]["designs"]) == ["GF-MH", "GF-MH + repaired", "minGRU"]
    losses = {n: joined["measures"][f"loss {n}"]["values"] for n in ("minGRU", "GF-MH + repaired")}
    theirs = result["measures"]["loss repaired"]["values"]
    assert losses == {"minGRU": [1.0, 2.0], "GF-MH + repaired": theirs}
    assert "after 6 steps" in joined["tables"][0]["title"]
    assert joined["quick"] and joined["settings"]["seeds"] == [0, 1]
    assert {f"{name} - GF-MH" for name in ("minGRU", "GF-MH + repaired")} <= set(joined["measures"])


def test_costs_of_arbiters_are_taken_from_parts_and_not_measured_again(tmp_path, monkeypatch):
    """A result that is joined on another machine has the times of the one that measured."""
    monkeypatch.setattr(arbiters, "costs", lambda names, options: pytest.fail(f"measured {names}"))
    part, share = tmp_path / "part.json", estimate([0.5, 0.6])
    measures = {f"{key} gru": share for key in ("loss", "choosing loss", "parameters", "best rate")}
    measures |= {"parameters of a block gru": 148484, "ms gru at 64": estimate([2.0, 2.2])}
    measures |= {"toy error removed gru": share, "speed over GRU at 64 gru": estimate([1.0, 1.0])}
    for key in ("best loss", "training loss", "variance growth", "entropy", "top"):
        measures |= {f"{key} gru": share, f"{key}, untrained gru": share}
    options = command.parse(command.parser("arbiters", "About."), [f"--out={part}", "--seeds=2"])
    settings = {"steps": 6, "rates": [0.003], "designs": {"gru": arbiters.DESIGNS["gru"]}}
    results.write(options, settings=settings, measures=measures)
    arbiters.main([f"--out={tmp_path / 'whole.json'}", "--parts", str(part)])
    whole = results.read(tmp_path / "whole.json")
    assert whole["measures"].items() >= results.read(part)["measures"].items()
    assert whole["tables"][0]["rows"][0][:2] == ["gru", 148484]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "has steps=7 and .* 6; give all parts the same flags"),
        ({"source": "x"}, "has source=x and "),
        ({"designs": {"unknown": {"model.dim": 3}}}, "holds no design of this question"),
        ({"designs": None}, "holds no design of this question"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(run, tmp_path, changes, message):
    result, out = run
    other = tmp_path / "other.json"
    other.write_text(json.dumps(result | {"settings": result["settings"] | changes}), "utf-8")
    with pytest.raises(InputError, match=message):
        debate.main([f"--out={tmp_path / 'whole.json'}", "--parts", str(out), str(other)])
    assert not (tmp_path / "whole.json").exists()


def made_up(**changes):
    alive = {
        "RWKV share": [0.4, 0.42, 0.41],
        "Mamba share": [0.6, 0.58, 0.59],
        "loss added without RWKV": [0.5, 0.6, 0.55],
        "loss added without Mamba": [0.2, 0.22, 0.21],
        "blocks closed": [0, 0, 0],
        "blocks constant": [0, 0, 0],
    }
    return {name: np.array(v, float) for name, v in (alive | changes).items()}


@pytest.mark.parametrize(
    ("changes", "word", "because"),
    [
        ({}, "alive", "both branches count"),
        ({"Mamba share": [0.01, 0.012, 0.011]}, "idle", "Mamba share is 0.011"),
        ({"loss added without Mamba": [-0.1, 0.1, 0.05]}, "undecided", "interval over 0"),
        ({"blocks closed": [2, 2, 0]}, "idle", "2 gates are closed in most seeds"),
        ({"blocks constant": [1, 0, 0]}, "undecided", "gates are constant in 33% of the seeds"),
    ],
)
def test_pilot_is_judged_by_its_rule(changes, word, because):
    said, reason = pilot.verdict(made_up(**changes))
    assert said == word and because in reason


def test_best_designs_are_chosen_on_the_half_that_is_not_reported():
    found = {
        "GF-MH": {"choosing loss": [1.0], "loss": [1.0]},
        "a": {"choosing loss": [1.2], "loss": [0.9]},
        "b": {"choosing loss": [1.1], "loss": [1.3]},
    }
    assert designs.chosen(found, 1) == ["b"]
    assert designs.ranked(found)[0] == "a"
    diverged = {"choosing loss": [np.nan], "loss": [np.nan]}
    found = {"GF-MH": found["GF-MH"], "c": diverged} | found
    assert designs.chosen(found, 3) == ["b", "a", "c"]
    assert designs.ranked(found) == ["a", "GF-MH", "b", "c"]


def test_an_evaluation_that_diverged_is_not_the_best():
    """Of two evaluations and two batches of a seed, the first half chooses; the rate is one."""
    nats = np.array([[[2.0, 3.0], [np.nan, np.nan]]])
    runs = lab.Runs(
        points=({"optim.lr": 1.0, "seed": 0},),
        metrics={"loss": np.ones((1, 2))},
        steps=np.array([1, 2]),
        nats=nats,
        correct=nats,
        targets=np.array([1, 1]),
        params=None,
        model_config=arbiters.ModelConfig(2, "gpt2", dim=32, heads=1),
        parameters=1,
        seconds=1.0,
        compile_seconds=1.0,
    )
    assert designs.of_design(runs, None, quick=True)["best loss"] == [3.0]


def test_difference_is_named_better_only_beyond_its_interval():
    losses = {"GF-MH": [1.5, 1.51, 1.49], "a": [1.4, 1.41, 1.39], "b": [1.5, 1.3, 1.7]}
    said = designs.verdict(compare(losses, against="GF-MH"), "GF-MH")
    assert said == "Better than GF-MH beyond its interval: a; worse: none."


def test_toy_task_of_an_arbiter_is_measured_and_timed():
    config = arbiters.ModelConfig(2, dim=32, heads=1, fusion="linrec")
    gradients, inputs = arbiters.ready(config, 8, quick=True)
    assert [x.shape for x in gradients(*inputs[0])[1:]] == [(8, 8, 32)] * 2
    assert np.isfinite(arbiters.toy(config, [0, 1], quick=True)).all()
    assert arbiters.parameters(config) > 2 * 32


def test_claims_of_phase_1_follow_their_rules():
    share = lambda value: estimate([value, value, value])
    found = {
        f"saturated {f}, {init}, 50 steps": share(value)
        for f in phase1.FAMILIES
        for init, value in (("BlinkDL init", 0.0), ("normal init", 0.05), ("unit embedding", 0.3))
    }
    judged = lambda: phase1.judge_init(lambda measure: found[measure.name]).verdict
    assert judged() == "reproduced"
    found |= {name: share(0.0) for name in found if "normal" in name}
    assert judged() == "artefact"
    found["saturated GPT, BlinkDL init, 50 steps"] = share(0.2)
    assert judged() == "refuted"
    counts = {
        f"parameters of a block {n}": arbiters.parameters(
            arbiters.ModelConfig(2, dim=128, heads=1, fusion=n)
        )
        for n in phase1.ARBITER_PARAMETERS
    }
    sizes = phase1.judge_arbiter_sizes(lambda measure: counts[measure.name])
    assert sizes.verdict == "reproduced", sizes.ours
    bounds = [(phase1.arbiter("a", "x"), 4, 9), (phase1.arbiter("b", "x"), None, 1)]
    _, _, judge = rules.all_within(bounds)
    verdicts = ((5, 0.5, "reproduced"), (5, 2.0, "refuted"), (3.0, 0.5, "refuted"))
    for a, b, word in verdicts:
        values = {"a x": share(a), "b x": share(b)}
        assert judge(lambda m, values=values: values[m.name]).verdict == word
