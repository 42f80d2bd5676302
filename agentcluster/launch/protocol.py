"""Messages between a launcher and the process that it starts, and the interface of launchers.

The launcher writes one JSON line to stdin (:class:`Settings`), and the process prints one line to stdout when it is
ready (:class:`Ready`); all other output is kept in a :class:`LogTail`, and EOF on stdin ends the process. Implement
:class:`Launcher` and :class:`Launched` for another way of starting agents.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import agentcluster
from agentcluster.errors import ConfigError, printable
from agentcluster.model import Hardware
from agentcluster.wire import PROTOCOL, check_protocol, from_wire, to_wire

READY_PREFIX = "agentcluster-ready "

#: Bytes of the longest line; a longer one is split.
MAX_LINE = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """Settings of a launched process; none of them is on its command line.

    Attributes
    ----------
    protocol, version
        Versions of the protocol and of agentcluster, see :func:`agentcluster.wire.spoken`.
    role
        Role of the process: ``agent`` or ``scheduler``.
    name
        The node's name; ``None`` leaves it to the process.
    scheduler
        Address of the scheduler to join; ``None`` for a scheduler.
    security
        Keyword arguments of :class:`distributed.Security`, with PEM text and not paths. Not in the repr.
    config
        Dask configuration to set. Not in the repr: it may contain credentials as well.
    environ
        Environment variables to set before anything heavy is imported. Not in the repr.
    pre_spawn
        Environment variables that dask sets before it starts a worker; those of the host have priority.
    options
        Keyword arguments of the agent or the scheduler. Not in the repr.
    path
        Folders that the process imports from, before its own: those of the process that starts it, on its machine.
    """

    protocol: int = PROTOCOL
    version: str = field(default_factory=lambda: agentcluster.__version__)
    role: Literal["agent", "scheduler"] = "agent"
    name: str | None = None
    scheduler: str | None = None
    security: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    pre_spawn: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: Sequence[str] = ()

    def encode(self) -> str:
        """Return the settings as one line of JSON.

        Returns
        -------
        str
            The line, without its newline.
        """
        return json.dumps(to_wire(self), separators=(",", ":"))

    @classmethod
    def decode(cls, line: str) -> Settings:
        """Parse a line that :meth:`encode` wrote.

        Parameters
        ----------
        line
            The line.

        Returns
        -------
        Settings
            The settings.

        Raises
        ------
        VersionMismatch
            When the sender has another version of the protocol.
        ConfigError
            When the line is not JSON, has an unknown key, or a value of a wrong type. The message has no value of a
            secret field.
        """
        data = _decode(line, "settings")
        for secret in ("security", "config", "environ"):
            if not isinstance(data.get(secret, {}), Mapping):
                raise ConfigError(f"settings.{secret}: expected a mapping", key=secret)
        for name, value in data.get("environ", {}).items():
            if not isinstance(value, str):
                raise ConfigError(f"settings.environ.{name}: expected text, got {type(value).__name__}", key="environ")
        return from_wire(cls, data, "settings")


@dataclass(frozen=True)
class Ready:
    """Message of a launched process that is ready for calls.

    Attributes
    ----------
    protocol, version
        Versions of the protocol and of agentcluster, see :func:`agentcluster.wire.spoken`.
    address
        Address at which it listens, such as ``tls://10.0.0.5:41234``.
    pid
        Its process id on its host.
    versions
        Package name -> version there.
    hardware
        Hardware of its host; ``None`` for a scheduler.
    """

    address: str
    pid: int
    protocol: int = PROTOCOL
    version: str = field(default_factory=lambda: agentcluster.__version__)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Hardware | None = None

    def encode(self) -> str:
        """Return the line for stdout.

        Returns
        -------
        str
            The line, without its newline.
        """
        return READY_PREFIX + json.dumps(to_wire(self), separators=(",", ":"))

    @classmethod
    def decode(cls, line: str) -> Ready | None:
        """Parse a line of stdout; ``None`` when it is not a ready line.

        The prefix can be anywhere in the line: the output of a login shell need not end with a newline.

        Parameters
        ----------
        line
            The line.

        Returns
        -------
        Ready or None
            The message.

        Raises
        ------
        VersionMismatch
            When the process has another version of the protocol.
        ConfigError
            When the line is a damaged ready line.
        """
        _, found, data = line.partition(READY_PREFIX)
        return from_wire(cls, _decode(data, "ready line"), "ready line") if found else None


def _decode(line: str, what: str) -> dict[str, Any]:
    """Parse JSON and check its version first: the fields of another version can mean anything."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{what}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{what}: expected a JSON object, got {type(data).__name__}")
    peer, here = _SIDES[what]
    check_protocol(peer, data.get("protocol"), data.get("version"), here=here)
    return data


#: Message -> its sender and its reader, for errors.
_SIDES = {
    "settings": ("the cluster", "the launched process"),
    "ready line": ("the launched process", "the cluster"),
}


