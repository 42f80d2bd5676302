"""The warm forkserver, and the start method on it: what is forked, what is spawned, and with which environment."""

from __future__ import annotations

import asyncio
import json
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, Scheduler

from agentcluster.agent import forkserver
from agentcluster.agent.nanny import METHOD_KEY, RestartPolicy, StartMethod
from agentcluster.agent.supervisor import Supervisor
from agentcluster.model import WorkerSpec
from tests.support.programs import ROOT
from tests.support.waiting import wait_until

START = 30.0

pytestmark = pytest.mark.skipif(not forkserver.available(), reason="this platform has no forkserver")


def worker(**env: str) -> WorkerSpec:
    return WorkerSpec(kind="cpu", cls="distributed.Nanny", nthreads=1, memory_limit=0, env=env)


def server_pid() -> int:
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def parent(pid: int | None) -> int:
    return psutil.Process(pid).ppid()


def at_start(pid: int | None) -> dict[str, str]:
    """Return the environment that a process was executed with; a forked one has its server's."""
    return psutil.Process(pid).environ()


@pytest.fixture
async def supervisor(scheduler: Scheduler, tmp_path: Path) -> AsyncIterator[Supervisor]:
    before = dict(os.environ)
    StartMethod.acquire()
    options = {"host": "127.0.0.1", "local_directory": str(tmp_path)}
    supervisor = Supervisor(scheduler.address, host_options=options, policy=RestartPolicy(limit=3))
    yield supervisor
    await supervisor.close(10.0)
    StartMethod.release()
    assert without_test(os.environ) == without_test(before)


def without_test(environ: Any) -> dict[str, str]:
    """Return an environment less what pytest changes with each phase of a test, and dask's mark for process titles."""
    return {key: value for key, value in environ.items() if key not in ("PYTEST_CURRENT_TEST", "__DASK_PARENT_PID")}


# -- forked or spawned -------------------------------------------------------------------------------------------------


async def test_workers_are_forked_from_the_server(supervisor: Supervisor) -> None:
    states = await supervisor.start({"n-0": worker(), "n-1": worker()}, START)
    assert {parent(state.pid) for state in states} == {server_pid()}
    assert parent(server_pid()) == os.getpid()


async def test_the_server_has_what_counts_at_process_start(supervisor: Supervisor) -> None:
    environ = at_start(server_pid())
    configured = dask.config.get("distributed.nanny.pre-spawn-environ")
    assert configured["MALLOC_TRIM_THRESHOLD_"]
    for key, value in configured.items():
        assert environ[key] == os.environ.get(key, str(value))
    assert environ["PYTHONHASHSEED"] == "6640"
    libraries = {Path(mapped.path).name for mapped in psutil.Process(server_pid()).memory_maps()}
    assert not {name for name in libraries if name.startswith(("libcuda", "libnvidia"))}


async def test_an_ordinary_variable_is_no_reason_to_spawn(supervisor: Supervisor, scheduler: Scheduler) -> None:
    (state,) = await supervisor.start({"n-0": worker(FOO="1")}, START)
    assert parent(state.pid) == server_pid()
    async with Client(scheduler.address, asynchronous=True) as client:
        assert await client.submit(os.getenv, "FOO", pure=False) == "1"


async def test_the_servers_own_value_is_no_reason_to_spawn(supervisor: Supervisor) -> None:
    (state,) = await supervisor.start({"n-0": worker(PYTHONHASHSEED="6640")}, START)
    assert parent(state.pid) == server_pid()


async def test_what_counts_at_process_start_is_there_at_process_start(
    supervisor: Supervisor, scheduler: Scheduler, tmp_path: Path
) -> None:
    env = {
        "OMP_NUM_THREADS": "7",
        "PYTHONHASHSEED": "123",
        "MALLOC_ARENA_MAX": "2",
        "LD_LIBRARY_PATH": str(tmp_path),
        "FOO": "1",
    }
    (state,) = await supervisor.start({"n-0": worker(**env)}, START)
    assert parent(state.pid) == os.getpid()
    assert env.items() <= at_start(state.pid).items()
    code = "print(hash('agentcluster'))"
    asked = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    async with Client(scheduler.address, asynchronous=True) as client:
        assert await client.submit(hash, "agentcluster") == int(asked.stdout)
        assert await client.submit(os.getenv, "OMP_NUM_THREADS", pure=False) == "7"


