"""``dask-agent`` under systemd: the units of docs/deploy/systemd.rst, and what it says to systemd's notify socket.

No systemd runs here: the test has the socket that systemd would have, and starts what the units' ``ExecStart`` says.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from agentcluster import AgentCluster
from agentcluster.agent.systemd import Notifier
from agentcluster.cli.credentials import write
from agentcluster.config import Config
from tests.support.programs import AGENT, ROOT, Program, Start, start_scheduler
from tests.support.waiting import wait_until

EXAMPLES = ROOT / "docs" / "examples"
UNITS = ("dask-agent.service", "dask-agent-standby.service")

#: Seconds from systemd's STOPPING to the end of the process; the data is moved in between.
END = 30.0

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's"),
]


class NotifySocket:
    """The socket that systemd listens at."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def look(self) -> list[dict[str, str]]:
        """Return all messages that came so far."""
        while True:
            try:
                text = self._socket.recv(4096).decode()
            except BlockingIOError:
                return self.messages
            self.messages.append(dict(line.split("=", 1) for line in text.split("\n")))

    async def hears(self, state: str, timeout: float = 30.0) -> str:
        """Return the status that came with a state, once it is there."""

        def status() -> str | None:
            return next((each["STATUS"] for each in self.look() if each.get(state) == "1"), None)

        return str(await wait_until(status, timeout))


@pytest.fixture(params=["abstract", "file"])
def notify(request: pytest.FixtureRequest) -> Iterator[NotifySocket]:
    # A socket's path may have 107 characters; pytest's own directories may be longer.
    with tempfile.TemporaryDirectory(prefix="agentcluster-", dir="/tmp") as directory:
        abstract = f"@agentcluster-test-{uuid.uuid4().hex}"
        listener = NotifySocket(abstract if request.param == "abstract" else f"{directory}/notify")
        with contextlib.closing(listener):
            yield listener


def setting(unit: str, key: str) -> str:
    """Return the value of a key in a unit."""
    pairs = [line.partition("=") for line in (EXAMPLES / unit).read_text().splitlines()]
    [value] = [value for found, _, value in pairs if found == key]
    return value


def command(unit: str, replaced: dict[str, str]) -> list[str]:
    """Return the arguments of a unit's ``dask-agent``, as systemd would expand them."""
    line = setting(unit, "ExecStart")
    for old, new in replaced.items():
        assert old in line
        line = line.replace(old, new)
    program, *arguments = shlex.split(line)
    assert program == "/opt/dask/bin/dask-agent"
    return arguments


def told(agent: Program) -> list[str]:
    """Name the processes below an agent that could speak for it."""
    found = []
    for process in agent.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "NOTIFY_SOCKET" in process.environ():
                found.append(" ".join(process.cmdline()))
    return found


async def test_with_a_scheduler(start: Start, tmp_path: Path, notify: NotifySocket) -> None:
    _, address = await start_scheduler(start, tmp_path)
    arguments = command(UNITS[0], {"tcp://scheduler:8786": address, "%H": "blue", "%C": str(tmp_path)})
    async with Client(address, asynchronous=True) as client:
        agent = start(*AGENT, *arguments, env={"NOTIFY_SOCKET": notify.address})
        status = await notify.hears("READY")
        # Not waited for: who is told that the unit has started can compute.
        workers = list((await client.scheduler.identity())["workers"])
        assert len(workers) == 1
        assert status == f"Node blue of {address}, began with auto-cpu"
        assert await client.submit(sum, [1, 2]) == 3
        assert await client.run(lambda: os.environ.get("NOTIFY_SOCKET")) == dict.fromkeys(workers)
        assert told(agent) == []
        agent.popen.send_signal(signal.SIGTERM)
        assert await notify.hears("STOPPING") == "Node blue ends"
        assert await agent.ended(END) == 0
    assert [sorted(message) for message in notify.look()] == [["READY", "STATUS"], ["STATUS", "STOPPING"]]


