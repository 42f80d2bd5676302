"""Rules of the house: which room may import which, who alone imports an outside library, and what stays pure.

Every import counts, also one inside a function, one that is only for types, and a string given to ``import_module``.
The exception is ``agentcluster/__init__.py``, which resolves the public names of all rooms lazily.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import agentcluster

#: Room -> the rooms that its modules may import, beside their own; ``top`` stands for the modules outside folders.
MAY_IMPORT: dict[str, set[str]] = {
    "top": set(),
    "modes": {"top"},
    "launch": {"top", "modes"},
    "scheduler": {"top", "modes"},
    "agent": {"top", "modes"},
    "client": {"top", "modes", "launch"},
    "cli": {"top", "modes", "launch", "scheduler", "agent", "client"},
}

#: Imports across rooms that are allowed one by one: (module, imported).
EXCEPTIONS = {("client.cluster", "scheduler.plugin.dask_setup")}

#: Outside library -> the only places that import it.
ONE_IMPORTER = {
    "asyncssh": "launch.ssh",
    "pynvml": "agent.hardware",
    "ipywidgets": "client.widget",
    "bokeh": "scheduler.dashboard",
    "click": "cli",
}

#: Places that are pure: no await, no clock, no dask object.
PURE = ("scheduler.planning", "modes", "model", "requests")
IMPURE_IMPORTS = {"asyncio", "subprocess", "socket", "time", "threading", "distributed"}

#: These call pure functions of distributed, or read the signatures of its classes.
PURE_PART_OF_DISTRIBUTED = ("modes.options", "modes.builtin")


@functools.cache
def package_modules() -> dict[str, ast.Module]:
    """Return the modules of agentcluster; parsed once, for all rules."""
    return modules(Path(agentcluster.__file__).parent)


def modules(package: Path) -> dict[str, ast.Module]:
    """Return dotted name below the package -> syntax tree, for every module but the package's own ``__init__``."""
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in sorted(package.rglob("*.py"))}
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text(), str(path))
        for path, name in names.items()
        if name != "__init__"
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of all that a module imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                yield "a relative import"
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(text)), *_]):
                if name in {"import_module", "__import__", "import_required", "import_term"}:
                    yield text


def room_of(name: str) -> str:
    """Return the room of a module, given by its dotted name below the package."""
    first = name.partition(".")[0]
    return first if first in MAY_IMPORT else "top"


def inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def wrong_rooms(found: dict[str, ast.Module]) -> Iterator[str]:
    for module, tree in found.items():
        for full in imports(tree):
            name = full.removeprefix("agentcluster.")
            if full == "a relative import":
                yield f"{module} has {full}"
            elif inside(full, "agentcluster") and (module, name) not in EXCEPTIONS and name != "__version__":
                other = room_of(name)
                if other != room_of(module) and other not in MAY_IMPORT[room_of(module)]:
                    yield f"{module} imports {name}"


def wrong_importers(found: dict[str, ast.Module]) -> Iterator[str]:
    for module, tree in found.items():
        for full in imports(tree):
            for library, place in ONE_IMPORTER.items():
                if inside(full, library) and not inside(module, place):
                    yield f"{module} imports {library}"


def impure(found: dict[str, ast.Module]) -> Iterator[str]:
    for module, tree in found.items():
        if not any(inside(module, place) for place in PURE):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncWith | ast.AsyncFor):
                yield f"{module} awaits, line {node.lineno}"
        for root in sorted({full.partition(".")[0] for full in imports(tree)} & IMPURE_IMPORTS):
            if not (root == "distributed" and module in PURE_PART_OF_DISTRIBUTED):
                yield f"{module} imports {root}"


def undocumented(found: dict[str, ast.Module]) -> Iterator[str]:
    yield from (f"{module} has no docstring" for module, tree in found.items() if not ast.get_docstring(tree))


def printing(found: dict[str, ast.Module]) -> Iterator[str]:
    for module, tree in found.items():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="print")) if room_of(module) != "cli":
                    yield f"{module} prints, line {node.lineno}"


