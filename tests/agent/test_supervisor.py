"""The supervisor with real nannies and worker processes: started all or none, watched, restarted, given up, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, Nanny, Scheduler, SchedulerPlugin, Status, Worker, rpc
from distributed.comm.addressing import get_address_host_port
from distributed.process import AsyncProcess
from distributed.security import Security

from agentcluster.agent import supervisor as ports
from agentcluster.agent.nanny import RestartPolicy, StartMethod
from agentcluster.agent.supervisor import CUDA_WORKER, Supervisor, resolve
from agentcluster.errors import ConfigError, WorkerStartError, WorkerStartTimeout
from agentcluster.model import WorkerSpec, WorkerState
from agentcluster.wire import pickled
from tests.support.census import children
from tests.support.waiting import wait_until

START = 30.0
STOP = 10.0

#: For a worker that dies while it starts, from the moment on at which a file exists.
DIES = """
import os

def dask_setup(worker):
    if os.path.exists({file!r}):
        os._exit(3)
"""

#: For a worker that never gets ready.
HANGS = """
import threading

async def dask_setup(worker):
    threading.Event().wait()
"""


class OwnNanny(Nanny):
    """A user's class of nanny."""


class OwnWorker(Worker):
    """A user's class of worker."""


class Plain:
    """No worker at all."""


