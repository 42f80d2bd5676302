"""Execution of a rollout: run its waves one after the other; watch, pause, cancel and report.

:class:`Rolling` feeds the pure :class:`~agentcluster.scheduler.planning.rollout.Rollout` with events, and carries its
commands out with one :class:`~agentcluster.scheduler.swap.Swap` per wave. It lives in the scheduler: the client that
asked for it may go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from distributed import Scheduler

from agentcluster.errors import AgentClusterError, SwapError
from agentcluster.model import NodePlan, NodeReport
from agentcluster.requests import RolloutPolicy
from agentcluster.scheduler.managers import PassOn, keep_names
from agentcluster.scheduler.planning import change as allocate
from agentcluster.scheduler.planning.change import Proposal, planned
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
from agentcluster.scheduler.swap import Limits, Swap
from agentcluster.wire import TOPIC, to_wire

logger = logging.getLogger(__name__)

Outcome = Literal["changed", "unchanged", "failed", "rolled back"]


@dataclass
class Rolling:
    """One rollout.

    Parameters
    ----------
    scheduler
        The scheduler, in this process.
    label
        What it is called: the mode that was asked for.
    proposals
        Node name -> what is to change there.
    terms, limits
        How.
    notify
        Called after nodes changed their state.
    pass_on
        Called before workers leave a node and after it has changed; see
        :meth:`agentcluster.scheduler.managers.Tracked.pass_on`.
    """

    scheduler: Scheduler
    label: str
    proposals: Mapping[str, Proposal]
    terms: RolloutPolicy
    limits: Limits
    notify: Callable[[], Coroutine[Any, Any, None]]
    pass_on: PassOn = keep_names
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.before: dict[str, NodePlan] = {name: p.node.plan for name, p in self.proposals.items()}
        self.rollout = Rollout(tuple(self._waves()), self.terms.on_failure)
        self.steps: dict[str, dict[str, Any]] = {name: {"step": "waiting"} for name in self.proposals}
        self._resumed: asyncio.Queue[RolloutCommand | None] = asyncio.Queue()
        self._reports: dict[str, NodeReport] = {}
        self._whys: list[str] = []
        self._causes: list[AgentClusterError] = []
        self._both = False
        self._back: frozenset[str] = frozenset()
        self._swap: Swap | None = None
        self._clock = time.perf_counter()

    def _waves(self) -> Iterable[tuple[str, ...]]:
        surge = [name for name, proposal in self.proposals.items() if proposal.strategy == "surge"]
        others = [name for name in self.proposals if name not in surge]
        size = self.terms.max_parallel or max(1, len(surge))
        if self.terms.canary and len(self.proposals) > 1:
            first = surge or others
            yield (first.pop(0),)
        for nodes, count in ((surge, size), (others, self.terms.max_parallel or 1)):
            for start in range(0, len(nodes), count):
                yield tuple(nodes[start : start + count])

    # -- from outside --------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Begin no further wave until :meth:`resume`."""
        self._control(Pause())

    def resume(self) -> None:
        """Go on."""
        self._control(Resume())

    def cancel(self, why: str) -> None:
        """End it; what was changed is treated as the terms say for a failure."""
        self._control(Cancel(why))
        if self._swap is not None and self.rollout.state == "running":
            self._swap.cancel(why)

    def _control(self, event: RolloutEvent) -> None:
        paused = self.rollout.state == "paused"
        self.rollout, command = roll_on(self.rollout, event)
        if paused and self.rollout.state != "paused":
            self._resumed.put_nowait(command)
        self._log({"action": type(event).__name__.lower()})

    def status(self) -> dict[str, Any]:
        """Return how far it is, as plain data."""
        return {
            "mode": self.label,
            "state": self.rollout.state,
            "pausing": self.rollout.pausing,
            "seconds": time.perf_counter() - self._clock,
            "wave": self.rollout.position,
            "waves": [list(wave) for wave in self.rollout.waves],
            "nodes": {name: to_wire(step) for name, step in self.steps.items()},
        }

    # -- carrying out --------------------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Carry it out and return the report.

        Raises
        ------
        SwapError
            When not all nodes have their new workers; it says what is true, and has the report.
        """
        self._log({"action": "began", "waves": [list(wave) for wave in self.rollout.waves]})
        self.rollout, command = roll(self.rollout)
        while self.rollout.state != "over":
            if command is None:
                self._log({"action": "paused"})
                command = await self._resumed.get()
            else:
                event = await self._do(command)
                self.rollout, command = roll_on(self.rollout, event)
        report = self.report()
        self._log({"action": "ended", "outcomes": {name: node["outcome"] for name, node in report["nodes"].items()}})
        if self._whys or self.rollout.cancelled:
            raise self._error(report)
        return report

    async def _do(self, command: RolloutCommand) -> RolloutEvent:
        match command:
            case RunWave(nodes):
                return WaveEnded(await self._run({name: self.proposals[name] for name in nodes}))
            case RunBack(nodes):
                back = {name: self._return(name) for name in nodes}
                failed = await self._run(back, back=True)
                self._back = frozenset(nodes) - failed
                for which, became in ((self._back, "was brought back"), (failed, "could not be brought back")):
                    self._whys += [f"{name} {became}" for name in nodes if name in which]
                return BackEnded(failed)

    async def _run(self, proposals: Mapping[str, Proposal], back: bool = False) -> frozenset[str]:
        failed: set[str] = set()
        for nodes in _together(proposals, back):
            chosen = {name: _now(proposals[name]) for name in nodes if proposals[name].node.state != "lost"}
            failed |= self._lost(set(nodes) - set(chosen), proposals)
            if not chosen:
                continue
            swap = self._swap = Swap(
                self.scheduler,
                chosen,
                self.limits,
                drain="data" if back and self.terms.drain == "tasks" else self.terms.drain,
                tolerant=self.terms.on_failure == "continue" or back,
                tell=self._tell,
                pass_on=self.pass_on,
            )
            if self.rollout.cancelled is not None and not back:
                swap.cancel(self.rollout.cancelled)  # in the moment before the wave began
            try:
                wave = await swap.run()
            finally:
                self._swap = None
                await self.notify()
            failed |= wave.failed_nodes
            failed |= self._lost({name for name, each in chosen.items() if each.node.state == "lost"}, proposals)
            self._both = self._both or wave.both
            if wave.failures:
                self._whys.append(swap.why())
                self._causes += swap.causes
            if not back:
                self._reports |= {name: swap.report(name) for name in chosen}
        return frozenset(failed)

    def _lost(self, nodes: Iterable[str], proposals: Mapping[str, Proposal]) -> set[str]:
        """Return those of the lost nodes that were to have new workers; the rollout goes on, or back, without them."""
        failed = {name for name in nodes if proposals[name].named}
        self._whys += [f"node {name} is lost ({proposals[name].node.problem})" for name in sorted(failed)]
        return failed

    def _return(self, name: str) -> Proposal:
        """Return the change that brings a node back to the plan that it had."""
        proposal, plan = self.proposals[name], self.before[name]
        change = allocate.difference(proposal.node.plan.workers, list(plan.workers.values()))
        named = dict(zip(proposal.node.take_names(len(change.come)), change.come, strict=True))
        return replace(proposal, change=change, named=named, mode=plan.mode)

    def _tell(self, node: str, step: str, facts: Mapping[str, Any]) -> None:
        known = self.steps[node]
        if known["step"] != step:
            self._log({"action": "step", "node": node, "step": step})
            logger.info("Node %s: %s", node, step)
        self.steps[node] = {"step": step, **facts}

    def _log(self, message: Mapping[str, Any]) -> None:
        self.scheduler.log_event(TOPIC, {"rollout": self.label, "began": self.began, **to_wire(message)})

    # -- what became of it ---------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return what was done, or would be, on each node, as plain data."""
        nodes = {}
        for name, proposal in self.proposals.items():
            report = self._reports.get(name) or planned(name, proposal)
            nodes[name] = to_wire(replace(report, outcome=self.outcome(name)))
        return {
            "mode": self.label,
            "nodes": nodes,
            "seconds": time.perf_counter() - self._clock,
            "dry_run": self.terms.dry_run,
        }

    def outcome(self, name: str) -> Outcome:
        """Return what became of a node."""
        if name in self._back:
            return "rolled back"
        if name in self.rollout.failed:
            return "failed"
        proposal = self.proposals[name]
        same = not proposal.change.go and not proposal.change.come and proposal.mode == self.before[name].mode
        return "changed" if name in self.rollout.changed and not same else "unchanged"

    def _error(self, report: dict[str, Any]) -> SwapError:
        changed = [name for name in self.proposals if self.outcome(name) == "changed"]
        if self._both:
            state = "old and new workers both run, because the new ones hold data that could not be moved either"
        elif changed:
            state = f"{', '.join(changed)} changed, the other nodes have the workers that they had"
        else:
            state = "the workers that ran before still run, nothing was lost"
        empty = [name for name, p in self.proposals.items() if not p.node.plan.workers and self.before[name].workers]
        if empty:
            state = f"{', '.join(empty)} has no workers, the others have those that they had"
        why = "; ".join(dict.fromkeys(filter(None, self._whys))) or str(self.rollout.cancelled)
        error = SwapError(why, state, report)
        error.__cause__ = self._causes[0] if self._causes else None
        return error


def _together(proposals: Mapping[str, Proposal], back: bool) -> Iterable[Sequence[str]]:
    """Return the nodes that change at the same time: a wave's, or, of those that are brought back, all that can."""
    surge = [name for name, each in proposals.items() if each.strategy == "surge"]
    others = [name for name in proposals if name not in surge]
    # Where the old go first, their data needs the workers of nodes that do not change just then.
    return filter(None, [surge, *([name] for name in others)] if back else [surge, others])


def _now(proposal: Proposal) -> Proposal:
    """Return a proposal without the workers that ended while their node's turn was waited for."""
    change = proposal.change
    go = tuple(worker for worker in change.go if worker in proposal.node.plan.workers)
    keep = {worker: spec for worker, spec in change.keep.items() if worker in proposal.node.plan.workers}
    return replace(proposal, change=replace(change, go=go, keep=keep))
