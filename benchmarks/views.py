"""What it costs to look at 200 nodes: ``python -m benchmarks.views``.

A real cluster whose scheduler is told of 200 nodes, half of them with eight GPUs, whose load changes before each look.
CPU time at its median: of the kernel for the panel in a notebook, of the scheduler to answer it, and of the scheduler
for the Nodes page with 1,000 events, up to the message to the browser. Exit code 1 where one is over 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from bokeh.document import Document
from bokeh.protocol import Protocol

from agentcluster import AgentCluster
from agentcluster.model import Gpu, Hardware, HostMetrics, Mode, WorkerSpec
from agentcluster.scheduler.dashboard import Decisions, NodesPlot, Rollouts
from agentcluster.wire import TOPIC
from benchmarks.common import Floor, exit_code, median, titled

GIB = 2**30
NODES, EVENTS = 200, 1000
CPU = WorkerSpec("cpu", "distributed.Nanny", nthreads=4, memory_limit=32 * GIB, resources={"CPU": 4.0})
GPU = WorkerSpec("gpu", "dask_cuda.CUDAWorker", nthreads=1, memory_limit=32 * GIB, resources={"GPU": 1.0})
GPUS = tuple(Gpu(str(i), f"GPU-{i}", "H200", 141 * GIB) for i in range(8))


def settle(registry: Any) -> None:
    """Have the registry know of the nodes."""
    for number in range(NODES):
        gpus = GPUS if number % 2 else ()
        hardware = Hardware(f"host-{number}", 64, 512 * GIB, gpus)
        node = registry.register(f"node-{number}", f"tcp://192.0.2.1:{number + 1}", hardware, now=float("inf"))
        specs = [GPU if gpus else CPU] * 8
        node.adopt(Mode("auto-gpu" if gpus else "auto-cpu"), dict(zip(node.take_names(len(specs)), specs, strict=True)))


def stir(registry: Any, chance: random.Random) -> None:
    """Change the load of all nodes."""
    for node in registry.nodes.values():
        busy = [chance.randrange(100) for _ in node.hardware.gpus]
        taken = [percent * gpu.memory // 100 for percent, gpu in zip(busy, node.hardware.gpus, strict=True)]
        used = int(chance.random() * node.hardware.memory)
        node.metrics = HostMetrics(100 * chance.random(), used, tuple(busy), tuple(taken))


def tell(scheduler: Any) -> None:
    """Have the scheduler's events tell of rollouts over all nodes, as many as it keeps."""
    steps = ("start", "retire", "stop", "ready")
    for number in range(EVENTS):
        step = {"action": "step", "node": f"node-{number // 4 % NODES}", "step": steps[number % 4]}
        scheduler.log_event(TOPIC, {"rollout": "auto-gpu", "began": 1.0 + number // 800, **step})


async def measured(turns: int) -> list[tuple[str, float]]:
    """Return what was measured and how many milliseconds it took."""
    from agentcluster.client.widget import Panel

    chance = random.Random(1)
    async with AgentCluster(
        mode="none", scheduler_options={"dashboard_address": ":0"}, asynchronous=True, silence_logs=50
    ) as cluster:
        plugin = cluster.scheduler.extensions["agentcluster"]
        settle(plugin.registry)
        tell(cluster.scheduler)
        panel = Panel(cluster)
        plots: list[Any] = [NodesPlot(plugin.registry, plugin._data_on), Rollouts(cluster.scheduler)]
        plots.append(Decisions(cluster.scheduler))

        async def draw() -> None:
            panel._not_before = 0.0
            await panel.update()

        document, changes = Document(), []
        for plot in plots:
            document.add_root(plot.root)
        document.on_change(changes.append)

        async def page() -> None:
            changes.clear()
            for plot in plots:
                plot.update()
            assert Protocol().create("PATCH-DOC", changes).content_json

        found = []
        for what, work in (("panel", draw), ("answer to the panel", plugin.get_nodes), ("Nodes page", page)):
            taken = []
            for _ in range(turns):
                stir(plugin.registry, chance)
                await cluster.refresh()
                began = time.thread_time()
                await work()
                taken.append(1000 * (time.thread_time() - began))
            found.append((what, median(taken)))
        return found


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="looks (default: %(default)s)")
    found = asyncio.run(measured(parser.parse_args().turns))
    rows = [(what, f"{taken:.0f}") for what, taken in found]
    print(titled(f"CPU time of one look at {NODES} nodes", ("what", "ms"), rows))
    return exit_code([Floor(f"{what}: 100 ms, part of the time", 100 / taken, 1) for what, taken in found])


if __name__ == "__main__":
    sys.exit(main())
