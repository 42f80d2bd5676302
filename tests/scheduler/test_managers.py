"""Names that a cluster manager tracks: kept through every change, and whoever retires one means the node."""

from __future__ import annotations

import asyncio
from typing import Any

import distributed
import pytest
from distributed import Client, Scheduler, SpecCluster

from agentcluster import Agent
from agentcluster.errors import SwapError
from tests.support.waiting import wait_until

TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": 0}
ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": 0}


def names(scheduler: Scheduler) -> dict[Any, str]:
    """Return the name and status of each worker; names and aliases must agree."""
    assert set(scheduler.aliases) == {ws.name for ws in scheduler.workers.values()}
    return {ws.name: ws.status.name for ws in scheduler.workers.values()}


async def own_names(client: Client) -> set[Any]:
    """Return what the workers' processes take for their names."""
    return set((await client.run(lambda dask_worker: dask_worker.name)).values())


async def test_the_names_that_dask_worker_gives(scheduler: Scheduler) -> None:
    async with (
        Agent(scheduler.address, name="blue", mode="auto-cpu", config=ONE) as blue,
        Agent(scheduler.address, name="red", mode="auto-cpu", config=TWO) as red,
    ):
        await asyncio.gather(blue.provisioned(), red.provisioned())
        assert set(names(scheduler)) == {"blue", "red-0", "red-1"}
    async with Agent(scheduler.address, name=3, mode="auto-cpu", config=ONE) as three:
        await three.provisioned()
        assert set(names(scheduler)) == {3}


@pytest.mark.parametrize("name", ["blue", 0])
@pytest.mark.parametrize("strategy", ["surge", "replace"])
async def test_the_name_stays(scheduler: Scheduler, client: Client, name: str | int, strategy: str) -> None:
    seen: list[bool] = []

    class Watch(distributed.SchedulerPlugin):
        def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
            seen.append(name in scheduler.aliases)

    scheduler.add_plugin(Watch())
    async with Agent(scheduler.address, name=name, mode="auto-cpu", config=ONE) as agent:
        await agent.provisioned()
        data = await client.scatter(list(range(5)))
        pids = set()
        for count, nthreads in ((2, 2), (1, 3), (3, 1)):  # nobody can stay
            config = {"nworkers": count, "nthreads": nthreads, "memory_limit": 0}
            keep = await Agent(scheduler.address, name="other", mode="auto-cpu", config=ONE)
            await keep.provisioned()
            report = await client.scheduler.reprovision_nodes(
                mode="auto-cpu", config=config, nodes=[str(name)], strategy=strategy
            )
            node = report["nodes"][str(name)]
            assert name in names(scheduler)
            assert str(name) in node["new"]
            plan = (await client.scheduler.get_nodes())[str(name)]["plan"]
            assert len(plan) == count
            await wait_until(lambda: {str(n) for n in names(scheduler)} == {*plan, "other"})  # noqa: B023
            assert set(names(scheduler).values()) == {"running"}
            assert await own_names(client) == set(names(scheduler))
            assert await client.gather(data) == list(range(5))
            pids.add(scheduler.workers[scheduler.aliases[name]].pid)
            await client.scheduler.retire_node(name="other")
            await keep.close()
        assert len(pids) == 3
        assert all(seen)  # whenever a worker left somebody bore the name


async def test_a_placeholder_bears_the_name_of_a_node_without_workers(scheduler: Scheduler, client: Client) -> None:
    async with Agent(scheduler.address, name="blue", mode="auto-cpu", config=TWO) as agent:
        await agent.provisioned()
        await client.scheduler.reprovision_nodes(mode="none")
        assert names(scheduler) == {"blue-0": "paused", "blue-1": "paused"}
        nodes = await client.scheduler.get_nodes()
        assert (nodes["blue"]["state"], nodes["blue"]["plan"]) == ("standby", {})
        await client.scheduler.reprovision_nodes(mode="auto-cpu", config=ONE)
        await wait_until(lambda: names(scheduler) == {"blue-0": "running", "blue-1": "paused"})
        assert await client.submit(lambda: 1) == 1
        await client.scheduler.reprovision_nodes(mode="auto-cpu", config=TWO)
        await wait_until(lambda: names(scheduler) == {"blue-0": "running", "blue-1": "running"})


