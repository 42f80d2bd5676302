"""cluster.adapt() with real workers: what comes for which tasks, who goes when, what is said, and what ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import dask
import pytest
from distributed import Adaptive, Client

from agentcluster import AgentCluster, Mode
from agentcluster.client.adaptive import AgentAdaptive
from agentcluster.errors import ConfigError
from tests.support.inprocess import here
from tests.support.waiting import wait_until

QUIET: dict[str, Any] = {"scheduler_options": {"dashboard_address": ":0"}}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
FAST: dict[str, Any] = {"interval": "50ms", "wait_count": 2}

#: Labels that workers of one mode have and those of the other do not: what GPUs are, without any.
BIG = {
    "big": {"cls": "dask.distributed.Nanny", "opts": {"nthreads": 1, "memory_limit": "300MiB", "resources": {"BIG": 2}}}
}


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """Two nodes, two workers each."""
    return {"hosts": here(2), "mode": "uniform", "config": TWO}


Slow = Callable[[int], int]


def count(cluster: AgentCluster) -> int:
    return len(cluster.scheduler.workers)


async def looks(cluster: AgentCluster, number: int = 5) -> None:
    """Let adaptive scaling look some times: whatever it would do, it has done then."""
    for _ in range(number):
        await cluster._adaptive.adapt()


async def test_up_for_tasks_and_down_after_them(cluster: AgentCluster, client: Client, slow: Slow) -> None:
    adaptive = cluster.adapt(minimum=0, maximum=3, target_duration="200ms", **FAST)
    assert isinstance(adaptive, AgentAdaptive)
    await wait_until(lambda: count(cluster) == 0)
    await wait_until(lambda: {node["state"] for node in cluster.nodes.values()} == {"standby"})
    most = 0
    tasks = client.map(slow, range(60))
    while not all(task.done() for task in tasks):
        most = max(most, count(cluster))
        await asyncio.sleep(0.02)
    assert await client.gather(tasks) == list(range(60))
    assert most == 3
    # one stays: it holds the results
    await wait_until(lambda: count(cluster) == 1)
    assert await client.gather(tasks) == list(range(60))
    del tasks
    await wait_until(lambda: count(cluster) == 0)
    log = cluster.adaptive_log()
    assert [decision.decided for decision in log]
    assert "'slow' tasks need any worker" in repr(log)
    assert "<table>" in log._repr_html_()


async def test_minimum_and_cores(cluster: AgentCluster, client: Client, slow: Slow) -> None:
    cluster.adapt(minimum=1, maximum_cores=1, **FAST)
    await wait_until(lambda: count(cluster) == 1)
    tasks = client.map(slow, range(20), pure=False)
    await looks(cluster)
    assert count(cluster) == 1
    cluster.adapt(minimum_cores=3, **FAST)
    await wait_until(lambda: count(cluster) == 3)
    cluster.adapt(minimum_memory="900MiB", maximum_memory="1200MiB", **FAST)
    await wait_until(lambda: count(cluster) == 3)
    await client.cancel(tasks)


async def test_scattered_data_survives(cluster: AgentCluster, client: Client, slow: Slow) -> None:
    kept = await client.scatter([bytes([i]) * 1000 for i in range(40)], hash=False)
    cluster.adapt(minimum=0, **FAST)
    await wait_until(lambda: count(cluster) == 1)
    await looks(cluster)
    assert count(cluster) == 1
    assert await client.gather(kept) == [bytes([i]) * 1000 for i in range(40)]


async def test_tasks_that_need_a_resource_change_the_mode_and_back(
    cluster: AgentCluster, client: Client, slow: Slow
) -> None:
    first, other = Mode("uniform", TWO), Mode("spec", {"spec": BIG})
    kept = await client.scatter(list(range(20)), hash=False)
    cluster.adapt(minimum=1, modes=[first, other], **FAST)
    with dask.annotate(resources={"BIG": 1}):
        train = client.map(slow, range(20), pure=False)
    await wait_until(lambda: "spec" in {node["mode"] for node in cluster.nodes.values()})
    assert await client.gather(train) == list(range(20))
    del train
    await wait_until(lambda: {node["mode"] for node in cluster.nodes.values()} == {"uniform"})
    assert await client.gather(kept) == list(range(20))
    decided = [decision.decided for decision in cluster.adaptive_log()]
    assert any("spec" in each for each in decided)


async def test_what_no_node_can_run_is_said_once(
    cluster: AgentCluster, client: Client, slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "agentcluster")
    cluster.adapt(minimum=0, **FAST)
    await wait_until(lambda: count(cluster) == 0)
    tasks = client.map(slow, range(60), pure=False, resources={"GPU": 1})
    await wait_until(lambda: any("cannot help" in each.message for each in caplog.records))
    await looks(cluster)
    assert count(cluster) == 0, "workers without a GPU are of no use"
    (said,) = [each.message for each in caplog.records if "cannot help" in each.message]
    assert "60 'slow' tasks need GPU=1 (slow-" in said
    assert "no GPU was found" in said
    await client.cancel(tasks)


async def test_by_hand_ends_it(cluster: AgentCluster) -> None:
    adaptive = cluster.adapt(minimum=0, **FAST)
    await wait_until(lambda: count(cluster) == 0)
    await cluster.scale(3)
    assert adaptive.state == "stopped"
    assert count(cluster) == 3
    adaptive = cluster.adapt(minimum=3, **FAST)
    await cluster.reprovision("uniform", TWO)
    assert adaptive.state == "stopped"


class Mine(Adaptive):
    """A user's own: always two workers."""

    async def target(self) -> int:
        return 2


