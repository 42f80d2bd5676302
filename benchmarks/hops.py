"""Count the files of the package that are entered on the way to a first worker: ``python -m benchmarks.hops``.

Client, scheduler and agent run in this process, so that one trace sees them all; the workers' own processes are not
traced. A file counts once, from the moment of the call until a new worker has joined the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from distributed import Scheduler

import agentcluster
from agentcluster import Agent, AgentCluster
from agentcluster.scheduler.plugin import dask_setup
from tests.support.inprocess import here

ROOT = str(Path(agentcluster.__file__).parent) + os.sep

#: The call -> the most files that may be entered from it to the first worker.
LIMITS = {"reprovision": 20, "adapt": 26, "agent start": 27}

#: Options of a mode with one worker.
ONE = {"nworkers": 1, "nthreads": 1}

#: Seconds for each way to its first worker.
DEADLINE = 60


class Trace:
    """Files of the package in the order in which they are entered."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Trace this thread, and threads that start meanwhile."""
        sys.setprofile(self._enter)
        threading.setprofile(self._enter)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := frame.f_code.co_filename).startswith(ROOT):
            self.files.setdefault(name.removeprefix(ROOT))


async def traced(scheduler: Any, call: Callable[[], Awaitable[Any]]) -> list[str]:
    """Return the files that are entered from `call` until the scheduler has a worker that it had not."""
    trace, before = Trace(), set(scheduler.workers)
    async with asyncio.timeout(DEADLINE):
        with trace.running():
            running = asyncio.ensure_future(call())
            while not set(scheduler.workers) - before:
                await asyncio.sleep(0.01)
        await running
    return list(trace.files)


async def measure() -> dict[str, list[str]]:
    """Return the files of each way."""
    found = {}
    async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        await dask_setup(scheduler)
        found["agent start"] = await traced(scheduler, lambda: _agent(scheduler.address))
    async with AgentCluster(here(), mode="uniform", config=ONE, asynchronous=True) as cluster:
        two = {**ONE, "nthreads": 2}
        found["reprovision"] = await traced(cluster.scheduler, lambda: cluster.reprovision("uniform", two))
    async with AgentCluster(here(), mode="uniform", config=ONE, asynchronous=True) as cluster:
        await cluster.scale(0)
        found["adapt"] = await traced(cluster.scheduler, lambda: _adapt(cluster))
    return found


async def _agent(scheduler: str) -> None:
    async with Agent(scheduler, name="second", mode="uniform", config=ONE, host="127.0.0.1") as agent:
        await agent.provisioned()


async def _adapt(cluster: AgentCluster) -> None:
    cluster.adapt(minimum=1, maximum=2, interval="100ms")


def main() -> int:
    """Print the numbers; return 1 when one is above its limit."""
    found = asyncio.run(measure())
    for way, files in found.items():
        print(f"{way}: {len(files)} files (at most {LIMITS[way]})")
        if "-v" in sys.argv:
            print("".join(f"    {name}\n" for name in files), end="")
    return int(any(len(files) > LIMITS[way] for way, files in found.items()))


if __name__ == "__main__":
    sys.exit(main())
