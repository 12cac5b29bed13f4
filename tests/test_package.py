"""What is installed: one list of requirements, every program under one command, every config."""

import ast
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gt_jax import __main__ as programs
from gt_jax import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def in_file(name):
    """Requirements of a file, those of files it includes left out."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-r")}


def in_extra(name):
    """Requirements of an extra, with those of the extras that it names."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][name]:
        nested = re.fullmatch(r"gt_jax\[(.*)\]", requirement)
        found |= set().union(*map(in_extra, nested[1].split(","))) if nested else {requirement}
    return found


def test_requirements_files_and_package_ask_for_the_same():
    assert in_file("requirements-cpu.txt") == set(PROJECT["dependencies"]) | in_extra("test")
    jax = next(line for line in PROJECT["dependencies"] if line.startswith("jax>"))
    assert in_file("requirements.txt") == {jax.replace("jax", "jax[cuda12]", 1)}


def test_every_program_has_a_name_under_one_command():
    folder = ROOT / "gt_jax"
    mains = {p.parent.name if p.stem == "__main__" else p.stem for p in folder.rglob("*.py")
             if '__name__ == "__main__"' in p.read_text()} - {"gt_jax"}  # fmt: skip
    mains.remove("chat_sandbox")  # a process that chat templates run in, for nobody to start
    assert set(programs.PROGRAMS) == mains
    listing = subprocess.run(
        [sys.executable, "-m", "gt_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in mains:
        assert f"  {name:9} {programs.about(name)}" in listing


def test_help_of_a_program_shows_what_each_flag_is_without_a_value(capsys):
    """Of every flag in the sources, but those that name something or are off."""
    from gt_jax import evaluate, generate, inspect, prepare, serve
    from gt_jax.canaries import __main__ as canaries

    shown = ""
    for program in (evaluate, generate, inspect, prepare, serve, canaries):
        program.main(["program", "--help"])
        shown += capsys.readouterr().out
    for flag in ("max_tokens=256", "temperature=1.0", "port=8000", "max_seconds=300", "rows=8",
                 "seed=0", "vocab_size=16384", "suite=standard", "batch_size=8"):  # fmt: skip
        assert f"  --{flag}: " in shown
    assert "None" not in shown and "repeat this option" not in shown
    for line in re.findall(r"^  --.*", shown, re.M):
        assert re.fullmatch(r"  --\w+(=\S+)?: (<[\w|]+>: )?[A-Z].*\.", line), line


def test_serve_names_the_packages_of_its_extra():
    extra = PROJECT["optional-dependencies"]["serve"]
    names = " ".join(re.match(r"[\w-]+", need)[0] for need in extra)
    assert f"pip install {names}" in (ROOT / "gt_jax" / "serve.py").read_text()


def test_a_program_by_name_is_the_module():
    run = lambda *command: subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    by_name, module = run("gt_jax", "evaluate", "--nope"), run("gt_jax.evaluate", "--nope")
    assert (by_name.returncode, by_name.stderr) == (module.returncode, module.stderr)
    wrong = run("gt_jax", "trian")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "did you mean 'train'?" in wrong.stderr


def test_the_citation_names_the_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_test_that_needs_more_than_the_requirements_runs_beside_other_libraries():
    """What one stage of .ci/run skips for want of a package, another runs, and no more."""
    name_of = lambda requirement: re.split(r"[\[<>=]", requirement)[0].lower().replace("-", "_")
    base = set(map(name_of, in_file("requirements-cpu.txt")))
    more = set(map(name_of, in_extra("interop-test"))) - base
    comes_with = {"ipykernel": "nbformat", "tensorflow_datasets": "pyarrow"}
    base |= {package for owner, package in comes_with.items() if owner in base}
    asked = lambda code: (
        set(re.findall(r"(?:importorskip|find_spec)\(\"(\w+)", code)) - base - {"tests"}
    )
    wanted, needed = set(), set()
    for path in (ROOT / "tests").rglob("*.py"):
        text, name = path.read_text("utf-8"), str(path.relative_to(ROOT))
        if not asked(text):
            continue
        needed |= asked(text)
        outside, functions = "", {}
        for node in ast.parse(text).body:
            code = ast.get_source_segment(text, node)
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = code
            else:
                outside += code
        asking = {function for function, code in functions.items() if asked(code)}
        fixtures = "|".join(f for f in asking if not f.startswith("test_")) or "(?!)"
        asking |= {f for f, code in functions.items() if re.search(rf"\b({fixtures})\b", code)}
        tests = {f"{name}::{function}" for function in asking if function.startswith("test_")}
        wanted |= {name} if asked(outside) else tests
    listed = (ROOT / ".ci/with_other_libraries").read_text().split()
    assert listed == sorted(wanted)
    assert needed <= more


def test_what_the_newest_versions_are_tried_with_and_without_exists():
    lines = (ROOT / ".ci/where_versions_matter").read_text().splitlines()
    named = [line.partition("=")[2] or line for line in lines if not line.startswith(("#", "-k"))]
    assert len(named) > 50
    for name in named:
        path, _, function = name.partition("[")[0].partition("::")
        assert (ROOT / path).exists(), name
        assert not function or f"\ndef {function}" in (ROOT / path).read_text("utf-8"), name


def test_the_list_of_models_bears_a_closed_pipe_and_names_a_wrong_argument():
    """The list, of two models, is so long here that its reader leaves before its end."""
    code = "from gt_jax.models import __main__ as listing; from itertools import islice; "
    code += "table = list(islice(listing.rows(), 3)); "
    code += "listing.rows = lambda: table * 9999; listing.main()"
    command = f"set -o pipefail; {sys.executable} -c '{code}' | head -n 1"
    piped = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert piped.stdout.startswith("preset") and (piped.returncode, piped.stderr) == (141, "")
    command = [sys.executable, "-m", "gt_jax.models", "--nope"]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("program", ["train", "prepare"])
def test_ctrl_c_while_a_program_imports_ends_it_without_a_traceback(tmp_path, program):
    """A module that is imported on the way presses it."""
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    (tmp_path / "numpy.py").write_text(code)
    command = [sys.executable, "-m", f"gt_jax.{program}", "--help"]
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    # What is started in the background of a shell ignores Ctrl-C, and these tests may be.
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=heeded,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
