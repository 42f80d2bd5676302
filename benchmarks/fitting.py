"""How long it takes to decide what 1,000 nodes run: ``python -m benchmarks.fitting``.

CPU time of one decision of adaptive scaling, at its median, for several kinds of demand, on 1,000 nodes of which
half have two GPUs, and as a ratio to the time for 100 such nodes: 10 is linear. Exit code 1 where that is over 50 ms.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

from agentcluster.model import WorkerSpec
from agentcluster.scheduler.planning.binpacking import pack
from agentcluster.scheduler.planning.demand import Bounds, NodeCapacity, ResourceRequest, RunningWorker
from benchmarks.common import Floor, exit_code, median, titled

GIB = 2**30
CPU = WorkerSpec("cpu", "distributed.Nanny", nthreads=4, memory_limit=8 * GIB, resources={"CPU": 4.0})
GPU = WorkerSpec("gpu", "dask_cuda.CUDAWorker", nthreads=1, memory_limit=8 * GIB, resources={"GPU": 1.0})
ANY, TRAIN = ResourceRequest({}, 16_000, 100_000), ResourceRequest({"GPU": 1.0}, 500, 5_000)

#: Name -> requests, workers of each node that run a task, limits.
CASES = {
    "nothing to do": ([], 0, Bounds()),
    "tasks for all": ([ANY], 2, Bounds()),
    "tasks for half of the GPUs": ([TRAIN], 0, Bounds()),
    "both": ([ANY, TRAIN], 2, Bounds()),
    "both, within limits": ([ANY, TRAIN], 2, Bounds(most=(3_000, math.inf, math.inf), kinds={"gpu": (0, 300)})),
}


def capacities(count: int, busy: int) -> list[NodeCapacity]:
    """Return so many nodes with four workers each, of which some run tasks of the first request."""
    found = []
    for number in range(count):
        workers = {f"n{number}-{i}": RunningWorker(CPU, i, {0: 2} if i < busy else {}) for i in range(4)}
        offers = {"auto-cpu": (CPU,) * 4} | ({"auto-gpu": (GPU,) * 2} if number % 2 else {})
        found.append(NodeCapacity(f"n{number}", "auto-cpu", workers, offers))
    return found


def milliseconds(count: int, case: str, turns: int) -> float:
    """Return the median CPU time of a decision."""
    requests, busy, bounds = CASES[case]
    nodes, taken = capacities(count, busy), []
    for _ in range(turns):
        began = time.process_time()
        pack(requests, nodes, bounds)
        taken.append(1000 * (time.process_time() - began))
    return median(taken)


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="decisions per case (default: %(default)s)")
    turns = parser.parse_args().turns
    rows, floors = [], []
    for case in CASES:
        few, many = (milliseconds(count, case, turns) for count in (100, 1000))
        rows.append((case, f"{many:.0f}", f"{many / few:.1f}" if few else "-"))
        floors.append(Floor(f"{case}: 50 ms, part of the time", 50 / many if many else math.inf, 1))
    print(titled("CPU time of one decision for 1,000 nodes", ("demand", "ms", "times 100 nodes"), rows))
    return exit_code(floors)


if __name__ == "__main__":
    sys.exit(main())
