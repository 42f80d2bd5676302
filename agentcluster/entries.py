"""The long-lived entries of a cluster: nodes, and a scheduler that does not live in this process.

Each is one of SpecCluster's ``ProcessInterface`` objects around what a launcher brought up, which it owns until
:meth:`~LaunchedProcess.close`. :class:`Blueprint` says what is launched, and what it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import dask
from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.spec import ProcessInterface
from distributed.security import Security

from agentcluster import credentials
from agentcluster.config import overrides
from agentcluster.errors import ConfigError
from agentcluster.launch import launchers_for
from agentcluster.launch.protocol import Launched, Launcher, Settings
from agentcluster.model import plain


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


@dataclass(frozen=True)
class Blueprint:
    """How a cluster's entries are made: the forms that SpecCluster keeps in ``worker_spec`` and ``scheduler_spec``.

    Attributes
    ----------
    security
        Credentials of the cluster.
    worker_options
        Keyword arguments for every worker, whatever its mode.
    launch_options
        ``connect_options`` and ``remote_python``, for hosts that are reached by SSH.
    launch_timeout, stop_timeout
        Seconds for a launch, and for the end of a worker.
    """

    security: Security
    worker_options: Mapping[str, Any]
    launch_options: Mapping[str, Any]
    launch_timeout: float
    stop_timeout: float

    def launcher(self, host: Any) -> Launcher:
        """Return the launcher of one more host."""
        [launcher] = launchers_for([host], **self.launch_options)
        return launcher

    def node(self, launcher: Launcher) -> dict[str, Any]:
        """Return the entry of a node; its workers' names are filled in when it has some."""
        return {
            "cls": NodeProcess,
            "options": {
                "name": launcher.name,
                "launcher": launcher,
                "settings": self._told("worker", {**self.worker_options, **_labels(launcher)}),
                "launch_timeout": self.launch_timeout,
                "stop_timeout": 2 * self.stop_timeout,
            },
            "group": [],
        }

    def scheduler(self, where: Any, options: Mapping[str, Any], *, loopback: bool) -> dict[str, Any]:
        """Return the entry of a scheduler.

        Parameters
        ----------
        where
            None for this process, an address to join, or a host.
        options
            Keyword arguments of :class:`distributed.Scheduler`.
        loopback
            Whether one in this process is reached from this machine only.

        Raises
        ------
        ConfigError
            When options are given to a scheduler that runs.
        """
        if where is None:
            here = {"host": "127.0.0.1"} if loopback else {}
            return {"cls": Scheduler, "options": {"security": self.security, **here, **options}}
        if is_address(where):
            if options:
                raise ConfigError(
                    f"scheduler_options cannot be given to the scheduler at {where}: it runs already",
                    key="scheduler_options",
                )
            return {"cls": JoinedScheduler, "options": {"address": where}}
        return {
            "cls": LaunchedProcess,
            "options": {
                "launcher": self.launcher(where),
                "settings": self._told("scheduler", options),
                "launch_timeout": self.launch_timeout,
                "stop_timeout": self.stop_timeout,
            },
        }

    def _told(self, role: Literal["worker", "scheduler"], options: Mapping[str, Any]) -> Settings:
        """Return what a launched process is told."""
        pre_spawn = dask.config.get("distributed.nanny.pre-spawn-environ")
        return Settings(
            role="agent" if role == "worker" else "scheduler",
            security=credentials.for_role(self.security, role) if credentials.encrypted(self.security) else {},
            config=plain(overrides()),
            pre_spawn={key: str(value) for key, value in pre_spawn.items() if value is not None},
            options=plain(options),
        )


def is_address(where: Any) -> bool:
    """Whether `where` is the address of something that runs, and no host to launch on."""
    return isinstance(where, str) and "://" in where


def _labels(launcher: Launcher) -> dict[str, Any]:
    labels = getattr(launcher, "labels", None)
    return {"labels": dict(labels)} if labels else {}


def in_standby(launcher: Launcher) -> bool:
    """Whether an agent is launched only when its workers are needed."""
    return bool(getattr(launcher, "standby", False))


def is_remote(launcher: Launcher) -> bool:
    """Whether a launcher brings something up on another machine, as far as can be known."""
    return launcher.where != "local" and not is_address(launcher.where)
