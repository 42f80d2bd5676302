"""Work that goes on while nodes are reprovisioned: the right answer, nothing lost, nothing blamed, nothing run twice.

The suite runs a small version. ``AGENTCLUSTER_TEST_FULL=1`` runs the large one: a job of 10,000 tasks through 20
reprovisions, and a task of 60 seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, Event, SchedulerPlugin, secede, worker_client

from agentcluster import AgentCluster
from tests.support import nvml
from tests.support.inprocess import here
from tests.support.waiting import wait_until

FULL = os.environ.get("AGENTCLUSTER_TEST_FULL") == "1"

#: Partitions of the shuffle; its tasks are as many squared, and some more.
PARTITIONS = 100 if FULL else 20
#: Reprovisions; None for each mode once.
REPROVISIONS = 20 if FULL else None
#: Seconds that each piece of the shuffle takes.
PIECE = 0.02 if FULL else 0.01
#: Scattered keys, half of which the job uses.
SCATTERED = 2 * PARTITIONS
DEADLINE = 900 if FULL else 180

CPU = ("auto-cpu", {"nworkers": 2, "nthreads": 1, "memory_limit": "512MiB"})
UNIFORM = ("uniform", {"nworkers": 1, "nthreads": 2, "memory_limit": "1GiB"})
SPEC = (
    "spec",
    {
        "spec": {
            "small": {"cls": "distributed.Nanny", "options": {"nthreads": 1, "memory_limit": "512MiB"}},
            "large": {"cls": "distributed.Nanny", "options": {"nthreads": 2, "memory_limit": "1GiB"}},
        }
    },
)
MIXED = (
    "mixed",
    {"gpu": {"memory_limit": "512MiB"}, "cpu": {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}},
)


class Watch(SchedulerPlugin):
    """Counts what became of every task, also of those that the scheduler has forgotten by the end."""

    name = "watch"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.finished: Counter[str] = Counter()
        self.erred: set[str] = set()
        self.blamed: set[str] = set()

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if start == "processing" and finish == "memory":
            self.finished[str(key)] += 1
        if finish == "erred":
            self.erred.add(str(key))
        ts = self.scheduler.tasks.get(key)
        if ts is not None and ts.suspicious:
            self.blamed.add(str(key))

    def twice(self) -> list[str]:
        """Return the tasks whose result was there, then lost, then made again."""
        return [key for key, count in self.finished.items() if count > 1]


@asynccontextmanager
async def cluster_of(hosts: list[Any]) -> AsyncIterator[tuple[AgentCluster, Client, Watch]]:
    """Open a cluster with two small workers on each node."""
    async with (
        AgentCluster(
            hosts=hosts,
            mode=CPU[0],
            config=CPU[1],
            scheduler_options={"dashboard": False, "dashboard_address": ":0"},
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        watch = Watch(cluster.scheduler)
        cluster.scheduler.add_plugin(watch)
        yield cluster, client, watch


# -- a job -------------------------------------------------------------------------------------------------------------


def job(weights: list[Any], number: int) -> Any:
    """Return a shuffle from all partitions to all, then a tree reduction to its sum; with the sum that is right.

    Parameters
    ----------
    weights
        Futures of the scattered numbers that its partitions are made from, one for each.
    number
        Makes the keys those of this job.
    """
    seconds, count = PIECE, len(weights)

    def load(weight: int, partition: int) -> list[int]:
        return [weight * 1000 + partition + i for i in range(count)]

    def piece(values: list[int], of: int) -> list[int]:
        import time

        time.sleep(seconds)
        return [value for value in values if value % count == of]

    def concat(pieces: list[list[int]], of: int) -> int:
        values = [value for each in pieces for value in each]
        assert len(values) == count
        assert all(value % count == of for value in values)
        return sum(values)

    def add(*values: int) -> int:
        return sum(values)

    def task(function: Any, *arguments: Any, key: str) -> Any:
        return dask.delayed(function, pure=False)(*arguments, dask_key_name=f"{function.__name__}-{number}-{key}")

    loaded = [task(load, weight, i, key=f"{i}") for i, weight in enumerate(weights)]
    level = [
        task(concat, [task(piece, loaded[i], j, key=f"{i}-{j}") for i in range(count)], j, key=f"{j}")
        for j in range(count)
    ]
    height = 0
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [task(add, *pair, key=f"{height}-{i}") for i, pair in enumerate(pairs)]
        height += 1
    return level[0]


def right(weights: list[int]) -> int:
    """Return what :func:`job` must find, for weights by value."""
    count = len(weights)
    return sum(weight * 1000 + partition + i for partition, weight in enumerate(weights) for i in range(count))


async def through_reprovisions(modes: list[tuple[str, Any]]) -> None:
    """Run the job while its nodes are reprovisioned, again and again until the last of those is over."""
    async with cluster_of(["local"] * 3) as (cluster, client, watch):
        numbers = [7 * i for i in range(SCATTERED)]
        scattered = await client.scatter(numbers, hash=False)
        used = SCATTERED // 2
        answers: list[int] = []
        enough = asyncio.Event()

        async def work() -> None:
            while not enough.is_set():
                answers.append(await client.compute(job(scattered[:used], len(answers)), optimize_graph=False))

        working = asyncio.ensure_future(work())
        await wait_until(lambda: watch.finished, 20)
        swaps = []
        try:
            for step in range(REPROVISIONS or len(modes)):
                report = await cluster.reprovision(*modes[step % len(modes)])
                assert {node.outcome for node in report.nodes.values()} == {"changed"}
                assert all(node.new and node.old for node in report.nodes.values())
                swaps.append(report)
                assert not working.done(), await working
            jobs_begun = len(answers) + 1
            enough.set()
            await working
        except BaseException:
            print(await cluster.get_logs(cluster=False, scheduler=False, workers=False, agents=True))
            raise
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

        assert answers == [right(numbers[:used])] * jobs_begun
        assert [future.status for future in scattered] == ["finished"] * SCATTERED
        assert await client.gather(scattered) == numbers
        assert not watch.erred
        assert not watch.blamed
        assert watch.twice() == []
        assert {str(ws.name) for ws in cluster.scheduler.workers.values()} == cluster.plan
        print(
            f"{len(swaps)} reprovisions in {sum(each.seconds for each in swaps):.1f} s "
            f"(longest {max(each.seconds for each in swaps):.2f} s), {jobs_begun} jobs, "
            f"{watch.finished.total()} tasks, {sum(each.keys for each in swaps)} keys moved, "
            f"{sum(node.rerun for each in swaps for node in each.nodes.values())} tasks cut off, "
            f"suspicious 0, erred 0, results lost 0, scattered keys lost 0"
        )


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE)
async def test_a_job_with_a_shuffle_and_a_tree_reduction() -> None:
    await through_reprovisions([UNIFORM, SPEC, CPU])


@pytest.mark.slow
@pytest.mark.gpu_stub
@pytest.mark.timeout(DEADLINE)
async def test_a_job_on_gpu_workers_too(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
    library = nvml.build(tmp_path_factory.getbasetemp() / "nvml")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for key, value in nvml.environ(library=library, gpus=1).items():
        monkeypatch.setenv(key, value)
    await through_reprovisions([UNIFORM, MIXED, SPEC, CPU])


# -- tasks that are waited for -----------------------------------------------------------------------------------------


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    """A file in which tasks write down when they begin and when they end."""
    path = tmp_path / "diary"
    path.touch()
    return path


Wrap = Callable[[Any], Callable[..., Any]]


def write(path: str, word: str) -> None:
    with open(path, "a") as file:
        file.write(f"{word}\n")


def plain(path: str, end: str) -> str:
    """Run until an event comes."""
    write(path, "began")
    Event(end).wait()
    write(path, "ended")
    return "done"


def seceding(path: str, end: str) -> str:
    """Run beside what its thread's pool runs."""
    write(path, "began")
    secede()
    Event(end).wait()
    write(path, "ended")
    return "done"


