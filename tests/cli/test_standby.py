"""An agent in standby: who may adopt it, what a stranger gets, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client
from distributed.comm.core import CommClosedError, connect
from distributed.utils import get_ip

from agentcluster import AgentCluster
from agentcluster.cli import standby as module
from agentcluster.cli.standby import Standby
from agentcluster.errors import ConfigError, LaunchError
from agentcluster.launch import handshake
from agentcluster.launch.handshake import Channel, cluster_side, make_secret, read_secret, secret_file
from agentcluster.launch.protocol import Settings
from agentcluster.wire import pickled, spoken
from tests.support.plugin import SCHEDULER
from tests.support.programs import AGENT, Start
from tests.support.waiting import wait_until

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}


@pytest.fixture(autouse=True)
def own_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A secret of each test, which nobody has made yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))


def adopting(address: str, **options: Any) -> AgentCluster:
    return AgentCluster(hosts=[address], config=ONE, scheduler_options=SCHEDULER, asynchronous=True, **options)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


class Trace:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@asynccontextmanager
async def to(address: str) -> AsyncIterator[Channel]:
    channel = Channel(*await asyncio.open_connection("127.0.0.1", port_of(address)))
    try:
        yield channel
    finally:
        await channel.close()


# -- where it listens --------------------------------------------------------------------------------------------------


async def test_without_tls_it_listens_on_this_machine_alone(start: Start) -> None:
    agent = start(*AGENT, "--standby")
    await agent.says("Standing by at tcp://127.0.0.1:")
    (listening,) = [c for c in psutil.Process(agent.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening.laddr.ip == "127.0.0.1"
    path = secret_file()
    await agent.says(f"the secret in {path}")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["tcp://0.0.0.0:0", "tcp://:0", f"tcp://{get_ip()}:0"])
async def test_elsewhere_it_wants_tls(start: Start, where: str) -> None:
    agent = start(*AGENT, "--standby", "--listen-address", where)
    assert await agent.ended() == 1
    (said,) = [line for line in agent.output().splitlines() if line.startswith("dask-agent: ")]
    assert "is open to others" in said
    assert "--credentials DIR" in said
    assert "--insecure" in said
    assert not secret_file().exists()


async def test_insecure_by_name(start: Start) -> None:
    agent = start(*AGENT, "--standby", "--listen-address", f"tcp://{get_ip()}:0", "--insecure")
    address = (await agent.says("Standing by at ")).rpartition(" ")[2]
    lines = [line for line in agent.output().splitlines() if "--insecure" in line]
    assert len(lines) == 1
    assert f"can run any code as user id {os.getuid()}" in lines[0]
    with pytest.raises(ConfigError, match="without encryption"):
        await adopting(address)
    async with adopting(address, security=False) as cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(sum, [1, 2]) == 3


def test_insecure_is_about_standby(start: Start) -> None:
    agent = start(*AGENT, "tcp://127.0.0.1:1", "--insecure")
    assert agent.popen.wait(20) == 1
    assert "--insecure cannot be given without --standby" in agent.output()


# -- strangers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def standing() -> AsyncIterator[Standby]:
    standby = await Standby()
    yield standby
    await standby.close()


async def test_a_message_of_dask_runs_nothing(standing: Standby, tmp_path: Path) -> None:
    """What a stranger did: one `adopt` with a pickle among its options."""
    trace = tmp_path / "trace"
    options = pickled(Trace(trace))
    with contextlib.suppress(OSError, CommClosedError):  # dask waits for what the agent does not say, and gives up
        comm = await connect(standing.address, timeout=1)
        await comm.write({"op": "adopt", "scheduler": "tcp://127.0.0.1:1", "options": options, **spoken()})
    async with to(standing.address) as channel:
        await channel.send({"op": "adopt", "options": options, **spoken()})
        await channel.ended()
    assert not trace.exists()
    assert standing.agent is None


async def test_without_the_secret_nothing_is_read(standing: Standby, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    request = Settings(scheduler="tcp://127.0.0.1:1", options={"x": pickled(Trace(trace))}).encode()
    for secret in (None, b"0" * 64):
        async with to(standing.address) as channel:
            await channel.send({**spoken(), "nonce": "n"})
            answer = await channel.receive()
            assert answer["wanted"] is True
            said = {} if secret is None else {"proof": "0" * 64}
            await channel.send({"digest": handshake._digest(request), **said})
            await channel.send_line(request)
            await channel.ended()
    assert not trace.exists()
    assert standing.agent is None


async def test_what_was_heard_is_of_no_use(standing: Standby) -> None:
    """A listener heard a whole conversation, and says the cluster's part again."""
    secret = read_secret(secret_file())
    heard: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            heard.append(data)
            writer.write(data)
        writer.close()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_agent = await asyncio.open_connection("127.0.0.1", port_of(standing.address))
        back = asyncio.ensure_future(_copy(there, writer))
        await forward(reader, to_agent)
        await back

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        channel = Channel(*await asyncio.open_connection("127.0.0.1", port))
        request = Settings(scheduler="tcp://127.0.0.1:1").encode()
        # The listener is not found out by the port only because this cluster is told the agent's own.
        await cluster_side(channel, secret, request, port=port_of(standing.address), there="it")
        answer = json.loads(await channel.receive_line(65536))
        assert "refused" in answer, "it was let in, and there is no such scheduler"
        await channel.close()
        async with to(standing.address) as again:
            again._writer.write(b"".join(heard))
            await again.receive()  # the nonce of this conversation
            assert await again._reader.read() == b""
    assert standing.agent is None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def test_who_stands_between_is_found_out(standing: Standby) -> None:
    """A process of another user, at a port of its own, that passes all on to the agent."""

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_agent = await asyncio.open_connection("127.0.0.1", port_of(standing.address))
        await asyncio.gather(_copy(reader, to_agent), _copy(there, writer))

    async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(LaunchError, match=r"it does not know the secret in .*, so it is another user's"):
            await adopting(address)
    assert standing.agent is None


