"""Cluster managers that give workers up, without waiting until they do.

A SpecCluster, and whatever derives from it, looks some time after a worker has gone (``lost-worker-timeout``) whether
another one bears its name, and closes the job where none does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dask
import pytest
from distributed import SpecCluster

from tests.support.waiting import wait_until

#: The function in which a SpecCluster looks for a worker that has gone.
LOOK = "SpecCluster._update_worker_status.<locals>.f"


class GivingUp:
    """The looks that managers of a test have set, which come when the test says so and not by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._looks: list[Callable[[], Any]] = []
        call_later = asyncio.BaseEventLoop.call_later

        def kept(loop: Any, delay: float, callback: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(callback, "__qualname__", "") == LOOK:
                self._looks.append(callback)
            return call_later(loop, delay, callback, *args, **kwargs)

        monkeypatch.setattr(asyncio.BaseEventLoop, "call_later", kept)
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})

    async def look(self, cluster: SpecCluster) -> None:
        """Let a manager look for all workers that have gone so far, once it knows all that the scheduler knows."""
        await wait_until(lambda: set(cluster.scheduler_info["workers"]) == set(cluster.scheduler.workers))
        looks, self._looks = self._looks, []
        assert looks, "no worker has gone, or dask looks for it in another way"
        for look in looks:
            look()
