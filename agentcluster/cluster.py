"""A Dask cluster of long-lived agents: the object that users hold.

:class:`AgentCluster` is a SpecCluster whose entries are nodes and whose workers belong to the nodes' agents. It
launches and closes; what runs on the nodes is asked of the plugin in the scheduler, which outlives it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, Self

import dask
from dask.utils import parse_bytes, parse_timedelta
from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.spec import SpecCluster
from distributed.protocol import pickle
from distributed.security import Security
from distributed.utils import Log, Logs, NoOpAwaitable

from agentcluster import credentials, modes
from agentcluster.config import Config, overrides
from agentcluster.entries import JoinedScheduler, LaunchedProcess, NodeProcess
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound, SchedulerUnfit
from agentcluster.launch import Host, launchers_for
from agentcluster.launch.protocol import Launcher, Settings
from agentcluster.model import Mode, NodeReport, from_wire, plain, to_wire
from agentcluster.plugin import NAME, AgentPlugin, dask_setup
from agentcluster.report import Nodes, Report

logger = logging.getLogger(__name__)


class AgentCluster(SpecCluster):
    """Dask on machines that are held: one agent per host, whose workers can be swapped in place.

    Parameters
    ----------
    hosts : list of str, Host or launcher, optional
        Where the agents run: ``"gpu-1"`` or ``"user@gpu-1:2222"`` launches one there over SSH, ``"tcp://…"`` adopts one
        that runs, ``"local"`` starts one on this machine; a :class:`~agentcluster.Host` has options of its own, and an
        object with the launcher interface is the user's own way. ``None`` is one local agent.
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
    >>> cluster = AgentCluster()                                      # doctest: +SKIP
    >>> cluster.reprovision("uniform", {"nthreads": 2})               # doctest: +SKIP
    >>> cluster.close()                                               # doctest: +SKIP
    """

    scheduler: Any
    scheduler_comm: Any
    workers: dict[str, NodeProcess]
    worker_spec: dict[str, dict[str, Any]]

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
        self._settings = Config.load()
        self._launch_timeout = _seconds("launch_timeout", launch_timeout, self._settings.launch_timeout)
        self._start_timeout = _seconds("start_timeout", start_timeout, self._settings.start_timeout)
        self._on_host_failure = on_host_failure
        self._launch_options = {"connect_options": connect_options, "remote_python": remote_python}
        self._worker_options = dict(worker_options or {})
        launchers = launchers_for(hosts, connect_options=connect_options, remote_python=remote_python)
        self._mode, self._own_modes = _modes(mode, config, [launcher.name for launcher in launchers])
        joined = isinstance(scheduler, str) and "://" in scheduler
        security = credentials.resolve(
            security,
            remote=not joined and (_remote(scheduler) or any(map(_is_remote, launchers))),
            attached=[launcher.where for launcher in launchers if _is_attached(launcher)],
        )
        self._nodes = Nodes()
        self._opening: set[asyncio.Future[Any]] = set()
        self._refresher: asyncio.Task[None] | None = None
        self._was_up = False
        super().__init__(
            workers={launcher.name: self._entry(launcher, security) for launcher in launchers},
            scheduler=self._scheduler_entry(scheduler, dict(scheduler_options or {}), security, launchers),
            security=security,
            name=name,
            asynchronous=asynchronous,
            loop=loop,
            silence_logs=silence_logs,
            shutdown_on_close=shutdown_on_close,
            shutdown_scheduler=not joined,
            scheduler_sync_interval=scheduler_sync_interval,
        )

    # -- entries -------------------------------------------------------------------------------------------------------

    def _entry(self, launcher: Launcher, security: Security) -> dict[str, Any]:
        return {
            "cls": NodeProcess,
            "options": {
                "name": launcher.name,
                "launcher": launcher,
                "settings": self._told("worker", security, plain(self._worker_options)),
                "launch_timeout": self._launch_timeout,
                "stop_timeout": 2 * self._settings.stop_timeout,
            },
            "group": [],
        }

    def _told(self, role: Literal["worker", "scheduler"], security: Security, options: Mapping[str, Any]) -> Settings:
        """Return what a launched process is told."""
        return Settings(
            role="agent" if role == "worker" else "scheduler",
            security=credentials.for_role(security, role) if credentials.encrypted(security) else {},
            config=plain(overrides()),
            pre_spawn={
                key: str(value)
                for key, value in dask.config.get("distributed.nanny.pre-spawn-environ").items()
                if value is not None
            },
            options=options,
        )

    def _scheduler_entry(
        self,
        scheduler: str | Host | None,
        options: dict[str, Any],
        security: Security,
        launchers: Sequence[Launcher],
    ) -> dict[str, Any]:
        if scheduler is None:
            if not any(map(_is_remote, launchers)) and not any(map(_is_attached, launchers)):
                options.setdefault("host", "127.0.0.1")
            return {"cls": Scheduler, "options": {"security": security, **options}}
        if isinstance(scheduler, str) and "://" in scheduler:
            if options:
                raise ConfigError(
                    f"scheduler_options cannot be given to the scheduler at {scheduler}: it runs already",
                    key="scheduler_options",
                )
            return {"cls": JoinedScheduler, "options": {"address": scheduler}}
        [launcher] = launchers_for([scheduler], **self._launch_options)
        return {
            "cls": LaunchedProcess,
            "options": {
                "launcher": launcher,
                "settings": self._told("scheduler", security, plain(options)),
                "launch_timeout": self._launch_timeout,
                "stop_timeout": self._settings.stop_timeout,
            },
        }

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
            current = await self.scheduler_comm.get_provision_mode()
            await self.scheduler_comm.set_provision_mode(mode=current["mode"], config=current["config"], nodes=ours)
        self._changed = asyncio.Event()
        self._refresher = asyncio.create_task(self._keep_nodes(), name="agentcluster nodes")

    async def _have_plugin(self) -> None:
        if isinstance(self.scheduler, Scheduler):
            await dask_setup(self.scheduler)
        elif await self.scheduler_comm.get_provision_mode() is None:
            try:
                await self.scheduler_comm.register_scheduler_plugin(
                    plugin=pickle.dumps(AgentPlugin()), name=NAME, idempotent=True
                )
            except Exception as error:  # whatever importing our package raised over there
                raise SchedulerUnfit(
                    self.scheduler.address,
                    f"agentcluster cannot be loaded there ({error}); install it where the scheduler runs, or start it "
                    f"with: dask scheduler --preload agentcluster",
                ) from error

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
        finally:
            self._opening -= set(starts.values())
        failed: dict[str, BaseException] = {}
        for name, start in starts.items():
            error = asyncio.CancelledError() if start.cancelled() else start.exception()
            if error is None:
                self.workers[name] = nodes[name]
            else:
                failed[name] = error
                self.worker_spec.pop(name, None)
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

    _left: Mapping[str, Any] = {}

    async def _close(self) -> None:
        for start in list(self._opening):
            start.cancel()
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        if isinstance(self.scheduler, Scheduler) and self.scheduler.status in (Status.closed, Status.failed):
            # SpecCluster would try to reach it, for as long as a connection may take.
            self.shutdown_scheduler = False
        await super()._close()

    # -- what runs -----------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Nodes:
        """Node name -> what is known of it (state, mode, plan, workers, hardware, load); a table as its repr."""
        return self._nodes

    def reprovision(
        self,
        mode: str | Mode | Mapping[str, Any],
        config: Mapping[str, Any] | str | None = None,
        *,
        nodes: str | Sequence[str] | None = None,
        remove_existing: bool = True,
        timeout: str | float | None = None,
        dry_run: bool = False,
    ) -> Any:
        """Swap the workers of nodes in place: new ones start, data moves to them, old ones stop.

        Parameters
        ----------
        mode : str, Mode or mapping
            The mode, or a mapping from node name to mode.
        config : mapping or str, optional
            The mode's options.
        nodes : str or list of str, optional
            Names of the nodes; default is all, and those that join later.
        remove_existing : bool
            ``False`` adds the mode's workers beside those that run.
        timeout : str or float, optional
            Seconds for the new workers to start, and again for the data to move.
        dry_run : bool
            Plan and check only.

        Returns
        -------
        Report
            What went, came, stayed and moved on each node, and how long it took; a table as its repr. Awaitable when
            the cluster is asynchronous.

        Raises
        ------
        ConfigError, PreflightError, NodeNotFound
            When the change cannot be; nothing was touched.
        SwapError
            When a step failed. The workers that ran before still run, or the message says what is true.
        """
        return self.sync(
            self._reprovision,
            mode,
            config,
            nodes=nodes,
            remove_existing=remove_existing,
            timeout=None if timeout is None else _seconds("timeout", timeout, 0),
            dry_run=dry_run,
        )

    async def _reprovision(self, mode: Any, config: Any, *, nodes: Any, **options: Any) -> Report:
        if isinstance(mode, Mapping):
            if nodes is not None:
                raise ConfigError("nodes= cannot go with a mapping of modes: its keys are the nodes", key="nodes")
            orders = [([name], modes.parse(each, config)) for name, each in mode.items()]
        else:
            orders = [(nodes, modes.parse(mode, config))]
        reports = []
        try:
            for names, each in orders:
                answer = await self.scheduler_comm.reprovision_nodes(
                    mode=each.name, config=to_wire(each.config), nodes=names, **options
                )
                reports.append(_report(answer))
        finally:
            await self._refresh()
        return _merged(reports)

    def scale(self, n: int = 0, memory: Any = None, cores: int | None = None) -> Any:
        """Bring the cluster to `n` workers, on the nodes that it has; data of those that go is moved first.

        Parameters
        ----------
        n : int
            Number of workers. More than the nodes' modes have room for is scaled to that, with a warning.
        memory : str or int, optional
            At least as many workers as have this much memory together.
        cores : int, optional
            At least as many workers as have this many threads together.
        """
        if self.status in (Status.closing, Status.closed, Status.failed):
            self.worker_spec.clear()
            return NoOpAwaitable() if self.asynchronous else None
        if memory is not None:
            n = max(n, math.ceil(parse_bytes(memory) / self._memory_per_worker()))
        if cores is not None:
            n = max(n, math.ceil(cores / self._threads_per_worker()))
        return self.sync(self._scale, n)

    async def _scale(self, n: int) -> None:
        try:
            answer = await self.scheduler_comm.scale_nodes(n=n, nodes=list(self.workers))
        finally:
            await self._refresh()
        if answer["workers"] < n:
            warnings.warn(
                f"scale({n}): the modes of the nodes have room for {answer['workers']} workers, which now run",
                stacklevel=2,
            )

    async def scale_down(self, workers: Sequence[str]) -> None:
        """Stop the named workers, after their data was moved; what Adaptive calls."""
        await self.scheduler_comm.retire_node_workers(names=[str(worker) for worker in workers])
        await self._refresh()

    def _threads_per_worker(self) -> int:
        return min((spec["nthreads"] for spec in self._specs() if spec["nthreads"]), default=1)

    def _memory_per_worker(self) -> int:
        limits = [spec["memory_limit"] for spec in self._specs() if spec["memory_limit"]]
        if not limits:
            raise ConfigError("scale(memory=…): the workers of this cluster have no memory limit", key="memory")
        return int(min(limits))

    def _specs(self) -> list[Mapping[str, Any]]:
        return [spec for node in self._nodes.values() for spec in node["plan"].values()]

    _supports_scaling = True

    def add_host(self, host: Any) -> Any:
        """Launch or adopt one more agent; returns when it has its workers.

        Parameters
        ----------
        host : str, Host or launcher
            As in `hosts` of the constructor.

        Returns
        -------
        str
            The node's name. Awaitable when the cluster is asynchronous.
        """
        return self.sync(self._add_host, host)

    async def _add_host(self, host: Any) -> str:
        [launcher] = launchers_for([host], **self._launch_options)
        if launcher.name in self.worker_spec:
            raise ConfigError(
                f"host {launcher.where!r}: a node named {launcher.name!r} is already there; use Host(…, name=…)"
            )
        self.worker_spec[launcher.name] = self._entry(launcher, self.security)
        await self._correct_state()
        return launcher.name

    def remove_host(self, name: str) -> Any:
        """Move a node's data to others, stop its workers and let the host go.

        Parameters
        ----------
        name : str
            The node's name.

        Raises
        ------
        NodeNotFound
            When there is no such node.
        SwapError
            When its data has nowhere to go; the node stays as it was.
        """
        return self.sync(self._remove_host, name)

    async def _remove_host(self, name: str) -> None:
        if name not in self.worker_spec:
            raise NodeNotFound(name, self.worker_spec)
        self._left = {name: self.worker_spec.pop(name)}
        await self._correct_state()

    # -- looking -------------------------------------------------------------------------------------------------------

    async def _keep_nodes(self) -> None:
        """Keep :attr:`nodes` and the names of the workers true, also after what other clients did."""
        while True:
            try:
                async with asyncio.timeout(self._sync_interval):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self._refresh()
            except OSError as error:
                logger.debug("cannot ask the scheduler for its nodes: %s", error)

    async def _refresh(self) -> None:
        if self.status is not Status.running:
            return
        snapshots = await self.scheduler_comm.get_nodes()
        for name, node in self.workers.items():
            if name not in snapshots and name in self._nodes and node.ended:
                last = next(reversed(node.lines()), "")
                gone = {
                    "state": "lost",
                    "plan": {},
                    "workers": {},
                    "problem": f"its agent ended; last output: {last!r}",
                }
                snapshots[name] = {**self._nodes[name], **gone}
        ours = [name for name in self.worker_spec if name in snapshots]
        self._nodes = Nodes({name: snapshots[name] for name in dict.fromkeys([*ours, *snapshots])})
        for name, entry in self.worker_spec.items():
            entry["group"] = [worker[len(name) :] for worker in snapshots.get(name, {}).get("plan", ())]

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super()._update_worker_status(op, msg)
        if self._refresher is not None:
            self._changed.set()

    def get_logs(self, cluster: bool = True, scheduler: bool = True, workers: Any = True, agents: bool = False) -> Any:
        """Return logs of the cluster object, the scheduler, the workers and the agents.

        Parameters
        ----------
        cluster, scheduler, workers
            As for :meth:`distributed.deploy.Cluster.get_logs`.
        agents : bool
            Also what each node's agent logged, by node name.
        """
        return self.sync(self._get_logs, cluster=cluster, scheduler=scheduler, workers=workers, agents=agents)

    async def _get_logs(
        self, cluster: bool = True, scheduler: bool = True, workers: Any = True, agents: bool = False
    ) -> Logs:
        logs: Logs = await super()._get_logs(cluster=cluster, scheduler=scheduler, workers=workers)
        if agents:
            for name, node in self.workers.items():
                logs[name] = Log("\n".join(node.lines()))
            remote = [name for name, node in self.workers.items() if not node.lines()]
            if remote:
                for name, lines in (await self.scheduler_comm.get_node_logs(nodes=remote)).items():
                    logs[name] = Log("\n".join(lines))
        return logs

    def _repr_html_(self, cluster_status: str | None = None) -> str:
        return str(super()._repr_html_(cluster_status)) + self._nodes._repr_html_()


def _is_attached(launcher: Launcher) -> bool:
    return launcher.where.startswith(("tcp://", "tls://"))


def _is_remote(launcher: Launcher) -> bool:
    return launcher.where != "local" and not _is_attached(launcher)


def _remote(scheduler: str | Host | None) -> bool:
    return scheduler is not None and scheduler != "local"


def _seconds(key: str, value: str | float | None, default: float) -> float:
    if value is None:
        return default
    try:
        seconds = float(parse_timedelta(value, default="seconds"))
    except (ValueError, TypeError, KeyError, AttributeError):
        seconds = -1.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{key}={value!r} must be a time above 0, such as '30s' or 30 (seconds)", key=key)
    return seconds


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


def _report(answer: Mapping[str, Any]) -> Report:
    nodes = {name: from_wire(NodeReport, each) for name, each in answer["nodes"].items()}
    return Report(answer["mode"], nodes, answer["seconds"], answer["dry_run"])


def _merged(reports: Sequence[Report]) -> Report:
    if len(reports) == 1:
        return reports[0]
    return Report(
        ", ".join(dict.fromkeys(report.mode for report in reports)),
        {name: node for report in reports for name, node in report.nodes.items()},
        sum(report.seconds for report in reports),
        any(report.dry_run for report in reports),
    )
