"""The house: which module may import which, who alone touches the outside world, and how large a module may be.

Every import counts, also one inside a function, one that is only for types, and a string given to ``import_module``:
each is something the module must know of. The exception is ``agentcluster/__init__.py``, which hands out names of all
layers when they are asked for; so nothing inside may import from it, but for the version.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import agentcluster

ROOT = "agentcluster"

#: A module, or a package with all that is in it -> its layer. Imports go down; inside one package they are free.
LAYERS = {
    "errors": 1,
    "model": 2,
    "modes": 3,
    "rollout": 3,
    "allocate": 3,
    "registry": 3,
    "report": 3,
    "landing": 1,
    "given": 2,
    "markup": 2,
    "placement": 3,
    "prefork": 4,
    "progress": 4,
    "rollout_control": 4,
    "logs": 3,
    "shipping": 4,
    "config": 4,
    "hardware": 4,
    "forkserver": 4,
    "evacuation": 4,
    "proposal": 4,
    "answers": 4,
    "needs": 4,
    "fitting": 5,
    "calling_up": 6,
    "reserve": 4,
    "arriving": 5,
    "decisions": 4,
    "tally": 3,
    "timeline": 3,
    "metrics": 5,
    "hearing": 8,
    "demand": 7,
    "scaling": 4,
    "counts": 4,
    "tracked": 4,
    "placeholder": 4,
    "worker_like": 4,
    "notify": 4,
    "orders": 6,
    "credentials": 4,
    "addresses": 4,
    "widget": 5,
    "launch": 4,
    "supervisor": 5,
    "entries": 5,
    "swap": 5,
    "rolling": 6,
    "preflight": 7,
    "changes": 8,
    "plugin": 9,
    "dashboard": 7,
    "membership": 10,
    "adaptive": 9,
    "alone": 11,
    "elasticity": 10,
    "display": 10,
    "operations": 11,
    "agent": 12,
    "cluster": 12,
    "cli": 13,
}

#: What has few importers -> those modules, without the package's name.
IMPORTERS = {
    "asyncssh": {"launch.ssh"},
    "pynvml": {"hardware"},
    "ipywidgets": {"widget", "widget.part", "widget.change", "widget.scaling", "widget.logs"},
    "distributed.nanny": {"supervisor", "modes.classes"},
    "distributed.Nanny": {"supervisor", "modes.classes"},
}

LONGEST = 400


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, str(self.path))

    @property
    def unit(self) -> str:
        """The name in `LAYERS`: the first part below the package."""
        return self.name.partition(".")[0]

    @cached_property
    def imports(self) -> frozenset[str]:
        """Full names of all that is imported, as module and as module with the name taken from it."""
        return frozenset(name for node in ast.walk(self.tree) for name in self._imported(node))

    def _imported(self, node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                origin = self._origin(node)
                yield origin
                yield from (f"{origin}.{alias.name}" for alias in node.names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(text)), *_]):
                if name in {"import_module", "__import__", "import_required", "import_term"}:
                    yield text
            case ast.Attribute(value=ast.Name(id="distributed"), attr=name):
                yield f"distributed.{name}"

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = (
            [ROOT, *self.name.split(".")] if self.path.name == "__init__.py" else [ROOT, *self.name.split(".")[:-1]]
        )
        base = package[: len(package) - node.level + 1]
        return ".".join([*base, *([node.module] if node.module else [])])


def modules(package: Path) -> list[Module]:
    """Return the package's modules but its ``__init__``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found.append(Module(name, path))
    return found


def wrong_layers(found: list[Module]) -> Iterator[str]:
    for module in found:
        if module.unit not in LAYERS:
            yield f"{module.name} is in no layer"
            continue
        units = {name.split(".")[1] for name in module.imports if name.startswith(f"{ROOT}.")} - {"__version__"}
        for unit in sorted(units - {module.unit}):
            if unit not in LAYERS:
                yield f"{module.name} imports {unit} from the package itself"
            elif LAYERS[unit] >= LAYERS[module.unit]:
                yield f"{module.name} ({LAYERS[module.unit]}) imports {unit} ({LAYERS[unit]})"


def wrong_importers(found: list[Module]) -> Iterator[str]:
    for module in found:
        for name, allowed in IMPORTERS.items():
            if module.name not in allowed and any(i == name or i.startswith(f"{name}.") for i in module.imports):
                yield f"{module.name} imports {name}"


