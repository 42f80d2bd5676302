"""Execution of a rollout: run its waves one after the other; pause, cancel, publish events and report.

:class:`RolloutRun` feeds the pure :class:`~agentcluster.scheduler.planning.rollout.Rollout` with events, and carries
its commands out with one :class:`~agentcluster.scheduler.swap.Swap` per wave. It runs in the scheduler: the client that
asked for it may disconnect. The controller, the rollouts and their swaps share two objects: :class:`NodeEvents` wakes
calls that wait for nodes, and :class:`RolloutEvents` records the step of each node of one rollout and publishes it as
an event of the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from distributed import Scheduler

from agentcluster.errors import AgentClusterError, SwapError
from agentcluster.model import NodePlan, NodeReport
from agentcluster.requests import RolloutPolicy
from agentcluster.scheduler.planning.change import NodeChange, change_to
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.scheduler.planning.rollout import (
    BackEnded,
    Cancel,
    Pause,
    Resume,
    Rollout,
    RolloutCommand,
    RolloutEvent,
    RunBack,
    RunWave,
    WaveEnded,
    roll,
    roll_on,
)
from agentcluster.scheduler.swap import RolloutContext, Swap
from agentcluster.wire import TOPIC, to_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that a call of an agent has to end by itself when the agent's node is lost.
LOST_GRACE = 1.0

Outcome = Literal["changed", "unchanged", "failed", "rolled back"]

#: Answer of a call: plain data by name.
Answer = dict[str, Any]


class NodeEvents:
    """Signal that nodes of a scheduler changed their state."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    async def notify(self) -> None:
        """Wake all that wait for a condition on nodes."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> None:
        """Wait until a condition on nodes holds.

        Parameters
        ----------
        condition
            Evaluated now, and after each change.
        timeout
            Seconds to wait; None where the caller has a deadline.

        Raises
        ------
        TimeoutError
            When it does not hold within `timeout`.
        """
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)

    async def unless_lost(self, node: Node, call: Awaitable[T]) -> T | None:
        """Wait for an agent's answer, but not much longer than its node is there.

        An agent that has ended would be called again and again, for as long as a connection may take. A call that it
        has received ends with the connection: that is waited for, as a cancelled one may leave its connection open.

        Parameters
        ----------
        node
            The agent's node.
        call
            The call; it is cancelled when the node has been lost for :data:`LOST_GRACE`.

        Returns
        -------
        object
            The answer; None when the node is lost.
        """
        answer = asyncio.ensure_future(call)
        lost = asyncio.ensure_future(self.wait_for(lambda: node.state == "lost", None))
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                await asyncio.wait({answer}, timeout=LOST_GRACE)
            return await answer if answer.done() else None
        finally:
            for each in (answer, lost):
                each.cancel()
            await asyncio.gather(answer, lost, return_exceptions=True)


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
    nodes
        Signal of the scheduler's nodes.
    steps
        Node name -> its step and facts about it.
    """

    def __init__(self, scheduler: Scheduler, label: str, names: Iterable[str], nodes: NodeEvents) -> None:
        self.label = label
        self.began = time.time()
        self.steps: dict[str, Mapping[str, Any]] = {name: {"step": "waiting"} for name in names}
        self._scheduler = scheduler
        self.nodes = nodes

    def rollout_began(self, waves: Iterable[Sequence[str]]) -> None:
        """Publish the start of the rollout and the nodes of each wave.

        Parameters
        ----------
        waves
            Names of the nodes of each wave.
        """
        self._publish("began", waves=[list(wave) for wave in waves])

    def rollout_paused(self) -> None:
        """Publish that the rollout waits for :meth:`RolloutRun.resume`."""
        self._publish("paused")

    def rollout_controlled(self, action: str) -> None:
        """Publish that the rollout was told to pause, resume or cancel.

        Parameters
        ----------
        action
            ``pause``, ``resume`` or ``cancel``.
        """
        self._publish(action)

    def rollout_ended(self, outcomes: Mapping[str, str]) -> None:
        """Publish the end of the rollout and the outcome of each node.

        Parameters
        ----------
        outcomes
            Node name -> its outcome, such as ``changed`` or ``failed``.
        """
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
        await self.nodes.notify()

    def _publish(self, action: str, **facts: object) -> None:
        message = {"rollout": self.label, "began": self.began, "action": action, **to_wire(facts)}
        self._scheduler.log_event(TOPIC, message)


