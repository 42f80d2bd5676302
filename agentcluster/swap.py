"""One change of workers carried out: the commands of a rollout turned into calls, and measured.

:class:`Swap` sits between the pure :mod:`agentcluster.rollout` and the two things that can act: the agents, by RPC, and
:mod:`agentcluster.evacuation`, on the scheduler's own state. It settles each node's plan when it is over, whatever
happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler

from agentcluster.allocate import Change
from agentcluster.errors import AgentClusterError, SwapError, WorkerStartError
from agentcluster.evacuation import Evacuation, evacuate
from agentcluster.model import Mode, NodeReport, WorkerSpec, WorkerState, from_wire, to_wire
from agentcluster.registry import Node
from agentcluster.rollout import (
    Command,
    Event,
    NodeChange,
    Retired,
    RetireNew,
    RetireOld,
    RetireRefused,
    Rollout,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    advance,
    begin,
)

logger = logging.getLogger(__name__)


@dataclass
class Swap:
    """Carries out one :class:`~agentcluster.rollout.Rollout`.

    Parameters
    ----------
    scheduler
        The scheduler, in this process.
    nodes
        Node name -> the node.
    changes
        Node name -> which workers stay, go and come.
    named
        Node name -> the workers that come, by name.
    modes
        Node name -> the mode that it has afterwards.
    start_timeout, retire_timeout, stop_timeout
        Seconds for all new workers to join, for all data to move, and for a node's old workers to end.
    """

    scheduler: Scheduler
    nodes: Mapping[str, Node]
    changes: Mapping[str, Change]
    named: Mapping[str, Mapping[str, WorkerSpec]]
    modes: Mapping[str, Mode]
    start_timeout: float
    retire_timeout: float
    stop_timeout: float
    evacuation: Evacuation = field(default_factory=Evacuation)

    def __post_init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = {}
        self._causes: list[AgentClusterError] = []
        self._started: dict[str, list[WorkerState]] = {}

    async def run(self) -> None:
        """Go from the old plans to the new; raise :class:`SwapError` when that failed."""
        rollout = self._rollout = Rollout(())
        try:
            for node in self.nodes.values():
                node.to("swap")
            rollout = await self._drive()
        finally:
            for name, node in self.nodes.items():
                if node.state == "swapping":
                    self._settle(name, node, self._rollout)
        if rollout.phase != "done":
            raise self._error(rollout)

    async def _drive(self) -> Rollout:
        events: asyncio.Queue[Event] = asyncio.Queue()
        running: set[asyncio.Task[None]] = set()

        def carry_out(commands: Iterable[Command]) -> None:
            for command in commands:
                task = asyncio.create_task(self._do(command, events))
                running.add(task)
                task.add_done_callback(running.discard)

        try:
            rollout, commands = begin(
                [NodeChange(name, change.go, tuple(self.named[name])) for name, change in self.changes.items()]
            )
            carry_out(commands)
            self._rollout = rollout
            while not rollout.over:
                rollout, commands = advance(rollout, await events.get())
                self._rollout = rollout
                carry_out(commands)
            return rollout
        finally:
            for task in running:
                task.cancel()

    async def _do(self, command: Command, events: asyncio.Queue[Event]) -> None:
        began = time.perf_counter()
        match command:
            case Start(change):
                events.put_nowait(await self._start(change))
                self._seconds["start", change.node] = time.perf_counter() - began
            case RetireOld(workers):
                events.put_nowait(await self._retire(workers))
                for name, each in self.changes.items():
                    if each.go:
                        self._seconds["retire", name] = time.perf_counter() - began
            case RetireNew(workers):
                events.put_nowait(await self._retire(workers, back=True))
            case Stop(node, workers):
                await self._stop(node, workers)
                self._seconds["stop", node] = time.perf_counter() - began
                events.put_nowait(Stopped(node))

    async def _retire(self, workers: tuple[str, ...], back: bool = False) -> Event:
        try:
            evacuation = await evacuate(self.scheduler, workers, self.retire_timeout)
        except Exception as error:  # a fault in the scheduler must end the change, not hang it
            logger.exception("Moving data off %s failed", ", ".join(workers))
            return RetireRefused(f"moving data failed: {error!r}")
        if not back:
            self.evacuation = evacuation
        return RetireRefused(evacuation.problem) if evacuation.problem else Retired()

    async def _start(self, change: NodeChange) -> Event:
        specs = to_wire(self.named[change.node])
        try:
            # The agent ends a late start itself, within the timeout that it is given.
            async with asyncio.timeout(self.start_timeout + self.stop_timeout):
                answer = await self._agent(change.node).start_workers(specs=specs, timeout=self.start_timeout)
            if "failures" in answer:
                cause = WorkerStartError(change.node, answer["failures"])
                self._causes.append(cause)
                return StartFailed(change.node, str(cause))
            self._started[change.node] = [from_wire(WorkerState, state) for state in answer["states"]]
        except asyncio.CancelledError:
            await asyncio.shield(self._stop(change.node, change.come))
            raise
        except Exception as error:  # whatever an agent raises or answers must end the change, not hang it
            # It may be late only: what it still starts belongs to no plan.
            await self._stop(change.node, change.come)
            return StartFailed(change.node, f"the agent on {change.node} failed: {error or type(error).__name__}")
        return Started(change.node)

    async def _stop(self, node: str, workers: tuple[str, ...]) -> None:
        try:
            async with asyncio.timeout(2 * self.stop_timeout):
                await self._agent(node).stop_workers(names=list(workers), timeout=self.stop_timeout)
        except Exception as error:  # the scheduler turns whatever the agent raised into a plain Exception
            # The workers hold nothing and are out of the scheduler; if the agent is gone they ended with it.
            logger.warning("Node %s did not confirm the end of %s: %s", node, ", ".join(workers), error)

    def _settle(self, name: str, node: Node, rollout: Rollout) -> None:
        change, came = self.changes[name], self.named[name]
        if rollout.phase == "done":
            keep = {worker: spec for worker, spec in change.keep.items() if worker in node.plan.workers}
            node.adopt(self.modes[name], {**keep, **came})
        elif rollout.both:
            started = name in rollout.started
            node.adopt(
                self.modes[name] if started else node.plan.mode, {**node.plan.workers, **(came if started else {})}
            )
        elif not node.plan.revision:
            node.to("refused")
            node.problem = "; ".join(why for _, why in rollout.failures) or "it was not given its workers"
            return
        else:
            node.settle()
        for state in self._started.get(name, ()):
            if state.name in node.plan.workers:
                node.workers[state.name] = state
        logger.info("Node %s runs %d workers in mode %s", name, len(node.plan.workers), node.plan.mode.name)

    def _agent(self, node: str) -> Any:
        return self.scheduler.rpc(self.nodes[node].address)

    def _error(self, rollout: Rollout) -> SwapError:
        why = "; ".join(dict.fromkeys(why for _, why in rollout.failures)) or "the change was cancelled"
        state = (
            "old and new workers both run, because the new ones hold data too"
            if rollout.both
            else "the workers that ran before still run, nothing was lost"
        )
        error = SwapError(why, state)
        error.__cause__ = self._causes[0] if self._causes else None
        return error

    def report(self, name: str) -> NodeReport:
        """Return what was done, or would be, on one node."""
        change = self.changes[name]
        return NodeReport(
            node=name,
            mode=self.modes[name].name,
            old=change.go,
            new=tuple(self.named[name]),
            kept=tuple(change.keep),
            keys=sum(self.evacuation.keys.get(worker, 0) for worker in change.go),
            nbytes=sum(self.evacuation.nbytes.get(worker, 0) for worker in change.go),
            **{step: self._seconds.get((step, name), 0.0) for step in ("start", "retire", "stop")},
        )