def impure(found: list[Module]) -> Iterator[str]:
    for module in found:
        if LAYERS.get(module.unit, 9) <= 3:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.AsyncFunctionDef | ast.Await):
                    yield f"{module.name} awaits, line {node.lineno}"
                    break
            for name in sorted({"asyncio", "subprocess", "socket", "time"} & module.imports):
                yield f"{module.name} imports {name}"


def undocumented(found: list[Module]) -> Iterator[str]:
    yield from (f"{module.name} has no docstring" for module in found if not ast.get_docstring(module.tree))


def too_long(found: list[Module]) -> Iterator[str]:
    for module in found:
        if (lines := len(module.source.splitlines())) > LONGEST:
            yield f"{module.name} has {lines} lines"


def printing(found: list[Module]) -> Iterator[str]:
    for module in found:
        if module.unit != "cli":
            for node in ast.walk(module.tree):
                match node:
                    case ast.Call(func=ast.Name(id="print")):
                        yield f"{module.name} prints, line {node.lineno}"


RULES: list[Callable[[list[Module]], Iterator[str]]] = [
    wrong_layers,
    wrong_importers,
    impure,
    undocumented,
    too_long,
    printing,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_holds(rule: Callable[[list[Module]], Iterator[str]]) -> None:
    assert list(rule(modules(Path(agentcluster.__file__).parent))) == []


@pytest.mark.parametrize(
    ("rule", "where", "text", "said"),
    [
        (wrong_layers, "model.py", "import agentcluster.modes", "model (2) imports modes (3)"),
        (wrong_layers, "registry.py", "from agentcluster import rollout", "registry (3) imports rollout (3)"),
        (wrong_layers, "config.py", "from . import launch", "config (4) imports launch (4)"),
        (wrong_layers, "launch/ssh.py", "from ..cluster import AgentCluster", "launch.ssh (4) imports cluster (12)"),
        (wrong_layers, "launch/__init__.py", "from .. import config", "launch (4) imports config (4)"),
        (wrong_layers, "plugin.py", "def f():\n    import agentcluster.agent as a", "plugin (9) imports agent (12)"),
        (
            wrong_layers,
            "agent.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from agentcluster.cluster import AgentCluster",
            "agent (12) imports cluster (12)",
        ),
        (
            wrong_layers,
            "errors.py",
            "import importlib\nimportlib.import_module('agentcluster.model')",
            "errors (1) imports model (2)",
        ),
        (
            wrong_layers,
            "cli/agent.py",
            "from agentcluster import AgentCluster",
            "cli.agent imports AgentCluster from the package itself",
        ),
        (wrong_layers, "extra.py", "", "extra is in no layer"),
        (wrong_importers, "launch/local.py", "from asyncssh.misc import Error", "launch.local imports asyncssh"),
        (wrong_importers, "agent.py", "import distributed\ndistributed.Nanny", "agent imports distributed.Nanny"),
        (wrong_importers, "agent.py", "from distributed import Nanny", "agent imports distributed.Nanny"),
        (wrong_importers, "agent.py", "import distributed.nanny as n", "agent imports distributed.nanny"),
        (wrong_importers, "agent.py", "def f():\n    import pynvml", "agent imports pynvml"),
        (impure, "rollout.py", "async def f(): pass", "rollout awaits, line 1"),
        (impure, "registry.py", "from time import monotonic", "registry imports time"),
        (undocumented, "agent.py", "x = 1", "agent has no docstring"),
        (too_long, "agent.py", "x = 1\n" * (LONGEST + 1), f"agent has {LONGEST + 1} lines"),
        (printing, "agent.py", "def f():\n    print(1)", "agent prints, line 2"),
    ],
)
def test_a_rule_finds(tmp_path: Path, rule: Callable[..., Iterator[str]], where: str, text: str, said: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert list(rule(modules(tmp_path))) == [said]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("cli/agent.py", '"""Prints."""\nfrom agentcluster import __version__\nprint(__version__)'),
        ("launch/__init__.py", '"""Finds one of its own."""\nfrom agentcluster.launch.ssh import SSHLauncher'),
        ("launch/ssh.py", '"""Goes down."""\nimport asyncssh\nfrom agentcluster.errors import LaunchError'),
        ("modes/classes.py", '"""Reads a signature."""\nfrom distributed import Nanny'),
        ("plugin.py", '"""Awaits."""\nimport asyncio\nasync def f(): await asyncio.sleep(0)'),
    ],
)
def test_no_rule_minds(tmp_path: Path, where: str, text: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert [said for rule in RULES for said in rule(modules(tmp_path))] == []
