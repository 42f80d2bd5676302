"""dask-cloudprovider's clusters of virtual machines with agents on them, but for the cloud.

A machine's start-up script is what dask-cloudprovider renders; the command that Docker would run on it is run as a
process here, until the machine is destroyed.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from distributed import Client

from tests.support.managed import HOST, SCHEDULER, SHAPE, Work, names, reprovision, there, workers
from tests.support.programs import Program, Start, gone
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.deploy,
    # dask-cloudprovider leaves the socket with which it looked for the scheduler to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning"),
]
vmcluster = pytest.importorskip(
    "dask_cloudprovider.generic.vmcluster", reason="dask-cloudprovider is not installed", exc_type=ImportError
)

IMAGE = "example.org/dask-with-agentcluster"


def command_of(script: str) -> tuple[list[str], dict[str, str]]:
    """Return what the start-up script has Docker run in the image: arguments of Python, and the environment."""
    (line,) = [each for each in yaml.safe_load(script)["runcmd"] if each.startswith("docker run")]
    words = shlex.split(line)
    environ = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-e")
    program, config, python, *arguments = words[words.index(IMAGE) + 1 :]
    name, _, value = config.partition("=")
    assert (program, name, python) == ("env", "DASK_INTERNAL_INHERIT_CONFIG", "python")
    return arguments, {**environ, name: value}


# -- scripts of a provider ---------------------------------------------------------------------------------------------


async def test_script_of_a_provider() -> None:
    """Rendered by a provider's own classes, without a word to the provider."""
    hetzner = pytest.importorskip("dask_cloudprovider.hetzner.vserver", reason="no hcloud", exc_type=ImportError)
    dask.config.set({"cloudprovider.hetzner.token": "none"})
    cluster = hetzner.HetznerCluster(
        worker_class="agentcluster.Agent",
        worker_options={"nthreads": 2},
        docker_image=IMAGE,
        env_vars={"EXTRA_PIP_PACKAGES": "agentcluster"},
        security=False,
        asynchronous=True,
    )
    worker = hetzner.HetznerWorker("tcp://10.0.0.1:8786", **cluster.worker_options)
    arguments, environ = command_of(cluster.render_process_cloud_init(worker))
    assert environ["EXTRA_PIP_PACKAGES"] == "agentcluster"
    assert arguments[:4] == ["-m", "distributed.cli.dask_spec", "tcp://10.0.0.1:8786", "--spec"]
    spec = {"cls": "agentcluster.Agent", "opts": {"nthreads": 2, "name": worker.name}}
    assert yaml.safe_load(arguments[4]) == spec
    await cluster.close()


# -- machines as processes ---------------------------------------------------------------------------------------------


class Machine(vmcluster.VMInterface):  # type: ignore[misc]
    """A machine whose start-up script is run here; destroyed, as by a provider, without a warning."""

    def __init__(self, cluster: Any, start: Start, docker_image: str, env_vars: Any, **options: Any) -> None:
        super().__init__(**{key: value for key, value in options.items() if key != "protocol"})
        self.cluster = cluster
        self.start_program = start
        self.docker_image = docker_image
        self.env_vars = env_vars
        self.program: Program | None = None

    async def create_vm(self) -> tuple[str, None]:
        arguments, environ = command_of(self.cluster.render_process_cloud_init(self))
        self.program = self.start_program(*arguments, env=environ)
        if isinstance(self, vmcluster.SchedulerMixin):
            self.port = int((await self.program.says("Scheduler at:")).rpartition(":")[2])
        return "127.0.0.1", None

    async def destroy_vm(self) -> None:
        if self.program is not None and self.program.popen.poll() is None:
            await gone(self.program.kill())


class SchedulerMachine(vmcluster.SchedulerMixin, Machine):  # type: ignore[misc]
    pass


class WorkerMachine(vmcluster.WorkerMixin, Machine):  # type: ignore[misc]
    pass


class Machines(vmcluster.VMCluster):  # type: ignore[misc]
    def __init__(self, start: Start, **options: Any) -> None:
        self.scheduler_class = SchedulerMachine
        self.worker_class = WorkerMachine
        self.options = {"cluster": self, "start": start}
        self.scheduler_options = dict(self.options)
        self.worker_options = dict(self.options)
        super().__init__(**options)


@asynccontextmanager
async def cluster_of(start: Start, count: int, security: bool) -> AsyncIterator[tuple[Any, Client]]:
    dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"})
    async with (
        Machines(
            start,
            n_workers=count,
            worker_class="agentcluster.Agent",
            worker_options={**HOST, **SHAPE},
            scheduler_options={key: value for key, value in SCHEDULER.items() if key != "dashboard"},
            docker_image=IMAGE,
            security=security,
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        yield cluster, client


@pytest.mark.parametrize("security", [True, False], ids=["tls", "tcp"])
async def test_reprovision_under_load_then_scale(start: Start, security: bool, tmp_path: Path) -> None:
    async with cluster_of(start, 2, security) as (cluster, client):
        assert cluster.scheduler_address.startswith("tls://" if security else "tcp://")
        machines = {machine.name: machine for machine in cluster.workers.values()}
        await there(client, *machines)
        for worker in (await workers(client)).values():
            assert (worker["nthreads"], worker["memory_limit"]) == (1, 300 * 2**20)
        work = Work(client, tmp_path / "work")
        await work.begin()
        for nworkers in (2, 1):
            await reprovision(client, nworkers)
            found = await names(client)
            assert len(found) == 2 * nworkers
            assert found >= set(machines)
        await work.all_there()

        # The manager's own names are numbers, and destroying a machine is sudden: its data has to be moved before.
        number, leaving = max(cluster.workers.items())
        await client.retire_workers(names=[leaving.name])
        assert await leaving.program.ended() == 0
        await cluster.scale_down([number])
        await wait_until(lambda: leaving not in cluster.workers.values(), 20)
        await work.all_there()

        cluster.scale(2)
        await wait_until(lambda: len(cluster.workers) == 2, 20)
        now = {machine.name for machine in cluster.workers.values()}
        assert len(now & set(machines)) == 1
        await there(client, *now)
        await work.all_there()
