"""The Nodes page of the scheduler's dashboard: what it draws, without a browser; test_browser.py has one."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler

from agentcluster import AgentCluster, dask_setup
from tests.support.inprocess import InProcess
from tests.support.programs import AGENT, SCHEDULER_WITHOUT, programs, start_scheduler
from tests.support.waiting import wait_until

pytest.importorskip("bokeh", reason="bokeh is not installed (extra 'dashboard')")
from agentcluster.scheduler import dashboard

SMALL = {"nworkers": 2, "nthreads": 1, "memory_limit": "256MiB"}


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """Two nodes, and a dashboard."""
    return {
        "hosts": [InProcess("box-1"), InProcess("box-2")],
        "config": SMALL,
        "scheduler_options": {"dashboard_address": ":0"},
    }


def fetched(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


async def test_the_plots_show_nodes_rollouts_and_decisions() -> None:
    hosts = [InProcess("box-1"), InProcess("box-2")]
    options = {"dashboard_address": ":0"}
    async with AgentCluster(hosts=hosts, config=SMALL, scheduler_options=options, asynchronous=True) as cluster:
        plugin = cluster.scheduler.extensions["agentcluster"]
        nodes = dashboard.NodesPlot(plugin.registry, plugin._data_on)
        rollouts, adaptive = dashboard.Rollouts(cluster.scheduler), dashboard.Decisions(cluster.scheduler)

        def drawn() -> tuple[Any, ...]:
            for plot in (nodes, rollouts, adaptive):
                plot.update()
            return nodes.workers.data, nodes.load.data, rollouts.source.data, adaptive.points.data

        workers, load, steps, points = drawn()
        assert sorted(zip(workers["node"], workers["number"], strict=True)) == [("box-1", 2), ("box-2", 2)]
        assert set(load["what"]) == {"CPU", "memory"}
        assert sorted(nodes.names.factors) == ["box-1", "box-2"]
        assert points["decided"] == []
        async with Client(cluster, asynchronous=True) as client:
            kept = await client.scatter(list(range(10)), hash=False)
            await cluster.reprovision("uniform", {"nworkers": 1, "nthreads": 1}, nodes="box-1")
            workers, load, steps, points = drawn()
            modes = dict(zip(workers["node"], workers["mode"], strict=True))
            assert modes == {"box-1": "uniform", "box-2": "auto-cpu"}
            assert sum(int(text.split(" in ")[1].split()[0]) for text in workers["data"]) == 10
            assert await client.gather(kept) == list(range(10))
        done = [(step, rollout) for step, rollout in zip(steps["step"], steps["rollout"], strict=True)]
        assert ("retire", "uniform") in done
        assert all(began <= ended for began, ended in zip(steps["began"], steps["ended"], strict=True))
        cluster.adapt(minimum=1, maximum=3, interval="200ms")
        await wait_until(lambda: "begins" in drawn()[3]["decided"])
        assert adaptive.sources["cpu"].data["number"][0] == 3
        await cluster.reprovision("none")
        workers, load, steps, points = drawn()
        assert workers["node"] == []
        assert all(text.startswith("standby") for text in nodes.words.data["says"])


def test_dask_lists_the_page_and_the_plots(sync_cluster: AgentCluster) -> None:
    base = sync_cluster.dashboard_link.removesuffix("/status")
    plots = json.loads(fetched(f"{base}/individual-plots.json"))
    assert plots["Individual Nodes"] == "/individual-nodes"
    assert plots["Individual Task Stream"] == "/individual-task-stream"
    for plot in ("nodes", "individual-nodes", "individual-rollouts", "individual-adaptive"):
        assert "<html" in fetched(f"{base}/{plot}")
    for page in ("status", "nodes"):
        assert '<a href="nodes">Nodes</a>' in fetched(f"{base}/{page}")
        assert '<a href="individual-rollouts">Rollouts</a>' in fetched(f"{base}/{page}")


async def test_a_plugin_that_comes_late_and_a_prefix() -> None:
    async with Scheduler(dashboard_address="127.0.0.1:0", port=0, http_prefix="dask") as scheduler:
        await dask_setup(scheduler)
        await dask_setup(scheduler)
        base = f"http://127.0.0.1:{scheduler.http_server.port}/dask"
        plots = json.loads(await asyncio.to_thread(fetched, f"{base}/individual-plots.json"))
        assert plots["Individual Nodes"] == "/dask/individual-nodes"
        assert (await asyncio.to_thread(fetched, f"{base}/nodes")).count('<a href="nodes">') == 1


async def test_a_scheduler_without_a_dashboard() -> None:
    async with Scheduler(dashboard=False, dashboard_address=None, port=0) as scheduler:
        await dask_setup(scheduler)
        assert "agentcluster" in scheduler.extensions


async def test_a_scheduler_that_gets_the_package_from_an_agent(tmp_path: Path) -> None:
    with programs(tmp_path) as start:
        board = ("--dashboard", "--dashboard-address", "127.0.0.1:0")
        scheduler, address = await start_scheduler(start, tmp_path, *board, command=SCHEDULER_WITHOUT)
        base = (await scheduler.says("dashboard at:")).split()[-1].removesuffix("/status")
        start(*AGENT, address, "--mode", "none", "--name", "box")
        async with Client(address, asynchronous=True) as client:

            async def joined() -> bool:
                nodes = await client.scheduler.get_nodes()
                return bool(nodes) and nodes["box"]["state"] == "standby"

            await wait_until(joined, 30)
            assert "<html" in await asyncio.to_thread(fetched, f"{base}/nodes")
        assert "The dashboard has no page" not in scheduler.output()
