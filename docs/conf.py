"""How Sphinx builds the pages: `sphinx-build -W -b html docs docs/_build`."""

import importlib.metadata

project = "gt_jax"
author = "the gt_jax authors"
copyright = f"2026, {author}"
try:
    release = importlib.metadata.version("gt_jax")
except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
    release = "unreleased"

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

suppress_warnings = ["myst.xref_missing"]  # pages that are included link relative to their own home
