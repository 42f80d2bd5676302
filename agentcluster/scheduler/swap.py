"""Execution of one wave: turn the commands of the pure wave into calls, and settle each node's plan afterwards.

:class:`Swap` sits between :mod:`agentcluster.scheduler.planning.wave`, which decides, and what acts: the agents, by
RPC, and :mod:`agentcluster.scheduler.evacuation`, on the scheduler's own state. When it is over, whatever happened, the
plan of each node says which workers the node has; :func:`outcome_of` and :data:`PLANS` are the table of that.

Invariants:

- Each command but the two ``GiveUp…`` is answered by exactly one event, also when carrying it out raises; a wave
  without an answer would hang.
- A node is ``swapping`` while its swap runs, and never afterwards, also when the swap is cancelled from outside.
- Workers whose start was given up, or failed, are stopped before the failure is reported: none of them runs.
- A change and its wave name workers as planned. External names may be passed from worker to worker meanwhile:
  :class:`_Record` maps planned names to present ones, and all calls use the present ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, assert_never

from distributed import Scheduler
from distributed.core import PooledRPCCall

from agentcluster.errors import AgentClusterError, WorkerStartError, WorkerStartTimeout
from agentcluster.model import NodeProgress, NodeReport, WorkerSpec, WorkerState
from agentcluster.requests import Bound, Drain
from agentcluster.scheduler.departures import Bindings
from agentcluster.scheduler.evacuation import Evacuation, evacuate
from agentcluster.scheduler.managers import ExternalNames
from agentcluster.scheduler.planning.change import NodeChange
from agentcluster.scheduler.planning.wave import (
    Cancelled,
    Command,
    Event,
    GiveUpRetiring,
    GiveUpStarting,
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

if TYPE_CHECKING:
    from agentcluster.scheduler.rollouts import RolloutEvents

logger = logging.getLogger(__name__)

MOVING_GIVEN_UP = "the moving of data was given up"
START_GIVEN_UP = "it was given up"

TimedStep = Literal["start", "drain", "retire", "stop"]


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


@dataclass(frozen=True)
class RolloutContext:
    """Objects that all swaps of a rollout share.

    Attributes
    ----------
    scheduler
        The scheduler, in this process.
    names
        Keeps the external names of nodes that change.
    bindings
        Know the tasks that are bound to workers.
    events
        Records the steps of nodes.
    limits
        Seconds for each step.
    """

    scheduler: Scheduler
    names: ExternalNames
    bindings: Bindings
    events: RolloutEvents
    limits: Limits


# -- outcomes ----------------------------------------------------------------------------------------------------------

NodeOutcome = Literal["changed", "both", "restored", "emptied", "unchanged", "refused"]


@dataclass(frozen=True)
class PlanAfter:
    """Workers in a node's plan after a swap, beside those that the change keeps.

    Attributes
    ----------
    old, new, restored
        Whether the plan has the workers that the change removes, those that it adds, and those started in place of the
        removed ones.
    new_mode
        Whether the node has the mode of the change.
    """

    old: bool = False
    new: bool = False
    restored: bool = False
    new_mode: bool = False


#: Outcome -> the plan that a node gets; None where its plan stays as it is.
PLANS: Mapping[NodeOutcome, PlanAfter | None] = {
    "changed": PlanAfter(new=True, new_mode=True),
    "both": PlanAfter(old=True, new=True, new_mode=True),
    "restored": PlanAfter(restored=True),
    "emptied": PlanAfter(),
    "unchanged": None,
    "refused": None,
}


def outcome_of(wave: Wave, node: str, *, stopping: bool, planned: bool = True) -> NodeOutcome:
    """Return what a wave that has ended, or was interrupted, has made of a node.

    ========  ===========================================  =========
    strategy  the node                                     outcome
    ========  ===========================================  =========
    surge     is not failed in a wave that is over         changed
    surge     its old workers were being stopped           changed
    surge     its new workers run, and none could retire   both
    replace   is not failed in a wave that is over         changed
    replace   its new workers run                          changed
    replace   its old workers were stopped, then restored  restored
    replace   its old workers were stopped                 emptied
    any       had a plan before                            unchanged
    any       had none                                     refused
    ========  ===========================================  =========

    The first line that is true counts.

    Parameters
    ----------
    wave
        The wave.
    node
        Name of the node.
    stopping
        Whether the end of its old workers was ordered: with ``surge`` the new ones are then there for good, with
        ``replace`` the old ones are gone.
    planned
        Whether the node had a plan before.
    """
    if wave.over and node not in wave.failed_nodes:
        return "changed"
    match wave.strategy:
        case "surge":
            if stopping:
                return "changed"
            if wave.both and node in wave.started:
                return "both"
        case "replace":
            if node in wave.started:
                return "changed"
            if stopping:
                return "restored" if node in wave.restored else "emptied"
        case _:
            assert_never(wave.strategy)
    return "unchanged" if planned else "refused"


# -- execution ---------------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    """Facts about a swap, collected while it runs and read when it is over.

    Attributes
    ----------
    seconds
        Step and node -> time that it took.
    states
        Node -> the workers that its agent started.
    stopping
        Nodes whose old workers were ordered to end.
    causes
        Errors of workers that did not start.
    evacuation
        Result of the evacuation of the old workers.
    renamed
        Planned name of a worker -> its present one.
    """

    seconds: dict[tuple[TimedStep, str], float] = field(default_factory=dict)
    states: dict[str, list[WorkerState]] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    causes: list[AgentClusterError] = field(default_factory=list)
    evacuation: Evacuation = field(default_factory=Evacuation)
    renamed: dict[str, str] = field(default_factory=dict)

    def present(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the present names of workers."""
        return tuple(self.renamed.get(name, name) for name in names)

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Add a renaming of workers: present name -> next name."""
        planned = {now: name for name, now in self.renamed.items()}
        self.renamed |= {planned.get(before, before): now for before, now in renamed.items()}

    def taken(self, step: TimedStep, node: str) -> float:
        """Return the time of a step on a node; 0.0 when it was not taken."""
        return max(0.0, self.seconds.get((step, node), 0.0))


@dataclass
class _Calls:
    """Calls in flight that a wave may give up.

    Attributes
    ----------
    starting
        Node -> the call that starts its workers.
    moving
        The evacuation that runs.
    given_up
        Kinds of calls that were given up, and do not begin either.
    """

    starting: dict[str, asyncio.Future[Mapping[str, object]]] = field(default_factory=dict)
    moving: asyncio.Future[Evacuation] | None = None
    given_up: set[type[Command]] = field(default_factory=set)

    def give_up(self, command: GiveUpStarting | GiveUpRetiring) -> None:
        """Cancel the calls that a command is about."""
        # They may have been ordered in the same turn of the loop, and not have begun.
        self.given_up.add(type(command))
        if isinstance(command, GiveUpStarting):
            for call in self.starting.values():
                call.cancel()
        elif self.moving is not None:
            self.moving.cancel()


class Swap:
    """Carry one wave out.

    Parameters
    ----------
    context
        Objects that all swaps of the rollout share.
    changes
        Node name -> its change; all of one strategy.
    drain
        Treatment of running tasks and of data.
    bound
        Treatment of tasks that are bound to old workers.
    tolerant
        Whether a node whose workers do not start is left out, instead of failing the others.

    Attributes
    ----------
    wave
        State of the wave.
    """

    def __init__(
        self,
        context: RolloutContext,
        changes: Mapping[str, NodeChange],
        *,
        drain: Drain = "tasks",
        bound: Bound = "follow",
        tolerant: bool = False,
    ) -> None:
        self.context = context
        self.changes = {name: _restorable(change) for name, change in changes.items()}
        self.drain = drain
        self.bound = bound
        [strategy] = {change.strategy for change in self.changes.values()} or {"surge"}
        self.wave = Wave(tuple(self.changes.values()), strategy, tolerant)
        self._record = _Record()
        self._calls = _Calls()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def cancel(self, why: str) -> None:
        """End with the old workers, if that is still possible.

        Parameters
        ----------
        why
            The reason, for the report.
        """
        if self.wave.phase == "new":
            self.wave, _ = advance(self.wave, Cancelled(why))
        else:
            self._queue.put_nowait(Cancelled(why))

    async def run(self) -> Wave:
        """Carry the wave out and settle the plans of its nodes.

        Returns
        -------
        Wave
            Its last state.
        """
        try:
            for name, change in self.changes.items():
                change.node.to("swap")
                self.context.events.node_step(name, "swap", {"strategy": change.strategy})
            await self._drive()
        finally:
            for name, change in self.changes.items():
                if change.node.state == "swapping":
                    self._settle(name, change)
        await asyncio.gather(*(self._keep_names(each, each.node.plan.workers) for each in self.changes.values()))
        return self.wave

    async def _drive(self) -> None:
        """Feed the wave with events, and carry out its commands, until it is over."""
        running: set[asyncio.Task[None]] = set()

        def carry_out(commands: Iterable[Command]) -> None:
            for command in commands:
                if isinstance(command, GiveUpStarting | GiveUpRetiring):
                    self._calls.give_up(command)
                    continue
                if isinstance(command, Stop) and self.wave.phase == "stopping":
                    self._record.stopping.add(command.node)
                task = asyncio.create_task(self._answer(command))
                running.add(task)
                task.add_done_callback(running.discard)

        try:
            self.wave, commands = begin(self.wave)
            carry_out(commands)
            while not self.wave.over:
                self.wave, commands = advance(self.wave, await self._queue.get())
                carry_out(commands)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, command: Command) -> None:
        """Carry a command out and put its answer into the queue, also when it raises."""
        try:
            event = await self._do(command)
        except Exception as error:  # a fault of agentcluster, or of the scheduler
            logger.exception("%s could not be carried out", command)
            match command:
                case Start(node, workers):
                    await self._stop(node, workers)
                    event = StartFailed(node, repr(error))
                case Stop(node):
                    event = Stopped(node)
                case _:
                    event = RetireRefused(repr(error))
        self._queue.put_nowait(event)

    async def _do(self, command: Command) -> Event:
        began = time.perf_counter()
        match command:
            case Start(node, workers):
                self.context.events.node_step(node, "start", {"workers": workers})
                event = await self._start(node, workers)
                self._record.seconds["start", node] = time.perf_counter() - began
            case RetireOld(workers):
                await self._pass_names_to("new")
                self._succeed("new")
                event = await self._retire_old(workers)
                drain = self._record.evacuation.drain
                for name in self._leaving_nodes():
                    self._record.seconds["retire", name] = time.perf_counter() - began - drain
                    self._record.seconds["drain", name] = drain
            case RetireNew(workers):
                await self._pass_names_to("old")
                self._succeed("old")
                event, _ = await self._evacuate(workers, "data")
            case Stop(node, workers):
                self.context.events.node_step(node, "stop", {"workers": workers})
                await self._stop(node, workers)
                self._record.seconds["stop", node] = time.perf_counter() - began
                event = Stopped(node)
            case _:
                raise AssertionError(command)
        return event

    async def _start(self, node: str, workers: tuple[str, ...]) -> Event:
        limits, change = self.context.limits, self.changes[node]
        named: dict[str, WorkerSpec] = {**change.new, **change.restored}
        specs = to_wire({worker: named[worker] for worker in workers})
        if GiveUpStarting in self._calls.given_up:
            return StartFailed(node, START_GIVEN_UP)
        call = asyncio.ensure_future(self._agent(node).start_workers(specs=specs, timeout=limits.start))
        self._calls.starting[node] = call
        try:
            # The agent ends a late start itself, within the timeout that it is given.
            async with asyncio.timeout(limits.start + limits.stop):
                answer = await self.context.events.nodes.unless_lost(change.node, call)
            if answer is None:
                return StartFailed(node, f"node {node} was lost")
            if "failures" in answer:
                error = WorkerStartTimeout if answer.get("late") else WorkerStartError
                cause = error(node, answer["failures"])
                self._record.causes.append(cause)
                return StartFailed(node, str(cause))
            self._record.states[node] = [from_wire(WorkerState, state) for state in answer["states"]]
        except asyncio.CancelledError:
            await asyncio.shield(self._stop(node, workers))
            if _ending():
                raise
            return StartFailed(node, START_GIVEN_UP)
        except Exception as error:  # whatever an agent raises or answers must end the change, not hang it
            # It may only be late: what it still starts is in no plan.
            await self._stop(node, workers)
            return StartFailed(node, f"the agent on {node} failed: {error or type(error).__name__}")
        self.context.bindings.arrive(node, self._record.present(workers))
        return Started(node)

    async def _retire_old(self, workers: tuple[str, ...]) -> Event:
        if GiveUpRetiring in self._calls.given_up:
            return RetireRefused(MOVING_GIVEN_UP)
        event, evacuation = await self._evacuate(workers, self.drain)
        self._record.evacuation = evacuation or self._record.evacuation
        return event

    async def _evacuate(self, planned: tuple[str, ...], drain: Drain) -> tuple[Event, Evacuation | None]:
        """Move data off workers and remove them from the scheduler; there is no result when it was given up."""
        scheduler, limits = self.context.scheduler, self.context.limits
        workers = self._record.present(planned)
        self._calls.moving = asyncio.ensure_future(
            evacuate(
                scheduler,
                workers,
                limits.retire,
                drain=drain,
                drain_timeout=limits.drain,
                bound=self.bound,
                progress=self._data_moved,
            )
        )
        try:
            evacuation = await self._calls.moving
        except asyncio.CancelledError:
            if _ending():
                raise
            gone = not any(str(ws.name) in workers for ws in scheduler.workers.values())
            return Retired() if gone else RetireRefused(MOVING_GIVEN_UP), None
        except Exception as error:  # a fault in the scheduler must end the change, not hang it
            logger.exception("Moving data off %s failed", ", ".join(workers))
            return RetireRefused(f"moving data failed: {error!r}"), None
        return RetireRefused(evacuation.problem) if evacuation.problem else Retired(), evacuation

    def _data_moved(self, progress: Mapping[str, NodeProgress]) -> None:
        """Record the progress of an evacuation on the nodes whose workers leave, each its own."""
        for name in self._leaving_nodes():
            present = self._record.present(self.changes[name].remove)
            if own := [progress[worker] for worker in present if worker in progress]:
                node = NodeProgress.of(own)
                self.context.events.node_step(name, node.step, vars(node))

    def _leaving_nodes(self) -> list[str]:
        """Return the nodes that have workers that leave."""
        return [name for name, change in self.changes.items() if change.remove]

    async def _stop(self, node: str, workers: tuple[str, ...]) -> None:
        limit = self.context.limits.stop
        if self.changes[node].node.state == "lost":
            return  # its workers ended with its agent
        call = self._agent(node).stop_workers(names=self._record.present(workers), timeout=limit)
        try:
            async with asyncio.timeout(2 * limit):
                await self.context.events.nodes.unless_lost(self.changes[node].node, call)
        except Exception as error:  # the scheduler turns whatever the agent raised into a plain Exception
            # The workers hold nothing and are out of the scheduler; if the agent is gone they ended with it.
            logger.warning("Node %s did not confirm the end of %s: %s", node, ", ".join(workers), error)

    def _agent(self, node: str) -> PooledRPCCall:
        return self.context.scheduler.rpc(self.changes[node].node.address)

    async def _pass_names_to(self, staying: Literal["new", "old"]) -> None:
        """Pass the external names of workers that are about to leave to those that stay."""

        async def one(change: NodeChange) -> None:
            new, old = change.names if change.strategy == "surge" else (), change.old
            stay, leave = (new, old) if staying == "new" else (old, new)
            present = self._record.present
            await self._keep_names(change, present([*change.keep, *stay]), present(leave))

        await asyncio.gather(*map(one, self.changes.values()))

    def _succeed(self, staying: Literal["new", "old"]) -> None:
        """Bind the tasks of workers that are about to leave to those that stay, once they have left."""
        for name, change in self.changes.items():
            new, old = map(self._record.present, (change.names, change.old))
            stay, leave = (new, old) if staying == "new" else (old, new)
            self.context.bindings.leave(name, leave)
            if change.strategy == "surge":
                self.context.bindings.arrive(name, stay)

    async def _keep_names(self, change: NodeChange, staying: Iterable[str], leaving: Collection[str] = ()) -> None:
        self._record.rename(await self.context.names.keep(change.node, staying, leaving))

    # -- the state afterwards ------------------------------------------------------------------------------------------

    def _settle(self, name: str, change: NodeChange) -> None:
        """Set the plan of a node to that of its outcome, and end its swap."""
        node, record = change.node, self._record
        outcome = outcome_of(self.wave, name, stopping=name in record.stopping, planned=bool(node.plan.revision))
        if outcome == "refused":
            node.to("refused")
            node.problem = self.why() or "it was not given its workers"
            return
        if (after := PLANS[outcome]) is None:
            node.settle()
        else:
            gone = () if after.old else record.present(change.old)
            workers = {worker: spec for worker, spec in node.plan.workers.items() if worker not in gone}
            if after.new:
                workers |= dict(zip(record.present(change.names), change.add, strict=True))
            if after.restored:
                workers |= change.restored
            node.adopt(change.mode if after.new_mode else node.plan.mode, workers)
        for state in record.states.get(name, ()):
            [worker] = record.present([state.name])
            if worker in node.plan.workers:
                node.workers[worker] = replace(state, name=worker)
        self.context.events.node_step(name, node.state, {"workers": tuple(node.plan.workers)})
        logger.info("Node %s runs %d workers in mode %s", name, len(node.plan.workers), node.plan.mode.name)

    @property
    def causes(self) -> list[AgentClusterError]:
        """Errors of workers that did not start."""
        return self._record.causes

    def why(self) -> str:
        """Return the reasons of failure in one sentence; "" when nothing failed."""
        return "; ".join(dict.fromkeys(why for _, why in self.wave.failures))

    def report(self, name: str) -> NodeReport:
        """Return the report of one node.

        Parameters
        ----------
        name
            Name of the node.
        """
        change, record = self.changes[name], self._record
        left = record.present(change.old)
        return replace(
            change.report(),
            new=record.present(change.names),
            keys=_total(record.evacuation.keys, left),
            nbytes=_total(record.evacuation.nbytes, left),
            given_up=_total(record.evacuation.given_up, left),
            given_up_nbytes=_total(record.evacuation.given_up_nbytes, left),
            lost=_total(record.evacuation.lost, left),
            rerun=_total(record.evacuation.rerun, left),
            followed=_total(record.evacuation.followed, left),
            start=record.taken("start", name),
            drain=record.taken("drain", name),
            retire=record.taken("retire", name),
            stop=record.taken("stop", name),
        )


def _total(numbers: Mapping[str, int], workers: Iterable[str]) -> int:
    return sum(numbers.get(worker, 0) for worker in workers)


def _restorable(change: NodeChange) -> NodeChange:
    """Return a change with names for its old workers, where they may have to be started again."""
    if change.strategy == "surge":
        return change
    return replace(change, restore_names=tuple(change.node.take_names(len(change.remove))))


def _ending() -> bool:
    """Return whether the current task itself was cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
