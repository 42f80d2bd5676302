"""Numbers of workers as a cluster manager counts them.

A manager counts the names that it gave. A node may run more workers than it has such names: because its mode has more,
or for as long as a swap lasts. Whoever compares the scheduler's number of workers with its own finds too many of them,
and would have some retired. So what a manager asks the scheduler about numbers is answered in its own unit, and nodes
are chosen as a whole.
"""

from __future__ import annotations

import re
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState

from agentcluster.registry import Node, Registry

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
        self._whole = False

    def install(self) -> None:
        """Have the scheduler ask here first when somebody asks about numbers of workers."""
        scheduler: Any = self.scheduler
        scheduler.add_plugin(self, name="agentcluster-counts")
        scheduler.workers_to_close = scheduler.handlers["workers_to_close"] = self.workers_to_close
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self.adaptive_target

    def adaptive_target(self, target_duration: Any = None) -> int:
        """Return what ``Scheduler.adaptive_target`` does, in a manager's own unit."""
        target, there = int(self._adaptive_target(target_duration)), len(self.scheduler.workers)
        counted = sum(map(len, self._counted().values()))
        if target < there:  # dask found some that could go, and leaves what there is without them
            going = set(self.workers_to_close())
            return sum(ws.address not in going for group in self._counted().values() for ws in group)
        return -(-target * counted // there) if there else target

    def workers_to_close(
        self, target: int | None = None, n: int | None = None, attribute: str = "address", key: Any = None, **how: Any
    ) -> list[Any]:
        """Return what ``Scheduler.workers_to_close`` does, in a manager's own unit, and nodes as a whole.

        Parameters
        ----------
        target, n, attribute, key
            As dask takes them; with a `key` the caller counts for itself.
        **how
            As dask takes it.
        """
        counted = self._counted()
        if key is not None or len(counted) == len(self.scheduler.workers):
            return list(self._workers_to_close(target=target, n=n, attribute=attribute, key=key, **how))
        if target is None and n is None:
            nodes = {self._group(self.scheduler.workers[address]) for address in self._ask(key=self._group, **how)}
            return [getattr(ws, attribute) for ws in self.scheduler.workers.values() if self._group(ws) in nodes]
        remain = sum(map(len, counted.values()))
        least = max(remain - n if target is None and n is not None else target or 0, how.get("minimum") or 0)
        cheapest = self._ask(n=len(self.scheduler.workers), key=self._group)
        chosen: list[Any] = []
        for group in dict.fromkeys(self._group(self.scheduler.workers[address]) for address in cheapest):
            if remain - len(counted[group]) < least:
                break
            remain -= len(counted[group])
            chosen += [getattr(ws, attribute) for ws in counted[group]]
        return chosen

    def _ask(self, **how: Any) -> list[str]:
        """Ask the scheduler about all workers: nodes are idle, and small, by all that they run."""
        self._whole = True
        try:
            return list(self._workers_to_close(**how))
        finally:
            self._whole = False

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Return the workers that a manager may choose from: those that stand for a name of its own."""
        if self._whole:
            return workers
        counted = {ws for group in self._counted().values() for ws in group}
        return [ws for ws in workers if ws in counted]

    async def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Take a worker out of dask-gateway's own count again, where that is not to have it.

        The gateway's plugin counts it when it comes; what is asynchronous here is awaited after that.
        """
        service = scheduler.services.get("gateway")
        ws = scheduler.workers.get(worker)
        if service is not None and ws is not None and not self.valid_workers_downscaling(scheduler, [ws]):
            service.active_workers.discard(ws.name)

    def _node(self, ws: WorkerState) -> Node | None:
        """Return a worker's node, where a manager knows that."""
        name = str(ws.name)
        there = [node for node in self.registry.nodes.values() if node.tracked]
        exact = (node for node in there if name in node.tracked)
        return next(exact, next((node for node in there if NUMBERED.sub("", name) == node.name), None))

    def _group(self, ws: WorkerState) -> str:
        """Return what a worker leaves together with: its node, where a manager knows that."""
        node = self._node(ws)
        return ws.address if node is None else node.name

    def _counted(self) -> dict[str, list[WorkerState]]:
        """Return the workers that a manager counts, by what they leave together with."""
        found: dict[str, list[WorkerState]] = {}
        for ws in self.scheduler.workers.values():
            node = self._node(ws)
            group = found.setdefault(ws.address if node is None else node.name, [])
            if node is None or str(ws.name) in node.tracked:
                group.append(ws)
        return found
