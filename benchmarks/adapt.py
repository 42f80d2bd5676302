"""How long tasks wait until adaptive scaling has brought workers up: ``python -m benchmarks.adapt``.

A cluster that has no worker is given one task; the clock stops when its result is there. In turns: an ``AgentCluster``
whose node stands by, and a ``LocalCluster`` that adapts between 0 and 2 workers, both looking once in an interval. Then
how long a task that needs a GPU waits on a node whose CPU workers run (with a stub of NVML it can be run anywhere), and
what part of a core agents and the loop take when there is nothing to do. Exit code 1 when a floor does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from typing import Any

import psutil
from distributed import Client, LocalCluster

from benchmarks.common import Floor, exit_code, median, spread, times, titled

INTERVAL = "500ms"
IDLE = 20.0


async def _first_result(cluster: Any, client: Client, **asked: Any) -> float:
    """Return the seconds from a task's submission to its result; wait until no worker is there before and after."""
    while cluster.scheduler.workers and not asked:
        await asyncio.sleep(0.05)
    began = time.perf_counter()
    await client.submit(os.getpid, pure=False, **asked)
    return time.perf_counter() - began


async def _ours(turns: int, results: list[float]) -> Any:
    from agentcluster import AgentCluster

    shape = {"nworkers": 2, "nthreads": 1, "memory_limit": "1GiB"}
    async with (
        AgentCluster(mode="uniform", config=shape, asynchronous=True, scheduler_options=QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        cluster.adapt(minimum=0, maximum=2, interval=INTERVAL, wait_count=1)
        for _ in range(turns):
            results.append(await _first_result(cluster, client))
            yield


async def _local(turns: int, results: list[float]) -> Any:
    async with (
        LocalCluster(
            n_workers=0, threads_per_worker=1, memory_limit="1GiB", asynchronous=True, dashboard_address=None
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        cluster.adapt(minimum=0, maximum=2, interval=INTERVAL, wait_count=1)
        for _ in range(turns):
            results.append(await _first_result(cluster, client))
            yield


async def _from_cpu_to_gpu() -> float | None:
    """Return the seconds until a task that needs a GPU has run, on a node that has GPUs and runs CPU workers."""
    from agentcluster import AgentCluster, Mode

    cpu = Mode("auto-cpu", {"nworkers": 2, "nthreads": 1})
    async with (
        AgentCluster(mode=cpu, asynchronous=True, scheduler_options=QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        hardware = cluster.nodes["local"]["hardware"]
        if not hardware["gpus"] or "dask-cuda" not in hardware["versions"]:
            return None
        cluster.adapt(minimum=1, modes=[cpu, "auto-gpu"], interval=INTERVAL, wait_count=2)
        return await _first_result(cluster, client, resources={"GPU": 1})


async def _at_rest() -> float:
    """Return the part of a core that an agent without workers and the loop take, as dask has it: once in a second."""
    from agentcluster import AgentCluster

    async with AgentCluster(asynchronous=True, scheduler_options=QUIET) as cluster:
        adaptive = cluster.adapt(minimum=0, wait_count=1)
        while cluster.scheduler.workers:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        agent = psutil.Process(cluster.workers["local"].launched.ready.pid)

        def used() -> float:
            return sum(each.cpu_times().user + each.cpu_times().system for each in (agent, psutil.Process()))

        async def over(seconds: float) -> float:
            before = used()
            await asyncio.sleep(seconds)
            return (used() - before) / seconds

        together = await over(IDLE)
        adaptive.stop()
        own = psutil.Process()
        before = own.cpu_times()
        await asyncio.sleep(IDLE)
        after = own.cpu_times()
        # this process is also the scheduler and the client's side of the cluster, which cost what they cost without it
        return together - (after.user + after.system - before.user - before.system) / IDLE


QUIET: dict[str, Any] = {"dashboard": False, "dashboard_address": ":0"}


async def run(turns: int) -> int:
    """Measure, print, and return the exit code."""
    ours: list[float] = []
    theirs: list[float] = []
    contenders = [_ours(turns + 1, ours), _local(turns + 1, theirs)]
    for _ in range(turns + 1):  # nobody's first time is counted
        for contender in contenders:
            await anext(contender)
    for contender in contenders:
        await contender.aclose()
    gpu = await _from_cpu_to_gpu()
    rest = await _at_rest()
    ratio = times(ours[1:], theirs[1:])
    rows = [
        ("AgentCluster, a node in standby", spread(ours[1:])),
        ("LocalCluster", f"{spread(theirs[1:])}  {ratio:.1f}x"),
        ("a task that needs a GPU, CPU workers run", "no GPU here" if gpu is None else f"{gpu:.2f}"),
    ]
    print(titled(f"Seconds until the first task's result, a look each {INTERVAL}", ("", "seconds"), rows))
    floors = [
        Floor("times faster than LocalCluster", ratio, 3),
        Floor("1% of a core / what is used at rest", 0.01 / max(rest, 1e-6), 1),
    ]
    print()
    print(titled("Floors", ("", "found", "at least", ""), [floor.row() for floor in floors]))
    print(f"\nat rest: {100 * rest:.2f}% of a core; medians of {turns} turns, {median(ours[1:]):.2f} s")
    return exit_code(floors)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="turns of each contender")
    logging.disable(logging.WARNING)
    sys.exit(asyncio.run(run(parser.parse_args().repeat)))


if __name__ == "__main__":
    main()
