"""How Sphinx builds the pages: `sphinx-build -W -b html docs docs/_build`."""

import re
import sys
from pathlib import Path

from docutils import nodes

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


def _field_docstrings(app, what, name, obj, options, lines):
    """What a property or a field is, as it stands: napoleon takes words before a colon for a type.

    Named tuples describe their fields in the class; Python's own words for them say nothing.
    """
    if what in ("attribute", "data", "property"):
        lines[:] = [] if lines[:1] and lines[0].startswith("Alias for field") else ["", *lines]


def _signature(app, what, name, obj, options, signature, returns):
    """Flax gives every module two more fields, which are no setting of ours."""
    return signature and re.sub(r", parent[:=].*(?=\))", "", signature), returns


# Where a line must not end: in 1 024, 20 %, 5 ms and 1e-3.
_SPACE_IN_NUMBER = re.compile(r"(?<=\d) (?=\d{3}\b|%|[kMG]?i?B\b|[mµ]?s\b)")

_HYPHEN_IN_NUMBER = re.compile(r"(?<=\de)-(?=\d)")


def _text(app, doctree):
    """Numbers stay on one line, and RUN@last is no mail address."""
    for link in list(doctree.findall(nodes.reference)):
        if link.get("refuri", "").startswith("mailto:"):
            link.replace_self(link.children)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.literal | nodes.literal_block):
            whole = _HYPHEN_IN_NUMBER.sub("\u2011", _SPACE_IN_NUMBER.sub("\u00a0", text))
            text.parent.replace(text, nodes.Text(whole))


def setup(app):
    app.connect("autodoc-process-docstring", _code_blocks, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _field_docstrings, priority=400)
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _text)
