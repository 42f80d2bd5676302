"""The registry: the states of a node, names that are never given twice, and what is known of each node."""

from __future__ import annotations

import gc
import itertools
import json
import re
import weakref
from typing import get_args

import pytest

from agentcluster.errors import NodeExists, NodeNotFound
from agentcluster.model import Hardware, Mode, NodePlan, WorkerSpec, WorkerState
from agentcluster.requests import NodeRegistration
from agentcluster.scheduler.planning import nodes as registry
from agentcluster.scheduler.planning.nodes import EMPTY, SETTLED, TRANSITIONS, Event, Node, Registry, State
from agentcluster.wire import from_wire

HARDWARE = Hardware("host", 8, 2**30, versions={"python": "3.11"})
STATES: tuple[State, ...] = get_args(State)
EVENTS: tuple[Event, ...] = get_args(Event)
CPU, GPU, NONE = Mode("auto-cpu", {"nworkers": 2}), Mode("auto-gpu"), Mode("none")


def spec(nthreads: int = 1) -> WorkerSpec:
    return WorkerSpec("cpu", "distributed.Nanny", nthreads=nthreads)


def running(name: str) -> WorkerState:
    return WorkerState(name, "running", f"tcp://10.0.0.1:{40000 + int(name[-1])}")


def register(
    nodes: Registry,
    name: str = "n",
    address: str | None = None,
    *,
    now: float = 0.0,
    exact: bool = True,
    mode: Mode | None = None,
    fallback: Mode | None = None,
) -> Node:
    """Register a node as its agent asks for it."""
    address = address or f"tcp://{name}:1"
    return nodes.register(NodeRegistration(name, address, HARDWARE, mode, fallback, exact), now)


def joined(nodes: Registry, name: str = "n", *, now: float = 0.0, workers: int = 0) -> Node:
    """Return a registered node that has `workers` workers, all running."""
    node = register(nodes, name, now=now)
    if workers:
        node.adopt(CPU, {worker: spec() for worker in node.take_names(workers)})
        node.workers = {worker: running(worker) for worker in node.plan.workers}
    return node


# -- states ------------------------------------------------------------------------------------------------------------


def test_the_drawing_is_the_table() -> None:
    line = re.compile(r"^    ([a-z, ]+) ──(\w+)──▶ (\w+)$", re.MULTILINE)
    drawn = {
        (state, event): end
        for states, event, end in line.findall(registry.__doc__ or "")
        for state in states.split(", ")
    }
    assert drawn == TRANSITIONS


def test_every_state_can_be_reached_and_left() -> None:
    reached: set[State] = {"joining"}
    for _ in STATES:
        reached |= {end for (state, _), end in TRANSITIONS.items() if state in reached}
    assert reached == set(STATES)
    assert {state for (state, _), end in TRANSITIONS.items() if end != state} == set(STATES)
    assert {event for _, event in TRANSITIONS} == set(EVENTS)


def test_every_swap_can_end_in_every_way() -> None:
    ends = {event: TRANSITIONS["swapping", event] for event in ("planned", "emptied", "refused", "lost")}
    assert set(ends.values()) == SETTLED
    assert all((state, "lost") in TRANSITIONS for state in STATES)


@pytest.mark.parametrize(("state", "event"), sorted(itertools.product(STATES, EVENTS)))
def test_what_the_table_does_not_have_raises(state: State, event: Event) -> None:
    node = Node("n", "tcp://n:1", HARDWARE, state=state)
    if (state, event) in TRANSITIONS:
        node.to(event)
        assert node.state == TRANSITIONS[state, event]
    else:
        with pytest.raises(RuntimeError, match=f"node 'n' got '{event}' while '{state}'"):
            node.to(event)
        assert node.state == state


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_taken_name_is_an_error_that_says_who_has_it() -> None:
    nodes = Registry()
    joined(nodes)
    with pytest.raises(NodeExists, match="'n' is already registered by the agent at tcp://n:1"):
        register(nodes, "n", "tcp://other:1")
    assert nodes.get("n").address == "tcp://n:1"


