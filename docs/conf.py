"""Sphinx's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import agentcluster

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "agentcluster"
author = "agentcluster developers"
copyright = "2026, agentcluster developers"
release = version = agentcluster.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "numpydoc", "sphinx_click"]
exclude_patterns = ["_build"]
html_theme = "dask_sphinx_theme"
html_title = "agentcluster"
smartquotes_action = "qe"  # two hyphens are an option's

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False

#: Type in the JSON schema -> what a user gives; "string or number" are times in this package.
KINDS = {
    ("string", "number"): "time",
    ("string", "null"): "text, or null",
    ("integer",): "whole number",
    ("boolean",): "bool",
    ("array",): "list of text",
}


def configuration() -> str:
    """Return the reference of all options as reStructuredText, from the schema and the defaults."""
    package = Path(agentcluster.__file__).parent
    schema = yaml.safe_load((package / "agentcluster-schema.yaml").read_text())
    defaults = yaml.safe_load((package / "agentcluster.yaml").read_text())
    return "\n".join(_options(schema["properties"], defaults, ""))


def _options(properties: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> Iterator[str]:
    # The options of a level before those of the levels below it.
    for name, entry in sorted(properties.items(), key=lambda item: "properties" in item[1]):
        key = f"{where}{name}"
        if "properties" in entry:
            yield from _options(entry["properties"], defaults[name], f"{key}.")
            continue
        kinds = [entry["type"]] if isinstance(entry["type"], str) else entry["type"]
        given = "null" if defaults[name] is None else defaults[name]
        yield f".. confval:: {key}"
        yield f"   :type: {KINDS[tuple(kinds)]}"
        yield f"   :default: ``{', '.join(given) if isinstance(given, list) else given}``"
        yield "   :no-contents-entry:"
        yield ""
        first, _, rest = entry["description"].strip().partition("\n")
        more = rest.replace("A number is seconds.", "")  # the page says so once
        yield f"   {first}. {' '.join(more.split())}".rstrip()
        yield f"   In the environment: ``DASK_{key.upper().replace('.', '__').replace('-', '_')}``."
        yield ""


def _escaped(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Have the stars of a program's help, as in gpu-*, be stars on the page too."""
    lines[:] = [line.replace("*", r"\*") for line in lines]


def setup(app: Sphinx) -> None:
    """Add the directive ``agentcluster-options``, and what the programs' help needs."""
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    class Options(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            return list(self.parse_text_to_nodes(configuration()))

    app.add_directive("agentcluster-options", Options)
    app.connect("sphinx-click-process-options", _escaped)
