"""The comparison of grafts with training from scratch runs anywhere, small enough."""

import json

import pytest

from experiments.lab.jobs import run
from experiments.questions import graft


def test_small_comparison_gives_every_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be that is the question\n" * 100)
    small = {"train.batch_size": 2, "train.seq_len": 16, "optim.warmup_steps": 1}
    monkeypatch.setattr(graft, "SIZE", {"model.dim": 32, "model.layers": 1})
    run_all = lambda tasks, jobs: [run(n, c | small, *rest) for n, c, *rest in tasks]
    monkeypatch.setattr(graft, "run_all", run_all)
    monkeypatch.setattr(graft, "GRAFTS", {"graft": graft.GRAFTS["graft"]})
    out = tmp_path / "graft.json"
    graft.main([f"--source={tmp_path / 'text.txt'}", "--steps=2", "--seeds=1", f"--out={out}"])
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [*graft.PARENTS, "from scratch", "from scratch, 3 x steps", *graft.GRAFTS]
    assert [run["seed"] for run in rows["graft"]["runs"]] == [0]
    assert [rows[name]["runs"][0]["steps"] for name in ("graft", "from scratch, 3 x steps")] == [
        2,
        6,
    ]
    assert rows["from scratch"]["against_scratch"] == {"mean": 0, "sd": None}
    gain = rows["graft"]["mean"] - rows["from scratch"]["mean"]
    assert rows["graft"]["against_scratch"]["mean"] == pytest.approx(gain)
    assert "graft  " in capsys.readouterr().out
