"""The benchmark of whole commands: what it types, what it reads of a run, what it writes."""

import json
import types

import pytest

from experiments.benchmarks import commands
from experiments.lab import command
from gt_jax.errors import InputError

PRINTED = """run:    /tmp/run
compiled 7 s after the start
step 3/6  loss 4.1
finished; best validation loss 4.1111 at step 3; 12,345 tokens/s in training
"""


def options_of(**changes):
    values = {"source": "shakespeare", "impl": "auto", "quick": False}
    return types.SimpleNamespace(**values | changes)


def test_cold_and_warm_runs_of_a_seed_share_what_compiles(tmp_path, monkeypatch, capsys):
    lines = []

    def run(line, **_):
        lines.append(dict(flag.split("=", 1) for flag in line[3:]))
        return types.SimpleNamespace(returncode=0, stdout=PRINTED, stderr="")

    monkeypatch.setattr(commands, "subprocess", types.SimpleNamespace(run=run))
    out = tmp_path / "commands.json"
    commands.main(["--config=gf_mh:train.steps=6,tiny", "--seeds=2", f"--out={out}"])
    names = [line["--config"].rsplit("/", 1)[1] for line in lines]
    assert names == ["gf_mh.py"] * 2 + ["tiny.py"] * 2 + ["gf_mh.py"] * 2 + ["tiny.py"] * 2
    assert lines[0]["--config.train.steps"] == "6" and "--config.train.steps" not in lines[2]
    caches = [line["--compile_cache"] for line in lines]
    assert caches[::2] == caches[1::2] and len(set(caches)) == 4
    assert len({line["--workdir"] for line in lines}) == 8
    table = json.loads(out.read_text())["tables"][0]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [(row["command"], row["start"]) for row in rows] == [
        ("gf_mh:train.steps=6", "cold"),
        ("gf_mh:train.steps=6", "warm"),
        ("tiny", "cold"),
        ("tiny", "warm"),
    ]
    for row in rows:
        assert row["compiled"]["values"] == [7, 7]
        assert row["tokens/s in training"]["mean"] == 12345
        assert row["best loss"]["mean"] == pytest.approx(4.1111)
    assert "Whole commands" in capsys.readouterr().out


def test_a_run_is_timed_and_read(tmp_path):
    """The lines that a real run prints are those that the benchmark looks for."""
    flags = commands.flags_of("tiny", options_of(quick=True))
    row = commands.timed(flags, tmp_path, "cold", None)
    assert set(row) == set(commands.COLUMNS[2:]) and None not in row.values()
    assert row["seconds"] > row["compiled"] >= 0


@pytest.mark.parametrize(
    "config, line",
    [("nothing", "nothing"), ("gf_mh:train.steps", "'train.steps' must be field=value")],
)
def test_what_cannot_be_run_is_one_line(config, line):
    with pytest.raises(InputError, match=line):
        commands.main([f"--config={config}"])


def test_a_run_that_fails_says_why(tmp_path):
    flags = [*commands.flags_of("tiny", options_of(quick=True)), "--config.optim.lr=-1"]
    with pytest.raises(InputError, match=r"ended with 1: error: optim.lr=-1"):
        commands.timed(flags, tmp_path, "cold", None)


def test_quick_runs_are_those_of_the_laboratory():
    flags = commands.flags_of("gf_mh", options_of(quick=True, source="a.txt", impl="chunked"))
    for field, value in command.QUICK.items():
        assert f"--config.{field}={value}" in flags
    assert {"--config.data.source=a.txt", "--config.model.impl=chunked"} < set(flags)
