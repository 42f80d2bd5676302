"""Agents in the jobs of a real Slurm: as dask-jobqueue's worker command, by ``srun``, and in SLURMRunner."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client

from tests.support import slurm as one_node
from tests.support.programs import AGENT, ROOT, Program, Start, gone, start_scheduler
from tests.support.slurm import Slurm
from tests.support.under_manager import Data, imported, names, nodes, ready, reprovision, working
from tests.support.waiting import wait_until

dask_jobqueue = imported("dask_jobqueue")

#: Seconds without a worker of its name after which a job counts as lost.
LOST = 1.0
WHY_NOT = one_node.missing()

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no Slurm here: {WHY_NOT}"),
    pytest.mark.timeout(240),
]

Open = Callable[..., AbstractAsyncContextManager[tuple[Any, Client]]]


@pytest.fixture(scope="module")
def running() -> Iterator[Slurm]:
    with one_node.serve() as slurm:
        yield slurm


@pytest.fixture
def slurm(running: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A Slurm without jobs, that commands started by the test talk to."""
    for key, value in {**running.environ, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(key, value)
    yield running
    running.empty()


@pytest.fixture
def jobs(slurm: Slurm, tmp_path: Path) -> Open:
    """Return a function that opens a SLURMCluster; what its jobs write is in the test's folder."""
    loopback = next(name for name, (first, *_) in psutil.net_if_addrs().items() if first.address == "127.0.0.1")

    @asynccontextmanager
    async def open_() -> AsyncIterator[tuple[Any, Client]]:
        dask.config.set({"distributed.deploy.lost-worker-timeout": LOST})
        async with (
            dask_jobqueue.SLURMCluster(
                worker_command="agentcluster.cli.dask_agent",
                cores=1,
                processes=1,
                memory="256MiB",
                job_script_prologue=["trap : TERM"],  # or the shell ends first, and Slurm kills what it leaves
                interface=loopback,
                local_directory=str(tmp_path / "scratch"),
                log_directory=str(tmp_path / "jobs"),
                scheduler_options={"dashboard": False, "dashboard_address": ":0"},
                asynchronous=True,
            ) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            yield cluster, client

    return open_


async def scaled(cluster: Any, client: Client, slurm: Slurm, count: int) -> dict[str, str]:
    """Have the manager scale; return its allocations by name once Slurm has just these, and their nodes are ready."""
    cluster.scale(jobs=count)
    return await settled(cluster, client, slurm, count)


async def settled(cluster: Any, client: Client, slurm: Slurm, count: int) -> dict[str, str]:
    """Return the manager's allocations by name once Slurm has just these, and their nodes are ready."""
    await wait_until(lambda: len(cluster.workers) == count, 60)
    allocations = {str(name): str(job.job_id) for name, job in cluster.workers.items()}

    async def just_these() -> bool:
        return sorted(await asyncio.to_thread(slurm.jobs)) == sorted(allocations.values())

    await wait_until(just_these, 90)
    if count:
        await ready(client, list(allocations))
    return allocations


def processes(slurm: Slurm, job: str) -> list[psutil.Process]:
    found = [psutil.Process(pid) for pid in slurm.pids(job)]
    assert found
    return found


async def test_an_allocation_is_reprovisioned_and_stays(slurm: Slurm, jobs: Open) -> None:
    async with jobs() as (cluster, client):
        allocations = await scaled(cluster, client, slurm, 2)
        assert names(cluster.scheduler) == set(allocations)
        began = slurm.jobs()
        assert all(state.startswith("RUNNING") for state in began.values())
        async with working(client, cluster.scheduler) as data:
            for nworkers in (2, 1, 3, 2):
                await reprovision(client, nworkers)
                assert names(cluster.scheduler) >= set(allocations)
                assert len(cluster.scheduler.running) == 2 * nworkers
        await asyncio.sleep(LOST + 0.5)  # until the manager has had the time to close jobs that it counts as lost
        assert slurm.jobs() == began
        assert {str(name): str(job.job_id) for name, job in cluster.workers.items()} == allocations
        await data.check(client)

        # the manager's own scaling goes on: one more, two less, whose data moves first, none
        three = await scaled(cluster, client, slurm, 3)
        assert three.items() > allocations.items()
        one = await scaled(cluster, client, slurm, 1)
        assert one.items() < three.items()
        await data.check(client)
        del data
        tree = processes(slurm, *one.values())
        await scaled(cluster, client, slurm, 0)
        await gone(tree, 30)
        await wait_until(lambda: not cluster.scheduler.workers)


async def test_data_of_a_job_that_is_cancelled_moves_to_others(slurm: Slurm, jobs: Open) -> None:
    """Slurm sends SIGTERM to all processes of the job at once, and waits (KillWait) before it kills."""
    async with jobs() as (cluster, client):
        allocations = await scaled(cluster, client, slurm, 2)
        await reprovision(client, 2)
        data = await Data.put(client)
        name, job = allocations.popitem()
        slurm.run("scancel", job)
        await ready(client, list(allocations))
        await wait_until(lambda: len(cluster.scheduler.workers) == 2)
        await data.check(client)
        await wait_until(lambda: name not in cluster.workers)  # the manager has noticed


async def test_a_manager_that_adapts(slurm: Slurm, jobs: Open) -> None:
    async with jobs() as (cluster, client):
        cluster.adapt(minimum_jobs=1, maximum_jobs=2, interval="200ms", wait_count=15, target_duration="500ms")
        await settled(cluster, client, slurm, 1)
        async with working(client, cluster.scheduler) as data:
            two = await settled(cluster, client, slurm, 2)
            await reprovision(client, 2)
            assert sorted(slurm.jobs()) == sorted(two.values())
        one = await settled(cluster, client, slurm, 1)
        assert one.items() < two.items()
        assert len(cluster.scheduler.running) == 2
        await data.check(client)


async def test_scancel_ends_everything(slurm: Slurm, jobs: Open) -> None:
    async with jobs() as (cluster, client):
        allocations = await scaled(cluster, client, slurm, 1)
        await reprovision(client, 2)
        (job,) = allocations.values()
        tree = processes(slurm, job)
        assert len(tree) >= 4  # the shell, the agent, two workers
        slurm.run("scancel", job)
        await gone(tree, 60)
        await wait_until(lambda: not cluster.scheduler.workers)
        await wait_until(lambda: _none(client))
        await wait_until(lambda: not slurm.jobs(), 60)


async def _none(client: Client) -> bool:
    return await nodes(client) == {}


# -- without dask-jobqueue's clusters ----------------------------------------------------------------------------------


def srun(start: Start, slurm: Slurm, *command: str) -> Program:
    """Start srun in a process that becomes it."""
    program = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    return start("-c", program, shutil.which("srun") or "", *command, env=slurm.environ)


@pytest.mark.parametrize("tasks", [1, 2])
async def test_srun_with_a_scheduler_file(slurm: Slurm, start: Start, tmp_path: Path, tasks: int) -> None:
    dask_scheduler, address = await start_scheduler(start, tmp_path)
    agent = f"{sys.executable} {' '.join(AGENT)} --scheduler-file {tmp_path / 'scheduler.json'} --nthreads 1"
    name = "" if tasks == 1 else " --name node-$SLURM_PROCID"
    options = ("--ntasks", str(tasks), "--cpus-per-task", "1")
    step = srun(start, slurm, *options, "sh", "-c", f"exec {agent} --memory-limit 256MiB{name}")
    expected = [one_node.host()] if tasks == 1 else [f"node-{number}" for number in range(tasks)]
    async with Client(address, asynchronous=True) as client:
        await ready(client, expected)
        began = slurm.jobs()
        (job,) = began
        data = await Data.put(client)
        for nworkers in (2, 1, 3):
            await reprovision(client, nworkers)
            futures = client.map(lambda x: x + 1, range(100), pure=False)
            assert await client.gather(futures) == list(range(1, 101))
        await data.check(client)
        assert slurm.jobs() == began
        tree = processes(slurm, job)
        del data, futures
    dask_scheduler.kill(signal.SIGTERM)
    assert await dask_scheduler.ended() == 0
    assert await step.ended(30) == 0  # the agents end with their scheduler, and the step with its agents
    await gone(tree, 15)


RUNNER = """
import json, sys
from dask_jobqueue.slurm import SLURMRunner
from distributed import Client

def shape(nworkers):
    return {"mode": "auto-cpu", "config": {"nworkers": nworkers, "nthreads": 1, "memory_limit": "256MiB"}}

def main():
    with SLURMRunner(
        scheduler_file=sys.argv[1],
        scheduler_options={"host": "127.0.0.1", "dashboard": False, "dashboard_address": ":0"},
        worker_class="agentcluster.Agent",
        worker_options=shape(1),
    ) as runner, Client(runner) as client:
        client.wait_for_workers(runner.n_workers, timeout=60)
        kept = client.scatter(list(range(40)), hash=False)
        found = [sorted(str(w["name"]) for w in client.scheduler_info(n_workers=-1)["workers"].values())]
        for nworkers in 2, 1:
            report = client.sync(client.scheduler.reprovision_nodes, **shape(nworkers))
            found.append(sorted(node["outcome"] for node in report["nodes"].values()))
            assert client.gather(client.map(lambda x: x + 1, range(100), pure=False)) == list(range(1, 101))
        assert client.gather(kept) == list(range(40))
        print(json.dumps(found), flush=True)

if __name__ == "__main__":
    main()
"""


async def test_slurm_runner(slurm: Slurm, start: Start, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RUNNER)
    arguments = (sys.executable, str(tmp_path / "script.py"), str(tmp_path / "scheduler-{job_id}.json"))
    step = srun(start, slurm, "--ntasks", "4", "--cpus-per-task", "1", *arguments)
    assert await step.ended(120) == 0, step.output()
    answers = [json.loads(line) for line in step.output().splitlines() if line.startswith("[[")]
    assert answers == [[["2", "3"], ["changed", "changed"], ["changed", "changed"]]]
    await wait_until(lambda: not slurm.jobs(), 60)
