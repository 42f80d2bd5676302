"""Brings a process that talks over three streams to its ready line, owns it from then on, and ends it.

This is what ``local`` and ``ssh`` share. They differ in how the process comes to run and how a signal gets to it,
which is a :class:`Process`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from agentcluster.config import Config
from agentcluster.errors import ConfigError, LaunchError, LaunchTimeout
from agentcluster.launch.protocol import LogTail, Reader, Ready, Settings, drain

logger = logging.getLogger("agentcluster.launch")

#: What runs on a host: this module, by the host's Python.
MODULE = "agentcluster.cli.launched"

#: Seconds that each forced step of an end may take: a signal, the last words, hanging up.
GRACE = 2.0


class Process(Protocol):
    """A started process, by the few things that launchers do differently.

    Nothing here but ``wait`` minds that the process, or the way to it, is gone.
    """

    @property
    def stdout(self) -> Reader: ...

    @property
    def stderr(self) -> Reader: ...

    def write(self, data: bytes) -> None:
        """Write to its stdin, buffered."""

    def write_eof(self) -> None:
        """Close its stdin after what was written."""

    async def terminate(self) -> None:
        """Ask it to end by SIGTERM."""

    async def kill(self) -> None:
        """End it, and all that it started where that is possible, by SIGKILL."""

    async def wait(self) -> int | None:
        """Return its exit code when it has ended; ``None`` when that cannot be known."""

    async def release(self) -> None:
        """Close everything that was opened for it."""


class _Running:
    """The only owner of a process: its streams, its end, and the way to it (a ``Launched`` once it is ready)."""

    ready: Ready

    def __init__(self, process: Process, where: str, log: LogTail) -> None:
        self.log = log
        self._where = where
        self._process = process
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._stdout = asyncio.create_task(drain(process.stdout, self._take))
        self._stderr = asyncio.create_task(drain(process.stderr, self.log.append))
        self._ended = asyncio.create_task(process.wait())
        self._closing: asyncio.Task[None] | None = None

    def _take(self, line: str) -> None:
        """Take a line of stdout: the first ready line is the process's answer, all others are log."""
        try:
            ready = None if self._ready.done() else Ready.decode(line)
        except ConfigError as error:
            self.log.append(line)
            self._ready.set_exception(error)
            return
        if ready is None:
            self.log.append(line)
        else:
            self._ready.set_result(ready)

    async def start(self, settings: Settings) -> None:
        """Tell the process its settings, and return when it is ready or has ended (then ``ready`` is not set)."""
        self._process.write(settings.encode().encode() + b"\n")
        either: set[asyncio.Future[Any]] = {self._ready, self._stdout, self._ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            # The exit status and the end of each stream come in any order, and all three are needed to say why.
            await asyncio.wait({self._stdout, self._stderr, self._ended}, timeout=GRACE)
        if self._ready.done():
            self.ready = self._ready.result()

    @property
    def exit_code(self) -> int | None:
        return None if not self._ended.done() or self._ended.cancelled() else self._ended.result()

    async def wait(self) -> int | None:
        await asyncio.wait({self._ended})
        return self.exit_code

    async def close(self, timeout: float) -> None:
        await self._end(timeout, gently=True)

    async def abort(self) -> None:
        """End the process at once."""
        await self._end(0, gently=False)

    async def _end(self, timeout: float, *, gently: bool) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(timeout, gently))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float, gently: bool) -> None:
        self._process.write_eof()
        if not await self._has_ended(timeout) and gently:
            await self._process.terminate()
        if not await self._has_ended(GRACE if gently else 0):
            await self._process.kill()
        if await self._has_ended(GRACE):
            await asyncio.wait({self._stdout, self._stderr}, timeout=GRACE)
        else:
            logger.warning("process on %s did not confirm its end after SIGKILL; look for it there", self._where)
        await self._process.release()
        await self._has_ended(GRACE)
        await _cancelled(self._stdout, self._stderr, self._ended)
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()  # otherwise asyncio logs an exception that nobody took
        else:
            self._ready.cancel()

    async def _has_ended(self, seconds: float) -> bool:
        """Wait for the end of the process, at most so long."""
        await asyncio.wait({self._ended}, timeout=seconds)
        return self._ended.done()


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.warning("reading from a launched process failed", exc_info=outcome)


async def launch(
    start: Callable[[], Awaitable[Process]], settings: Settings, *, where: str, python: str, timeout: float
) -> _Running:
    """Start a process and bring it to its ready line; a launcher's whole ``launch`` but for `start`.

    Parameters
    ----------
    start
        Starts the process. It raises :class:`LaunchError` when it cannot, and then has undone what it opened.
    settings
        What the process is told.
    where
        The host, for messages.
    python
        The interpreter that `start` runs, for messages.
    timeout
        Seconds for `start` and all the rest.

    Returns
    -------
    Launched
        The process, ready.

    Raises
    ------
    LaunchError, LaunchTimeout
        The process has been ended and everything is closed.
    """
    running: _Running | None = None
    log = LogTail(Config.load().log_lines)
    try:
        async with asyncio.timeout(timeout) as deadline:
            running = _Running(await start(), where, log)
            await running.start(settings)
    except BaseException as error:
        if running is not None:
            await running.abort()
        if isinstance(error, TimeoutError) and deadline.expired():
            raise _late(running, where, timeout) from None
        if isinstance(error, ConfigError):
            raise LaunchError(where, str(error)) from error
        raise
    if not hasattr(running, "ready"):
        code = running.exit_code
        await running.abort()
        raise LaunchError(where, _why(code, running.log, python), _short(running.log.last()))
    return running


def _late(running: _Running | None, where: str, timeout: float) -> LaunchTimeout:
    if running is None:
        return LaunchTimeout(where, f"there was no connection to it within {timeout:g} s")
    last = _short(running.log.last())
    what = "was not ready" if last else "said nothing"
    return LaunchTimeout(where, f"{what} within {timeout:g} s", last)


def _why(code: int | None, log: LogTail, python: str) -> str:
    """Say why a process ended before it was ready, from its exit code and last words."""
    if missing := re.search(r"No module named '?([\w.]+)", log.last()):
        return (
            f"its Python ({python}) has no module {missing[1]!r}; "
            f"install agentcluster into it: {python} -m pip install agentcluster"
        )
    words = "\n".join(log.lines()[-5:])
    # 126 and 127 are a POSIX shell's; csh ends with 1, and says so.
    absent = re.search(r"not found|no such file|permission denied", words, re.IGNORECASE) and python in words
    if code in (126, 127) or absent:
        return (
            f"Python cannot be run there as {python!r}; "
            f"set remote_python= to the path of a Python there that has agentcluster"
        )
    if code is None:
        return "it closed its output, or its connection was lost, before it was ready"
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"{ended} before it was ready"


def _short(line: str, limit: int = 500) -> str:
    return line if len(line) <= limit else line[:limit] + "…"
