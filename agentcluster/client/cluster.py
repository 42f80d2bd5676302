"""A Dask cluster of long-lived agents: the object that users hold.

:class:`AgentCluster` is a SpecCluster whose entries are nodes and whose workers belong to the nodes' agents. It
launches and closes agents, and asks the plugin in the scheduler for everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from distributed import Scheduler
from distributed.core import Status
from distributed.security import Security

from agentcluster import modes
from agentcluster.client.display import Display
from agentcluster.client.hosts import Blueprint, NodeProcess, Reserve, in_standby, is_address, is_remote
from agentcluster.client.rollouts import RolloutControl, watch
from agentcluster.client.scaling import Elasticity
from agentcluster.config import Config, warn_untested
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound, SchedulerUnfit
from agentcluster.launch import Host, launchers_for
from agentcluster.model import Mode
from agentcluster.reports import Nodes, Report
from agentcluster.scheduler.plugin import dask_setup
from agentcluster.security import resolve_credentials
from agentcluster.shipping import shipped
from agentcluster.units import parse_seconds
from agentcluster.wire import NO_PLUGIN, PLUGIN, to_wire

logger = logging.getLogger(__name__)


class Operations(Display, Elasticity):
    """What can be asked of a cluster that runs; the base of :class:`~agentcluster.AgentCluster`."""

    scheduler: Any
    scheduler_comm: Any
    workers: dict[str, NodeProcess]
    worker_spec: dict[str, dict[str, Any]]
    _blueprint: Blueprint
    _mode: Mode
    _nodes: Nodes
    _changed: asyncio.Event
    _refresher: asyncio.Task[None] | None
    _left: Mapping[str, Any] = {}
    _own_modes: Mapping[str, Mode]
    _missed: dict[str, BaseException]
    _problem: str | None = None

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
        nodes: str | Sequence[str] | Callable[[Mapping[str, Any]], bool] | None = None,
        remove_existing: bool = True,
        strategy: Literal["surge", "replace"] = "surge",
        drain: Literal["tasks", "data", "now"] = "tasks",
        drain_timeout: str | float | None = None,
        max_parallel: int | None = None,
        canary: bool = False,
        on_failure: Literal["rollback", "stop", "continue"] = "rollback",
        timeout: str | float | None = None,
        wait: bool | str | float = True,
        progress: bool = False,
        dry_run: bool = False,
    ) -> Any:
        """Swap the workers of nodes in place: new ones start, data moves to them, old ones stop.

        Parameters
        ----------
        mode : str, Mode or mapping
            The mode, or a mapping from node name to mode; that is one rollout after the other, of which undo knows the
            last.
        config : mapping or str, optional
            The mode's options.
        nodes : str, list of str, or callable, optional
            Names of nodes, patterns such as ``gpu-*``, labels such as ``rack=a``; or a function that says of what
            :attr:`nodes` has of one whether it is meant. Default is all, and those that join later.
        remove_existing : bool
            ``False`` adds the mode's workers beside those that run.
        strategy : {"surge", "replace"}
            ``surge`` brings new workers up before old ones go, on each node that has room for both; ``replace`` lets
            the old go first, their data to other nodes, one node after the other. A node without room does so anyway.
        drain : {"tasks", "data", "now"}
            ``tasks`` lets tasks that run on old workers end, ``data`` only moves data, ``now`` loses that too.
        drain_timeout : str or float, optional
            Seconds that running tasks get; those that still run then are run again elsewhere.
        max_parallel : int, optional
            Nodes that change at the same time; default is all, and one for ``replace``.
        canary : bool
            Change one node first, alone.
        on_failure : {"rollback", "stop", "continue"}
            When a node fails: bring those that have changed back, leave them, or go on with the others.
        timeout : str or float, optional
            Seconds for the new workers to start, and again for the data to move.
        wait : bool, str or float
            Whether to wait for a rollout that runs already, or for how long.
        progress : bool
            Draw a bar per node, in a terminal or a notebook.
        dry_run : bool
            Plan and check only.

        Returns
        -------
        Report
            What went, came, stayed and moved on each node, and how long it took; a table as its repr. Awaitable when
            the cluster is asynchronous.

        Raises
        ------
        ConfigError, PreflightError, NodeNotFound, RolloutBusy
            When the change cannot be; nothing was touched.
        SwapError
            When a step failed. The workers that ran before still run, or the message says what is true.

        Examples
        --------
        >>> cluster.reprovision("uniform", {"nthreads": 1, "nworkers": 1})          # doctest: +ELLIPSIS
        uniform: 1 node, 0 keys (0 B) moved, ... s
        node   mode     outcome  went  ...
        local  uniform  changed  ...
        >>> cluster.reprovision("unifrom")
        Traceback (most recent call last):
        agentcluster.errors.ConfigError: unknown mode 'unifrom'; did you mean 'uniform'? Allowed: ...
        """
        if not dry_run:
            self._by_hand()
        return self.sync(
            self._reprovision,
            mode,
            config,
            nodes=nodes,
            remove_existing=remove_existing,
            strategy=strategy,
            drain=drain,
            drain_timeout=_seconds("drain_timeout", drain_timeout, zero=True),
            max_parallel=max_parallel,
            canary=canary,
            on_failure=on_failure,
            timeout=_seconds("timeout", timeout),
            wait=wait if isinstance(wait, bool) else _seconds("wait", wait, zero=True),
            progress=progress,
            dry_run=dry_run,
        )

    async def _reprovision(self, mode: Any, config: Any, *, nodes: Any, progress: bool, **terms: Any) -> Report:
        if isinstance(mode, Mapping):
            if nodes is not None:
                raise ConfigError("nodes= cannot go with a mapping of modes: its keys are the nodes", key="nodes")
            orders = [([name], modes.parse(each, config)) for name, each in mode.items()]
        else:
            orders = [(self._chosen(nodes) if callable(nodes) else nodes, modes.parse(mode, config))]
        reports = []
        try:
            for names, each in orders:
                arguments = {"mode": each.name, "config": to_wire(each.config), "nodes": names, **terms}
                order = self._call("reprovision_nodes", **arguments)
                answer = await (watch(order, self.scheduler_comm.rollout_status) if progress else order)
                reports.append(Report.parse(answer))
        finally:
            # A scheduler that is gone has said so already, or will; that must not hide what happened.
            with contextlib.suppress(OSError):
                await self._refresh()
        return Report.merged(reports) if len(reports) > 1 else reports[0]

    def _chosen(self, fits: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        names = [name for name, node in self._nodes.items() if fits(node)]
        if not names:
            raise ConfigError(f"nodes={fits!r} fits no node of {', '.join(self._nodes)}", key="nodes")
        return names

    @property
    def rollout(self) -> RolloutControl:
        """Steers the rollout that runs now, and can undo the last one; see :class:`RolloutControl`."""
        return RolloutControl(self)

    def rollout_status(self) -> Any:
        """Return how far the rollout is that runs now, as plain data; None when none runs."""
        return self.sync(self._call, "rollout_status")

    async def _call(self, name: str, **arguments: Any) -> Any:
        return await getattr(self.scheduler_comm, name)(**arguments)

    async def _undo(self) -> Report:
        try:
            return Report.parse(await self.scheduler_comm.undo_rollout())
        finally:
            # A scheduler that is gone has said so already, or will; that must not hide what happened.
            with contextlib.suppress(OSError):
                await self._refresh()

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

        Examples
        --------
        >>> from agentcluster import Host
        >>> cluster.add_host(Host("local", name="second"))
        'second'
        >>> cluster.remove_host("second")
        """
        return self.sync(self._add_host, host)

    async def _add_host(self, host: Any) -> str:
        launcher = self._blueprint.launcher(host)
        if launcher.name in self.worker_spec or launcher.name in self._reserve:
            raise ConfigError(
                f"host {launcher.where!r}: a node named {launcher.name!r} is already there; use Host(…, name=…)"
            )
        if in_standby(launcher):
            self._reserve.add(launcher)
            return launcher.name
        if not self.shutdown_scheduler:
            # The default of a scheduler that others use is not ours.
            await self.scheduler_comm.set_provision_mode(nodes={launcher.name: to_wire(self._mode)})
        self.worker_spec[launcher.name] = self._blueprint.node(launcher)
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
        PreflightError, SwapError
            When its data has nowhere to go; the node stays as it was.
        """
        return self.sync(self._remove_host, name)

    async def _remove_host(self, name: str) -> None:
        if name not in self.worker_spec and name not in self._reserve:
            raise NodeNotFound(name, [*self.worker_spec, *self._reserve.here])
        await self._leave([name])
        self._reserve.forget(name)

    async def _leave(self, names: Iterable[str]) -> None:
        """Move the data of nodes to others, stop their workers and let the hosts go."""
        self._left = {name: self.worker_spec.pop(name) for name in names if name in self.worker_spec}
        if self._left:
            await self._correct_state()

    # -- hosts in standby ----------------------------------------------------------------------------------------------

    @property
    def standby(self) -> tuple[str, ...]:
        """Names of the hosts that are launched when their workers are needed, and are not now."""
        return self._reserve.here

    async def _call_up(self, names: Sequence[str]) -> dict[str, str]:
        """Launch hosts of the reserve, without workers; return why some did not come."""
        own = {name: to_wire(self._own_modes[name]) for name in names if name in self._own_modes}
        ours = {} if self.shutdown_scheduler else dict.fromkeys(names, to_wire(self._mode))
        await self.scheduler_comm.set_provision_mode(nodes=ours | own, bare=list(names))
        for name in names:
            self.worker_spec[name] = self._blueprint.node(self._reserve.take(name))
        try:
            await self._correct_state()
        finally:
            now = time.monotonic()
            for name in names:
                if name not in self.workers:
                    self._reserve.failed(name, now)
                elif name in self._nodes:
                    self._reserve.came(name, self._nodes[name]["hardware"])
        return {name: str(error) for name in names if (error := self._missed.pop(name, None))}

    async def _let_go(self) -> list[str]:
        """End agents of the reserve that have no workers; return the hosts."""
        idle = [name for name in self._extra() if _idle(self._nodes.get(name))]
        if idle:
            try:
                await self._leave(idle)
            finally:
                for name in idle:
                    if name not in self.workers:
                        self._reserve.back(name)
        return idle

    # -- looking -------------------------------------------------------------------------------------------------------

    async def _keep_nodes(self) -> None:
        """Keep :attr:`nodes` and the names of the workers true, also after what other clients did."""
        while True:
            try:
                async with asyncio.timeout(self._sync_interval):
                    await self._changed.wait()
                    await asyncio.sleep(GATHER)
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self._refresh()
                self._problem = None
            except OSError as error:
                self._problem = f"cannot reach the scheduler: {error}"
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
        warn_untested()
        settings = Config.load()
        self._start_timeout = _timeout("start_timeout", start_timeout, settings.start_timeout)
        self._on_host_failure = on_host_failure
        launchers = launchers_for(hosts, connect_options=connect_options, remote_python=remote_python)
        self._reserve = Reserve(launcher for launcher in launchers if in_standby(launcher))
        self._mode, self._own_modes = _modes(mode, config, [launcher.name for launcher in launchers])
        joined = is_address(scheduler)
        remote = any(map(is_remote, launchers)) or scheduler not in (None, "local")
        attached = [launcher.where for launcher in launchers if is_address(launcher.where)]
        self._blueprint = Blueprint(
            security=resolve_credentials(security, remote=remote and not joined, attached=attached),
            worker_options=dict(worker_options or {}),
            launch_options={"connect_options": connect_options, "remote_python": remote_python},
            launch_timeout=_timeout("launch_timeout", launch_timeout, settings.launch_timeout),
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
            await self.scheduler_comm.register_scheduler_plugin(plugin=shipped(), name=PLUGIN, idempotent=True)
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


#: Seconds in which the news of a swap, one for each worker, are gathered before the scheduler is asked for its nodes.
GATHER = 0.2


def _idle(node: Mapping[str, Any] | None) -> bool:
    """Whether a node has no workers and gets none just now."""
    return node is not None and not node["plan"] and node["state"] in ("standby", "refused", "lost")


def _seconds(key: str, value: str | float | None, zero: bool = False) -> float | None:
    """Parse an optional time of ``reprovision``."""
    return None if value is None else parse_seconds(key, value, call="reprovision", zero=zero)


def _timeout(key: str, value: str | float | None, default: float) -> float:
    """Parse an optional time of ``AgentCluster``."""
    return default if value is None else parse_seconds(key, value, call="AgentCluster")