class Reader(Protocol):
    """A stream to read from, such as :class:`asyncio.StreamReader`."""

    async def read(self, n: int, /) -> bytes:
        """Return up to `n` bytes as soon as some arrive; ``b""`` at the end of the stream."""


class LogTail:
    """Last lines of a process's output, of bounded size.

    Parameters
    ----------
    maxlen
        Maximum number of lines.
    maxsize
        Maximum number of characters; the oldest lines are dropped first.
    """

    def __init__(self, maxlen: int = 1000, maxsize: int = 4 * 1024 * 1024) -> None:
        self._lines: deque[str] = deque()
        self._size = 0
        self._maxlen = maxlen
        self._maxsize = maxsize

    def append(self, line: str) -> None:
        """Add a line.

        Parameters
        ----------
        line
            The line, without its newline; control characters, which would reach the user's terminal, become escapes.
        """
        line = printable(line)
        self._lines.append(line)
        self._size += len(line)
        while len(self._lines) > self._maxlen or (self._size > self._maxsize and len(self._lines) > 1):
            self._size -= len(self._lines.popleft())

    def lines(self) -> list[str]:
        """Return the lines, oldest first.

        Returns
        -------
        list of str
            The lines that are kept.
        """
        return list(self._lines)

    def last(self) -> str:
        """Return the last line that is not blank.

        Returns
        -------
        str
            The line, without blanks at its ends; ``""`` when there is none.
        """
        return next((line.strip() for line in reversed(self._lines) if line.strip()), "")


class _Splitter:
    """Split chunks into lines of at most :data:`MAX_LINE` bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for line in whole:
            for start in range(0, len(line) or 1, MAX_LINE):
                yield _text(line[start : start + MAX_LINE])
        while len(self._rest) >= MAX_LINE:
            yield _text(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]

    def flush(self) -> Iterator[str]:
        if self._rest:
            yield _text(self._rest)
            self._rest = b""


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")


async def drain(reader: Reader, take: Callable[[str], None]) -> None:
    """Read lines until the end of a stream, or cancellation; the last line need not be finished.

    Parameters
    ----------
    reader
        The stream. It is read continuously, so that the process never blocks on a full pipe.
    take
        Called with each line, such as :meth:`LogTail.append`.
    """
    splitter = _Splitter()
    try:
        while chunk := await reader.read(MAX_LINE):
            for line in splitter.feed(chunk):
                take(line)
    finally:
        for line in splitter.flush():
            take(line)


class Launched(Protocol):
    """A launched process, owned by the caller of :meth:`Launcher.launch`.

    Attributes
    ----------
    ready
        Its ready line.
    log
        Its other output; grows until the process ends.
    """

    @property
    def ready(self) -> Ready: ...

    @property
    def log(self) -> LogTail: ...

    async def close(self, timeout: float) -> None:
        """End the process, and close everything that was opened for it.

        Must be idempotent in any state: all callers wait for the same work, and the cancellation of one does not stop
        it. When it returns, the process has ended as far as the launcher can know, :meth:`wait` returns, and nothing
        of the launcher is open on this machine; when the end could not be confirmed, a warning was logged.

        Parameters
        ----------
        timeout
            Seconds for the process to end its workers and itself. Then it is killed, which takes up to ten seconds
            (longest when its host does not answer).
        """

    async def wait(self) -> int | None:
        """Return when the process has ended, by itself or by :meth:`close`.

        Returns
        -------
        int or None
            Its exit code (negative: the signal that ended it); ``None`` when that is unknown, such as when the
            connection to its host was lost.
        """


class Launcher(Protocol):
    """A way to run an agent (or a scheduler) on one host.

    An object with these three members is an item of ``AgentCluster(hosts=[…])``. To run the agent, it starts
    ``python -m agentcluster.cli.launched`` on its host, writes ``settings.encode()`` and a newline to stdin, keeps
    stdin open (EOF ends the agent with its workers), and reads stdout up to the line that :meth:`Ready.decode`
    recognises. :func:`agentcluster.launch.process.launch` does all this for a
    :class:`~agentcluster.launch.process.Process`.

    Attributes
    ----------
    name
        Name of the node; unique in a cluster.
    where
        The host as the user wrote it, for messages. Never a secret.

    Notes
    -----
    Two attributes are optional. With a true ``standby`` the agent is launched only when its workers are needed, and
    closed when they are no longer needed. ``labels``, a mapping of text to text, are labels of the node.
    """

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str: ...

    async def launch(self, settings: Settings, *, timeout: float) -> Launched:
        """Start the process and wait until it is ready.

        Must not write `settings` to a command line or a disk. It can be called again after the process that it
        returned has ended. When it raises, also on cancellation, it has closed everything that it opened.

        Parameters
        ----------
        settings
            Settings of the process.
        timeout
            Seconds from the first connection to the ready line.

        Returns
        -------
        Launched
            The process, ready.

        Raises
        ------
        LaunchError
            When the process did not start: the reason, the remedy where one is known, its last output.
        LaunchTimeout
            When it was not ready in time.
        ConfigError
            When an option of this launcher cannot be used.
        """
