"""Bars of a rollout: what they show, and that nothing is drawn where nobody looks."""

from __future__ import annotations

import io

import pytest
from distributed import Client
from rich.console import Console

from agentcluster import AgentCluster
from agentcluster.client.rollouts import watch
from agentcluster.errors import PreflightError
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def test_a_rollout_is_drawn_and_answers() -> None:
    async with (
        AgentCluster(hosts=here(), config={"nworkers": 1}, asynchronous=True, scheduler_options=SCHEDULER) as cluster,
        Client(cluster, asynchronous=True),
    ):
        console = terminal()
        order = cluster.scheduler_comm.reprovision_nodes(mode="uniform", config={"nthreads": 1, "nworkers": 1})
        answer = await watch(order, cluster.scheduler_comm.rollout_status, console)
        assert answer["nodes"]["local"]["outcome"] == "changed"
        assert "local" in drawn(console)
        report = await cluster.reprovision("auto-cpu", {"nworkers": 1}, progress=True)
        assert report.nodes["local"].outcome == "changed"
        with pytest.raises(PreflightError):
            await cluster.reprovision("auto-gpu", progress=True)
