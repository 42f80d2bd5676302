"""Workers beyond limits that have become smaller since they came."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from agentcluster.model import WorkerSpec
from agentcluster.scheduler.autoscaling import beyond_limits
from agentcluster.scheduler.planning.demand import Bounds, NodeCapacity, RunningWorker


def node(*workers: tuple[str, int, int], kind: str = "cpu", memory: int | None = None) -> NodeCapacity:
    """Return a node of workers: name, tasks, and bytes of data."""
    spec = WorkerSpec(kind, "distributed.Nanny", nthreads=2, memory_limit=memory)
    running = {name: RunningWorker(spec, nbytes, {0: tasks} if tasks else {}) for name, tasks, nbytes in workers}
    return NodeCapacity(f"node-{kind}", "uniform", running, {})


def most(workers: float = math.inf, threads: float = math.inf, memory: float = math.inf) -> Bounds:
    return Bounds(most=(workers, threads, memory))


def test_those_with_fewest_tasks_and_least_data_leave() -> None:
    four = node(("a", 2, 0), ("b", 1, 9), ("c", 1, 5), ("d", 3, 0))
    assert beyond_limits([four], most()) == set()
    assert beyond_limits([four], most(workers=4)) == set()
    assert beyond_limits([four], most(workers=2)) == {"b", "c"}
    assert beyond_limits([four], most(threads=6)) == {"c"}
    assert beyond_limits([four], most(workers=0)) == {"a", "b", "c"}, "one stays for the data"
    assert beyond_limits([node(("a", 1, 0))], most(workers=0)) == {"a"}


def test_limits_of_a_kind_are_about_that_kind() -> None:
    both = [node(("a", 0, 0), ("b", 0, 0)), node(("x", 5, 0), ("y", 4, 0), kind="gpu")]
    assert beyond_limits(both, Bounds(kinds={"gpu": (0, 1)})) == {"y"}
    assert beyond_limits(both, Bounds(kinds={"gpu": (0, 1)}, most=(2, math.inf, math.inf))) == {"a", "b"} | {"y"}


def test_data_that_the_others_have_no_memory_for_stays() -> None:
    tight = node(("a", 1, 400), ("b", 1, 400), ("c", 1, 400), memory=1000)
    assert beyond_limits([tight], most(workers=1)) == set()
    assert len(beyond_limits([node(*((name, 1, 100) for name in "abc"), memory=1000)], most(workers=1))) == 2


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 8), st.integers(0, 16))
def test_it_ends_within_the_limits_and_takes_no_more(tasks: list[int], workers: int, threads: int) -> None:
    nodes = [node(*((str(index), each, 0) for index, each in enumerate(tasks)))]
    gone = beyond_limits(nodes, most(workers=workers, threads=threads))
    allowed = min(workers, threads // 2)
    assert len(tasks) - len(gone) == min(len(tasks), allowed)
    stay = [each for index, each in enumerate(tasks) if str(index) not in gone]
    assert not gone or not stay or max(tasks[int(name)] for name in gone) <= min(stay)