class Abrupt:
    """A worker of the user's own that takes no timeout, and whose end fails."""

    def __init__(self, scheduler: str, *, name: str) -> None:
        self.status = "running"

    def __await__(self) -> Any:
        return asyncio.sleep(0).__await__()

    async def finished(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        raise RuntimeError("no way out")


class Guarded(Abrupt):
    """One that takes credentials."""

    def __init__(self, scheduler: str, *, name: str, security: Security) -> None:
        super().__init__(scheduler, name=name)
        assert security.require_encryption


def worker(cls: Any = "distributed.Nanny", **more: Any) -> WorkerSpec:
    return WorkerSpec(kind="cpu", cls=cls, nthreads=1, memory_limit=0, **more)


class Watched(Supervisor):
    """A supervisor that keeps what it reported."""

    seen: list[WorkerState]

    def said(self, name: str, state: str) -> list[WorkerState]:
        return [each for each in self.seen if each.name == name and each.state == state]

    def state(self, name: str) -> WorkerState | None:
        return next((each for each in self.states() if each.name == name), None)

    def runs(self, name: str, restarts: int = 0) -> bool:
        state = self.state(name)
        joined = state is not None and state.address in {ws.address for ws in self.joined.workers.values()}
        return joined and state is not None and state.state == "running" and state.restarts == restarts

    joined: Scheduler


Factory = Callable[..., Watched]


@pytest.fixture
async def supervise(scheduler: Scheduler, tmp_path: Path) -> AsyncIterator[Factory]:
    StartMethod.acquire()
    made = []

    def make(**policy: Any) -> Watched:
        supervisor = Watched(
            scheduler.address,
            host_options={"host": "127.0.0.1", "local_directory": str(tmp_path)},
            policy=RestartPolicy(**policy),
        )
        supervisor.seen, supervisor.joined = [], scheduler
        supervisor.on_change = supervisor.seen.append
        made.append(supervisor)
        return supervisor

    yield make
    for supervisor in made:
        await supervisor.close(STOP)
    StartMethod.release()


@pytest.fixture
def supervisor(supervise: Factory) -> Watched:
    return supervise()


def kill(supervisor: Watched, name: str) -> int:
    state = supervisor.state(name)
    assert state is not None
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    return state.pid


# -- starting and stopping ---------------------------------------------------------------------------------------------


async def test_start_and_stop(supervisor: Watched, scheduler: Scheduler) -> None:
    states = await supervisor.start({"n-0": worker(), "n-1": worker(resources={"CPU": 1.0})}, START)
    assert [(state.name, state.state, state.restarts) for state in states] == [
        ("n-0", "running", 0),
        ("n-1", "running", 0),
    ]
    assert supervisor.states() == states
    by_name = {ws.name: ws for ws in scheduler.workers.values()}
    assert {name: ws.address for name, ws in by_name.items()} == {state.name: state.address for state in states}
    assert by_name["n-1"].resources == {"CPU": 1.0}
    pids = {state.pid for state in states}
    assert all(pid is not None and psutil.pid_exists(pid) for pid in pids)

    await supervisor.stop(["n-0", "gone long ago"], STOP)
    assert [state.name for state in supervisor.states()] == ["n-1"]
    assert not psutil.pid_exists(states[0].pid or 0)
    await supervisor.close(STOP)
    assert supervisor.states() == ()
    assert not any(psutil.pid_exists(pid or 0) for pid in pids)
    await supervisor.close(STOP)
    assert not supervisor.said("n-0", "retired")
    assert not supervisor.said("n-0", "failed")


async def test_stopping_twice_at_once(supervisor: Watched) -> None:
    await supervisor.start({"n-0": worker()}, START)
    await asyncio.gather(supervisor.stop(["n-0"], STOP), supervisor.stop(["n-0"], STOP), supervisor.close(STOP))
    assert supervisor.states() == ()
    assert not children()


async def test_a_worker_that_calls_its_nanny_while_it_ends_is_heard(supervisor: Watched, tmp_path: Path) -> None:
    # As a worker does whose heartbeat has just found it out of the scheduler.
    (tmp_path / "calls.py").write_text(
        "import pathlib\n"
        "async def dask_teardown(worker):\n"
        "    async with worker.rpc(worker.nanny) as nanny:\n"
        "        await nanny.close_gracefully(reason='late')\n"
        f"    pathlib.Path({str(tmp_path / 'heard')!r}).touch()\n"
    )
    await supervisor.start({"a": worker(options={"preload": [str(tmp_path / "calls.py")]})}, START)
    await supervisor.stop(["a"], STOP)
    assert (tmp_path / "heard").exists()
    assert supervisor.states() == ()


async def test_the_agents_event_loop_is_measured_once(supervisor: Watched) -> None:
    await supervisor.start({name: worker() for name in "ab"}, START)
    for each in supervisor._workers.values():
        assert {"tick", "ticks", "monitor"}.isdisjoint(each.server.periodic_callbacks)
        assert each.server.is_alive()


async def test_ports_are_assigned(supervisor: Watched, scheduler: Scheduler) -> None:
    """To those that start together in equal shares; to those that come beside them, what is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = min(probe.getsockname()[1], 65_000)
    supervisor.host_options = {
        **supervisor.host_options,
        "worker_port": f"{first}:{first + 39}",
        "nanny_port": f"{first + 40}:{first + 79}",
    }
    shares: dict[str, list[int]] = {}
    for names in (["a-0", "a-1"], ["b-0", "b-1", "b-2"]):
        before = {port for each in supervisor._workers.values() for port in ports.ports_in_use(each.server)}
        await supervisor.start({name: worker() for name in names}, START)
        for name in names:
            nanny = supervisor._workers[name].server
            worker_port = get_address_host_port(nanny.worker_address)[1]
            assert worker_port in nanny.process.worker_kwargs["port"]
            assert first <= worker_port < first + 40 <= nanny.port < first + 80
            shares[name] = [*nanny.process.worker_kwargs["port"], *nanny._start_port]
            assert not before & set(shares[name])
        together = [port for name in names for port in shares[name]]
        assert len(together) == len(set(together)) == 80 - len(before)
    await supervisor.stop(["a-0"], STOP)
    await supervisor.start({"c-0": worker(cls="distributed.Worker")}, START)
    (address,) = [ws.address for ws in scheduler.workers.values() if ws.name == "c-0"]
    assert first <= get_address_host_port(address)[1] < first + 40


async def test_a_worker_without_a_nanny_has_a_state_while_it_starts(supervisor: Watched) -> None:
    start = asyncio.create_task(supervisor.start({"a": worker(cls="distributed.Worker")}, START))
    seen = []
    while not start.done():
        seen += [(state.state, state.address) for state in supervisor.states()]
        await asyncio.sleep(0)
    (state,) = await start
    assert seen[0] == ("starting", None)
    assert state.address is not None
    assert {address for _, address in seen} <= {None, state.address}


async def test_variables_of_the_host_and_of_the_mode_are_merged(supervisor: Watched) -> None:
    supervisor.host_options = {**supervisor.host_options, "env": {"HOSTS": "host", "BOTH": "host"}}
    await supervisor.start({"n-0": worker(env={"BOTH": "mode"})}, START)
    environ = supervisor._workers["n-0"].server.env
    assert {name: environ[name] for name in ("HOSTS", "BOTH")} == {"HOSTS": "host", "BOTH": "mode"}


async def test_a_name_in_use(supervisor: Watched) -> None:
    (state,) = await supervisor.start({"n-0": worker()}, START)
    with pytest.raises(ConfigError, match="'n-0' already runs here"):
        await supervisor.start({"n-1": worker(), "n-0": worker()}, START)
    assert supervisor.states() == (state,)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"preload": ["no_such_module_at_all"]}, "No module named 'no_such_module_at_all'"),
        ({"nonsense": 1}, "nonsense"),
        ({"interface": "no-such-interface"}, "no-such-interface"),
        ({"local_directory": "/proc/nowhere"}, "/proc/nowhere"),
    ],
    ids=["preload", "keyword", "interface", "directory"],
)
async def test_all_or_none(supervisor: Watched, scheduler: Scheduler, bad: dict[str, Any], said: str) -> None:
    if "interface" in bad:
        supervisor.host_options = {}
    (before,) = await supervisor.start({"n-0": worker()}, START)
    with pytest.raises(WorkerStartError, match=said) as caught:
        await supervisor.start({"n-1": worker(), "n-2": worker(options=bad)}, START)
    assert set(caught.value.failures) == {"n-2"}
    assert supervisor.states() == (before,)
    await wait_until(lambda: {ws.name for ws in scheduler.workers.values()} == {"n-0"})
    await wait_until(lambda: children() == {before.pid})


async def test_a_late_start(supervisor: Watched, scheduler: Scheduler, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text(HANGS)
    (before,) = await supervisor.start({"n-0": worker()}, START)
    loop = asyncio.get_running_loop()
    began = loop.time()
    specs = {"n-1": worker(), "n-2": worker(options={"preload": [str(hangs)]})}
    with pytest.raises(WorkerStartTimeout, match=f"n-2: had not joined {scheduler.address} after 2 s") as caught:
        await supervisor.start(specs, 2.0)
    assert loop.time() - began < 20
    assert set(caught.value.failures) == {"n-2"}
    assert supervisor.states() == (before,)
    await wait_until(lambda: children() == {before.pid})


async def test_a_start_that_is_cancelled(supervisor: Watched, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text(HANGS)
    starting = asyncio.create_task(supervisor.start({"n-0": worker(options={"preload": [str(hangs)]})}, START))
    await wait_until(children)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert supervisor.states() == ()
    await wait_until(lambda: not children())


async def test_a_worker_that_gets_ready_while_it_is_made_to_end(
    supervisor: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = asyncio.ensure_future(supervisor.start({"n-0": worker()}, START))
    server = await _being_started(supervisor)
    process, kill = server.process, AsyncProcess.kill

    async def late(self: Any) -> None:
        await wait_until(process.running.is_set)  # its word of success has come
        await kill(self)
        await wait_until(lambda: process.process is None)

    monkeypatch.setattr(AsyncProcess, "kill", late)
    async with asyncio.timeout(STOP * 2):
        await supervisor.close(STOP)
        await asyncio.wait([started])  # what it says depends on who was first
    assert "did not end in order" not in caplog.text
    assert not children()
    assert supervisor.states() == ()


async def _being_started(supervisor: Watched) -> Any:
    """Return the nanny of the first worker, once its process is being made."""
    found: list[Any] = []

    def starting() -> bool:
        found[:] = [worker.server for worker in supervisor._workers.values()]
        process = found[0].process if found else None
        return process is not None and process.status is Status.starting

    await wait_until(starting)
    return found[0]


async def test_a_scheduler_that_is_not_there(supervisor: Watched) -> None:
    supervisor.scheduler = "tcp://127.0.0.1:1"
    dask.config.set({"distributed.comm.timeouts.connect": "1s"})
    with pytest.raises(WorkerStartError, match=r"tcp://127\.0\.0\.1:1"):
        await supervisor.start({"n-0": worker()}, START)
    assert supervisor.states() == ()
    assert not children()


# -- checking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (worker("no_such_package.Worker"), "cannot import worker class 'no_such_package.Worker' here"),
        (worker("distributed.NoSuchClass"), "cannot import worker class 'distributed.NoSuchClass' here"),
        (worker("distributed.wait"), "is not a class but a function"),
        (worker(options={"memory_limt": 1}), "Nanny has no option 'memory_limt'; did you mean 'memory_limit'?"),
        (worker("distributed.Worker", options={"envv": 1}), "Worker has no option 'envv'"),
        (worker(CUDA_WORKER), "use mode 'auto-gpu'"),
    ],
)
async def test_check(supervisor: Watched, spec: WorkerSpec, said: str) -> None:
    refused = supervisor.check({"good": worker(), "bad": spec})
    assert set(refused) == {"bad"}
    assert said in refused["bad"]
    assert supervisor.states() == ()


async def test_check_takes_what_can_be_started(supervisor: Watched) -> None:
    good = [worker(), worker("distributed.Worker"), worker(f"{__name__}.OwnNanny"), worker(pickled(OwnNanny))]
    assert supervisor.check({str(i): spec for i, spec in enumerate(good)}) == {}
    assert resolve(pickled(OwnNanny)) is OwnNanny


# -- classes -----------------------------------------------------------------------------------------------------------


def own_class() -> type[Nanny]:
    class Local(Nanny):
        """Lives in a function, so that no import path leads to it."""

    return Local


@pytest.mark.parametrize("cls", [f"{__name__}.OwnNanny", own_class()], ids=["path", "pickled"])
async def test_a_nanny_of_the_users_own_is_watched_too(supervisor: Watched, cls: Any) -> None:
    spec = worker(cls if isinstance(cls, str) else pickled(cls))
    await supervisor.start({"n-0": spec}, START)
    kill(supervisor, "n-0")
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))


async def test_a_worker_without_nanny_lives_in_this_process(supervisor: Watched, scheduler: Scheduler) -> None:
    state, other = await supervisor.start({"n-0": worker("distributed.Worker"), "n-1": worker()}, START)
    assert state.state == "running"
    assert children() == {other.pid}
    async with Client(scheduler.address, asynchronous=True) as client:
        assert await client.submit(os.getpid, workers=[state.address]) == os.getpid()
        assert await client.retire_workers([state.address])
    await wait_until(lambda: supervisor.said("n-0", "retired"))
    assert supervisor.states() == (other,)


async def test_a_class_that_takes_no_credentials_gets_none(supervisor: Watched) -> None:
    """SpecCluster's protocol asks for a scheduler and a name alone; one that takes credentials gets them."""
    supervisor.security = Security(require_encryption=True)
    specs = {cls.__name__: WorkerSpec(kind="custom", cls=f"{__name__}.{cls.__name__}") for cls in (Abrupt, Guarded)}
    states = await supervisor.start(specs, START)
    assert [state.name for state in states] == ["Abrupt", "Guarded"]


async def test_a_worker_class_of_the_users_own_under_a_nanny(supervisor: Watched, scheduler: Scheduler) -> None:
    await supervisor.start({"n-0": worker(options={"worker_class": pickled(OwnWorker)})}, START)
    async with Client(scheduler.address, asynchronous=True) as client:
        (name,) = (await client.run(lambda dask_worker: type(dask_worker).__name__)).values()
    assert name == "OwnWorker"


async def test_a_process_that_cannot_be_made(supervisor: Watched) -> None:
    class Local(Worker):
        """multiprocessing cannot pickle a class that lives in a function."""

    with pytest.raises(WorkerStartError, match="n-0: AttributeError: Can't pickle local object"):
        await supervisor.start({"n-0": worker(options={"worker_class": pickled(Local)}), "n-1": worker()}, START)
    assert supervisor.states() == ()
    await wait_until(lambda: not children())


async def test_a_class_that_is_no_worker(supervisor: Watched) -> None:
    with pytest.raises(WorkerStartError, match="n-0: TypeError"):
        await supervisor.start({"n-0": worker(f"{__name__}.Plain")}, START)
    assert supervisor.states() == ()


async def test_a_class_that_does_not_end(supervisor: Watched) -> None:
    spec = WorkerSpec(kind="custom", cls=f"{__name__}.Abrupt")
    supervisor.host_options = {}
    await supervisor.start({"n-0": spec, "n-1": worker()}, START)
    await supervisor.close(1.0)
    assert supervisor.states() == ()
    assert not children()


# -- crashes -----------------------------------------------------------------------------------------------------------


async def test_a_killed_worker_comes_back_under_its_name(supervisor: Watched, scheduler: Scheduler) -> None:
    (before,) = await supervisor.start({"n-0": worker(resources={"X": 2.0})}, START)
    kill(supervisor, "n-0")
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))
    state = supervisor.state("n-0")
    assert state is not None
    assert state.pid != before.pid
    (ws,) = scheduler.workers.values()
    assert (ws.name, ws.address, ws.resources) == ("n-0", state.address, {"X": 2.0})
    assert [each.state for each in supervisor.seen if each.name == "n-0"][-2:] == ["restarting", "running"]
    async with Client(scheduler.address, asynchronous=True) as client:
        assert await client.submit(os.getpid) == state.pid


