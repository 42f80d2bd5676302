"""Start, ownership and end of a launched process that is controlled over its three standard streams.

``local`` and ``ssh`` share this module. They differ in how they start the process and send it a signal, which is a
:class:`Process`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from agentcluster.errors import ConfigError, LaunchError, LaunchTimeout
from agentcluster.launch.protocol import LogTail, Reader, Ready, Settings, drain

logger = logging.getLogger("agentcluster.launch")

#: Module that runs on a host.
MODULE = "agentcluster.cli.launched"

#: Seconds for each forced step of an end: a signal, the last output, closing the connection.
GRACE = 2.0


class Process(Protocol):
    """A started process: the operations that differ between launchers.

    All of them but ``wait`` can be called when the process, or the connection to it, is gone.
    """

    @property
    def stdout(self) -> Reader: ...

    @property
    def stderr(self) -> Reader: ...

    def write(self, data: bytes) -> None:
        """Write to its stdin; the data is buffered."""

    def write_eof(self) -> None:
        """Close its stdin after what was written."""

    async def terminate(self) -> None:
        """Ask it to end by SIGTERM."""

    async def kill(self) -> None:
        """End it by SIGKILL, with the processes that it started where that is possible."""

    async def wait(self) -> int | None:
        """Return its exit code when it has ended; ``None`` when that cannot be known."""

    async def release(self) -> None:
        """Close everything that was opened for it."""


class _Running:
    """The only owner of a process, its streams and the connection to it (a ``Launched`` once it is ready)."""

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
        """Handle a line of stdout: the first ready line is the process's answer, all others are log."""
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
        """Send the settings, and return when the process is ready or has ended (then ``ready`` is not set)."""
        self._process.write(settings.encode().encode() + b"\n")
        either: set[asyncio.Future[Any]] = {self._ready, self._stdout, self._ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            # The exit status and the end of each stream come in any order; the message about the end needs all three.
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
            self._ready.exception()  # otherwise asyncio logs that it was never retrieved
        else:
            self._ready.cancel()

    async def _has_ended(self, seconds: float) -> bool:
        """Wait for the end of the process, for at most `seconds`."""
        await asyncio.wait({self._ended}, timeout=seconds)
        return self._ended.done()


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, wait for their end, and log their errors."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.warning("reading from a launched process failed", exc_info=outcome)


async def launch(
    start: Callable[[], Awaitable[Process]], settings: Settings, *, where: str, python: str, timeout: float
) -> _Running:
    """Start a process and wait for its ready line.

    Parameters
    ----------
    start
        Starts the process. When it cannot, it closes what it opened and raises :class:`LaunchError`.
    settings
        Settings of the process.
    where
        The host, for messages.
    python
        The interpreter that `start` runs, for messages.
    timeout
        Seconds from the call of `start` until the ready line.

    Returns
    -------
    Launched
        The process, ready.

    Raises
    ------
    LaunchError, LaunchTimeout
        When the process was not ready; it has been ended, and everything is closed.
    ConfigError
        When an option of the configuration cannot be used; nothing was started.
    """
    from agentcluster.config import Config  # imports dask, which a process that only names launchers does not need

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
    """Return the error about a process that was not ready in time."""
    if running is None:
        return LaunchTimeout(where, f"no connection was made within {timeout:g} s")
    last = _short(running.log.last())
    what = "it was not ready" if last else "it printed nothing"
    return LaunchTimeout(where, f"{what} within {timeout:g} s", last)


def _why(code: int | None, log: LogTail, python: str) -> str:
    """Explain the end of a process that was not ready, from its exit code and its last output."""
    if missing := re.search(r"No module named '?([\w.]+)", log.last()):
        if missing[1].partition(".")[0] != "agentcluster":
            return f"its Python ({python}) has no module {missing[1]!r}, which it was made to import; install it there"
        return (
            f"its Python ({python}) has no module {missing[1]!r}; "
            f"install agentcluster into it: {python} -m pip install agentcluster"
        )
    words = "\n".join(log.lines()[-5:])
    # A POSIX shell exits with 126 or 127; csh exits with 1 and prints the reason.
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