async def test_a_class_of_the_users_own(cluster: AgentCluster, client: Client, slow: Slow) -> None:
    adaptive = cluster.adapt(Adaptive=Mine, **FAST)
    await wait_until(lambda: count(cluster) == 2)
    (gone,) = sorted(cluster.plan)[:1]
    await cluster.scale_down([gone])
    await wait_until(lambda: count(cluster) == 2 and gone not in cluster.plan)
    assert adaptive.state == "running"
    cluster.adapt(worker_key=lambda ws: ws.host, minimum=1, **FAST)
    assert type(cluster._adaptive) is Adaptive


async def test_a_failure_is_said_and_tried_again_later(
    cluster: AgentCluster, client: Client, slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Mode(
        "spec",
        {
            "spec": {
                "x": {
                    "cls": "dask.distributed.Nanny",
                    "opts": {"preload": ["no_such_module"], "resources": {"BIG": 1}, "memory_limit": "300MiB"},
                }
            }
        },
    )
    adaptive = cluster.adapt(minimum=1, modes=[Mode("uniform", TWO), broken], **FAST)
    tasks = client.map(slow, range(3), pure=False, resources={"BIG": 1})
    await wait_until(lambda: any("Adaptive scaling failed" in each.message for each in caplog.records), 30)
    assert adaptive.state == "running"
    assert any("no_such_module" in decision.why for decision in cluster.adaptive_log())
    assert await client.submit(int, "3") == 3
    await client.cancel(tasks)


async def test_up_delay_and_idle_timeout(cluster: AgentCluster, client: Client, slow: Slow) -> None:
    cluster.adapt(minimum=0, interval="50ms", wait_count=1, idle_timeout="600ms", up_delay="600ms")
    began = time.monotonic()
    await wait_until(lambda: count(cluster) == 0)
    assert time.monotonic() - began > 0.6
    began = time.monotonic()
    assert await client.submit(int, "3") == 3
    assert time.monotonic() - began > 0.6


async def test_only_looks_in_the_interval_count(cluster: AgentCluster, client: Client) -> None:
    """Tasks and requests have it look in between, which takes nobody's time away."""
    cluster.adapt(minimum=0, interval="50s", wait_count=2)
    await cluster._adaptive.adapt()
    async with cluster.request(cpu=1):
        pass
    for number in range(5):
        await client.submit(int, number)
    with pytest.raises(TimeoutError):
        async with cluster.request(cpu=99, timeout=0.3):
            pass
    assert count(cluster) == 4
    await cluster._adaptive.adapt()
    assert count(cluster) == 0


async def test_tasks_without_a_worker_are_not_kept_waiting_for_the_next_look(
    cluster: AgentCluster, client: Client, slow: Slow
) -> None:
    cluster.adapt(minimum=0, interval="20s", wait_count=1)
    await cluster._adaptive.adapt()  # the first look would be in 20 s too
    assert count(cluster) == 0
    assert await asyncio.wait_for(client.submit(slow, 1), 10) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modes": ["auto-cqu"]}, "did you mean 'auto-cpu'"),
        ({"gpu": 2}, r"gpu=\(0, 2\)"),
        ({"gpu": (3, 2)}, r"gpu=\(0, 2\)"),
        ({"idle_timeout": "soon"}, r"idle_timeout=…\) is 'soon'"),
        ({"interval": "x"}, r"interval=…\) is 'x'"),
        ({"target_duration": "x"}, r"target_duration=…\) is 'x'"),
        ({"minimum": 5, "maximum": 2}, r"adapt\(minimum=5, maximum=2\): the maximum is smaller"),
        ({"minimum_cores": 5, "maximum_cores": 2}, r"minimum_cores=5, maximum_cores=2"),
        ({"minimum_memory": "2 GiB", "maximum_memory": "1 GiB"}, r"minimum_memory=.*the maximum is smaller"),
        ({"minimum": -1}, r"adapt\(minimum=-1\): give a whole number of at least 0"),
        ({"minimum": "x"}, r"adapt\(minimum='x'\)"),
        ({"maximum": 1.5}, r"adapt\(maximum=1\.5\)"),
        ({"wait_count": 0}, r"adapt\(wait_count=0\): give a whole number of at least 1"),
    ],
)
async def test_wrong_options(cluster: AgentCluster, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster.adapt(**options)
    assert count(cluster) == 4


async def test_room_that_is_requested_before_tasks_come(cluster: AgentCluster, client: Client, slow: Slow) -> None:
    modes = [Mode("uniform", TWO), Mode("spec", {"spec": BIG})]
    with pytest.raises(ConfigError, match=r"cluster\.adapt\(\)"):
        async with cluster.request(BIG=2):
            pass
    cluster.adapt(minimum=0, modes=modes, **FAST)
    await wait_until(lambda: count(cluster) == 0)
    async with cluster.request(BIG=1):
        (worker,) = cluster.scheduler.workers.values()
        assert worker.resources == {"CPU": 1, "BIG": 2}
        await looks(cluster)
        assert count(cluster) == 1
        assert await client.submit(slow, 1, resources={"BIG": 1}) == 1
    await wait_until(lambda: count(cluster) == 0)
    with pytest.raises(ConfigError, match="a request for 2 tasks with TPU=1, which no node has"):
        async with cluster.request(TPU=2):
            pass
    with pytest.raises(TimeoutError, match="no room for"):
        async with cluster.request(cpu=99, timeout=0.5):
            pass
    await wait_until(lambda: count(cluster) == 0)


@pytest.mark.parametrize("wrong", [{"gpu": 0}, {"gpu": 1.5}, {}, {"gpu": 1, "timeout": "soon"}])
async def test_wrong_requests(cluster: AgentCluster, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="request"):
        cluster.request(**wrong)


async def test_dasks_own_class_counts_by_the_workers_that_the_mode_would_have() -> None:
    shape = {"nthreads": 2, "memory_limit": "100 MiB", "nworkers": 1}
    async with AgentCluster(mode="uniform", config=shape, asynchronous=True) as cluster:
        await cluster.scale(0)
        for limits, expected in (
            ({"minimum_cores": 3, "maximum_cores": 9}, (2, 4)),
            ({"minimum_memory": "250 MiB", "maximum_memory": "600 MiB"}, (3, 6)),
        ):
            adaptive = cluster.adapt(Adaptive=Adaptive, interval="1 hour", **limits)
            adaptive.stop()
            assert (adaptive.minimum, adaptive.maximum) == expected


async def test_a_later_smaller_maximum_takes_workers_away_while_tasks_wait(
    cluster: AgentCluster, client: Client, slow: Slow
) -> None:
    cluster.adapt(maximum=4, **FAST)
    tasks = client.map(slow, range(500), pure=False)
    await looks(cluster)
    assert count(cluster) == 4
    cluster.adapt(maximum=2, **FAST)
    await wait_until(lambda: count(cluster) == 2)
    assert not all(task.done() for task in tasks)
    await client.cancel(tasks)


@pytest.mark.parametrize(("target_duration", "expected"), [("4s", 2), ("1s", 4)])
async def test_target_duration(cluster: AgentCluster, client: Client, target_duration: str, expected: int) -> None:
    """Eight tasks of one second: as many workers as end them within that time, of the four that can be."""
    dask.config.set({"distributed.scheduler.default-task-durations": {"nap": 1}})

    def nap(seconds: float) -> None:
        time.sleep(seconds)

    cluster.adapt(minimum=0, target_duration=target_duration, **FAST)
    await wait_until(lambda: count(cluster) == 0)
    tasks = client.map(nap, [1.0] * 8, pure=False)
    await wait_until(lambda: count(cluster) == expected)
    await looks(cluster)
    assert count(cluster) == expected
    await client.cancel(tasks)


async def test_what_dask_makes_act_without_await_and_groups_of_workers() -> None:
    """A call of scale() that is not awaited; a later adapt() with a smaller maximum; workers that go together."""
    shape = {"nthreads": 1, "memory_limit": "100 MiB", "nworkers": 2}
    async with AgentCluster(here(2), mode="uniform", config=shape, asynchronous=True) as cluster:
        cluster.scale(1)
        await wait_until(lambda: len(cluster.scheduler.workers) == 1)
        cluster.scale(cores=2)
        await wait_until(lambda: len(cluster.scheduler.workers) == 2)
        cluster.scale(memory="250 MiB")
        await wait_until(lambda: len(cluster.scheduler.workers) == 3)
        cluster.adapt(minimum=3, interval="50ms")
        await wait_until(lambda: len(cluster.scheduler.workers) == 3)
        cluster.adapt(maximum=1, interval="50ms")
        await wait_until(lambda: len(cluster.scheduler.workers) <= 1)
        await cluster.scale(4)
        cluster.adapt(minimum=1, worker_key=lambda worker: str(worker.name).rpartition("-")[0], interval="50ms")
        await wait_until(lambda: len(cluster.scheduler.workers) == 2)
        assert len({str(worker.name).rpartition("-")[0] for worker in cluster.scheduler.workers.values()}) == 1
        assert cluster._adaptive is not None
        cluster._adaptive.stop()
