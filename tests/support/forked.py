"""A launcher whose agents are forked from the tests' zygote: processes of their own that need not import anything."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

from agentcluster.launch.local import LocalLauncher
from agentcluster.launch.process import MODULE
from tests.support.programs import ROOT
from tests.support.waiting import INTERVAL
from tests.support.zygote import Forked, Zygote

#: Returns the launchers of as many hosts, named as ``hosts=["local"] * count`` names them.
ForkedHosts = Callable[[int], "list[ForkedLauncher]"]


class ForkedLauncher(LocalLauncher):
    """Forks a process where a local host starts one, with the same three streams; a local host in all else."""

    def __init__(self, name: str, zygote: Zygote) -> None:
        super().__init__(name)
        self._zygote = zygote

    async def _start(self) -> Any:
        process = _Process()
        await process.start(self._zygote)
        return process


class _Process:
    """A forked process with its streams (a ``Process``)."""

    def __init__(self) -> None:
        self.stdout = asyncio.StreamReader()
        self.stderr = asyncio.StreamReader()

    async def start(self, zygote: Zygote) -> None:
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        streams = [f"/proc/{os.getpid()}/fd/{fd}" for fd in theirs]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        self._forked: Forked = zygote.start(("-m", MODULE), environ, ROOT, streams, session=True)
        loop = asyncio.get_running_loop()
        files = [os.fdopen(fd, mode) for fd, mode in zip(ours, ("wb", "rb", "rb"), strict=True)]
        self._stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, files[0])
        self._pipes = [
            (await loop.connect_read_pipe(lambda reader=reader: asyncio.StreamReaderProtocol(reader), file))[0]
            for reader, file in zip((self.stdout, self.stderr), files[1:], strict=True)
        ]
        for fd in theirs:
            os.close(fd)

    def write(self, data: bytes) -> None:
        self._stdin.write(data)

    def write_eof(self) -> None:
        self._stdin.close()

    async def terminate(self) -> None:
        self._forked.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        if self._forked.poll() is None:
            os.killpg(self._forked.pid, signal.SIGKILL)

    async def wait(self) -> int | None:
        while (code := self._forked.poll()) is None:
            await asyncio.sleep(INTERVAL)
        return code

    async def release(self) -> None:
        for transport in (self._stdin, *self._pipes):
            transport.close()
