"""``dask-agent`` as dask-gateway's ``worker_cmd``: a real server with its local backend and proxy, TLS on."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, Future
from distributed.comm import connect
from distributed.comm.addressing import get_address_host_port

from tests.support.census import MARK
from tests.support.programs import AGENT, SCHEDULER, Program, Start
from tests.support.waiting import wait_until

dask_gateway = pytest.importorskip("dask_gateway", reason="needs dask-gateway (extra 'deploy')")
pytest.importorskip("dask_gateway_server", reason="needs dask-gateway-server[local] (extra 'deploy')")
pytest.importorskip("sqlalchemy", reason="needs dask-gateway-server[local], with sqlalchemy (extra 'deploy')")

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(180)]

CONFIG = """
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.DaskGateway.address = "127.0.0.1:{api}"
c.Proxy.address = "127.0.0.1:{proxy}"
c.UnsafeLocalBackend.clusters_directory = {directory!r}
c.UnsafeLocalBackend.inherited_environment = ["PATH", "PYTHONPATH", {mark!r}]
c.UnsafeLocalBackend.cluster_heartbeat_period = {heartbeat}
# However busy the machine is: what this test is about is not whether a scheduler answers in time.
c.UnsafeLocalBackend.cluster_heartbeat_timeout = 120
c.UnsafeLocalBackend.worker_start_timeout = 120
c.ClusterConfig.adaptive_period = 0.5
c.ClusterConfig.scheduler_cmd = {scheduler!r}
c.ClusterConfig.worker_cmd = {worker!r}
"""

#: Seconds between two looks of the gateway at its workers; 15 by default.
HEARTBEAT = 1
#: Seconds that a task of the load takes: longer than a heartbeat, so that the gateway looks in the middle of swaps.
LONG = 1.5

ONE_WIDE = ("uniform", {"nworkers": 1, "nthreads": 2, "memory_limit": "512MiB"})
ONE = ("auto-cpu", {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"})
TWO = ("auto-cpu", {"nworkers": 2, "nthreads": 1, "memory_limit": "512MiB"})
THREE = ("auto-cpu", {"nworkers": 3, "nthreads": 1, "memory_limit": "512MiB"})


@pytest.fixture(scope="module", autouse=True)
def threads_of_dask_gateway() -> None:
    """Have the threads there before the first test that dask-gateway keeps for the life of the process."""
    executor = dask_gateway.comm.GatewayConnector._executor
    together = threading.Barrier(executor._max_workers)
    for waiting in [executor.submit(together.wait, 10) for _ in range(executor._max_workers)]:
        waiting.result()


@dataclass
class Server:
    """A gateway that runs."""

    program: Program
    address: str
    directory: Path

    def connect(self) -> Any:
        return dask_gateway.Gateway(self.address, asynchronous=True)

    async def answers(self) -> bool:
        """Whether the server can be reached through its proxy, which learns of it a little later."""
        async with self.connect() as gateway:
            try:
                return bool(await gateway.get_versions())
            except (OSError, ValueError):
                return False

    def agents(self) -> dict[int, psutil.Process]:
        """Return the processes that the gateway started as workers."""
        return {p.pid: p for p in psutil.Process(self.program.pid).children() if AGENT[1] in _command(p)}

    def names(self) -> list[str]:
        """Return the names that the gateway gave to workers, oldest first."""
        return [line.split("Created worker ")[1].split()[0] for line in self._lines("Created worker ")]

    def stopped(self) -> list[str]:
        """Return the names of the workers that the gateway stopped, or took for stopped."""
        return [line.split("Stopping worker ")[1].rstrip(".") for line in self._lines("Stopping worker ")]

    async def heartbeats(self, more: int = 3) -> None:
        """Wait until the gateway has heard of the cluster some more times."""
        until = len(self._lines(" heartbeat [")) + more
        await wait_until(lambda: len(self._lines(" heartbeat [")) >= until, 60)

    def _lines(self, text: str) -> list[str]:
        return [line for line in self.program.output().splitlines() if text in line]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at, below those that systems give to whoever asks for any."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


@pytest.fixture
async def server(start: Start, tmp_path: Path) -> AsyncIterator[Server]:
    api, proxy = free_ports(2)
    directory = tmp_path / "clusters"
    directory.mkdir()
    file = tmp_path / "gateway.py"
    file.write_text(
        CONFIG.format(
            api=api,
            proxy=proxy,
            directory=str(directory),
            mark=MARK,
            heartbeat=HEARTBEAT,
            scheduler=[sys.executable, *SCHEDULER],
            worker=[sys.executable, *AGENT],
        )
    )
    program = start("-m", "dask_gateway_server", "-f", str(file))
    found = Server(program, f"http://127.0.0.1:{proxy}", directory)
    await program.says("Dask-Gateway server started", 60)
    await wait_until(found.answers, 30)
    yield found
    program.popen.send_signal(signal.SIGTERM)
    assert await program.ended(60) == 0
    assert list(directory.iterdir()) == []


@asynccontextmanager
async def cluster_of(server: Server, workers: int) -> AsyncIterator[tuple[Any, Client]]:
    """Yield a cluster of the gateway with so many workers, and a client; shut it down at the end."""
    async with server.connect() as gateway:
        cluster = await gateway.new_cluster()
        try:
            async with cluster.get_client() as client:
                await cluster.scale(workers)
                await client.wait_for_workers(workers, timeout=60)
                yield cluster, client
        finally:
            await cluster.shutdown()


async def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """Return name -> what the scheduler knows of the worker."""
    found = (await client.scheduler.identity(n_workers=-1))["workers"]
    return {str(worker["name"]): worker for worker in found.values()}


async def wait_for_count(client: Client, count: int, timeout: float = 60) -> dict[str, dict[str, Any]]:
    async def there() -> dict[str, dict[str, Any]] | None:
        found = await workers_of(client)
        return found if len(found) == count else None

    found: dict[str, dict[str, Any]] = await wait_until(there, timeout)
    return found


async def reprovision(client: Client, mode: tuple[str, Mapping[str, Any]]) -> None:
    report = await client.scheduler.reprovision_nodes(mode=mode[0], config=mode[1])
    assert {node["outcome"] for node in report["nodes"].values()} == {"changed"}


class Load:
    """Data that only this client can give again, and tasks that run; all have to be there at the end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.scattered: list[Future[Any]] = []
        self.tasks: list[Future[Any]] = []

    async def begin(self) -> Load:
        self.scattered = await self.client.scatter([bytes([i]) * 10_000 for i in range(50)], hash=False)
        self.more(8)
        return self

    def more(self, count: int) -> None:
        """Submit tasks."""
        first = len(self.tasks)
        self.tasks += self.client.map(slow(LONG), range(first, first + count), pure=False)

    async def check(self) -> None:
        """Compare all with what it is to be."""
        found = await asyncio.wait_for(self.client.gather([*self.scattered, *self.tasks]), 90)
        assert found == [*(bytes([i]) * 10_000 for i in range(50)), *(i**2 for i in range(len(self.tasks)))]


