"""Data on its way: what ``Client.scatter`` sends is on no worker, for the scheduler, until it is there.

A worker that left meanwhile would take it along, and who scattered it would get an error. So calls that are under way
are counted, and who wants workers to leave waits for those that began before no more data went there.
"""

from __future__ import annotations

import asyncio
from typing import Any

from distributed import Scheduler

from agentcluster.evacuation import ARRIVING


class Arriving:
    """The calls of ``scatter`` that a scheduler is carrying out.

    Parameters
    ----------
    scheduler
        The scheduler.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.calls: set[asyncio.Future[None]] = set()
        self._scheduler: Any = scheduler
        self._scatter: Any = scheduler.scatter

    def install(self) -> None:
        """Have the scheduler's ``scatter`` counted."""
        self._scheduler.scatter = self._scheduler.handlers["scatter"] = self.scatter
        self._scheduler.extensions[ARRIVING] = self

    async def scatter(self, *args: Any, **kwargs: Any) -> Any:
        """Do what ``Scheduler.scatter`` does."""
        call = asyncio.get_running_loop().create_future()
        self.calls.add(call)
        try:
            return await self._scatter(*args, **kwargs)
        finally:
            self.calls.discard(call)
            call.set_result(None)

    async def landed(self, timeout: float) -> None:
        """Wait for the data that is on its way now, for at most so many seconds."""
        if self.calls:
            await asyncio.wait(set(self.calls), timeout=timeout)
