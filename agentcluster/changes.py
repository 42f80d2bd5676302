"""From a wish to a change: which workers it means on which node, whether it can be, and then one swap.

:class:`Changes` belongs to the plugin. It plans with the pure modules, asks the agents whether the plan can be
(preflight: every reason at once, before anything is touched), and carries it out with :class:`agentcluster.swap.Swap`.
One change runs at a time and a second waits its turn; nodes that join meanwhile are given their workers beside it.
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

from distributed import Scheduler

from agentcluster import allocate, modes
from agentcluster.config import Config
from agentcluster.errors import AgentClusterError, ConfigError, ModeRefused, PreflightError, SwapError
from agentcluster.evacuation import actors, held, stranded
from agentcluster.model import Mode, WorkerSpec, to_wire
from agentcluster.registry import Node, Registry
from agentcluster.swap import Swap

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
    """

    scheduler: Scheduler
    registry: Registry
    config: Config
    notify: Callable[[], Coroutine[Any, Any, None]]
    errors: dict[str, AgentClusterError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._turn = asyncio.Lock()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

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
                await self._change(mode, {node.name: allocate.Change({}, (), specs)})
            except AgentClusterError as error:
                self._refuse(node, error)
            except Exception as error:  # whoever launched the node waits for an answer, whatever went wrong
                logger.exception("Node %s could not be given its workers", node.name)
                self._refuse(node, error)
        await self.notify()

    async def reprovision(
        self,
        mode: Mode,
        names: Sequence[str] | str | None,
        *,
        remove_existing: bool,
        timeout: float | None,
        dry_run: bool,
    ) -> Report:
        """Give nodes the workers that a mode means on them; see :meth:`AgentPlugin.reprovision_nodes`."""
        async with self._nodes(names) as nodes:
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
            report = await self._change(mode, changes, timeout=timeout, dry_run=dry_run)
            if names is None and not dry_run:
                self.registry.default = mode
                self.registry.wanted.clear()
            return report

    async def scale(self, total: int, names: Sequence[str] | str | None, timeout: float | None) -> Report:
        """Bring nodes to `total` workers, as far as their modes have room."""
        async with self._nodes(names) as nodes:
            full = {node.name: modes.plan(self.mode_of(node), node.hardware, node=node.name) for node in nodes}
            nbytes = held(self.scheduler, [worker for node in nodes for worker in node.plan.workers])
            current = {node.name: {w: nbytes.get(w, 0) for w in node.plan.workers} for node in nodes}
            go, come = allocate.scaled(current, {name: len(specs) for name, specs in full.items()}, total)
            changes = {}
            for node in nodes:
                room = allocate.difference(node.plan.workers, full[node.name]).come
                changes[node.name] = _without(node, go, room[: come[node.name]])
            report = await self._change(None, changes, timeout=timeout)
            return {**report, "workers": sum(len(node.plan.workers) for node in nodes)}

    async def empty(self, name: str, timeout: float | None) -> Report:
        """Move a node's data to others and stop its workers."""
        if self.registry.get(name).state == "lost":
            return await self._change(Mode("none"), {})
        async with self._nodes([name]) as [node]:
            return await self._change(Mode("none"), {name: _without(node, node.plan.workers)}, timeout=timeout)

    async def retire(self, workers: Iterable[str], timeout: float | None) -> Report:
        """Move the data of the named workers to others and stop them; unknown names are gone already."""
        leaving = set(workers)
        owners = [n.name for n in self.registry.nodes.values() if leaving & set(n.plan.workers) and n.state != "lost"]
        async with self._nodes(owners) as nodes:
            changes = {node.name: _without(node, leaving) for node in nodes}
            return await self._change(None, changes, timeout=timeout)

    def mode_of(self, node: Node) -> Mode:
        """Return the mode that a node has, or will have when it has joined."""
        return node.plan.mode if node.plan.revision else self.registry.mode_for(node)

    # -- carrying out --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _nodes(self, names: Sequence[str] | str | None) -> AsyncIterator[list[Node]]:
        """Wait for our turn, and for the chosen nodes to have what they join with; then they are ours."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._turn)
            chosen = [node.name for node in self.registry.select(names)]
            for name in sorted(chosen):
                await stack.enter_async_context(self._locks[name])
            nodes = [self.registry.get(name) for name in chosen if names is not None or name in self.registry.nodes]
            for node in nodes:
                if node.state == "lost":
                    raise ConfigError(f"node {node.name!r} is lost ({node.problem}); name the others with nodes=")
            yield nodes

    async def _change(
        self,
        mode: Mode | None,
        changes: Mapping[str, allocate.Change],
        *,
        timeout: float | None = None,
        dry_run: bool = False,
    ) -> Report:
        """Check a change with the agents, carry it out, and report; `mode` None keeps each node's own."""
        began = time.perf_counter()
        nodes = {name: self.registry.get(name) for name in changes}
        named = {
            name: dict(zip(nodes[name].take_names(len(c.come)), c.come, strict=True)) for name, c in changes.items()
        }
        modes_now = {name: mode or self.mode_of(node) for name, node in nodes.items()}
        await self._preflight(nodes, modes_now, changes, named)
        swap = Swap(
            scheduler=self.scheduler,
            nodes=nodes,
            changes=changes,
            named=named,
            modes=modes_now,
            start_timeout=timeout or self.config.start_timeout,
            retire_timeout=timeout or self.config.retire_timeout,
            stop_timeout=self.config.stop_timeout,
        )
        if not dry_run:
            try:
                await swap.run()
            finally:
                await self.notify()
            for name in changes:
                self.errors.pop(name, None)
        label = mode.name if mode else ", ".join(sorted({m.name for m in modes_now.values()}))
        return {
            "mode": label,
            "nodes": {name: to_wire(swap.report(name)) for name in changes},
            "seconds": time.perf_counter() - began,
            "dry_run": dry_run,
        }

    async def _preflight(
        self,
        nodes: Mapping[str, Node],
        modes_now: Mapping[str, Mode],
        changes: Mapping[str, allocate.Change],
        named: Mapping[str, Mapping[str, WorkerSpec]],
    ) -> None:
        """Collect every reason why the change cannot be; raise them as one."""
        refusals = self._immovable(changes, coming=any(named.values()))

        async def ask(name: str) -> None:
            try:
                async with asyncio.timeout(self.config.start_timeout):
                    agent: Any = self.scheduler.rpc(nodes[name].address)
                    answer = await agent.check_workers(specs=to_wire(named[name]))
            except Exception as error:  # the scheduler turns whatever the agent raised into a plain Exception
                refusals[name] = f"its agent does not answer: {error or type(error).__name__}"
            else:
                if answer:
                    refusals[name] = next(iter(answer.values()))

        await asyncio.gather(*(ask(name) for name, specs in named.items() if specs and name not in refusals))
        for name in changes:
            node = self.registry.nodes.get(name, nodes[name])
            if node.state == "lost" or node is not nodes[name]:
                refusals[name] = f"it was lost meanwhile: {node.problem or 'its agent joined again'}"
        if refusals:
            mode = next(modes_now[name].name for name in refusals)
            raise PreflightError(mode, refusals)

    def _immovable(self, changes: Mapping[str, allocate.Change], *, coming: bool) -> dict[str, str]:
        """Say of each node which of its data could not be moved."""
        refusals = {}
        left = {} if coming else stranded(self.scheduler, [w for change in changes.values() for w in change.go])
        for name, change in changes.items():
            keys = sum(left.get(worker, 0) for worker in change.go)
            if keys:
                refusals[name] = (
                    f"its workers hold the only copies of {keys} keys and no other worker could take them; "
                    f"keep a worker on some node, or release those results first"
                )
            for worker, found in actors(self.scheduler, change.go).items():
                refusals[name] = f"worker {worker} holds actors, which cannot be moved: {', '.join(found)}"
        return refusals

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


def _without(node: Node, leaving: Iterable[str], come: tuple[WorkerSpec, ...] = ()) -> allocate.Change:
    """Return the change that takes workers from a node's plan."""
    go = tuple(worker for worker in node.plan.workers if worker in set(leaving))
    keep = {worker: spec for worker, spec in node.plan.workers.items() if worker not in go}
    return allocate.Change(keep, go, come)
