"""What the scheduler's Prometheus endpoint says of nodes, as a Prometheus would read it."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from distributed import Client, Scheduler
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import AsyncHTTPClient

from agentcluster import AgentCluster, dask_setup
from agentcluster.errors import SwapError
from agentcluster.model import Hardware
from agentcluster.requests import NodeRegistration
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER
from tests.support.waiting import wait_until

OPTIONS: dict[str, Any] = {"asynchronous": True, "scheduler_options": {"dashboard_address": ":0"}}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
NODE = NodeRegistration("n", "tcp://n:1", Hardware("n", 1, 1))

Samples = dict[tuple[str, ...], float]


async def scraped(cluster: AgentCluster) -> Samples:
    """Return metric and labels, by their names -> value, of our own metrics."""
    port = cluster.scheduler.http_server.port
    answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/metrics")
    found = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            labels = (value for _, value in sorted(sample.labels.items()))
            if sample.name.startswith("dask_agentcluster_"):
                found[(sample.name.removeprefix("dask_agentcluster_"), *labels)] = sample.value
    return found


async def test_nodes_swaps_and_what_they_moved() -> None:
    async with (
        AgentCluster(hosts=here(2), config=TWO, **OPTIONS) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        first = await scraped(cluster)
        assert first[("nodes", "auto-cpu", "ready")] == 2
        assert first[("workers", "cpu")] == 4
        assert first[("rollout_seconds_count",)] == 0
        kept = await client.scatter([bytes(1000)] * 20, hash=False)
        await cluster.reprovision("uniform", TWO, nodes=["local"])
        await cluster.reprovision("none", nodes=["local"])
        with pytest.raises(SwapError):
            await cluster.reprovision("auto-cpu", {**TWO, "preload": ["no_such_module"]}, nodes=["local"])
        second = await scraped(cluster)
        assert second[("nodes", "auto-cpu", "ready")] == 1
        assert second[("nodes", "none", "standby")] == 1
        assert second[("swaps_total", "changed")] == 2
        assert sum(value for key, value in second.items() if key[0] == "swaps_total") == 3
        assert second[("rollout_seconds_count",)] == 3
        assert second[("rollout_seconds_sum",)] > 0
        assert second[("moved_keys_total",)] > 0
        assert second[("moved_bytes_total",)] >= 1000 * second[("moved_keys_total",)]
        assert len(kept) == 20

        def pid(dask_worker: Any) -> int:
            return os.getpid()

        (victim, *_) = (await client.run(pid)).values()
        os.kill(victim, signal.SIGKILL)

        async def counted() -> bool:
            return (await scraped(cluster)).get(("worker_restarts_total", "local.2")) == 1

        await wait_until(counted, 20)


def published() -> dict[str, float]:
    """Return state of nodes -> how many, as the process tells of them now; empty when it tells of none."""
    families = {family.name: family for family in REGISTRY.collect()}
    nodes = families.get("dask_agentcluster_nodes")
    return {} if nodes is None else {sample.labels["state"]: sample.value for sample in nodes.samples}


async def test_last_scheduler_of_a_process_is_published_until_it_closes() -> None:
    async with Scheduler(**SCHEDULER) as first:
        await dask_setup(first)
        async with Scheduler(**SCHEDULER) as second:
            await dask_setup(second)
            node = second.extensions["agentcluster"].registry.register(NODE, now=0.0)
            assert published() == {node.state: 1}
            await first.close()  # it is not published, and takes nothing away
            assert published() == {node.state: 1}
    names = {family.name for family in REGISTRY.collect()}
    assert not [name for name in names if name.startswith("dask_agentcluster")]
