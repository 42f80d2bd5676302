"""What the scheduler's Prometheus endpoint says of nodes, as a Prometheus would read it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from distributed import Client
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import AsyncHTTPClient

from agentcluster import AgentCluster
from agentcluster.errors import SwapError
from tests.support.waiting import wait_until

OPTIONS: dict[str, Any] = {"asynchronous": True, "scheduler_options": {"dashboard_address": ":0"}}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}

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
        AgentCluster(hosts=["local", "local"], config=TWO, **OPTIONS) as cluster,
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


async def test_the_last_scheduler_of_a_process_is_told_of_and_none_when_it_has_closed() -> None:
    for name in ("one", "other"):
        async with AgentCluster(hosts=["local"], config=TWO, name=name, **OPTIONS) as cluster:
            assert (await scraped(cluster))[("nodes", "auto-cpu", "ready")] == 1
    await asyncio.sleep(0)
    async with AgentCluster(hosts=[], config=TWO, **OPTIONS) as cluster:
        assert not [key for key in await scraped(cluster) if key[0] == "nodes"]