def test_a_name_that_need_not_be_exact_is_made_unique() -> None:
    nodes = Registry()
    given = [register(nodes, "n", f"tcp://n:{i}", exact=False).name for i in range(3)]
    assert given == ["n", "n.2", "n.3"]
    nodes.get("n.2").to("lost")
    assert register(nodes, "n", "tcp://n:9", exact=False).name == "n.2"
    assert register(nodes, "n.2", "tcp://n:10", exact=False).name == "n.2.2"


def test_worker_names_are_never_given_twice() -> None:
    nodes = Registry()
    given = joined(nodes).take_names(2)
    nodes.get("n").to("lost")
    given += joined(nodes).take_names(2)
    nodes.unregister("n")
    given += joined(nodes).take_names(1)
    assert given == ["n-0", "n-1", "n-2", "n-3", "n-4"]
    assert joined(nodes, "other").take_names(1) == ["other-0"]


def test_a_node_that_is_back_has_no_workers() -> None:
    nodes = Registry()
    lost = joined(nodes, workers=2)
    lost.adopt(GPU, {"n-2": spec()})
    lost.to("lost")
    back = joined(nodes, now=5.0)
    assert nodes.get("n") is back is not lost
    assert (back.state, back.plan, back.workers, back.heard) == ("joining", EMPTY, {}, 5.0)


def test_forgetting_a_node_that_left_already_is_no_error() -> None:
    nodes = Registry()
    joined(nodes)
    nodes.wanted["n"] = GPU
    nodes.unregister("n")
    nodes.unregister("n")
    assert not nodes.nodes
    assert not nodes.wanted


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_get_names_the_nodes_that_there_are() -> None:
    nodes = Registry()
    joined(nodes, "gpu-1")
    with pytest.raises(NodeNotFound, match="no node named 'gpu1'; did you mean 'gpu-1'"):
        nodes.get("gpu1")


def test_select() -> None:
    nodes = Registry()
    a, b, c = (joined(nodes, name) for name in "abc")
    b.to("lost")
    assert nodes.select(None) == [a, c]
    assert nodes.select("c") == [c]
    assert nodes.select(["c", "b", "c"]) == [c, b]
    assert nodes.select([]) == []
    with pytest.raises(NodeNotFound):
        nodes.select(["a", "d"])


def test_all_nodes_are_in_the_order_of_their_names() -> None:
    nodes = Registry()
    gpu10, gpu2, cpu = (joined(nodes, name) for name in ("gpu-10", "gpu-2", "cpu"))
    assert nodes.select(None) == [cpu, gpu2, gpu10]


UNIFORM, MIXED = Mode("uniform", {"nthreads": 1}), Mode("mixed")


@pytest.mark.parametrize(
    ("wanted", "own", "default", "fallback", "expected"),
    [
        (GPU, CPU, NONE, UNIFORM, GPU),
        (None, CPU, NONE, UNIFORM, CPU),
        (None, None, NONE, UNIFORM, NONE),
        (None, None, Mode("auto-cpu"), UNIFORM, Mode("auto-cpu")),
        (None, None, None, UNIFORM, UNIFORM),
        (None, None, None, None, Mode("auto-cpu")),
    ],
    ids=["by name", "by hand", "set for all", "set to the built-in", "fallback", "built-in"],
)
def test_the_first_mode_that_was_said_wins(
    wanted: Mode | None, own: Mode | None, default: Mode | None, fallback: Mode | None, expected: Mode
) -> None:
    nodes = Registry()
    node = register(nodes, mode=own, fallback=fallback)
    if wanted is not None:
        nodes.wanted["n"] = wanted
    before = nodes.default
    if default is not None:
        nodes.default = default
    assert nodes.mode_for(node) == expected
    # Undone, it is as if nobody had ever set one.
    nodes.default = before
    assert nodes.mode_for(node) == (wanted or own or fallback or Mode("auto-cpu"))


def test_a_registry_that_is_made_with_a_mode_has_it_set() -> None:
    nodes = Registry(MIXED)
    node = register(nodes, fallback=UNIFORM)
    assert nodes.mode_for(node) == MIXED


def test_a_node_is_stale_after_its_time_to_live() -> None:
    nodes = Registry()
    for name, heard in (("a", 0.0), ("b", 50.0), ("c", 0.0)):
        joined(nodes, name, now=heard)
    nodes.get("c").to("lost")
    assert nodes.stale(60.0, ttl=60.0) == []
    assert [node.name for node in nodes.stale(60.5, ttl=60.0)] == ["a"]
    assert [node.name for node in nodes.stale(111.0, ttl=60.0)] == ["a", "b"]


