"""Execution of one wave: turn the commands of a pure wave into calls, and measure them.

:class:`Swap` sits between :mod:`agentcluster.scheduler.planning.wave` and what can act: the agents, by RPC, and
:mod:`agentcluster.scheduler.evacuation`, on the scheduler's own state. It settles each node's plan when it is over,
whatever happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Scheduler

from agentcluster.errors import AgentClusterError, WorkerStartError
from agentcluster.model import NodeReport, WorkerSpec, WorkerState
from agentcluster.requests import Drain
from agentcluster.scheduler.evacuation import Evacuation, Progress, evacuate
from agentcluster.scheduler.managers import PassOn, keep_names
from agentcluster.scheduler.planning.change import Proposal, planned
from agentcluster.scheduler.planning.wave import (
    Cancelled,
    Command,
    Event,
    GiveUpRetiring,
    GiveUpStarting,
    NodeChange,
    Retired,
    RetireNew,
    RetireOld,
    RetireRefused,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Wave,
    advance,
    begin,
)
from agentcluster.wire import from_wire, to_wire

logger = logging.getLogger(__name__)

GIVEN_UP = "the moving of data was given up"


@dataclass(frozen=True)
class Limits:
    """Seconds that each step of a swap may take.

    Attributes
    ----------
    start
        For all new workers of a node to join.
    drain
        For running tasks to end.
    retire
        For all data to move, after that.
    stop
        For a node's old workers to end.
    """

    start: float
    drain: float
    retire: float
    stop: float


@dataclass
class Swap:
    """Carries out one wave.

    Parameters
    ----------
    scheduler
        The scheduler, in this process.
    proposals
        Node name -> what is to change there; all of one strategy.
    limits
        Seconds for each step.
    drain
        What happens to running tasks, and to data.
    tolerant
        Whether a node whose workers do not start is left out.
    tell
        Called with a node's name, the step that it is in, and facts about it.
    pass_on
        Called before workers leave, and at the end.
    """

    scheduler: Scheduler
    proposals: Mapping[str, Proposal]
    limits: Limits
    drain: Drain = "tasks"
    tolerant: bool = False
    tell: Callable[[str, str, Mapping[str, Any]], None] = lambda node, step, facts: None
    pass_on: PassOn = keep_names
    evacuation: Evacuation = field(default_factory=Evacuation)
    wave: Wave = field(default_factory=lambda: Wave(()))

    def __post_init__(self) -> None:
        self.causes: list[AgentClusterError] = []
        self._seconds: dict[tuple[str, str], float] = {}
        self._started: dict[str, list[WorkerState]] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._starting: dict[str, asyncio.Future[Any]] = {}
        self._moving: asyncio.Future[Evacuation] | None = None
        self._given_up: set[type[Command]] = set()
        self._emptied: set[str] = set()
        self._renamed: dict[str, str] = {}
        strategies = {proposal.strategy for proposal in self.proposals.values()}
        changes = []
        self._back: dict[str, dict[str, WorkerSpec]] = {}
        for name, proposal in self.proposals.items():
            back: tuple[str, ...] = ()
            if proposal.strategy == "replace":
                back = tuple(proposal.node.take_names(len(proposal.change.go)))
                specs = [proposal.node.plan.workers[worker] for worker in proposal.change.go]
                self._back[name] = dict(zip(back, specs, strict=True))
            changes.append(NodeChange(name, proposal.change.go, tuple(proposal.named), back))
        [strategy] = strategies or {"surge"}
        self.wave = Wave(tuple(changes), strategy, self.tolerant)

    def cancel(self, why: str) -> None:
        """End with the old workers, if that is still possible."""
        if self.wave.phase == "new":
            self.wave, _ = advance(self.wave, Cancelled(why))
        else:
            self._events.put_nowait(Cancelled(why))

    async def run(self) -> Wave:
        """Carry the wave out; return how it ended. Each node's plan says then what is true."""
        try:
            for name, proposal in self.proposals.items():
                proposal.node.to("swap")
                self.tell(name, "swap", {"strategy": proposal.strategy})
            await self._drive()
        finally:
            for name, proposal in self.proposals.items():
                if proposal.node.state == "swapping":
                    self._settle(name, proposal)
        await asyncio.gather(*(self._pass_on(each, each.node.plan.workers) for each in self.proposals.values()))
        return self.wave

    async def _give_names(self, back: bool) -> None:
        """Give the names of workers that are about to leave to those that stay: new ones, or when `back` the old."""

        async def one(each: Proposal) -> None:
            come, go = tuple(each.named) if each.strategy == "surge" else (), each.change.go
            stay, leave = (go, come) if back else (come, go)
            await self._pass_on(each, self._now([*each.change.keep, *stay]), self._now(leave))

        await asyncio.gather(*map(one, self.proposals.values()))

    async def _pass_on(self, proposal: Proposal, staying: Iterable[str], leaving: Collection[str] = ()) -> None:
        renamed = await self.pass_on(proposal.node, staying, leaving)
        planned = {now: name for name, now in self._renamed.items()}
        self._renamed |= {planned.get(before, before): now for before, now in renamed.items()}

    def _now(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names that workers have by now."""
        return tuple(self._renamed.get(name, name) for name in names)

    async def _drive(self) -> None:
        running: set[asyncio.Task[None]] = set()

        def carry_out(commands: Iterable[Command]) -> None:
            for command in commands:
                if isinstance(command, GiveUpStarting | GiveUpRetiring):
                    self._give_up(command)
                    continue
                if isinstance(command, Stop) and self.wave.phase == "stopping":
                    self._emptied.add(command.node)
                task = asyncio.create_task(self._answer(command))
                running.add(task)
                task.add_done_callback(running.discard)

        try:
            self.wave, commands = begin(self.wave)
            carry_out(commands)
            while not self.wave.over:
                self.wave, commands = advance(self.wave, await self._events.get())
                carry_out(commands)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _give_up(self, command: GiveUpStarting | GiveUpRetiring) -> None:
        # What it is about may have been ordered in the same turn of the loop, and not have begun.
        self._given_up.add(type(command))
        under_way = self._starting.values() if isinstance(command, GiveUpStarting) else [self._moving]
        for each in filter(None, list(under_way)):
            each.cancel()

    async def _answer(self, command: Command) -> None:
        """Carry a command out; whatever goes wrong, it is answered: a wave without an answer would hang."""
        try:
            event = await self._do(command)
        except Exception as error:  # a fault of ours, or of the scheduler's
            logger.exception("%s could not be carried out", command)
            match command:
                case Start(node, workers):
                    await self._stop(node, workers)
                    event = StartFailed(node, repr(error))
                case Stop(node):
                    event = Stopped(node)
                case _:
                    event = RetireRefused(repr(error))
        self._events.put_nowait(event)

    async def _do(self, command: Command) -> Event:
        began = time.perf_counter()
        match command:
            case Start(node, workers):
                self.tell(node, "start", {"workers": workers})
                event = await self._start(node, workers)
                self._seconds["start", node] = time.perf_counter() - began
            case RetireOld(workers):
                await self._give_names(back=False)
                event = await self._retire(workers, self.drain)
                for name, proposal in self.proposals.items():
                    if proposal.change.go:
                        self._seconds["retire", name] = time.perf_counter() - began - self.evacuation.drain
                        self._seconds["drain", name] = self.evacuation.drain
            case RetireNew(workers):
                await self._give_names(back=True)
                event = await self._retire(workers, "data", back=True)
            case Stop(node, workers):
                self.tell(node, "stop", {"workers": workers})
                await self._stop(node, workers)
                self._seconds["stop", node] = time.perf_counter() - began
                event = Stopped(node)
            case _:
                raise AssertionError(command)
        return event

    async def _start(self, node: str, workers: tuple[str, ...]) -> Event:
        named = {**self.proposals[node].named, **self._back.get(node, {})}
        specs = to_wire({worker: named[worker] for worker in workers})
        if GiveUpStarting in self._given_up:
            return StartFailed(node, "it was given up")
        call = asyncio.ensure_future(self._agent(node).start_workers(specs=specs, timeout=self.limits.start))
        self._starting[node] = call
        try:
            # The agent ends a late start itself, within the timeout that it is given.
            async with asyncio.timeout(self.limits.start + self.limits.stop):
                answer = await call
            if "failures" in answer:
                cause = WorkerStartError(node, answer["failures"])
                self.causes.append(cause)
                return StartFailed(node, str(cause))
            self._started[node] = [from_wire(WorkerState, state) for state in answer["states"]]
        except asyncio.CancelledError:
            await asyncio.shield(self._stop(node, workers))
            if _ending():
                raise
            return StartFailed(node, "it was given up")
        except Exception as error:  # whatever an agent raises or answers must end the change, not hang it
            # It may be late only: what it still starts belongs to no plan.
            await self._stop(node, workers)
            return StartFailed(node, f"the agent on {node} failed: {error or type(error).__name__}")
        return Started(node)

    async def _retire(self, workers: tuple[str, ...], drain: Drain, back: bool = False) -> Event:
        def progress(now: Progress) -> None:
            for name, proposal in self.proposals.items():
                if proposal.change.go:
                    self.tell(name, "retire", vars(now))

        workers = self._now(workers)
        if not back and GiveUpRetiring in self._given_up:
            return RetireRefused(GIVEN_UP)
        self._moving = asyncio.ensure_future(
            evacuate(
                self.scheduler,
                workers,
                self.limits.retire,
                drain=drain,
                drain_timeout=self.limits.drain,
                progress=progress,
            )
        )
        try:
            evacuation = await self._moving
        except asyncio.CancelledError:
            if _ending():
                raise
            if not self._present(workers):
                return Retired()
            return RetireRefused(GIVEN_UP)
        except Exception as error:  # a fault in the scheduler must end the change, not hang it
            logger.exception("Moving data off %s failed", ", ".join(workers))
            return RetireRefused(f"moving data failed: {error!r}")
        if not back:
            self.evacuation = evacuation
        return RetireRefused(evacuation.problem) if evacuation.problem else Retired()

    def _present(self, workers: tuple[str, ...]) -> list[Any]:
        return [ws for ws in self.scheduler.workers.values() if str(ws.name) in workers]

    async def _stop(self, node: str, workers: tuple[str, ...]) -> None:
        try:
            async with asyncio.timeout(2 * self.limits.stop):
                await self._agent(node).stop_workers(names=self._now(workers), timeout=self.limits.stop)
        except Exception as error:  # the scheduler turns whatever the agent raised into a plain Exception
            # The workers hold nothing and are out of the scheduler; if the agent is gone they ended with it.
            logger.warning("Node %s did not confirm the end of %s: %s", node, ", ".join(workers), error)

    def _agent(self, node: str) -> Any:
        return self.scheduler.rpc(self.proposals[node].node.address)

    # -- what is true afterwards ---------------------------------------------------------------------------------------

    def _settle(self, name: str, proposal: Proposal) -> None:
        node, wave = proposal.node, self.wave
        gone = self._now(proposal.change.go)
        named = dict(zip(self._now(proposal.named), proposal.named.values(), strict=True))
        old = {worker: spec for worker, spec in node.plan.workers.items() if worker not in gone}
        changed = wave.started if wave.strategy == "replace" else self._emptied
        if name in changed or (wave.over and name not in wave.failed_nodes):
            node.adopt(proposal.mode, {**old, **named})
        elif name in self._emptied:
            restored = self._back[name] if name in wave.restored else {}
            node.adopt(node.plan.mode, {**old, **restored})
        elif wave.both and name in wave.started:
            node.adopt(proposal.mode, {**node.plan.workers, **named})
        elif not node.plan.revision:
            node.to("refused")
            node.problem = self.why() or "it was not given its workers"
            return
        else:
            node.settle()
        for state in self._started.get(name, ()):
            [worker] = self._now([state.name])
            if worker in node.plan.workers:
                node.workers[worker] = replace(state, name=worker)
        self.tell(name, node.state, {"workers": tuple(node.plan.workers)})
        logger.info("Node %s runs %d workers in mode %s", name, len(node.plan.workers), node.plan.mode.name)

    def why(self) -> str:
        """Return what went wrong, in one sentence; "" when nothing did."""
        return "; ".join(dict.fromkeys(why for _, why in self.wave.failures))

    def report(self, name: str) -> NodeReport:
        """Return what was done on one node."""
        proposal = self.proposals[name]
        go = self._now(proposal.change.go)
        return replace(
            planned(name, proposal),
            new=self._now(proposal.named),
            keys=sum(self.evacuation.keys.get(worker, 0) for worker in go),
            nbytes=sum(self.evacuation.nbytes.get(worker, 0) for worker in go),
            rerun=sum(self.evacuation.rerun.get(worker, 0) for worker in go),
            start=self._step("start", name),
            drain=self._step("drain", name),
            retire=self._step("retire", name),
            stop=self._step("stop", name),
        )

    def _step(self, step: str, name: str) -> float:
        return max(0.0, self._seconds.get((step, name), 0.0))


def _ending() -> bool:
    """Whether it is the task itself that was cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
