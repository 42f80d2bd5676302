"""Protocol between processes: plain data on the wire, pickled values, RPC errors and shared constants.

Values of :mod:`agentcluster.model` travel as plain dicts (msgpack between dask processes, JSON on an agent's stdin):
:func:`to_wire` writes them; :func:`from_wire` parses them once, at the border, and refuses unknown keys by name.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NewType, TypeAlias, TypeVar

import cloudpickle

from agentcluster import __version__
from agentcluster.errors import ConfigError, VersionMismatch, suggest

#: Version of the protocol between two processes of agentcluster; both must have the same.
PROTOCOL = 1

PICKLED = "__cloudpickle__"

#: Name of the plugin, and of its entry in ``Scheduler.extensions``.
PLUGIN = "agentcluster"

#: Topic of the scheduler's events about rollouts and adaptive decisions.
TOPIC = "agentcluster"

#: Message to an agent whose last worker was retired, but not by a change of its node's plan.
RETIRED = "retired"

NO_PLUGIN = (
    "it refused the agentcluster plugin that was sent to it: install agentcluster where the scheduler runs "
    "(pip install agentcluster, same version), or start it with: dask scheduler --preload agentcluster"
)

T = TypeVar("T")

#: Plain data: None, a bool, a number, text, or a list or a mapping by text of plain data.
Plain: TypeAlias = Any

#: Types of plain data that contain no other.
SCALARS = (str, int, float, bool, type(None))


def pickled(value: object) -> dict[str, str]:
    """Wrap a value that is not plain data as text, for the agent that needs it.

    Parameters
    ----------
    value
        Any value that cloudpickle can pickle.

    Returns
    -------
    dict
        Plain data, for :func:`unpickled`.
    """
    return {PICKLED: base64.b85encode(cloudpickle.dumps(value)).decode()}


def unpickled(value: object) -> Plain:
    """Restore the values that :func:`pickled` wrapped; called only by an agent, on data of its own scheduler.

    Parameters
    ----------
    value
        Plain data, with wrapped values at any depth.

    Returns
    -------
    Plain
        The data with the values restored.
    """
    if isinstance(value, Mapping):
        if set(value) == {PICKLED}:
            return cloudpickle.loads(base64.b85decode(value[PICKLED]))
        return {k: unpickled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [unpickled(v) for v in value]
    return value


def plain(value: object) -> Plain:
    """Convert a value to plain data.

    Parameters
    ----------
    value
        Any value.

    Returns
    -------
    Plain
        The data: keys of mappings are text, tuples are lists, and other values are :func:`pickled`.
    """
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return pickled(value)


def to_wire(value: object) -> Plain:
    """Convert a dataclass, or a container of them, to plain data.

    Parameters
    ----------
    value
        The dataclass; its fields are dataclasses, containers, or values for :func:`plain`.

    Returns
    -------
    Plain
        The data, for :func:`from_wire`.
    """
    if isinstance(value, SCALARS):  # most values of a node, and 200 nodes can be read twice a second
        return value
    cls: Hint = type(value)
    if names := _fields(cls):
        return {name: to_wire(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(k): to_wire(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(v) for v in value]
    return plain(value)


#: Resolved type hint, of which only :mod:`typing` knows the parts.
Hint: TypeAlias = Any


@functools.cache
def _fields(cls: Hint) -> tuple[str, ...]:
    """Return the names of a dataclass's fields; none for another class."""
    return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


@functools.cache
def _hints(cls: type) -> dict[str, Hint]:
    """Return the type hints of a class, resolved."""
    return typing.get_type_hints(cls)


def from_wire(cls: type[T], data: object, where: str = "") -> T:
    """Parse plain data into the dataclass `cls`.

    Parameters
    ----------
    cls
        The dataclass; its type hints are those of :mod:`agentcluster.model`.
    data
        A mapping of its fields.
    where
        Source of the data, for messages.

    Returns
    -------
    T
        The dataclass.

    Raises
    ------
    ConfigError
        When `data` is not a mapping, has an unknown key, lacks a required one, or has a value of a wrong type.
    """
    place = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: expected a mapping of {cls.__name__}'s fields, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"{place}: unknown key {key!r}; {suggest(str(key), fields)}", key=str(key))
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {key: _parse(hints[key], value, f"{place}.{key}") for key, value in data.items()}
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{place}: {missing[0]!r} is missing", key=missing[0])
    return cls(**values)


def _parse(hint: Hint, value: object, where: str) -> Plain:
    """Check a value against a type hint, and convert it to that type."""
    origin: object = typing.get_origin(hint)
    args = typing.get_args(hint)
    if hint is Any:
        return plain(value)  # dask's protocol turns lists into tuples
    if isinstance(hint, NewType):
        return _parse(hint.__supertype__, value, where)
    if origin in (types.UnionType, typing.Union):
        return _parse_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not allowed; {suggest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_parse(args[0], v, where) for v in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_wire(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _parse_union(choices: tuple[Hint, ...], value: object, where: str) -> Plain:
    """Parse a value as the first type that it has."""
    if value is None and type(None) in choices:
        return None
    problem: ConfigError | None = None
    for choice in choices:
        if choice is not type(None):
            try:
                return _parse(choice, value, where)
            except ConfigError as error:
                problem = error
    assert problem is not None
    raise problem


def spoken() -> dict[str, int | str]:
    """Return the versions of this process, which its first message to another process has.

    Returns
    -------
    dict
        ``protocol`` and ``version``: the versions of the protocol and of agentcluster.
    """
    return {"protocol": PROTOCOL, "version": __version__}


def check_protocol(peer: str, protocol: object, version: object = None, *, here: str) -> None:
    """Check that a peer has the same version of the protocol.

    Parameters
    ----------
    peer, here
        Names of the two processes, such as ``"the agent on gpu-1"``.
    protocol, version
        Versions of the protocol and of agentcluster that the peer sent; None when it sent none.

    Raises
    ------
    VersionMismatch
        When the versions differ; the message has both, and the process to upgrade.
    """
    if protocol == PROTOCOL and not isinstance(protocol, bool):
        return
    there = f"agentcluster {version}" if isinstance(version, str) else "another version of agentcluster"
    older = here if isinstance(protocol, int) and protocol > PROTOCOL else peer
    raise VersionMismatch(
        f"{peer} has {there} with protocol {str(protocol)[:40]}, {here} has agentcluster {__version__} "
        f"with protocol {PROTOCOL}; upgrade agentcluster where {older} runs (pip install --upgrade agentcluster)"
    )
