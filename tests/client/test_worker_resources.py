"""dask's worker-resources example on one cluster: two nodes with two GPUs each, one with much memory.

The resources are said in three ways: in dask's configuration on a host, as options of a mode, and by the mode itself.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import dask
import pytest
import pytest_asyncio
from distributed import Client, get_worker

from agentcluster import AgentCluster, Mode
from agentcluster.launch.local import LocalLauncher
from agentcluster.scheduler import autoscaling
from tests.support.forked import ForkedLauncher
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER
from tests.support.waiting import wait_until
from tests.support.zygote import Zygote

ONE = {"nworkers": 1, "nthreads": 4, "memory_limit": "300MiB"}


@pytest_asyncio.fixture
async def cluster(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> AsyncIterator[AgentCluster]:
    config = tmp_path_factory.mktemp("config") / "dask.yaml"
    config.write_text("distributed: {worker: {resources: {GPU: 2}}}")
    gpus = {"DASK_CONFIG": str(config)}
    async with AgentCluster(
        hosts=[
            ForkedLauncher("gpu-1", zygote, env=gpus),
            ForkedLauncher("gpu-2", zygote, env=gpus),
            ForkedLauncher("large", zygote),
        ],
        mode={
            "gpu-1": Mode("auto-cpu", ONE),
            "gpu-2": Mode("auto-cpu", ONE),
            "large": Mode("auto-cpu", {**ONE, "resources": {"MEMORY": 100e9}}),
        },
        scheduler_options=SCHEDULER,
        asynchronous=True,
    ) as cluster:
        yield cluster


def tasks_in(directory: Path) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return what loads a file, what works on a GPU, and what brings all together; each leaves a mark of its time."""
    marks = str(directory)

    def mark(kind: str, amount: int, began: float) -> None:
        ended = time.time()
        name = f"{get_worker().name}|{kind}|{amount}|{began!r}|{ended!r}"
        Path(marks, f"{name}|{time.monotonic_ns()}").touch()

    def load(number: int) -> list[int]:
        return [number] * 10

    def process(data: list[int], amount: int) -> int:
        began = time.time()
        time.sleep(0.05)
        mark("GPU", amount, began)
        return sum(data)

    def aggregate(parts: list[int]) -> int:
        began = time.time()
        mark("MEMORY", 70, began)
        return sum(parts)

    return load, process, aggregate


def most_at_once(directory: Path) -> tuple[dict[str, int], set[str]]:
    """Return worker -> the greatest number of its GPUs that were in use at once; and who had the aggregate."""
    changes: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    large = set()
    for mark in directory.iterdir():
        worker, kind, amount, began, ended, _ = mark.name.split("|")
        if kind == "MEMORY":
            large.add(worker)
        else:
            changes[worker] += [(float(began), int(amount)), (float(ended), -int(amount))]
    found = {}
    for worker, each in changes.items():
        level = most = 0
        for _, change in sorted(each):
            level += change
            most = max(most, level)
        found[worker] = most
    return found, large


async def test_files_are_loaded_and_gpus_never_shared(cluster: AgentCluster, tmp_path: Path) -> None:
    load, process, aggregate = tasks_in(tmp_path)
    async with Client(cluster, asynchronous=True) as client:
        offered = {str(ws.name): ws.resources for ws in cluster.scheduler.workers.values()}
        assert {name: each.get("GPU") for name, each in offered.items()} == {
            "gpu-1-0": 2,
            "gpu-2-0": 2,
            "large-0": None,
        }
        data = client.map(load, range(100))
        processed = client.map(process, data, [1] * 100, resources={"GPU": 1})
        with dask.annotate(resources={"GPU": 2}):
            wide = client.map(process, data[:10], [2] * 10)
        total = client.submit(aggregate, processed, resources={"MEMORY": 70e9})
        assert await total == 10 * sum(range(100))
        assert await client.gather(wide) == [10 * number for number in range(10)]
    most, large = most_at_once(tmp_path)
    assert most == {"gpu-1-0": 2, "gpu-2-0": 2}
    assert large == {"large-0"}


async def test_adapt_knows_what_a_host_gives_its_workers(cluster: AgentCluster, tmp_path: Path) -> None:
    load, process, _ = tasks_in(tmp_path)
    async with Client(cluster, asynchronous=True) as client:
        cluster.adapt(minimum=0, interval="50ms", wait_count=1)
        processed = client.map(process, client.map(load, range(20)), [2] * 20, resources={"GPU": 2})
        assert await client.gather(processed) == [10 * number for number in range(20)]
        del processed
        await wait_until(lambda: not cluster.scheduler.workers)
        again = client.map(process, client.map(load, range(20, 30)), [2] * 10, resources={"GPU": 2})
        assert await client.gather(again) == [10 * number for number in range(20, 30)]
        assert not [each for each in cluster.adaptive_log() if "no node has" in each.why]
    assert set(most_at_once(tmp_path)[0]) <= {f"gpu-{n}-{i}" for n in (1, 2) for i in range(9)}


async def test_scale_by_a_resource_of_the_host(cluster: AgentCluster) -> None:
    await cluster.scale(GPU=1)
    assert sorted(str(ws.name).rpartition("-")[0] for ws in cluster.scheduler.workers.values())[1:] == ["large"]


async def test_resources_by_environment_variable() -> None:
    """dask has their names in lower case then; what the mode says goes before what the host says."""
    env = {"DASK_DISTRIBUTED__WORKER__RESOURCES__MEM": "5", "DASK_DISTRIBUTED__WORKER__RESOURCES__GPU": "5"}
    mode = Mode("auto-cpu", {**ONE, "resources": {"gpu": 3}})
    options: dict[str, Any] = {"scheduler_options": SCHEDULER, "asynchronous": True}
    async with AgentCluster(hosts=[LocalLauncher("box", env=env)], mode=mode, **options) as cluster:
        (worker,) = cluster.scheduler.workers.values()
        assert worker.resources == {"CPU": 4, "gpu": 3, "mem": 5}


async def test_tasks_that_nobody_is_going_to_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a warning where the client is, once; tasks that wait for a change, or for adaptive scaling, are no news."""
    monkeypatch.setattr(autoscaling, "GRACE", 0.2)
    one = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}
    async with (
        AgentCluster(here(), config=one, asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            waiting = client.map(int, range(3), resources={"TPU": 1})
            await wait_until(lambda: seen)
            waiting += client.map(int, range(3, 6), resources={"TPU": 1})
            await asyncio.sleep(0.6)
        assert [str(each.message) for each in seen] == [
            "3 'int' tasks need TPU=1, and no worker has TPU: a mode with such workers gives it, as auto-gpu does GPU, "
            "or the option resources of any mode"
        ]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            await cluster.reprovision("auto-cpu", {**one, "resources": {"TPU": 1}})
            assert await client.gather(waiting) == list(range(6))
            await asyncio.sleep(0.5)
        assert not seen
