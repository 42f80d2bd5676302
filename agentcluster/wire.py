"""Protocol between processes: plain data on the wire, pickled values, RPC errors, constants, limits on unknown peers.

Values of :mod:`agentcluster.model` travel as plain dicts (msgpack between dask processes, JSON on an agent's stdin):
:func:`to_wire` writes them; :func:`from_wire` parses them once, at the border, and refuses unknown keys by name.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import inspect
import socket
import time
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import cloudpickle

from agentcluster import __version__
from agentcluster.errors import AgentClusterError, ConfigError, VersionMismatch, suggest

if TYPE_CHECKING:
    from distributed import Worker
    from distributed.comm.core import Comm, Listener
    from tornado.iostream import IOStream

#: Version of the protocol between two processes of agentcluster; both must have the same.
PROTOCOL = 1

PICKLED = "__cloudpickle__"

#: Name of the plugin, and of its entry in ``Scheduler.extensions``.
PLUGIN = "agentcluster"

#: Topic of the scheduler's events about rollouts and adaptive decisions.
TOPIC = "agentcluster"

#: Message to an agent whose last worker was retired, but not by a change of its node's plan.
RETIRED = "retired"

#: Operation of the message with which a worker names results that cannot be sent.
UNSENDABLE = "agentcluster-unsendable"

NO_PLUGIN = (
    "it refused the agentcluster plugin that was sent to it: install agentcluster where the scheduler runs "
    "(pip install agentcluster, same version), or start it with: dask scheduler --preload agentcluster"
)

T = TypeVar("T")
ErrorT = TypeVar("ErrorT", bound=AgentClusterError)

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
    """Restore the values that :func:`pickled` wrapped; called only on data of one's own scheduler.

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


def with_cause(error: ErrorT) -> ErrorT:
    """Make the exception that a worker's own code raised the cause of an error; called where a user gets the error.

    Parameters
    ----------
    error
        An error that the scheduler answered with.

    Returns
    -------
    AgentClusterError
        The same error; as it was where no worker raised anything, or nothing that can be imported here.
    """
    raised: Mapping[str, object] = getattr(error, "raised", {})
    for each in raised.values():
        with contextlib.suppress(Exception):  # whatever unpickling it raises
            cause = unpickled(each)
            if isinstance(cause, BaseException):
                error.__cause__ = cause.with_traceback(None)  # frames of a worker's process, with dask's alone
                break
    return error


def tell_unsendable(keys: Sequence[Any], *, dask_worker: Worker) -> None:
    """Tell the scheduler which of a worker's results cannot be sent to another; runs in the worker.

    Parameters
    ----------
    keys
        Keys of results.
    dask_worker
        The worker; dask passes it.
    """
    from distributed.protocol.serialize import serialize

    data = getattr(dask_worker.data, "memory", dask_worker.data)  # what is on disk was serialized before
    found = []
    for key in keys:
        try:
            serialize(data[key], on_error="raise")
        except KeyError:
            pass
        except Exception:  # of whatever the result's class does
            found.append(key)
    dask_worker.batched_send({"op": UNSENDABLE, "keys": found})


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


def is_unicode(text: str) -> bool:
    """Return whether a text can be sent; one of bytes that are not UTF-8, such as the name of a file, cannot.

    Parameters
    ----------
    text
        The text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        raise ConfigError(f"{place}: expected a mapping of {cls.__name__}'s fields, got {_shown(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"{place}: unknown key {_shown(key)}; {suggest(str(key), fields)}", key=str(key))
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


def check_types(value: object) -> None:
    """Check that each field of a dataclass has a value of its type.

    Parameters
    ----------
    value
        The dataclass, as its constructor was given it.

    Raises
    ------
    ConfigError
        Names the field and its value.
    """
    cls: Hint = type(value)
    for key, hint in _hints(cls).items():
        _parse(hint, getattr(value, key), f"{cls.__name__}.{key}")


def handler(call: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T | Mapping[str, object]]]:
    """Return a call as a handler of one of dask's servers: it gets arguments of the types of its hints, and no others.

    Errors of agentcluster are its answers. An exception that a handler raises would be logged by the server with a
    traceback, as a fault.

    Parameters
    ----------
    call
        The call; its hints are those of :mod:`agentcluster.model`.
    """
    from distributed.core import error_message  # heavy, and a process that is launched reads its settings first

    parameters = _Parameters(call)

    @functools.wraps(call)
    async def handle(*args: Any, **kwargs: Any) -> T | Mapping[str, object]:
        try:
            return await call(*args, **parameters.parse(kwargs))
        except (AgentClusterError, TimeoutError) as error:
            refusal: Mapping[str, object] = error_message(error, status="uncaught-error")
            return refusal

    return handle


class _Parameters:
    """Parameters of a call: its keyword arguments are parsed by their hints.

    Arguments that a ``**`` parameter takes are left as they are, and so is ``comm``, which the server gives.
    """

    def __init__(self, call: Callable[..., object]) -> None:
        parameters = inspect.signature(call).parameters.values()
        any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [each for each in parameters if each.kind not in any_number and each.name != "comm"]
        hints = typing.get_type_hints(call)
        self._call = call.__name__
        self._hints = {each.name: hints[each.name] for each in named}
        self._required = [each.name for each in named if each.default is each.empty]
        self._others = any(each.kind is each.VAR_KEYWORD for each in parameters)

    def parse(self, given: Mapping[str, object]) -> dict[str, Plain]:
        """Return the arguments, of the types of the hints; raise ConfigError for one that is wrong or missing."""
        values = dict(given)
        for name, value in given.items():
            if name in self._hints:
                values[name] = _parse(self._hints[name], value, f"{self._call}: {name}")
            elif not self._others:
                problem = f"{self._call}: there is no argument {_shown(name)}"
                raise ConfigError(f"{problem}; {suggest(str(name), self._hints)}" if self._hints else problem)
        for name in self._required:
            if name not in given:
                raise ConfigError(f"{self._call}: the argument {name!r} is missing")
        return values


def _parse(hint: Hint, value: object, where: str) -> Plain:
    """Check a value against a type hint, and convert it to that type."""
    origin: object = typing.get_origin(hint)
    args = typing.get_args(hint)
    if hint is Any:
        return plain(value)  # dask's protocol turns lists into tuples
    if hint is object:
        return value
    if origin in (types.UnionType, typing.Union):
        return _parse_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {_shown(value)} is not allowed; {suggest(str(value), map(str, args))}")
        return value
    if origin in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {_shown(value)}")
        return tuple(_parse(args[0], v, where) for v in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {_shown(value)}")
        return {str(k): _parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return from_wire(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """Return the beginning of a value's repr, for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


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


