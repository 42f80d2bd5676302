"""View of the nodes: it never goes back to an older answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from distributed.core import Status

from agentcluster.client.display import NodeView


class Scheduler:
    """Answers the questions for nodes in the order that the test wants."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[dict[str, Any]]] = []

    async def get_nodes(self) -> dict[str, Any]:
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]


async def test_an_answer_that_was_overtaken_is_dropped() -> None:
    scheduler = Scheduler()
    cluster = SimpleNamespace(status=Status.running, scheduler_comm=scheduler, worker_spec={}, workers={})
    view = NodeView(cast(Any, cluster), 1.0)
    first, second = asyncio.ensure_future(view.refresh()), asyncio.ensure_future(view.refresh())
    await asyncio.sleep(0)
    before, after = scheduler.asked
    after.set_result({"a": {"state": "ready"}, "b": {"state": "ready"}})
    await second
    assert list(view.nodes) == ["a", "b"]
    before.set_result({"a": {"state": "joining"}})
    await first
    assert list(view.nodes) == ["a", "b"]
    third = asyncio.ensure_future(view.refresh())
    await asyncio.sleep(0)
    scheduler.asked[-1].set_result({"b": {"state": "ready"}})
    await third
    assert list(view.nodes) == ["b"]
