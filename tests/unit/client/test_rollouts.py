"""Bars of a rollout: how full they are, and nothing is drawn outside a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from agentcluster.client.rollouts import RolloutProgress, reckon


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
