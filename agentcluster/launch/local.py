"""Launcher of agents on this machine, as subprocesses without a shell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from agentcluster.errors import LaunchError
from agentcluster.launch import Host, check_launcher
from agentcluster.launch.process import GRACE, MODULE, launch
from agentcluster.launch.protocol import Launched, Settings


class LocalLauncher:
    """Launches an agent on this machine.

    Parameters
    ----------
    name
        Name of the node.
    python
        Path of the Python interpreter; by default that of this process.
    env
        Environment variables of the agent and its workers, in addition to those of this process.
    standby
        Launch the agent only when its workers are needed, and end it when they are no longer needed.
    labels
        Labels of the node, by which it can be selected.
    """

    def __init__(
        self,
        name: str = "local",
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        *,
        standby: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        given: dict[str, Any] = {key: each for key, each in (("env", env), ("labels", labels)) if each is not None}
        Host("local", name=name, remote_python=python, standby=standby, **given)
        check_launcher(name, standby)
        self.name = name
        self.where = "local"
        self.standby = standby
        self.labels = dict(labels or {})
        self._python = os.path.expanduser(python or sys.executable)
        self._env = dict(env or {})

    def __repr__(self) -> str:
        return f"LocalLauncher({self.name!r})"

    async def launch(self, settings: Settings, *, timeout: float) -> Launched:
        """Start the agent; see :class:`~agentcluster.launch.protocol.Launcher`."""
        if self._python == sys.executable:
            # As multiprocessing gives it to its processes, so that what the user imports can be imported there.
            settings = replace(settings, path=tuple(map(os.path.abspath, sys.path)))
        return await launch(self._start, settings, where=self.where, python=self._python, timeout=timeout)

    async def _start(self) -> _Subprocess:
        loop = asyncio.get_running_loop()
        try:
            # In a new session: Ctrl-C in the terminal must not reach the agent; EOF on stdin ends it in order.
            _, process = await loop.subprocess_exec(
                *(_Subprocess, self._python, "-m", MODULE), start_new_session=True, env={**os.environ, **self._env}
            )
        except OSError as error:
            reason = f"Python cannot be run as {self._python!r}: {error.strerror or error}"
            raise LaunchError(self.where, reason) from error
        return process


class _Subprocess(asyncio.SubprocessProtocol):
    """A subprocess with its streams (a ``Process``).

    ``asyncio.create_subprocess_exec`` is not used because its Process cannot close a pipe that a grandchild holds open.
    """

    def __init__(self) -> None:
        self.stdout = asyncio.StreamReader()
        self.stderr = asyncio.StreamReader()
        self._readers = {1: self.stdout, 2: self.stderr}
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        for fd, reader in self._readers.items():
            pipe = self._transport.get_pipe_transport(fd)
            assert pipe is not None
            reader.set_transport(pipe)  # the reader pauses the pipe while too much is unread

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._readers[fd].feed_data(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._readers:
            self._readers[fd].feed_eof()

    def process_exited(self) -> None:
        self._exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    @property
    def _stdin(self) -> asyncio.WriteTransport:
        return cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))

    def write(self, data: bytes) -> None:
        self._stdin.write(data)

    def write_eof(self) -> None:
        if not self._stdin.is_closing():
            self._stdin.write_eof()

    async def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._transport.terminate()

    async def kill(self) -> None:
        if self._transport.get_returncode() is None:
            # It leads a process group (start_new_session), which its workers are in.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._transport.get_pid(), signal.SIGKILL)

    async def wait(self) -> int | None:
        await self._exited.wait()
        return self._transport.get_returncode()

    async def release(self) -> None:
        self._transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await self._closed.wait()
