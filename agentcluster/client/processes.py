"""Processes that a cluster launches: its nodes' agents, and a scheduler outside this process.

A :class:`LaunchedProcess` is one of SpecCluster's ``ProcessInterface`` objects around what a launcher started, and owns
it until it is closed. A :class:`Blueprint` makes the entries of ``worker_spec`` and ``scheduler_spec``.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from dataclasses import dataclass, field
from typing import Literal, TypedDict, Unpack

import dask
from distributed import Scheduler
from distributed.core import Server, Status
from distributed.deploy.spec import ProcessInterface
from distributed.security import Security

from agentcluster.client.calls import Plain
from agentcluster.config import overrides
from agentcluster.errors import AgentClusterError, ConfigError, LaunchError, one_line, suggest
from agentcluster.launch import launchers_for
from agentcluster.launch.protocol import Launched, Launcher, Settings
from agentcluster.security import LOOPBACK, credentials_for_role, has_credentials, is_private
from agentcluster.wire import plain

#: Keyword arguments of a scheduler.
SCHEDULER_OPTIONS = {*inspect.signature(Scheduler).parameters, *inspect.signature(Server).parameters} - {"kwargs"}


class LaunchOptions(TypedDict):
    """Keyword arguments of :class:`LaunchedProcess`."""

    launcher: Launcher
    settings: Settings
    launch_timeout: float
    stop_timeout: float


class NodeOptions(LaunchOptions):
    """Keyword arguments of :class:`NodeProcess`."""

    name: str


class NodeEntry(TypedDict):
    """Entry of a node in SpecCluster's ``worker_spec``; `group` has the suffixes of its workers' names."""

    cls: type[NodeProcess]
    options: NodeOptions
    group: list[str]


class LaunchedProcess(ProcessInterface):
    """Process that a launcher started.

    Parameters
    ----------
    launcher
        Launcher that starts it.
    settings
        Settings that the process receives.
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

    def __repr__(self) -> str:
        return f"<{self.settings.role.capitalize()} on {self.launcher.where}: {self.status.name}>"

    async def start(self) -> None:
        """Launch the process and wait for its ready line.

        Raises
        ------
        LaunchError
            When the process does not become ready.
        """
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
        """True when the process has ended, by itself or by :meth:`close`."""
        return self._event_finished.is_set()

    def lines(self) -> list[str]:
        """Return the last lines that the process logged.

        Returns
        -------
        list of str
            The lines, oldest first; empty before the launch.
        """
        return [] if self.launched is None else self.launched.log.lines()


class NodeProcess(LaunchedProcess):
    """Node of a cluster: an agent on a host.

    Parameters
    ----------
    scheduler
        Address of the scheduler that the agent joins.
    name
        Name of the node.
    settings
        Settings that the agent receives, without the two above.
    **options
        As for :class:`LaunchedProcess`.
    """

    def __init__(self, scheduler: str, **options: Unpack[NodeOptions]) -> None:
        settings = Settings(**{**vars(options["settings"]), "scheduler": scheduler, "name": options["name"]})
        super().__init__(
            options["launcher"],
            settings,
            launch_timeout=options["launch_timeout"],
            stop_timeout=options["stop_timeout"],
        )
        self.name = options["name"]

    def __repr__(self) -> str:
        return f"<Node {self.name!r} on {self.launcher.where}: {self.status.name}>"


