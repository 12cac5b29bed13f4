"""What keeps the code readable: lengths of files and functions, and the words of the glossary."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for top in ("gt_jax", "experiments", "configs", "tests", ".ci", "docs")
                 for path in (ROOT / top).rglob("*.py"))  # fmt: skip
TEXTS = [ROOT / "README.md", *SOURCES]
TEXTS += [path for top in ("gt_jax", "experiments", "docs") for path in (ROOT / top).rglob("*")
          if path.suffix in (".md", ".html", ".css", ".ipynb", ".json")]  # fmt: skip

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 350, 120, 200


def avoided() -> re.Pattern:
    """The last column of CONTRIBUTING.md's glossary, in every form and inside of names."""
    glossary = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("| never |\n")[1]
    rows = [line for line in glossary.split("\n\n")[0].splitlines() if line.startswith("| ")]
    words = {word.strip() for row in rows for word in row.split("|")[3].split(",")} - {""}
    assert len(words) > 10
    forms = "|".join(re.escape(word).replace(r"\ ", r"[\s_]+") for word in sorted(words))
    return re.compile(rf"(?<![A-Za-z])({forms})(?:e?s|e?d)?(?![A-Za-z])", re.IGNORECASE)


AVOIDED = avoided()
NAMES_OF_OTHERS = ("id_to_piece", "sentence_piece")  # of SentencePiece


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
    text = path.read_text("utf-8")
    for name in NAMES_OF_OTHERS:
        text = text.replace(name, "")
    found = [match[0] for match in AVOIDED.finditer(text)]
    assert not found, f"{path.name} says {found}; CONTRIBUTING.md has the word"