async def test_starts_at_once_do_not_mix(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = {"n-0": "5", "n-1": "7", "n-2": None, "n-3": "9"}
    specs = {name: worker(OMP_NUM_THREADS=count) if count else worker() for name, count in threads.items()}
    calls = [supervisor.start({name: spec}, START) for name, spec in specs.items()]
    states = [state for (state,) in await asyncio.gather(*calls)]
    assert {state.name: at_start(state.pid)["OMP_NUM_THREADS"] for state in states} == {
        **threads,
        "n-2": str(dask.config.get("distributed.nanny.pre-spawn-environ")["OMP_NUM_THREADS"]),
    }
    assert "OMP_NUM_THREADS" not in os.environ


async def test_a_crash_keeps_the_environment(supervisor: Supervisor) -> None:
    (before,) = await supervisor.start({"n-0": worker(OMP_NUM_THREADS="7")}, START)
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    await wait_until(lambda: supervisor.states()[0].restarts == 1 and supervisor.states()[0].state == "running")
    (state,) = supervisor.states()
    assert state.pid != before.pid
    assert at_start(state.pid)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_the_workers_own_start_method_is_the_users(scheduler: Scheduler, tmp_path: Path, method: str) -> None:
    dask.config.set({METHOD_KEY: method})
    StartMethod.acquire()
    assert dask.config.get(METHOD_KEY) == forkserver.METHOD
    supervisor = Supervisor(scheduler.address, host_options={"host": "127.0.0.1", "local_directory": str(tmp_path)})
    try:
        await supervisor.start({"n-0": worker(), "n-1": worker(OMP_NUM_THREADS="7")}, START)
        async with Client(scheduler.address, asynchronous=True) as client:
            found = await client.run(in_worker)
    finally:
        await supervisor.close(10.0)
        StartMethod.release()
    assert list(found.values()) == [(method, method)] * 2
    assert dask.config.get(METHOD_KEY) == method


def in_worker() -> tuple[str, str]:
    from distributed.utils import get_mp_context

    return dask.config.get("distributed.worker.multiprocessing-method"), get_mp_context().get_start_method()


async def test_a_server_that_dies_is_started_again_with_its_environment(supervisor: Supervisor) -> None:
    (before,) = await supervisor.start({"n-0": worker()}, START)
    environ, pid = at_start(server_pid()), server_pid()
    os.kill(pid, signal.SIGKILL)
    # Nobody can tell any more how the worker fares, so another takes its place.
    await wait_until(lambda: supervisor.states()[0].restarts == 1 and supervisor.states()[0].state == "running")
    (state,) = supervisor.states()
    assert server_pid() != pid
    assert parent(state.pid) == server_pid()
    assert without_test(at_start(server_pid())) == without_test(environ)
    await wait_until(lambda: not psutil.pid_exists(before.pid or 0))


async def test_agents_share_the_start_method(scheduler: Scheduler) -> None:
    before = dask.config.get(METHOD_KEY)
    StartMethod.acquire()
    pid = server_pid()
    StartMethod.acquire()
    StartMethod.release()
    assert dask.config.get(METHOD_KEY) == forkserver.METHOD
    StartMethod.release()
    assert dask.config.get(METHOD_KEY) == before
    StartMethod.acquire()
    assert server_pid() == pid
    StartMethod.release()


# -- in a process of its own -------------------------------------------------------------------------------------------

WARM = """
import json, os, sys, time
from multiprocessing import forkserver as standard
from pathlib import Path

from agentcluster.agent import forkserver

assert "distributed" not in sys.modules and "numpy" not in sys.modules
before = dict(os.environ)
pids = []
for value in ("1", "2"):
    forkserver.warm({"OMP_NUM_THREADS": value, "FOO": "bar"}, preload=["json", "no_such_module_at_all"])
    pids.append(standard._forkserver._forkserver_pid)
assert dict(os.environ) == before
while b"multiprocessing" not in Path(f"/proc/{pids[0]}/cmdline").read_bytes():  # until it is executed it shows ours
    time.sleep(0.01)
with open(f"/proc/{pids[0]}/environ", "rb") as file:
    environ = dict(part.split("=", 1) for part in file.read().decode().split("\\0") if part)
found = {}
for threads in ("1", "2"):
    with forkserver.starting({"OMP_NUM_THREADS": threads, "BAR": "1"}):
        found[threads] = forkserver._own_environ.get()
print(json.dumps([pids, environ["OMP_NUM_THREADS"], environ["FOO"], found]))
"""

FOREIGN = """
import json
from multiprocessing import forkserver as standard

from agentcluster.agent import forkserver

standard.ensure_running()
pid = standard._forkserver._forkserver_pid
forkserver.warm({"OMP_NUM_THREADS": "1"})
with forkserver.starting({"OMP_NUM_THREADS": "1"}):
    print(json.dumps([pid == standard._forkserver._forkserver_pid, forkserver._own_environ.get()]))
"""


def script(text: str, **env: str) -> Any:
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | env
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", text], env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_warm_twice_is_once() -> None:
    (first, second), threads, foo, found = script(WARM)
    assert first == second
    assert (threads, foo) == ("1", "bar")
    assert found == {"1": None, "2": {"OMP_NUM_THREADS": "2", "BAR": "1"}}


def test_a_server_that_is_not_ours_is_not_trusted() -> None:
    same, own = script(FOREIGN)
    assert same
    assert own == {"OMP_NUM_THREADS": "1"}


# -- pure parts --------------------------------------------------------------------------------------------------------


async def test_pre_spawn_environ_is_what_a_nanny_takes(scheduler: Scheduler) -> None:
    from distributed import Nanny

    async with Nanny(scheduler.address, host="127.0.0.1", nthreads=1) as nanny:
        configured = dask.config.get("distributed.nanny.pre-spawn-environ")
        assert forkserver.pre_spawn_environ(configured) == nanny.pre_spawn_env
