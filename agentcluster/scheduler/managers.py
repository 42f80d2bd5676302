"""Names that a cluster manager tracks, kept alive through changes of a node.

dask-jobqueue, the Kubernetes operator, dask-gateway and ``SpecCluster`` know a worker by the name that they gave it,
and take a job whose worker's name is gone for lost. So before workers that bear such names leave, others of their node
are renamed, in the scheduler and in their agent; a name for which nobody is left is borne by a
:class:`~agentcluster.agent.placeholder.Placeholder`. And who retires such a name means all of its node.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

from dask.utils import natural_sort_key
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState, WorkerStatusPlugin

from agentcluster.model import WorkerSpec
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.wire import to_wire

logger = logging.getLogger(__name__)

PLACEHOLDER = WorkerSpec(
    "custom",
    "distributed.Nanny",
    # beside what it would have of its host's options
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

#: What a worker says when it retires itself, at the end of its lifetime; that is not its manager's wish.
BY_ITSELF = "worker-close-gracefully"


#: What gives the names of workers that leave a node to others; see :meth:`Tracked.pass_on`.
PassOn = Callable[[Node, Iterable[str], Collection[str]], Awaitable[Mapping[str, str]]]


async def keep_names(node: Node, staying: Iterable[str], leaving: Collection[str]) -> Mapping[str, str]:
    """Rename nobody."""
    return {}


class Tracked:
    """The tracked names on one scheduler.

    Parameters
    ----------
    scheduler, registry
        The plugin's.
    timeout
        Seconds that an agent has for each call.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, timeout: float) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self.timeout = timeout
        self._retire_workers: Any = scheduler.retire_workers

    def install(self) -> None:
        """Have the scheduler ask here first when somebody retires workers."""
        scheduler: Any = self.scheduler
        scheduler.retire_workers = scheduler.handlers["retire_workers"] = self.retire_workers

    async def retire_workers(
        self, workers: Iterable[Any] | None = None, *, names: Iterable[Any] | None = None, **how: Any
    ) -> Any:
        """Retire workers as ``Scheduler.retire_workers`` does; a node whose tracked names all go retires as a whole.

        Parameters
        ----------
        workers
            Addresses, as dask documents; the names that managers give in their place mean what they hoped for.
        names
            Names of workers.
        **how
            As dask takes it.

        Returns
        -------
        dict
            Address -> what the scheduler says of a worker that was retired; of a node only those that a manager knows.
        """
        chosen = [*(workers or ()), *(names or ())]
        both = workers is not None and names is not None
        nodes = [] if both or str(how.get("stimulus_id")).startswith(BY_ITSELF) else self._meant(chosen)
        if not nodes:
            return await self._retire_workers(workers, names=names, **how)
        known = {str(each) for each in chosen}.union(*(node.tracked for node in nodes))
        meant = known.union(*(node.plan.workers for node in nodes))
        addresses = [ws.address for ws in self.scheduler.workers.values() if {str(ws.name), ws.address} & meant]
        retired = await self._retire_workers(addresses, **how)
        return {address: its for address, its in retired.items() if {str(its["name"]), address} & known}

    def _meant(self, chosen: Iterable[Any]) -> list[Node]:
        """Return the nodes that are to go as a whole."""
        words = {str(each) for each in chosen}
        words |= {str(ws.name) for ws in self.scheduler.workers.values() if ws.address in words}
        there = (node for node in self.registry.nodes.values() if node.tracked)
        return [node for node in there if node.name in words or words.issuperset(node.tracked)]

    async def pass_on(self, node: Node, staying: Iterable[str], leaving: Collection[str] = ()) -> dict[str, str]:
        """Have each of a node's tracked names borne by a worker that stays, or a placeholder.

        Parameters
        ----------
        node
            The node; its plan follows.
        staying, leaving
            Names of its workers; those that leave get others.

        Returns
        -------
        dict
            Old name -> new name, of the workers that were renamed.
        """
        if not node.tracked or node.state in ("lost", "refused"):
            return {}
        bearers = sorted(staying, key=natural_sort_key)
        borne = {str(ws.name) for ws in self.scheduler.workers.values()}
        # A name that a worker of another node has is not ours to give.
        others = borne.difference(bearers, leaving, node.held)
        free = [name for name in node.tracked if name not in bearers and name not in others]
        takers = [worker for worker in bearers if worker not in node.tracked and self._named(worker)]
        given = dict(zip(takers, free, strict=False))
        needed = [name for name in free[len(given) :] if name not in borne or name in leaving]
        # Who bears a name that another is to bear: workers that leave, and placeholders.
        aside = [name for name in free if name in leaving or (name in borne and name in given.values())]
        moved = dict(zip(aside, node.take_names(len(aside)), strict=True))
        ended = [moved[name] for name in aside if name not in leaving]
        renamed: dict[str, str] = {}
        try:
            for names in (moved, given):
                await self._rename(node, names)
                renamed |= {old: new for old, new in names.items() if old in leaving or names is given}
            async with asyncio.timeout(self.timeout):
                if needed:
                    specs = {name: to_wire(PLACEHOLDER) for name in needed}
                    await self._agent(node).start_workers(specs=specs, timeout=self.timeout)
                    node.held |= {*needed}
                if ended:
                    node.held -= {*given.values()}
                    await self._agent(node).stop_workers(names=ended, timeout=self.timeout)
        except Exception as error:  # whatever an agent answers: the workers are right, if not their names
            why = error or type(error).__name__
            logger.warning("Node %s could not keep the names %s: %s", node.name, ", ".join(free), why)
        return renamed

    async def _rename(self, node: Node, names: Mapping[str, str]) -> None:
        if not names:
            return
        async with asyncio.timeout(self.timeout):
            await self._agent(node).rename_workers(names=dict(names))
        node.rename(names)
        watchers = [p for p in self.scheduler.plugins.values() if isinstance(p, WorkerStatusPlugin)]
        for old, new in names.items():
            if (ws := self._named(old)) is None:
                continue  # it is being started again, by its nanny, which knows the new name
            del self.scheduler.aliases[ws.name]
            ws.name = node.spelled(new)
            self.scheduler.aliases[ws.name] = ws.address
            logger.info("Worker %s of node %s is now %s", old, node.name, new)
            for watcher in watchers:
                watcher.add_worker(self.scheduler, ws.address)

    def _named(self, name: str) -> Any:
        return next((ws for ws in self.scheduler.workers.values() if str(ws.name) == name), None)

    def _agent(self, node: Node) -> Any:
        return self.scheduler.rpc(node.address)


