"""Imports point one way: kernels <- models <- training <- train, evaluate, generate."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "gt_jax").rglob("*.py"))

# Folder (or top-level module) of gt_jax -> what it may import of gt_jax, besides itself and errors.
ALLOWED = {
    "errors": set(),
    "archives": set(),
    "kernels": set(),
    "data": set(),
    "models": {"kernels"},
    "config": {"models"},
    "cli": {"config"},
    "stored": {"config", "data", "models"},
    "training": {"config", "data", "kernels", "models", "stored"},
    "analysis": {"config", "data", "kernels", "models", "training"},
    "convert": {"archives", "cli", "config", "data", "kernels", "models", "training"},
    "generation": {"archives", "data", "models"},
    "generate": {"cli", "generation", "training"},
    "serve": {"cli", "generate", "generation", "training"},
    "scoring": {"models"},
    "evaluate": {"cli", "config", "data", "models", "scoring", "training"},
    "harness": {"cli", "models", "scoring", "training"},
    "canaries": {"cli", "models", "scoring", "training"},
    "inspect": {"analysis", "cli", "models", "scoring", "training"},
    "train": {"cli", "config", "data", "evaluate", "generate", "kernels", "models", "training"},
}


def imports_of(path):
    """Dotted names a file imports, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports from the top"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT / "gt_jax").with_suffix("").parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    names = [name.split(".") for name in imports_of(path)]
    assert not {"experiments", "configs"} & {name[0] for name in names}
    part = part_of(path)
    if part == "__init__":
        return
    allowed = ALLOWED[part] | {part} | (set() if part == "kernels" else {"errors"})
    used = {name[1] for name in names if name[0] == "gt_jax" and len(name) > 1}
    assert used <= allowed, f"{part} must not import {used - allowed}"
    if part == "data":
        assert not {"jax", "jaxlib", "flax"} & {name[0] for name in names}


def test_importing_the_package_or_its_data_loads_no_jax():
    code = "import sys, gt_jax, gt_jax.data; assert 'jax' not in sys.modules, 'jax was loaded'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_everything_touches_no_device():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        f"import importlib; [importlib.import_module(name) for name in {names}];"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