async def test_a_worker_that_crashes_on_and_on_is_given_up(supervise: Factory, scheduler: Scheduler) -> None:
    supervisor = supervise(limit=2, backoff=0.1)
    await supervisor.start({"n-0": worker(), "n-1": worker()}, START)
    for restarts in (1, 2):
        kill(supervisor, "n-0")
        await wait_until(lambda r=restarts: supervisor.runs("n-0", restarts=r))
    kill(supervisor, "n-0")
    (last,) = await wait_until(lambda: supervisor.said("n-0", "failed"))
    assert last.problem == "crashed 3 times within 60 s, last with exit code -9; not restarted"
    assert [state.name for state in supervisor.states()] == ["n-1"]
    assert {ws.name for ws in scheduler.workers.values()} == {"n-1"}
    assert not supervisor.said("n-0", "retired")


async def test_a_worker_that_dies_at_each_restart_is_given_up(supervise: Factory, tmp_path: Path) -> None:
    preload = tmp_path / "dies.py"
    preload.write_text(DIES.format(file=str(tmp_path / "die")))
    supervisor = supervise(limit=3, backoff=0.05)
    await supervisor.start({"n-0": worker(options={"preload": [str(preload)]})}, START)
    (tmp_path / "die").touch()
    kill(supervisor, "n-0")
    (last,) = await wait_until(lambda: supervisor.said("n-0", "failed"), timeout=20)
    assert last.problem == "crashed 4 times within 60 s, last with exit code 3; not restarted"
    assert supervisor.states() == ()
    assert not children()


