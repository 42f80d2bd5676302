"""A launcher whose agents are forked from the tests' zygote: processes of their own that need not import anything."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
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

    def __init__(
        self, name: str, zygote: Zygote, env: Mapping[str, str] | None = None, *, standby: bool = False
    ) -> None:
        super().__init__(name, env=env, standby=standby)
        self._zygote = zygote

    async def _start(self) -> Any:
        process = ForkedProcess(self._zygote)
        await process.start(os.environ | {"PYTHONPATH": str(ROOT)} | self._env)
        return process


class ForkedProcess:
    """A forked ``python -m agentcluster.cli.launched`` with its streams: a ``Process``, and like one of asyncio's."""

    stdin: asyncio.StreamWriter

    def __init__(self, zygote: Zygote) -> None:
        self.stdout = asyncio.StreamReader()
        self.stderr = asyncio.StreamReader()
        self._zygote = zygote
        self._forked: Forked

    @property
    def pid(self) -> int:
        return self._forked.pid

    @property
    def returncode(self) -> int | None:
        return self._forked.poll()

    async def start(self, environ: dict[str, str], go: str | None = None) -> None:
        """Fork; see :meth:`tests.support.zygote.Zygote.start` for the arguments."""
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        streams = [f"/proc/{os.getpid()}/fd/{fd}" for fd in theirs]
        self._forked = self._zygote.start(("-m", MODULE), environ, ROOT, streams, session=True, go=go)
        loop = asyncio.get_running_loop()
        files = [os.fdopen(fd, mode) for fd, mode in zip(ours, ("wb", "rb", "rb"), strict=True)]
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, files[0])
        self.stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        self._pipes = [
            (await loop.connect_read_pipe(lambda reader=reader: asyncio.StreamReaderProtocol(reader), file))[0]
            for reader, file in zip((self.stdout, self.stderr), files[1:], strict=True)
        ]
        for fd in theirs:
            os.close(fd)

    def write(self, data: bytes) -> None:
        self.stdin.write(data)

    def write_eof(self) -> None:
        self.stdin.close()

    async def terminate(self) -> None:
        self._forked.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        while (code := self.returncode) is None:
            await asyncio.sleep(INTERVAL)
        return code

    async def release(self) -> None:
        for transport in (self.stdin.transport, *self._pipes):
            transport.close()
