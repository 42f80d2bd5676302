"""Runs an agent by way of a system that keeps processes running: a batch queue, a container manager, a cloud.

That system runs ``dask-agent --standby``; this launcher has it do so, adopts the agent when it is there, and gives it
back at the end. A subclass says in three methods how to ask that system; patience, deadlines and tidying up are here.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any

from agentcluster.errors import LaunchError, LaunchTimeout, one_line
from agentcluster.launch.attached import Adopted, AttachedLauncher
from agentcluster.launch.protocol import Settings

logger = logging.getLogger("agentcluster.launch")

#: Seconds between two looks whether the agent is there.
LOOK = 0.5


class ManagedLauncher(ABC):
    """A :class:`~agentcluster.launch.protocol.Launcher` for an agent that another system starts and stops.

    Parameters
    ----------
    name
        The node's name.
    where
        Where its agent runs, for messages; without a password.
    standby
        Ask for nothing until its workers are needed, and give the agent back when they are not any more.

    Notes
    -----
    What the three methods raise becomes a :class:`~agentcluster.errors.LaunchError` that names `where`.
    """

    def __init__(self, name: str, where: str, *, standby: bool = False) -> None:
        self.name = name
        self.where = where
        self.standby = standby

    @abstractmethod
    async def start(self) -> None:
        """Ask for one agent, ``dask-agent --standby --listen-address …``.

        Never cancelled, so that it is known what was asked for; a call that may take long needs a limit of its own.
        """

    @abstractmethod
    async def address(self) -> str | None:
        """Return where the agent listens, such as ``tcp://10.0.0.5:8790``; None as long as it is not there."""

    @abstractmethod
    async def stop(self) -> None:
        """Give the agent back, or what may be there of it; returns when it is gone.

        Called once for each :meth:`start` that did not fail, also when the agent never came.
        """

    async def launch(self, settings: Settings, *, timeout: float) -> ManagedAgent:
        """Have an agent started and adopt it; see :class:`~agentcluster.launch.protocol.Launcher`."""
        starting = asyncio.ensure_future(self._ask(self.start()))
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(starting)
                while (address := await self._ask(self.address())) is None:
                    await asyncio.sleep(LOOK)
                adopted = await AttachedLauncher(address, name=self.name).launch(settings, timeout=timeout)
                return ManagedAgent(self, adopted)
        except BaseException as error:
            await asyncio.shield(self._tidy(starting, timeout))
            if isinstance(error, TimeoutError):
                raise LaunchTimeout(self.where, f"no agent of it was ready within {timeout:g} s") from error
            raise

    async def _ask(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except (LaunchError, TimeoutError):
            raise
        except OSError as error:
            raise LaunchError(self.where, f"it cannot be reached: {error}") from error
        except Exception as error:
            raise LaunchError(self.where, one_line(error)[:500]) from error

    async def _tidy(self, starting: asyncio.Future[None], timeout: float) -> None:
        """Stop what was started, once it is known whether it was."""
        [failed] = await asyncio.gather(starting, return_exceptions=True)
        if failed is None or isinstance(failed, TimeoutError):  # no answer: it may have been
            await self.given_back(timeout)

    async def given_back(self, timeout: float) -> None:
        """Call :meth:`stop`, for at most so many seconds, and say where that failed."""
        try:
            async with asyncio.timeout(timeout):
                await self._ask(self.stop())
        except (LaunchError, TimeoutError) as error:
            why = str(error) or f"not gone within {timeout:g} s"
            logger.warning("The agent of node %s may still be there: %s", self.name, why)


class ManagedAgent:
    """The agent, adopted; closing it gives it back (a :class:`~agentcluster.launch.protocol.Launched`)."""

    def __init__(self, launcher: ManagedLauncher, agent: Adopted) -> None:
        self.ready, self.log = agent.ready, agent.log
        self._launcher, self._agent = launcher, agent
        self._closing: asyncio.Task[None] | None = None

    async def wait(self) -> int | None:
        """Return when the agent is not this cluster's any more."""
        return await self._agent.wait()

    async def close(self, timeout: float) -> None:
        """Release the agent, and give it back; every caller waits for the same end."""
        self._closing = self._closing or asyncio.create_task(self._close(timeout))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        await self._agent.close(timeout)
        await self._launcher.given_back(timeout)
