"""A cluster's members and what they show of themselves, its logs, its requests, and the scheduler that it joins."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import dask
import pytest
import pytest_asyncio
from distributed import Client, Scheduler
from distributed.core import Status

from agentcluster import AgentCluster, Host, VersionMismatch, dask_setup
from agentcluster.reports import ScaleReport
from agentcluster.wire import PROTOCOL
from tests.support.forked import ForkedHosts
from tests.support.waiting import wait_until

QUIET: dict[str, Any] = {"scheduler_options": {"dashboard": False, "dashboard_address": ":0"}}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}


@pytest_asyncio.fixture
async def cluster(forked: ForkedHosts) -> AsyncIterator[AgentCluster]:
    """One local agent with two workers, and a host in standby."""
    hosts = [*forked(), Host("local", name="more", standby=True)]
    async with AgentCluster(hosts, config=TWO, name="mine", asynchronous=True, **QUIET) as cluster:
        yield cluster


# -- reprs -------------------------------------------------------------------------------------------------------------


async def test_members_say_what_they_are(cluster: AgentCluster) -> None:
    assert re.fullmatch(r"mine\(mine, 'tcp://.*', nodes=1, workers=2, .*\)", repr(cluster))
    assert repr(cluster.rollout) == "<RolloutControl of cluster 'mine': no node swapping>"
    assert repr(cluster.hosts) == "<Hosts: local; in standby more>"
    assert repr(cluster.hosts.reserve) == "<Reserve: in standby more; launched none>"
    assert repr(cluster.view) == "<NodeView: local>"
    assert repr(cluster.display) == "<Display of cluster 'mine': no panel>"
    assert repr(cluster.scaling) == "<Scaling of cluster 'mine': by hand>"
    assert repr(cluster.workers["local"]) == "<Node 'local' on local: running>"
    assert repr(cluster.request(gpu=4)) == "<Request for GPU=4: not held>"
    adaptive = cluster.adapt(minimum=1, maximum=4, gpu=(0, 2), interval="1 minute")
    await wait_until(lambda: adaptive.state == "running")
    assert repr(adaptive) == "<AgentAdaptive: running; workers 1 to 4; gpu 0 to 2>"
    assert repr(cluster.scaling) == f"<Scaling of cluster 'mine': {adaptive!r}>"
    async with cluster.request(cpu=1) as request:
        assert repr(request) == "<Request for CPU=1: held>"
    await cluster.scale(2)
    assert repr(cluster.scaling) == "<Scaling of cluster 'mine': by hand>"


# -- scale -------------------------------------------------------------------------------------------------------------


async def test_scale_reports(cluster: AgentCluster) -> None:
    down = await cluster.scale(1)
    assert isinstance(down, ScaleReport)
    assert (down.asked, down.workers, down.short) == ("scale(1)", 1, None)
    assert [len(down.nodes["local"].old), len(down.nodes["local"].kept)] == [1, 1]
    assert repr(await cluster.scale(1)) == "scale(1): 1 worker, nothing changed"
    up = await cluster.scale(4)
    assert (up.workers, up.launched, up.ended) == (4, ("more",), ())
    assert {name: len(node.new) for name, node in up.nodes.items()} == {"local": 1, "more": 2}
    with pytest.warns(UserWarning, match="room for 4 workers"):
        short = await cluster.scale(99)
    assert (short.workers, short.short) == (4, "scale(99): the nodes have room for 4 workers")
    back = await cluster.scale(1)
    assert (back.workers, back.launched, back.ended) == (1, (), ("more",))


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_a_request_looks_twice_a_second_at_most(forked: ForkedHosts) -> None:
    """Counted where looks arrive, at the scheduler; those of the interval are a minute apart."""
    looks: list[Any] = []
    async with AgentCluster(forked(), config=TWO, asynchronous=True, **QUIET) as cluster:
        assert isinstance(cluster.scheduler, Scheduler)
        adapt_nodes = cluster.scheduler.handlers["adapt_nodes"]

        async def counted(**arguments: Any) -> Any:
            looks.append(arguments["asked"]["requests"])
            return await adapt_nodes(**arguments)

        cluster.scheduler.handlers["adapt_nodes"] = counted
        cluster.adapt(minimum=1, interval="1 minute")
        with pytest.raises(TimeoutError, match="no room for CPU=99 within 3 s"):
            async with cluster.request(cpu=99, timeout=3):
                pass
    assert 2 <= len(looks) <= 7, "one at once, then two a second"
    assert all(each == {"CPU": 99} for each in looks)


# -- logs --------------------------------------------------------------------------------------------------------------


async def test_logs_of_agents_are_as_long_as_configured(forked: ForkedHosts) -> None:
    with dask.config.set({"agentcluster.log.lines": 5}):
        async with (
            AgentCluster(forked(), config={**TWO, "nworkers": 1}, asynchronous=True, **QUIET) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):

            def write() -> None:
                for number in range(20):
                    os.write(1, f"line {number}\n".encode())

            async def last() -> list[str]:
                log = (await cluster.get_logs(cluster=False, scheduler=False, workers=False, agents=True))["local"]
                return str(log).splitlines()

            await client.run(write)

            async def arrived() -> bool:
                return (await last())[-1] == "line 19"

            await wait_until(arrived)
            assert await last() == [f"line {number}" for number in range(15, 20)]


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def strange() -> AsyncIterator[str]:
    """The address of a scheduler whose plugin speaks another protocol."""
    async with Scheduler(host="127.0.0.1", dashboard=False, dashboard_address=":0") as scheduler:
        await dask_setup(scheduler)
        get_provision_mode = scheduler.handlers["get_provision_mode"]

        async def other() -> Any:
            return {**await get_provision_mode(), "protocol": 99, "version": "9.9.9"}

        scheduler.handlers["get_provision_mode"] = other
        yield scheduler.address


async def test_a_scheduler_of_another_version_is_not_joined(strange: str) -> None:
    cluster = AgentCluster(scheduler=strange, asynchronous=True)
    with pytest.raises(VersionMismatch) as caught:
        await cluster
    assert cluster.status is Status.closed
    said = str(caught.value)
    assert f"the scheduler at {strange} has agentcluster 9.9.9 with protocol 99" in said
    assert f"with protocol {PROTOCOL}; upgrade agentcluster where this cluster runs" in said


async def test_a_synchronous_cluster_closes_then_too(strange: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(VersionMismatch, match=r"9\.9\.9"):
        await asyncio.to_thread(AgentCluster, scheduler=strange)
    left = [each for each in set(threading.enumerate()) - before if each.name.startswith("IO loop")]
    assert not left
