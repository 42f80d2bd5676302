"""What every test has around it: dask's settings, and a count of what it left behind.

The count is taken before and after each test: processes, non-daemon threads, listening sockets and file descriptors.
What is new is given :data:`SETTLE` seconds to go; then the test fails with its names. Processes are found as children
and by an environment variable, so that one that was reparented, or that has its own session, is found too.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dask
import distributed
import psutil
import pytest
from hypothesis import HealthCheck, settings

# How long one example takes says what else the machine does; a test has its deadline as a whole.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

#: Seconds that leftovers of a test have to go.
SETTLE = 5.0

#: Seconds between two looks at something that is waited for.
INTERVAL = 0.02

MARK = "AGENTCLUSTER_TEST_PROCESS"
os.environ[MARK] = uuid.uuid4().hex

#: Threads that dask and asyncio keep for the life of the process.
PERMANENT_THREADS = ("Dask-Offload", "TCP-Executor", "asyncio_")


async def wait_until(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Return the first true value of `predicate`, while the event loop goes on.

    Parameters
    ----------
    predicate
        Asked again and again until what it returns, awaited where that is needed, is true.
    timeout
        Seconds until the test fails.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await asyncio.wait_for(value, max(INTERVAL, deadline - time.monotonic()))
        if value:
            return value
        _check(predicate, deadline, timeout)
        await asyncio.sleep(INTERVAL)


def wait_blocking(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Do what :func:`wait_until` does, for a test without an event loop."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        _check(predicate, deadline, timeout)
        time.sleep(INTERVAL)
    return value


def _check(predicate: Callable[[], Any], deadline: float, timeout: float) -> None:
    __tracebackhide__ = True
    if time.monotonic() >= deadline:
        pytest.fail(f"still not true after {timeout:g} s: {inspect.getsource(predicate).strip()}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes a Slurm of its own, as root, or minutes under another tool, unless it is asked for."""
    for mark in ("slurm", "deploy", "browser", "notebook"):
        for item in items if mark not in config.option.markexpr else ():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"run by: pytest -m {mark}"))


def pytest_collection_finish() -> None:
    """Have the collection after each test go over what tests make, not over all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def slow() -> Callable[[int], int]:
    """A task of 0.1 s; what is defined in here needs no test module where it runs."""

    def slow(number: int) -> int:
        time.sleep(0.1)
        return number

    return slow


@pytest.fixture(autouse=True)
def dask_settings() -> Iterator[None]:
    """Short connect timeouts, and dask's configuration as it was before the test."""
    before = copy.deepcopy(dask.config.config)
    dask.config.set({"distributed.comm.timeouts.connect": "10s"})
    yield
    dask.config.config.clear()
    dask.config.config.update(before)


@pytest.fixture(autouse=True)
def leaks() -> Iterator[None]:
    """Fail a test that leaves something behind."""
    before = Census.take()
    yield
    gc.collect()
    deadline = time.monotonic() + SETTLE
    while (left := Census.take().since(before)) and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    if left:
        _kill(before)
        each = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in left.items())
        pytest.fail(f"left behind {SETTLE:g} s after the test: {each}", pytrace=False)


@dataclass(frozen=True)
class Census:
    """What exists now, each by an identity that is not used twice."""

    processes: dict[tuple[int, float], str] = field(default_factory=dict)
    threads: dict[threading.Thread, str] = field(default_factory=dict)
    listeners: dict[tuple[Any, ...], str] = field(default_factory=dict)
    files: dict[tuple[int, str], str] = field(default_factory=dict)

    @classmethod
    def take(cls) -> Census:
        listeners = dict(_listeners())
        return cls(dict(_processes()), dict(_threads()), listeners, dict(_files()))

    def since(self, before: Census) -> dict[str, list[str]]:
        """Name what is here and was not there, by kind."""
        found = {
            kind: [name for key, name in getattr(self, kind).items() if key not in getattr(before, kind)]
            for kind in ("processes", "threads", "listeners", "files")
        }
        return {kind: sorted(names) for kind, names in found.items() if names}


def _helpers() -> set[int]:
    """Return the pids of the two processes that multiprocessing keeps for this one."""
    tracker = multiprocessing.resource_tracker._resource_tracker
    server = multiprocessing.forkserver._forkserver
    return {pid for pid in (tracker._pid, server._forkserver_pid) if pid is not None}  # type: ignore[attr-defined]


def _processes() -> Iterator[tuple[tuple[int, float], str]]:
    helpers = _helpers()
    children = psutil.Process().children(recursive=True)
    for process in {*children, *filter(_is_marked, psutil.process_iter())}:
        try:
            if process.pid in helpers or process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = " ".join(process.cmdline()) or process.name()
            yield (process.pid, process.create_time()), f"{process.pid} ({command[:120]})"
        except psutil.NoSuchProcess:
            continue


def _is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARK) == os.environ[MARK]
    except (psutil.Error, OSError):
        return False


def _threads() -> Iterator[tuple[threading.Thread, str]]:
    for thread in threading.enumerate():
        if not thread.daemon and not thread.name.startswith(PERMANENT_THREADS):
            yield thread, thread.name


def _listeners() -> Iterator[tuple[tuple[Any, ...], str]]:
    for connection in psutil.Process().net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            yield (connection.fd, connection.laddr), f"{connection.laddr.ip}:{connection.laddr.port}"


def _files() -> Iterator[tuple[tuple[int, str], str]]:
    """Yield the open descriptors; on a platform without ``/proc`` there are none to be seen."""
    if not sys.platform.startswith("linux"):
        return
    tracker = multiprocessing.resource_tracker._resource_tracker
    server = multiprocessing.forkserver._forkserver
    known = {tracker._fd, server._forkserver_alive_fd}  # type: ignore[attr-defined]
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if int(name) not in known and not target.startswith(("/dev/", "/proc/", "/sys/")):
            yield (int(name), target), f"{name} -> {target}"


def _kill(before: Census) -> None:
    """End the processes that a test left, so that the next one does not answer for them."""
    for pid, created in Census.take().processes.keys() - before.processes.keys():
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:
                process.kill()
        except psutil.NoSuchProcess:
            continue


assert distributed.__version__  # imported here, so that what it keeps open is there before the first test
