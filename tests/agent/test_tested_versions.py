"""Agents, plugins and clusters warn about an untested version of distributed, and work."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator

import distributed
import pytest
from distributed import Client, Scheduler

from agentcluster import Agent, AgentCluster
from agentcluster.config import warn_untested
from agentcluster.scheduler.plugin import dask_setup
from tests.support.forked import ForkedHosts


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    warn_untested.cache_clear()
    monkeypatch.setattr(distributed, "__version__", "2099.1.0")
    yield
    warn_untested.cache_clear()


@pytest.fixture
async def bare() -> AsyncIterator[Scheduler]:
    async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        yield scheduler


async def test_plugin_warns(untested: None, bare: Scheduler) -> None:
    with pytest.warns(UserWarning, match=r"2099\.1\.0 is installed"):
        await dask_setup(bare)
    assert "agentcluster" in bare.extensions


async def test_agent_warns_once(untested: None, bare: Scheduler) -> None:
    with pytest.warns(UserWarning, match=r"2099\.1\.0 is installed"):
        Agent(bare.address, host="127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Agent(bare.address, host="127.0.0.1")


async def test_cluster_warns_and_works(untested: None, forked: ForkedHosts) -> None:
    options = {"config": {"nworkers": 1, "nthreads": 1}, "scheduler_options": {"dashboard_address": ":0"}}
    with pytest.warns(UserWarning, match=r"2099\.1\.0 is installed"):
        cluster = AgentCluster(forked(), asynchronous=True, **options)
    async with cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(sum, [1, 2]) == 3