async def test_a_change_that_fails_leaves_the_names_where_they_were(scheduler: Scheduler, client: Client) -> None:
    async with Agent(scheduler.address, name="blue", mode="auto-cpu", config=ONE) as agent:
        await agent.provisioned()
        before = scheduler.aliases["blue"]
        with pytest.raises(SwapError, match="blue-0: ModuleNotFoundError"):
            await client.scheduler.reprovision_nodes(
                mode="spec", config={"spec": {"": {"cls": "distributed.Nanny", "options": {"preload": ["no_such"]}}}}
            )
        assert scheduler.aliases == {"blue": before}


async def test_a_worker_that_has_the_name_by_now_is_started_again_under_it(
    scheduler: Scheduler, client: Client
) -> None:
    async with Agent(scheduler.address, name="blue", mode="auto-cpu", config=ONE) as agent:
        await agent.provisioned()
        await client.scheduler.reprovision_nodes(mode="auto-cpu", config=TWO)
        before = scheduler.workers[scheduler.aliases["blue"]]
        await client.restart_workers([before.address])
        await wait_until(lambda: len(scheduler.workers) == 2 and "blue" in names(scheduler))
        assert scheduler.workers[scheduler.aliases["blue"]].pid != before.pid
        assert await own_names(client) == set(names(scheduler))


@pytest.mark.parametrize("how", ["name", "names", "address", "placeholder"])
async def test_who_retires_the_name_retires_the_node(scheduler: Scheduler, client: Client, how: str) -> None:
    async with Agent(scheduler.address, name="other", mode="auto-cpu", config=ONE) as other:
        await other.provisioned()
        agent = await Agent(scheduler.address, name="blue", mode="auto-cpu", config=ONE)
        await agent.provisioned()
        await client.scheduler.reprovision_nodes(
            mode="none" if how == "placeholder" else "auto-cpu",
            config=None if how == "placeholder" else TWO,
            nodes=["blue"],
        )
        data = await client.scatter({"x": 1, "y": 2}, broadcast=False)
        # As SpecCluster does: a name where dask takes addresses.
        chosen: dict[str, Any] = {"workers": ["blue"]}
        if how == "names":
            chosen = {"names": ["blue"]}
        elif how == "address":
            chosen = {"workers": [scheduler.aliases["blue"]]}
        retired = await client.scheduler.retire_workers(**chosen)
        assert [its["name"] for its in retired.values()] == ["blue"]  # a manager ends what bears these names
        assert set(names(scheduler)) == {"other"}  # as soon as it has said so: a manager kills the job then
        assert await client.gather(data) == {"x": 1, "y": 2}
        await asyncio.wait_for(agent.finished(), 15)
        assert set(await client.scheduler.get_nodes()) == {"other"}


async def test_other_workers_of_the_node_can_be_retired(scheduler: Scheduler, client: Client) -> None:
    async with Agent(scheduler.address, name="blue", mode="auto-cpu", config=ONE) as agent:
        await agent.provisioned()
        await client.scheduler.reprovision_nodes(mode="auto-cpu", config=TWO)
        [second] = set(names(scheduler)) - {"blue"}
        await client.retire_workers(names=[second])
        await wait_until(lambda: set(names(scheduler)) == {"blue"})
        assert await client.submit(lambda: 1) == 1
        assert "blue" in await client.scheduler.get_nodes()


async def test_a_spec_cluster_keeps_its_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    import dask

    dask.config.set({"distributed.deploy.lost-worker-timeout": "200ms"})
    spec = {"cls": Agent, "options": {"mode": "auto-cpu", "config": ONE}}
    schedulers = {"cls": Scheduler, "options": {"port": 0, "dashboard_address": ":0"}}
    async with (
        SpecCluster({0: spec, 1: spec}, scheduler=schedulers, worker=spec, asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        await client.wait_for_workers(2)
        agents = dict(cluster.workers)
        data = await client.scatter(list(range(20)))
        for mode, config in (("auto-cpu", TWO), ("none", None), ("auto-cpu", ONE)):
            nodes = ["1"] if mode == "none" else ["0", "1"]
            await client.scheduler.reprovision_nodes(mode=mode, config=config, nodes=nodes)
            await asyncio.sleep(0.5)  # more than lost-worker-timeout
            assert cluster.workers == agents
            assert await client.gather(data) == list(range(20))
        await cluster.scale(1)
        await wait_until(lambda: len(cluster.scheduler.workers) == 1)
        assert await client.gather(data) == list(range(20))
        await asyncio.sleep(0.5)  # it still looks for the worker 1 that went, and would take the next one for it
        cluster.scale(2)
        await cluster
        await client.wait_for_workers(2, timeout=20)