class RolloutRun:
    """Run one rollout.

    Parameters
    ----------
    context
        The scheduler, the rollout's events and limits, and the external names; shared by its swaps.
    changes
        Node name -> its change.
    policy
        Policy of the rollout.

    Attributes
    ----------
    rollout
        State of the rollout.
    before
        Node name -> the plan that it had before.
    """

    def __init__(self, context: RolloutContext, changes: Mapping[str, NodeChange], policy: RolloutPolicy) -> None:
        self.context = context
        self.changes = changes
        self.policy = policy
        self.before: dict[str, NodePlan] = {name: change.node.plan for name, change in changes.items()}
        self.rollout = Rollout(tuple(self._waves()), policy.on_failure)
        self._resumed: asyncio.Queue[RolloutCommand | None] = asyncio.Queue()
        self._reports: dict[str, NodeReport] = {}
        self._whys: list[str] = []
        self._causes: list[AgentClusterError] = []
        self._both = False
        self._back: frozenset[str] = frozenset()
        self._swap: Swap | None = None
        self._clock = time.perf_counter()

    @property
    def label(self) -> str:
        """Name of the rollout: the mode asked for, or the call."""
        return self.context.events.label

    @property
    def began(self) -> float:
        """Time at which the rollout began, in seconds since the epoch."""
        return self.context.events.began

    def _waves(self) -> Iterable[tuple[str, ...]]:
        surge = [name for name, change in self.changes.items() if change.strategy == "surge"]
        others = [name for name in self.changes if name not in surge]
        size = self.policy.max_parallel or max(1, len(surge))
        if self.policy.canary and len(self.changes) > 1:
            first = surge or others
            yield (first.pop(0),)
        for nodes, count in ((surge, size), (others, self.policy.max_parallel or 1)):
            for start in range(0, len(nodes), count):
                yield tuple(nodes[start : start + count])

    # -- control -------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Begin no further wave until :meth:`resume`."""
        self._control(Pause())

    def resume(self) -> None:
        """Begin the next wave again."""
        self._control(Resume())

    def cancel(self, why: str) -> None:
        """End the rollout; nodes that have changed are treated as after a failure.

        Parameters
        ----------
        why
            The reason, for the report.
        """
        self._control(Cancel(why))
        if self._swap is not None and self.rollout.state == "running":
            self._swap.cancel(why)

    def _control(self, event: RolloutEvent) -> None:
        paused = self.rollout.state == "paused"
        self.rollout, command = roll_on(self.rollout, event)
        if paused and self.rollout.state != "paused":
            self._resumed.put_nowait(command)
        self.context.events.rollout_controlled(type(event).__name__.lower())

    def status(self) -> Answer:
        """Return the progress of the rollout as plain data.

        Returns
        -------
        dict
            As :meth:`agentcluster.scheduler.plugin.AgentPlugin.rollout_status` describes it.
        """
        return {
            "mode": self.label,
            "state": self.rollout.state,
            "pausing": self.rollout.pausing,
            "seconds": time.perf_counter() - self._clock,
            "wave": self.rollout.position,
            "waves": [list(wave) for wave in self.rollout.waves],
            "nodes": {name: to_wire(step) for name, step in self.context.events.steps.items()},
        }

    # -- execution -----------------------------------------------------------------------------------------------------

    async def run(self) -> Answer:
        """Run the waves and return the report.

        Returns
        -------
        dict
            The report, see :meth:`report`.

        Raises
        ------
        SwapError
            When not all nodes have their new workers; it describes the state and has the report.
        """
        self.context.events.rollout_began(self.rollout.waves)
        self.rollout, command = roll(self.rollout)
        while self.rollout.state != "over":
            if command is None:
                self.context.events.rollout_paused()
                command = await self._resumed.get()
            else:
                event = await self._do(command)
                self.rollout, command = roll_on(self.rollout, event)
        report = self.report()
        self.context.events.rollout_ended({name: self.outcome(name) for name in self.changes})
        if self._whys or self.rollout.cancelled:
            raise self._error(report)
        return report

    async def _do(self, command: RolloutCommand) -> RolloutEvent:
        match command:
            case RunWave(nodes):
                return WaveEnded(await self._run({name: self.changes[name] for name in nodes}))
            case RunBack(nodes):
                back = {name: self._return(name) for name in nodes}
                failed = await self._run(back, back=True)
                self._back = frozenset(nodes) - failed
                for which, became in ((self._back, "was brought back"), (failed, "could not be brought back")):
                    self._whys += [f"{name} {became}" for name in nodes if name in which]
                return BackEnded(failed)

    async def _run(self, changes: Mapping[str, NodeChange], back: bool = False) -> frozenset[str]:
        failed: set[str] = set()
        for nodes in _together(changes, back):
            chosen = {name: _without_ended(changes[name]) for name in nodes if changes[name].node.state != "lost"}
            failed |= self._lost(set(nodes) - set(chosen), changes)
            if not chosen:
                continue
            swap = self._swap = Swap(
                self.context,
                chosen,
                drain="data" if back and self.policy.drain == "tasks" else self.policy.drain,
                bound=self.policy.bound,
                tolerant=self.policy.on_failure == "continue" or back,
            )
            if self.rollout.cancelled is not None and not back:
                swap.cancel(self.rollout.cancelled)  # between the command and the wave
            try:
                wave = await swap.run()
            finally:
                self._swap = None
                await self.context.events.nodes_changed()
            failed |= wave.failed_nodes
            failed |= self._lost({name for name, each in chosen.items() if each.node.state == "lost"}, changes)
            self._both = self._both or wave.both
            if wave.failures:
                self._whys.append(swap.why())
                self._causes += swap.causes
            if not back:
                self._reports |= {name: swap.report(name) for name in chosen}
        return frozenset(failed)

    def _lost(self, nodes: Iterable[str], changes: Mapping[str, NodeChange]) -> set[str]:
        """Return the lost nodes that should have got new workers; the rollout goes on, or back, without them."""
        failed = {name for name in nodes if changes[name].names}
        self._whys += [f"node {name} is lost ({changes[name].node.problem})" for name in sorted(failed)]
        return failed

    def _return(self, name: str) -> NodeChange:
        """Return the change that brings a node back to the plan that it had."""
        planned, plan = self.changes[name], self.before[name]
        back = change_to(planned.node, plan.mode, list(plan.workers.values()))
        names = tuple(back.node.take_names(len(back.add)))
        return replace(back, names=names, strategy=planned.strategy, because=planned.because)

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self) -> Answer:
        """Return the report of the rollout as plain data.

        Returns
        -------
        dict
            As :meth:`agentcluster.scheduler.plugin.AgentPlugin.reprovision_nodes` describes it; for a rollout that has
            not run, the changes planned.
        """
        nodes = {}
        for name, change in self.changes.items():
            report = self._reports.get(name) or change.report()
            nodes[name] = to_wire(replace(report, outcome=self.outcome(name)))
        return {
            "mode": self.label,
            "nodes": nodes,
            "seconds": time.perf_counter() - self._clock,
            "dry_run": self.policy.dry_run,
        }

    def outcome(self, name: str) -> Outcome:
        """Return the outcome of a node.

        Parameters
        ----------
        name
            Name of the node.
        """
        if name in self._back:
            return "rolled back"
        if name in self.rollout.failed:
            return "failed"
        change = self.changes[name]
        same = not change.remove and not change.add and change.mode == self.before[name].mode
        return "changed" if name in self.rollout.changed and not same else "unchanged"

    def _error(self, report: Answer) -> SwapError:
        changed = [name for name in self.changes if self.outcome(name) == "changed"]
        if self._both:
            state = "old and new workers both run, because the new ones hold data that could not be moved either"
        elif changed:
            state = f"{', '.join(changed)} changed, the other nodes have the workers that they had"
        else:
            state = "the workers that ran before still run, nothing was lost"
        empty = [name for name, p in self.changes.items() if not p.node.plan.workers and self.before[name].workers]
        if empty:
            state = f"{', '.join(empty)} has no workers, the others have those that they had"
        why = "; ".join(dict.fromkeys(filter(None, self._whys))) or str(self.rollout.cancelled)
        error = SwapError(why, state, report)
        error.__cause__ = cause = self._causes[0] if self._causes else None
        error.raised = getattr(cause, "raised", {})
        return error


def _together(changes: Mapping[str, NodeChange], back: bool) -> Iterable[Sequence[str]]:
    """Yield the nodes that change at the same time: those of a wave, or all that can be brought back together."""
    surge = [name for name, each in changes.items() if each.strategy == "surge"]
    others = [name for name in changes if name not in surge]
    # Where old workers leave first, their data needs the workers of nodes that do not change at that time.
    return filter(None, [surge, *([name] for name in others)] if back else [surge, others])


def _without_ended(change: NodeChange) -> NodeChange:
    """Return a change without the workers that ended while their node waited for its wave."""
    there = change.node.plan.workers
    keep = {worker: spec for worker, spec in change.keep.items() if worker in there}
    remove = {worker: spec for worker, spec in change.remove.items() if worker in there}
    return replace(change, keep=keep, remove=remove)
