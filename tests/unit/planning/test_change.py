"""Which workers stay, go and come: properties that hold for every plan."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from agentcluster.model import Hardware, Mode, NodePlan, WorkerSpec
from agentcluster.scheduler.planning.change import NodeChange, change_to, change_without
from agentcluster.scheduler.planning.demand import Amount
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.scheduler.planning.scaling import Load, choose_nodes, choose_workers

SPECS = st.builds(
    WorkerSpec,
    kind=st.just("cpu"),
    cls=st.just("distributed.Nanny"),
    options=st.sampled_from([{}, {"preload": ["a"]}]),
    nthreads=st.integers(1, 3),
    device=st.none() | st.integers(0, 1),
)


def cpu(nthreads: int) -> WorkerSpec:
    return WorkerSpec("cpu", "distributed.Nanny", nthreads=nthreads)


def counted(specs: Iterable[WorkerSpec]) -> Counter[str]:
    """Count specs; their text is equal when they are, and they cannot be hashed."""
    return Counter(str(dataclasses.asdict(spec)) for spec in specs)


MODE = Mode("auto-cpu")


def running(*specs: WorkerSpec) -> Node:
    """Return a node whose workers have these settings."""
    plan = NodePlan(1, MODE, {f"n-{i}": spec for i, spec in enumerate(specs)})
    return Node("n", "tcp://n:1", Hardware("host", 8, 2**30), plan=plan)


@given(st.lists(SPECS, max_size=8), st.lists(SPECS, max_size=8))
def test_what_stays_and_comes_is_what_is_wanted(now: list[WorkerSpec], wanted: list[WorkerSpec]) -> None:
    node = running(*now)
    change = change_to(node, MODE, wanted)
    assert counted([*change.keep.values(), *change.add]) == counted(wanted)
    assert {**change.keep, **change.remove} == node.plan.workers
    assert not set(change.keep) & set(change.remove)


@given(st.lists(SPECS, max_size=8), st.lists(SPECS, max_size=8))
def test_as_many_stay_as_can(now: list[WorkerSpec], wanted: list[WorkerSpec]) -> None:
    change = change_to(running(*now), MODE, wanted)
    assert len(change.keep) == (counted(now) & counted(wanted)).total()
    assert not counted(change.add) & (counted(now) - counted(change.keep.values()))


def test_the_first_of_equal_workers_stay() -> None:
    node = running(cpu(1), cpu(2), cpu(1), cpu(1))
    keep, remove = {"n-0": cpu(1), "n-2": cpu(1)}, {"n-1": cpu(2), "n-3": cpu(1)}
    assert change_to(node, MODE, [cpu(1), cpu(4), cpu(1)]) == NodeChange(node, MODE, keep, remove, (cpu(4),))


def test_a_change_without_workers_keeps_the_others() -> None:
    node = running(cpu(1), cpu(2))
    change = change_without(node, MODE, {"n-0", "of another node"}, [cpu(3)])
    assert change == NodeChange(node, MODE, {"n-1": cpu(2)}, {"n-0": cpu(1)}, (cpu(3),))
    assert (change.old, change.new) == (("n-0",), {})


def test_the_workers_that_come_and_those_that_are_restored_by_name() -> None:
    change = NodeChange(running(cpu(1)), MODE, {}, {"n-0": cpu(1)}, (cpu(2), cpu(3)), ("n-1", "n-2"), ("n-3",))
    assert change.new == {"n-1": cpu(2), "n-2": cpu(3)}
    assert change.restored == {"n-3": cpu(1)}
    report = change.report()
    assert (report.node, report.mode, report.old, report.new, report.kept) == (
        "n",
        "auto-cpu",
        ("n-0",),
        ("n-1", "n-2"),
        (),
    )
    assert "1 x 2 threads" in report.shape


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[str, dict[str, int]], dict[str, int], int]:
    nodes = [f"n{i}" for i in range(draw(st.integers(0, 5)))]
    current = {
        node: {f"{node}-{i}": size for i, size in enumerate(draw(st.lists(st.integers(0, 4), max_size=5)))}
        for node in nodes
    }
    capacity = {node: draw(st.integers(0, 6)) for node in nodes}
    return current, capacity, draw(st.integers(0, sum(map(len, current.values())) + 8))


def workers(
    current: Mapping[str, Mapping[str, int]], capacity: Mapping[str, int], total: int
) -> tuple[set[str], dict[str, int]]:
    """Scale by number of workers; a node has room for as many as its capacity is."""
    held = {n: {name: Load(nbytes, (1,)) for name, nbytes in group.items()} for n, group in current.items()}
    room = {n: [(1,)] * max(0, capacity[n] - len(group)) for n, group in current.items()}
    go, come = choose_workers(held, room, (total,))
    return go, {n: len(indexes) for n, indexes in come.items()}


def counts(current: Mapping[str, Mapping[str, int]], go: set[str], come: Mapping[str, int]) -> dict[str, int]:
    return {node: len(set(workers) - go) + come[node] for node, workers in current.items()}


@given(clusters())
def test_the_total_is_exact_as_far_as_there_is_room(
    cluster: tuple[dict[str, dict[str, int]], dict[str, int], int],
) -> None:
    current, capacity, total = cluster
    go, come = workers(current, capacity, total)
    now = sum(map(len, current.values()))
    most = sum(max(capacity[node], len(workers)) for node, workers in current.items())
    assert sum(counts(current, go, come).values()) == (min(total, most) if total > now else total)
    assert go <= {worker for workers in current.values() for worker in workers}
    assert set(come) == set(current)
    assert not (go and any(come.values()))
    if total == now:
        assert not go
        assert not any(come.values())


@given(clusters())
def test_no_node_gets_more_than_its_mode_puts_there(
    cluster: tuple[dict[str, dict[str, int]], dict[str, int], int],
) -> None:
    current, capacity, total = cluster
    go, come = workers(current, capacity, total)
    after = counts(current, go, come)
    assert all(after[node] <= capacity[node] for node, number in come.items() if number)


@given(clusters())
def test_who_holds_least_goes_first(cluster: tuple[dict[str, dict[str, int]], dict[str, int], int]) -> None:
    current, capacity, total = cluster
    go, _ = workers(current, capacity, total)
    held = {worker: nbytes for workers in current.values() for worker, nbytes in workers.items()}
    stay = held.keys() - go
    assert not go or not stay or max(held[w] for w in go) <= min(held[w] for w in stay)


@given(clusters())
def test_new_workers_are_spread(cluster: tuple[dict[str, dict[str, int]], dict[str, int], int]) -> None:
    current, capacity, total = cluster
    go, come = workers(current, capacity, total)
    after = counts(current, go, come)
    for node, number in come.items():
        if number:
            # The last one that came here found no emptier node with room.
            assert all(after[other] >= after[node] - 1 for other in after if after[other] < capacity[other])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 30))
def test_of_equal_workers_those_go_that_have_most_beside_them(sizes: list[int], total: int) -> None:
    current = {f"n{i}": {f"n{i}-{j}": 0 for j in range(size)} for i, size in enumerate(sizes)}
    go, come = workers(current, dict(zip(current, sizes, strict=True)), total)
    after = counts(current, go, come)
    touched = [node for node, size in zip(current, sizes, strict=True) if after[node] < size]
    assert all(max(after.values()) - 1 <= after[node] for node in touched)


def test_scaling_by_example() -> None:
    current = {"a": {"a-0": 100, "a-1": 0, "a-2": 5}, "b": {"b-0": 0}}
    capacity = {"a": 4, "b": 4}
    assert workers({"a": {"a-0": 9, "a-1": 9}, "b": {"b-0": 1}}, capacity, 2)[0] == {"b-0"}, "data counts before spread"
    assert workers(current, capacity, 3) == ({"a-1"}, {"a": 0, "b": 0})
    assert workers(current, capacity, 1) == ({"a-1", "b-0", "a-2"}, {"a": 0, "b": 0})
    assert workers(current, capacity, 6) == (set(), {"a": 0, "b": 2})
    assert workers(current, capacity, 99) == (set(), {"a": 1, "b": 3})


UNITS = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), UNITS), max_size=4), max_size=4),
    st.lists(st.lists(UNITS, max_size=4), min_size=4, max_size=4),
    UNITS.map(lambda units: tuple(3 * unit for unit in units)),
)
def test_nothing_goes_or_comes_in_vain(
    now: list[list[tuple[int, Amount]]], offers: list[list[Amount]], wanted: Amount
) -> None:
    current = {f"n{i}": {f"n{i}-{j}": Load(*each) for j, each in enumerate(group)} for i, group in enumerate(now)}
    room = {node: offers[i] for i, node in enumerate(current)}
    go, come = choose_workers(current, room, wanted)

    def total(amounts: Iterable[Amount]) -> list[float]:
        return [sum(column) for column in zip((0, 0, 0), *amounts, strict=True)]

    def enough(there: Iterable[float]) -> bool:
        return all(have >= want for have, want in zip(there, wanted, strict=True))

    before = [held.amount for group in current.values() for held in group.values()]
    stay = [held.amount for group in current.values() for name, held in group.items() if name not in go]
    new = [room[node][index] for node, indexes in come.items() for index in indexes]
    assert not (go and new)
    assert all(len(set(indexes)) == len(indexes) for indexes in come.values())
    if enough(total(before)):
        assert enough(total(stay))
        assert not new
        # Each that stays is needed.
        assert not any(enough([a - b for a, b in zip(total(stay), each, strict=True)]) for each in stay)
    else:
        assert not go
        everything = total([*before, *(each for offered in room.values() for each in offered)])
        after = total([*before, *new])
        assert all(have >= min(want, most) for have, want, most in zip(after, wanted, everything, strict=True))
        # The last one brought something that was missing.
        assert all(any(each) for each in new)


def test_threads_and_memory_by_example() -> None:
    current = {"a": {"a-0": Load(9, (1, 2, 10)), "a-1": Load(0, (1, 2, 10))}, "b": {}}
    room: dict[str, list[Amount]] = {"a": [(1, 2, 10)], "b": [(1, 16, 0), (1, 4, 100)]}
    assert choose_workers(current, room, (0, 2, 0)) == ({"a-1"}, {"a": [], "b": []})
    assert choose_workers(current, room, (0, 3, 0)) == (set(), {"a": [], "b": []})
    assert choose_workers(current, room, (0, 5, 0)) == (set(), {"a": [], "b": [0]})
    assert choose_workers(current, room, (0, 0, 40)) == (set(), {"a": [], "b": [1]})


def test_which_nodes_are_choose_nodes() -> None:
    nbytes = {"a": 5, "b": None, "c": 0, "d": None}
    assert choose_nodes(nbytes, 0) == (["c", "a"], [])
    assert choose_nodes(nbytes, 1) == (["c"], [])
    assert choose_nodes(nbytes, 2) == ([], [])
    assert choose_nodes(nbytes, 3) == ([], ["b"])
    assert choose_nodes(nbytes, 9) == ([], ["b", "d"])
