"""In which order old and new workers take turns, by the room that a node has, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from distributed import Scheduler

from agentcluster.model import Gpu, Hardware, HostMetrics, Mode, WorkerSpec
from agentcluster.requests import NodeRegistration, RolloutPolicy
from agentcluster.scheduler import managers, preflight
from agentcluster.scheduler.planning.change import NodeChange
from agentcluster.scheduler.planning.nodes import Registry
from agentcluster.scheduler.preflight import WORKER_MEMORY, with_strategy

GIB = 2**30
CPU = WorkerSpec("cpu", "distributed.Nanny", nthreads=1)
GPUS = (Gpu("0", "GPU-aaa", "H200", 100 * GIB), Gpu("1", "GPU-bbb", "H200", 50 * GIB))


def change(
    new: list[WorkerSpec],
    *,
    old: int = 1,
    memory: int = 64 * GIB,
    used: int = 0,
    gpu_used: tuple[int, ...] = (),
    gpus: tuple[Gpu, ...] = (),
) -> NodeChange:
    """Return what is to change on a node of which its agent has said this."""
    node = Registry().register(NodeRegistration("n", "tcp://n:1", Hardware("host", 16, memory, gpus)), now=0.0)
    node.metrics = HostMetrics(50.0, used, (0,) * len(gpu_used), gpu_used)
    node.adopt(Mode("auto-cpu"), dict(zip(node.take_names(old), [CPU] * old, strict=True)))
    named = node.take_names(len(new))
    return NodeChange(node, Mode("uniform"), {}, node.plan.workers, tuple(new), tuple(named))


def gpu(pool: Any, *, devices: tuple[str, ...] = ("0", "1"), device: int = 0) -> WorkerSpec:
    options = {} if pool is None else {"rmm_pool_size": pool}
    return WorkerSpec("gpu", "dask_cuda.CUDAWorker", options, devices=devices, device=device)


def chosen(scheduler: Scheduler, wish: NodeChange, **terms: Any) -> tuple[str, str]:
    found = with_strategy(scheduler, wish, RolloutPolicy(**terms))
    assert replace(found, strategy="surge", because="") == wish
    return found.strategy, found.because


async def test_with_room_the_new_come_first(scheduler: Scheduler) -> None:
    assert chosen(scheduler, change([CPU] * 4, used=60 * GIB)) == ("surge", "")


async def test_cores_may_be_used_twice(scheduler: Scheduler) -> None:
    assert chosen(scheduler, change([CPU] * 100)) == ("surge", "")


@pytest.mark.parametrize(
    ("count", "free", "expected"),
    [
        (2, 2 * WORKER_MEMORY, ("surge", "")),
        (2, 2 * WORKER_MEMORY - 1, ("replace", "300.00 MiB more memory are needed, 300.00 MiB are free")),
        (20, GIB, ("replace", "2.93 GiB more memory are needed, 1.00 GiB are free")),
        (1, -GIB, ("replace", "150.00 MiB more memory are needed, 0 B are free")),
    ],
)
async def test_memory_in_use_may_not(scheduler: Scheduler, count: int, free: int, expected: tuple[str, str]) -> None:
    assert chosen(scheduler, change([CPU] * count, memory=16 * GIB, used=16 * GIB - free)) == expected


async def test_an_agent_that_has_not_said_its_load_is_no_reason(scheduler: Scheduler) -> None:
    assert chosen(scheduler, change([CPU] * 4, memory=WORKER_MEMORY)) == ("surge", "")
    assert chosen(scheduler, change([gpu("99 GiB")], gpus=GPUS)) == ("surge", "")


async def test_what_was_asked_for_is_said(scheduler: Scheduler) -> None:
    assert chosen(scheduler, change([CPU]), strategy="replace") == ("replace", "asked for")


@pytest.mark.parametrize("terms", [{"strategy": "replace"}, {}])
@pytest.mark.parametrize("wish", [{"new": [], "old": 2}, {"new": [CPU] * 3, "old": 0}], ids=["only go", "only come"])
async def test_without_old_or_new_there_is_no_order(
    scheduler: Scheduler, wish: dict[str, Any], terms: dict[str, Any]
) -> None:
    assert chosen(scheduler, change(**wish, memory=GIB, used=GIB), **terms) == ("surge", "")


@pytest.mark.parametrize(
    ("pool", "needed"),
    [
        (60 * GIB, "60.00 GiB"),
        (float(60 * GIB), "60.00 GiB"),
        ("60 GiB", "60.00 GiB"),
        (str(60 * GIB), "60.00 GiB"),
        (0.6, "60.00 GiB"),
        ("0.6", "60.00 GiB"),
        (1.0, "100.00 GiB"),
    ],
)
async def test_gpu_memory_may_not_be_used_twice(scheduler: Scheduler, pool: Any, needed: str) -> None:
    why = f"GPU 0 has 50.00 GiB free, the new worker's pool is {needed}"
    wish = change([gpu(pool)], gpus=GPUS, gpu_used=(50 * GIB, 0))
    assert chosen(scheduler, wish) == ("replace", why)


@pytest.mark.parametrize(
    "pool", [None, 0, 50 * GIB, "50 GiB", 0.5, "0.5", 1, "1", True, "as much as there is"], ids=repr
)
async def test_a_pool_that_fits_or_none(scheduler: Scheduler, pool: Any) -> None:
    """dask-cuda takes whole 1 for a byte, and refuses itself what it cannot read."""
    assert chosen(scheduler, change([gpu(pool)], gpus=GPUS, gpu_used=(50 * GIB, 0))) == ("surge", "")


async def test_the_gpu_is_the_one_that_the_worker_uses(scheduler: Scheduler) -> None:
    full_first = {"gpus": GPUS, "gpu_used": (99 * GIB, 0)}
    assert chosen(scheduler, change([gpu("10 GiB", device=1)], **full_first)) == ("surge", "")
    assert chosen(scheduler, change([gpu("10 GiB", devices=("1",))], **full_first)) == ("surge", "")
    full_second = {"gpus": GPUS, "gpu_used": (0, 49 * GIB)}
    strategy, because = chosen(scheduler, change([gpu("10 GiB", devices=("1",))], **full_second))
    assert strategy == "replace"
    assert because == "GPU 1 has 1.00 GiB free, the new worker's pool is 10.00 GiB"
    assert chosen(scheduler, change([gpu("10 GiB", devices=("GPU-bbb",))], **full_second))[0] == "replace"


async def test_a_fraction_is_of_its_own_gpu(scheduler: Scheduler) -> None:
    both = [gpu(0.8, device=0), gpu(0.8, device=1)]
    assert chosen(scheduler, change(both, gpus=GPUS, gpu_used=(20 * GIB, 10 * GIB))) == ("surge", "")
    assert chosen(scheduler, change(both, gpus=GPUS, gpu_used=(20 * GIB, 11 * GIB))) == (
        "replace",
        "GPU 1 has 39.00 GiB free, the new worker's pool is 40.00 GiB",
    )


async def test_workers_of_one_gpu_are_added_up(scheduler: Scheduler) -> None:
    pair = [gpu("30 GiB"), gpu("30 GiB")]
    assert chosen(scheduler, change(pair, gpus=GPUS, gpu_used=(40 * GIB, 0))) == ("surge", "")
    assert chosen(scheduler, change(pair, gpus=GPUS, gpu_used=(41 * GIB, 0)))[0] == "replace"


async def test_an_agent_that_is_not_there_is_a_reason(scheduler: Scheduler) -> None:
    wish = change([CPU])
    wish.node.address = "tcp://127.0.0.1:9"
    assert "its agent does not answer" in await preflight.ask_agent(scheduler, wish.node, wish.new, 5)


async def test_without_workers_nothing_is_bound_or_cannot_be_moved(scheduler: Scheduler) -> None:
    wishes = {"n": change([CPU])}
    managers.install(scheduler, Registry(), 5)
    assert preflight.bound_tasks(scheduler, wishes) == {}
    assert preflight.immovable(scheduler, wishes, RolloutPolicy()) == {}
