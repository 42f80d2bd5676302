"""What agents say to a scheduler, and what becomes of a node whose agent says nothing any more.

:class:`Hearing` is the half of :class:`~agentcluster.plugin.AgentPlugin` that listens: it keeps the registry true.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from distributed.comm.core import Comm, CommClosedError

from agentcluster.config import Config
from agentcluster.errors import AgentClusterError
from agentcluster.model import HostMetrics, WorkerState, from_wire
from agentcluster.registry import Node, Registry
from agentcluster.rolling import Terms

logger = logging.getLogger("agentcluster.plugin")

#: What an agent hears when the last of its workers was retired, and not by a change of its node's plan.
RETIRED = "retired"


class Hearing:
    """What the plugin hears; a base of it."""

    registry: Registry
    changes: Any
    config: Config
    _streams: dict[str, Comm]
    _tasks: set[asyncio.Task[Any]]
    _moved: asyncio.Condition

    async def _listen(self, node: Node, comm: Comm) -> None:
        """Take an agent's messages until its connection ends, and the node with it."""
        self._streams[node.name] = comm
        why = "its agent's connection ended"
        try:
            while (message := await comm.read()) != "leaving":
                self._hear(node, message)
            self.registry.unregister(node.name)
            logger.info("Node %s left", node.name)
        except (CommClosedError, OSError):
            pass
        except AgentClusterError as error:
            why = f"its agent said what is not understood here, is it of another version? {error}"
        finally:
            comm.abort()
            if self._streams.get(node.name) is comm:
                del self._streams[node.name]
            if self.registry.nodes.get(node.name) is node:
                self._lose(node, why)
            await self._notify()

    def _hear(self, node: Node, message: Mapping[str, Any]) -> None:
        node.heard = time.monotonic()
        if "metrics" in message:
            node.metrics = from_wire(HostMetrics, message["metrics"])
        for each in message.get("workers", ()):
            self._worker_changed(node, from_wire(WorkerState, each))

    def _worker_changed(self, node: Node, state: WorkerState) -> None:
        if state.state in ("retired", "failed"):
            logger.info("Worker %s of node %s %s", state.name, node.name, state.problem or "was retired")
            last = node.drop(state.name) and node.given is None
            if not state.problem and (node.forget(state.name) or last):
                self._spawn(self._end(node), f"end {node.name}")
            node.problem = f"worker {state.name} {state.problem}" if state.problem else node.problem
        elif state.name in node.plan.workers:
            before = node.workers.get(state.name)
            self.changes.tally.restarted(node.name, state.restarts - (before.restarts if before else 0))
            node.workers[state.name] = state

    async def _end(self, node: Node) -> None:
        """Tell an agent that its workers were retired, when those that nobody retired by name have gone too."""
        if node.plan.workers:
            with contextlib.suppress(AgentClusterError, TimeoutError):
                await self.changes.empty(node.name, Terms(drain="data"))
        if stream := self._streams.get(node.name):
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write(RETIRED)

    def _lose(self, node: Node, why: str) -> None:
        if node.state != "lost":
            logger.info("Node %s is lost: %s", node.name, why)
            node.to("lost")
            node.problem = why
            node.workers.clear()
            node.plan = type(node.plan)(node.plan.revision, node.plan.mode)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self.config.node_ttl / 4)
            for node in self.registry.stale(time.monotonic(), self.config.node_ttl):
                self._lose(node, f"its agent was not heard for {self.config.node_ttl:g} s")
                if stream := self._streams.get(node.name):
                    # If it lives after all it must not go on alone: without this connection it ends, or stands by.
                    stream.abort()
                await self._notify()

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    def _spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        task = asyncio.create_task(coroutine, name=f"agentcluster: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
