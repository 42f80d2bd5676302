"""Which hosts in standby are launched for what tasks need, and how the reserve keeps them; without any host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentcluster.client.hosts import LONGEST_RETRY, RETRY, Reserve
from agentcluster.model import Gpu, Hardware, WorkerSpec
from agentcluster.requests import AdaptiveRequest
from agentcluster.scheduler.planning.binpacking import Packing, pack, select_hosts
from agentcluster.scheduler.planning.demand import Bounds, NodeCapacity, ResourceRequest, RunningWorker

GIB = 2**30
SLOTS = st.integers(0, 8)
GPU = Gpu("0", "GPU-0", "stub", GIB)


def cpu() -> WorkerSpec:
    return WorkerSpec("cpu", "distributed.Nanny", nthreads=1, memory_limit=GIB, resources={"CPU": 1.0})


def gpu() -> WorkerSpec:
    return WorkerSpec("gpu", "dask_cuda.CUDAWorker", nthreads=1, memory_limit=GIB, resources={"GPU": 1.0})


def machine(cpus: int = 2, gpus: int = 0) -> Hardware:
    return Hardware(hostname="machine", cpus=cpus, memory=8 * GIB, gpus=(GPU,) * gpus)


def unseen(name: str, hardware: Hardware) -> NodeCapacity:
    offers = {"cpu": (cpu(),) * hardware.cpus}
    return NodeCapacity(
        name, "cpu", {}, offers | ({"gpu": (gpu(),) * len(hardware.gpus)} if hardware.gpus else {}), extra=True
    )


def there(cpus: int, running: int = 0) -> NodeCapacity:
    offer = (cpu(),) * cpus
    return NodeCapacity(
        "there", "cpu", {f"w{i}": RunningWorker(spec) for i, spec in enumerate(offer[:running])}, {"cpu": offer}
    )


def tasks(slots: int, **resources: float) -> ResourceRequest:
    return ResourceRequest(resources, slots, slots, "key", "task")


def call(
    requests: Sequence[ResourceRequest],
    nodes: Sequence[NodeCapacity],
    reserve: dict[str, Hardware | None],
    like: Hardware | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008
    kinds: Any = None,
) -> tuple[str, ...]:
    def pack_with(more: Sequence[NodeCapacity]) -> Packing:
        return pack(requests, [*nodes, *more], bounds)

    return select_hosts(AdaptiveRequest(reserve=reserve, kinds=kinds or {}), requests, like, unseen, pack_with)


def test_as_few_as_it_takes() -> None:
    reserve: dict[str, Hardware | None] = dict.fromkeys("abcd", machine(2))
    assert call([tasks(2)], [there(2)], reserve) == ()
    assert call([tasks(3)], [there(2)], reserve) == ("a",)
    assert call([tasks(4)], [there(2)], reserve) == ("a",)
    assert call([tasks(5)], [there(2)], reserve) == ("a", "b")
    assert call([tasks(100)], [there(2)], reserve) == tuple("abcd")
    assert call([tasks(1)], [], reserve) == ("a",)


def test_only_those_that_help() -> None:
    reserve: dict[str, Hardware | None] = {"a": machine(2), "b": machine(2, gpus=2), "c": machine(2, gpus=2)}
    assert call([tasks(2, GPU=1)], [there(2)], reserve) == ("b",)
    assert call([tasks(3, GPU=1)], [there(2)], reserve) == ("b", "c")
    assert call([tasks(1, TPU=1)], [there(2)], reserve) == ()
    assert call([tasks(3), tasks(1, GPU=1)], [there(2)], reserve) == ("a", "b")


def test_what_was_never_seen_is_like_a_node_that_is_there_or_looked_at() -> None:
    reserve: dict[str, Hardware | None] = dict.fromkeys("abc")
    assert call([tasks(6)], [there(2)], reserve, like=machine(2)) == ("a", "b")
    # Nobody that is there has a GPU; one of the others may.
    assert call([tasks(6, GPU=1)], [there(2)], reserve, like=machine(2)) == ("a",)
    assert call([tasks(6, GPU=1)], [there(2)], {"a": machine(2), "b": None}, like=machine(2)) == ("b",)
    assert call([tasks(6)], [], reserve) == ("a",)
    assert call([tasks(6, GPU=1)], [there(2)], {"a": machine(2)}, like=machine(2)) == ()


def test_within_bounds() -> None:
    reserve: dict[str, Hardware | None] = dict.fromkeys("abcd", machine(2))
    assert call([tasks(9)], [there(2, 2)], reserve, bounds=Bounds(most=(2, math.inf, math.inf))) == ()
    assert call([tasks(9)], [there(2, 2)], reserve, bounds=Bounds(most=(5, math.inf, math.inf))) == ("a", "b")
    assert call([], [there(2, 2)], reserve, bounds=Bounds(least=(6, 0, 0))) == ("a", "b")
    unknown: dict[str, Hardware | None] = dict.fromkeys("abcd")
    # Never seen, and nobody could help: not even looked at.
    no_more = Bounds(most=(2, math.inf, math.inf))
    assert call([tasks(9, GPU=1)], [there(2, 2)], unknown, machine(2), no_more) == ()
    no_gpu = Bounds(kinds={"gpu": (0, 0)})
    assert call([tasks(9, GPU=1)], [there(2, 2)], unknown, machine(2), no_gpu, kinds={"gpu": (0, 0)}) == ()
    some = Bounds(kinds={"gpu": (2, 4)})
    assert call([], [there(2, 2)], unknown, machine(2), some, kinds={"gpu": (2, 4)}) == ("a",)


@given(
    requests=st.lists(
        st.builds(tasks, st.integers(0, 8)) | st.builds(tasks, st.integers(0, 8), GPU=st.just(1)), max_size=3
    ),
    cpus=st.integers(0, 3),
    hosts=st.lists(st.builds(machine, st.integers(1, 3), st.integers(0, 2)), max_size=6),
    most=st.integers(0, 20),
)
def test_all_that_can_be_brought_and_nobody_for_nothing(
    requests: list[ResourceRequest], cpus: int, hosts: list[Hardware], most: int
) -> None:
    bounds = Bounds(most=(most, math.inf, math.inf))
    reserve: dict[str, Hardware | None] = {f"h{i}": host for i, host in enumerate(hosts)}
    chosen = call(requests, [there(cpus)], reserve, bounds=bounds)
    assert list(chosen) == [name for name in reserve if name in chosen]

    def lacking(names: Sequence[str]) -> float:
        return pack(requests, [there(cpus), *(unseen(n, reserve[n] or machine()) for n in names)], bounds).shortfall

    assert lacking(chosen) <= lacking(())
    if chosen:
        assert lacking(chosen) < lacking(chosen[:-1])
    else:
        assert all(lacking([name]) >= lacking(()) for name in reserve)


def test_the_reserve_keeps_order_and_leaves_alone_who_failed() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    reserve = Reserve(map(Named, "abc"))
    assert reserve.here == ("a", "b", "c")
    assert reserve.take("a").name == "a"
    assert (reserve.here, reserve.out) == (("b", "c"), ("a",))
    reserve.failed("a", 100.0)
    assert (reserve.here, reserve.out) == (("b", "c", "a"), ())
    assert list(reserve.ready(100.0)) == ["b", "c"]
    assert list(reserve.ready(100.0 + RETRY)) == ["b", "c", "a"]
    for _ in range(2000):
        reserve.failed("a", 100.0)
    assert "a" not in reserve.ready(99.0 + LONGEST_RETRY)
    assert "a" in reserve.ready(100.0 + LONGEST_RETRY)
    reserve.take("a")
    reserve.came("a", {"hostname": "x", "cpus": 4, "memory": GIB})
    reserve.back("a")
    assert list(reserve.ready(0.0)) == ["a", "b", "c"]
    found = reserve.ready(0.0)["a"]
    assert found is not None
    assert found.cpus == 4
    reserve.forget("b")
    assert "b" not in reserve
    reserve.add(Named("d"))
    assert reserve.here == ("a", "c", "d")
