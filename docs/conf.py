"""How Sphinx builds the pages: `sphinx-build -W -b html docs docs/_build`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself, installed or not

import gt_jax

project = "gt_jax"
author = "the gt_jax authors"
copyright = f"2026, {author}"
release = gt_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "gt_jax"
html_static_path = ["_static"]
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # else named tuples describe their fields twice

suppress_warnings = ["myst.xref_missing"]  # pages that are included link relative to their own home


def _code_blocks(app, what, name, obj, options, lines):
    """An indented block after a paragraph of a docstring is code."""
    shown, paragraph = [], ""
    for line in lines:
        indented = line.startswith("    ")
        if indented and shown and not shown[-1] and paragraph and not paragraph.startswith(" "):
            shown += ["::", ""]
        if line:
            paragraph = line
        shown.append(line)
    lines[:] = shown


def setup(app):
    app.connect("autodoc-process-docstring", _code_blocks, priority=400)  # before napoleon