#: What a node's own names for its workers end with.
NUMBERED = re.compile(r"-\d+$")


class Counts(SchedulerPlugin):
    """The workers of a scheduler, less those that stand for no name that a manager gave.

    Parameters
    ----------
    scheduler, registry
        The plugin's.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self._workers_to_close: Any = scheduler.workers_to_close
        self._adaptive_target: Any = scheduler.adaptive_target
        self._whole = False

    def install(self) -> None:
        """Have the scheduler ask here first when somebody asks about numbers of workers."""
        scheduler: Any = self.scheduler
        scheduler.add_plugin(self, name="agentcluster-counts")
        scheduler.workers_to_close = scheduler.handlers["workers_to_close"] = self.workers_to_close
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self.adaptive_target

    def adaptive_target(self, target_duration: Any = None) -> int:
        """Return what ``Scheduler.adaptive_target`` does, in a manager's own unit."""
        target, there = int(self._adaptive_target(target_duration)), len(self.scheduler.workers)
        counted = sum(map(len, self._counted().values()))
        if target < there:  # dask found some that could go, and leaves what there is without them
            going = set(self.workers_to_close())
            return sum(ws.address not in going for group in self._counted().values() for ws in group)
        return -(-target * counted // there) if there else target

    def workers_to_close(
        self, target: int | None = None, n: int | None = None, attribute: str = "address", key: Any = None, **how: Any
    ) -> list[Any]:
        """Return what ``Scheduler.workers_to_close`` does, in a manager's own unit, and nodes as a whole.

        Parameters
        ----------
        target, n, attribute, key
            As dask takes them; with a `key` the caller counts for itself.
        **how
            As dask takes it.
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
        """Ask the scheduler about all workers: nodes are idle, and small, by all that they run."""
        self._whole = True
        try:
            return list(self._workers_to_close(**how))
        finally:
            self._whole = False

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Return the workers that a manager may choose from: those that stand for a name of its own."""
        if self._whole:
            return workers
        counted = {ws for group in self._counted().values() for ws in group}
        return [ws for ws in workers if ws in counted]

    async def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Take a worker out of dask-gateway's own count again, where that is not to have it.

        The gateway's plugin counts it when it comes; what is asynchronous here is awaited after that.
        """
        service = scheduler.services.get("gateway")
        ws = scheduler.workers.get(worker)
        if service is not None and ws is not None and not self.valid_workers_downscaling(scheduler, [ws]):
            service.active_workers.discard(ws.name)

    def _node(self, ws: WorkerState) -> Node | None:
        """Return a worker's node, where a manager knows that."""
        name = str(ws.name)
        there = [node for node in self.registry.nodes.values() if node.tracked]
        exact = (node for node in there if name in node.tracked)
        return next(exact, next((node for node in there if NUMBERED.sub("", name) == node.name), None))

    def _group(self, ws: WorkerState) -> str:
        """Return what a worker leaves together with: its node, where a manager knows that."""
        node = self._node(ws)
        return ws.address if node is None else node.name

    def _counted(self) -> dict[str, list[WorkerState]]:
        """Return the workers that a manager counts, by what they leave together with."""
        found: dict[str, list[WorkerState]] = {}
        for ws in self.scheduler.workers.values():
            node = self._node(ws)
            group = found.setdefault(ws.address if node is None else node.name, [])
            if node is None or str(ws.name) in node.tracked:
                group.append(ws)
        return found
