"""An agent in this process, with a real scheduler: it registers, reports, obeys, and ends clean however it is ended."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, Scheduler, SpecCluster, Status, rpc
from distributed.core import Server
from distributed.security import Security

from agentcluster import Agent, Mode
from agentcluster.agent import agent as module
from agentcluster.agent import hardware
from agentcluster.agent.forkserver import METHOD
from agentcluster.agent.nanny import METHOD_KEY
from agentcluster.agent.supervisor import Supervisor
from agentcluster.errors import ConfigError, ModeRefused, NodeExists, WorkerStartError
from agentcluster.launch.local import LocalLauncher
from agentcluster.launch.protocol import Launched, Settings
from agentcluster.model import WorkerSpec
from agentcluster.scheduler import plugin
from agentcluster.wire import PLUGIN, to_wire
from tests.support.forked import ForkedLauncher
from tests.support.programs import ROOT
from tests.support.waiting import wait_until
from tests.support.zygote import Zygote

HOST = {"host": "127.0.0.1"}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": 0}
SCHEDULER = {"host": "127.0.0.1", "port": 0, "dashboard_address": ":0"}


def agent(scheduler: Scheduler | str, name: str | None = "n", mode: Any = "none", **options: Any) -> Agent:
    address = scheduler.address if isinstance(scheduler, Scheduler) else scheduler
    return Agent(address, name=name, mode=mode, **HOST, **options)


def node(scheduler: Scheduler, name: str = "n") -> Any:
    return scheduler.extensions[PLUGIN].registry.nodes[name]


def joined(scheduler: Scheduler) -> set[str]:
    return {str(ws.name) for ws in scheduler.workers.values()}


# -- life --------------------------------------------------------------------------------------------------------------


async def test_it_brings_the_plugin_and_registers_its_hardware(scheduler: Scheduler) -> None:
    assert PLUGIN not in scheduler.extensions
    async with agent(scheduler) as one:
        found = node(scheduler)
        assert found.address == one.address == one.worker_address
        assert found.hardware == one.hardware
        assert (found.hardware.cpus, found.hardware.memory) == (hardware.detect().cpus, hardware.detect().memory)
        assert found.hardware.versions["dask"] == dask.__version__
        assert one.status is Status.running
    assert not [n for n in scheduler.extensions[PLUGIN].registry.nodes.values() if n.state != "lost"]


async def test_heartbeats_bring_metrics_and_worker_states(scheduler: Scheduler) -> None:
    dask.config.set({"agentcluster.node.heartbeat-interval": "20ms"})
    async with agent(scheduler, mode=Mode("auto-cpu", TWO)) as one:
        await one.provisioned()
        found = node(scheduler)
        await wait_until(lambda: found.metrics.memory_used > 0)
        first, heard = found.metrics, found.heard
        await wait_until(lambda: found.metrics != first and found.heard > heard)
        assert 0 <= found.metrics.cpu <= 100
        assert 0 < found.metrics.memory_used < psutil.virtual_memory().total
        assert {name: state.state for name, state in found.workers.items()} == {"n-0": "running", "n-1": "running"}
        os.kill(found.workers["n-0"].pid, signal.SIGKILL)
        await wait_until(lambda: found.workers["n-0"].restarts == 1 and found.workers["n-0"].state == "running")


async def test_closing_twice_at_once_ends_everything(scheduler: Scheduler) -> None:
    before = dask.config.get(METHOD_KEY)
    one = await agent(scheduler, mode=Mode("auto-cpu", TWO))
    assert dask.config.get(METHOD_KEY) == METHOD
    await one.provisioned()
    pids = [state.pid for state in node(scheduler).workers.values()]
    finished = asyncio.create_task(one.finished())
    assert await asyncio.gather(one.close(), one.close()) == ["OK"] * 2
    await asyncio.wait_for(finished, 5)
    assert await one.close() == "OK"
    assert one.status is Status.closed
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert dask.config.get(METHOD_KEY) == before
    await wait_until(lambda: not scheduler.workers)


async def test_a_name_that_is_taken(scheduler: Scheduler) -> None:
    async with agent(scheduler) as one:
        with pytest.raises(NodeExists, match="a node named 'n' is already registered") as caught:
            await agent(scheduler)
        assert caught.value.address == one.address
        assert node(scheduler).address == one.address
        async with agent(scheduler, name=None) as two, agent(scheduler, name=None) as three:
            assert three.node_name == f"{two.node_name}.2"


async def test_an_agent_that_cannot_start_leaves_nothing(scheduler: Scheduler) -> None:
    handlers = list(logging.getLogger("agentcluster").handlers)
    before = dask.config.get(METHOD_KEY)
    async with agent(scheduler):
        with pytest.raises(NodeExists):
            await agent(scheduler)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        await agent("tcp://127.0.0.1:1", death_timeout="1s")
    assert dask.config.get(METHOD_KEY) == before
    assert logging.getLogger("agentcluster").handlers == handlers


async def test_an_agent_that_is_never_started_is_nothing(scheduler: Scheduler) -> None:
    one = agent(scheduler)
    assert await one.close() == "OK"
    assert PLUGIN not in scheduler.extensions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "auto-cup"}, "unknown mode 'auto-cup'; did you mean 'auto-cpu'?"),
        ({"mode": "auto-cpu", "config": {"nworker": 1}}, "unknown option 'nworker'; did you mean 'nworkers'?"),
        ({"death_timeout": "soon"}, "soon"),
    ],
)
async def test_bad_arguments(scheduler: Scheduler, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said.replace("?", r"\?")):
        agent(scheduler, **options)


async def test_a_mode_that_is_refused(scheduler: Scheduler) -> None:
    async with agent(scheduler, mode=Mode("uniform", {"nthreads": 10_000}), lasting=True) as one:
        with pytest.raises(ModeRefused, match="nthreads=10000 is larger than the node") as caught:
            await one.provisioned()
        assert caught.value.node == "n"
        assert node(scheduler).state == "refused"
    two = agent(scheduler, mode=Mode("uniform", {"nthreads": 10_000}))
    with pytest.raises(ModeRefused, match="nthreads=10000 is larger than the node"):
        await two
    assert two.status in (Status.closed, Status.failed)


async def test_an_agent_in_place_of_a_worker_is_there_when_its_workers_are(scheduler: Scheduler) -> None:
    one = agent(scheduler, mode=Mode("auto-cpu", TWO))
    first, second = asyncio.ensure_future(_awaited(one)), asyncio.ensure_future(_awaited(one))
    assert await second is one  # connections of the scheduler await it too
    assert not joined(scheduler)
    assert await first is one
    assert joined(scheduler) == {"n-0", "n-1"}
    pids = {state.pid for state in node(scheduler).workers.values()}
    await one.kill()
    await wait_until(lambda: joined(scheduler) == {"n-0", "n-1"})
    await wait_until(lambda: not pids & {state.pid for state in node(scheduler).workers.values()})
    await one.close()


async def _awaited(one: Agent) -> Agent:
    return await one


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.05, 0.1, 0.2])
async def test_an_agent_that_is_closed_while_its_workers_start_leaves_none(scheduler: Scheduler, pause: float) -> None:
    one = agent(scheduler, mode=Mode("auto-cpu", TWO))
    await one.start()
    await asyncio.sleep(pause)
    await one.close()
    await asyncio.sleep(0.3)  # a worker that was left would have joined by then
    assert not joined(scheduler)


async def test_an_agent_that_ends_before_its_workers_are_there_says_so(scheduler: Scheduler) -> None:
    one = agent(scheduler, mode=Mode("auto-cpu", TWO))
    start = asyncio.ensure_future(_awaited(one))
    await wait_until(lambda: PLUGIN in scheduler.extensions and bool(scheduler.extensions[PLUGIN].registry.nodes))
    await one.close()
    with pytest.raises(WorkerStartError, match="workers on node 'n' did not start: its agent: it was closed before"):
        await start


async def test_it_ends_with_its_scheduler() -> None:
    async with Scheduler(**SCHEDULER) as scheduler:
        one = await agent(scheduler, mode=Mode("auto-cpu", TWO))
        await one.provisioned()
        pids = [state.pid for state in node(scheduler).workers.values()]
    await asyncio.wait_for(one.finished(), 20)
    await wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


async def test_two_agents_in_one_process(scheduler: Scheduler) -> None:
    one = agent(scheduler, "a", Mode("auto-cpu", TWO | {"nworkers": 1}))
    two = agent(scheduler, "b", Mode("auto-cpu", TWO | {"nworkers": 1}))
    await asyncio.gather(one, two)
    await asyncio.gather(one.provisioned(), two.provisioned())
    assert joined(scheduler) == {"a", "b"}
    await one.close()
    await wait_until(lambda: joined(scheduler) == {"b"})
    assert dask.config.get(METHOD_KEY) == METHOD
    async with Client(scheduler.address, asynchronous=True) as client:
        assert await client.submit(sum, [40, 2]) == 42
        await client.scheduler.reprovision_nodes(mode="auto-cpu", config=TWO)
    assert joined(scheduler) == {"b", "b-0"}
    await two.close()


async def test_what_it_falls_back_to_is_weaker_than_what_was_set_for_all(scheduler: Scheduler) -> None:
    async with agent(scheduler, "a", None, fallback="none") as one:
        await one.provisioned()
        assert node(scheduler, "a").plan.mode == Mode("none")
        async with rpc(scheduler.address) as remote:
            await remote.set_provision_mode(nodes={"named": to_wire(Mode("none"))})
            async with agent(scheduler, "b", None, fallback="none") as two:
                await two.provisioned()
            assert node(scheduler, "a").state == "standby"
            await remote.set_provision_mode(mode="auto-cpu", config=TWO)
        async with agent(scheduler, "c", None, fallback="none") as three:
            await three.provisioned()
            assert joined(scheduler) == {"a", "c-0", "c-1"}  # a placeholder bears the name of the node without workers
        async with agent(scheduler, "named", None, fallback=Mode("auto-cpu", TWO)) as four:
            await four.provisioned()
            assert not node(scheduler, "named").plan.workers


class Hangs(Server):
    """A worker that is never ready."""

    def __init__(self, scheduler: str, *, name: str, **options: Any) -> None:
        super().__init__({}, needs_workdir=False)
        self.name = name

    async def start_unsafe(self) -> Any:
        await asyncio.Event().wait()


class Fails(Hangs):
    """A worker that does not start."""

    async def start_unsafe(self) -> Any:
        raise OSError("no such luck")


async def test_closing_while_workers_start_leaves_no_task_behind(scheduler: Scheduler) -> None:
    complaints: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    specs = {cls.__name__: WorkerSpec("custom", f"{__name__}.{cls.__name__}") for cls in (Hangs, Fails)}
    before = asyncio.all_tasks()
    supervisor = Supervisor(scheduler.address)
    starting = asyncio.create_task(supervisor.start(specs, 30))
    await wait_until(lambda: {s.name: s.state for s in supervisor.states()}.get("Fails") == "retired")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert supervisor.states() == ()
    await wait_until(lambda: asyncio.all_tasks() <= before)
    gc.collect()
    assert complaints == []


# -- calls -------------------------------------------------------------------------------------------------------------


async def test_calls_of_the_scheduler(scheduler: Scheduler, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agentcluster")
    spec = WorkerSpec(kind="cpu", cls="distributed.Nanny", nthreads=1, memory_limit=0)
    async with agent(scheduler) as one, rpc(one.address) as remote:
        await one.provisioned()
        bad = to_wire(WorkerSpec(kind="cpu", cls="no_such_package.Nanny"))
        refused = await remote.check_workers(specs={"x": to_wire(spec), "y": bad})
        assert set(refused) == {"y"}
        answer = await remote.start_workers(specs={"x": to_wire(spec)}, timeout=30)
        assert [state["name"] for state in answer["states"]] == ["x"]
        answer = await remote.start_workers(specs={"y": bad}, timeout=30)
        assert "no_such_package" in answer["failures"]["y"]
        # the first bears the name of a node that has no workers of its own
        await wait_until(lambda: joined(scheduler) == {"n", "x"})
        with pytest.raises(ConfigError, match="unknown key 'nthread'"):
            await remote.check_workers(specs={"z": {"kind": "cpu", "cls": "distributed.Nanny", "nthread": 1}})
        await remote.stop_workers(names=["x", "unknown"], timeout=10)
        await wait_until(lambda: joined(scheduler) == {"n"})
        assert any("Worker x started at" in line for line in await remote.agent_logs())


async def test_terminate_is_answered_when_the_workers_have_ended(scheduler: Scheduler) -> None:
    one = await agent(scheduler, mode=Mode("auto-cpu", TWO))
    await one.provisioned()
    pids = [state.pid for state in node(scheduler).workers.values()]
    async with rpc(one.address) as first, rpc(one.address) as second:
        assert await asyncio.gather(first.terminate(), second.terminate(reason="twice")) == ["OK", "OK"]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    await one.finished()


@pytest.mark.parametrize("lasting", [False, True])
async def test_an_agent_needs_a_scheduler(lasting: bool) -> None:
    with (
        dask.config.set({"scheduler-address": "tcp://127.0.0.1:1" if lasting else None}),
        pytest.raises(ConfigError, match=r"needs the address of its scheduler, such as Agent\('tcp://"),
    ):
        await Agent(lasting=lasting)


@pytest.mark.parametrize("how", ["scheduler_ip", "scheduler_file", "configuration"])
async def test_its_scheduler_as_a_worker_is_told(scheduler: Scheduler, tmp_path: Path, how: str) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": scheduler.address}))
    options = {"scheduler_ip": {how: scheduler.address}, "scheduler_file": {how: str(file)}, "configuration": {}}[how]
    with dask.config.set({"scheduler-address": scheduler.address if how == "configuration" else None}):
        async with Agent(**options, name="box", nthreads=1, memory_limit="300MiB") as agent:
            await agent.provisioned()
            (worker,) = scheduler.workers.values()
            assert (worker.name, worker.nthreads, worker.memory_limit) == ("box", 1, 300 * 2**20)


async def test_options_for_all_workers(scheduler: Scheduler, tmp_path: Path) -> None:
    options = {"local_directory": str(tmp_path / "scratch"), "resources": {"DISK": 2}}
    async with agent(scheduler, mode=Mode("auto-cpu", TWO), **options) as one:
        await one.provisioned()
        for ws in scheduler.workers.values():
            assert ws.resources == {"CPU": 1.0, "DISK": 2}
            assert ws.local_directory.startswith(str(tmp_path / "scratch"))
            assert ws.host == "127.0.0.1"


async def test_a_worker_that_does_not_start(scheduler: Scheduler) -> None:
    mode = Mode("auto-cpu", TWO | {"preload": ["no_such_module_at_all"]})
    one = agent(scheduler, mode=mode)
    with pytest.raises(WorkerStartError, match="No module named 'no_such_module_at_all'"):
        await one
    assert not scheduler.workers
    assert one.status is Status.closed


async def test_what_the_user_retires_leaves_the_plan(scheduler: Scheduler) -> None:
    async with agent(scheduler, mode=Mode("auto-cpu", TWO)) as one:
        await one.provisioned()
        async with Client(scheduler.address, asynchronous=True) as client:
            first = next(ws.address for ws in scheduler.workers.values() if ws.name == "n-0")
            await client.retire_workers([first])
        await wait_until(lambda: set(node(scheduler).plan.workers) == {"n-1"})
        assert joined(scheduler) == {"n-1"}


# -- under SpecCluster -------------------------------------------------------------------------------------------------


async def test_spec_cluster_starts_and_closes_agents() -> None:
    entry = {"cls": Agent, "options": {"mode": "auto-cpu", "config": TWO | {"nworkers": 1}, **HOST}}
    async with SpecCluster(
        workers={"a": entry, "b": entry},
        scheduler={"cls": Scheduler, "options": SCHEDULER},
        asynchronous=True,
    ) as cluster:
        assert {one.node_name for one in cluster.workers.values()} == {"a", "b"}
        async with Client(cluster, asynchronous=True) as client:
            await client.wait_for_workers(2, timeout=20)
            assert joined(cluster.scheduler) == {"a", "b"}
            logs = await cluster.get_logs(cluster=False, scheduler=False)
            assert logs.keys() == cluster.scheduler.workers.keys()
            assert all("Registered to" in log for log in logs.values())
            assert await client.submit(sum, [40, 2]) == 42
            kept = await client.scatter(list(range(10)))
            await client.scheduler.reprovision_nodes(mode="auto-cpu", config=TWO)
            assert await client.gather(kept) == list(range(10))
            assert len(joined(cluster.scheduler)) == 4


async def test_spec_cluster_notices_the_end_of_an_agent() -> None:
    """Within two seconds, and makes another in its place, as it does for a worker."""
    dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"})
    entry = {"cls": Agent, "options": {"mode": "auto-cpu", "config": TWO | {"nworkers": 1}, **HOST}}
    scheduler = {"cls": Scheduler, "options": SCHEDULER}
    async with SpecCluster(worker=entry, scheduler=scheduler, asynchronous=True) as cluster:
        cluster.scale(2)
        await cluster
        first = next(iter(cluster.workers.values()))
        await first.close()
        await wait_until(lambda: len(cluster.workers) == 1, 2)
        await cluster
        assert len(cluster.workers) == 2
        assert first not in cluster.workers.values()
        assert len(joined(cluster.scheduler)) == 2


def test_spec_cluster_in_a_script() -> None:
    with (
        SpecCluster(
            workers={"a": {"cls": "agentcluster.Agent", "options": {"mode": "auto-cpu", "config": TWO, **HOST}}},
            scheduler={"cls": Scheduler, "options": SCHEDULER},
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2, timeout=20)
        assert client.submit(sum, [40, 2]).result() == 42


# -- launched ----------------------------------------------------------------------------------------------------------


async def launched(launcher: LocalLauncher, scheduler: Scheduler, **settings: Any) -> Launched:
    """Launch an agent of one worker in a process of its own."""
    settings = {"options": {"mode": "auto-cpu", "config": TWO | {"nworkers": 1}, **HOST}, **settings}
    # Otherwise the forkserver has another environment than the worker wants, which is spawned then.
    pre_spawn = {key: str(value) for key, value in dask.config.get("distributed.nanny.pre-spawn-environ").items()}
    told = Settings(scheduler=scheduler.address, name=launcher.name, pre_spawn=pre_spawn, **settings)
    found = await launcher.launch(told, timeout=30)
    await wait_until(lambda: node(scheduler, launcher.name).state == "ready", 20)
    return found


@pytest.mark.parametrize("how", ["signal", "end of stdin"])
async def test_a_launched_agent_moves_its_data_unless_its_launcher_is_gone(
    scheduler: Scheduler, zygote: Zygote, how: str
) -> None:
    one, two = await asyncio.gather(*(launched(ForkedLauncher(name, zygote), scheduler) for name in ("a", "b")))
    try:
        async with Client(scheduler.address, asynchronous=True) as client:
            kept = await client.scatter(list(range(20)), hash=False)
            if how == "signal":
                os.kill(one.ready.pid, signal.SIGTERM)
                assert await one.wait() == 0
                assert await client.gather(kept) == list(range(20))
                assert any("Node a: 10 keys (" in line for line in one.log.lines())
            else:
                await one.close(10)
                assert await one.wait() == 0
                (left,) = scheduler.workers.values()
                assert len(left.has_what) == 10
                assert not [line for line in one.log.lines() if "moved" in line or "with its data" in line]
    finally:
        await asyncio.gather(one.close(10), two.close(10))


async def test_a_launched_agents_forkserver_imports_what_it_is_told(scheduler: Scheduler, tmp_path: Path) -> None:
    note = "{os.getpid()} {'dask' in sys.modules}"
    text = f"import os, sys\nwith open({str(tmp_path / 'seen')!r}, 'a') as file:\n    print(f{note!r}, file=file)\n"
    (tmp_path / "preloaded_by_test.py").write_text(text)
    config = {"agentcluster": {"forkserver": {"preload": ["preloaded_by_test", "distributed"]}}}
    one = await launched(LocalLauncher("a"), scheduler, config=config, environ={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    try:
        (line,) = (tmp_path / "seen").read_text().splitlines()
        pid, dask_first = line.split()
        assert int(pid) != one.ready.pid
        assert dask_first == "False"
        (worker,) = node(scheduler, "a").workers.values()
        assert psutil.Process(worker.pid).ppid() == int(pid)
    finally:
        await one.close(10)


# -- strangers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
@pytest.mark.parametrize("server", ["agent", "scheduler"])
async def test_idle_connections_are_few_and_short(server: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (module, plugin):
        monkeypatch.setattr(each, "HANDSHAKE", 0.5)
        monkeypatch.setattr(each, "MOST_OF_ONE", 8)
    security = Security.temporary() if scheme == "tls" else Security()
    async with (
        Scheduler(security=security, **SCHEDULER) as scheduler,
        Agent(scheduler.address, security=security, mode="none", lasting=True) as one,
    ):
        asked: Server = one if server == "agent" else scheduler
        where = ("127.0.0.1", int(asked.address.rpartition(":")[2]))
        began = time.monotonic()
        idle = [socket.create_connection(where) for _ in range(100)]
        try:
            for connection in idle:
                connection.settimeout(10)
                while await asyncio.to_thread(connection.recv, 4096):
                    pass
            assert time.monotonic() - began < 10
        finally:
            for connection in idle:
                connection.close()
        async with rpc(asked.address, connection_args=security.get_connection_args("client")) as remote:
            assert (await remote.identity())["id"] == asked.id
