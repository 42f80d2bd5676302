"""Random demand on three nodes that adapt: no key is lost, no task is stuck, no mode changes without a reason.

The suite runs 12 cycles. ``AGENTCLUSTER_TEST_FULL=1`` runs 1,000, which takes about 7 minutes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Mapping
from typing import Any

import pytest
from distributed import Client, Future

from agentcluster import AgentCluster, Mode
from agentcluster.model import WorkerSpec
from agentcluster.scheduler.planning.nodes import Node
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER

FULL = os.environ.get("AGENTCLUSTER_TEST_FULL") == "1"
CYCLES = 1000 if FULL else 12

#: Seconds in which tasks that could run must be done; more are "stuck".
PLENTY = 60.0

QUIET: dict[str, Any] = {"asynchronous": True, "scheduler_options": SCHEDULER}
CPU = Mode("uniform", {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"})


def _spec(resource: str) -> Mode:
    opts = {"nthreads": 1, "memory_limit": "300MiB", "resources": {resource: 2}}
    return Mode("spec", {"spec": {resource.lower(): {"cls": "dask.distributed.Nanny", "opts": opts}}})


#: What tasks of a cycle ask for; the last is that there are none.
WISHES: tuple[dict[str, float] | None, ...] = ({}, {"BIG": 1}, {"BIG": 2}, {"WIDE": 1}, None)


@pytest.mark.timeout(7200 if FULL else 120)
async def test_random_demand(dice: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[bytes, Future] = {}
    wishes = []
    modes: dict[str, list[Mode]] = {}
    adopt = Node.adopt

    def recorded(node: Node, mode: Mode, workers: Mapping[str, WorkerSpec]) -> None:
        adopt(node, mode, workers)
        modes.setdefault(node.name, []).append(mode)

    monkeypatch.setattr(Node, "adopt", recorded)

    def work(number: int, seconds: float) -> int:  # inside: workers cannot import this module
        import time

        time.sleep(seconds)
        return number

    async with (
        AgentCluster(hosts=here(3), mode=CPU, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        cluster.adapt(
            minimum=1,
            modes=[CPU, _spec("BIG"), _spec("WIDE")],
            interval="50ms",
            wait_count=dice.choice([2, 4]),
            target_duration="500ms",
        )
        for cycle in range(CYCLES):
            wish = dice.choice(WISHES)
            wishes.append(wish)
            if wish is not None:
                count, seconds = dice.randint(1, 12), dice.choice([0.0, 0.02, 0.2])
                futures = client.map(work, range(count), seconds=seconds, resources=wish or None, pure=False)
                async with asyncio.timeout(PLENTY):
                    assert await client.gather(futures) == list(range(count)), f"cycle {cycle}"
                del futures
            value = dice.randbytes(1000)
            # No task can make it again: what is lost is missed.
            kept[value] = await client.scatter(value, hash=False)
            if len(kept) > 40:
                del kept[dice.choice(list(kept))]
            await asyncio.sleep(dice.choice([0, 0, 0.05, 0.3]))
        assert await client.gather(list(kept.values())) == list(kept)
        assert not [ts for ts in cluster.scheduler.tasks.values() if ts.suspicious]
        # A wish that differs from the one before asks for at most one change, and its end for one back.
        changes = 2 * sum(one != other for one, other in itertools.pairwise([{}, *wishes]))
        print(f"{len(wishes)} cycles, {changes} changes of demand and back")
        assert len(modes) == 3
        for had in modes.values():
            assert sum(one != other for one, other in itertools.pairwise(had)) <= changes
