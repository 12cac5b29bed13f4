"""The comparison of grafts with training from scratch runs anywhere, small enough."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from experiments.lab import jobs
from experiments.lab.jobs import run
from experiments.questions import graft
from gt_jax import train


def after_the_first():
    """subprocess.run, whose second and later commands run in this process: no Python starts."""
    started = []

    def run_command(command, **options):
        started.append(command)
        if len(started) == 1:
            return subprocess.run(command, **options)
        return subprocess.CompletedProcess(command, train.main(command[2:]) or 0, "", "")

    return run_command


def test_small_comparison_gives_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=after_the_first()))
    (tmp_path / "text.txt").write_text("to be or not to be that is the question\n" * 100)
    small = {"train.batch_size": 2, "train.seq_len": 16, "optim.warmup_steps": 1}
    small["model.impl"] = "reference"  # compiles soonest
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
