"""Every public function of gt_jax says the types of its arguments and of what it returns."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernel bodies take references to memory, for which JAX has no public types.
SOURCES = [p for p in sorted(ROOT.glob("gt_jax/**/*.py")) if "kernels" not in p.parts]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(body, prefix=""):
    """(qualified name, node) of the functions and methods that a caller outside may use."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, FUNCTION) and (
            not node.name.startswith("_") or node.name in ("__call__", "__init__")
        ):
            yield prefix + node.name, node


def missing_annotations(node, is_method):
    """Names of a function's arguments without a type, and "return"."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if is_method and not static:
        positional = positional[1:]
    others = [arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    missing = [a.arg for a in (*positional, *others) if a is not None and a.annotation is None]
    if node.returns is None and node.name != "__init__":
        missing.append("return")
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_are_annotated(path):
    for name, node in public_functions(ast.parse(path.read_text("utf-8")).body):
        missing = missing_annotations(node, is_method="." in name)
        assert not missing, f"{name} (line {node.lineno}) has no type for {', '.join(missing)}"


def test_the_walk_finds_what_is_missing():
    source = "class A:\n    def f(self, x, *, y: int, **z): ...\n    def _g(self, x): ...\n"
    ((name, node),) = public_functions(ast.parse(source).body)
    assert (name, missing_annotations(node, is_method=True)) == ("A.f", ["x", "z", "return"])