def test_the_owner_of_a_worker_is_the_node_that_plans_it() -> None:
    nodes = Registry()
    a, b = joined(nodes, "a", workers=2), joined(nodes, "b", workers=1)
    assert nodes.owner("a-1") is a
    assert nodes.owner("b-0") is b
    assert nodes.owner("b-1") is None


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_adopted() -> None:
    node = joined(Registry(), workers=2)
    assert (node.state, node.plan.revision) == ("ready", 1)
    node.problem = "worker n-1 crashed"
    node.to("swap")
    node.adopt(GPU, {"n-0": spec(), "n-2": spec(4)})
    assert node.plan == NodePlan(2, GPU, {"n-0": spec(), "n-2": spec(4)})
    assert node.workers == {"n-0": running("n-0")}
    assert (node.state, node.problem) == ("ready", None)
    node.to("swap")
    node.adopt(NONE, {})
    assert (node.state, node.plan.revision) == ("standby", 3)


def test_a_node_keeps_no_earlier_plans() -> None:
    """A cluster that adapts for months changes its plans many times."""
    nodes = Registry()
    node = joined(nodes, workers=1)
    earlier = []
    for _ in range(3):
        earlier.append(weakref.ref(node.plan))
        node.to("swap")
        node.adopt(CPU, {worker: spec() for worker in node.take_names(1)})
    node.to("lost")
    earlier.append(weakref.ref(node.plan))
    joined(nodes, workers=1)
    del node
    gc.collect()
    assert [plan() for plan in earlier] == [None] * 4


def test_a_swap_that_failed_settles_with_the_plan_that_was() -> None:
    node = joined(Registry(), workers=1)
    before = node.plan
    node.to("swap")
    node.settle()
    assert (node.state, node.plan) == ("ready", before)


def test_a_worker_that_ended_is_dropped() -> None:
    node = joined(Registry(), workers=2)
    node.drop("n-0")
    assert (node.state, list(node.plan.workers), list(node.workers), node.plan.revision) == (
        "ready",
        ["n-1"],
        ["n-1"],
        2,
    )
    node.drop("n-0")
    node.drop("unknown")
    assert node.plan.revision == 2
    node.drop("n-1")
    assert (node.state, node.plan.workers, node.workers) == ("standby", {}, {})


def test_a_worker_that_ended_during_a_swap_is_in_no_plan_whatever_its_end() -> None:
    for swapped in (True, False):
        node = joined(Registry(), workers=3)
        before = node.plan
        node.to("swap")
        new = node.take_names(2)
        for worker in ("n-0", new[0]):
            node.drop(worker)
        assert (node.state, node.plan) == ("swapping", before)
        if swapped:
            node.adopt(GPU, {name: spec() for name in ("n-0", "n-1", *new)})
            assert list(node.plan.workers) == ["n-1", new[1]]
        else:
            node.settle()
            assert list(node.plan.workers) == list(node.workers) == ["n-1", "n-2"]
        assert node.state == "ready"
        assert node.plan.revision == 2
        assert not node.ended


def test_a_swap_whose_last_worker_ended_leaves_a_standby() -> None:
    node = joined(Registry(), workers=1)
    node.to("swap")
    node.drop("n-0")
    node.settle()
    assert (node.state, node.plan.workers) == ("standby", {})


def test_a_snapshot_is_plain_data() -> None:
    node = joined(Registry(), workers=2)
    node.problem = "odd"
    found = json.loads(json.dumps(node.snapshot()))
    assert found == node.snapshot()
    assert found.pop("plan").keys() == {"n-0", "n-1"}
    assert from_wire(Hardware, found.pop("hardware")) == HARDWARE
    assert from_wire(WorkerState, found.pop("workers")["n-1"]) == running("n-1")
    assert found.pop("metrics")["cpu"] == 0.0
    assert found == {
        "name": "n",
        "labels": {},
        "address": "tcp://n:1",
        "state": "ready",
        "mode": "auto-cpu",
        "config": {"nworkers": 2},
        "revision": 1,
        "problem": "odd",
        "tracked": [],
    }
