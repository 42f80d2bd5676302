"""Standby agents: adopted by one cluster at a time, released however it ends, with TLS and without."""

from __future__ import annotations

import asyncio
import signal
import time
from itertools import pairwise
from typing import Any

import dask
import dask.array as da
import psutil
import pytest
from distributed import Client, wait
from distributed.security import Security

from agentcluster import AgentCluster
from agentcluster.errors import ConfigError, LaunchError, LaunchTimeout
from tests.support.programs import AGENT, Program, Start, gone
from tests.support.waiting import wait_until

QUIET: dict[str, Any] = {
    "scheduler_options": {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"},
    "asynchronous": True,
}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "512MiB"}
ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}

#: A cluster in a process of its own, that says when it is up.
CLUSTER = """
import asyncio, sys
from agentcluster import AgentCluster

async def main():
    options = {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"}
    config = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}
    async with AgentCluster([sys.argv[1]], config=config, scheduler_options=options, asynchronous=True):
        print("cluster is up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def standby(start: Start, *options: str, protocol: str = "tcp") -> tuple[Program, str]:
    """Start a standby agent; return it and where it says that it stands by."""
    agent = start(*AGENT, "--standby", "--listen-address", f"{protocol}://127.0.0.1:0", *options)
    line = await agent.says("Standing by at ")
    return agent, line.rpartition(" ")[2]


def adopting(*addresses: str, config: Any = ONE, **options: Any) -> AgentCluster:
    return AgentCluster(hosts=list(addresses), config=config, **{**QUIET, **options})


async def workerless(agent: Program) -> None:
    """Wait until no worker of the agent runs; its forkserver stays."""
    await wait_until(lambda: [p for p in agent.children() if _listens(p)] == [], 5)
    assert agent.popen.poll() is None, agent.output()


def _listens(process: psutil.Process) -> bool:
    try:
        return any(each.status == psutil.CONN_LISTEN for each in process.net_connections("inet"))
    except psutil.NoSuchProcess:
        return False


async def test_adopt_compute_reprovision_release_adopt(start: Start) -> None:
    agent, address = await standby(start)
    assert [p for p in agent.children() if _listens(p)] == []
    async with adopting(address, config=TWO) as cluster, Client(cluster, asynchronous=True) as client:
        (node,) = cluster.nodes.values()
        assert node["address"] != address, "the port of standby is not the one for the scheduler's calls"
        assert node["address"].startswith("tcp://127.0.0.1:")
        x = da.ones((200, 200), chunks=(100, 100))
        assert await client.compute(x.sum()) == 40000
        kept = client.persist(x + 1)
        await wait(kept)
        uniform = await cluster.reprovision("uniform", {"nthreads": 2, "nworkers": 1, "memory_limit": "512MiB"})
        assert [len(report.new) for report in uniform.nodes.values()] == [1]
        assert [ws.nthreads for ws in cluster.scheduler.workers.values()] == [2]
        assert await client.compute(kept.sum()) == 80000
        await cluster.reprovision("auto-cpu", TWO)
        assert [ws.nthreads for ws in cluster.scheduler.workers.values()] == [1, 1]
        assert {task.state for task in cluster.scheduler.tasks.values()} == {"memory"}
        assert await client.compute(kept.sum()) == 80000
        pids = await processes(client)
        assert {parent for _, parent in pids.values()} <= {agent.pid, *(p.pid for p in agent.children())}
    await workerless(agent)
    assert not any(psutil.pid_exists(pid) for pid, _ in pids.values())
    async with adopting(address) as cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(sum, [1, 2]) == 3
    await workerless(agent)
    agent.popen.send_signal(signal.SIGTERM)
    assert await agent.ended() == 0
    assert "Traceback" not in agent.output()


async def processes(client: Client) -> dict[str, tuple[int, int]]:
    """Return worker address -> its process, and that one's parent."""

    def look() -> tuple[int, int]:
        import os

        return os.getpid(), os.getppid()

    return await client.run(look)


async def test_options_of_the_cluster_end_with_it(start: Start) -> None:
    """And its configuration stays with it: an agent that others started has that of its own host."""
    agent, address = await standby(start, "--resources", "HOST=1")
    with dask.config.set({"distributed.worker.resources": {"CONFIGURED_HERE": 1}}):
        async with adopting(address, worker_options={"resources": {"OURS": 1}}) as cluster:
            (worker,) = cluster.scheduler.workers.values()
            assert worker.resources["OURS"] == 1
            assert "CONFIGURED_HERE" not in worker.resources
    async with adopting(address) as cluster:
        (worker,) = cluster.scheduler.workers.values()
        assert worker.resources["HOST"] == 1
        assert "OURS" not in worker.resources
    await workerless(agent)


async def test_one_cluster_at_a_time(start: Start) -> None:
    agent, address = await standby(start)
    async with adopting(address) as first, Client(first, asynchronous=True) as client:
        before = await processes(client)
        with pytest.raises(LaunchError, match=f"already belongs to the cluster at {first.scheduler_address}"):
            await adopting(address)
        assert await processes(client) == before
        assert await client.submit(sum, [1, 2]) == 3
    async with adopting(address):
        pass
    await workerless(agent)


async def test_two_agents(start: Start) -> None:
    (one, first), (two, second) = await standby(start), await standby(start)
    async with adopting(first, second) as cluster, Client(cluster, asynchronous=True) as client:
        assert len(cluster.nodes) == 2
        parents = {parent for _, parent in (await processes(client)).values()}
        assert len(parents) == 2
    await workerless(one)
    await workerless(two)