class JoinedScheduler(ProcessInterface):
    """Scheduler that was started by others.

    Parameters
    ----------
    address
        Address at which it listens.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def __repr__(self) -> str:
        return f"<Scheduler at {self.address}, started by others>"


@dataclass(frozen=True)
class Blueprint:
    """Factory for the entries that SpecCluster keeps in ``worker_spec`` and ``scheduler_spec``.

    Attributes
    ----------
    security
        Credentials of the cluster.
    worker_options
        Keyword arguments for every worker, whatever its mode. Not in the repr: they may hold credentials.
    launch_options
        ``connect_options`` and ``remote_python``, for hosts that are reached by SSH. Not in the repr.
    launch_timeout, stop_timeout
        Seconds for a launch, and for the end of a worker.
    alone
        Whether the cluster is on this machine alone, where no other can reach its scheduler.
    """

    security: Security
    worker_options: Plain = field(repr=False)
    launch_options: Plain = field(repr=False)
    launch_timeout: float
    stop_timeout: float
    alone: bool = False

    def launcher(self, host: object) -> Launcher:
        """Return the launcher of one host.

        Parameters
        ----------
        host
            One of the forms that :func:`agentcluster.launch.launchers_for` knows.

        Returns
        -------
        Launcher
            The launcher.

        Raises
        ------
        ConfigError
            When the host cannot be used, or is another machine and the cluster is on this one alone.
        """
        [launcher] = launchers_for([host], **self.launch_options)
        if self.alone and (is_remote(launcher) or (is_address(launcher.where) and not is_private(launcher.where))):
            raise ConfigError(
                f"host {launcher.where!r} is another machine, and this cluster listens on this one alone, as all hosts "
                f"that it began with are here; name that host at the start, or give the cluster scheduler_options="
                f"{{'host': …}} and security=True",
                key="hosts",
            )
        return launcher

    def node(self, launcher: Launcher) -> NodeEntry:
        """Return the entry of a node.

        Parameters
        ----------
        launcher
            Launcher of its agent.

        Returns
        -------
        dict
            The entry; the names of its workers are filled in when it has some.
        """
        private = {}
        if self.alone:  # a worker that is told nothing listens on every address, and so does its HTTP server
            private["dashboard_address"] = f"{LOOPBACK}:0"
            if not {"host", "interface"} & self.worker_options.keys():
                private["host"] = LOOPBACK
        options: NodeOptions = {
            "name": launcher.name,
            "launcher": launcher,
            "settings": self._settings("worker", {**private, **self.worker_options, **_labels(launcher)}),
            "launch_timeout": self.launch_timeout,
            "stop_timeout": 2 * self.stop_timeout,
        }
        return {"cls": NodeProcess, "options": options, "group": []}

    def scheduler(self, where: object, options: Plain) -> Plain:
        """Return the entry of a scheduler.

        Parameters
        ----------
        where
            None for this process, the address of a scheduler to join, or a host.
        options
            Keyword arguments of :class:`distributed.Scheduler`.

        Returns
        -------
        dict
            The entry.

        Raises
        ------
        ConfigError
            When an option is unknown, or is given to a scheduler that already runs.
        """
        unknown = next((key for key in options if key not in SCHEDULER_OPTIONS), None)
        if unknown is not None:
            raise ConfigError(
                f"scheduler_options: unknown option {unknown!r}; {suggest(str(unknown), SCHEDULER_OPTIONS)}",
                key="scheduler_options",
            )
        if has_credentials(self.security) and not is_address(where):
            options = {"dashboard_address": f"{LOOPBACK}:8787", **options}
        if where is None:
            return {"cls": Scheduler, "options": {"security": self.security, **options}}
        if is_address(where):
            if options:
                raise ConfigError(
                    f"scheduler_options cannot be given to the scheduler at {where}: it already runs",
                    key="scheduler_options",
                )
            return {"cls": JoinedScheduler, "options": {"address": where}}
        launch: LaunchOptions = {
            "launcher": self.launcher(where),
            "settings": self._settings("scheduler", options),
            "launch_timeout": self.launch_timeout,
            "stop_timeout": self.stop_timeout,
        }
        return {"cls": LaunchedProcess, "options": launch}

    def _settings(self, role: Literal["worker", "scheduler"], options: Plain) -> Settings:
        """Return the settings that a launched process receives."""
        pre_spawn = dask.config.get("distributed.nanny.pre-spawn-environ")
        return Settings(
            role="agent" if role == "worker" else "scheduler",
            security=credentials_for_role(self.security, role) if has_credentials(self.security) else {},
            config=plain(overrides()),
            pre_spawn={key: str(value) for key, value in pre_spawn.items() if value is not None},
            options=plain(options),
        )


def scheduler_problem(error: BaseException, where: object, options: Plain) -> BaseException:
    """Return the reason why a scheduler did not start, in place of dask's error about the cluster.

    Parameters
    ----------
    error
        dask's error.
    where, options
        As for :meth:`Blueprint.scheduler`.

    Returns
    -------
    BaseException
        A LaunchError that names the scheduler; the cause itself for a scheduler that others started.
    """
    while isinstance(error, RuntimeError) and not isinstance(error, AgentClusterError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LaunchError):
        return type(error)(error.host, error.reason, error.last_output, what="scheduler")
    if isinstance(error, AgentClusterError) or is_address(where):
        return error
    reason = one_line(error)
    if isinstance(error, OSError):
        places = [f"{key}={value!r}" for key, value in options.items() if key in ("host", "interface", "port")]
        reason = f"it cannot listen at {', '.join(places) or 'its address'}: {error.strerror or reason}"
    return LaunchError(str(where or "this machine"), reason, what="scheduler")


def is_address(where: object) -> bool:
    """Return whether `where` is the address of a running process, and not a host to launch on.

    Parameters
    ----------
    where
        An address such as ``tcp://10.0.0.5:8786``, or a host.

    Returns
    -------
    bool
        True for a text with ``://`` in it.
    """
    return isinstance(where, str) and "://" in where


def _labels(launcher: Launcher) -> dict[str, dict[str, str]]:
    labels = getattr(launcher, "labels", None)
    return {"labels": dict(labels)} if labels else {}


def in_standby(launcher: Launcher) -> bool:
    """Return whether an agent is launched only when its workers are needed.

    Parameters
    ----------
    launcher
        Launcher of the agent.

    Returns
    -------
    bool
        The launcher's attribute ``standby``; False where it has none.
    """
    return bool(getattr(launcher, "standby", False))


def is_remote(launcher: Launcher) -> bool:
    """Return whether a launcher starts a process on another machine, as far as can be known.

    Parameters
    ----------
    launcher
        The launcher.

    Returns
    -------
    bool
        False for local processes, and for agents that are adopted at an address.
    """
    return launcher.where != "local" and not is_address(launcher.where)
