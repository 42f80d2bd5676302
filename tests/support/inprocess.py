"""A launcher whose agents run in the event loop of the test, so that no process has to be started and to import.

Their workers are processes as ever, forked from one forkserver that stays warm from test to test.
"""

from __future__ import annotations

import os

from distributed.security import Security

from agentcluster.agent.agent import Agent
from agentcluster.launch.local import LocalLauncher
from agentcluster.launch.protocol import Launched, LogTail, Ready, Settings
from agentcluster.wire import unpickled


class InProcess(LocalLauncher):
    """Launches an agent in this process; a local host in all else."""

    async def launch(self, settings: Settings, *, timeout: float) -> Launched:
        """Start the agent, as ``agentcluster.cli.launched`` does in its process."""
        security = Security(**settings.security)
        options = unpickled(settings.options)
        agent = Agent(settings.scheduler, name=settings.name, security=security, lasting=True, **options)
        try:
            return _Here(await agent)
        except BaseException:
            await agent.close()
            raise


class _Here:
    """An agent in this process (a ``Launched``)."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.ready = Ready(agent.address, os.getpid(), versions=agent.hardware.versions, hardware=agent.hardware)
        self.log = LogTail()

    async def close(self, timeout: float) -> None:
        await self.agent.close()

    async def wait(self) -> int | None:
        await self.agent.finished()
        return 0


def here(count: int = 1) -> list[InProcess]:
    """Return agents in this process, named as ``hosts=["local"] * count`` names them."""
    return [InProcess("local" if number == 1 else f"local.{number}") for number in range(1, count + 1)]