async def test_kill_of_the_cluster_releases_the_agent(start: Start) -> None:
    agent, address = await standby(start)
    other = start("-c", CLUSTER, address)
    await other.says("cluster is up", 30)
    other.kill()
    await workerless(agent)

    async def free() -> bool:
        return "was released" in agent.output()

    await wait_until(free, 10)
    async with adopting(address) as cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(sum, [1, 2]) == 3
    await workerless(agent)


async def test_kill_of_the_agent_is_seen(start: Start) -> None:
    agent, address = await standby(start)
    async with adopting(address) as cluster, Client(cluster, asynchronous=True):
        (name,) = cluster.nodes
        tree = agent.kill()
        await gone(tree)
        await wait_until(lambda: cluster.nodes[name]["state"] == "lost", 5)
        assert "connection" in cluster.nodes[name]["problem"]
        await wait_until(lambda: not cluster.scheduler.workers, 5)


async def test_signal_ends_an_adopted_agent(start: Start) -> None:
    agent, address = await standby(start)
    async with adopting(address) as cluster:
        tree = agent.kill(signal.SIGTERM)
        assert await agent.ended() == 0
        await gone(tree)
        await wait_until(lambda: not cluster.scheduler.workers, 5)
    assert "Traceback" not in agent.output()


async def test_cancelled_adoption_releases_the_agent(start: Start) -> None:
    agent, address = await standby(start)
    cluster = adopting(address)
    opening = asyncio.ensure_future(cluster)  # type: ignore[arg-type]
    await agent.says(" registered to: ")
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    await cluster.close()
    await agent.says("was released", 10)
    await workerless(agent)
    async with adopting(address):
        pass


# -- what does not answer ----------------------------------------------------------------------------------------------


async def test_nobody_there() -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"tcp://127\.0\.0\.1:1 .*dask-agent --standby"):
        await adopting("tcp://127.0.0.1:1", launch_timeout=2)
    assert time.monotonic() - began < 15


async def test_not_an_agent() -> None:
    async with AgentCluster(config=ONE, **QUIET) as cluster:
        began = time.monotonic()
        with pytest.raises(LaunchError, match="not an agent"):
            await adopting(cluster.scheduler_address, launch_timeout=5)
        assert time.monotonic() - began < 20


async def test_silent_listener() -> None:
    silent = await asyncio.start_server(lambda reader, writer: _hold(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    try:
        began = time.monotonic()
        with pytest.raises(LaunchTimeout, match=f"127.0.0.1:{port}.* no answer within 2 s"):
            await adopting(f"tcp://127.0.0.1:{port}", launch_timeout=2)
        assert time.monotonic() - began < 15
    finally:
        silent.close()
        for writer in _held:
            writer.close()
        _held.clear()


_held: list[asyncio.StreamWriter] = []


async def _hold(writer: asyncio.StreamWriter) -> None:
    _held.append(writer)


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of one CA, one certificate and its key."""
    directory = tmp_path_factory.mktemp("tls")
    temporary = Security.temporary()
    files = {}
    for name, field in (("ca", "tls_ca_file"), ("cert", "tls_worker_cert"), ("key", "tls_worker_key")):
        file = directory / f"{name}.pem"
        file.write_text(getattr(temporary, field))
        files[name] = str(file)
    return files


def options(files: dict[str, str]) -> list[str]:
    return ["--tls-ca-file", files["ca"], "--tls-cert", files["cert"], "--tls-key", files["key"]]


def security(files: dict[str, str]) -> Security:
    roles = ("client", "worker", "scheduler")
    pairs = {f"tls_{role}_{kind}": files[kind] for role in roles for kind in ("cert", "key")}
    return Security(tls_ca_file=files["ca"], require_encryption=True, **pairs)


async def test_tls(start: Start, certificates: dict[str, str]) -> None:
    agent, address = await standby(start, *options(certificates), protocol="tls")
    assert address.startswith("tls://")
    async with (
        adopting(address, security=security(certificates)) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        assert await client.submit(sum, [1, 2]) == 3
        assert all(worker.startswith("tls://") for worker in cluster.scheduler.workers)
        await cluster.reprovision("uniform", {"nthreads": 1, "nworkers": 1, "memory_limit": "600MiB"})
        assert await client.submit(sum, [1, 3]) == 4
    await workerless(agent)
    # A worker's own heartbeat may be under way when its scheduler closes, and says so with a traceback.
    lines = agent.output().splitlines()
    found = [before for before, line in pairwise(lines) if line.startswith("Traceback")]
    assert [line for line in found if "during heartbeat" not in line] == []


async def refused(error: type[Exception], match: str, **arguments: Any) -> None:
    """Check that the cluster says one thing within its deadline."""
    began = time.monotonic()
    with pytest.raises(error, match=match):
        await adopting(arguments.pop("address"), launch_timeout=3, **arguments)
    assert time.monotonic() - began < 18


async def test_tls_mismatch(start: Start, certificates: dict[str, str]) -> None:
    encrypted, tls = await standby(start, *options(certificates), protocol="tls")
    plain, tcp = await standby(start)
    ours = security(certificates)
    await refused(ConfigError, "has credentials of its own", address=tls)
    await refused(LaunchError, "speaks TLS and this cluster does not", address=tls, security=False)
    await refused(LaunchError, "TLS|tls", address=tls.replace("tls://", "tcp://"))
    await refused((ConfigError, LaunchError), "encrypt", address=tcp, security=ours)  # type: ignore[arg-type]
    await refused(LaunchError, "TLS|tls", address=tcp.replace("tcp://", "tls://"), security=ours)
    await refused(ConfigError, "temporary", address=tcp, security=True)
    await refused(LaunchError, "(?i)certificate", address=tls, security=Security.temporary())
    for agent in (encrypted, plain):
        await workerless(agent)
        assert agent.popen.poll() is None
    async with adopting(tls, security=ours), adopting(tcp):
        pass
