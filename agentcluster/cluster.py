"""A Dask cluster of long-lived agents: the object that users hold.

:class:`AgentCluster` is a SpecCluster whose entries are nodes and whose workers belong to the nodes' agents. It
launches and closes; what users ask of it while it runs is in :mod:`agentcluster.operations`.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, Self

from distributed import Scheduler
from distributed.core import Status
from distributed.security import Security

from agentcluster import credentials, modes
from agentcluster.config import Config
from agentcluster.entries import Blueprint, NodeProcess, in_standby, is_address, is_remote
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound, SchedulerUnfit
from agentcluster.launch import Host, launchers_for
from agentcluster.membership import NO_PLUGIN
from agentcluster.model import Mode, to_wire
from agentcluster.operations import Operations, seconds
from agentcluster.plugin import NAME, dask_setup
from agentcluster.report import Nodes
from agentcluster.reserve import Reserve
from agentcluster.shipping import shipped

logger = logging.getLogger(__name__)


class AgentCluster(Operations):
    """Dask on machines that are held: one agent per host, whose workers can be swapped in place.

    Parameters
    ----------
    hosts : list of str, Host or launcher, optional
        Where the agents run: ``"gpu-1"`` or ``"user@gpu-1:2222"`` launches one there over SSH, ``"tcp://…"`` adopts one
        that runs, ``"local"`` starts one on this machine; a :class:`~agentcluster.Host` has options of its own, and an
        object with the launcher interface is the user's own way. ``None`` is one local agent. Those with
        ``standby=True`` are launched when :meth:`scale` or :meth:`adapt` needs them, and let go when they do not.
    mode : str, Mode or mapping, optional
        First mode of the nodes, or a mapping from node name to mode.
    config : mapping or str, optional
        Options of `mode`.
    scheduler : str or Host, optional
        ``None`` runs the scheduler in this process, an address (``"tcp://…"``, ``"tls://…"``) joins one that runs, a
        host as in `hosts` launches it there.
    scheduler_options : mapping, optional
        Keyword arguments of :class:`distributed.Scheduler`.
    worker_options : mapping, optional
        Keyword arguments for every worker whatever its mode, such as ``local_directory`` or ``resources``.
    connect_options : mapping or list of mappings, optional
        Keyword arguments of ``asyncssh.connect``, for all hosts or one per host.
    remote_python : str or list of str, optional
        Path of Python on the SSH hosts; default is the path of this one.
    security : Security, bool or mapping, optional
        ``None`` means TLS with temporary credentials as soon as something runs on another machine, ``True`` always,
        ``False`` never.
    on_host_failure : {"raise", "warn"}
        Whether a host that does not come up fails the whole cluster, which then closes, or is left out with a warning.
    name : str, optional
        Name of the cluster.
    launch_timeout, start_timeout : str or float, optional
        Seconds for an agent to be ready, and then for its first workers to join.
    asynchronous, loop, silence_logs, shutdown_on_close, scheduler_sync_interval
        As for :class:`distributed.SpecCluster`.

    Raises
    ------
    ConfigError
        When something given cannot be used; nothing was started then.
    LaunchError, ModeRefused, WorkerStartError
        When a host does not come up. Everything that was started has been closed when this is raised.

    Examples
    --------
    >>> from agentcluster import AgentCluster
    >>> cluster = AgentCluster()
    >>> report = cluster.reprovision("uniform", {"nthreads": 1})
    >>> report.mode, list(report.nodes)
    ('uniform', ['local'])
    >>> cluster.close()
    """

    def __init__(
        self,
        hosts: Any = None,
        *,
        mode: str | Mode | Mapping[str, Any] = "auto-cpu",
        config: Mapping[str, Any] | str | None = None,
        scheduler: str | Host | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        worker_options: Mapping[str, Any] | None = None,
        connect_options: Any = None,
        remote_python: Any = None,
        security: Security | bool | dict[str, Any] | None = None,
        on_host_failure: Literal["raise", "warn"] = "raise",
        name: str | None = None,
        launch_timeout: str | float | None = None,
        start_timeout: str | float | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        silence_logs: int | bool = logging.WARNING,
        shutdown_on_close: bool = True,
        scheduler_sync_interval: float = 1,
    ) -> None:
        if on_host_failure not in ("raise", "warn"):
            raise ConfigError(f"on_host_failure={on_host_failure!r} must be 'raise' or 'warn'", key="on_host_failure")
        settings = Config.load()
        self._start_timeout = seconds("start_timeout", start_timeout, settings.start_timeout)
        self._on_host_failure = on_host_failure
        launchers = launchers_for(hosts, connect_options=connect_options, remote_python=remote_python)
        self._reserve = Reserve(launcher for launcher in launchers if in_standby(launcher))
        self._mode, self._own_modes = _modes(mode, config, [launcher.name for launcher in launchers])
        joined = is_address(scheduler)
        remote = any(map(is_remote, launchers)) or scheduler not in (None, "local")
        attached = [launcher.where for launcher in launchers if is_address(launcher.where)]
        self._blueprint = Blueprint(
            security=credentials.resolve(security, remote=remote and not joined, attached=attached),
            worker_options=dict(worker_options or {}),
            launch_options={"connect_options": connect_options, "remote_python": remote_python},
            launch_timeout=seconds("launch_timeout", launch_timeout, settings.launch_timeout),
            stop_timeout=settings.stop_timeout,
        )
        self._missed: dict[str, BaseException] = {}
        self._nodes = Nodes()
        self._opening: set[asyncio.Future[Any]] = set()
        self._refresher: asyncio.Task[None] | None = None
        self._was_up = False
        super().__init__(
            workers={each.name: self._blueprint.node(each) for each in launchers if not in_standby(each)},
            scheduler=self._blueprint.scheduler(
                scheduler, dict(scheduler_options or {}), loopback=not remote and not attached
            ),
            security=self._blueprint.security,
            name=name,
            asynchronous=asynchronous,
            loop=loop,
            silence_logs=silence_logs,
            shutdown_on_close=shutdown_on_close,
            shutdown_scheduler=not joined,
            scheduler_sync_interval=scheduler_sync_interval,
        )

    # -- life ----------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await super()._start()
        if self._refresher is not None:
            return
        await self._have_plugin()
        own = {name: to_wire(mode) for name, mode in self._own_modes.items()}
        if self.shutdown_scheduler:
            await self.scheduler_comm.set_provision_mode(mode=self._mode.name, config=self._mode.config, nodes=own)
        else:
            # Others may use this scheduler: its default is theirs, ours is for our nodes.
            ours = {name: to_wire(self._mode) for name in self.worker_spec} | own
            await self.scheduler_comm.set_provision_mode(nodes=ours)
        self._changed = asyncio.Event()
        self._refresher = asyncio.create_task(self._keep_nodes(), name="agentcluster nodes")

    async def _have_plugin(self) -> None:
        if isinstance(self.scheduler, Scheduler):
            await dask_setup(self.scheduler)
            return
        try:
            await self.scheduler_comm.register_scheduler_plugin(plugin=shipped(), name=NAME, idempotent=True)
        except Exception as error:  # whatever importing our package raised over there
            # It may be there all the same: by --preload, on a scheduler that takes no plugins from others.
            if await self.scheduler_comm.get_provision_mode() is None:
                raise SchedulerUnfit(self.scheduler.address, f"{NO_PLUGIN}; it said: {error}") from error

    def __await__(self) -> Generator[Any, Any, Self]:
        try:
            yield from super().__await__()
        except BaseException:
            if not self._was_up:
                yield from self._close().__await__()
            raise
        self._was_up = True
        return self

    async def _correct_state_internal(self) -> None:
        # SpecCluster retires by the wrong name and closes before it opens; ours goes through the plugin.
        async with self._lock:
            self._correct_state_waiting = None
            await self._close_nodes([name for name in self.workers if name not in self.worker_spec])
            await self._open_nodes([name for name in self.worker_spec if name not in self.workers])
            await self._refresh()

    async def _open_nodes(self, names: Sequence[str]) -> None:
        """Launch agents and wait until they have their workers."""
        address = getattr(self.scheduler, "contact_address", None) or self.scheduler.address
        nodes = {name: self.worker_spec[name]["cls"](address, **self.worker_spec[name]["options"]) for name in names}
        for node in nodes.values():
            self._created.add(node)
        starts = {name: asyncio.ensure_future(self._open(node)) for name, node in nodes.items()}
        self._opening |= set(starts.values())
        try:
            if starts:
                await asyncio.wait(starts.values())
        except BaseException:
            for start in starts.values():
                start.cancel()
            await asyncio.gather(*starts.values(), return_exceptions=True)
            raise
        finally:
            self._opening -= set(starts.values())
        failed: dict[str, BaseException] = {}
        for name, start in starts.items():
            error = asyncio.CancelledError() if start.cancelled() else start.exception()
            if error is None:
                self.workers[name] = nodes[name]
                continue
            self.worker_spec.pop(name, None)
            # Who called a host of the reserve up hears why it did not come; there are others.
            (self._missed if name in self._reserve else failed)[name] = error
        self._fail(failed)

    async def _open(self, node: NodeProcess) -> None:
        try:
            await node
            await self.scheduler_comm.await_nodes(names=[node.name], timeout=self._start_timeout)
        except BaseException:
            await asyncio.shield(node.close())
            raise

    def _fail(self, failed: Mapping[str, BaseException]) -> None:
        if not failed:
            return
        first = next(iter(failed.values()))
        if self._on_host_failure == "raise" or not self.workers or not isinstance(first, Exception):
            raise first
        for name, error in failed.items():
            warnings.warn(f"host {name} is left out: {error}", stacklevel=2)

    async def _close_nodes(self, names: Sequence[str]) -> None:
        closing = self.status is not Status.running
        if not closing or not self.shutdown_scheduler:
            for name in names:
                try:
                    await self.scheduler_comm.retire_node(name=name)
                except (AgentClusterError, OSError) as error:
                    if not closing:
                        self.worker_spec[name] = self._left[name]
                        raise
                    logger.warning("Node %s closes with its data: %s", name, error)
        nodes = [self.workers.pop(name) for name in names]
        await asyncio.gather(*(node.close() for node in nodes))

    async def _close(self) -> None:
        opening = list(self._opening)
        for start in opening:
            start.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for node in self._created:
            if node.status is Status.created:  # its start was cancelled before the first step
                await node.close()
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        if isinstance(self.scheduler, Scheduler) and self.scheduler.status in (Status.closed, Status.failed):
            # SpecCluster would try to reach it, for as long as a connection may take.
            self.shutdown_scheduler = False
        await super()._close()
        self._close_panel()


def _modes(mode: Any, config: Any, names: Sequence[str]) -> tuple[Mode, dict[str, Mode]]:
    """Return the mode of all nodes, and those of single ones."""
    if not isinstance(mode, Mapping):
        return modes.parse(mode, config), {}
    for name in mode:
        if name not in names:
            raise NodeNotFound(str(name), names)
    if config is not None:
        raise ConfigError(
            "config= cannot go with a mapping of modes; use Mode(name, config) as its values", key="config"
        )
    return Mode("auto-cpu"), {name: modes.parse(each) for name, each in mode.items()}
