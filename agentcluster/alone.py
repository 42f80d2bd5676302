"""A node whose scheduler takes no plugin: it runs the workers of its first mode, and nobody can change them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from agentcluster import modes
from agentcluster.membership import Membership
from agentcluster.model import Hardware, Mode, WorkerState, from_wire
from agentcluster.registry import like_dask

logger = logging.getLogger(__name__)


class Alone(Membership):
    """A membership that the scheduler knows nothing of.

    Parameters
    ----------
    mode
        What runs.
    **terms
        As for :class:`Membership`; the end, there the scheduler's, is here that of the last worker.
    """

    def __init__(self, *terms: Any, mode: Mode, **more: Any) -> None:
        super().__init__(*terms, **more)
        self._mode = mode

    async def join(self, node: Mapping[str, Any], timeout: float | None = None) -> None:
        """Start the workers."""
        self.name = node["name"]
        specs = modes.plan(self._mode, from_wire(Hardware, node["hardware"]), node=self.name)
        named = dict(zip(like_dask(self.name, len(specs)), specs, strict=True))
        await self.supervisor.start(named, self._settings.start_timeout)

    async def provisioned(self, timeout: float) -> str:
        """Return at once: they were waited for."""
        return self._mode.name

    async def retire(self) -> None:
        """Have dask move the workers' data to others; it does not say what became of it."""
        # also of those of which only the scheduler knows yet that they are up
        names = [state.name for state in self.supervisor.states()]
        try:
            async with asyncio.timeout(self._settings.stop_timeout), self._scheduler() as scheduler:
                await scheduler.retire_workers(names=names, close_workers=False, remove=True)
        except Exception as error:  # whatever the scheduler answers, it does not keep this process from ending
            logger.info("Node %s closes with its data: %s", self.name, error or type(error).__name__)

    def _report(self, state: WorkerState) -> None:
        others = [each for each in self.supervisor.states() if each.name != state.name]
        if state.state in ("retired", "failed") and not others:
            logger.info("Node %s ends: its last worker %s", self.name, state.problem or "was retired")
            self._on_end("workers-gone")
