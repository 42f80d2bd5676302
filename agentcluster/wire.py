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
from typing import Any, Literal, NewType, TypeVar

import cloudpickle

import agentcluster
from agentcluster.errors import ConfigError, VersionMismatch, suggest

#: Version of all that two processes of agentcluster send each other; both must have the same.
PROTOCOL = 1

PICKLED = "__cloudpickle__"

#: Name of the plugin, and of its entry in ``Scheduler.extensions``.
PLUGIN = "agentcluster"

#: Topic of the scheduler's events about rollouts and adaptive decisions.
TOPIC = "agentcluster"

#: Message to an agent whose last worker was retired otherwise than by a change of its node's plan.
RETIRED = "retired"

NO_PLUGIN = (
    "it does not take the agentcluster plugin that was sent to it: install agentcluster where the scheduler runs "
    "(pip install agentcluster, same version), or start it with: dask scheduler --preload agentcluster"
)

T = TypeVar("T")

#: What is plain data as it is.
SCALARS = (str, int, float, bool, type(None))


def pickled(value: Any) -> dict[str, str]:
    """Wrap a value that is not plain data, so that it can travel as text to the agent that needs it."""
    return {PICKLED: base64.b85encode(cloudpickle.dumps(value)).decode()}


def unpickled(value: Any) -> Any:
    """Undo :func:`pickled` in a value, at any depth; only an agent does this, on data of its own scheduler."""
    if isinstance(value, Mapping):
        if set(value) == {PICKLED}:
            return cloudpickle.loads(base64.b85decode(value[PICKLED]))
        return {k: unpickled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [unpickled(v) for v in value]
    return value


def plain(value: Any) -> Any:
    """Return `value` as JSON-able data; what is not plain is :func:`pickled`.

    A mapping's keys become text, a tuple a list.
    """
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return pickled(value)


def to_wire(value: Any) -> Any:
    """Return a dataclass (or a container of them) as plain dicts and lists."""
    if isinstance(value, SCALARS):  # most of what a node says, and 200 of them may be looked at twice a second
        return value
    cls: Any = type(value)
    if names := _fields(cls):
        return {name: to_wire(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(k): to_wire(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(v) for v in value]
    return plain(value)


@functools.cache
def _fields(cls: Any) -> tuple[str, ...]:
    """Return the names of a dataclass's fields; of any other class, nothing."""
    return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_wire(cls: type[T], data: Any, where: str = "") -> T:
    """Parse plain data into the dataclass `cls`.

    Parameters
    ----------
    cls
        One of this module's dataclasses.
    data
        A mapping of its fields.
    where
        The place the data came from, for the message.

    Raises
    ------
    ConfigError
        When `data` is no mapping, has a key that `cls` does not have, lacks one that it needs, or a value has the
        wrong type.
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


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint of one of the dataclasses above and convert what the wire flattened."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return plain(value)  # dask's wire makes lists tuples, which would differ from what was sent
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


def _parse_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
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


def spoken() -> dict[str, Any]:
    """Return this process's versions, to be sent with its first message to another.

    Returns
    -------
    dict
        The protocol's version, and the version of agentcluster.
    """
    return {"protocol": PROTOCOL, "version": agentcluster.__version__}


def check_protocol(peer: str, protocol: object, version: object = None, *, here: str) -> None:
    """Refuse a peer that speaks another version of the protocol.

    Parameters
    ----------
    peer, here
        The two processes, such as ``"the agent on gpu-1"``.
    protocol, version
        Versions of the protocol and of agentcluster that the peer sent; None where it sent none.

    Raises
    ------
    VersionMismatch
        Names both versions, and which process to upgrade.
    """
    if protocol == PROTOCOL and not isinstance(protocol, bool):
        return
    there = f"agentcluster {version}" if isinstance(version, str) else "another version of agentcluster"
    older = here if isinstance(protocol, int) and protocol > PROTOCOL else peer
    raise VersionMismatch(
        f"{peer} has {there} with protocol {str(protocol)[:40]}, {here} has agentcluster {agentcluster.__version__} "
        f"with protocol {PROTOCOL}; upgrade agentcluster where {older} runs (pip install --upgrade agentcluster)"
    )