def handing_out(path: str, end: str) -> str:
    """Have other tasks run for it, when its worker takes no more."""
    write(path, "began")
    Event(end).wait()
    with worker_client() as client:
        parts = client.gather(client.map(str.upper, "done", pure=False))
    write(path, "ended")
    return "".join(parts).lower()


def sleeping(path: str, end: str) -> str:
    """Run a minute, whatever comes."""
    write(path, "began")
    time.sleep(60)
    write(path, "ended")
    return "done"


def in_step(cluster: AgentCluster, step: str) -> bool:
    """Whether all nodes of the rollout that runs are in a step."""
    rolling = cluster.scheduler.extensions["agentcluster"].controller.running
    return rolling is not None and {each["step"] for each in rolling.status()["nodes"].values()} == {step}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("task", [plain, seceding, handing_out, *([sleeping] if FULL else [])])
async def test_a_task_that_may_not_run_twice_runs_once(task: Any, diary: Path, by_value: Wrap) -> None:
    async with cluster_of(here()) as (cluster, client, watch):
        future = client.submit(by_value(task), str(diary), "end", pure=False)
        await wait_until(lambda: diary.read_text() == "began\n")
        old = set(cluster.plan)
        swap = asyncio.ensure_future(cluster.reprovision(*UNIFORM, drain="tasks", drain_timeout=120))
        await wait_until(lambda: in_step(cluster, "drain"), 20)
        assert diary.read_text() == "began\n"
        assert {str(ws.name) for ws in cluster.scheduler.workers.values()} > old
        await Event("end", client=client).set()
        report = await swap
        assert await future == "done"
        assert diary.read_text() == "began\nended\n"
        assert report.nodes["local"].rerun == 0
        assert not cluster.plan & old
        assert (watch.finished[future.key], watch.blamed, watch.erred) == (1, set(), set())
        if FULL:
            print(f"{task.__name__}: began once, ended once; drained in {report.nodes['local'].drain:.1f} s")


