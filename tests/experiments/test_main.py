"""`python -m experiments` runs what it is asked to."""

import pytest

from experiments import __main__ as together
from experiments import fusion, ratio
from gt_jax.errors import InputError


def test_flags_go_to_every_experiment_named(monkeypatch, capsys):
    ran = {}
    for module in (fusion, ratio):
        monkeypatch.setattr(module, "main", lambda argv, m=module: ran.update({m: argv}))
    together.main(["fusion", "ratio", "--seeds=2", "--quick"])
    assert ran[fusion] == ran[ratio] == ["--seeds=2", "--quick"]
    assert capsys.readouterr().out.startswith("fusion, ratio: ")


def test_what_fails_does_not_stop_the_others(monkeypatch):
    def fail(argv):
        raise InputError("no such text")

    ran = []
    monkeypatch.setattr(fusion, "main", fail)
    monkeypatch.setattr(ratio, "main", ran.append)
    with pytest.raises(InputError, match="no such text"):
        together.main(["fusion", "ratio"])
    assert ran == [[]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fusoin"], "fusion"),
        (["--seeds=2"], "ratio"),
        (["results"], "'results' is no experiment"),
        (["fusion", "ratio", "--out=x.json"], "--out is for one"),
    ],
)
def test_wrong_names_and_flags_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        together.main(argv)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_the_experiments(argv, capsys):
    together.main(argv)
    printed = capsys.readouterr().out
    assert "python -m experiments fusion ratio" in printed and "fusion, " in printed
    assert "NAME --help" in printed
