"""dask-jobqueue's own machinery with the agent as its worker command, over its jobs on the local machine.

What it does with jobs, as its source says: it runs ``python -m COMMAND ADDRESS --name JOB --nthreads N --memory-limit M
…``, waits for "Registered to:" on stderr, gives up at a line with "error" before that, and closes a job with SIGKILL.
``SpecCluster`` below it closes a job when no worker has had its name for ``distributed.deploy.lost-worker-timeout``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from tornado.iostream import StreamClosedError

from tests.support.giving_up import GivingUp
from tests.support.programs import CALM_ENVIRON, ROOT, gone
from tests.support.under_manager import imported, names, ready, reprovision, working
from tests.support.waiting import wait_until

local = imported("dask_jobqueue.local")

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]


@dataclass
class Jobs:
    """A cluster whose jobs are processes of this machine."""

    cluster: Any
    client: Client
    #: The processes of all jobs that it started.
    started: list[psutil.Process] = field(default_factory=list)

    def pids(self) -> dict[str, int]:
        """Return the processes of the jobs that the manager knows, by name."""
        return {str(name): int(job.job_id) for name, job in self.cluster.workers.items()}

    async def scale(self, jobs: int) -> dict[str, int]:
        """Have the manager scale; return its jobs once they are that many, and their nodes are ready."""
        self.cluster.scale(jobs=jobs)
        return await self.settled(jobs)

    async def settled(self, jobs: int) -> dict[str, int]:
        """Return the jobs once the manager has that many, and their nodes are ready."""
        await wait_until(lambda: len(self.pids()) == jobs, 60)
        if jobs:
            await ready(self.client, list(self.pids()))
        return self.pids()


Open = Callable[..., AbstractAsyncContextManager[Jobs]]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, giving_up: GivingUp) -> Open:
    """Return a function that opens a cluster of local jobs."""
    for name, value in {"PYTHONPATH": str(ROOT), **CALM_ENVIRON}.items():
        monkeypatch.setenv(name, value)
    loopback = next(name for name, (first, *_) in psutil.net_if_addrs().items() if first.address == "127.0.0.1")

    @asynccontextmanager
    async def open_(**options: Any) -> AsyncIterator[Jobs]:
        subprocesses: list[Any] = []
        reading: list[asyncio.Task[None]] = []

        class Job(local.LocalJob):
            """A local job whose stderr is read to its end, which dask-jobqueue's own leaves to fill the pipe."""

            async def _submit_job(self, script_filename: str) -> str:
                try:
                    return str(await super()._submit_job(script_filename))
                finally:
                    opened.started.append(psutil.Process(self.process.pid))
                    subprocesses.append(self.process)
                    log = tmp_path / f"job-{self.process.pid}.log"
                    reading.append(asyncio.ensure_future(_read(self.process.stderr, log)))

        options = {"cores": 1, "processes": 1, "memory": "256MiB", **options}
        try:
            async with (
                local.LocalCluster(
                    worker_command="agentcluster.cli.dask_agent",
                    job_cls=Job,
                    interface=loopback,
                    local_directory=str(tmp_path / "scratch"),
                    scheduler_options={"dashboard": False, "dashboard_address": ":0"},
                    asynchronous=True,
                    **options,
                ) as cluster,
                Client(cluster, asynchronous=True) as client,
            ):
                opened = Jobs(cluster, client)
                yield opened
        finally:
            await asyncio.gather(*(asyncio.to_thread(each.proc.wait, 30) for each in subprocesses))
            await asyncio.wait_for(asyncio.gather(*reading), 30)
            for each in subprocesses:
                each.stdout.close()

    return open_


async def _read(stream: Any, log: Path) -> None:
    with log.open("ab") as file:
        while True:
            try:
                file.write(await stream.read_bytes(65536, partial=True))
            except StreamClosedError:
                return
            file.flush()


def trees(started: list[psutil.Process]) -> list[psutil.Process]:
    return [each for process in started for each in (process, *process.children(recursive=True))]


