"""Private and undocumented API of dask and of Python: every use is listed, and exists with the parameters used.

The list is ``docs/develop/private-api.rst``. A use is found in the package's syntax trees: a private name of a class
that derives from one of dask, another object's private name, and an import of what distributed does not document.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import agentcluster

PACKAGE = Path(agentcluster.__file__).parent
PAGE = PACKAGE.parent / "docs" / "develop" / "private-api.rst"

ENTRY = re.compile(r"   \* - ``(?P<name>[^`]+)``\n     - (?P<files>.+)\n     - (?P<why>.+)\n")

#: Libraries whose private names count when a class derives from one of theirs.
DASK = ("dask", "distributed")

#: Imports from submodules of distributed that need no entry: its documentation has them.
DOCUMENTED = {
    *("distributed.comm.core:Comm", "distributed.comm.core:CommClosedError", "distributed.comm.core:connect"),
    *("distributed.core:Server", "distributed.core:Status", "distributed.core:rpc"),
    *("distributed.deploy.adaptive:Adaptive", "distributed.deploy.cluster:Cluster"),
    *("distributed.deploy.spec:ProcessInterface", "distributed.deploy.spec:SpecCluster"),
    *("distributed.diagnostics.plugin:SchedulerPlugin", "distributed.diagnostics.plugin:WorkerPlugin"),
    *("distributed.diagnostics.plugin:NannyPlugin", "distributed.scheduler:WorkerState"),
    *("distributed.scheduler:TaskState", "distributed.security:Security"),
}

#: Underscored names that are protocols of others, and private names of Python that its documentation has.
PROTOCOLS = {"_repr_html_", "_repr_mimebundle_", "_ipython_display_", "_exit"}


@dataclass(frozen=True)
class Entry:
    """One line of the list.

    Attributes
    ----------
    name
        Module, a colon, and the name in it, such as ``distributed.nanny:Nanny._unregister``.
    parameters
        Names of the parameters that are used; None for what is not called.
    files
        Modules of the package that use it, such as ``agent/nanny``.
    """

    name: str
    parameters: tuple[str, ...] | None
    files: frozenset[str]

    @property
    def last(self) -> str:
        return re.split(r"[.:]", self.name)[-1]


@dataclass(frozen=True)
class Use:
    """A use that was found: the last part of the name, the file, and the line."""

    last: str
    file: str
    line: int


def entries(text: str) -> list[Entry]:
    found = []
    for match in ENTRY.finditer(text):
        name, bracket, parameters = match["name"].partition("(")
        files = frozenset(re.findall(r"``([^`]+)``", match["files"]))
        used = tuple(re.findall(r"\w+", parameters)) if bracket else None
        found.append(Entry(name, used, files))
    return found


ENTRIES = entries(PAGE.read_text())


@functools.cache
def trees(package: Path) -> dict[str, ast.Module]:
    """Return file, such as ``agent/nanny``, -> syntax tree."""
    paths = {path.relative_to(package).with_suffix("").as_posix(): path for path in sorted(package.rglob("*.py"))}
    return {name.removesuffix("/__init__"): ast.parse(path.read_text()) for name, path in paths.items()}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in PROTOCOLS


# -- the entries exist -------------------------------------------------------------------------------------------------


def owner_and_object(name: str) -> tuple[Any, Any]:
    """Return the class or module that an entry's name is in, and the object; None for an instance attribute."""
    module, _, path = name.partition(":")
    owner, found = None, importlib.import_module(module)
    for part in path.split("."):
        owner, found = found, getattr(found, part, None)
        if found is None and not (inspect.isclass(owner) and part in assigned(owner)) and part not in vars(owner):
            raise AttributeError(f"{name}: {owner!r} has no {part!r}")
    return owner, found


def assigned(cls: type) -> set[str]:
    """Return the attributes that the methods of a class, or of its bases, assign to ``self``."""
    bases = [
        base for base in cls.__mro__ if base.__module__.partition(".")[0] in (*DASK, "dask_cuda", "multiprocessing")
    ]
    return set().union(*map(assigned_in, bases))


@functools.cache
def assigned_in(cls: type) -> frozenset[str]:
    """Return the attributes that the methods of a class assign to ``self``."""
    source = textwrap.dedent(inspect.getsource(cls))
    return frozenset(re.findall(r"\bself\.(\w+)(?:, self\.\w+)*(?:: [^=\n]+)? = ", source))


