"""Agents that another system starts and stops: here it is this file, with a real ``dask-agent --standby``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from agentcluster import AgentCluster
from agentcluster.errors import LaunchError, LaunchTimeout
from agentcluster.launch.adopt import ManagedLauncher
from tests.support.programs import ROOT, gone

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}
QUIET: dict[str, Any] = {
    "asynchronous": True,
    "security": False,
    "scheduler_options": {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"},
}


class Local(ManagedLauncher):
    """Starts an agent as a process; `hook` is called with the name of each method."""

    def __init__(self, hook: Callable[[str], Any] = lambda method: None) -> None:
        super().__init__("managed", "a system of my own")
        self.hook, self.calls = hook, list[str]()
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        await self._called("start")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._listen = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "agentcluster.cli.dask_agent", "--standby", "--listen-address", self._listen]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})

    async def address(self) -> str | None:
        await self._called("address")
        host, port = self._listen.removeprefix("tcp://").split(":")
        with socket.socket() as probe:
            return self._listen if probe.connect_ex((host, int(port))) == 0 else None

    async def stop(self) -> None:
        await self._called("stop")
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self.process.wait, 20)

    async def _called(self, method: str) -> None:
        self.calls.append(method)
        answer = self.hook(method)
        if asyncio.iscoroutine(answer):
            await answer


@pytest.fixture
def local() -> Iterator[Callable[..., Local]]:
    made: list[Local] = []

    def make(*hooks: Any) -> Local:
        made.append(Local(*hooks))
        return made[-1]

    yield make
    for each in made:
        if each.process is not None and each.process.poll() is None:
            each.process.kill()
            each.process.wait(10)


async def test_an_agent_is_asked_for_and_given_back(local: Callable[..., Local]) -> None:
    launcher = local()
    async with AgentCluster(hosts=[launcher], config=ONE, **QUIET) as cluster:
        assert list(cluster.nodes) == ["managed"]
        assert len(cluster.scheduler.workers) == 1
        assert launcher.process is not None
        tree = [psutil.Process(launcher.process.pid), *psutil.Process(launcher.process.pid).children(recursive=True)]
        assert len(tree) >= 3
    assert launcher.process.poll() == 0
    await gone(tree)
    assert [launcher.calls[0], launcher.calls[-1]] == ["start", "stop"]
    assert set(launcher.calls[1:-1]) == {"address"}


async def test_what_a_method_raises_names_the_system(local: Callable[..., Local]) -> None:
    def fails(method: str) -> None:
        if method == "start":
            raise ValueError("no\n credit left")

    launcher = local(fails)
    with pytest.raises(LaunchError, match=r"a system of my own did not start: no credit left"):
        await AgentCluster(hosts=[launcher], config=ONE, **QUIET)
    assert launcher.calls == ["start"]


@pytest.mark.parametrize("late", [RuntimeError, LaunchTimeout])
async def test_an_agent_that_does_not_come_is_given_back(local: Callable[..., Local], late: type[Exception]) -> None:
    def hook(method: str) -> Any:
        if method == "address":
            if late is RuntimeError:
                raise RuntimeError("it was evicted")
            return asyncio.sleep(1000)
        return None

    launcher = local(hook)
    said = r"it was evicted" if late is RuntimeError else r"its agent was not ready within 1 s"
    with pytest.raises(LaunchError, match=said):
        await AgentCluster(hosts=[launcher], config=ONE, launch_timeout=1, **QUIET)
    assert launcher.calls == ["start", "address", "stop"]
    assert launcher.process is not None
    assert launcher.process.poll() is not None


async def test_a_launch_that_is_cancelled_is_given_back_once_it_is_known(local: Callable[..., Local]) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        asked.set()
        await answer.wait()

    launcher = local(lambda method: slow() if method == "start" else None)

    async def opened() -> None:
        async with AgentCluster(hosts=[launcher], config=ONE, **QUIET):
            pass

    opening = asyncio.create_task(opened())
    await asyncio.wait_for(asked.wait(), 10)
    opening.cancel()
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert launcher.calls == ["start", "stop"]
    assert launcher.process is not None
    assert launcher.process.poll() is not None


async def test_one_that_cannot_be_given_back_is_named(
    local: Callable[..., Local], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(method: str) -> None:
        if method == "stop":
            raise RuntimeError("not today")

    launcher = local(fails)
    with caplog.at_level(logging.WARNING, "agentcluster"):
        async with AgentCluster(hosts=[launcher], config=ONE, **QUIET):
            pass
    assert "The agent of node managed may still run" in caplog.text
    assert "not today" in caplog.text
