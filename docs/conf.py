"""Sphinx's settings."""

from __future__ import annotations

import agentcluster

project = "agentcluster"
author = "agentcluster developers"
copyright = "2026, agentcluster developers"
release = version = agentcluster.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "dask_sphinx_theme"
html_title = "agentcluster"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False
