"""Provision, reprovision, scale, retire, adapt and undo: from a request to a rollout.

:class:`Changes` belongs to the plugin. It plans with :mod:`agentcluster.scheduler.planning`, asks the agents whether
the plan is possible (preflight: every reason at once, before anything is touched), and runs it as a
:class:`agentcluster.scheduler.rollouts.Rolling`. One rollout runs at a time; a second waits for its turn or is refused.
Nodes that join meanwhile are provisioned beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from agentcluster.scheduler.autoscaling import Offers, Watch, label
from agentcluster.scheduler.evacuation import Arriving, held
from agentcluster.scheduler.managers import Counts, Tracked
from agentcluster.scheduler.metrics import Tally
from agentcluster.scheduler.planning import change as allocate
from agentcluster.scheduler.planning.binpacking import Fit
from agentcluster.scheduler.planning.change import Proposal
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.scheduler.planning.scaling import answered
from agentcluster.scheduler.rollouts import Rolling
from agentcluster.scheduler.swap import Limits

logger = logging.getLogger(__name__)

Report = dict[str, Any]


@dataclass
class Changes:
    """Plans, checks and carries out changes of workers on the nodes of one scheduler.

    Parameters
    ----------
    scheduler, registry, config
        The plugin's.
    notify
        Called after nodes changed their state.

    Attributes
    ----------
    errors
        Node name -> why it could not be given its first workers.
    rolling
        The rollout that runs now.
    """

    scheduler: Scheduler
    registry: Registry
    config: Config
    notify: Callable[[], Coroutine[Any, Any, None]]
    errors: dict[str, AgentClusterError] = field(default_factory=dict)
    rolling: Rolling | None = None

    def __post_init__(self) -> None:
        self.tracked = Tracked(self.scheduler, self.registry, self.config.start_timeout)
        self.watch = Watch()
        self.tally = Tally()
        self._offers = Offers()
        self._turn = asyncio.Lock()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._last: tuple[dict[str, NodePlan], Mode, dict[str, Mode]] | None = None

    def install(self) -> None:
        """Have the scheduler answer cluster managers, who know workers by name, in nodes, and count what arrives."""
        self.tracked.install()
        Counts(self.scheduler, self.registry).install()
        Arriving(self.scheduler).install()
        self.scheduler.add_plugin(self.watch)

    # -- wishes --------------------------------------------------------------------------------------------------------

    async def provision(self, node: Node) -> None:
        """Give a node that joined the workers that it is meant to have; why not is kept in :attr:`errors`."""
        async with self._locks[node.name]:
            if self.registry.nodes.get(node.name) is not node or node.state != "joining":
                return
            mode = self.registry.mode_for(node)
            self.errors.pop(node.name, None)
            try:
                specs = modes.plan(mode, node.hardware, node=node.name)
                specs = () if node.name in self.registry.bare else specs
                names = node.first_names(len(specs), {str(ws.name) for ws in self.scheduler.workers.values()})
                named = dict(zip(names, specs, strict=True))
                proposals = {node.name: Proposal(node, allocate.Change({}, (), specs), named, mode)}
                await self._check(proposals, RolloutPolicy())
                await self._rolling(mode.name, proposals, RolloutPolicy()).run()
            except AgentClusterError as error:
                self._refuse(node, error)
            except Exception as error:  # whoever launched the node waits for an answer, whatever went wrong
                logger.exception("Node %s could not be given its workers", node.name)
                self._refuse(node, error)
        await self.notify()

    async def reprovision(
        self, mode: Mode, names: Sequence[str] | str | None, terms: RolloutPolicy, *, remove_existing: bool = True
    ) -> Report:
        """Give nodes the workers that a mode means on them; see :meth:`AgentPlugin.reprovision_nodes`."""
        async with self._nodes(names, terms) as nodes:
            changes = {}
            refusals = {}
            for node in nodes:
                try:
                    specs = modes.plan(mode, node.hardware, node=node.name)
                except ConfigError as error:
                    refusals[node.name] = error.reason if isinstance(error, ModeRefused) else str(error)
                else:
                    beside = allocate.Change(node.plan.workers, (), specs)
                    changes[node.name] = allocate.difference(node.plan.workers, specs) if remove_existing else beside
            if refusals:
                raise PreflightError(mode.name, refusals)
            report = await self._roll(mode.name, {name: (mode, change) for name, change in changes.items()}, terms)
            if names is None and not terms.dry_run:
                self.registry.default = mode
                self.registry.wanted.clear()
            return report

    async def scale(
        self, target: ScaleTarget, names: Sequence[str] | str | None, terms: RolloutPolicy, *, strict: bool = False
    ) -> Report:
        """Bring nodes to what is wanted, as far as they have room; with `strict` only where they have it."""
        async with self._nodes(names, terms) as nodes:
            nbytes = held(self.scheduler, [worker for node in nodes for worker in node.plan.workers])
            answer = answered(target, nodes, {node.name: self.mode_of(node) for node in nodes}, nbytes)
            short = f"{target}: the nodes have room for {_listed(answer.short)}" if answer.short else None
            if short and strict:
                raise ConfigError(f"{short}; nothing was changed")
            report = await self._roll("scale", answer.wishes, terms)
            return {**report, "workers": sum(len(node.plan.workers) for node in nodes), "short": short}

    async def empty(self, name: str, terms: RolloutPolicy, ends: bool = False) -> Report:
        """Move a node's data to others and stop its workers; where there are none, nothing is waited for."""
        node = self.registry.get(name)
        if ends:
            node.tracked = ()
        here = {str(worker.name) for worker in self.scheduler.workers.values()}
        if node.state == "lost" or (ends and here.isdisjoint(node.workers)):
            return self._rolling("none", {}, terms).report()
        async with self._nodes([name], terms) as [node]:
            return await self._roll("none", {name: (Mode("none"), _without(node, node.plan.workers))}, terms)

    async def retire(self, workers: Iterable[str], terms: RolloutPolicy) -> Report:
        """Move the data of the named workers to others and stop them; unknown names are gone already."""
        leaving = set(workers)
        owners = [n.name for n in self.registry.nodes.values() if leaving & set(n.plan.workers) and n.state != "lost"]
        async with self._nodes(owners, terms) as nodes:
            wishes = {node.name: (self.mode_of(node), _without(node, leaving)) for node in nodes}
            return await self._roll("scale", wishes, terms)

    async def adapt(
        self, asked: AdaptiveRequest, names: Sequence[str] | str | None, terms: RolloutPolicy
    ) -> dict[str, Any]:
        """Give nodes the workers that the tasks of the moment need, and no others, within limits.

        Parameters
        ----------
        asked
            The limits, and who may go.
        names
            The nodes; those that are not here, or lost, are left out. None for all.
        terms
            How.

        Returns
        -------
        dict
            ``saw`` and ``decided``, as text; ``could_go``, who was not needed and stayed; ``unmet``, what tasks need
            that no node has -> why; ``short``, what they need that there is no room for now; ``requests``, resource ->
            whether there is room for what was requested, or why there cannot be; ``waits``, whether workers would come
            if they might; ``seconds`` that it took; ``workers``, the number that there is now.
        """
        began = time.time()
        known = {name for name, node in self.registry.nodes.items() if node.state in ("ready", "standby")}
        async with self._nodes([name for name in known if names is None or name in names], terms) as nodes:
            there = sorted((node for node in nodes if node.state in ("ready", "standby")), key=lambda node: node.name)
            nbytes = held(self.scheduler, [worker for node in there for worker in node.plan.workers])
            fit, answer = self._offers.look(self.scheduler, there, asked, nbytes)
            wishes = self._fitting_wishes(fit, there, asked)
            answer["decided"] = _decided(wishes)
            if wishes:
                await self._roll("adapt", wishes, terms)
        return {**answer, "seconds": time.time() - began, "workers": sum(len(node.plan.workers) for node in there)}

    def _fitting_wishes(
        self, fit: Fit, nodes: Sequence[Node], asked: AdaptiveRequest
    ) -> dict[str, tuple[Mode, allocate.Change]]:
        """Return what changes on each node."""
        by_label = {label(mode): mode for mode in asked.modes}
        wishes = {}
        for node in nodes:
            name, come = node.name, fit.come.get(node.name, ()) if asked.may_come else ()
            if name in fit.modes and (asked.may_come or not fit.come.get(name)):
                wishes[name] = by_label[fit.modes[name]], allocate.difference(node.plan.workers, come)
            elif name not in fit.modes and (come or not fit.go.isdisjoint(node.plan.workers)):
                gone = _without(node, fit.go)
                wishes[name] = node.plan.mode, allocate.Change(gone.keep, gone.go, come)
        return wishes

    async def undo(self, terms: RolloutPolicy) -> Report:
        """Bring the nodes that the last rollout changed back to the plans that they had before it."""
        if self._last is None:
            raise ConfigError("there is no rollout to undo")
        before, default, wanted = self._last
        names = [name for name in before if name in self.registry.nodes and self.registry.get(name).state != "lost"]
        async with self._nodes(names, terms) as nodes:
            wishes = {}
            for node in nodes:
                plan = before[node.name]
                change = allocate.difference(node.plan.workers, list(plan.workers.values()))
                wishes[node.name] = (plan.mode, change)
            report = await self._roll("undo", wishes, terms)
            if not terms.dry_run:
                self.registry.default = default
                self.registry.wanted = {**wanted, **self.registry.wanted}
            return report

    def control(self, action: str) -> None:
        """Pause, resume or cancel the rollout that runs now."""
        if self.rolling is None:
            raise ConfigError(f"cannot {action}: no rollout runs")
        if action not in ("pause", "resume", "cancel"):
            raise ConfigError(f"unknown action {action!r}; {suggest(action, ['pause', 'resume', 'cancel'])}")
        if action == "cancel":
            self.rolling.cancel("it was cancelled")
        else:
            getattr(self.rolling, action)()

    def mode_of(self, node: Node) -> Mode:
        """Return the mode that a node has, or will have when it has joined."""
        return node.plan.mode if node.plan.revision else self.registry.mode_for(node)

    # -- carrying out --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _nodes(self, names: Sequence[str] | str | None, terms: RolloutPolicy) -> AsyncIterator[list[Node]]:
        """Wait for our turn, and for the chosen nodes to have what they join with; then they are ours."""
        async with contextlib.AsyncExitStack() as stack:
            await self._wait_for_turn(terms.wait)
            stack.callback(self._turn.release)
            chosen = [node.name for node in self.registry.select(names)]
            for name in sorted(chosen):
                await stack.enter_async_context(self._locks[name])
            nodes = [self.registry.get(name) for name in chosen if names is not None or name in self.registry.nodes]
            for node in nodes:
                if node.state == "lost":
                    raise ConfigError(f"node {node.name!r} is lost ({node.problem}); name the others with nodes=")
            yield nodes

    async def _wait_for_turn(self, wait: bool | float) -> None:
        try:
            async with asyncio.timeout(None if wait is True else max(float(wait), 0.001)):
                await self._turn.acquire()
        except TimeoutError:
            running = self.rolling
            label, began = (running.label, running.began) if running else ("another change", time.time())
            raise RolloutBusy(label, time.time() - began) from None

    def _proposal(self, node: Node, change: allocate.Change, mode: Mode, dry_run: bool = False) -> Proposal:
        count = len(change.come)
        names = [f"{node.name}-new-{i}" for i in range(count)] if dry_run else node.take_names(count)
        return Proposal(node, change, dict(zip(names, change.come, strict=True)), mode)

    async def _roll(
        self, label: str, wishes: Mapping[str, tuple[Mode, allocate.Change]], terms: RolloutPolicy
    ) -> Report:
        """Check a change with the agents, carry it out, and report."""
        proposals = {
            name: self._proposal(self.registry.get(name), change, mode, terms.dry_run)
            for name, (mode, change) in wishes.items()
        }
        proposals = await self._check(proposals, terms)
        rolling = self._rolling(label, proposals, terms)
        if terms.dry_run:
            return preflight.described(self.scheduler, rolling.report(), proposals)
        self.rolling = rolling
        if label != "adapt":
            self._last = (rolling.before, self.registry.default, dict(self.registry.wanted))
        bound = preflight.bound_tasks(self.scheduler, proposals)
        try:
            report = await rolling.run()
        except SwapError as error:
            _name_bound(error.report, bound)
            raise
        finally:
            self.rolling = None
            self.tally.add(rolling.report())
            await self.notify()
        for name in proposals:
            self.errors.pop(name, None)
        return _name_bound(report, bound)

    def _rolling(self, label: str, proposals: Mapping[str, Proposal], terms: RolloutPolicy) -> Rolling:
        drain = self.config.drain_timeout if terms.drain_timeout is None else terms.drain_timeout
        limits = Limits(
            start=terms.timeout or self.config.start_timeout,
            drain=drain,
            retire=terms.timeout or self.config.retire_timeout,
            stop=self.config.stop_timeout,
        )
        return Rolling(self.scheduler, label, proposals, terms, limits, self.notify, self.tracked.pass_on)

    async def _check(self, proposals: Mapping[str, Proposal], terms: RolloutPolicy) -> dict[str, Proposal]:
        """Choose each node's strategy, and raise every reason why the change cannot be as one error."""
        chosen = {name: preflight.with_strategy(self.scheduler, each, terms) for name, each in proposals.items()}
        refusals = preflight.immovable(self.scheduler, chosen, terms)
        refusals |= {name: why for name, each in chosen.items() if (why := preflight.crowded(each))}

        async def ask(name: str, named: Mapping[str, WorkerSpec]) -> None:
            why = await preflight.ask_agent(self.scheduler, chosen[name].node, named, self.config.start_timeout)
            if why:
                refusals[name] = why

        asked = {name: each.named for name, each in chosen.items() if each.named and name not in refusals}
        await asyncio.gather(*(ask(name, named) for name, named in asked.items()))
        for name, each in chosen.items():
            if each.node.state == "lost" or self.registry.nodes.get(name) is not each.node:
                refusals[name] = f"it was lost meanwhile: {each.node.problem or 'its agent joined again'}"
        if refusals:
            raise PreflightError(next(chosen[name].mode.name for name in refusals), refusals)
        return chosen

    def _refuse(self, node: Node, error: Exception) -> None:
        if isinstance(error, SwapError) and isinstance(error.__cause__, AgentClusterError):
            error = error.__cause__
        if isinstance(error, PreflightError):
            error = ModeRefused(node.name, error.mode, error.refusals[node.name])
        self.errors[node.name] = error if isinstance(error, AgentClusterError) else SwapError(str(error), "no workers")
        if node.state in ("joining", "swapping"):
            node.to("refused")
        node.problem = str(error)
        logger.warning("Node %s has no workers: %s", node.name, error)