async def test_who_has_the_secret_adopts_it(standing: Standby) -> None:
    async with adopting(standing.address) as cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(sum, [1, 2]) == 3
        assert standing.agent is not None
    await wait_until(lambda: standing.agent is None)


async def test_another_user_is_told_what_is_missing(standing: Standby, tmp_path: Path) -> None:
    with dask.config.set({"agentcluster.secret-file": str(tmp_path / "of another")}):
        with pytest.raises(LaunchError, match=r"it wants proof of a secret, and there is none in .*of another; run"):
            await adopting(standing.address)
        make_secret(tmp_path / "of another")
        with pytest.raises(LaunchError, match="it does not know the secret"):
            await adopting(standing.address)
    assert standing.agent is None


async def test_another_protocol_is_told_the_versions(standing: Standby) -> None:
    async with to(standing.address) as channel:
        await channel.send({"protocol": 99, "version": "9.9", "nonce": "n"})
        answer = await channel.receive()
    assert "agentcluster 9.9 with protocol 99" in answer["refused"]
    assert "upgrade agentcluster where the agent at" in answer["refused"]


# -- many, and none that says anything ---------------------------------------------------------------------------------


async def test_idle_connections_are_few_and_short(standing: Standby) -> None:
    assert standing._door is not None
    standing._door.handshakes.seconds = 0.5
    connections = [socket.create_connection(("127.0.0.1", port_of(standing.address))) for _ in range(100)]
    try:
        await wait_until(lambda: len(standing._serving) == module.MOST_OF_ONE)
        await wait_until(lambda: not standing._serving)
    finally:
        for connection in connections:
            connection.close()
    await test_who_has_the_secret_adopts_it(standing)


async def test_who_holds_connections_keeps_nobody_out(standing: Standby) -> None:
    idle = [socket.create_connection(("127.0.0.1", port_of(standing.address))) for _ in range(20)]
    try:
        await test_who_has_the_secret_adopts_it(standing)
    finally:
        for connection in idle:
            connection.close()


async def test_a_long_line_is_not_kept(standing: Standby) -> None:
    async with to(standing.address) as channel:
        channel._writer.write(b"x" * (handshake.SHORT + 70_000))
        await channel.ended()
    assert standing.agent is None


async def test_many_strangers_are_one_record(standing: Standby, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(50):
        async with to(standing.address) as channel:
            channel._writer.write(pickle.dumps(number) + b"\n\x1b[31m\n")
            await channel.ended()
    records = [record for record in caplog.records if record.name == module.__name__]
    assert len(records) == 1
    assert "Refused 1 connections that no cluster made, the last from 127.0.0.1" in records[0].getMessage()


# -- the secret --------------------------------------------------------------------------------------------------------


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    assert read_secret(path) is None
    secret = make_secret(path)
    assert make_secret(path) == read_secret(path) == secret
    assert [each.name for each in path.parent.iterdir()] == ["secret"]
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_know_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    make_secret(path)
    path.chmod(mode)
    for use in (read_secret, make_secret):
        with pytest.raises(ConfigError, match=f"has mode {mode:04o} .* chmod 600 it"):
            use(path)


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    with pytest.raises(ConfigError, match="has no secret of 64 characters"):
        make_secret(path)
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        make_secret(path / "below")
    with pytest.raises(ConfigError, match=r"cannot be made: .*; set agentcluster.secret-file to a path in a folder"):
        make_secret(Path("/proc/nowhere/secret"))