async def test_standby(start: Start, tmp_path: Path, notify: NotifySocket) -> None:
    folder = tmp_path / "credentials"
    write(folder, days=365)
    arguments = command(UNITS[1], {"tls://:8790": "tls://127.0.0.1:0", "/etc/dask": str(folder), "%C": str(tmp_path)})
    agent = start(*AGENT, *arguments, env={"NOTIFY_SOCKET": notify.address})
    status = await notify.hears("READY")
    address = status.split()[2]
    assert status == f"Listens at {address} for a cluster to adopt it"
    config = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}
    options: dict[str, Any] = {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"}
    async with (
        AgentCluster(
            [address], config=config, security=folder, scheduler_options=options, asynchronous=True
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert await client.submit(os.environ.get, "NOTIFY_SOCKET", pure=False) is None
        assert told(agent) == []
    agent.popen.send_signal(signal.SIGTERM)
    await notify.hears("STOPPING")
    assert await agent.ended(END) == 0
    assert len(notify.look()) == 2


async def test_not_ready_without_a_scheduler(start: Start, notify: NotifySocket) -> None:
    arguments = ("tcp://127.0.0.1:1", "--death-timeout", "1")
    agent = start(*AGENT, *arguments, env={"NOTIFY_SOCKET": notify.address})
    # Restart=on-failure starts it again.
    assert await agent.ended(END) == 1
    assert [message for message in notify.look() if "READY" in message] == []


async def test_unknown_option(start: Start, notify: NotifySocket) -> None:
    agent = start(*AGENT, "tcp://127.0.0.1:1", "--nmworkers", "2", env={"NOTIFY_SOCKET": notify.address})
    # Starting it again would not help.
    assert str(await agent.ended(END)) == setting(UNITS[0], "RestartPreventExitStatus")
    assert notify.look() == []


async def test_retired_by_a_client(start: Start, tmp_path: Path, notify: NotifySocket) -> None:
    _, address = await start_scheduler(start, tmp_path)
    async with Client(address, asynchronous=True) as client:
        agent = start(*AGENT, address, "--name", "blue", env={"NOTIFY_SOCKET": notify.address})
        await notify.hears("READY")
        await client.retire_workers()
        await notify.hears("STOPPING")
        # Restart=on-failure leaves a node alone that was made to go.
        assert await agent.ended(END) == 0


async def test_end_of_the_scheduler(start: Start, tmp_path: Path, notify: NotifySocket) -> None:
    scheduler, address = await start_scheduler(start, tmp_path)
    agent = start(*AGENT, address, env={"NOTIFY_SOCKET": notify.address})
    await notify.hears("READY")
    scheduler.kill()
    await notify.hears("STOPPING")
    assert await agent.ended(END) == 0


async def test_nobody_at_the_socket(start: Start, tmp_path: Path) -> None:
    nowhere = {"NOTIFY_SOCKET": str(tmp_path / "no-such-socket")}
    agent = start(*AGENT, "--standby", "--listen-address", "tcp://127.0.0.1:0", env=nowhere)
    await agent.says("Standing by at ", 30)
    agent.popen.send_signal(signal.SIGTERM)
    assert await agent.ended(END) == 0
    assert "Traceback" not in agent.output()


def test_messages(notify: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", notify.address)
    say = Notifier()
    assert "NOTIFY_SOCKET" not in os.environ
    say("it\ngoes READY=1")
    say("up", state="READY")
    assert notify.look() == [{"STATUS": "it goes READY=1"}, {"STATUS": "up", "READY": "1"}]
    Notifier()("of a process that systemd did not start", state="READY")
    assert len(notify.look()) == 2


def fill(sender: socket.socket, address: str) -> int:
    """Send until nothing more goes; return how much went."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.sendto(b"STATUS=full", address)
            sent += 1
    return sent


def test_a_socket_that_nobody_reads(notify: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", notify.address)
    say = Notifier()
    address = "\0" + notify.address[1:] if notify.address.startswith("@") else notify.address
    with contextlib.ExitStack() as stack:
        # A sender's own buffer may be full before the listener's queue is.
        for _ in range(1000):
            sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            sender.setblocking(False)
            if fill(sender, address) == 0:
                break
        else:
            pytest.fail("the queue has no end")
        say("too much")
    assert {"STATUS": "too much"} not in notify.look()
    say("again")
    assert notify.look()[-1] == {"STATUS": "again"}


def verify(unit: Path) -> str:
    """Return what systemd has against a unit; this only reads it."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout + done.stderr + ("" if done.returncode == 0 else f"exit code {done.returncode}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_unit(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    # It wants to see the program.
    text = (EXAMPLES / name).read_text().replace("/opt/dask/bin/dask-agent", sys.executable)
    unit.write_text(text)
    assert verify(unit) == ""
    unit.write_text(text.replace("KillMode=mixed", "KillMode=mixd"))
    assert "mixd" in verify(unit)


@pytest.mark.parametrize("name", UNITS)
def test_time_for_the_data(name: str) -> None:
    """Moving data, stopping workers and killing them fit into what systemd waits after SIGTERM."""
    settings = Config.load()
    assert float(setting(name, "TimeoutStopSec")) >= 3 * settings.stop_timeout + 15
    assert float(setting(name, "TimeoutStartSec")) > 2 * settings.start_timeout
    assert setting(name, "KillMode") == "mixed"
    assert setting(name, "Type") == "notify"
    assert setting(name, "Restart") == "on-failure"