# -- peers that are unknown yet ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Handshakes:
    """Peers that have not proved themselves yet: few at a time, and each for a limited time.

    Of too many the oldest is ended, so that who only holds connections does not keep others out.

    Attributes
    ----------
    seconds
        Time for one of them.
    of_one, of_all
        Greatest number of them from one host, and in all.
    """

    seconds: float
    of_one: int
    of_all: int
    _open: dict[asyncio.Timeout, str] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @contextlib.asynccontextmanager
    async def limited(self, host: str) -> AsyncIterator[None]:
        """Limit the block in which a peer proves itself.

        Parameters
        ----------
        host
            Address of the peer, without a port.

        Raises
        ------
        TimeoutError
            When it takes too long, or is the oldest of too many.
        """
        own = [each for each, other in self._open.items() if other == host]
        if len(own) >= self.of_one:
            self._end(own[0])
        elif len(self._open) >= self.of_all:
            self._end(next(iter(self._open)))
        async with asyncio.timeout(self.seconds) as limit:
            self._open[limit] = host
            try:
                yield
            finally:
                self._open.pop(limit, None)

    def _end(self, limit: asyncio.Timeout) -> None:
        del self._open[limit]
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())


def limit_handshakes(listeners: Iterable[Listener], handshakes: Handshakes) -> None:
    """Limit the peers of dask's TCP listeners that have not finished the handshakes: dask itself keeps them for ever.

    Parameters
    ----------
    listeners
        The listeners of a server; those of other transports stay as they are.
    handshakes
        The limits, for the handshake of TLS and for that of dask, each.
    """
    for listener in listeners:
        if hasattr(listener, "_prepare_stream"):
            _limit(listener, listener._prepare_stream, handshakes)


def _limit(listener: Listener, prepare: Callable[..., Awaitable[IOStream | None]], handshakes: Handshakes) -> None:
    # Heavy, and a process that is launched reads its settings first.
    from distributed.comm.addressing import get_address_host
    from distributed.comm.core import CommClosedError

    on_connection = listener.on_connection

    async def prepared(stream: IOStream, address: str) -> IOStream | None:
        try:
            async with handshakes.limited(get_address_host(address)):
                return await prepare(stream, address)
        except TimeoutError:
            stream.close()
            return None

    async def connected(comm: Comm, handshake_overrides: dict[str, Any] | None = None) -> None:
        try:
            async with handshakes.limited(get_address_host(comm.peer_address)):
                await on_connection(comm, handshake_overrides)
        except TimeoutError:
            comm.abort()
            raise CommClosedError(f"{comm.peer_address} did not finish its handshake") from None

    vars(listener).update(_prepare_stream=prepared, on_connection=connected)


# -- addresses where nobody is -----------------------------------------------------------------------------------------

#: Seconds for which an address may refuse connections: whoever was started just now does not listen yet.
REFUSED = 3.0

#: Seconds after which it is asked whether anything listens; another connection without a handshake would be logged.
SUSPICION = 0.5


async def unless_refused(call: Awaitable[T], address: str) -> T:
    """Wait for a call over a new connection, but not where nothing listens: dask tries again until its timeout.

    Parameters
    ----------
    call
        The call, which connects by itself; it is cancelled when it is in vain.
    address
        Address of the other side.

    Returns
    -------
    T
        The result of the call.

    Raises
    ------
    OSError
        When the name of the host is not known, or connections are refused for longer than :data:`REFUSED`.
    """
    under_way = asyncio.ensure_future(call)
    try:
        await asyncio.wait({under_way}, timeout=SUSPICION)
        if not under_way.done() and (why := await _why_nobody(address, under_way)):
            raise OSError(why)
        return await under_way
    finally:
        under_way.cancel()
        await asyncio.wait({under_way}, timeout=SUSPICION)
        if under_way.done() and not under_way.cancelled():
            under_way.exception()  # retrieved, where it was in vain


async def _why_nobody(address: str, call: asyncio.Future[T]) -> str | None:
    """Return why nobody can answer at an address; None where somebody may, and once the call is done."""
    from distributed.comm.addressing import get_address_host_port  # heavy, and seldom needed

    try:
        host, port = get_address_host_port(address, strict=True)
    except ValueError:  # in this process
        return None
    began = time.monotonic()
    while not call.done():
        try:
            async with asyncio.timeout(REFUSED):
                _, writer = await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            if time.monotonic() - began > REFUSED:
                return f"nothing listens at {address} (connection refused)"
            await asyncio.sleep(SUSPICION)
        except socket.gaierror as error:
            return f"the name {host!r} is not known ({error.strerror})"
        except OSError:  # also a timeout: dask's own has the better message
            return None
        else:
            writer.close()
            return None
    return None