def problem(entry: Entry) -> str | None:
    """Return why a use cannot work, or None."""
    try:
        _, found = owner_and_object(entry.name)
    except (ImportError, AttributeError) as error:
        return f"{entry.name} (used in {', '.join(sorted(entry.files))}) is gone: {error}"
    if entry.parameters is None:
        return None
    try:
        signature = inspect.signature(found).parameters
    except (TypeError, ValueError) as error:
        return f"{entry.name} (used in {', '.join(sorted(entry.files))}) cannot be called: {error}"
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    missing = [name for name in entry.parameters if name not in signature and not open_ended]
    needed = [
        name
        for name, parameter in signature.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in (*entry.parameters, "self", "cls")
    ]
    if missing or needed:
        where = f"{entry.name} (used in {', '.join(sorted(entry.files))})"
        return f"{where} has other parameters: it lacks {missing}, and needs {needed} as well"
    return None


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_private_api_exists(entry: Entry) -> None:
    if entry.name.startswith("dask_cuda."):
        pytest.importorskip("dask_cuda.cuda_worker", exc_type=Exception)
    assert problem(entry) is None


def test_list_is_not_empty_and_has_no_entry_twice() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) > 20
    assert len(names) == len(set(names)) == PAGE.read_text().count("   * - ``")


# -- the uses are listed -----------------------------------------------------------------------------------------------


def uses(found: Mapping[str, ast.Module], listed: Iterable[Entry]) -> Iterator[Use]:
    """Yield every use of private API."""
    known = {entry.last for entry in listed if is_private(entry.last)}
    modules = {entry.name for entry in listed if "." not in entry.name.partition(":")[2]}
    ours = set().union(*map(defined, found.values()))
    for file, tree in found.items():
        own = defined(tree)
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in DASK:
                    for alias in node.names:
                        full = f"{module}:{alias.name}"
                        undocumented = module.startswith("distributed.") and full not in DOCUMENTED
                        if undocumented or is_private(alias.name) or full in modules:
                            yield Use(alias.name, file, node.lineno)
                case ast.Attribute(attr=name, value=value) if is_private(name):
                    another = owner(value) not in ("self", "cls", "super()")
                    if name not in ours or (another and name in known and name not in own):
                        yield Use(name, file, node.lineno)
                case ast.Call(
                    func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(str(name)), *_]
                ):
                    if is_private(name) and name not in ours:
                        yield Use(name, file, node.lineno)


def inherited_uses(found: Mapping[str, ast.Module]) -> Iterator[Use]:
    """Yield the private names that classes share with their bases in dask."""
    for file, tree in found.items():
        module = importlib.import_module(f"agentcluster.{file.replace('/', '.')}")
        for node in ast.walk(tree):
            cls = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
            if isinstance(node, ast.ClassDef) and isinstance(cls, type):
                theirs = names_of_dask(cls)
                for inner in ast.walk(node):
                    match inner:
                        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name in theirs:
                            yield Use(name, file, inner.lineno)
                        case ast.Attribute(attr=name, value=value) if name in theirs and owner(value) == "self":
                            yield Use(name, file, inner.lineno)
                        case ast.Attribute(attr=name, value=value) if is_private(name) and owner(value) == "super()":
                            if not provided_by_us(cls, name):
                                yield Use(name, file, inner.lineno)


def owner(value: ast.expr) -> str:
    """Return ``self``, ``super()`` or another plain name before an attribute; "" for all else."""
    match value:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id="super")):
            return "super()"
    return ""


@functools.cache
def names_of_dask(cls: type) -> set[str]:
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in DASK]
    return {name for base in bases for name in (*vars(base), *assigned(base)) if is_private(name)}


def provided_by_us(cls: type, name: str) -> bool:
    provider = next((base for base in cls.__mro__[1:] if name in vars(base)), None)
    return provider is not None and provider.__module__.startswith("agentcluster")