def _name_bound(report: Any, bound: Mapping[str, list[str]]) -> Report:
    """Add the tasks that no worker could run any more to a report."""
    for name, tasks in bound.items():
        report["nodes"][name]["bound"] = tasks
    found: Report = report
    return found


def _decided(wishes: Mapping[str, tuple[Mode, allocate.Change]]) -> str:
    """Say what changes, as in "a: +2 -1 auto-gpu; b: -1 auto-cpu"."""
    parts = []
    for name, (mode, change) in wishes.items():
        counts = [f"+{len(change.come)}"] * bool(change.come) + [f"-{len(change.go)}"] * bool(change.go)
        parts.append(f"{name}: {' '.join(counts)} {mode.name}".replace("  ", " "))
    return "; ".join(parts)


def _listed(short: Mapping[str, int]) -> str:
    """Name amounts, as in "2 gpu, 8 cpu"."""
    sizes = {key: format_bytes(value) if key == "memory" else str(value) for key, value in short.items()}
    words = {key: key.removesuffix("s") if number == 1 else key for key, number in short.items()} | {
        "memory": "of memory"
    }
    return ", ".join(f"{size} {words[key]}" for key, size in sizes.items())


def _without(node: Node, leaving: Iterable[str]) -> allocate.Change:
    """Return the change that takes workers from a node's plan."""
    go = tuple(worker for worker in node.plan.workers if worker in set(leaving))
    keep = {worker: spec for worker, spec in node.plan.workers.items() if worker not in go}
    return allocate.Change(keep, go, ())
