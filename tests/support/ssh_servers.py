"""Real SSH servers on loopback: asyncssh's own in this process, and OpenSSH's sshd.

Both run what they are asked to run as real child processes through ``/bin/sh``, let in one generated key, and put the
repository on the ``PYTHONPATH`` of what they run. But where asyncssh's is asked for an agent with this very Python, it
forks one from the zygote of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import getpass
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest

from agentcluster.launch.process import MODULE
from agentcluster.launch.ssh import START
from tests.support.census import MARK
from tests.support.forked import ForkedProcess
from tests.support.zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]

#: The command by which an SSH launcher starts an agent with this Python.
AGENT = "exec " + shlex.join(["sh", "-c", START, sys.executable])

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

#: Parameters for a fixture: ``@pytest.fixture(params=KINDS)``, with ``serve(request.param, tmp_path)`` in it.
KINDS = [
    pytest.param("asyncssh"),
    pytest.param(
        "sshd",
        marks=[pytest.mark.sshd, pytest.mark.skipif(SSHD is None, reason="OpenSSH's sshd is not installed")],
    ),
]


@dataclass(frozen=True)
class SSHServer:
    """A server that runs.

    Attributes
    ----------
    host, port
        Where it listens.
    username
        The user that its key belongs to.
    connect_options
        What a client needs to be let in and to trust it; the user's own configuration and agent stay out of it.
    kill
        Ends it with all its connections, without a word to the clients.
    """

    host: str
    port: int
    username: str
    connect_options: dict[str, Any]
    kill: Callable[[], None]

    @property
    def address(self) -> str:
        """The server as a host string."""
        return f"{self.username}@{self.host}:{self.port}"


@contextlib.asynccontextmanager
async def serve(kind: str, directory: Path, zygote: Zygote | None = None) -> AsyncIterator[SSHServer]:
    """Run a server of a kind, with its keys and settings in a directory of its own."""
    server = {"asyncssh": functools.partial(_serve_asyncssh, zygote=zygote), "sshd": _serve_openssh}[kind]
    place = directory / f"ssh-{kind}-{len(list(directory.iterdir()))}"
    place.mkdir(mode=0o700)
    for name in ("host_key", "client_key"):
        key = asyncssh.generate_private_key("ssh-ed25519", comment=name)
        key.write_private_key(place / name)
        key.write_public_key(place / f"{name}.pub")
        (place / name).chmod(0o600)
    async with server(place) as running:
        yield running


def _client_options(place: Path, port: int) -> dict[str, Any]:
    known_hosts = place / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{port} {(place / 'host_key.pub').read_text()}")
    return {
        "client_keys": [str(place / "client_key")],
        "known_hosts": str(known_hosts),
        "config": None,
        "agent_path": None,
    }


@contextlib.asynccontextmanager
async def _serve_asyncssh(place: Path, zygote: Zygote | None) -> AsyncIterator[SSHServer]:
    connections: list[asyncssh.SSHServerConnection] = []
    sessions: list[_Session] = []

    class Server(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            connections.append(conn)

        def session_requested(self) -> asyncssh.SSHServerSession[bytes]:
            sessions.append(_Session(zygote))
            return sessions[-1]

    acceptor = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=Server,
        server_host_keys=[str(place / "host_key")],
        authorized_client_keys=str(place / "client_key.pub"),
        encoding=None,
    )

    def kill() -> None:
        acceptor.close()
        for connection in connections:
            connection.abort()

    port = acceptor.get_port()
    try:
        yield SSHServer("127.0.0.1", port, getpass.getuser(), _client_options(place, port), kill)
    finally:
        kill()
        await acceptor.wait_closed()
        for session in sessions:
            await session.ended()


class _Session(asyncssh.SSHServerSession[bytes]):
    """Runs one command, as a child with three pipes; when the client goes away, its stdin ends."""

    def __init__(self, zygote: Zygote | None) -> None:
        self._zygote = zygote
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._task: asyncio.Task[None] | None = None
        self._child: asyncio.subprocess.Process | ForkedProcess | None = None
        self._lost = False

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._channel = chan

    def exec_requested(self, command: str) -> bool:
        self._command = command
        return True

    def session_started(self) -> None:
        self._task = asyncio.create_task(self._run())

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._input.put_nowait(data)

    def eof_received(self) -> bool:
        self._input.put_nowait(b"")
        return True

    def signal_received(self, signal: str) -> None:
        self._signal(signal)

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._may_write.set()
        self._input.put_nowait(b"")

    def _signal(self, name: str) -> None:
        if self._child is not None and self._child.returncode is None:
            os.killpg(self._child.pid, signal.Signals[f"SIG{name}"])

    async def _start(self) -> asyncio.subprocess.Process | ForkedProcess:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        if self._command == AGENT and self._zygote is not None and self._zygote.can_run(("-m", MODULE), environ):
            forked = ForkedProcess(self._zygote)
            await forked.start(environ, go="agentcluster-pid $$\n")
            return forked
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", self._command),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environ,
            start_new_session=True,
        )

    async def _run(self) -> None:
        child = self._child = await self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        feeding = asyncio.create_task(self._feed(child.stdin))
        await asyncio.gather(
            self._forward(child.stdout, self._channel.write), self._forward(child.stderr, self._channel.write_stderr)
        )
        if not self._lost:
            self._channel.write_eof()
        code = await child.wait()
        feeding.cancel()
        await asyncio.wait({feeding})
        if isinstance(child, ForkedProcess):
            await child.release()
        if not self._lost:
            if code < 0:
                self._channel.exit_with_signal(signal.Signals(-code).name.removeprefix("SIG"))
            else:
                self._channel.exit(code)

    async def _feed(self, stdin: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await self._input.get():
                stdin.write(data)
                await stdin.drain()
        stdin.close()

    async def _forward(self, reader: asyncio.StreamReader, write: Callable[[bytes], None]) -> None:
        while data := await reader.read(65536):
            await self._may_write.wait()
            if not self._lost:
                write(data)

    async def ended(self) -> None:
        """End the command, if it has not ended by itself, when the test is over."""
        if self._task is not None:
            done, _ = await asyncio.wait({self._task}, timeout=5)
            if not done:
                self._signal("KILL")
            await self._task


@contextlib.asynccontextmanager
async def _serve_openssh(place: Path) -> AsyncIterator[SSHServer]:
    assert SSHD is not None
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd will not start as root without it
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (place / "sshd_config").write_text(_sshd_config(place, port))
    sshd = await asyncio.create_subprocess_exec(
        SSHD, "-D", "-e", "-f", str(place / "sshd_config"), stderr=asyncio.subprocess.PIPE
    )
    assert sshd.stderr is not None
    log: list[str] = []

    def kill() -> None:
        # Its children: one sshd per connection, and below them the commands, which are left to find EOF.
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(sshd.pid)
            for process in (main, *main.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name().startswith("sshd"):
                        process.kill()

    async def listen(until: str | None) -> None:
        assert sshd.stderr is not None
        while line := (await sshd.stderr.readline()).decode(errors="replace"):
            log.append(line.rstrip())
            if until is not None and until in line:
                return
        if until is not None:
            raise RuntimeError(f"sshd does not run: {log}")

    listening = None
    try:
        await asyncio.wait_for(listen(f"listening on 127.0.0.1 port {port}"), 10)
        listening = asyncio.create_task(listen(None))
        yield SSHServer("127.0.0.1", port, getpass.getuser(), _client_options(place, port), kill)
    finally:
        kill()
        await sshd.wait()
        if listening is not None:
            await listening


def _sshd_config(place: Path, port: int) -> str:
    environ = {"PYTHONPATH": str(ROOT), MARK: os.environ[MARK]}
    return "\n".join(
        [
            f"Port {port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {place / 'host_key'}",
            f"AuthorizedKeysFile {place / 'client_key.pub'}",
            f"PidFile {place / 'sshd.pid'}",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxStartups 100",
            "SetEnv " + " ".join(f"{name}={shlex.quote(value)}" for name, value in environ.items()),
            "",
        ]
    )
