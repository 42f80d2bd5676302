"""The long-lived entries of a cluster: a node, and a scheduler that does not live in this process.

Each is one of SpecCluster's ``ProcessInterface`` objects around what a launcher brought up; it owns that until
:meth:`close`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from distributed.core import Status
from distributed.deploy.spec import ProcessInterface

from agentcluster.launch.protocol import Launched, Launcher, Settings


class LaunchedProcess(ProcessInterface):
    """What a launcher brought up.

    Parameters
    ----------
    launcher
        How it comes to run.
    settings
        What it is told.
    launch_timeout, stop_timeout
        Seconds for the launch, and for a clean end.
    """

    def __init__(self, launcher: Launcher, settings: Settings, *, launch_timeout: float, stop_timeout: float) -> None:
        super().__init__()
        self.launcher = launcher
        self.settings = settings
        self.launched: Launched | None = None
        self._launch_timeout = launch_timeout
        self._stop_timeout = stop_timeout
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Launch the process and wait for its ready line."""
        try:
            self.launched = await self.launcher.launch(self.settings, timeout=self._launch_timeout)
        except BaseException:
            self.status = Status.failed
            self._event_finished.set()
            raise
        self.address = self.launched.ready.address
        self._follower = asyncio.create_task(self._follow(self.launched), name=f"follow {self.launcher.where}")
        self.status = Status.running

    async def _follow(self, launched: Launched) -> None:
        await launched.wait()
        self._event_finished.set()

    async def close(self) -> None:
        """End the process; idempotent."""
        if self.launched is not None:
            self.status = Status.closing
            await self.launched.close(self._stop_timeout)
            if self._follower is not None:
                self._follower.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._follower
        if self.status is not Status.failed:
            self.status = Status.closed
        self._event_finished.set()

    @property
    def ended(self) -> bool:
        """Whether the process has ended, by itself or by :meth:`close`."""
        return self._event_finished.is_set()

    def lines(self) -> list[str]:
        """Return the last lines that the process logged."""
        return [] if self.launched is None else self.launched.log.lines()


class NodeProcess(LaunchedProcess):
    """One node of a cluster: an agent on a host, whatever its workers are at the moment.

    Parameters
    ----------
    scheduler
        Address of the scheduler that the agent joins.
    name
        The node's name.
    settings
        What the agent is told, less the two above.
    """

    def __init__(self, scheduler: str, *, name: str, settings: Settings, **options: Any) -> None:
        told = Settings(**{**vars(settings), "scheduler": scheduler, "name": name})
        super().__init__(settings=told, **options)
        self.name = name

    def __repr__(self) -> str:
        return f"<Node {self.name!r} on {self.launcher.where}: {self.status.name}>"


class JoinedScheduler(ProcessInterface):
    """A scheduler that somebody else runs.

    Parameters
    ----------
    address
        Where it listens.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
