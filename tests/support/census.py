"""A census of what a test left behind: processes, non-daemon threads, listening sockets and file descriptors.

Processes are found as children and by an environment variable, so that one that was reparented, or that has its own
session, is found too.
"""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

MARK = "AGENTCLUSTER_TEST_PROCESS"
os.environ[MARK] = uuid.uuid4().hex

#: Processes that the tests keep, like the two of multiprocessing.
KEPT: set[int] = set()

#: Threads that dask and asyncio keep for the life of the process.
PERMANENT_THREADS = ("Dask-Offload", "TCP-Executor", "asyncio_")


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
    """Return the pids of processes that stay: two that multiprocessing keeps for this one, and those of the tests."""
    tracker = multiprocessing.resource_tracker._resource_tracker
    server = multiprocessing.forkserver._forkserver
    return {pid for pid in (tracker._pid, server._forkserver_pid) if pid is not None} | KEPT  # type: ignore[attr-defined]


def children() -> set[int]:
    """Return the pids of all processes below this one, without the two that multiprocessing keeps for it."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found - _helpers()


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


def kill_since(before: Census) -> None:
    """Kill the processes that a test left, so that the next one does not answer for them."""
    for pid, created in Census.take().processes.keys() - before.processes.keys():
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:
                process.kill()
        except psutil.NoSuchProcess:
            continue
