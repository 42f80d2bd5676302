"""Provision, reprovision, scale, retire, adapt and undo: turn a request into a rollout.

:class:`Controller` belongs to the plugin. It plans with :mod:`agentcluster.scheduler.planning`, asks the agents whether
the plan is possible (preflight: every refusal at once, before anything is touched), and runs it as a
:class:`~agentcluster.scheduler.rollouts.RolloutRun`. One rollout runs at a time; a second one waits or is refused.
Nodes that join meanwhile are provisioned beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from dask.utils import format_bytes
from distributed import Scheduler

from agentcluster import modes
from agentcluster.config import Config
from agentcluster.errors import (
    AgentClusterError,
    ConfigError,
    ModeRefused,
    PreflightError,
    RolloutBusy,
    SwapError,
    suggest,
)
from agentcluster.model import Mode, NodePlan, WorkerSpec
from agentcluster.requests import AdaptiveRequest, RolloutPolicy, ScaleTarget
from agentcluster.scheduler import preflight
from agentcluster.scheduler.autoscaling import Autoscaler, DemandWatch, label
from agentcluster.scheduler.departures import BINDINGS, Bindings
from agentcluster.scheduler.managers import ExternalNames
from agentcluster.scheduler.metrics import RolloutTotals
from agentcluster.scheduler.planning.binpacking import Packing
from agentcluster.scheduler.planning.change import NodeChange, change_to, change_without
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.scheduler.planning.scaling import plan_scale
from agentcluster.scheduler.rollouts import Answer, NodeEvents, RolloutEvents, RolloutRun
from agentcluster.scheduler.swap import Limits, RolloutContext

logger = logging.getLogger(__name__)

#: Actions on the rollout that runs.
ACTIONS = ("pause", "resume", "cancel")


@dataclass(frozen=True)
class _Undo:
    """State before the last rollout: the plans of its nodes, the default mode, and modes set by node name."""

    plans: Mapping[str, NodePlan]
    default: Mode
    wanted: Mapping[str, Mode]


class Controller:
    """Plan, check and carry out changes of workers on the nodes of one scheduler.

    Parameters
    ----------
    scheduler, registry, config
        The scheduler, its nodes, and the options.
    events
        Signal of the nodes.
    names
        Keeps the external names of nodes that change.

    Attributes
    ----------
    errors
        Node name -> the reason why it could not be given its first workers.
    running
        The rollout that runs now; None when none does.
    totals
        Sums over all rollouts.
    demand
        Wakes calls that wait for tasks without a worker.
    """

    def __init__(
        self, scheduler: Scheduler, registry: Registry, config: Config, events: NodeEvents, names: ExternalNames
    ) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self.config = config
        self.events = events
        self.errors: dict[str, AgentClusterError] = {}
        self.running: RolloutRun | None = None
        self.totals = RolloutTotals()
        self.demand = DemandWatch(scheduler, lambda: self.running is not None)
        self._names = names
        self._bindings: Bindings = scheduler.extensions[BINDINGS]
        self._autoscaler = Autoscaler()
        self._turn = asyncio.Lock()
        # A lock goes with its last holder: names of nodes that left are not kept.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._last: _Undo | None = None

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def provision(self, node: Node) -> None:
        """Provision a node that joined with its first workers; the reason of a failure is kept in :attr:`errors`.

        Parameters
        ----------
        node
            The node.
        """
        async with self._lock(node.name):
            if self.registry.nodes.get(node.name) is not node or node.state != "joining":
                return
            mode = self.registry.mode_for(node)
            self.errors.pop(node.name, None)
            try:
                specs = modes.plan(mode, node.hardware, node=node.name)
                specs = () if node.name in self.registry.bare else specs
                names = node.first_names(len(specs), {str(ws.name) for ws in self.scheduler.workers.values()})
                changes = {node.name: NodeChange(node, mode, add=specs, names=tuple(names))}
                await self._check(changes, RolloutPolicy())
                await self._rollout(mode.name, changes, RolloutPolicy()).run()
            except AgentClusterError as error:
                self._refuse(node, error)
            except Exception as error:  # the launcher of the node waits for an answer, whatever went wrong
                logger.exception("Node %s could not be given its workers", node.name)
                self._refuse(node, error)
        await self.events.notify()

    async def reprovision(
        self, mode: Mode, names: Sequence[str] | str | None, policy: RolloutPolicy, *, remove_existing: bool = True
    ) -> Answer:
        """Replace the workers of nodes with those of a mode.

        Parameters
        ----------
        mode
            The mode.
        names
            Names, patterns or labels of nodes; None for all, and for those that join later.
        policy
            Policy of the rollout.
        remove_existing
            False keeps the workers that run and adds the mode's beside them.

        Returns
        -------
        dict
            The report of the rollout, see :meth:`AgentPlugin.reprovision_nodes`, which also lists what it raises.
        """
        async with self._nodes(names, policy) as nodes:
            changes = {}
            refusals = {}
            for node in nodes:
                try:
                    specs = modes.plan(mode, node.hardware, node=node.name)
                except ConfigError as error:
                    refusals[node.name] = error.reason if isinstance(error, ModeRefused) else str(error)
                else:
                    beside = NodeChange(node, mode, keep=node.plan.workers, add=specs)
                    changes[node.name] = change_to(node, mode, specs) if remove_existing else beside
            if refusals:
                raise PreflightError(mode.name, refusals)
            report = await self._roll(mode.name, changes, policy)
            if names is None and not policy.dry_run:
                self.registry.default = mode
                self.registry.wanted.clear()
            return report

    async def scale(
        self, target: ScaleTarget, names: Sequence[str] | str | None, policy: RolloutPolicy, *, strict: bool = False
    ) -> Answer:
        """Bring nodes to a target, as far as their capacity allows.

        Parameters
        ----------
        target
            Number of workers, or another target.
        names
            Names, patterns or labels of nodes; None for all.
        policy
            Policy of the rollout.
        strict
            Whether a target beyond the nodes' capacity is an error.

        Returns
        -------
        dict
            The report of the rollout, with ``workers``, their number afterwards, and ``short``, the part of the target
            that the nodes have no capacity for, or None.

        Raises
        ------
        ConfigError
            When the target is beyond the nodes' capacity and `strict`.
        """
        async with self._nodes(names, policy) as nodes:
            nbytes = preflight.stored_bytes(self.scheduler, [worker for node in nodes for worker in node.plan.workers])
            answer = plan_scale(target, nodes, {node.name: self.mode_of(node) for node in nodes}, nbytes)
            short = f"{target}: the nodes have room for {_listed(answer.short)}" if answer.short else None
            if short and strict:
                raise ConfigError(f"{short}; nothing was changed")
            report = await self._roll("scale", answer.changes, policy)
            return {**report, "workers": sum(len(node.plan.workers) for node in nodes), "short": short}

    async def empty(self, name: str, policy: RolloutPolicy, ends: bool = False) -> Answer:
        """Move a node's data to others and stop its workers; return at once where it has none.

        Parameters
        ----------
        name
            Name of the node.
        policy
            Policy of the rollout.
        ends
            Whether its agent ends: its external names are given up.

        Returns
        -------
        dict
            The report of the rollout.
        """
        node = self.registry.get(name)
        if ends:
            node.external_names = ()
        here = {str(worker.name) for worker in self.scheduler.workers.values()}
        if node.state == "lost" or (ends and here.isdisjoint(node.workers)):
            return self._rollout("none", {}, policy).report()
        async with self._nodes([name], policy) as [node]:
            return await self._roll("none", {name: change_without(node, Mode("none"), node.plan.workers)}, policy)

    async def retire(self, workers: Iterable[str], policy: RolloutPolicy) -> Answer:
        """Move the data of workers to others and stop them.

        Parameters
        ----------
        workers
            Names of workers; names that no node has are ignored.
        policy
            Policy of the rollout.

        Returns
        -------
        dict
            The report of the rollout.
        """
        leaving = set(workers)
        owners = [n.name for n in self.registry.nodes.values() if leaving & set(n.plan.workers) and n.state != "lost"]
        async with self._nodes(owners, policy) as nodes:
            changes = {node.name: change_without(node, self.mode_of(node), leaving) for node in nodes}
            return await self._roll("scale", changes, policy)

    async def adapt(self, asked: AdaptiveRequest, names: Sequence[str] | str | None, policy: RolloutPolicy) -> Answer:
        """Adapt the workers of nodes to the demand of present tasks, within limits.

        Parameters
        ----------
        asked
            Limits, requests, and the workers that may leave.
        names
            Names of nodes; those that are unknown or lost are left out. None for all.
        policy
            Policy of the rollout.

        Returns
        -------
        dict
            ``saw`` and ``decided``: demand and decision as text. ``could_go``: workers and nodes that are not needed
            and stayed. ``unmet``: demand that no node can satisfy -> the reason. ``short``: demand beyond the present
            capacity. ``requests``: resource -> whether there is capacity for the resource request, or the reason why
            there cannot be. ``waits``: whether workers would come if `asked` allowed it. ``launch``: standby hosts to
            launch. ``seconds``: time taken. ``workers``: number of workers now.
        """
        began = time.time()
        known = {name for name, node in self.registry.nodes.items() if node.state in ("ready", "standby")}
        async with self._nodes([name for name in known if names is None or name in names], policy) as nodes:
            there = sorted((node for node in nodes if node.state in ("ready", "standby")), key=lambda node: node.name)
            nbytes = preflight.stored_bytes(self.scheduler, [worker for node in there for worker in node.plan.workers])
            packing, answer = self._autoscaler.decide(self.scheduler, there, asked, nbytes)
            changes = self._changes_of(packing, there, asked)
            answer["decided"] = _decided(changes)
            if changes:
                await self._roll("adapt", changes, policy)
        return {**answer, "seconds": time.time() - began, "workers": sum(len(node.plan.workers) for node in there)}

    def _changes_of(self, packing: Packing, nodes: Sequence[Node], asked: AdaptiveRequest) -> dict[str, NodeChange]:
        """Return the changes of the nodes that a packing changes."""
        by_label = {label(mode): mode for mode in asked.modes}
        changes = {}
        for node in nodes:
            name, come = node.name, packing.add.get(node.name, ()) if asked.may_come else ()
            if name in packing.modes and (asked.may_come or not packing.add.get(name)):
                changes[name] = change_to(node, by_label[packing.modes[name]], come)
            elif name not in packing.modes and (come or not packing.remove.isdisjoint(node.plan.workers)):
                changes[name] = change_without(node, node.plan.mode, packing.remove, come)
        return changes

    async def undo(self, policy: RolloutPolicy) -> Answer:
        """Bring the nodes of the last rollout back to the plans that they had before it.

        Parameters
        ----------
        policy
            Policy of the rollout.

        Returns
        -------
        dict
            The report of the rollout.

        Raises
        ------
        ConfigError
            When there was no rollout.
        """
        if (last := self._last) is None:
            raise ConfigError("there is no rollout to undo")
        names = [name for name in last.plans if name in self.registry.nodes and self.registry.get(name).state != "lost"]
        async with self._nodes(names, policy) as nodes:
            plans = {node.name: last.plans[node.name] for node in nodes}
            changes = {node.name: change_to(node, plans[node.name].mode, _specs(plans[node.name])) for node in nodes}
            report = await self._roll("undo", changes, policy)
            if not policy.dry_run:
                self.registry.default = last.default
                self.registry.wanted = {**last.wanted, **self.registry.wanted}
            return report

    def control(self, action: str) -> None:
        """Pause, resume or cancel the rollout that runs now.

        Parameters
        ----------
        action
            ``pause``, ``resume`` or ``cancel``.

        Raises
        ------
        ConfigError
            When no rollout runs, or for another action.
        """
        if action not in ACTIONS:
            raise ConfigError(f"unknown action {action!r}; {suggest(action, ACTIONS)}")
        if self.running is None:
            raise ConfigError(f"cannot {action}: no rollout runs")
        match action:
            case "pause":
                self.running.pause()
            case "resume":
                self.running.resume()
            case _:
                self.running.cancel("it was cancelled")

    def mode_of(self, node: Node) -> Mode:
        """Return the mode that a node has, or will have when it has joined.

        Parameters
        ----------
        node
            The node.
        """
        return node.plan.mode if node.plan.revision else self.registry.mode_for(node)

    # -- execution -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _nodes(self, names: Sequence[str] | str | None, policy: RolloutPolicy) -> AsyncIterator[list[Node]]:
        """Wait for other rollouts to end and for the selected nodes to be provisioned; lock and yield the nodes."""
        async with contextlib.AsyncExitStack() as stack:
            await self._wait_for_turn(policy.wait)
            stack.callback(self._turn.release)
            chosen = [node.name for node in self.registry.select(names)]
            for name in sorted(chosen):
                await stack.enter_async_context(self._lock(name))
            nodes = [self.registry.get(name) for name in chosen if names is not None or name in self.registry.nodes]
            for node in nodes:
                if node.state == "lost":
                    raise ConfigError(f"node {node.name!r} is lost ({node.problem}); name the others with nodes=")
            yield nodes

    def _lock(self, name: str) -> asyncio.Lock:
        """Return the lock of a node's name; holders and waiters share one."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _wait_for_turn(self, wait: bool | float) -> None:
        try:
            async with asyncio.timeout(None if wait is True else max(float(wait), 0.001)):
                await self._turn.acquire()
        except TimeoutError:
            running = self.running
            label, began = (running.label, running.began) if running else ("another change", time.time())
            raise RolloutBusy(label, time.time() - began) from None

    async def _roll(self, label: str, planned: Mapping[str, NodeChange], policy: RolloutPolicy) -> Answer:
        """Check changes with the agents, carry them out, and report."""
        changes = {name: _named(change, policy.dry_run) for name, change in planned.items()}
        changes = await self._check(changes, policy)
        rollout = self._rollout(label, changes, policy)
        if policy.dry_run:
            report = rollout.report()
            preflight.describe(self.scheduler, report, changes, policy.drain)
            return report
        self.running = rollout
        if label != "adapt":
            self._last = _Undo(rollout.before, self.registry.default, dict(self.registry.wanted))
        before = preflight.stranded_tasks(self.scheduler, changes)
        try:
            report = await rollout.run()
        except SwapError as error:
            self._add_bound(error.report or {}, changes, before)
            raise
        finally:
            self.running = None
            self.totals.add(rollout.report())
            await self.events.notify()
        for name in changes:
            self.errors.pop(name, None)
        self._add_bound(report, changes, before)
        return report

    def _add_bound(self, report: Mapping[str, Any], changes: Mapping[str, NodeChange], before: Container[str]) -> None:
        """Add the tasks that no worker can run since a change to its report."""
        after = preflight.stranded_tasks(self.scheduler, changes)
        bound = preflight.listed({key: task for key, task in after.items() if key not in before})
        for name, node in report.get("nodes", {}).items():
            if bound and changes[name].remove:
                node["bound"] = bound

    def _rollout(self, label: str, changes: Mapping[str, NodeChange], policy: RolloutPolicy) -> RolloutRun:
        """Return a rollout that has not begun."""
        drain = self.config.drain_timeout if policy.drain_timeout is None else policy.drain_timeout
        limits = Limits(
            start=policy.timeout or self.config.start_timeout,
            drain=drain,
            retire=policy.timeout or self.config.retire_timeout,
            stop=self.config.stop_timeout,
        )
        events = RolloutEvents(self.scheduler, label, changes, self.events)
        return RolloutRun(RolloutContext(self.scheduler, self._names, self._bindings, events, limits), changes, policy)

    async def _check(self, changes: Mapping[str, NodeChange], policy: RolloutPolicy) -> dict[str, NodeChange]:
        """Choose each node's strategy; raise all reasons why the changes are not possible as one error."""
        chosen = {name: preflight.with_strategy(self.scheduler, each, policy) for name, each in changes.items()}
        refusals = preflight.immovable(self.scheduler, chosen, policy)
        refusals |= {name: why for name, each in chosen.items() if (why := preflight.crowded(each))}

        async def ask(name: str, named: Mapping[str, WorkerSpec]) -> None:
            why = await preflight.ask_agent(self.scheduler, chosen[name].node, named, self.config.start_timeout)
            if why:
                refusals[name] = why

        asked = {name: each.new for name, each in chosen.items() if each.new and name not in refusals}
        await asyncio.gather(*(ask(name, named) for name, named in asked.items()))
        for name, each in chosen.items():
            if each.node.state == "lost" or self.registry.nodes.get(name) is not each.node:
                refusals[name] = f"it was lost meanwhile: {each.node.problem or 'its agent joined again'}"
        if refusals:
            raise PreflightError(next(chosen[name].mode.name for name in refusals), refusals)
        return chosen

    def _refuse(self, node: Node, error: Exception) -> None:
        """Record that a node could not be given its first workers."""
        if isinstance(error, SwapError) and isinstance(error.__cause__, AgentClusterError):
            error = error.__cause__
        if isinstance(error, PreflightError):
            error = ModeRefused(node.name, error.mode, error.refusals[node.name])
        self.errors[node.name] = error if isinstance(error, AgentClusterError) else SwapError(str(error), "no workers")
        if node.state in ("joining", "swapping"):
            node.to("refused")
        node.problem = str(error)
        logger.warning("Node %s has no workers: %s", node.name, error)


