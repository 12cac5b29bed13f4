"""Each family trains at the rate that was best in a tenth of the steps; parts join to the whole."""

import json

import numpy as np
import pytest

from experiments import lab
from experiments.lab import claims, families, results, unfinished
from experiments.questions import long_parity
from gt_jax.errors import InputError

BEST = {"GF-MH": 2e-3, "GPT-2": 4e-3}  # not what a sweep of so few steps would say


@pytest.fixture(scope="module")
def trial(tmp_path_factory, compiled_once):
    """flags -> path of the result, and [(arm, seeds, rates)] of what was trained."""
    folder = tmp_path_factory.mktemp("long_parity")
    text = folder / "text.txt"
    text.write_text("to be or not to be that is the question\n" * 100)
    trained, train = [], lab.train

    def watched(arms, **options):
        for name, arm in arms.items():
            rates = options.get("sweep", {}).get("optim.lr") or arm.config.optim.lr
            trained.append((name, list(options["seeds"]), rates))
        return train(arms, **options)

    def run(name, *flags):
        trained.clear()
        out = folder / f"{name}.json"
        source = [] if "--parts" in flags else ["--quick", f"--source={text}"]
        source.append("--impl=reference")
        long_parity.main([*source, f"--out={out}", *flags])
        return out, [*trained]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "train", watched)
        # Another kind of GPT in the hybrid's place: it compiles in a third of the time.
        patch.setitem(families.FAMILIES, "GF-MH", {"model.preset": "gpt1"})
        best = lambda runs: BEST["GPT-2" if runs.model_config.architecture == "gpt2" else "GF-MH"]
        patch.setattr(long_parity, "best_rate", best)
        yield run


@pytest.fixture(scope="module")
def whole(trial):
    return trial("whole", "--seeds=2")


@pytest.fixture(scope="module")
def rates(trial):
    return trial("rates", "--rates_only")


def test_every_family_trains_in_full_at_the_rate_that_was_best_in_short(whole):
    out, trained = whole
    sweeps = [(f"rates of {name}", [0], long_parity.RATES) for name in BEST]
    assert trained == sweeps + [(name, [0, 1], rate) for name, rate in BEST.items()]
    found = results.read(out)
    hybrid, gpt = (found["measures"][f"loss {name}"]["values"] for name in BEST)
    ratio = found["measures"]["loss ratio GF-MH / GPT-2"]["values"]
    assert ratio == pytest.approx(np.divide(hybrid, gpt), rel=1e-4)
    rows = {row[0]: row for row in found["tables"][0]["rows"]}
    assert rows["GPT-2"][2] >= rows["GF-MH"][2]
    assert {name: row[4] for name, row in rows.items()} == BEST
    assert claims.LONG_RATIO.name in found["measures"]
    contexts = " / ".join(map(str, long_parity.CONTEXTS[::-1]))
    assert claims.LONG_CONTEXT.name == f"{long_parity.LONGER.format('GF-MH')}{contexts}"
    longer = found["measures"]["perplexity ratio GF-MH, 16 / 8"]
    assert longer["n"] == 2 and 0.5 < longer["mean"] < 2  # a text of one line, hardly learnt
    assert not list(out.parent.glob("whole*.unfinished"))


def test_parts_join_to_the_result_of_one_process(trial, whole, rates):
    paths, flags = [str(rates[0])], ("--parts", str(rates[0]))
    assert [name for name, *_ in rates[1]] == ["rates of GF-MH", "rates of GPT-2"]
    for family, flag, seeds in (
        ("GF-MH", "--seed=1", [1]),
        ("GF-MH", "--seed=0", [0]),
        ("GPT-2", "--seeds=2", [0, 1]),
    ):
        part, trained = trial(f"{family}{flag}", f"--only={family}", flag, *flags)
        assert trained == [(family, seeds, BEST[family])]
        paths.append(str(part))
    out, trained = trial("joined", "--parts", *paths)
    assert not trained
    joined, one = results.read(out), results.read(whole[0])
    commands = joined["settings"].pop("parts")
    assert len(commands) == 4 and joined["settings"] == one["settings"]
    assert set(joined["measures"]) == set(one["measures"])
    for name, value in one["measures"].items():
        if not name.startswith("seconds "):
            np.testing.assert_allclose(
                numbers(joined["measures"][name]), numbers(value), rtol=1e-4, err_msg=name
            )
    drop = lambda table: [row[:-1] for row in table["rows"]]
    for mine, theirs in zip(joined["tables"], one["tables"], strict=True):
        assert mine["columns"] == theirs["columns"] and len(drop(mine)) == len(drop(theirs))
    assert joined["plots"][0]["series"][0]["x"] == one["plots"][0]["series"][0]["x"]
    assert joined["quick"] and joined["notes"] == one["notes"]


def numbers(measure):
    """The values of an estimate, the mean of a difference, or a plain number."""
    return measure.get("values", measure["mean"]) if isinstance(measure, dict) else measure


def test_an_interrupted_command_given_again_trains_the_rest(trial, monkeypatch):
    write = results.write

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trial("again", "--only=GPT-2", "--seeds=2")
    monkeypatch.setattr(results, "write", write)
    out, trained = trial("again", "--only=GPT-2", "--seeds=2")
    assert not trained and "loss GPT-2" in results.read(out)["measures"]


def test_a_run_interrupted_on_its_way_continues_to_the_same_losses(
    trial, whole, rates, monkeypatch, capsys
):
    save = unfinished.Place.save

    def interrupted(place, *args):
        save(place, *args)
        raise KeyboardInterrupt

    flags = ("--only=GPT-2", "--seeds=2", "--parts", str(rates[0]))
    monkeypatch.setattr(unfinished, "SECONDS", 0)
    monkeypatch.setattr(unfinished.Place, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trial("on-its-way", *flags)
    assert "continues" not in capsys.readouterr().out
    out, _ = trial("on-its-way", *flags)
    assert "GPT-2: continues after 3 steps" in capsys.readouterr().out
    found, one = (results.read(path)["measures"] for path in (out, whole[0]))
    for name in (f"loss GPT-2, step {step}" for step in (3, 6)):
        assert found[name]["values"] == one[name]["values"]
    assert not list(out.parent.glob("on-its-way*.unfinished"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "parity"}, "is of parity, not of long_parity"),
        ({}, "holds seed 0 of GF-MH once more"),
        ({"settings": {"steps": 7}}, "has steps=7 and .* 6; give all parts the same flags"),
    ],
)
def test_parts_that_do_not_fit_are_refused(trial, whole, tmp_path, changes, message):
    part = results.read(whole[0])
    settings = part["settings"] | changes.get("settings", {})
    if "settings" in changes:  # other seeds, so that the flags are what differs
        settings["seeds"] = [2, 3]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(part | changes | {"settings": settings}), "utf-8")
    with pytest.raises(InputError, match=message):
        trial("refused", "--parts", str(whole[0]), str(other))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seed=-1", "--seed=-1 must be at least 0"),
        ("--only=GPT", "--only=GPT must be of GF-MH, GPT-2"),
    ],
)
def test_wrong_flags_are_one_line(trial, flag, message):
    with pytest.raises(InputError, match=message):
        trial("refused", flag)
