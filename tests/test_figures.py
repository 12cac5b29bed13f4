"""The script that runs the documented commands of one GPU: what it takes, keeps and refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci/figures"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="of the GPU machine, with GNU's tools"
)


@pytest.fixture
def figures(tmp_path):
    """figures(*arguments, **variables) in a folder of its own -> (status, output).

    In place of Python is a program that prints its arguments and fails if one is gf_mh_base.
    """
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *=gf_mh_base*) exit 3;; esac\n')
    python.chmod(0o755)
    (tmp_path / "text.txt").write_text("to be")

    def run(*arguments, **variables):
        env = {**os.environ, **variables, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        line = ["bash", str(SCRIPT), *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        # A program that ends at once can begin in one second and end in the next.
        return done.returncode, re.sub(r", \d s$", "", done.stdout + done.stderr, flags=re.M)

    return run


def test_named_commands_run_once_and_log_where_it_was_called(figures, tmp_path):
    assert figures("out", "600", "commands", "gf_mh-64x64") == (
        0,
        "commands: status 0\ngf_mh-64x64: status 0\n",
    )
    kept = {file.name for file in (tmp_path / "out").iterdir()}
    assert kept == {
        f"{name}.{end}" for name in ("commands", "gf_mh-64x64") for end in ("log", "done")
    }
    logged = (tmp_path / "out/commands.log").read_text()
    assert logged == f"-m experiments commands --seeds=1 --out={tmp_path / 'out/commands.json'}\n"
    assert figures("out", "600", "commands") == (0, "")


def test_command_that_fails_is_tried_again(figures, tmp_path):
    for _ in range(2):
        assert figures("out", "600", "gf_mh_base", "stability") == (
            1,
            "gf_mh_base: status 3\n" + "stability: status 0\n" * (_ == 0),
        )
    assert not (tmp_path / "out/gf_mh_base.done").exists()


def test_files_are_those_where_it_was_called(figures, tmp_path):
    assert figures("out", "600", "laboratory", TEXT="text.txt")[0] == 0
    assert f"--source={tmp_path / 'text.txt'}\n" in (tmp_path / "out/laboratory.log").read_text()


def test_nothing_begins_without_a_minute(figures):
    assert figures("out", "59", "stability") == (0, "stability: not begun, 59 s are left\n")


REFUSED = {
    ("out",): "FOLDER SECONDS [NAME ...]",
    ("out", "soon"): "SECONDS=soon must be a whole number",
    ("out", "600", "stabilty"): "stabilty is none of tests-elementwise fusion_cost",
    ("out", "600", "laboratory"): "TEXT, PREPARED or BEFORE may be missing",
    ("text.txt", "600"): "File exists",
    ("with space", "600"): "must have no space in it",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_wrong_argument_is_refused_before_anything_runs(figures, tmp_path, arguments):
    status, said = figures(*arguments)
    assert status == 1 and REFUSED[arguments] in said
    assert not list(tmp_path.glob("*/*.log"))


def test_text_that_does_not_exist_is_refused(figures):
    assert figures("out", "600", TEXT="nothing") == (1, "TEXT=nothing does not exist\n")
