"""Bars of a rollout: what they show, and that nothing is drawn where nobody looks."""

from __future__ import annotations

import io
from typing import Any

import pytest
from distributed import Client
from rich.console import Console

from agentcluster import AgentCluster
from agentcluster.client.rollouts import RolloutProgress, reckon, watch
from agentcluster.errors import PreflightError


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("step", "done", "says"),
    [
        ({"step": "waiting"}, 0, "waiting"),
        ({"step": "start", "workers": ["a-1"]}, 10, "start"),
        ({"step": "retire", "keys": 0, "all_keys": 0}, 40, "retire"),
        ({"step": "retire", "keys": 50, "all_keys": 100}, 65, "50 of 100 keys moved"),
        ({"step": "stop"}, 90, "stop"),
        ({"step": "ready"}, 100, "ready"),
    ],
)
def test_how_full_a_bar_is(step: dict[str, Any], done: float, says: str) -> None:
    assert reckon(step) == (done, says)


def test_one_bar_per_node_with_what_it_does() -> None:
    console = terminal()
    with RolloutProgress(console) as bars:
        bars.update({"nodes": {"a": {"step": "start"}, "b": {"step": "retire", "keys": 1, "all_keys": 4}}})
        bars.update(None)
        bars.finish({"a": "changed", "b": "rolled back", "c": "changed"})
    text = drawn(console)
    assert "1 of 4 keys moved" in text or "rolled back" in text
    assert "changed" in text
    assert "c " in text


def test_nothing_is_drawn_in_a_file() -> None:
    console = Console(file=io.StringIO())
    with RolloutProgress(console) as bars:
        bars.update({"nodes": {"a": {"step": "start"}}})
        bars.finish({"a": "changed"})
    assert drawn(console) == ""


async def test_a_rollout_is_drawn_and_answers() -> None:
    quiet = {"dashboard": False, "dashboard_address": ":0"}
    async with (
        AgentCluster(config={"nworkers": 1}, asynchronous=True, scheduler_options=quiet) as cluster,
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
