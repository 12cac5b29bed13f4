"""Imports point one way: kernels <- models <- checkpoint <- training, generation, ... <- programs.

What runs or measures a trained model (generate, serve, harness, ...) imports no training.
"""

import ast
import graphlib
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
    "launch": set(),
    "code_files": set(),
    "kept_programs": {"code_files", "launch"},
    "kernels": set(),
    "kernel_programs": set(),
    "compilation": {"kept_programs", "kernel_programs", "kernels"},
    "data": set(),
    "finite": set(),
    "settings": set(),
    "starting": set(),
    "suggestions": set(),
    "terminal": set(),
    "models": {"kernels", "settings", "terminal"},
    "thresholds": set(),
    "config_hybrid": {"settings"},
    "config_model": {"models", "settings"},
    "config_groups": {"config_hybrid", "settings", "thresholds"},
    "config": {"config_groups", "config_hybrid", "config_model", "settings", "suggestions"},
    "config_files": {"config"},
    "cli": {"compilation", "config", "config_files", "starting", "suggestions"},
    "__main__": {"starting"},
    "stored": {"config", "data", "models"},
    "checkpoint": {"data", "finite", "models", "stored"},
    "scoring": {"data", "finite", "models"},
    "training": {
        "analysis",
        "checkpoint",
        "compilation",
        "config",
        "data",
        "finite",
        "kept_programs",
        "kernels",
        "models",
        "scoring",
        "stored",
        "terminal",
        "thresholds",
    },
    "analysis": {"models"},
    "convert": {
        "archives",
        "checkpoint",
        "cli",
        "config_groups",
        "data",
        "finite",
        "models",
        "stored",
    },
    "generation": {"archives", "compilation", "data", "finite", "models"},
    "generate": {"checkpoint", "cli", "generation"},
    "server": {"data", "generation", "models"},
    "serve": {"checkpoint", "cli", "generation", "server"},
    "evaluate": {
        "checkpoint",
        "cli",
        "compilation",
        "data",
        "finite",
        "scoring",
        "stored",
        "training",
    },
    "harness": {"checkpoint", "cli", "data", "scoring"},
    "prepare": {"cli", "data"},
    "corpus": {"cli", "data"},
    "canaries": {"checkpoint", "cli", "data", "models", "scoring"},
    "inspect": {"analysis", "checkpoint", "cli", "data", "models", "scoring"},
    "train": {
        "cli",
        "code_files",
        "compilation",
        "config",
        "data",
        "generation",
        "kept_programs",
        "scoring",
        "training",
    },
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


def ours(path):
    """What a file imports of gt_jax besides its own part: {"models", ...}."""
    names = [name.split(".") for name in imports_of(path)]
    used = {name[1] for name in names if name[0] == "gt_jax" and len(name) > 1}
    return used - {part_of(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    outermost = {name.split(".")[0] for name in imports_of(path)}
    assert not {"experiments", "configs"} & outermost
    part = part_of(path)
    if part == "__init__":
        return
    allowed = ALLOWED[part] | (set() if part == "kernels" else {"errors"})
    assert ours(path) <= allowed, f"{part} must not import {ours(path) - allowed}"
    if part == "data":
        assert not {"jax", "jaxlib", "flax"} & outermost


def test_every_right_to_import_is_used():
    for part, allowed in ALLOWED.items():
        used = set().union(*(ours(path) for path in SOURCES if part_of(path) == part))
        assert allowed <= used, f"{part} imports no {allowed - used}: take it off the list"


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_goes_in_a_circle_not_even_inside_functions():
    modules = {module_of(path) for path in SOURCES}
    wanted = {}  # module -> modules that it imports
    for path in SOURCES:
        # Of `from MODULE import NAME`, NAME may be a module too.
        names = {n if n in modules else n.rpartition(".")[0] for n in imports_of(path)}
        wanted[module_of(path)] = names & modules - {module_of(path)}
    assert "gt_jax.kernels.dispatch" in wanted["gt_jax.kernels"]
    graphlib.TopologicalSorter(wanted).prepare()  # CycleError names a circle


def test_importing_the_package_or_its_data_loads_no_jax():
    code = "import sys, gt_jax, gt_jax.data; assert 'jax' not in sys.modules, 'jax was loaded'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_everything_touches_no_device():
    # What an exported model runs is written for PyTorch, which need not be here.
    imported = [p for p in SOURCES if "pytorch" not in p.parts]
    names = [module_of(p) for p in imported if p.stem != "__main__"]
    code = (
        f"import importlib; [importlib.import_module(name) for name in {names}];"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_the_training_program_loads_nothing_that_is_needed_later_or_never():
    heavy = {"matplotlib", "tensorboardX", "torch", "sentencepiece", "tensorflow", "pandas"}
    heavy |= {"tensorflow_datasets", "transformers", "tokenizers", "safetensors", "wandb"}
    code = f"import sys, gt_jax.train; assert not (found := {heavy} & set(sys.modules)), found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
