"""The long-lived entries of a cluster: nodes, and a scheduler that does not live in this process.

Each is one of SpecCluster's ``ProcessInterface`` objects around what a launcher brought up, which it owns until
:meth:`~LaunchedProcess.close`. :class:`Blueprint` says what is launched, and what it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dask
from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.spec import ProcessInterface
from distributed.security import Security

from agentcluster.config import overrides
from agentcluster.errors import ConfigError
from agentcluster.launch import launchers_for
from agentcluster.launch.protocol import Launched, Launcher, Settings
from agentcluster.model import Hardware
from agentcluster.security import credentials_for_role, has_credentials
from agentcluster.wire import from_wire, plain

logger = logging.getLogger(__name__)


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
            security=credentials_for_role(self.security, role) if has_credentials(self.security) else {},
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


#: Seconds for which a host is left alone after a launch that failed, doubled for each further one.
RETRY = 10.0

#: Their most.
LONGEST_RETRY = 600.0


class Reserve:
    """Keeps hosts in the order in which they are launched; what is known of their hardware comes from earlier times.

    Parameters
    ----------
    launchers
        How an agent gets to each of them, an object with ``name``.
    """

    def __init__(self, launchers: Iterable[Any] = ()) -> None:
        self._launchers = {launcher.name: launcher for launcher in launchers}
        self._out: set[str] = set()
        self._hardware: dict[str, Hardware] = {}
        self._failures: dict[str, tuple[int, float]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._launchers

    @property
    def here(self) -> tuple[str, ...]:
        """Names of the hosts that are not launched, first those that never failed, then as they were given."""
        names = [name for name in self._launchers if name not in self._out]
        return tuple(sorted(names, key=lambda name: self._failures.get(name, (0, 0.0))))

    @property
    def out(self) -> tuple[str, ...]:
        """Names of those that are, or are just being."""
        return tuple(name for name in self._launchers if name in self._out)

    def add(self, launcher: Any) -> None:
        """Take one more host."""
        self._launchers[launcher.name] = launcher

    def forget(self, name: str) -> None:
        """Have a host no more."""
        self._launchers.pop(name, None)
        self._out.discard(name)

    def ready(self, now: float) -> dict[str, Hardware | None]:
        """Return the hosts that may be launched at a time (seconds) -> their hardware, None where it is unknown."""
        return {name: self._hardware.get(name) for name in self.here if self._failures.get(name, (0, 0.0))[1] <= now}

    def take(self, name: str) -> Any:
        """Return the launcher of a host that is to be launched."""
        self._out.add(name)
        return self._launchers[name]

    def failed(self, name: str, now: float) -> None:
        """Leave a host alone for a while, because its launch failed."""
        count = self._failures.get(name, (0, 0.0))[0] + 1
        self._failures[name] = count, now + min(RETRY * 2.0 ** min(count - 1, 32), LONGEST_RETRY)
        self._out.discard(name)

    def came(self, name: str, hardware: Mapping[str, Any]) -> None:
        """Remember what a launched host has, given as plain data."""
        self._failures.pop(name, None)
        self._hardware[name] = from_wire(Hardware, hardware, f"hardware of {name}")

    def back(self, name: str) -> None:
        """Have a host back whose agent has ended."""
        self._out.discard(name)


class Launching:
    """Launches hosts of a cluster's reserve in the background, and lets go of those that have no workers.

    Parameters
    ----------
    cluster
        The cluster.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._task: asyncio.Task[None] | None = None
        self._now: tuple[str, ...] = ()

    def hosts(self) -> dict[str, Hardware | None]:
        """Return the hosts that may come, those first that are being launched -> their hardware where it is known."""
        return {**dict.fromkeys(self._now), **self._cluster._reserve.ready(time.monotonic())}

    def begin(self, names: Sequence[str], then: Callable[[Sequence[str], Mapping[str, str]], Awaitable[None]]) -> None:
        """Launch hosts, unless some are being launched.

        Parameters
        ----------
        names
            The hosts.
        then
            Called with them, and with those that did not come -> why.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(names, then), name="agentcluster launches hosts in standby")

    async def _run(
        self, names: Sequence[str], then: Callable[[Sequence[str], Mapping[str, str]], Awaitable[None]]
    ) -> None:
        self._now = tuple(names)
        try:
            failed = await self._cluster._call_up(names)
        except Exception as error:  # whatever it is, it is said
            failed = dict.fromkeys(names, str(error) or type(error).__name__)
        finally:
            self._now = ()
        try:
            await then(names, failed)
        except Exception as error:  # the cluster was closed meanwhile
            logger.debug("Nobody hears what became of %s: %s", ", ".join(names), error)

    async def let_go(self) -> list[str]:
        """End agents of the reserve that have no workers; return the hosts."""
        if self._now or not self._cluster._extra():
            return []
        await self._cluster._refresh()
        gone: list[str] = await self._cluster._let_go()
        return gone
