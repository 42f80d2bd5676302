"""Random tasks, bound to workers and nodes at random, under random changes: each whose node is there ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from distributed import Future, Status
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcluster.model import Mode, WorkerSpec
from agentcluster.scheduler import preflight
from agentcluster.scheduler.planning.change import NodeChange
from tests.support.departing import LONG, Cluster, departing, where
from tests.support.waiting import wait_until

NODES = ("n", "m")
CPU = WorkerSpec("cpu", "distributed.Nanny", nthreads=1)


@dataclass(frozen=True)
class Submit:
    """A task bound to a worker that there is or was, by address or name, or to a node; it may need earlier ones."""

    by: Literal["address", "name", "node", "nothing"]
    which: int
    needs: tuple[int, ...]
    loose: bool


@dataclass(frozen=True)
class Change:
    """All workers of a node are replaced by so many."""

    node: int
    workers: int


SUBMITS = st.builds(
    Submit,
    st.sampled_from(["address", "name", "node", "nothing"]),
    st.integers(0, 30),
    st.lists(st.integers(0, 30), max_size=2).map(tuple),
    st.sampled_from([False, False, True]),
)
CHANGES = st.builds(Change, st.integers(0, 1), st.integers(0, 3))


class Story:
    """Actions on a cluster, and what is to be expected of each task."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.names: list[tuple[str, str]] = []  # of each worker ever, and of its node
        self.there: dict[str, list[str]] = {node: [] for node in NODES}
        self.futures: list[Future[str]] = []
        self.bound: list[str | None] = []  # the node without which a task cannot run

    async def start(self, node: str, number: int) -> list[str]:
        names = [f"{node}-{len(self.names) + i}" for i in range(number)]
        self.names += [(name, node) for name in names]
        return names

    def submit(self, task: Submit) -> None:
        name, node = self.names[task.which % len(self.names)]
        target = {"address": self.cluster.address(name), "name": name, "node": node}.get(task.by)
        needs = [self.futures[i % len(self.futures)] for i in task.needs] if self.futures else []
        how = {} if target is None else {"workers": [target], "allow_other_workers": task.loose}
        self.futures.append(self.cluster.client.submit(lambda *_: where(), *needs, pure=False, **how))
        self.bound.append(None if target is None or task.loose else node)

    async def change(self, change: Change) -> None:
        node = NODES[change.node]
        elsewhere = sum(len(names) for name, names in self.there.items() if name != node)
        new = await self.start(node, change.workers or (0 if elsewhere else 1))
        if self.there[node]:
            assert (await self.cluster.replace(self.there[node], new)).problem is None
        else:
            await self.cluster.start(*new, node=self.cluster.registry.nodes[node])
            self.cluster.bindings.arrive(node, new)
        self.there[node] = new

    async def ends(self) -> None:
        """Hold that all tasks end but those whose node has no workers, which are named, and those that need them."""
        empty = {node for node, names in self.there.items() if not names}
        tasks = self.cluster.scheduler.tasks
        settled = ("memory", "no-worker", "waiting")
        workers = self.cluster.scheduler.workers
        await wait_until(lambda: all(ws.status is Status.running for ws in workers.values()), LONG)
        await wait_until(lambda: all(f.key in tasks and tasks[f.key].state in settled for f in self.futures), LONG)
        stuck = {f.key for f, node in zip(self.futures, self.bound, strict=True) if node in empty}
        left = {f.key for f in self.futures if tasks[f.key].state != "memory"}
        change = NodeChange(self.cluster.node, Mode("none"), remove={"gone": CPU})
        named = set(preflight.stranded_tasks(self.cluster.scheduler, dict.fromkeys(NODES, change)))
        assert named == left & stuck
        for key in left - stuck:  # it needs one that cannot run
            assert any(needed.key in left for needed in tasks[key].dependencies)


async def carry_out(actions: list[Submit | Change]) -> None:
    async with departing(*NODES) as cluster:
        story = Story(cluster)
        for node, number in (("n", 2), ("m", 1)):
            await story.change(Change(NODES.index(node), number))
        for action in actions:
            if isinstance(action, Submit):
                story.submit(action)
            else:
                await story.change(action)
        await story.ends()


@settings(max_examples=8)
@given(st.lists(SUBMITS | SUBMITS | CHANGES, min_size=3, max_size=14))
def test_each_task_whose_node_is_there_ends_and_the_others_are_named(actions: list[Submit | Change]) -> None:
    asyncio.run(carry_out(actions))
