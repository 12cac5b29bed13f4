"""What keeps the code readable: lengths of files and functions, and the words of the glossary."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("gt_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")])
TEXTS = [*SOURCES, *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.py"), ROOT / "README.md"]
TEXTS += [ROOT / "experiments" / "README.md", ROOT / "gt_jax" / "kernels" / "README.md"]

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 350, 120, 200

# CONTRIBUTING.md, "Words", says what to write instead.
AVOIDED = re.compile(
    r"\b(mends?|mended|goes on|go on from|went on|rungs?|lent|of whose|quickly_done|anatomy"
    r"|work_off|in_bursts)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short_enough_to_read(path):
    text = path.read_text("utf-8")
    lines = len(text.splitlines())
    assert lines <= FILE_LINES, f"{lines} lines: is this one thing, or two?"
    limit = KERNEL_LINES if "kernels" in path.parts else FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_words_are_those_of_the_glossary(path):
    found = AVOIDED.findall(path.read_text("utf-8"))
    assert not found, f"{path.name} says {found}; CONTRIBUTING.md has the word"