def slow(seconds: float) -> Callable[[int], int]:
    """Return a task; what is defined in here needs no test module where it runs."""

    def square(x: int) -> int:
        import time

        time.sleep(seconds)
        return x**2

    return square


async def test_reprovision(server: Server) -> None:
    async with cluster_of(server, 2) as (cluster, client):
        names = server.names()
        assert sorted(await workers_of(client)) == sorted(names)
        agents = server.agents().keys()
        assert len(agents) == 2

        load = await Load(client).begin()
        await reprovision(client, ONE_WIDE)
        load.more(8)
        await reprovision(client, ONE)
        await load.check()

        # Nobody told the gateway; to it these are the workers that it started, and it keeps them.
        await server.heartbeats()
        found = await workers_of(client)
        assert sorted(found) == sorted(names)
        assert {worker["memory_limit"] for worker in found.values()} == {512 * 2**20}
        assert server.agents().keys() == agents
        assert (server.names(), server.stopped()) == (names, [])

        # And it goes on to scale them.
        await cluster.scale(1)
        [left] = await wait_for_count(client, 1)
        await wait_until(lambda: len(server.agents()) == 1, 30)
        assert left in names
        await wait_until(lambda: server.stopped() == [name for name in names if name != left], 30)
        await load.check()

        await cluster.scale(2)
        await client.wait_for_workers(2, timeout=60)
        await server.heartbeats()
        assert sorted(await workers_of(client)) == sorted([left, server.names()[-1]])
        assert len(server.names()) == 3
        await load.check()


async def test_more_workers_than_the_gateway_asked_for(server: Server) -> None:
    async with cluster_of(server, 2) as (cluster, client):
        names = server.names()
        load = await Load(client).begin()
        await reprovision(client, TWO)
        found = await wait_for_count(client, 4)
        assert found.keys() > set(names)
        await server.heartbeats(5)
        assert (await workers_of(client)).keys() == found.keys()
        assert (server.names(), server.stopped()) == (names, [])
        await load.check()

        # What it counts are hosts now: one less is a whole one less, one more is one more. The workers that it does not
        # know have the least to move, so they would be the first to go.
        heavy = [await client.scatter(bytes(10**6), workers=[name], hash=False) for name in names]
        await cluster.scale(1)
        await wait_for_count(client, 2)
        await wait_until(lambda: len(server.agents()) == 1, 30)
        await server.heartbeats()
        assert len(await workers_of(client)) == 2
        assert len(server.stopped()) == 1
        assert await client.gather(heavy) == [bytes(10**6)] * 2
        await load.check()
        await cluster.scale(3)
        await wait_until(lambda: len(server.names()) == 4, 60)
        await wait_until(lambda: _all_there(client, server), 60)
        await server.heartbeats()
        assert len(server.agents()) == 3
        assert (len(server.names()), len(server.stopped())) == (4, 1)
        await load.check()