async def test_jobs_are_reprovisioned_under_load_and_stay(jobs: Open, giving_up: GivingUp) -> None:
    async with jobs() as opened:
        cluster, client = opened.cluster, opened.client
        before = await opened.scale(2)
        tracked = set(before)
        assert names(cluster.scheduler) == tracked
        async with working(client, cluster.scheduler) as data:
            for nworkers in (2, 1, 2):
                assert set(await reprovision(client, nworkers)) == tracked
                assert names(cluster.scheduler) >= tracked
                assert len(names(cluster.scheduler)) == 2 * nworkers
        await giving_up.look(cluster)  # for the jobs that it counts as lost
        assert opened.pids() == before
        assert all(process.is_running() for process in opened.started)
        await data.check(client)

        # the manager's own scaling goes on: a job less, whose data moves first, one more, none
        tree = trees(opened.started)
        (kept,) = (await opened.scale(1)).items()
        assert kept in before.items()
        await data.check(client)
        await giving_up.look(cluster)  # for the worker that went: it would take the next one for it
        after = await opened.scale(2)
        assert kept in after.items()
        assert len(set(after.values()) - set(before.values())) == 1
        await reprovision(client, 1)
        assert names(cluster.scheduler) == set(after)
        await data.check(client)
        del data
        tree += trees([psutil.Process(pid) for pid in after.values()])
        await opened.scale(0)
        await gone(tree, 15)
        await wait_until(lambda: not cluster.scheduler.workers)


async def test_a_job_whose_workers_were_all_taken_away_stays(jobs: Open, giving_up: GivingUp) -> None:
    async with jobs() as opened:
        before = await opened.scale(1)
        await opened.client.scheduler.reprovision_nodes(mode="none")
        await giving_up.look(opened.cluster)
        assert opened.pids() == before
        assert names(opened.cluster.scheduler) == set(before)
        assert not opened.cluster.scheduler.running
        later = opened.client.submit(sum, [1, 2])
        await reprovision(opened.client, 2)
        assert await later == 3
        assert opened.pids() == before


async def test_a_manager_that_adapts(jobs: Open, giving_up: GivingUp) -> None:
    async with jobs() as opened:
        cluster, client = opened.cluster, opened.client
        cluster.adapt(minimum_jobs=1, maximum_jobs=2, interval="200ms", wait_count=15, target_duration="500ms")
        await opened.settled(1)
        for nworkers in (2, 1, 3):
            async with working(client, cluster.scheduler) as data:
                first = await opened.settled(2)
                await reprovision(client, nworkers)
                assert names(cluster.scheduler) >= set(first)
                assert opened.pids() == first
            left = await opened.settled(1)
            assert left.items() < first.items()
            assert len(cluster.scheduler.running) == nworkers
            await data.check(client)
        await giving_up.look(cluster)
        assert opened.pids() == left
        await data.check(client)
        del data
        tree = trees([psutil.Process(pid) for pid in left.values()])
        cluster.adapt(minimum=0, maximum=0, interval="200ms", wait_count=1)
        await opened.settled(0)
        await gone(tree, 15)


async def test_jobs_of_several_workers(jobs: Open, giving_up: GivingUp) -> None:
    options = {"cores": 2, "processes": 2, "memory": "512MiB", "worker_extra_args": ["--nworkers", "2"]}
    async with jobs(**options) as opened:
        cluster, client = opened.cluster, opened.client
        before = await opened.scale(2)
        tracked = {f"{job}-{number}" for job in before for number in (0, 1)}
        assert names(cluster.scheduler) == tracked == cluster.plan
        async with working(client, cluster.scheduler) as data:
            for nworkers in (1, 3, 2):
                await reprovision(client, nworkers)
                assert names(cluster.scheduler) >= tracked
                assert len(cluster.scheduler.running) == 2 * nworkers
        await giving_up.look(cluster)
        assert opened.pids() == before
        tree = trees(opened.started)
        (kept,) = (await opened.scale(1)).items()
        assert kept in before.items()
        await data.check(client)
        del data
        await opened.scale(0)
        await gone(tree, 15)
