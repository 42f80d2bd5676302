"""Which workers tasks need: properties that hold for all demand, and what it looks like by example."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.model import WorkerSpec
from agentcluster.scheduler.planning.binpacking import Packing, pack
from agentcluster.scheduler.planning.demand import Bounds, NodeCapacity, ResourceRequest, RunningWorker, amount, kinds

GIB = 2**30


def cpu(nthreads: int = 2) -> WorkerSpec:
    return WorkerSpec(
        "cpu", "distributed.Nanny", nthreads=nthreads, memory_limit=GIB, resources={"CPU": float(nthreads)}
    )


def gpu(device: int = 0) -> WorkerSpec:
    return WorkerSpec(
        "gpu",
        "dask_cuda.CUDAWorker",
        nthreads=1,
        memory_limit=GIB,
        resources={"GPU": 1.0},
        devices=("0",),
        device=device,
    )


CPU = {"cpu": (cpu(), cpu())}
BOTH = {**CPU, "gpu": (gpu(0), gpu(1))}
TASK = ResourceRequest({}, 1, 1, "x")
TRAIN = ResourceRequest({"GPU": 1.0}, 1, 1, "train")


def node(
    name: str, offers: Any, mode: str = "cpu", running: int = 0, runs: Sequence[Any] = (), nbytes: int = 0
) -> NodeCapacity:
    """Return a node that has the first so many workers of its mode; those have tasks and data."""
    workers = {
        f"{name}-{i}": RunningWorker(spec, nbytes, runs[i] if i < len(runs) else {})
        for i, spec in enumerate(offers[mode][:running])
    }
    return NodeCapacity(name, mode, workers, offers)


def after(packing: Packing, nodes: Iterable[NodeCapacity]) -> dict[str, list[WorkerSpec]]:
    """Return what each node has then."""
    return {
        s.name: [
            *(
                []
                if s.name in packing.modes
                else [worker.spec for name, worker in s.workers.items() if name not in packing.remove]
            ),
            *packing.add.get(s.name, ()),
        ]
        for s in nodes
    }


def applied(packing: Packing, nodes: Sequence[NodeCapacity]) -> list[NodeCapacity]:
    """Return the nodes as they are when it was carried out, with the data where it was or moved on."""
    found = []
    for s, specs in zip(nodes, after(packing, nodes).values(), strict=True):
        kept = (
            {}
            if s.name in packing.modes
            else {name: worker for name, worker in s.workers.items() if name not in packing.remove}
        )
        new = {f"{s.name}-new{i}-{len(kept)}": RunningWorker(spec) for i, spec in enumerate(specs[len(kept) :])}
        found.append(NodeCapacity(s.name, packing.modes.get(s.name, s.mode), kept | new, s.offers))
    return found


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[ResourceRequest], list[NodeCapacity], Bounds]:
    resources = [{}, {"GPU": 1.0}, {"CPU": 1.0}, {"GPU": 2.0}, {"BIG": 1.0}]
    requests = [
        ResourceRequest(each, slots, slots, str(i))
        for i, each in enumerate(resources[: draw(st.integers(0, 5))])
        if (slots := draw(st.integers(0, 12)))
    ]
    nodes = []
    for i in range(draw(st.integers(0, 4))):
        offers = draw(st.sampled_from([CPU, BOTH, {"gpu": BOTH["gpu"], **CPU}]))
        mode = draw(st.sampled_from(sorted(offers)))
        running = draw(st.integers(0, 2))
        runs = [
            {n: draw(st.integers(0, 3)) for n in range(len(requests)) if requests[n].slots_on(spec)}
            for spec in offers[mode][:running]
        ]
        nodes.append(node(f"n{i}", offers, mode, running, runs, draw(st.sampled_from([0, GIB // 4]))))
    most = (draw(st.sampled_from([math.inf, 1, 3])), math.inf, math.inf)
    limits = {"gpu": (draw(st.integers(0, 1)), draw(st.sampled_from([math.inf, 1])))} if draw(st.booleans()) else {}
    return requests, nodes, Bounds((draw(st.integers(0, 3)), 0, 0), most, limits)


World = tuple[list[ResourceRequest], list[NodeCapacity], Bounds]


@given(worlds())
def test_never_more_than_a_mode_puts_there(world: World) -> None:
    requests, nodes, bounds = world
    packing = pack(requests, nodes, bounds)
    for s, specs in zip(nodes, after(packing, nodes).values(), strict=True):
        mode = packing.modes.get(s.name, s.mode)
        assert Counter(map(repr, specs)) <= Counter(map(repr, s.offers[mode]))
        assert packing.modes.get(s.name) != s.mode


@given(worlds())
def test_what_comes_keeps_the_upper_bounds(world: World) -> None:
    requests, nodes, bounds = world
    packing = pack(requests, nodes, bounds)
    before = [worker.spec for s in nodes for worker in s.workers.values()]
    there = [spec for specs in after(packing, nodes).values() for spec in specs]
    if any(packing.add.values()):
        assert len(there) <= max(bounds.most[0], len(before))
        for kind, (_, most) in bounds.kinds.items():
            assert sum(kind in kinds(spec) for spec in there) <= max(most, sum(kind in kinds(spec) for spec in before))


@given(worlds())
def test_the_lower_bound_is_kept_as_far_as_there_is_room(world: World) -> None:
    requests, nodes, bounds = world
    bounds = Bounds(bounds.least, bounds.most)
    there = after(pack(requests, nodes, bounds), nodes)
    room = sum(len(s.offers[s.mode]) for s in nodes)
    assert sum(map(len, there.values())) >= min(bounds.least[0], bounds.most[0], room) or any(
        s.mode != next(iter(s.offers)) for s in nodes
    )


@given(worlds())
def test_the_same_again_once_it_is_done(world: World) -> None:
    """It comes to rest; where an upper bound is in the way, the nodes may be tried one after the other."""
    requests, nodes, bounds = world
    for _ in range(3 + len(nodes)):
        nodes = applied(pack(requests, nodes, bounds), nodes)
    assert not pack(requests, nodes, bounds).changes


@given(worlds(), st.integers(1, 6))
def test_more_demand_never_means_fewer_slots(world: World, more: int) -> None:
    requests, nodes, _ = world
    requests = [request for request in requests if not request.resources][:1] or [TASK]
    nodes = [
        NodeCapacity(s.name, s.mode, {n: RunningWorker(worker.spec) for n, worker in s.workers.items()}, s.offers)
        for s in nodes
    ]
    larger = [ResourceRequest({}, requests[0].slots + more)]
    count = [
        sum(amount(spec)[1] for specs in after(pack(n, nodes, Bounds()), nodes).values() for spec in specs)
        for n in (requests, larger)
    ]
    assert count[0] <= count[1]


@given(worlds())
def test_nothing_that_holds_data_goes_without_room_for_it(world: World) -> None:
    requests, nodes, bounds = world
    packing = pack(requests, nodes, bounds)
    held = sum(worker.nbytes for s in nodes for worker in s.workers.values())
    there = [spec for specs in after(packing, nodes).values() for spec in specs]
    if packing.remove and held:
        assert sum(spec.memory_limit or math.inf for spec in there) >= 2 * held


@given(worlds())
def test_who_has_tasks_stays_unless_its_node_changes(world: World) -> None:
    requests, nodes, bounds = world
    packing = pack(requests, nodes, bounds)
    assert not packing.remove & {
        name for s in nodes for name, worker in s.workers.items() if any(worker.tasks.values())
    }


@given(worlds())
def test_nothing_happens_to_who_may_not_go(world: World) -> None:
    requests, nodes, bounds = world
    packing = pack(requests, nodes, bounds, lambda name: False)
    assert not packing.remove
    for s in nodes:
        if s.name in packing.modes:  # some tasks have no other place
            assert any(
                any(request.slots_on(spec) for request in requests if request.slots) for spec in packing.add[s.name]
            )


def test_tasks_bring_workers_up_spread_over_nodes() -> None:
    nodes = [node("a", CPU), node("b", CPU)]
    assert {n: len(specs) for n, specs in pack([ResourceRequest({}, 3)], nodes, Bounds()).add.items()} == {
        "a": 1,
        "b": 1,
    }
    assert not pack([], nodes, Bounds()).changes
    packing = pack([ResourceRequest({}, 99)], nodes, Bounds())
    assert (sum(map(len, packing.add.values())), packing.missing) == (4, {0: 91})


def test_idle_workers_go_those_first_that_hold_least() -> None:
    nodes = [node("a", CPU, running=2, nbytes=10), node("b", CPU, running=2)]
    assert pack([], nodes, Bounds()).remove == {"b-0", "b-1", "a-0"}, "one stays with the data"
    assert pack([], nodes, Bounds((2, 0, 0))).remove == {"b-0", "b-1"}
    assert pack([], [node("b", CPU, running=2)], Bounds()).remove == {"b-0", "b-1"}


def test_gpu_tasks_change_the_mode_of_the_node_that_gives_up_least() -> None:
    nodes = [node("a", CPU, running=2), node("b", BOTH, running=2, runs=[{1: 1}]), node("c", BOTH, running=2)]
    packing = pack([ResourceRequest({"GPU": 1.0}, 2), ResourceRequest({}, 1)], nodes, Bounds(), lambda name: False)
    assert (packing.modes, {n: len(specs) for n, specs in packing.add.items()}) == ({"c": "gpu"}, {"c": 2})
    more = pack([ResourceRequest({"GPU": 1.0}, 3), ResourceRequest({}, 1)], nodes, Bounds(), lambda name: False)
    assert more.modes == {"b": "gpu", "c": "gpu"}
    limited = pack(
        [ResourceRequest({"GPU": 1.0}, 3), ResourceRequest({}, 1)],
        nodes,
        Bounds(kinds={"gpu": (0, 1)}),
        lambda name: False,
    )
    assert {n: len(specs) for n, specs in limited.add.items()} == {"c": 1}
    assert limited.missing == {0: 2}


def test_a_node_goes_back_when_its_tasks_are_done() -> None:
    busy = node("a", BOTH, "gpu", running=2, runs=[{0: 1}])
    packing = pack([TRAIN, ResourceRequest({}, 4)], [busy], Bounds())
    assert not packing.modes
    assert packing.remove == frozenset(), "tasks without a wish run on GPU workers too"
    idle = node("a", BOTH, "gpu", running=2)
    packing = pack([ResourceRequest({}, 4)], [idle], Bounds())
    assert (packing.modes, len(packing.add["a"])) == ({"a": "cpu"}, 2)
    assert pack([ResourceRequest({}, 1)], [idle], Bounds(), lambda name: False).modes == {}, "not yet"
    assert pack([], [idle], Bounds()).modes == {"a": "cpu"}


def test_what_no_node_can_run_is_said_and_brings_nothing() -> None:
    nodes = [node("a", CPU), node("b", BOTH)]
    for resources in ({"BIG": 1.0}, {"GPU": 2.0}, {"CPU": 3.0}):
        request = ResourceRequest(resources, 60)
        packing = pack([request], nodes, Bounds())
        assert (packing.unmet, packing.changes) == ((request,), False)


def test_a_worker_runs_as_many_as_its_resources_allow() -> None:
    big = WorkerSpec("custom", "distributed.Nanny", nthreads=8, resources={"MEMORY": 100e9})
    assert ResourceRequest({"MEMORY": 70e9}, 2).slots_on(big) == 1
    assert ResourceRequest({"MEMORY": 30e9}, 9).slots_on(big) == 3
    assert ResourceRequest({}, 9).slots_on(big) == 8
    packing = pack([ResourceRequest({"MEMORY": 70e9}, 2)], [node("a", {"cpu": (big, big, big)})], Bounds())
    assert len(packing.add["a"]) == 2


def test_memory_in_use_brings_twice_as_many() -> None:
    nodes = [node("a", CPU, running=1, nbytes=int(0.7 * GIB)), node("b", CPU)]
    assert sum(map(len, pack([], nodes, Bounds()).add.values())) == 1


@pytest.mark.parametrize("least", [(3, 0, 0), (0, 5, 0), (0, 0, 2 * GIB + 1)])
def test_lower_bounds_in_every_unit(least: Any) -> None:
    nodes = [node("a", CPU, running=1), node("b", CPU)]
    assert sum(map(len, pack([], nodes, Bounds(least)).add.values())) == 2


def test_the_change_is_the_least() -> None:
    """Equal nodes: those that run something are used, in the order in which they were given."""
    nodes = [node(name, CPU, running=1) for name in "abc"]
    packing = pack([ResourceRequest({}, 5)], nodes, Bounds())
    assert not any(packing.add.values())
    assert not packing.remove
    packing = pack([ResourceRequest({}, 1)], nodes, Bounds())
    assert len(packing.remove) == 2


def test_what_there_must_be_is_on_ordinary_nodes() -> None:
    """A worker in standby that is busy does not count for the minimum: its host could never be let go."""
    home, extra = node("home", CPU), replace(node("extra", CPU, running=1, runs=[{0: 1}]), extra=True)
    packing = pack([ResourceRequest({}, 1, 1)], [home, extra], Bounds(least=(1, 0, 0)))
    assert (set(packing.add), packing.remove) == ({"home"}, frozenset())
    home, extra = node("home", CPU, running=1), replace(node("extra", CPU, running=1), extra=True)
    packing = pack([], [extra, home], Bounds(least=(1, 0, 0)))
    assert (packing.add, packing.remove) == ({}, {"extra-0"})
    # Where they have no room it does.
    home, extra = node("home", {"cpu": ()}), replace(node("extra", CPU, running=1, runs=[{0: 1}]), extra=True)
    packing = pack([ResourceRequest({}, 1, 1)], [home, extra], Bounds(least=(1, 0, 0)))
    assert (packing.add, packing.remove, packing.shortfall) == ({}, frozenset(), 0)
