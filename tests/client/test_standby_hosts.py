"""Hosts with ``standby=True`` in a real cluster: launched when others are full, let go when they have no workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from agentcluster import AgentCluster, Host
from agentcluster.errors import ConfigError, NodeNotFound
from agentcluster.launch.local import LocalLauncher
from tests.support import ssh_servers
from tests.support.census import children
from tests.support.forked import ForkedLauncher
from tests.support.inprocess import InProcess, here
from tests.support.plugin import SCHEDULER
from tests.support.programs import gone
from tests.support.waiting import wait_until
from tests.support.zygote import Zygote

QUIET: dict[str, Any] = {"asynchronous": True, "scheduler_options": SCHEDULER}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
FAST: dict[str, Any] = {"interval": "50ms", "wait_count": 2, "target_duration": "200ms"}


def extra(name: str) -> InProcess:
    return InProcess(name, standby=True)


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """One node with two workers, and two hosts in standby."""
    return {"hosts": [*here(), extra("b"), extra("c")], "config": TWO}


def plan(cluster: AgentCluster) -> dict[str, int]:
    """Return node -> number of its workers."""
    return {name: len(node["plan"]) for name, node in cluster.nodes.items()}


async def test_scale_launches_as_few_as_it_takes_and_lets_go(cluster: AgentCluster, client: Client) -> None:
    assert plan(cluster) == {"local": 2}
    assert cluster.standby == ("b", "c")
    kept = await client.scatter(list(range(20)), hash=False)
    await cluster.scale(3)
    assert plan(cluster) == {"local": 2, "b": 1}
    assert cluster.standby == ("c",)
    await cluster.scale(6)
    assert plan(cluster) == {"local": 2, "b": 2, "c": 2}
    tree = psutil.Process().children(recursive=True)
    with pytest.warns(UserWarning, match=r"scale\(7\): the nodes have room for 6 workers"):
        await cluster.scale(7)
    with pytest.raises(ConfigError, match=r"scale\(7\): the nodes have room for 6 workers"):
        await cluster.scale(7, strict=True)
    with pytest.raises(ConfigError, match=r"scale\(tpu=1\): no node has workers of the kind 'tpu'"):
        await cluster.scale(tpu=1)
    await cluster.scale(1)
    assert plan(cluster) == {"local": 1}
    assert cluster.standby == ("b", "c")
    with pytest.raises(ConfigError, match=r"scale\(tpu=1\): no node has workers of the kind 'tpu'"):
        await cluster.scale(tpu=1)
    assert cluster.standby == ("b", "c")
    assert sum(each.is_running() for each in tree) < len(tree)
    assert await client.gather(kept) == list(range(20))
    await cluster.scale(nodes=2)
    assert plan(cluster) == {"local": 2, "b": 2}
    await cluster.scale(cores=5)
    assert plan(cluster) == {"local": 2, "b": 2, "c": 1}
    assert await client.gather(kept) == list(range(20))


async def test_adapt_launches_and_lets_go(cluster: AgentCluster, client: Client, slow: Callable[[int], int]) -> None:
    adaptive = cluster.adapt(minimum=1, **FAST)
    futures = client.map(slow, range(120), pure=False)
    await wait_until(lambda: plan(cluster) == {"local": 2, "b": 2, "c": 2}, 30)
    assert await client.gather(futures) == list(range(120))
    del futures
    await wait_until(lambda: plan(cluster) == {"local": 1} and cluster.standby == ("b", "c"), 30)

    async def told() -> bool:  # what was done is told of right after it
        events = [event["adapt"]["decided"] for _, event in await client.get_events("agentcluster") if "adapt" in event]
        decided = [each.decided for each in cluster.adaptive_log()]
        let_go = {name for each in decided if each.startswith("let go of ") for name in each[10:].split(", ")}
        return "launched b, c" in decided and let_go == {"b", "c"} and events == decided

    await wait_until(told, 10)
    adaptive.stop()


async def test_adapt_launches_nobody_for_nothing(
    cluster: AgentCluster, client: Client, slow: Callable[[int], int]
) -> None:
    cluster.adapt(minimum=1, maximum=2, **FAST)
    futures = client.map(slow, range(40), pure=False)
    assert await client.gather(futures) == list(range(40))
    assert cluster.standby == ("b", "c")
    assert not [each for each in cluster.adaptive_log() if "launched" in each.decided]
    # Nobody was seen that has one, and nobody may have one: first one is looked at, then the other.
    cluster.adapt(minimum=1, **FAST)
    future = client.submit(slow, 1, resources={"TPU": 1}, pure=False)
    await wait_until(lambda: [e.decided for e in cluster.adaptive_log() if e.decided[:8] == "launched"][1:], 30)
    await wait_until(lambda: any("no worker has TPU" in each.why for each in cluster.adaptive_log()), 30)
    await wait_until(lambda: cluster.standby == ("b", "c"), 10)
    for _ in range(5):  # looks that launch nothing
        await cluster._adaptive.adapt()
    assert [e.decided for e in cluster.adaptive_log() if e.decided[:8] == "launched"] == ["launched b", "launched c"]
    assert future.status == "pending"


async def test_one_that_was_launched_meanwhile_is_not_launched_again(cluster: AgentCluster) -> None:
    """A look that began before a launch was done may choose the same host."""
    launches: list[tuple[str, ...]] = []

    async def note(names: Sequence[str], failed: Mapping[str, str]) -> None:
        assert not failed
        launches.append(tuple(names))

    for chosen, expected in ((["b"], [("b",)]), (["b"], [("b",)]), (["b", "c"], [("b",), ("c",)])):
        cluster.hosts.launch_soon(chosen, note)
        if cluster.hosts._task is not None:
            await cluster.hosts._task
        assert launches == expected


async def test_a_minimum_that_takes_more_hosts(cluster: AgentCluster) -> None:
    cluster.adapt(minimum=5, **FAST)
    await wait_until(lambda: sum(plan(cluster).values()) == 5, 30)
    assert plan(cluster)["local"] == 2


async def test_nothing_but_standby(slow: Callable[[int], int]) -> None:
    async with (
        AgentCluster(hosts=[extra("a"), extra("b")], config=TWO, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert plan(cluster) == {}
        assert cluster.standby == ("a", "b")
        await cluster.scale(1)
        assert plan(cluster) == {"a": 1}
        await cluster.scale(0)
        assert plan(cluster) == {}
        cluster.adapt(**FAST)
        assert await client.submit(slow, 7) == 7
        await wait_until(lambda: plan(cluster) == {}, 30)


async def test_one_that_cannot_be_launched_is_left_out(slow: Callable[[int], int], tmp_path: Path) -> None:
    hosts = [*here(), LocalLauncher("bad", python="/no/such/python", standby=True), extra("good")]
    async with AgentCluster(hosts=hosts, config=TWO, **QUIET) as cluster, Client(cluster, asynchronous=True) as client:
        with pytest.warns(UserWarning, match=r"host bad is left out: .*Python cannot be run"):
            await cluster.scale(3)
        assert plan(cluster) == {"local": 2, "good": 1}
        assert cluster.standby == ("bad",)
        await cluster.scale(1)
        adaptive = cluster.adapt(minimum=1, **FAST)
        futures = client.map(slow, range(80), pure=False)
        await wait_until(lambda: plan(cluster) == {"local": 2, "good": 2}, 30)
        # dask leaves a connection open that it makes to a worker that is being removed, until that worker has ended.
        adaptive.stop()
        assert await client.gather(futures) == list(range(80))


async def test_one_that_dies_goes_back(slow: Callable[[int], int], zygote: Zygote) -> None:
    hosts = [*here(), ForkedLauncher("b", zygote, standby=True), extra("c")]
    async with AgentCluster(hosts=hosts, config=TWO, **QUIET) as cluster, Client(cluster, asynchronous=True) as client:
        await kill_and_replace(cluster, client, slow)


async def kill_and_replace(cluster: AgentCluster, client: Client, slow: Callable[[int], int]) -> None:
    cluster.adapt(minimum=4, **FAST)
    await wait_until(lambda: plan(cluster) == {"local": 2, "b": 2}, 30)
    agent = cluster.workers["b"]
    assert agent.launched is not None
    process = psutil.Process(agent.launched.ready.pid)
    tree = [process, *process.children(recursive=True)]
    process.kill()
    await gone(tree, 20)
    await wait_until(lambda: sum(plan(cluster).values()) == 4, 30)
    assert await client.submit(slow, 3) == 3


async def test_by_hand(cluster: AgentCluster) -> None:
    assert await cluster.add_host(extra("d")) == "d"
    assert cluster.standby == ("b", "c", "d")
    with pytest.raises(ConfigError, match="a node named 'd' is already there"):
        await cluster.add_host(extra("d"))
    await cluster.remove_host("b")
    assert cluster.standby == ("c", "d")
    with pytest.raises(NodeNotFound, match=r"'b'.*c.*d"):
        await cluster.remove_host("b")
    await cluster.scale(4)
    assert plan(cluster) == {"local": 2, "c": 2}
    await cluster.reprovision("uniform", {"nworkers": 1})
    assert plan(cluster) == {"local": 1, "c": 1}
    await cluster.remove_host("c")
    assert plan(cluster) == {"local": 1}
    assert cluster.standby == ("d",)
    await cluster.scale(2)
    assert plan(cluster) == {"local": 1, "d": 1}
    assert {node["mode"] for node in cluster.nodes.values()} == {"uniform"}


async def test_over_ssh(tmp_path: Path, zygote: Zygote) -> None:
    async with ssh_servers.serve("asyncssh", tmp_path, zygote) as server:
        host = Host(
            server.host, user=server.username, port=server.port, connect_options=server.connect_options, standby=True
        )
        async with AgentCluster(hosts=[*here(), host], config=TWO, **QUIET) as cluster:
            assert cluster.standby == ("127.0.0.1",)
            await cluster.scale(4)
            assert plan(cluster) == {"local": 2, "127.0.0.1": 2}
            await cluster.scale(2)
            assert cluster.standby == ("127.0.0.1",)


async def test_closing_while_hosts_are_being_launched(slow: Callable[[int], int]) -> None:
    before = children()
    async with (
        AgentCluster(hosts=[*here(), extra("b"), extra("c")], config=TWO, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        cluster.adapt(minimum=1, **FAST)
        futures = client.map(slow, range(100), pure=False)
        await wait_until(lambda: len(cluster.worker_spec) == 3, 30)
        del futures
    await wait_until(lambda: children() <= before, 10)