def _named(change: NodeChange, dry_run: bool) -> NodeChange:
    """Name the workers that come; a dry run uses up no names."""
    count = len(change.add)
    names = [f"{change.name}-new-{i}" for i in range(count)] if dry_run else change.node.take_names(count)
    return replace(change, names=tuple(names))


def _specs(plan: NodePlan) -> list[WorkerSpec]:
    return list(plan.workers.values())


def _decided(changes: Mapping[str, NodeChange]) -> str:
    """Describe changes, as in "a: +2 -1 auto-gpu; b: -1 auto-cpu"."""
    parts = []
    for name, change in changes.items():
        counts = [f"+{len(change.add)}"] * bool(change.add) + [f"-{len(change.remove)}"] * bool(change.remove)
        parts.append(f"{name}: {' '.join(counts)} {change.mode.name}".replace("  ", " "))
    return "; ".join(parts)


def _listed(short: Mapping[str, int]) -> str:
    """Format amounts, as in "2 gpu, 8 cpu"."""
    sizes = {key: format_bytes(value) if key == "memory" else str(value) for key, value in short.items()}
    words = {key: key.removesuffix("s") if number == 1 else key for key, number in short.items()} | {
        "memory": "of memory"
    }
    return ", ".join(f"{size} {words[key]}" for key, size in sizes.items())
