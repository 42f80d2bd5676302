"""The start of a cluster: what local workers have of the process that starts them, and what is said when it fails."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Nanny, Status, Worker
from distributed.diagnostics.plugin import WorkerPlugin

from agentcluster import AgentCluster, Host, Mode
from agentcluster.errors import ConfigError, LaunchError, SchedulerUnfit, SwapError, WorkerStartError
from agentcluster.model import Hardware
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER
from tests.support.programs import Start, start_scheduler
from tests.support.waiting import wait_until

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}


def read_stdin() -> tuple[int, bytes]:
    """Return how a child process ended that reads its stdin to the end, and what it read."""
    done = subprocess.run(["cat"], capture_output=True, timeout=10, check=False)
    return done.returncode, done.stdout


async def test_a_local_worker_has_what_the_client_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, also from another directory; an empty stdin; and room for sockets where $TMPDIR is too long."""
    (tmp_path / "beside_the_script.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import beside_the_script  # type: ignore[import-not-found]

    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.chdir("/")
    host = Host("local", env={"TMPDIR": str(long)})
    async with (
        AgentCluster([host], config=ONE, scheduler_options=SCHEDULER, asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert await client.submit(beside_the_script.double, 21) == 42
        assert await client.submit(os.getenv, "TMPDIR") == str(long)
        assert await client.submit(read_stdin) == (0, b"")
        ppid = await client.submit(os.getppid)
        forkserver = Path(f"/proc/{ppid}/cmdline").read_bytes() if sys.platform == "linux" else b"forkserver"
        assert b"forkserver" in forkserver


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield int(listening.getsockname()[1])


async def start(asynchronous: bool, **options: Any) -> None:
    if asynchronous:
        await AgentCluster(**{"hosts": here(), **options}, asynchronous=True)
    else:
        AgentCluster(**options)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("scheduler", "where", "why"), [(None, "this machine", "port={}"), ("local", "local", "Errno")]
)
async def test_a_port_that_is_taken(
    taken: int, asynchronous: bool, scheduler: str | None, where: str, why: str
) -> None:
    """Said at once, as the reason itself; nothing is left."""
    said = rf"^scheduler on {where} did not start: .*{why.format(taken)}.*[Aa]ddress already in use"
    with pytest.raises(LaunchError, match=said):
        await start(asynchronous, scheduler=scheduler, scheduler_options={**SCHEDULER, "port": taken})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (5, r"scheduler_options=5 must be a mapping"),
        ({"prot": 8786}, r"scheduler_options: unknown option 'prot'; did you mean 'port'\?"),
    ],
)
def test_wrong_options_of_a_scheduler(options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AgentCluster(scheduler_options=options)


async def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(LaunchError, match=r"scheduler on this machine did not start: 'nope0' is not a valid network"):
        await AgentCluster(here(), scheduler_options={"interface": "nope0"}, asynchronous=True)


class PluginError(Exception):
    """Error of a plugin of the user's."""


class BrokenPlugin(WorkerPlugin):
    """A plugin whose setup fails, with an error of its own or a builtin one."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def setup(self, worker: Worker) -> None:
        raise self.error


class BrokenWorker(Worker):
    """A worker whose start fails."""

    async def start_unsafe(self) -> Any:
        raise PluginError("the worker is broken")


@pytest.mark.parametrize(
    ("error", "asynchronous"), [(ImportError("no module like this"), False), (PluginError("no such luck"), True)]
)
async def test_the_exception_of_a_plugin_is_the_cause(error: Exception, asynchronous: bool) -> None:
    """A local worker can import the plugin of this module; what the plugin raises reaches the user."""
    options = {"config": ONE, "worker_options": {"plugins": {BrokenPlugin(error)}}, "scheduler_options": SCHEDULER}
    with pytest.raises(WorkerStartError, match=f"local-0: {type(error).__name__}: {error}") as caught:
        await start(asynchronous, **options)
    cause = caught.value.__cause__
    assert type(cause) is type(error)
    assert cause.args == error.args
    assert cause.__traceback__ is None


async def test_the_exception_of_a_worker_class_is_the_cause() -> None:
    options: dict[str, Any] = {"config": ONE, "scheduler_options": SCHEDULER, "asynchronous": True}
    async with AgentCluster(here(), **options) as cluster:
        with pytest.raises(SwapError, match=r"PluginError: the worker is broken.*still run") as caught:
            await cluster.reprovision("spec", {"spec": {"cls": BrokenWorker}})
        assert isinstance(caught.value.__cause__, PluginError)
        assert len(cluster.scheduler.workers) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_start_that_takes_too_long_is_a_timeout(asynchronous: bool) -> None:
    with pytest.raises(TimeoutError, match=r"had not joined after 0\.01 s; start_timeout= gives more time"):
        await start(asynchronous, hosts=here(), config=ONE, start_timeout="10ms", scheduler_options=SCHEDULER)


class Outdated(Nanny):
    """A class that warns when it is made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        warnings.warn("this class has no future", FutureWarning, stacklevel=1)
        warnings.warn("nor a\n present", UserWarning, stacklevel=1)
        warnings.warn("this is for its author", DeprecationWarning, stacklevel=1)
        super().__init__(*args, **options)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_warnings_of_a_worker_class_point_at_the_users_line(asynchronous: bool) -> None:
    """Each once with its nodes, of its own category; what is for authors is not passed on."""
    spec = {"spec": {"cls": Outdated, "opts": {"nthreads": 1, "memory_limit": "300MiB"}}, "nworkers": 2}
    options: dict[str, Any] = {"mode": "spec", "config": spec, "scheduler_options": SCHEDULER}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cluster: Any = AgentCluster(here(2), asynchronous=asynchronous, **options)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        if asynchronous:
            await cluster
            await cluster.close()
        else:
            cluster.close()
    expected = [
        (FutureWarning, "local, local.2: this class has no future"),
        (UserWarning, "local, local.2: nor a present"),
    ]
    told = [each for each in seen if each.category in (FutureWarning, UserWarning)]
    assert [(each.category, str(each.message)) for each in told] == expected
    assert {(each.filename, each.lineno) for each in told} == {(__file__, line)}


def by_cores(hardware: Hardware) -> Mode:
    """Return a mode by the hardware of a node: one thread of each core, at most two."""
    return Mode("uniform", {"nworkers": 1, "nthreads": min(2, hardware.cpus), "memory_limit": "300MiB"})


async def test_a_function_as_first_mode_is_refused_with_what_acts() -> None:
    for mode in (by_cores, {"local": by_cores}):
        with pytest.raises(ConfigError, match=r"write AgentCluster\(…, mode='none'\), and then cluster\.reprovision"):
            AgentCluster(here(), mode=mode)  # type: ignore[arg-type]
    async with AgentCluster(here(2), mode="none", scheduler_options=SCHEDULER, asynchronous=True) as cluster:
        report = await cluster.reprovision(by_cores)
        threads = [min(2, node["hardware"]["cpus"]) for node in cluster.nodes.values()]
        assert [worker.nthreads for worker in cluster.scheduler.workers.values()] == threads
        assert set(report.nodes) == {"local", "local.2"}


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_closed_cluster_says_so(asynchronous: bool) -> None:
    """It shows no nodes any more, and each call is refused at once."""
    cluster: Any = AgentCluster(here(), config=ONE, scheduler_options=SCHEDULER, asynchronous=asynchronous)
    if asynchronous:
        await cluster
    assert list(cluster.nodes) == ["local"]
    if asynchronous:
        await cluster.close()
    else:
        cluster.close()
    assert not cluster.nodes
    assert "nodes=0" in repr(cluster)
    for call in (cluster.scale, lambda: cluster.reprovision("uniform"), cluster.rollout.undo, cluster.refresh):
        with pytest.raises(ConfigError, match=r"is closed; make another AgentCluster"):
            call()
    cluster.close()


async def test_a_cluster_whose_scheduler_has_gone_says_so(start: Start, tmp_path: Path) -> None:
    program, address = await start_scheduler(start, tmp_path)
    cluster = await AgentCluster(here(), config=ONE, scheduler=address, asynchronous=True)
    try:
        program.kill()
        await wait_until(lambda: cluster.status is Status.failed, 30)
        node = cluster.nodes["local"]
        assert (node["state"], node["problem"]) == ("lost", f"the scheduler at {address} has gone")
        for call in (cluster.scale, cluster.refresh, cluster.rollout.status):
            with pytest.raises(SchedulerUnfit, match="it has gone; close this cluster, and make another"):
                await call()
    finally:
        began = time.monotonic()
        await cluster.close()
    assert time.monotonic() - began < 15  # and not as long as a connection may take
    assert cluster.status is Status.closed
