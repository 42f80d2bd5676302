"""View of the nodes that a cluster keeps current: after its own changes, and after those of other clients."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import TYPE_CHECKING

from distributed.core import Status

from agentcluster.reports import Nodes, NodeSnapshot

if TYPE_CHECKING:
    from agentcluster.client.cluster import AsyncCluster

logger = logging.getLogger(__name__)

#: Seconds in which the changes of a swap, one for each worker, are gathered before the scheduler is asked.
GATHER = 0.2


class NodeView:
    """View of a cluster's nodes.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster; everything here runs in its event loop.
    interval : float
        Seconds between two updates when no change was seen.

    Attributes
    ----------
    nodes : Nodes
        The nodes, those that this cluster launched first.
    problem : str or None
        Why the view may be out of date; None when it is current.
    """

    def __init__(self, cluster: AsyncCluster, interval: float) -> None:
        self.nodes = Nodes()
        self.problem: str | None = None
        self._cluster = cluster
        self._interval = interval
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._shown = 0

    def __repr__(self) -> str:
        return f"<NodeView: {', '.join(self.nodes) or 'no nodes'}{f'; {self.problem}' if self.problem else ''}>"

    @property
    def kept(self) -> bool:
        """True when the view is being kept current."""
        return self._keeper is not None

    def keep(self) -> None:
        """Keep the view current until :meth:`close`."""
        self._keeper = asyncio.create_task(self._keep(), name="agentcluster nodes")

    async def close(self) -> None:
        """Stop updating the view; idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    def changed(self) -> None:
        """Request an update, because a worker joined or left."""
        self._changed.set()

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._changed.wait()
                    await asyncio.sleep(GATHER)
            self._changed.clear()
            try:
                await self.refresh()
                self.problem = None
            except OSError as error:
                self.problem = f"cannot reach the scheduler: {error}"
                logger.debug("Cannot ask the scheduler for its nodes: %s", error)

    async def refresh(self) -> None:
        """Ask the scheduler for its nodes; does nothing unless the cluster runs.

        Raises
        ------
        OSError
            When the scheduler cannot be reached.
        """
        cluster = self._cluster
        if cluster.status is not Status.running:
            return
        number = next(self._numbers)
        found = await cluster.scheduler_comm.get_nodes()
        if number < self._shown:
            return  # a later question was answered first
        self._shown = number
        found |= self._ended(found)
        first = [name for name in cluster.worker_spec if name in found]
        self.nodes = Nodes({name: found[name] for name in dict.fromkeys([*first, *found])})
        for name, entry in cluster.worker_spec.items():
            entry["group"] = [worker[len(name) :] for worker in found.get(name, {}).get("plan", ())]

    async def try_refresh(self) -> None:
        """Refresh the view after a call; a scheduler that cannot be reached is reported by it or by the next update."""
        with contextlib.suppress(OSError):
            await self.refresh()

    def _ended(self, found: dict[str, NodeSnapshot]) -> dict[str, NodeSnapshot]:
        """Return the nodes that the scheduler has forgotten because their agents ended by themselves."""
        ended: dict[str, NodeSnapshot] = {}
        for name, node in self._cluster.workers.items():
            if name not in found and name in self.nodes and node.ended:
                last = next(reversed(node.lines()), "")
                problem = f"its agent ended; last output: {last!r}"
                ended[name] = {**self.nodes[name], "state": "lost", "plan": {}, "workers": {}, "problem": problem}
        return ended
