"""The laboratory's files import in one direction: gt_jax <- lab <- questions and benchmarks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments").rglob("*.py"))
# Of benchmarks.
HELPERS = {"kernel_errors", "kernel_tables", "parallel_tables"}
HELPERS |= {"peers_jax", "peers_torch", "peers_generation"}
# What a part of experiments/ may import of it, as the first words of dotted names.
ALLOWED = {
    "lab": {"experiments.lab"},
    "questions": {"experiments.lab"},
    "benchmarks": {"experiments.lab", *(f"experiments.benchmarks.{name}" for name in HELPERS)},
    "__main__.py": {"experiments.lab"},
}
PROGRAMS = {f"gt_jax.{file.stem}" for file in (ROOT / "gt_jax").glob("*.py")}
PROGRAMS = {
    name
    for name in PROGRAMS
    if "\ndef main(" in (ROOT / f"{name.replace('.', '/')}.py").read_text()
}


def imports_of(path):
    """Dotted names of the modules a file imports; functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_module(name) else node.module


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_experiments_import_the_laboratory_and_the_library_only(path):
    part = path.relative_to(ROOT / "experiments").parts[0]
    for name in imports_of(path):
        if name.startswith("experiments"):
            assert any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[part]), name
        assert name.split(".")[0] != "configs" or part != "questions", name
        assert name not in PROGRAMS, f"{name} is a program: move what is shared into the library"


def test_no_import_goes_in_a_circle():
    wanted = {module_of(path): set(imports_of(path)) for path in FILES}
    wanted = {module: names & set(wanted) for module, names in wanted.items()}
    while ready := {module for module, names in wanted.items() if not names}:
        wanted = {m: names - ready for m, names in wanted.items() if m not in ready}
    assert not wanted, f"these import each other: {sorted(wanted)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 120, node.name
