"""distributed's SSHCluster with agents in place of nannies, against real SSH servers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, SpecCluster, SSHCluster

from tests.support.managed import HOST, SCHEDULER, SHAPE, Work, names, reprovision, workers
from tests.support.programs import gone
from tests.support.ssh_servers import SSHServer
from tests.support.waiting import wait_until


@asynccontextmanager
async def cluster_on(server: SSHServer, **options: Any) -> AsyncIterator[tuple[SpecCluster, Client]]:
    """Open an SSHCluster: a scheduler and two agents, each a command on the server."""
    async with (
        SSHCluster(
            [server.host] * 3,
            connect_options={**server.connect_options, "port": server.port, "username": server.username},
            scheduler_options=SCHEDULER,
            worker_options={**HOST, **SHAPE, **options},
            worker_class="agentcluster.Agent",
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        yield cluster, client


async def count(client: Client, number: int) -> None:
    """Wait until the scheduler has so many workers."""

    async def look() -> bool:
        return len(await names(client)) == number

    await wait_until(look, 20)


def commands() -> list[psutil.Process]:
    """Return the agents' processes, which the server runs below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            program, *arguments = process.cmdline() or [""]
        except psutil.NoSuchProcess:
            continue
        if "python" in program and "distributed.cli.dask_spec" in arguments and "agentcluster.Agent" in arguments[-1]:
            found.append(process)
    return found


async def test_reprovision_under_load_then_retire(server: SSHServer, tmp_path: Path) -> None:
    dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"})
    async with cluster_on(server) as (cluster, client):
        await count(client, 2)
        for worker in (await workers(client)).values():
            assert (worker["nthreads"], worker["memory_limit"]) == (1, 300 * 2**20)
        work = Work(client, tmp_path / "work")
        await work.begin()
        for nworkers in (2, 1, 2):
            await reprovision(client, nworkers)
            assert len(await names(client)) == 2 * nworkers
        await work.all_there()
        assert set(cluster.workers) == {0, 1}

        # SSHCluster gives its workers no names, and kills their commands; who wants their data moves it before.
        nodes = await client.scheduler.get_nodes()
        agents = commands()
        assert len(nodes) == len(agents) == 2
        await client.retire_workers(names=sorted(nodes[max(nodes)]["plan"]))
        await wait_until(lambda: len(commands()) == 1, 20)
        await count(client, 2)
        await work.all_there()
    await gone(agents)


async def test_scale_down_ends_one_host(server: SSHServer, request: pytest.FixtureRequest) -> None:
    if "sshd" in request.node.name.partition("[")[2] and os.geteuid() == 0:
        pytest.skip("OpenSSH's sshd passes no signal on to commands of root; dask's own nannies stay there too")
    async with cluster_on(server) as (cluster, client):
        await count(client, 2)
        agents = commands()
        assert len(agents) == 2
        await reprovision(client, 2)
        cluster.scale(1)
        await wait_until(lambda: len(commands()) == 1, 20)
        await count(client, 2)
        assert len(cluster.workers) == 1
        assert await client.submit(sum, [1, 2]) == 3
    await gone(agents)


async def test_two_agents_on_each_host(server: SSHServer, tmp_path: Path) -> None:
    async with cluster_on(server, n_workers=2) as (cluster, client):
        await count(client, 4)
        work = Work(client, tmp_path / "work")
        await work.begin()
        await reprovision(client, 2)
        await count(client, 8)
        await work.all_there()
        assert set(cluster.workers) == {0, 1}


async def test_agents_that_cannot_start(server: SSHServer) -> None:
    with pytest.raises(Exception, match="Worker failed to start"):
        async with cluster_on(server, mode="auto-cqu"):
            pass
