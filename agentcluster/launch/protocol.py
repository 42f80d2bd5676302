"""What a launcher and the process that it starts say to each other, and the interface that every launcher has.

The settings go in as one JSON line on stdin (:class:`Settings`), one line comes back on stdout when the process is
ready (:class:`Ready`), everything else that it says is kept in a :class:`LogTail`, and EOF on its stdin ends it.
:class:`Launcher` and :class:`Launched` are what to implement for a way of starting agents that is not here yet.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import agentcluster
from agentcluster.errors import ConfigError
from agentcluster.model import Hardware
from agentcluster.wire import PROTOCOL, check_protocol, from_wire, to_wire

READY_PREFIX = "agentcluster-ready "

#: A longer line is split, in bytes.
MAX_LINE = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """All that a launched process is told; none of it is on its command line.

    Attributes
    ----------
    protocol, version
        Versions of the protocol and of agentcluster, see :func:`agentcluster.wire.spoken`.
    role
        What to run: an ``agent`` or a ``scheduler``.
    name
        The node's name; ``None`` leaves it to the process.
    scheduler
        Address of the scheduler to join; ``None`` for a scheduler.
    security
        Keyword arguments of :class:`distributed.Security`, with PEM text and not paths. Not in the repr.
    config
        Dask configuration to be set. Not in the repr: it may hold credentials as well.
    environ
        Environment variables to set before anything heavy is imported. Not in the repr.
    pre_spawn
        Environment variables that dask sets before it starts a worker; the host's own, where it has them, win.
    options
        Keyword arguments of the agent or the scheduler.
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
    options: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> str:
        """Return the settings as one line of JSON, without the newline at its end."""
        return json.dumps(to_wire(self), separators=(",", ":"))

    @classmethod
    def decode(cls, line: str) -> Settings:
        """Parse what :meth:`encode` wrote.

        Raises
        ------
        ConfigError
            When the line is not JSON, or has a key or type that does not belong
            there. The message holds no value of a secret field.
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
    """What a launched process says once it can be talked to.

    Attributes
    ----------
    protocol, version
        Versions of the protocol and of agentcluster, see :func:`agentcluster.wire.spoken`.
    address
        Where it listens, such as ``tls://10.0.0.5:41234``.
    pid
        Its process id on its host.
    versions
        Package name -> version there.
    hardware
        What was detected there; ``None`` for a scheduler.
    """

    address: str
    pid: int
    protocol: int = PROTOCOL
    version: str = field(default_factory=lambda: agentcluster.__version__)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Hardware | None = None

    def encode(self) -> str:
        """Return the line for stdout, without the newline at its end."""
        return READY_PREFIX + json.dumps(to_wire(self), separators=(",", ":"))

    @classmethod
    def decode(cls, line: str) -> Ready | None:
        """Parse a line of stdout; ``None`` when it is not a ready line.

        The prefix may come late in the line: what a login shell prints need not end with a newline.

        Raises
        ------
        ConfigError
            When the line is a ready line, but damaged.
        """
        _, found, data = line.partition(READY_PREFIX)
        return from_wire(cls, _decode(data, "ready line"), "ready line") if found else None


def _decode(line: str, what: str) -> dict[str, Any]:
    """Parse JSON and check the version first: another version's other fields may mean anything."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{what}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{what}: expected a JSON object, got {type(data).__name__}")
    peer, here = _SIDES[what]
    check_protocol(peer, data.get("protocol"), data.get("version"), here=here)
    return data


#: Message -> who sent it, and who reads it.
_SIDES = {
    "settings": ("the cluster", "the launched process"),
    "ready line": ("the launched process", "the cluster"),
}


class Reader(Protocol):
    """A stream to read from, such as :class:`asyncio.StreamReader`."""

    async def read(self, n: int, /) -> bytes:
        """Return up to `n` bytes as soon as there are some; ``b""`` at the end of the stream."""


class LogTail:
    """The last lines that a process wrote, whatever it writes.

    Parameters
    ----------
    maxlen
        Lines that are kept.
    maxsize
        Characters that are kept in all; the oldest lines go first.
    """

    def __init__(self, maxlen: int = 1000, maxsize: int = 4 * 1024 * 1024) -> None:
        self._lines: deque[str] = deque()
        self._size = 0
        self._maxlen = maxlen
        self._maxsize = maxsize

    def append(self, line: str) -> None:
        """Add a line, without its newline."""
        self._lines.append(line)
        self._size += len(line)
        while len(self._lines) > self._maxlen or (self._size > self._maxsize and len(self._lines) > 1):
            self._size -= len(self._lines.popleft())

    def lines(self) -> list[str]:
        """Return the lines that are kept, oldest first."""
        return list(self._lines)

    def last(self) -> str:
        """Return the last line that is not blank; ``""`` when there is none."""
        return next((line.strip() for line in reversed(self._lines) if line.strip()), "")


class _Splitter:
    """Makes lines of at most :data:`MAX_LINE` bytes out of chunks."""

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
    """Hand each line of a stream to `take`, to the end of the stream; also the unfinished one, when cancelled.

    Parameters
    ----------
    reader
        The stream. It is read all the time, so that the process never blocks on a full pipe.
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
    """A process that a launcher brought up, owned by whoever asked for it.

    Attributes
    ----------
    ready
        What it said when it was ready.
    log
        What it said since; grows until the process ends.
    """

    @property
    def ready(self) -> Ready: ...

    @property
    def log(self) -> LogTail: ...

    async def close(self, timeout: float) -> None:
        """End the process, and release everything that was opened for it.

        Must be idempotent, in any state: all callers wait for the same work, and a cancelled caller does not stop
        it. When it returns the process has ended as far as the launcher can know, :meth:`wait` returns, and nothing
        of the launcher is open on this machine; where the end could not be confirmed, a warning was logged.

        Parameters
        ----------
        timeout
            Seconds that the process gets to end its workers and itself. After that it is made to end, which takes
            up to ten seconds more (most when its host does not answer).
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
    """A way for an agent (or a scheduler) to come to run on one host.

    Any object with these three can be given in ``AgentCluster(hosts=[…])``. To run the agent it starts
    ``python -m agentcluster.cli.launched`` on its host, writes ``settings.encode()`` and a newline to its stdin,
    keeps stdin open (EOF ends the agent with its workers), and reads stdout up to the line that
    :meth:`Ready.decode` knows. :func:`agentcluster.launch.process.launch` does all this for a
    :class:`~agentcluster.launch.process.Process`.

    Attributes
    ----------
    name
        The node name that it suggests; unique in a cluster.
    where
        The host as the user wrote it, for messages. Never a secret.

    Notes
    -----
    One that has an attribute ``standby`` that is true is launched when its workers are needed, and closed when they are
    not any more. An attribute ``labels``, a mapping of text to text, is the node's.
    """

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str: ...

    async def launch(self, settings: Settings, *, timeout: float) -> Launched:
        """Start the process and wait until it is ready.

        Must put nothing of `settings` on a command line or a disk. It may be called again after the process that it
        returned has ended. When it raises, also on cancellation, everything that it opened has been undone.

        Parameters
        ----------
        settings
            What the process is told.
        timeout
            Seconds for all of it, from the first connection to the ready line.

        Raises
        ------
        LaunchError
            The process did not come to be ready: why, the remedy where one is known, its last words.
        LaunchTimeout
            It was not ready in time.
        ConfigError
            An option of this launcher cannot be used.
        """
