"""Spans of a rollout's steps, as the dashboard draws them."""

from __future__ import annotations

from typing import Any

from agentcluster.scheduler.dashboard import Span, decisions, spans


def event(began: float, action: str, **facts: Any) -> dict[str, Any]:
    return {"rollout": f"r{began:g}", "began": began, "action": action, **facts}


def test_events_become_spans() -> None:
    told = [
        (10.0, event(10, "began")),
        (10.5, event(10, "step", node="a", step="start")),
        (11.0, event(10, "step", node="b", step="waiting")),
        (12.0, event(10, "step", node="a", step="retire")),
        (12.5, {"adapt": {"decided": "begins"}}),
        (13.0, event(10, "step", node="a", step="ready")),
        (13.0, event(10, "step", node="b", step="start")),
        (14.0, event(10, "ended", outcomes={})),
        (20.0, event(20, "step", node="a", step="start")),
    ]
    assert spans(told) == [
        Span("r10", "a", "start", 10.5, 12.0),
        Span("r10", "a", "retire", 12.0, 13.0),
        Span("r10", "b", "start", 13.0, 14.0),
        Span("r20", "a", "start", 20.0, None),
    ]
    assert decisions(told) == [{"decided": "begins"}]
    assert spans([]) == []


def test_a_rollout_that_never_said_its_end_has_ended_when_the_next_begins() -> None:
    told = [(1.0, event(1, "step", node="a", step="start")), (5.0, event(5, "began"))]
    assert spans(told) == [Span("r1", "a", "start", 1.0, 5.0)]
