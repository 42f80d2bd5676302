"""Outcome of a swap for each node: the table, and the states of a wave that lead to its lines."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import Strategy
from agentcluster.scheduler.planning.change import NodeChange
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.scheduler.planning.wave import (
    Cancelled,
    Event,
    Retired,
    RetireRefused,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Wave,
    advance,
    begin,
)
from agentcluster.scheduler.swap import PLANS, NodeOutcome, PlanAfter, outcome_of

HARDWARE = Hardware("host", 2, 10**9)
SPEC = WorkerSpec("cpu", "distributed.Nanny", {}, nthreads=1, memory_limit=0)


def change(node: str, *, old: bool = True, new: bool = True) -> NodeChange:
    """Return a change of one worker for another, or only half of that."""
    there = {f"{node}-0": SPEC} if old else {}
    names = (f"{node}-1",) if new else ()
    restore = tuple(f"{name}-again" for name in there)
    return NodeChange(
        Node(node, "tcp://agent", HARDWARE), Mode("auto-cpu"), {}, there, (SPEC,) * new, names, restore_names=restore
    )


def after(wave: Wave, *events: Event) -> tuple[Wave, set[str]]:
    """Return a wave after events, and the nodes whose old workers were ordered to stop."""
    stopping = set()
    wave, commands = begin(wave)
    for event in (None, *events):
        if event is not None:
            wave, commands = advance(wave, event)
        stopping |= {c.node for c in commands if isinstance(c, Stop) and wave.phase == "stopping"}
    return wave, stopping


def wave_of(strategy: Strategy, *nodes: str, tolerant: bool = False) -> Wave:
    return Wave(tuple(map(change, nodes)), strategy, tolerant)


def outcomes(wave: Wave, stopping: set[str], **known: Any) -> dict[str, NodeOutcome]:
    return {each.name: outcome_of(wave, each.name, stopping=each.name in stopping, **known) for each in wave.changes}


SURGE: list[tuple[str, list[Event], dict[str, NodeOutcome]]] = [
    ("not begun", [], {"a": "unchanged", "b": "unchanged"}),
    ("interrupted while one starts", [Started("a")], {"a": "unchanged", "b": "unchanged"}),
    ("interrupted while data moves", [Started("a"), Started("b")], {"a": "unchanged", "b": "unchanged"}),
    (
        "interrupted while the old stop",
        [Started("a"), Started("b"), Retired(), Stopped("a")],
        {"a": "changed", "b": "changed"},
    ),
    (
        "done",
        [Started("a"), Started("b"), Retired(), Stopped("a"), Stopped("b")],
        {"a": "changed", "b": "changed"},
    ),
    (
        "one fails to start and the other is undone",
        [Started("a"), StartFailed("b", "no"), Retired(), Stopped("a")],
        {"a": "unchanged", "b": "unchanged"},
    ),
    (
        "neither the old nor the new can retire",
        [Started("a"), Started("b"), RetireRefused("no"), RetireRefused("no")],
        {"a": "both", "b": "both"},
    ),
    (
        "one has failed and the new one of the other cannot retire",
        [Started("a"), StartFailed("b", "no"), RetireRefused("no")],
        {"a": "both", "b": "unchanged"},
    ),
    (
        "cancelled while data moves",
        [Started("a"), Started("b"), Cancelled("no"), RetireRefused("no"), Retired(), Stopped("a"), Stopped("b")],
        {"a": "unchanged", "b": "unchanged"},
    ),
]

GONE: list[Event] = [Retired(), Stopped("a"), Stopped("b")]

REPLACE: list[tuple[str, list[Event], dict[str, NodeOutcome]]] = [
    ("not begun", [], {"a": "unchanged", "b": "unchanged"}),
    ("data cannot be moved", [RetireRefused("no")], {"a": "unchanged", "b": "unchanged"}),
    ("interrupted while the old stop", [Retired(), Stopped("a")], {"a": "emptied", "b": "emptied"}),
    ("interrupted while one starts", [*GONE, Started("a")], {"a": "changed", "b": "emptied"}),
    ("done", [*GONE, Started("a"), Started("b")], {"a": "changed", "b": "changed"}),
    (
        "one fails to start and is restored",
        [*GONE, Started("a"), StartFailed("b", "no"), Started("b")],
        {"a": "changed", "b": "restored"},
    ),
    (
        "one fails to start and cannot be restored",
        [*GONE, Started("a"), StartFailed("b", "no"), StartFailed("b", "no")],
        {"a": "changed", "b": "emptied"},
    ),
    (
        "none starts, one is restored",
        [*GONE, StartFailed("a", "no"), StartFailed("b", "no"), Started("b"), StartFailed("a", "no")],
        {"a": "emptied", "b": "restored"},
    ),
]


@pytest.mark.parametrize(("events", "expected"), [pytest.param(e, o, id=name) for name, e, o in SURGE])
def test_surge(events: list[Event], expected: dict[str, NodeOutcome]) -> None:
    assert outcomes(*after(wave_of("surge", "a", "b"), *events)) == expected


@pytest.mark.parametrize(("events", "expected"), [pytest.param(e, o, id=name) for name, e, o in REPLACE])
def test_replace(events: list[Event], expected: dict[str, NodeOutcome]) -> None:
    assert outcomes(*after(wave_of("replace", "a", "b"), *events)) == expected


def test_a_tolerant_wave_leaves_the_node_that_failed_as_it_was() -> None:
    events = [Started("a"), StartFailed("b", "no"), Retired(), Stopped("a")]
    ended = after(wave_of("surge", "a", "b", tolerant=True), *events)
    assert outcomes(*ended) == {"a": "changed", "b": "unchanged"}


def test_a_node_without_old_or_without_new_workers_changes_when_the_wave_is_done() -> None:
    wave = Wave((change("a", old=False), change("b", new=False), change("c", old=False, new=False)))
    ended, stopping = after(wave, Started("a"), Retired(), Stopped("b"))
    assert stopping == {"b"}
    assert outcomes(ended, stopping) == {"a": "changed", "b": "changed", "c": "changed"}


def test_a_node_that_never_had_a_plan_is_refused() -> None:
    ended = after(wave_of("surge", "a"), StartFailed("a", "no"))
    assert outcomes(*ended) == {"a": "unchanged"}
    assert outcomes(*ended, planned=False) == {"a": "refused"}


def test_each_outcome_has_a_plan_and_old_workers_never_run_beside_restored_ones() -> None:
    assert set(PLANS) == set(get_args(NodeOutcome))
    for after in PLANS.values():
        assert after is None or not (after.restored and (after.old or after.new))
    assert PLANS["emptied"] == PlanAfter()
    assert {name for name, after in PLANS.items() if after is None} == {"unchanged", "refused"}
