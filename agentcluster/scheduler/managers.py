"""Support of external cluster managers: their names for workers, and their way of counting workers.

dask-jobqueue, the Kubernetes operator, dask-gateway and ``SpecCluster`` know a worker by the name that they issued, and
take a job whose worker's name is gone for lost. :class:`ExternalNames` therefore keeps each of these names on a worker
of its node: before a worker with an external name leaves, another one is renamed, in the scheduler and in its agent; a
name without a worker goes to a :class:`~agentcluster.agent.placeholder.Placeholder`. Retiring all external names of a
node retires the node. :class:`WorkerCounts` counts workers as the managers do.

This is the only module that replaces methods of a scheduler; :func:`install` replaces all of them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask.utils import natural_sort_key
from distributed import Scheduler
from distributed.core import PooledRPCCall
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState, WorkerStatusPlugin

from agentcluster.model import WorkerSpec
from agentcluster.scheduler.departures import (
    BINDINGS,
    CALLS,
    RESULTS,
    Bindings,
    CallsInFlight,
    LateMessages,
    SendableResults,
)
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.wire import UNSENDABLE, to_wire

logger = logging.getLogger(__name__)

PLACEHOLDER = WorkerSpec(
    "custom",
    "distributed.Nanny",
    # None and () override what a placeholder would get from its host's options.
    {
        "worker_class": "agentcluster.agent.placeholder.Placeholder",
        "dashboard": False,
        "lifetime": None,
        "port": None,
        "worker_port": None,
        "contact_address": None,
        "preload": (),
        "preload_nanny": (),
    },
    nthreads=1,
    memory_limit=0,
)

#: Start of the stimulus of a worker that retires itself at the end of its lifetime; no manager asked for that.
BY_ITSELF = "worker-close-gracefully"

#: End of the names that a node gives to its workers.
NUMBERED = re.compile(r"-\d+$")


def install(scheduler: Scheduler, registry: Registry, timeout: float) -> ExternalNames:
    """Replace the methods of a scheduler that answer cluster managers or receive data.

    ``retire_workers``, ``workers_to_close`` and ``adaptive_target`` then count in the managers' units, and ``scatter``
    is tracked while it is under way. Workers that a change has removed are answered until they end. The handlers of the
    same names, which answer remote calls, are replaced with them.

    Parameters
    ----------
    scheduler, registry
        The scheduler and its nodes.
    timeout
        Seconds that an agent has for each call.

    Returns
    -------
    ExternalNames
        Keeps the external names of nodes that change.
    """
    names = ExternalNames(scheduler, registry, timeout)
    counts = WorkerCounts(scheduler, registry)
    late = LateMessages(scheduler)
    bindings = scheduler.extensions[BINDINGS] = Bindings(scheduler, registry)
    calls = scheduler.extensions[CALLS] = CallsInFlight(scheduler, bindings)
    scheduler.add_plugin(counts, name="agentcluster-counts")
    scheduler.add_plugin(late)
    scheduler.add_plugin(bindings)
    results = scheduler.extensions[RESULTS] = SendableResults(scheduler)
    scheduler.stream_handlers["request-refresh-who-has"] = late.refresh_who_has
    scheduler.stream_handlers[UNSENDABLE] = results.told
    replaced: dict[str, Callable[..., Any]] = {
        "retire_workers": names.retire_workers,
        "workers_to_close": counts.workers_to_close,
        "adaptive_target": counts.adaptive_target,
        "scatter": calls.scatter,
        "broadcast": calls.broadcast,
    }
    for name, method in {**replaced, "valid_workers": bindings.valid_workers}.items():
        setattr(scheduler, name, method)
    scheduler.handlers.update(replaced, heartbeat_worker=late.heartbeat_worker)
    return names


# -- names -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamePlan:
    """Renaming of a node's workers that keeps its external names.

    Attributes
    ----------
    vacant
        External names that no staying worker has.
    freed
        Those of them that a leaving worker or a placeholder has now and must give up first.
    given
        Staying worker -> the vacant name that it gets.
    start
        Vacant names for which a placeholder is started.
    stop
        Names in `freed` whose placeholder is stopped, because a worker gets the name.
    """

    vacant: tuple[str, ...] = ()
    freed: tuple[str, ...] = ()
    given: Mapping[str, str] = field(default_factory=dict)
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


def plan_names(
    external: Sequence[str],
    *,
    staying: Iterable[str],
    leaving: Collection[str],
    placeholders: Collection[str],
    present: Collection[str],
) -> NamePlan:
    """Plan which workers and placeholders get the external names of a node.

    Parameters
    ----------
    external
        The external names.
    staying, leaving
        Names of the node's workers; those that leave lose external names.
    placeholders
        External names that placeholders have.
    present
        Names of all workers in the scheduler, of other nodes too.

    Returns
    -------
    NamePlan
        Staying workers get vacant names in the order of their own names; placeholders get the rest. A name that a
        worker of another node has is left alone.
    """
    stay = sorted(staying, key=natural_sort_key)
    elsewhere = set(present).difference(stay, leaving, placeholders)
    vacant = tuple(name for name in external if name not in stay and name not in elsewhere)
    # A worker that is not in the scheduler is being restarted and cannot be renamed there.
    takers = [worker for worker in stay if worker not in external and worker in present]
    given = dict(zip(takers, vacant, strict=False))
    freed = tuple(name for name in vacant if name in leaving or (name in present and name in given.values()))
    return NamePlan(
        vacant,
        freed,
        given,
        start=tuple(name for name in vacant[len(given) :] if name not in present or name in leaving),
        stop=tuple(name for name in freed if name not in leaving),
    )


class ExternalNames:
    """Names that cluster managers issued to the workers of one scheduler.

    Parameters
    ----------
    scheduler, registry
        The scheduler and its nodes.
    timeout
        Seconds that an agent has for each call.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, timeout: float) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self.timeout = timeout
        self._retire_workers: Callable[..., Awaitable[dict[str, Any]]] = scheduler.retire_workers

    async def retire_workers(
        self, workers: Iterable[Hashable] | None = None, *, names: Iterable[Hashable] | None = None, **how: Any
    ) -> dict[str, Any]:
        """Retire workers like ``Scheduler.retire_workers``; retire a node whose external names all leave.

        Parameters
        ----------
        workers
            Addresses, as dask documents; names that managers pass in their place are accepted.
        names
            Names of workers.
        **how
            Further arguments of ``Scheduler.retire_workers``.

        Returns
        -------
        dict
            Address -> the scheduler's description of each retired worker; of a node only those with external names.
        """
        chosen = [*(workers or ()), *(names or ())]
        both = workers is not None and names is not None
        nodes = [] if both or str(how.get("stimulus_id")).startswith(BY_ITSELF) else self._nodes_of(chosen)
        if not nodes:
            return await self._retire_workers(workers, names=names, **how)
        known = {str(each) for each in chosen}.union(*(node.external_names for node in nodes))
        leaving = known.union(*(node.plan.workers for node in nodes))
        addresses = [ws.address for ws in self.scheduler.workers.values() if {str(ws.name), ws.address} & leaving]
        retired = await self._retire_workers(addresses, **how)
        return {address: facts for address, facts in retired.items() if {str(facts["name"]), address} & known}

    def _nodes_of(self, chosen: Iterable[Hashable]) -> list[Node]:
        """Return the nodes that are named, or whose external names are all among the chosen workers."""
        words = {str(each) for each in chosen}
        words |= {str(ws.name) for ws in self.scheduler.workers.values() if ws.address in words}
        managed = (node for node in self.registry.nodes.values() if node.external_names)
        return [node for node in managed if node.name in words or words.issuperset(node.external_names)]

    async def keep(self, node: Node, staying: Iterable[str], leaving: Collection[str] = ()) -> dict[str, str]:
        """Assign each external name of a node to a worker that stays, or to a placeholder.

        Parameters
        ----------
        node
            The node; its plan gets the new names too.
        staying, leaving
            Names of its workers; those that leave get other names.

        Returns
        -------
        dict
            Old name -> new name, of the workers that were renamed.
        """
        if not node.external_names or node.state in ("lost", "refused"):
            return {}
        present = {str(ws.name) for ws in self.scheduler.workers.values()}
        plan = plan_names(
            node.external_names, staying=staying, leaving=leaving, placeholders=node.placeholders, present=present
        )
        renamed: dict[str, str] = {}
        try:
            freed = dict(zip(plan.freed, node.take_names(len(plan.freed)), strict=True))
            await self._rename(node, freed)
            renamed |= {old: new for old, new in freed.items() if old in leaving}
            await self._rename(node, plan.given)
            renamed |= plan.given
            await self._change_placeholders(node, plan, [freed[name] for name in plan.stop])
        except Exception as error:  # whatever an agent answers: the workers are right, if not their names
            why = error or type(error).__name__
            logger.warning("Node %s could not keep the names %s: %s", node.name, ", ".join(plan.vacant), why)
        return renamed

    async def _change_placeholders(self, node: Node, plan: NamePlan, stop: list[str]) -> None:
        """Start placeholders for names without a worker, and stop those that a worker replaced."""
        async with asyncio.timeout(self.timeout):
            if plan.start:
                specs = {name: to_wire(PLACEHOLDER) for name in plan.start}
                await self._agent(node).start_workers(specs=specs, timeout=self.timeout)
                node.placeholders |= {*plan.start}
            if stop:
                node.placeholders -= {*plan.given.values()}
                await self._agent(node).stop_workers(names=stop, timeout=self.timeout)

    async def _rename(self, node: Node, names: Mapping[str, str]) -> None:
        """Rename workers in their agent, in the node's plan and in the scheduler."""
        if not names:
            return
        async with asyncio.timeout(self.timeout):
            await self._agent(node).rename_workers(names=dict(names))
        node.rename(names)
        watchers = [p for p in self.scheduler.plugins.values() if isinstance(p, WorkerStatusPlugin)]
        by_name = {str(ws.name): ws for ws in self.scheduler.workers.values()}
        for old, new in names.items():
            if (ws := by_name.get(old)) is None:
                continue  # it is being restarted by its nanny, which knows the new name
            del self.scheduler.aliases[ws.name]
            ws.name = node.scheduler_name(new)
            self.scheduler.aliases[ws.name] = ws.address
            logger.info("Worker %s of node %s is now %s", old, node.name, new)
            for watcher in watchers:
                watcher.add_worker(self.scheduler, ws.address)

    def _agent(self, node: Node) -> PooledRPCCall:
        return self.scheduler.rpc(node.address)


