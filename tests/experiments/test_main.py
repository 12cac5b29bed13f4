"""`python -m experiments` runs what it is asked to."""

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest

from experiments import __main__ as together
from experiments.lab.command import QUICK
from experiments.questions import fusion, gates, presets, ratio
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


def test_arguments_go_to_an_experiment_that_takes_them(monkeypatch):
    ran = []
    monkeypatch.setattr(presets, "main", ran.append)
    together.main(["presets", "tiny", "gpt2", "--steps=20"])
    assert ran == [["tiny", "gpt2", "--steps=20"]]


def test_status_of_an_experiment_is_passed_on(monkeypatch):
    monkeypatch.setattr(gates, "main", lambda argv: 1)
    assert together.main(["gates", "--checkpoint=runs/x"]) == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_question_and_benchmark(argv, capsys):
    together.main(argv)
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0] for line in lines if line.startswith("  ") and line.strip()}
    folder = Path(together.__file__).parent
    assert {file.stem for file in (folder / "questions").glob("*.py")} <= named
    assert {"kernels", "generation", "throughput", "profile_training", "report"} <= named


def test_help_of_every_experiment_explains_each_flag_and_shows_its_default(monkeypatch):
    class Parsed(Exception):
        pass

    def stop(parser, *_):
        raise Parsed(parser)

    monkeypatch.setenv("COLUMNS", "400")  # --help breaks no word
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    named = together.experiments()
    named.pop("profile_training")  # has absl's flags, as the programs of gt_jax do
    for name, file in named.items():
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(together.module(file)).main([])
        parser = parsed.value.args[0]
        shown = " ".join(parser.format_help().split())
        for action in parser._actions:
            assert action.help, f"{name}: {action.dest} is not explained"
            default = str(action.default)
            plain = isinstance(action.default, int | float | str)
            if plain and default not in ("False", "", "==SUPPRESS=="):
                shows = f"(default: {default})" in shown or "default" in action.help
                assert shows, f"{name} hides {action.dest}={default}"


def test_the_question_that_the_readme_shows_runs(monkeypatch, tmp_path, capsys):
    text = (Path(together.__file__).parent / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    namespace = {"__name__": "mine"}
    exec(code, namespace)
    monkeypatch.setitem(QUICK, "train.steps", 2)
    namespace["main"](["--quick", "--seeds=2", f"--out={tmp_path / 'mine.json'}"])
    assert "loss at 0.001" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "mine.json").read_text())["measures"]) == {
        "loss at 0.001", "loss at 0.003"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fusoin"], "fusion"),
        (["--seeds=2"], "ratio"),
        (["results"], "'results' is no experiment"),
        (["fusion", "kernels"], "kernels has flags of its own: run it alone"),
        (["fusion", "ratio", "--out=x.json"], "--out is for one"),
    ],
)
def test_wrong_names_and_flags_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        together.main(argv)
