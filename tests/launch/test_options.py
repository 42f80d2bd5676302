"""Options of the configuration that launchers use, by their effect."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import dask
import pytest

from agentcluster import AgentCluster, ConfigError
from agentcluster.launch import Host
from agentcluster.launch.local import LocalLauncher
from agentcluster.launch.protocol import Settings
from agentcluster.launch.ssh import SSHLauncher
from tests.support import ssh_servers


@dataclasses.dataclass
class Network:
    """A TCP proxy; while it is `dead` it drops what it receives.

    Attributes
    ----------
    port
        Port that the proxy listens at.
    dropped
        Number of packets of the client that were dropped.
    """

    port: int = 0
    dead: bool = False
    dropped: int = 0


@contextlib.asynccontextmanager
async def network_to(port: int) -> AsyncIterator[Network]:
    network = Network()
    writers: list[asyncio.StreamWriter] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_client: bool) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if network.dead:
                    network.dropped += from_client
                else:
                    writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, back, True), forward(there, writer, False))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        network.port = server.sockets[0].getsockname()[1]
        yield network
        for writer in writers:
            writer.close()


async def test_keepalive_options_end_a_dead_connection(tmp_path: Path) -> None:
    """The interval and the number of unanswered requests are those of the configuration."""
    loop = asyncio.get_running_loop()
    took, requests = {}, {}
    async with ssh_servers.serve("asyncssh", tmp_path) as server:
        for count in (1, 4):
            async with network_to(server.port) as network:
                options = {**server.connect_options, "known_hosts": None}
                host = Host(server.host, user=server.username, port=network.port, connect_options=options)
                with dask.config.set({"agentcluster.ssh": {"keepalive-interval": "300ms", "keepalive-count": count}}):
                    launched = await SSHLauncher(host).launch(Settings(role="scheduler"), timeout=30)
                network.dead = True
                begin = loop.time()
                assert await asyncio.wait_for(launched.wait(), 10) is None
                took[count], requests[count] = loop.time() - begin, network.dropped
                await launched.close(0)
    assert requests[4] - requests[1] == 3
    assert took[4] - took[1] >= 0.6


async def test_options_of_a_host_override_the_configuration(tmp_path: Path) -> None:
    async with ssh_servers.serve("asyncssh", tmp_path) as server, network_to(server.port) as network:
        options = {**server.connect_options, "known_hosts": None, "keepalive_interval": 0.1}
        host = Host(server.host, user=server.username, port=network.port, connect_options=options)
        launched = await SSHLauncher(host).launch(Settings(role="scheduler"), timeout=30)
        network.dead = True
        assert await asyncio.wait_for(launched.wait(), 10) is None
        await launched.close(0)


async def test_log_lines_bound_the_log_of_a_launched_agent() -> None:
    kept = {}
    for lines in (1000, 2):
        with dask.config.set({"agentcluster.log.lines": lines}):
            async with AgentCluster(
                asynchronous=True,
                config={"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"},
                scheduler_options={"dashboard_address": ":0"},
            ) as cluster:
                kept[lines] = str((await cluster.get_logs(agents=True))["local"]).splitlines()
    assert len(kept[1000]) > 2
    assert len(kept[2]) == 2


async def test_a_wrong_option_starts_nothing(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    with (
        dask.config.set({"agentcluster.log.lines": 0}),
        pytest.raises(ConfigError, match=r"agentcluster\.log\.lines is 0, but must be a whole number, 1 or more"),
    ):
        await LocalLauncher(python=str(script)).launch(Settings(), timeout=10)
    assert not (tmp_path / "started").exists()