# -- counts ------------------------------------------------------------------------------------------------------------


class WorkerCounts(SchedulerPlugin):
    """Count workers like the external cluster manager: one per name that it issued.

    Parameters
    ----------
    scheduler, registry
        The scheduler and its nodes.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self._workers_to_close: Callable[..., Sequence[str]] = scheduler.workers_to_close
        self._adaptive_target: Callable[..., int] = scheduler.adaptive_target
        self._all_valid = False

    def adaptive_target(self, target_duration: float | str | None = None) -> int:
        """Return the number of workers wanted, like ``Scheduler.adaptive_target``, in the manager's unit.

        Parameters
        ----------
        target_duration
            Seconds within which the work should be done, or a time as text, like ``"5s"``.
        """
        target, there = int(self._adaptive_target(target_duration)), len(self.scheduler.workers)
        counted = sum(map(len, self._counted().values()))
        if target < there:  # dask found workers that can leave: the target is the number of the others
            leaving = set(self.workers_to_close())
            return sum(ws.address not in leaving for group in self._counted().values() for ws in group)
        return -(-target * counted // there) if there else target

    def workers_to_close(
        self,
        target: int | None = None,
        n: int | None = None,
        attribute: str = "address",
        key: Callable[[WorkerState], Hashable] | bytes | None = None,
        **how: Any,
    ) -> list[Any]:
        """Return workers that can leave, like ``Scheduler.workers_to_close``, in the manager's unit and by node.

        Parameters
        ----------
        target, n, attribute, key
            As in ``Scheduler.workers_to_close``; with a `key` the caller groups workers itself.
        **how
            Further arguments of ``Scheduler.workers_to_close``.

        Returns
        -------
        list
            The `attribute` of each worker.
        """
        counted = self._counted()
        if key is not None or len(counted) == len(self.scheduler.workers):
            return list(self._workers_to_close(target=target, n=n, attribute=attribute, key=key, **how))
        if target is None and n is None:
            nodes = {self._group(self.scheduler.workers[address]) for address in self._ask(key=self._group, **how)}
            return [getattr(ws, attribute) for ws in self.scheduler.workers.values() if self._group(ws) in nodes]
        remain = sum(map(len, counted.values()))
        least = max(remain - n if target is None and n is not None else target or 0, how.get("minimum") or 0)
        cheapest = self._ask(n=len(self.scheduler.workers), key=self._group)
        chosen: list[Any] = []
        for group in dict.fromkeys(self._group(self.scheduler.workers[address]) for address in cheapest):
            if remain - len(counted[group]) < least:
                break
            remain -= len(counted[group])
            chosen += [getattr(ws, attribute) for ws in counted[group]]
        return chosen

    def _ask(self, **how: Any) -> list[str]:
        """Ask the scheduler about all workers: a node's idleness and data are those of all its workers."""
        self._all_valid = True
        try:
            return list(self._workers_to_close(**how))
        finally:
            self._all_valid = False

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Return the workers that a manager may close: those with a name that it issued.

        Parameters
        ----------
        scheduler, workers
            As dask passes them.
        """
        if self._all_valid:
            return workers
        counted = {ws for group in self._counted().values() for ws in group}
        return [ws for ws in workers if ws in counted]

    async def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Remove a worker from dask-gateway's own count, where the gateway did not issue its name.

        The gateway's plugin counts the worker when it joins; dask awaits asynchronous plugins after that.

        Parameters
        ----------
        scheduler, worker
            As dask passes them.
        """
        service = scheduler.services.get("gateway")
        ws = scheduler.workers.get(worker)
        if service is not None and ws is not None and not self.valid_workers_downscaling(scheduler, [ws]):
            service.active_workers.discard(ws.name)

    def _node(self, ws: WorkerState) -> Node | None:
        """Return the node of a worker, if a manager knows that node."""
        name = str(ws.name)
        managed = [node for node in self.registry.nodes.values() if node.external_names]
        exact = (node for node in managed if name in node.external_names)
        return next(exact, next((node for node in managed if NUMBERED.sub("", name) == node.name), None))

    def _group(self, ws: WorkerState) -> str:
        """Return the group that a worker leaves with: its node if a manager knows it, otherwise itself."""
        node = self._node(ws)
        return ws.address if node is None else node.name

    def _counted(self) -> dict[str, list[WorkerState]]:
        """Return the workers that a manager counts, by group."""
        found: dict[str, list[WorkerState]] = {}
        for ws in self.scheduler.workers.values():
            node = self._node(ws)
            group = found.setdefault(ws.address if node is None else node.name, [])
            if node is None or str(ws.name) in node.external_names:
                group.append(ws)
        return found
