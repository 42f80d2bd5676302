"""Agents in the specs of distributed's own tools: SpecCluster, in this process, and ``dask spec``, as a process."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, SpecCluster, Status

from agentcluster import Agent
from tests.support.giving_up import GivingUp
from tests.support.managed import HOST, SCHEDULER, SHAPE, Work, clean, names, reprovision, there, workers
from tests.support.programs import AGENT, Program, Start, gone, start_scheduler
from tests.support.waiting import wait_until

pytestmark = pytest.mark.deploy

SPEC = ("-m", "distributed.cli.dask_spec")


@asynccontextmanager
async def cluster_of(keys: Any, entry: dict[str, Any]) -> AsyncIterator[tuple[SpecCluster, Client]]:
    """Open a SpecCluster that starts the same for each of its names."""
    scheduler = {"cls": Scheduler, "options": SCHEDULER}
    async with (
        SpecCluster(
            workers=dict.fromkeys(keys, entry), worker=entry, scheduler=scheduler, asynchronous=True
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        yield cluster, client


#: As an entry for a worker would be; the names are the cluster's own, which are numbers.
ENTRY = {"cls": Agent, "options": {**HOST, **SHAPE}}


async def nobody_is_given_up(cluster: SpecCluster, giving_up: GivingUp) -> None:
    """Check that the manager keeps all agents when it looks for the workers that have gone."""
    agents = dict(cluster.workers)
    await giving_up.look(cluster)
    assert cluster.workers == agents
    assert {agent.status for agent in agents.values()} == {Status.running}


# -- SpecCluster -------------------------------------------------------------------------------------------------------


async def test_names_and_options_are_those_of_a_worker() -> None:
    async with cluster_of([0, 1], ENTRY) as (cluster, client):
        await there(client, 0, 1)
        await wait_until(lambda: cluster.observed == cluster.plan == cluster.requested == {0, 1})
        for worker in (await workers(client)).values():
            assert (worker["nthreads"], worker["memory_limit"]) == (1, 300 * 2**20)


async def test_reprovision_under_load_then_scale(tmp_path: Path, giving_up: GivingUp) -> None:
    async with cluster_of([0, 1], ENTRY) as (cluster, client):
        await there(client, 0, 1)
        for nworkers in (2, 1, 3):
            work = Work(client, tmp_path / f"work-{nworkers}")
            await work.begin()
            await reprovision(client, nworkers)
            found = await names(client)
            assert len(found) == 2 * nworkers
            assert found >= {0, 1}
            await nobody_is_given_up(cluster, giving_up)
            assert cluster.plan <= cluster.observed
            await work.all_there()

        cluster.scale(1)
        await wait_until(lambda: list(cluster.workers) == [0], 20)
        assert len(await names(client)) == 3
        await work.all_there()
        await nobody_is_given_up(cluster, giving_up)  # it would take the next worker 1 for the last
        cluster.scale(3)
        await wait_until(lambda: set(cluster.workers) == {0, 1, 2}, 20)
        assert cluster.observed >= {0, 1, 2}
        await work.all_there()


async def test_a_node_without_workers_is_not_given_up(tmp_path: Path, giving_up: GivingUp) -> None:
    async with cluster_of([0, 1], ENTRY) as (cluster, client):
        await there(client, 0, 1)
        work = Work(client, tmp_path / "work")
        await work.begin()
        await client.scheduler.reprovision_nodes(mode="none", nodes=["1"])
        await nobody_is_given_up(cluster, giving_up)
        assert await names(client) == {0, 1}
        await work.all_there()
        assert not (await client.has_what())[(await workers(client))[1]["address"]]
        await reprovision(client, 2)
        await nobody_is_given_up(cluster, giving_up)
        await work.all_there()


async def test_scale_takes_the_newest_also_after_a_reprovision() -> None:
    async with cluster_of([0, 1, 2], ENTRY) as (cluster, client):
        await there(client, 0, 1, 2)
        await reprovision(client, 2)
        await wait_until(lambda: cluster.observed >= {0, 1, 2})
        cluster.scale(2)
        await wait_until(lambda: len(cluster.workers) == 2, 20)
        assert set(cluster.workers) == {0, 1}


async def test_several_workers_of_an_entry_are_its_group(tmp_path: Path, giving_up: GivingUp) -> None:
    options = {**HOST, "mode": "auto-cpu", "config": {**SHAPE, "nworkers": 2}}
    entry = {"cls": "agentcluster.Agent", "options": options, "group": ["-0", "-1"]}
    async with cluster_of(["a", "b"], entry) as (cluster, client):
        first = {"a-0", "a-1", "b-0", "b-1"}
        await there(client, *first)
        assert cluster.plan == first
        await wait_until(lambda: cluster.observed == first)
        work = Work(client, tmp_path / "work")
        await work.begin()
        for nworkers in (1, 3):
            await reprovision(client, nworkers)
            await nobody_is_given_up(cluster, giving_up)
            assert first <= await names(client)
        await work.all_there()
        await cluster.scale_down(["b-0", "b-1"])
        assert set(cluster.workers) == {"a"}
        await work.all_there()


async def test_adapt_counts_nodes(tmp_path: Path, giving_up: GivingUp) -> None:
    """Every node has two workers when the manager looks; it closes whole nodes, the right number of them."""
    async with cluster_of([0], ENTRY) as (cluster, client):
        await there(client, 0)
        await reprovision(client, 2)
        cluster.adapt(minimum=3, maximum=3, interval="100ms")
        await wait_until(lambda: set(cluster.workers) == {0, 1, 2} <= cluster.observed, 20)
        await reprovision(client, 3)
        work = Work(client, tmp_path / "work")
        await work.begin()
        await work.all_there()
        cluster.adapt(minimum=2, maximum=3, interval="100ms", wait_count=2)
        await wait_until(lambda: len(cluster.workers) == 2, 20)
        await wait_until(lambda: len(cluster.scheduler.workers) == 6)
        await work.all_there()
        cluster.adapt(minimum=2, maximum=9, interval="20ms", wait_count=2)
        await nobody_is_given_up(cluster, giving_up)
        assert len(cluster.worker_spec) == 2
        await work.all_there()


# -- dask spec ---------------------------------------------------------------------------------------------------------


def dask_spec(start: Start, address: str, spec: dict[str, Any]) -> Program:
    return start(*SPEC, address, "--spec", json.dumps(spec))


def agent_spec(**options: Any) -> dict[str, Any]:
    return {"cls": "agentcluster.Agent", "opts": {**HOST, **SHAPE, **options}}


async def test_dask_spec(start: Start, address: str, client: Client, tmp_path: Path) -> None:
    blue, green = (dask_spec(start, address, agent_spec(name=name)) for name in ("blue", "green"))
    await there(client, "blue", "green")
    for worker in (await workers(client)).values():
        assert (worker["nthreads"], worker["memory_limit"]) == (1, 300 * 2**20)
    for program in (blue, green):
        await program.says("worker at")
        await program.says("Registered to:")
    work = Work(client, tmp_path / "work")
    await work.begin()
    for nworkers in (2, 1):
        await reprovision(client, nworkers)
        assert {"blue", "green"} <= await names(client)
    await work.all_there()

    tree = green.children()
    await client.retire_workers(names=["green"])
    assert await green.ended() == 0
    await gone(tree)
    await work.all_there()
    assert await names(client) == {"blue"}
    dask_spec(start, address, agent_spec(name="red"))
    await there(client, "blue", "red")
    await reprovision(client, 2)
    await work.all_there()
    tree = blue.kill(signal.SIGTERM)
    assert await blue.ended() == 0
    await gone(tree)
    for program in (blue, green):
        clean(program.output())


async def test_dask_spec_from_a_file(start: Start, address: str, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        "cls: agentcluster.Agent\n"
        "opts: {name: blue, host: 127.0.0.1, mode: auto-cpu, config: {nworkers: 2, memory_limit: 300MiB}}\n"
    )
    start(*SPEC, address, "--spec-file", file)
    await there(client, "blue-0", "blue-1")
    await reprovision(client, 1)
    assert await names(client) == {"blue-0", "blue-1"}  # one of them works on nothing


async def test_the_arguments_of_a_worker(start: Start, address: str, client: Client) -> None:
    opts = {"scheduler_ip": address, "name": "blue", "nthreads": 3, "memory_limit": "300MiB", "host": "127.0.0.1"}
    start(*SPEC, "--spec", json.dumps({"cls": "agentcluster.Agent", "opts": opts}))
    await there(client, "blue")
    (worker,) = (await workers(client)).values()
    assert (worker["nthreads"], worker["memory_limit"]) == (3, 300 * 2**20)


async def test_two_agents_of_one_dask_spec(start: Start, address: str, client: Client, tmp_path: Path) -> None:
    """As SSHCluster writes it for two workers on a host: without names."""
    program = dask_spec(start, address, {"0": agent_spec(), "1": agent_spec()})

    async def two() -> bool:
        return len(await names(client)) == 2

    await wait_until(two, 40)
    work = Work(client, tmp_path / "work")
    await work.begin()
    await reprovision(client, 2)
    assert len(await names(client)) == 4
    await work.all_there()
    tree = program.kill(signal.SIGTERM)
    assert await program.ended() == 0
    await gone(tree)


async def test_dask_spec_ends_with_its_scheduler(start: Start, tmp_path: Path) -> None:
    scheduler, address = await start_scheduler(start, tmp_path)
    program = dask_spec(start, address, agent_spec(name="blue"))
    async with Client(address, asynchronous=True) as client:
        await there(client, "blue")
    tree = program.children()
    scheduler.kill()
    assert await program.ended() == 0
    await gone(tree)


async def test_dask_spec_without_a_scheduler(start: Start) -> None:
    program = dask_spec(start, "tcp://127.0.0.1:1", agent_spec(name="blue", death_timeout=1))
    assert await program.ended(20) == 1
    assert "scheduler at tcp://127.0.0.1:1" in program.output()


async def test_the_command_in_place_of_dask_spec_runs_a_scheduler_on_the_configured_loop(start: Start) -> None:
    pytest.importorskip("uvloop", reason="uvloop is not installed")

    def loop() -> str:
        import asyncio

        return type(asyncio.get_event_loop()).__module__

    spec = {"cls": "dask.distributed.Scheduler", "opts": {"host": "127.0.0.1", "port": 0, "dashboard_address": ":0"}}
    program = start(*AGENT, "--spec", json.dumps(spec), env={"DASK_DISTRIBUTED__ADMIN__EVENT_LOOP": "uvloop"})
    address = (await program.says("Scheduler at: ")).rpartition(" ")[2]
    async with Client(address, asynchronous=True) as client:
        assert await client.run_on_scheduler(loop) == "uvloop"


@pytest.mark.parametrize("options", [(), ("--spec", '{"cls": "a.B"}', "--spec-file", "spec.json")])
async def test_the_command_in_place_of_dask_spec_wants_one_spec(start: Start, options: tuple[str, ...]) -> None:
    program = start(*AGENT, *options)
    assert await program.ended(20) != 0
    assert "exactly one" in program.output()
