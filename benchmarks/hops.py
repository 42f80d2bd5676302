"""Count the files of the package that are entered on the way to a first worker: ``python -m benchmarks.hops``.

Client, scheduler and agent run in this process, so that one trace sees them all; the workers' own processes are not
traced. A file counts once, from the moment of the call until a new worker is in the scheduler. Heartbeats and other
periodic work, which the call does not cause, is put off while it runs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import dask
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

import agentcluster
from agentcluster import Agent, AgentCluster
from agentcluster.scheduler.plugin import dask_setup
from tests.support.inprocess import here

ROOT = str(Path(agentcluster.__file__).parent) + os.sep

#: The call -> the most files that may be entered from it to the first worker.
LIMITS = {"reprovision": 20, "adapt": 26, "agent start": 27}

#: Options of a mode with one worker.
ONE = {"nworkers": 1, "nthreads": 1}

#: Configuration in which nothing happens periodically.
QUIET = {"agentcluster.node.heartbeat-interval": "1 hour", "agentcluster.node.ttl": "2 hours"}

#: Seconds after which nothing that came before a call is still under way.
SETTLE = 1.0

#: Seconds for each way to its first worker.
DEADLINE = 60


class Trace(SchedulerPlugin):
    """Files of the package in the order in which they are entered, until a worker joins."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.joined = asyncio.Event()

    def start_tracing(self) -> None:
        """Trace this thread, and threads that start meanwhile."""
        threading.setprofile(self._enter)
        sys.setprofile(self._enter)

    def stop_tracing(self) -> None:
        """Trace nothing any more."""
        sys.setprofile(None)
        threading.setprofile(None)

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Stop at the first worker; called in the thread that is traced."""
        self.stop_tracing()
        self.joined.set()

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := frame.f_code.co_filename).startswith(ROOT):
            self.files.setdefault(name.removeprefix(ROOT))


async def traced(scheduler: Any, call: Callable[[], Awaitable[Any]]) -> list[str]:
    """Return the files that are entered from `call` until the scheduler has one more worker."""
    trace = Trace()
    await asyncio.sleep(SETTLE)
    scheduler.add_plugin(trace, name="trace")
    try:
        async with asyncio.timeout(DEADLINE):
            trace.start_tracing()
            running = asyncio.ensure_future(call())
            await trace.joined.wait()
            await running
    finally:
        trace.stop_tracing()
        scheduler.remove_plugin("trace")
    return list(trace.files)


async def measure() -> dict[str, list[str]]:
    """Return the files of each way."""
    found = {}
    options: dict[str, Any] = {"asynchronous": True, "scheduler_sync_interval": 3600}
    async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        await dask_setup(scheduler)
        found["agent start"] = await traced(scheduler, lambda: _agent(scheduler.address))
    async with AgentCluster(here(), mode="uniform", config=ONE, **options) as cluster:
        two = {**ONE, "nthreads": 2}
        found["reprovision"] = await traced(cluster.scheduler, lambda: cluster.reprovision("uniform", two))
    async with AgentCluster(here(), mode="uniform", config=ONE, **options) as cluster:
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
    with dask.config.set(QUIET), patch("distributed.scheduler.heartbeat_interval", return_value=3600):
        found = asyncio.run(measure())
    for way, files in found.items():
        print(f"{way}: {len(files)} files (at most {LIMITS[way]})")
        if "-v" in sys.argv:
            print("".join(f"    {name}\n" for name in files), end="")
    return int(any(len(files) > LIMITS[way] for way, files in found.items()))


if __name__ == "__main__":
    sys.exit(main())