async def test_a_restart_that_fails_is_no_retirement(supervisor: Watched, tmp_path: Path) -> None:
    preload = tmp_path / "fails.py"
    preload.write_text("def dask_setup(worker): pass\n")
    await supervisor.start({"n-0": worker(options={"preload": [str(preload)]})}, START)
    preload.write_text("raise RuntimeError('the disk is gone')\n")
    kill(supervisor, "n-0")
    (last,) = await wait_until(lambda: supervisor.said("n-0", "failed"))
    assert "the disk is gone" in (last.problem or "")
    assert supervisor.states() == ()


async def test_a_worker_that_waits_for_its_restart_can_be_stopped(supervise: Factory, scheduler: Scheduler) -> None:
    supervisor = supervise(backoff=600.0, backoff_max=600.0)
    await supervisor.start({"n-0": worker()}, START)
    kill(supervisor, "n-0")
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))
    kill(supervisor, "n-0")
    await wait_until(lambda: not scheduler.workers)  # it is told at once, not after the wait
    # It may have seen the connection end before the nanny saw the process end.
    await wait_until(lambda: (state := supervisor.state("n-0")) and (state.state, state.restarts) == ("restarting", 2))
    began = asyncio.get_running_loop().time()
    await supervisor.close(STOP)
    assert asyncio.get_running_loop().time() - began < 6
    assert supervisor.states() == ()