def long_call(path: str, holds_gil: bool) -> int:
    """Stay seconds in one call into C, without or with the interpreter's lock."""
    write(path, "began")
    found = sum(range(6 * 10**7)) if holds_gil else len(hashlib.pbkdf2_hmac("sha256", b"a", b"b", 4 * 10**6))
    write(path, "ended")
    return found


@pytest.mark.parametrize("holds_gil", [False, True], ids=["lock-free", "lock-held"])
async def test_a_long_call_into_c_runs_once(holds_gil: bool, diary: Path, by_value: Wrap) -> None:
    async with cluster_of(here()) as (cluster, client, watch):
        kept = await client.scatter(list(range(20)), hash=False)
        future = client.submit(by_value(long_call), str(diary), holds_gil, pure=False)
        await wait_until(lambda: diary.read_text() == "began\n")
        report = await cluster.reprovision(*UNIFORM)
        assert diary.read_text() == "began\nended\n"
        assert await future == ((6 * 10**7 - 1) * 3 * 10**7 if holds_gil else 32)
        assert await client.gather(kept) == list(range(20))
        assert report.nodes["local"].rerun == 0
        assert (watch.blamed, watch.erred, watch.twice()) == (set(), set(), [])


@pytest.mark.parametrize("task", [plain, seceding, handing_out])
@pytest.mark.parametrize("drain", ["tasks", "data", "now"])
async def test_a_task_whose_time_is_up_runs_again_and_is_not_blamed(
    task: Any, drain: Any, diary: Path, by_value: Wrap
) -> None:
    async with cluster_of(here()) as (cluster, client, watch):
        future = client.submit(by_value(task), str(diary), "end", pure=False)
        await wait_until(lambda: diary.read_text() == "began\n")
        report = await cluster.reprovision(*UNIFORM, drain=drain, drain_timeout=0.2)
        assert report.nodes["local"].rerun == 1
        await Event("end", client=client).set()
        assert await future == "done"
        assert diary.read_text() == "began\nbegan\nended\n"
        assert (watch.blamed, watch.erred) == (set(), set())