@functools.cache
def defined(tree: ast.AST) -> frozenset[str]:
    """Return all names that a module defines: functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
    return frozenset(found)


def unlisted(found: Iterable[Use], listed: Iterable[Entry]) -> list[str]:
    places = {(entry.last, file) for entry in listed for file in entry.files}
    return sorted(
        {
            f"{use.file}.py, line {use.line}: {use.last} is private API and docs/develop/private-api.rst does not list "
            f"it for this file"
            for use in found
            if (use.last, use.file) not in places
        }
    )


def stale(found: Mapping[str, ast.Module], listed: Iterable[Entry]) -> list[str]:
    """Return the entries that name a file that does not use them."""
    words = {file: mentioned(tree) for file, tree in found.items()}
    return sorted(
        f"{file} does not use {entry.name}"
        for entry in listed
        for file in entry.files
        if entry.last not in words.get(file, ())
    )


def mentioned(tree: ast.AST) -> set[str]:
    found = set(defined(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.alias(name=name) | ast.Constant(value=str(name)):
                found.add(name)
            case ast.keyword(arg=str(name)):
                found.add(name)
    return found


def test_every_use_is_listed() -> None:
    found = trees(PACKAGE)
    assert unlisted([*uses(found, ENTRIES), *inherited_uses(found)], ENTRIES) == []


def test_every_entry_is_used() -> None:
    assert stale(trees(PACKAGE), ENTRIES) == []


# -- the test finds ----------------------------------------------------------------------------------------------------

LISTED = [
    Entry("distributed.nanny:Nanny._unregister", (), frozenset({"agent/nanny"})),
    Entry("distributed.core:error_message", ("e", "status"), frozenset({"agent/agent"})),
    Entry("distributed.deploy.spec:SpecCluster._lock", None, frozenset({"client/cluster"})),
]


@pytest.mark.parametrize(
    ("file", "text", "last"),
    [
        ("agent/agent", "nanny._unregister()", "_unregister"),
        ("agent/agent", "scheduler._transition(1)", "_transition"),
        ("agent/agent", "getattr(scheduler, '_transition')", "_transition"),
        ("agent/nanny", "from distributed.core import error_message", "error_message"),
        ("agent/nanny", "from distributed.nanny import WorkerProcess", "WorkerProcess"),
        ("agent/nanny", "def f():\n    from distributed import _version", "_version"),
        ("client/hosts", "def f(cluster): return cluster._lock", "_lock"),
    ],
)
def test_use_is_found(file: str, text: str, last: str) -> None:
    found = {file: ast.parse(text), "client/cluster": ast.parse("class A:\n    def f(self): self._lock = 1")}
    (message,) = unlisted(uses(found, LISTED), LISTED)
    assert message.startswith(f"{file}.py, line ")
    assert f": {last} is private API" in message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("agent/nanny", "nanny._unregister()"),
        ("agent/agent", "from distributed.core import error_message, Status"),
        ("agent/agent", "class A:\n    def _f(self): self._f()"),
        ("agent/agent", "import os; os._exit(1); x.__class__"),
        (
            "client/hosts",
            "class A:\n    def __init__(self): self._lock = 1\n    def f(self, other): return other._lock",
        ),
    ],
)
def test_use_is_listed_or_ours(file: str, text: str) -> None:
    assert unlisted(uses({file: ast.parse(text)}, LISTED), LISTED) == []


def test_use_by_inheritance_is_found() -> None:
    """AgentCluster derives from SpecCluster: without their entries these names are found."""
    found = {use.last for use in inherited_uses({"client/cluster": trees(PACKAGE)["client/cluster"]})}
    assert {"_start", "_close", "_correct_state_internal"} <= found


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("distributed.nanny:Nanny._gone", (), "is gone: .* has no '_gone'"),
        ("distributed.gone:f", (), "is gone: No module named 'distributed.gone'"),
        ("distributed.deploy.spec:SpecCluster._gone", None, "is gone: "),
        ("distributed.core:error_message", ("e", "colour"), r"lacks \['colour'\], and needs \[\]"),
        ("distributed.core:error_message", ("status",), r"lacks \[\], and needs \['e'\]"),
    ],
)
def test_gone_api_is_named(name: str, parameters: tuple[str, ...] | None, message: str) -> None:
    found = problem(Entry(name, parameters, frozenset({"agent/agent"})))
    assert found is not None
    assert re.search(message, found)
    assert found.startswith(f"{name} (used in agent/agent) ")


def test_stale_entry_is_found() -> None:
    found = {"agent/nanny": ast.parse("nanny._unregister()"), "agent/agent": ast.parse("x = 1")}
    assert stale(found, LISTED) == [
        "agent/agent does not use distributed.core:error_message",
        "client/cluster does not use distributed.deploy.spec:SpecCluster._lock",
    ]