async def test_a_restart_on_demand_while_one_waits(supervise: Factory, scheduler: Scheduler) -> None:
    supervisor = supervise(backoff=2.0)
    await supervisor.start({"n-0": worker()}, START)
    (ws,) = scheduler.workers.values()
    kill(supervisor, "n-0")
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))
    kill(supervisor, "n-0")
    await wait_until(lambda: not scheduler.workers)
    async with rpc(ws.nanny) as nanny:
        assert await nanny.restart() == "OK"
    state = supervisor.state("n-0")
    assert state is not None
    assert state.state == "running"
    removed = asyncio.Event()
    scheduler.add_plugin(Removal(removed), name="removal")
    with pytest.raises(TimeoutError):  # until after the waiting restart had its turn, which must leave this one alone
        async with asyncio.timeout(2.5):
            await removed.wait()
    assert supervisor.runs("n-0", restarts=2)
    assert supervisor.state("n-0") == state


class Removal(SchedulerPlugin):
    """A scheduler plugin that notes when a worker goes."""

    def __init__(self, removed: asyncio.Event) -> None:
        self.removed = removed

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        self.removed.set()


# -- ends on purpose ---------------------------------------------------------------------------------------------------


async def test_a_worker_that_the_client_retires_is_not_restarted(supervisor: Watched, scheduler: Scheduler) -> None:
    first, second = await supervisor.start({"n-0": worker(), "n-1": worker()}, START)
    async with Client(scheduler.address, asynchronous=True) as client:
        kept = await client.scatter({"x": 1}, workers=[first.address], hash=False)
        await client.retire_workers([first.address])
        assert await kept["x"] == 1
    (last,) = await wait_until(lambda: supervisor.said("n-0", "retired"))
    assert (last.problem, last.restarts) == (None, 0)
    assert supervisor.states() == (second,)
    assert children() == {second.pid}