RULES: list[Callable[[dict[str, ast.Module]], Iterator[str]]] = [
    wrong_rooms,
    wrong_importers,
    impure,
    undocumented,
    printing,
]


@pytest.mark.parametrize("rule", RULES)
def test_package_follows_rule(rule: Callable[[dict[str, ast.Module]], Iterator[str]]) -> None:
    assert list(rule(package_modules())) == []


def test_no_folder_is_large() -> None:
    package = Path(agentcluster.__file__).parent
    folders = {path.parent for path in package.rglob("*.py")}
    sizes = {str(f.relative_to(package)): len([p for p in f.glob("*.py") if p.name != "__init__.py"]) for f in folders}
    assert {folder: size for folder, size in sizes.items() if size > 11} == {}


@pytest.mark.parametrize(
    ("rule", "where", "text", "said"),
    [
        (wrong_rooms, "model.py", "import agentcluster.modes", "model imports modes"),
        (
            wrong_rooms,
            "launch/ssh.py",
            "from agentcluster.client.cluster import X",
            "launch.ssh imports client.cluster.X",
        ),
        (
            wrong_rooms,
            "agent/agent.py",
            "def f():\n    from agentcluster.scheduler import swap",
            "agent.agent imports scheduler.swap",
        ),
        (
            wrong_rooms,
            "scheduler/plugin.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from agentcluster.client.cluster import X",
            "scheduler.plugin imports client.cluster.X",
        ),
        (
            wrong_rooms,
            "client/scaling.py",
            "import importlib\nimportlib.import_module('agentcluster.agent.agent')",
            "client.scaling imports agent.agent",
        ),
        (wrong_rooms, "client/scaling.py", "from agentcluster.cli import main", "client.scaling imports cli.main"),
        (
            wrong_rooms,
            "client/hosts.py",
            "from agentcluster.scheduler.plugin import dask_setup",
            "client.hosts imports scheduler.plugin.dask_setup",
        ),
        (wrong_rooms, "modes/spec.py", "from . import options", "modes.spec has a relative import"),
        (wrong_importers, "launch/local.py", "from asyncssh.misc import Error", "launch.local imports asyncssh"),
        (wrong_importers, "agent/agent.py", "def f():\n    import pynvml", "agent.agent imports pynvml"),
        (wrong_importers, "client/display.py", "import ipywidgets as w", "client.display imports ipywidgets"),
        (impure, "scheduler/planning/wave.py", "async def f(): pass", "scheduler.planning.wave awaits, line 1"),
        (impure, "requests.py", "from time import monotonic", "requests imports time"),
        (
            impure,
            "scheduler/planning/nodes.py",
            "from distributed import Scheduler",
            "scheduler.planning.nodes imports distributed",
        ),
        (undocumented, "agent/agent.py", "x = 1", "agent.agent has no docstring"),
        (printing, "agent/agent.py", "def f():\n    print(1)", "agent.agent prints, line 2"),
    ],
)
def test_rule_finds(tmp_path: Path, rule: Callable[..., Iterator[str]], where: str, text: str, said: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert list(rule(modules(tmp_path))) == [said]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("cli/main.py", '"""Print."""\nfrom agentcluster import __version__\nprint(__version__)'),
        ("launch/__init__.py", '"""Import of its own room."""\nfrom agentcluster.launch.ssh import SSHLauncher'),
        ("launch/ssh.py", '"""Import of the top."""\nimport asyncssh\nfrom agentcluster.errors import LaunchError'),
        ("client/widget/tabs.py", '"""Import of widgets."""\nimport ipywidgets'),
        ("client/cluster.py", '"""The exception."""\nfrom agentcluster.scheduler.plugin import dask_setup'),
        ("scheduler/plugin.py", '"""Await."""\nimport asyncio\nasync def f(): await asyncio.sleep(0)'),
    ],
)
def test_no_rule_minds(tmp_path: Path, where: str, text: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert [said for rule in RULES for said in rule(modules(tmp_path))] == []