async def _all_there(client: Client, server: Server) -> bool:
    """Whether every worker that the gateway wants has registered under the name that it gave."""
    return set(server.names()) - set(server.stopped()) <= (await workers_of(client)).keys()


async def test_nothing_runs_and_the_names_stay(server: Server) -> None:
    async with cluster_of(server, 2) as (_, client):
        names = server.names()
        agents = server.agents().keys()
        await reprovision(client, ("none", {}))
        await server.heartbeats()
        assert sorted(await workers_of(client)) == sorted(names)
        assert {node["mode"] for node in (await client.scheduler.get_nodes()).values()} == {"none"}
        assert server.stopped() == []

        waiting = client.submit(pow, 7, 2, pure=False)
        await reprovision(client, TWO)
        assert await asyncio.wait_for(waiting, 60) == 49
        await server.heartbeats()
        assert set(names) < (await workers_of(client)).keys()
        assert server.agents().keys() == agents
        assert (server.names(), server.stopped()) == (names, [])


@pytest.mark.parametrize("mode", [ONE_WIDE, THREE], ids=["one-worker", "three-workers"])
async def test_adapt(server: Server, mode: tuple[str, Mapping[str, Any]]) -> None:
    async with cluster_of(server, 1) as (cluster, client):
        await reprovision(client, mode)
        scattered = await client.scatter(list(range(50)), hash=False)
        await cluster.adapt(minimum=1, maximum=2)
        tasks = client.map(slow(LONG), range(30), pure=False)
        await wait_until(lambda: len(server.names()) == 2, 60)
        await wait_until(lambda: _all_there(client, server), 60)
        await reprovision(client, (mode[0], {**mode[1], "memory_limit": "600MiB"}))
        assert await asyncio.wait_for(client.gather(tasks), 90) == [i**2 for i in range(30)]
        await wait_until(lambda: len(server.agents()) == 1, 60)
        await wait_for_count(client, mode[1]["nworkers"])
        assert await client.gather(scattered) == list(range(50))
        assert await client.gather(tasks) == [i**2 for i in range(30)]


async def test_shutdown_leaves_nothing(server: Server) -> None:
    async with cluster_of(server, 2) as (_, client):
        await reprovision(client, TWO)
        await wait_for_count(client, 4)
        agents = server.agents().values()
        tree = [*agents, *(child for agent in agents for child in agent.children(recursive=True))]
        assert len(tree) >= 6
        [directory] = server.directory.iterdir()
        said = "\n".join(file.read_text() for file in directory.glob("logs/worker-*.log"))
        assert said.count("Registered to:") >= 2
        assert "error" not in said.lower()
        assert "exception" not in said.lower()
    await wait_until(lambda: not any(process.is_running() for process in tree), 30)
    await wait_until(lambda: not directory.exists(), 30)


async def test_credentials_of_a_worker_are_enough(server: Server) -> None:
    async with cluster_of(server, 1) as (cluster, client):
        await reprovision(client, TWO)
        found = await wait_for_count(client, 2)
        [agent] = server.agents().values()
        told = {key for key in agent.environ() if key.startswith("DASK_DISTRIBUTED__COMM__")}
        tls = "DASK_DISTRIBUTED__COMM__TLS__"
        assert told == {
            "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION",
            *(tls + each for each in ("CA_FILE", "WORKER__KEY", "WORKER__CERT")),
        }
        [node] = (await client.scheduler.get_nodes()).values()
        assert node["address"].startswith("tls://")
        assert await client.scheduler.get_node_logs()  # the scheduler reaches the agent

        # Whatever this host's agent, nannies and workers listen at, less the dashboards.
        ports = {
            connection.laddr.port
            for process in [agent, *agent.children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        } - {worker["services"]["dashboard"] for worker in found.values()}
        assert get_address_host_port(node["address"])[1] in ports
        assert len(ports) >= 5
        given = cluster.security.get_connection_args("client")
        for port in ports:
            comm = await connect(f"tls://127.0.0.1:{port}", **given)
            await comm.close()
            with pytest.raises(ssl.SSLError):
                await _read_without_certificate(port)


async def _read_without_certificate(port: int) -> None:
    """Speak TLS without a client's certificate; that the server refuses it is heard at the first read."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        async with asyncio.timeout(30):
            await reader.read(1)
    finally:
        writer.close()
