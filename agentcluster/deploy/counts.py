"""The number of workers as cluster managers count it.

A manager counts the names that it gave. A node may run more workers than it has such names: because its mode has more,
or for as long as a swap lasts. Whoever compares the scheduler's number of workers with its own finds too many of them,
and would have some retired. So what a manager asks the scheduler about numbers is answered in its own unit.
"""

from __future__ import annotations

import math
import re
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState

from agentcluster.registry import Registry

#: What a node's own names for its workers end with.
NUMBERED = re.compile(r"-\d+$")


class Counts(SchedulerPlugin):
    """The workers of a scheduler, less those that stand for no name that a manager gave.

    Parameters
    ----------
    scheduler, registry
        The plugin's.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self._workers_to_close: Any = scheduler.workers_to_close
        self._adaptive_target: Any = scheduler.adaptive_target

    def install(self) -> None:
        """Have the scheduler ask here first when somebody asks about numbers of workers."""
        scheduler: Any = self.scheduler
        scheduler.add_plugin(self, name="agentcluster-counts")
        scheduler.workers_to_close = scheduler.handlers["workers_to_close"] = self.workers_to_close
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self.adaptive_target

    def uncounted(self) -> set[str]:
        """Return the addresses of workers that no manager knows, though one knows their node."""
        nodes = [node for node in self.registry.nodes.values() if node.tracked]
        known = {name for node in nodes for name in node.tracked}
        theirs = {node.name for node in nodes}
        return {
            ws.address
            for ws in self.scheduler.workers.values()
            if str(ws.name) not in known and NUMBERED.sub("", str(ws.name)) in theirs
        }

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Return the workers that a manager may choose from: those that stand for a whole name of its own."""
        uncounted = self.uncounted()
        return [ws for ws in workers if ws.address not in uncounted]

    def workers_to_close(
        self,
        memory_ratio: float | None = None,
        n: int | None = None,
        key: Any = None,
        minimum: int | None = None,
        target: int | None = None,
        attribute: str = "address",
    ) -> Any:
        """Return what ``Scheduler.workers_to_close`` does, with `target` and `minimum` in a manager's own unit."""
        beside = len(self.uncounted())
        if target is not None and n is None:
            n = max(0, len(self.scheduler.workers) - beside - target)
        least = minimum and minimum + beside
        return self._workers_to_close(memory_ratio=memory_ratio, n=n, key=key, minimum=least, attribute=attribute)

    def adaptive_target(self, target_duration: float | None = None) -> int:
        """Return what ``Scheduler.adaptive_target`` does, in a manager's own unit."""
        target = int(self._adaptive_target(target_duration))
        workers = len(self.scheduler.workers)
        counted = workers - len(self.uncounted())
        if target < workers:  # those less that could be closed, each of them counted
            return counted - (workers - target)
        return math.ceil(target * counted / workers) if workers else target

    async def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Take a worker out of dask-gateway's own count again, where that is not to have it.

        The gateway's plugin counts it when it comes; what is asynchronous here is awaited after that.
        """
        service = scheduler.services.get("gateway")
        ws = scheduler.workers.get(worker)
        if service is not None and ws is not None and worker in self.uncounted():
            service.active_workers.discard(ws.name)
