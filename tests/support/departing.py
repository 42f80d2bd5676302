"""A scheduler with workers of a node, all in this process, whose workers are replaced as a swap does it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable

import dask
from distributed import Client, Event, Future, Scheduler, Worker, get_worker

from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import NodeRegistration
from agentcluster.scheduler import managers
from agentcluster.scheduler.departures import BINDINGS, CALLS, Bindings, CallsInFlight
from agentcluster.scheduler.evacuation import Evacuation, evacuate
from agentcluster.scheduler.planning.nodes import Node, Registry
from tests.support.waiting import wait_until

LONG = 20.0
CPU = WorkerSpec("cpu", "distributed.Nanny", nthreads=1)


@dataclasses.dataclass
class Cluster:
    """A scheduler with nodes and their workers, all in this process; most calls are on the first node."""

    scheduler: Scheduler
    client: Client
    registry: Registry
    workers: dict[str, Worker] = dataclasses.field(default_factory=dict)

    @property
    def bindings(self) -> Bindings:
        found: Bindings = self.scheduler.extensions[BINDINGS]
        return found

    @property
    def calls(self) -> CallsInFlight:
        found: CallsInFlight = self.scheduler.extensions[CALLS]
        return found

    @property
    def node(self) -> Node:
        return next(iter(self.registry.nodes.values()))

    async def start(self, *names: str, node: Node | None = None) -> None:
        """Start workers; the node has them in its plan at once."""
        for name in names:
            self.workers[name] = await Worker(self.scheduler.address, name=name, nthreads=1, memory_limit=0)
        node = node or self.node
        node.plan = dataclasses.replace(node.plan, workers=dict.fromkeys([*node.plan.workers, *names], CPU))

    def address(self, name: str) -> str:
        return self.workers[name].address

    async def replace(self, old: Iterable[str], new: Iterable[str], **how: float | str) -> Evacuation:
        """Replace workers as a swap does: the new ones run when the old ones leave."""
        before, after = tuple(old), tuple(new)
        node = self.registry.owner(before[0]) if before else self.node
        assert node is not None
        await self.start(*after, node=node)
        self.bindings.leave(node.name, before)
        self.bindings.arrive(node.name, after)
        return await self.leave(before, **how)

    async def leave(self, names: Iterable[str], **how: float | str) -> Evacuation:
        gone = tuple(names)
        result = await evacuate(self.scheduler, gone, LONG, **{"drain_timeout": LONG, **how})  # type: ignore[arg-type]
        if result.problem is None:
            for node in self.registry.nodes.values():
                staying = {name: spec for name, spec in node.plan.workers.items() if name not in gone}
                node.plan = dataclasses.replace(node.plan, workers=staying)
            await asyncio.gather(*(self.workers[name].close(executor_wait=False) for name in gone))
        return result

    def bound(self, *workers: str, key: str | None = None) -> Future[str]:
        """Submit a task that may run on these workers only; its result is where it ran."""
        return self.client.submit(where, workers=list(workers), key=key, pure=False)

    async def state(self, future: Future[str], state: str) -> None:
        await wait_until(lambda: future.key in self.scheduler.tasks)
        await wait_until(lambda: self.scheduler.tasks[future.key].state == state)


def where() -> str:
    return str(get_worker().name)


def until(event: str) -> str:
    Event(event).wait(LONG)
    return where()


@contextlib.asynccontextmanager
async def departing(*nodes: str) -> AsyncIterator[Cluster]:
    """Yield a cluster with nodes that have no workers yet."""
    with dask.config.set({"distributed.worker.http.routes": []}):
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0") as scheduler,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            registry = Registry()
            managers.install(scheduler, registry, LONG)
            for name in nodes:
                joined = NodeRegistration(name, f"tcp://{name}:1", Hardware("host", 2, 2**30, ()))
                node = registry.register(joined, now=0.0)
                node.plan = dataclasses.replace(node.plan, mode=Mode("uniform"))
            cluster = Cluster(scheduler, client, registry)
            try:
                yield cluster
            finally:
                await asyncio.gather(*(worker.close(executor_wait=False) for worker in cluster.workers.values()))
