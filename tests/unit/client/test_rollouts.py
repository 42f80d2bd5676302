"""Bars of a rollout: how full they are, and nothing is drawn outside a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from agentcluster.client.rollouts import RolloutProgress, parse_status
from agentcluster.model import NodeProgress, RolloutStatus


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("step", "done", "says"),
    [
        ({"step": "waiting"}, 0, "waiting"),
        ({"step": "start"}, 10, "start"),
        ({"step": "retire", "keys": 0, "all_keys": 0}, 40, "retire"),
        ({"step": "retire", "keys": 50, "all_keys": 100}, 65, "50 of 100 keys moved"),
        ({"step": "drain", "tasks": 2, "all_keys": 100, "left": 113.4}, 40, "2 tasks run, 1:53 left"),
        ({"step": "drain", "tasks": 1, "left": 60.0, "needs": ["fit", "sum"]}, 40, "1 task runs (fit, sum), 1:00 left"),
        ({"step": "drain", "left": 5.0, "needs": ["a shuffle"]}, 40, "waits for a shuffle, 0:05 left"),
        ({"step": "drain", "tasks": 1, "left": 3.0}, 40, "1 task runs, 0:03 left"),
        ({"step": "drain"}, 40, "drain"),
        ({"step": "stop"}, 90, "stop"),
        ({"step": "ready"}, 100, "ready"),
    ],
)
def test_how_full_a_bar_is(step: dict[str, Any], done: float, says: str) -> None:
    progress = NodeProgress(**step)
    assert (progress.percent, str(progress)) == (done, says)


def test_the_status_of_a_rollout_is_parsed() -> None:
    answer = {
        "mode": "uniform",
        "state": "running",
        "pausing": False,
        "seconds": 3.4,
        "wave": 0,
        "waves": [["a"], ["b"]],
        "nodes": {"a": {"step": "retire", "keys": 1, "all_keys": 4, "nbytes": 1}, "b": {"step": "waiting"}},
    }
    status = parse_status(answer)
    assert status is not None
    assert status.nodes["a"] == NodeProgress("retire", keys=1, all_keys=4, nbytes=1)
    assert repr(status).splitlines() == [
        "rollout to uniform: running, wave 1 of 2, 3 s",
        "node  progress",
        "a     52%  1 of 4 keys moved",
        "b     0%   waiting",
    ]
    assert parse_status({**answer, "nodes": {"a": {"step": "start", "workers": ["a-1"]}}}) is not None
    assert parse_status(None) is None


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"state": "running", "pausing": True}, "rollout to uniform: pauses after wave 1 of 2, 0 s"),
        ({"state": "paused", "wave": 1}, "rollout to uniform: paused before wave 2 of 2, 0 s"),
        ({"state": "back"}, "rollout to uniform: rolling back, 0 s"),
    ],
)
def test_the_state_of_a_rollout_in_one_line(state: dict[str, Any], said: str) -> None:
    assert RolloutStatus("uniform", waves=(("a",), ("b",)), **state).summary() == said


def test_one_bar_per_node_with_what_it_does() -> None:
    console = terminal()
    with RolloutProgress(console) as bars:
        nodes = {"a": NodeProgress("start"), "b": NodeProgress("retire", keys=1, all_keys=4)}
        bars.update(RolloutStatus("uniform", "running", nodes=nodes))
        bars.update(None)
        bars.finish({"a": "changed", "b": "rolled back", "c": "changed"})
    text = drawn(console)
    assert "1 of 4 keys moved" in text or "rolled back" in text
    assert "changed" in text
    assert "c " in text


def test_a_notebook_is_drawn_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn there last is what stays: rich draws nothing at its own end."""
    bars = RolloutProgress(Console(file=io.StringIO(), force_jupyter=True))
    seen: list[float] = []
    monkeypatch.setattr(
        bars._progress.live, "refresh", lambda: seen.extend(task.percentage for task in bars._progress.tasks)
    )
    with bars:
        bars.update(RolloutStatus("uniform", "running", nodes={"a": NodeProgress("start")}))
        bars.finish({"a": "changed"})
    assert seen[-1] == 100


def test_nothing_is_drawn_in_a_file() -> None:
    console = Console(file=io.StringIO())
    with RolloutProgress(console) as bars:
        bars.update(RolloutStatus("uniform", "running", nodes={"a": NodeProgress("start")}))
        bars.finish({"a": "changed"})
    assert drawn(console) == ""