async def test_all_workers_closed_by_the_scheduler(supervisor: Watched, scheduler: Scheduler) -> None:
    await supervisor.start({"n-0": worker(), "n-1": worker()}, START)
    await scheduler.retire_workers(names=["n-0", "n-1"], close_workers=True, remove=True)
    await wait_until(lambda: supervisor.said("n-0", "retired") and supervisor.said("n-1", "retired"))
    assert supervisor.states() == ()
    await wait_until(lambda: not children())


def cut_off(supervisor: Watched, name: str) -> None:
    """End a worker's connection to the scheduler, as a network does that breaks."""
    state = supervisor.state(name)
    assert state is not None
    assert state.address is not None
    supervisor.joined.stream_comms[state.address].abort()


async def test_a_worker_that_is_cut_off_comes_back(supervise: Factory, scheduler: Scheduler) -> None:
    supervisor = supervise(backoff=0.1)
    supervisor.in_touch = lambda: True
    before = await supervisor.start({"n-0": worker(), "n-1": worker()}, START)
    cut_off(supervisor, "n-0")
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))
    after = supervisor.states()
    assert after[0].pid != before[0].pid
    assert after[1] == before[1]
    assert {ws.name for ws in scheduler.workers.values()} == {"n-0", "n-1"}
    assert not supervisor.said("n-0", "retired")
    # and one that the scheduler has asked to end is let go, as before
    await scheduler.retire_workers(names=["n-0"], close_workers=True, remove=True)
    await wait_until(lambda: supervisor.said("n-0", "retired"))
    assert [state.name for state in supervisor.states()] == ["n-1"]


async def test_a_worker_that_is_cut_off_on_and_on_is_given_up(supervise: Factory) -> None:
    supervisor = supervise(limit=1, backoff=0.1)
    supervisor.in_touch = lambda: True
    await supervisor.start({"n-0": worker()}, START)
    cut_off(supervisor, "n-0")
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))
    cut_off(supervisor, "n-0")
    (last,) = await wait_until(lambda: supervisor.said("n-0", "failed"))
    assert last.problem == "crashed 2 times within 60 s, last cut off from the scheduler; not restarted"


@pytest.mark.parametrize("late", [False, True], ids=["both", "the agent later"])
async def test_a_worker_that_is_cut_off_with_its_agent_ends(supervise: Factory, late: bool) -> None:
    supervisor = supervise(backoff=0.5)
    touch = late
    supervisor.in_touch = lambda: touch
    await supervisor.start({"n-0": worker()}, START)
    cut_off(supervisor, "n-0")
    if late:
        await wait_until(lambda: supervisor.said("n-0", "restarting"))
        touch = False
    await wait_until(lambda: supervisor.said("n-0", "retired"))
    assert supervisor.states() == ()
    assert not children()


async def test_client_restart_is_no_crash(supervise: Factory, scheduler: Scheduler) -> None:
    supervisor = supervise(limit=1)
    before = await supervisor.start({"n-0": worker(), "n-1": worker()}, START)
    async with Client(scheduler.address, asynchronous=True) as client:
        for _ in range(3):
            await client.restart(timeout=20)
        assert await client.submit(sum, [40, 2]) == 42
    await wait_until(lambda: supervisor.runs("n-0") and supervisor.runs("n-1"))
    assert {state.pid for state in before}.isdisjoint(state.pid for state in supervisor.states())
    assert len(children()) == 2
    kill(supervisor, "n-0")  # and what comes after a restart is one again
    await wait_until(lambda: supervisor.runs("n-0", restarts=1))


# -- the policy --------------------------------------------------------------------------------------------------------
