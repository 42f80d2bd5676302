"""Events of changes: signals that nodes changed, and the record of a rollout.

The controller, the rollouts and their swaps share these two objects. :class:`NodeEvents` wakes calls that wait for
nodes; :class:`RolloutEvents` records the step of each node of one rollout and publishes it as an event of the
scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from distributed import Scheduler

from agentcluster.wire import TOPIC, to_wire

logger = logging.getLogger(__name__)


class NodeEvents:
    """Signal that nodes of a scheduler changed their state."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    async def notify(self) -> None:
        """Wake all that wait for a condition on nodes."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_for(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait until a condition on nodes holds.

        Parameters
        ----------
        condition
            Evaluated now, and after each change.
        timeout
            Seconds to wait.

        Raises
        ------
        TimeoutError
            When it does not hold within `timeout`.
        """
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)


class RolloutEvents:
    """Record and publish what happens in one rollout.

    Parameters
    ----------
    scheduler
        The scheduler, whose topic :data:`~agentcluster.wire.TOPIC` gets the events.
    label
        Name of the rollout: the mode asked for, or the call.
    names
        Names of its nodes.
    nodes
        Signal of the scheduler's nodes.

    Attributes
    ----------
    began
        Time at which the rollout began, in seconds since the epoch.
    steps
        Node name -> its step and facts about it.
    """

    def __init__(self, scheduler: Scheduler, label: str, names: Iterable[str], nodes: NodeEvents) -> None:
        self.label = label
        self.began = time.time()
        self.steps: dict[str, Mapping[str, Any]] = {name: {"step": "waiting"} for name in names}
        self._scheduler = scheduler
        self._nodes = nodes

    def rollout_began(self, waves: Iterable[Sequence[str]]) -> None:
        """Publish the start of the rollout and the nodes of each wave."""
        self._publish("began", waves=[list(wave) for wave in waves])

    def rollout_paused(self) -> None:
        """Publish that the rollout waits for :meth:`RolloutRun.resume`."""
        self._publish("paused")

    def rollout_controlled(self, action: str) -> None:
        """Publish that the rollout was told to pause, resume or cancel."""
        self._publish(action)

    def rollout_ended(self, outcomes: Mapping[str, str]) -> None:
        """Publish the end of the rollout and the outcome of each node."""
        self._publish("ended", outcomes=outcomes)

    def node_step(self, node: str, step: str, facts: Mapping[str, object]) -> None:
        """Record the step that a node is in; publish it when it is another one.

        Parameters
        ----------
        node
            Name of the node.
        step
            A step, such as ``start`` or ``retire``, or the state that the node has afterwards.
        facts
            Details of the step, such as the names of workers.
        """
        if self.steps[node]["step"] != step:
            self._publish("step", node=node, step=step)
            logger.info("Node %s: %s", node, step)
        self.steps[node] = {"step": step, **facts}

    async def nodes_changed(self) -> None:
        """Signal that nodes of the rollout changed their state."""
        await self._nodes.notify()

    def _publish(self, action: str, **facts: object) -> None:
        message = {"rollout": self.label, "began": self.began, "action": action, **to_wire(facts)}
        self._scheduler.log_event(TOPIC, message)
