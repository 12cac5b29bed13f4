import json
import subprocess
import sys

import jax

from gt_jax.training import provenance


def test_every_start_of_a_run_leaves_what_is_needed_to_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gt_jax.train", "--workdir=a b"])
    for step in (0, 40):
        provenance.record(tmp_path, step=step, text="ab12")
    first, second = map(json.loads, (tmp_path / "provenance.jsonl").read_text().splitlines())
    assert (first["step"], second["step"], first["text"]) == (0, 40, "ab12")
    assert first["versions"]["jax"] == jax.__version__ and "optax" in first["versions"]
    assert first["command"] == "python -m gt_jax.train '--workdir=a b'"
    assert first["devices"].endswith(jax.devices()[0].device_kind)


def test_commit_is_that_of_the_code_and_says_whether_it_was_changed(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("a")
    assert provenance.commit(package) is None  # in no checkout

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert provenance.commit(package) is None  # installed in somebody's checkout, untracked
    git("add", "package")
    git("commit", "-qm", "a")
    assert provenance.commit(package) == git("rev-parse", "HEAD")
    (tmp_path / "other.txt").write_text("not of the package")
    assert provenance.commit(package) == git("rev-parse", "HEAD")
    (package / "a.py").write_text("b")
    assert provenance.commit(package) == git("rev-parse", "HEAD") + "+changes"
