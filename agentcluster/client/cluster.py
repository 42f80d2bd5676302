"""AgentCluster: the object that users hold.

An :class:`AgentCluster` is a SpecCluster whose entries are nodes, and whose workers belong to the nodes' agents. For
every change of workers it calls the plugin in the scheduler. Its members do the parts:
:mod:`~agentcluster.client.hosts` launches and ends agents, :mod:`~agentcluster.client.scaling` scales,
:mod:`~agentcluster.client.rollouts` controls rollouts, :mod:`~agentcluster.client.display` keeps the nodes current
and shows them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Never, Self, TypeAlias, TypeVar, overload

import distributed.deploy.adaptive
from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import ProcessInterface, SpecCluster
from distributed.scheduler import WorkerState
from distributed.security import Security
from distributed.utils import Log, Logs
from tornado.ioloop import IOLoop

from agentcluster.client.adaptive import AgentAdaptive
from agentcluster.client.calls import Plain, SchedulerCalls
from agentcluster.client.display import Display, NodeView
from agentcluster.client.hosts import Hosts
from agentcluster.client.interface import (
    AnyMode,
    AsyncT,
    MaybeAsync,
    ModeFunction,
    NodeSelection,
    at_border,
    at_line,
    begun,
    callers_line,
    first_modes,
    launcher_at,
    of_all_hosts,
    parse_address,
    parse_flag,
    parse_name,
    parse_optional_seconds,
    parse_rollouts,
    parse_scheduler_options,
    parse_timeout,
    parse_worker_options,
    parse_workers,
    refuse_keywords,
    refuse_spec,
    synced,
    warn_of_options,
    warn_of_workers,
)
from agentcluster.client.processes import (
    Blueprint,
    NodeEntry,
    NodeProcess,
    in_standby,
    is_address,
    is_remote,
    scheduler_problem,
)
from agentcluster.client.rollouts import RolloutControl, parse_status, watch
from agentcluster.client.scaling import Request, Scaling, resource_name
from agentcluster.config import Config, warn_untested
from agentcluster.errors import AgentClusterError, ConfigError, SchedulerUnfit, in_short
from agentcluster.launch import Host, launchers_for
from agentcluster.launch.protocol import Launcher
from agentcluster.model import Mode, RolloutStatus
from agentcluster.reports import AdaptiveLog, Nodes, RolloutReport, ScaleReport
from agentcluster.requests import Bound, Drain, OnFailure, RolloutPolicy, ScaleTarget, Strategy
from agentcluster.scheduler.plugin import dask_setup
from agentcluster.security import LOOPBACK, has_credentials, is_private, resolve_credentials
from agentcluster.shipping import shipped
from agentcluster.units import parse_nbytes, parse_seconds
from agentcluster.wire import NO_PLUGIN, PLUGIN, check_protocol, from_wire, to_wire, unless_refused

logger = logging.getLogger(__name__)

#: Cluster as code in its event loop sees it: there every call returns a coroutine.
AsyncCluster: TypeAlias = "AgentCluster[Literal[True]]"

AnyHost: TypeAlias = "str | os.PathLike[str] | Host | Launcher"
WorkerKey: TypeAlias = Callable[[WorkerState], Hashable]
AdaptiveT = TypeVar("AdaptiveT", bound=distributed.deploy.adaptive.Adaptive)


class AgentCluster(MaybeAsync[AsyncT], SpecCluster):
    """Dask on hosts that you keep: one agent per host, whose workers can be changed in place.

    Parameters
    ----------
    hosts : list of str, Host or launcher, optional
        Hosts of the agents: ``"gpu-1"`` or ``"user@gpu-1:2222"`` launches one there over SSH, ``"tcp://…"`` adopts one
        that runs, ``"local"`` starts one on this machine; a :class:`~agentcluster.Host` has further options, and any
        object with the launcher interface can be given. ``None`` is one local agent. Those with ``standby=True`` are
        launched when :meth:`scale` or :meth:`adapt` needs them, and ended when it does not.
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
        Keyword arguments for every worker whatever its mode, such as ``local_directory`` or ``resources``; ``nthreads``
        and ``memory_limit`` are options of the first mode.
    connect_options : mapping or list of mappings, optional
        Keyword arguments of ``asyncssh.connect``, for all hosts or one per host.
    remote_python : str or list of str, optional
        Path of Python on the SSH hosts; default is the path of this one.
    security : Security, path, bool or mapping, optional
        ``None`` means TLS as soon as something runs on another machine, with temporary credentials; ``True`` always,
        ``False`` never. A path is that of a folder that ``agentcluster credentials`` wrote, which agents that run
        already need. Without another machine, and without a `host` in `scheduler_options`, all listen on loopback.
    on_host_failure : {"raise", "warn"}
        Whether a host that fails to start fails the whole cluster, which then closes, or is left out with a warning.
    name : str, optional
        Name of the cluster.
    launch_timeout, start_timeout : str or float, optional
        Seconds for an agent to be ready, and then for its first workers to join.
    asynchronous : bool
        Whether calls return coroutines, for use in an event loop.
    loop, silence_logs, scheduler_sync_interval
        As for :class:`distributed.SpecCluster`.
    shutdown_on_close : bool
        Only True: agents end with the process that launched them.

    Attributes
    ----------
    hosts : Hosts
        Hosts, with their agents.
    scaling : Scaling
        Scaling by hand and by demand.
    view : NodeView
        View of the nodes, with why it may be out of date.
    display : Display
        Panel and logs.

    Raises
    ------
    ConfigError
        When an argument cannot be used; nothing was started.
    LaunchError, ModeRefused, WorkerStartError
        When a host fails to start. Everything that was started has been closed.
    VersionMismatch
        When the scheduler runs a version of agentcluster with another protocol.

    Examples
    --------
    >>> from agentcluster import AgentCluster
    >>> cluster = AgentCluster()
    >>> report = cluster.reprovision("uniform", {"nthreads": 1})
    >>> report.mode, list(report.nodes)
    ('uniform', ['local'])
    >>> cluster.close()
    """

    scheduler: Scheduler | ProcessInterface
    scheduler_comm: SchedulerCalls
    workers: dict[str, NodeProcess]
    worker_spec: dict[str, NodeEntry]
    status: Status
    shutdown_scheduler: bool
    _adaptive: distributed.deploy.adaptive.Adaptive | None = None

    @at_border
    def __init__(
        self,
        hosts: AnyHost | Iterable[AnyHost] | None = None,
        *,
        mode: str | Mode | Mapping[str, str | Mode] = "auto-cpu",
        config: Plain | str | None = None,
        scheduler: str | Host | None = None,
        scheduler_options: Plain | None = None,
        worker_options: Plain | None = None,
        connect_options: Plain | Sequence[Plain | None] | None = None,
        remote_python: str | Sequence[str | None] | None = None,
        security: Security | bool | dict[str, Any] | str | PathLike[str] | None = None,
        on_host_failure: Literal["raise", "warn"] = "raise",
        name: str | None = None,
        launch_timeout: str | float | None = None,
        start_timeout: str | float | None = None,
        asynchronous: AsyncT = False,  # type: ignore[assignment]
        loop: IOLoop | None = None,
        silence_logs: int | bool = logging.WARNING,
        shutdown_on_close: bool = True,
        scheduler_sync_interval: float = 1,
        **others: Never,
    ) -> None:
        refuse_keywords(others, inspect.signature(AgentCluster).parameters)
        if shutdown_on_close is not True:
            raise ConfigError(
                f"shutdown_on_close={shutdown_on_close!r} has no effect: agents end with the process that launched "
                f"them; start `dask scheduler` and dask-agent by themselves, and join them with scheduler='tcp://…'",
                key="shutdown_on_close",
            )
        name = parse_name(name)
        parse_flag("asynchronous", asynchronous)
        if not isinstance(silence_logs, int | None):
            raise ConfigError(
                f"silence_logs={silence_logs!r} must be a level such as logging.ERROR", key="silence_logs"
            )
        if not isinstance(loop, IOLoop | None):
            raise ConfigError(f"loop={loop!r} must be an event loop of tornado's, tornado.ioloop.IOLoop", key="loop")
        interval = parse_seconds("scheduler_sync_interval", scheduler_sync_interval, call="AgentCluster")
        if on_host_failure not in ("raise", "warn"):
            raise ConfigError(f"on_host_failure={on_host_failure!r} must be 'raise' or 'warn'", key="on_host_failure")
        warn_untested()
        settings = Config.load()
        launchers = launchers_for(hosts, connect_options=connect_options, remote_python=remote_python)
        refuse_spec(scheduler)
        joined = is_address(scheduler)
        if joined:
            parse_address("scheduler", str(scheduler))
        remote = any(map(is_remote, launchers)) or scheduler not in (None, "local")
        attached = [launcher.where for launcher in launchers if is_address(launcher.where)]
        alone = not remote and all(map(is_private, attached))
        of_scheduler = parse_scheduler_options(scheduler_options)
        listens = "host" in of_scheduler or "interface" in of_scheduler
        if alone and not listens and not joined:
            of_scheduler["host"] = LOOPBACK
        credentials = resolve_credentials(security, remote=remote and not joined, attached=attached)
        of_workers, shape = parse_worker_options(worker_options)
        blueprint = Blueprint(
            security=credentials,
            worker_options=of_workers,
            launch_options=of_all_hosts(connect_options=connect_options, remote_python=remote_python),
            launch_timeout=parse_timeout("launch_timeout", launch_timeout, settings.launch_timeout),
            stop_timeout=settings.stop_timeout,
            alone=alone and not joined and not (listens and (security is False or has_credentials(credentials))),
        )
        own: dict[str, Mode]
        first, own = first_modes(mode, config, [launcher.name for launcher in launchers], shape)
        warn_of_options([first, *own.values()])
        inside: AsyncCluster = self  # type: ignore[assignment]
        self.hosts = Hosts(
            inside,
            launchers,
            blueprint,
            mode=first,
            modes_by_name=own,
            start_timeout=parse_timeout("start_timeout", start_timeout, settings.start_timeout),
            on_failure=on_host_failure,
        )
        self.view = NodeView(inside, interval)
        self.scaling = Scaling(inside)
        self.display = Display(inside)
        self._rollout: RolloutControl[AsyncT] = RolloutControl(self)
        self._was_up = False
        self._made_at = callers_line()
        self._scheduler = scheduler, of_scheduler
        try:
            with at_line(self._made_at):
                super().__init__(
                    workers={each.name: blueprint.node(each) for each in launchers if not in_standby(each)},
                    scheduler=blueprint.scheduler(launcher_at(scheduler, launchers), of_scheduler),
                    security=blueprint.security,
                    name=name,
                    asynchronous=asynchronous,
                    loop=loop,
                    silence_logs=silence_logs,
                    shutdown_on_close=shutdown_on_close,
                    shutdown_scheduler=not joined,
                    scheduler_sync_interval=interval,
                )
        except BaseException:
            # dask itself closes a synchronous cluster only when a worker fails, not when the scheduler does.
            if hasattr(self, "status"):
                self.close()
            raise

    # -- life ----------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        where, options = self._scheduler
        try:
            await (unless_refused(super()._start(), str(where)) if is_address(where) else super()._start())
        except RuntimeError as error:
            raise scheduler_problem(error, where, options) from None
        except OSError as error:
            if not is_address(where):
                raise
            raise SchedulerUnfit(str(where), f"{error}; is one running there, at this port?") from None
        if self.view.kept:
            return
        await self._register_plugin()
        await self.hosts.announce()
        self.view.keep()

    async def _register_plugin(self) -> None:
        """Bring the plugin to the scheduler, and check that both speak the same protocol."""
        if isinstance(self.scheduler, Scheduler):
            await dask_setup(self.scheduler)
            return
        address = str(self.scheduler.address)
        failed: Exception | None = None
        try:
            await self.scheduler_comm.register_scheduler_plugin(plugin=shipped(), name=PLUGIN, idempotent=True)
        except Exception as error:  # whatever importing our package raised there
            failed = error
        # The plugin may be there all the same: by --preload, on a scheduler that takes no plugins from clients.
        answer = await self.scheduler_comm.get_provision_mode()
        if answer is None:
            raise SchedulerUnfit(address, f"{NO_PLUGIN}; it said: {failed}") from failed
        peer = f"the scheduler at {address}"
        check_protocol(peer, answer.get("protocol"), answer.get("version"), here="this cluster")

    def __await__(self) -> Generator[Any, Any, Self]:
        try:
            with at_line(self._made_at):
                yield from super().__await__()
        except BaseException:
            if not self._was_up:
                yield from self._close().__await__()
            raise
        self._was_up = True
        return self

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        return self

    async def _correct_state_internal(self) -> None:
        # SpecCluster's own retires workers by a wrong name, and closes nodes before it opens others.
        async with self._lock:
            self._correct_state_waiting = None
            await self.hosts.close([name for name in self.workers if name not in self.worker_spec])
            await self.hosts.open([name for name in self.worker_spec if name not in self.workers])
            await self.view.refresh()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super()._update_worker_status(op, msg)
        self.view.changed()

    async def _close(self) -> None:
        if self.scheduler_comm is None and self.status is Status.failed:
            # The scheduler did not start. SpecCluster would call it, fail, and wait for the end of that for ever.
            self.status = Status.created
        await self.hosts.cancel()
        await self.view.close()
        here = isinstance(self.scheduler, Scheduler)
        if self.view.lost or (here and self.scheduler.status in (Status.closed, Status.failed)):
            # SpecCluster would try to reach it, for as long as a connection may take.
            if not here:
                await self.scheduler.close()
            self.shutdown_scheduler = False
        await super()._close()
        self.display.close()
        self.view.nodes = Nodes()

    def _check_open(self) -> None:
        """Raise an error once the cluster is closed, or has lost its scheduler.

        Raises
        ------
        ConfigError, SchedulerUnfit
            When it is, or has.
        """
        if self.status is Status.closed:
            raise ConfigError(f"cluster {self.name!r} is closed; make another AgentCluster")
        if self.view.lost and self.status is Status.failed:
            raise SchedulerUnfit(self.scheduler_address, "it has gone; close this cluster, and make another")

    @overload
    def close(self: AgentCluster[Literal[False]], timeout: float | None = None) -> None: ...
    @overload
    def close(self: AgentCluster[Literal[True]], timeout: float | None = None) -> Awaitable[None]: ...
    @overload
    def close(self, timeout: float | None = None) -> Awaitable[None] | None: ...
    @at_border
    def close(self, timeout: float | None = None) -> Awaitable[None] | None:
        """End the agents with their workers, and the scheduler unless others started it; idempotent.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which to give up.

        Returns
        -------
        None
            Awaitable when the cluster is asynchronous.

        Raises
        ------
        ConfigError
            For a timeout that is no time.
        """
        return super().close(parse_optional_seconds("timeout", timeout, call="close"))

    # -- nodes ---------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Nodes:
        """Mapping from a node's name to its state, mode, plan, workers, hardware and load; a table as its repr."""
        return self.view.nodes

    @property
    def dashboard_link(self) -> str | None:
        """URL of the scheduler's dashboard, for this machine; None where it has none, see :attr:`dashboard_problem`."""
        return self.display.dashboard()[0]

    @property
    def dashboard_problem(self) -> str | None:
        """Reason why there is no :attr:`dashboard_link`, and the remedy; None where there is one."""
        return self.display.dashboard()[1]

    @property
    def standby(self) -> tuple[str, ...]:
        """Names of the standby hosts that are not launched; :meth:`scale` and :meth:`adapt` launch them."""
        return self.hosts.reserve.here

    @synced
    async def refresh(self) -> Nodes:
        """Ask the scheduler for its nodes now; otherwise :attr:`nodes` follows a change within a second.

        Returns
        -------
        Nodes
            The nodes. Awaitable when the cluster is asynchronous.
        """
        await self.view.refresh()
        return self.view.nodes

    @synced
    async def add_host(self, host: AnyHost) -> str:
        """Launch or adopt one more agent, and wait until it has its workers.

        Parameters
        ----------
        host : str, Host or launcher
            As in `hosts` of the constructor.

        Returns
        -------
        str
            Name of the node. Awaitable when the cluster is asynchronous.

        Raises
        ------
        ConfigError
            When the host cannot be used, or its name is taken.
        LaunchError, ModeRefused, WorkerStartError
            When the host fails to start.

        Examples
        --------
        >>> from agentcluster import Host
        >>> cluster.add_host(Host("local", name="second"))
        'second'
        >>> cluster.remove_host("second")
        """
        return await self.hosts.add(host)

    @synced
    async def remove_host(self, name: str) -> None:
        """Move a node's data to others, stop its workers, and end its agent.

        Parameters
        ----------
        name : str
            Name of the node.

        Raises
        ------
        NodeNotFound
            When there is no node of that name.
        PreflightError, SwapError
            When its data cannot be moved; the node stays as it was.
        """
        await self.hosts.remove(name)

    # -- rollouts ------------------------------------------------------------------------------------------------------

    @synced
    async def reprovision(
        self,
        /,
        mode: AnyMode | ModeFunction | Mapping[str, AnyMode],
        config: Plain | str | None = None,
        *,
        nodes: NodeSelection = None,
        remove_existing: bool = True,
        strategy: Strategy = "surge",
        drain: Drain = "tasks",
        drain_timeout: str | float | None = None,
        bound: Bound = "follow",
        max_parallel: int | None = None,
        canary: bool = False,
        on_failure: OnFailure = "rollback",
        timeout: str | float | None = None,
        wait: bool | str | float = True,
        progress: bool = False,
        dry_run: bool = False,
        **options: Any,
    ) -> RolloutReport:
        """Change the workers of nodes in place: new ones start, data moves to them, old ones stop.

        Parameters
        ----------
        mode : str, Mode, mapping or callable
            The mode, or a mapping from node name to mode; that is one rollout after the other, and undo restores the
            last. Or a function that is called with each node's :class:`~agentcluster.model.Hardware`, and returns a
            mode, or workers as mode ``spec`` takes them; nodes with equal ones change in one rollout.
        config : mapping or str, optional
            Options of the mode.
        nodes : str, list of str, or callable, optional
            Names of nodes, patterns such as ``gpu-*``, labels such as ``rack=a`` (names alone, where `mode` is a
            function); or a function that is called with
            each value of :attr:`nodes` and returns whether to change that node. Default is all, and those that join
            later.
        remove_existing : bool
            ``False`` adds the mode's workers beside those that run.
        strategy : {"surge", "replace"}
            ``surge`` starts new workers before old ones stop, on each node that has room for both; ``replace`` stops
            the old first, after their data was moved to other nodes, one node after the other. A node without room is
            always replaced.
        drain : {"tasks", "data", "now"}
            ``tasks`` waits for tasks that run on old workers, ``data`` only moves data, ``now`` loses that too.
        drain_timeout : str or float, optional
            Seconds to wait for running tasks; those that still run then are run again elsewhere.
        bound : {"follow", "wait", "refuse"}
            Tasks bound to old workers (``submit(…, workers=…)``) that none has begun: ``follow`` runs them on the
            workers that come in their place, ``wait`` waits for them as for running tasks, ``refuse`` changes nothing
            while there are any, or any that run.
        max_parallel : int, optional
            Nodes that change at the same time; default is all, and one for ``replace``.
        canary : bool
            Change one node first, alone.
        on_failure : {"rollback", "stop", "continue"}
            When a node fails: restore those that have changed, leave them, or continue with the others.
        timeout : str or float, optional
            Seconds for the new workers to start, and again for the data to move.
        wait : bool, str or float
            Whether to wait for a rollout that runs already, or for how long.
        progress : bool
            Draw a bar per node, in a terminal or a notebook.
        dry_run : bool
            Plan and check only.
        **options
            Options of `mode`, such as ``nthreads=2``; those of `config` too.

        Returns
        -------
        RolloutReport
            Workers that went, came and stayed on each node, data that was moved, and durations; a table as its repr.
            Awaitable when the cluster is asynchronous.

        Raises
        ------
        ConfigError, PreflightError, NodeNotFound, RolloutBusy
            When the change is not possible; nothing was touched.
        SwapError
            When a step failed. The workers that ran before still run, or the message describes the state.

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
        parse_flag("progress", progress)
        parse_flag("remove_existing", remove_existing)
        terms = {
            "strategy": strategy,
            "drain": drain,
            "bound": bound,
            "drain_timeout": parse_optional_seconds("drain_timeout", drain_timeout, zero=True),
            "max_parallel": max_parallel,
            "on_failure": on_failure,
            "canary": canary,
            "timeout": parse_optional_seconds("timeout", timeout),
            "dry_run": dry_run,
            "wait": wait if isinstance(wait, bool) else parse_seconds("wait", wait, call="reprovision", zero=True),
        }
        policy = from_wire(RolloutPolicy, terms, "reprovision")  # here: some values cannot even be sent
        rollouts = parse_rollouts(self.nodes, mode, config, nodes, options)
        warn_of_options(each for _, each in rollouts)
        if self._adaptive is not None and not dry_run:
            self.scaling.stop_adaptive()
        comm, reports = self.scheduler_comm, []
        try:
            for names, each in rollouts:
                order = comm.reprovision_nodes(
                    mode=each.name,
                    config=to_wire(each.config),
                    nodes=names,
                    remove_existing=remove_existing,
                    **to_wire(policy),
                )
                answer = await (watch(order, comm.rollout_status) if progress else order)
                reports.append(RolloutReport.parse(answer))
        finally:
            await self.view.try_refresh()
        report = reports[0] if len(reports) == 1 else RolloutReport.merged(reports)
        warn_of_workers(self.nodes, {worker for node in report.nodes.values() for worker in node.new})
        return report

    @property
    def rollout(self) -> RolloutControl[AsyncT]:
        """Control of the rollout that runs, and undo of the last one; see :class:`RolloutControl`."""
        return self._rollout

    @synced
    async def rollout_status(self) -> RolloutStatus | None:
        """Return the progress of the rollout that runs, as ``rollout.status()`` does.

        Returns
        -------
        RolloutStatus or None
            None when no rollout runs. Awaitable when the cluster is asynchronous.
        """
        return parse_status(await self.scheduler_comm.rollout_status())

    # -- scaling -------------------------------------------------------------------------------------------------------

    @begun
    async def scale(  # type: ignore[override]
        self,
        /,
        n: int | None = None,
        memory: str | int | None = None,
        cores: int | None = None,
        *,
        nodes: int | None = None,
        strict: bool = False,
        **kinds: int,
    ) -> ScaleReport:
        """Change the number of workers on the nodes; data of workers that go is moved first.

        Workers that stay are not restarted; those that hold least go first. Hosts with ``standby=True`` are launched
        when the others have no capacity, and ended when they have no workers. A shortfall is a warning.

        Parameters
        ----------
        n : int, optional
            Number of workers.
        memory : str or int, optional
            As many workers as have at least this much memory together, in bytes or as in "64 GiB".
        cores : int, optional
            As many workers as have at least this many threads together.
        nodes : int, optional
            Number of nodes with all workers of their mode; the others stand by.
        strict : bool
            Raise when there is no capacity for all, and change nothing.
        **kinds : int
            Number of workers of a kind: ``cpu``, ``gpu``, a resource that workers have, or a worker's name in a spec.
            Other kinds stay as they are. A node whose mode lacks the kind changes to ``mixed``, which has both.

        Returns
        -------
        ScaleReport
            Number of workers now, changes on each node, and what there is no capacity for. Awaitable when the cluster
            is asynchronous.

        Raises
        ------
        ConfigError
            For a kind that no node can have, and with `strict` when there is no capacity for all.

        Examples
        --------
        >>> report = cluster.scale(1)
        >>> report.workers, len(cluster.nodes["local"]["plan"])
        (1, 1)
        """
        parse_flag("strict", strict)
        if (n, memory, cores, nodes, kinds) == (None, None, None, None, {}):
            n = 0  # as in dask
        nbytes = None if memory is None else parse_nbytes("memory", memory, call="scale")
        target = ScaleTarget(n, cores, nbytes, nodes, kinds)
        if self.status in (Status.closing, Status.closed, Status.failed):
            self.worker_spec.clear()  # dask's close() scales to 0
            return ScaleReport("scale", {}, 0.0, asked=str(target))
        self.scaling.stop_adaptive()
        return await self.scaling.up_or_down(target, strict)

    async def scale_down(self, workers: Sequence[str]) -> None:
        """Stop workers, after their data was moved to others; dask's ``Adaptive`` calls this.

        Parameters
        ----------
        workers : list of str
            Names of the workers; unknown ones have stopped already.
        """
        await self.scaling.down(workers)

    _supports_scaling = True

    def _threads_per_worker(self) -> int:
        return self.scaling.smallest_threads()

    def _memory_per_worker(self) -> int:
        return self.scaling.smallest_memory()

    @overload  # type: ignore[override]
    def adapt(
        self, *, minimum: float = 0, maximum: float = ..., worker_key: WorkerKey, **options: Any
    ) -> distributed.deploy.adaptive.Adaptive: ...
    @overload
    def adapt(
        self,
        Adaptive: type[AgentAdaptive] = ...,
        minimum: float = 0,
        maximum: float = ...,
        *,
        worker_key: None = None,
        **options: Any,
    ) -> AgentAdaptive: ...
    @overload
    def adapt(
        self, Adaptive: type[AdaptiveT], minimum: float = 0, maximum: float = ..., **options: Any
    ) -> AdaptiveT: ...
    def adapt(
        self,
        Adaptive: type[distributed.deploy.adaptive.Adaptive] = AgentAdaptive,
        minimum: float = 0,
        maximum: float = math.inf,
        minimum_cores: int | None = None,
        maximum_cores: int | None = None,
        minimum_memory: str | None = None,
        maximum_memory: str | None = None,
        **kwargs: Any,
    ) -> distributed.deploy.adaptive.Adaptive:
        """Scale by demand: from now on nodes get the workers that tasks need.

        Parameters
        ----------
        Adaptive : type
            Class to use instead of :class:`agentcluster.client.adaptive.AgentAdaptive`. Where `worker_key` is given it
            is dask's, which counts workers whatever their kind.
        minimum, maximum : int
            Limits of the number of workers.
        minimum_cores, maximum_cores : int, optional
            Limits of the threads of all workers together.
        minimum_memory, maximum_memory : str, optional
            Limits of the memory of all workers together, such as "100 GiB".
        **kwargs
            As for the class: ``modes``, limits by kind such as ``gpu=(0, 2)``, ``interval``, ``wait_count``,
            ``target_duration``, ``idle_timeout``, ``up_delay``.

        Returns
        -------
        AgentAdaptive
            Its ``stop()`` ends it; so do :meth:`scale`, :meth:`reprovision` and the end of the cluster.

        Raises
        ------
        ConfigError
            When an option cannot be used.

        Examples
        --------
        >>> adaptive = cluster.adapt(minimum=1, maximum=4)
        >>> client.submit(sum, [1, 2, 3]).result()
        6
        >>> adaptive.stop()
        """
        if not isinstance(Adaptive, type) or not issubclass(Adaptive, distributed.deploy.adaptive.Adaptive):
            raise ConfigError(
                f"adapt(Adaptive={Adaptive!r}): that is for a class; limits have names: adapt(minimum=1, maximum=10)"
            )
        if not callable(kwargs.get("worker_key", callable)):
            raise ConfigError(f"adapt(worker_key={kwargs['worker_key']!r}): give a function of a worker's state")
        if Adaptive is AgentAdaptive and kwargs.get("worker_key") is not None:
            Adaptive = distributed.deploy.adaptive.Adaptive
        self._adaptive_options: dict[str, Any] = {}  # dask would add the options of an earlier call
        limits: dict[str, Any] = {
            "minimum": minimum,
            "maximum": maximum,
            "minimum_cores": minimum_cores,
            "maximum_cores": maximum_cores,
            "minimum_memory": minimum_memory,
            "maximum_memory": maximum_memory,
        }
        # SpecCluster's own turns limits of cores and memory into numbers of workers, which ours does itself.
        adapt = functools.partial(Cluster.adapt, self) if issubclass(Adaptive, AgentAdaptive) else super().adapt
        try:
            return adapt(Adaptive, **limits, **kwargs)
        except AgentClusterError as error:
            raise in_short(error) from error.__cause__

    @at_border
    def request(self, *, timeout: str | float = "5 minutes", **resources: int) -> Request:
        """Hold capacity for tasks before they are submitted, while :meth:`adapt` runs.

        Parameters
        ----------
        timeout : str or float
            Time in which there must be capacity.
        **resources : int
            Number of tasks that need one of a resource, as in ``gpu=4`` or ``cpu=16``.

        Returns
        -------
        Request
            A context manager, asynchronous where the cluster is: there is capacity inside, and it is released at the
            end.

        Raises
        ------
        ConfigError
            For a number that is not above 0; when entered: :meth:`adapt` does not run, or no node can ever have the
            capacity.
        TimeoutError
            When entered: there was no capacity in time.

        Examples
        --------
        >>> adaptive = cluster.adapt(minimum=1)
        >>> with cluster.request(cpu=1):
        ...     client.submit(sum, [1, 2, 3], resources={"CPU": 1}).result()
        6
        >>> adaptive.stop()
        """
        inside: AsyncCluster = self  # type: ignore[assignment]
        return Request(
            inside,
            {resource_name(name): number for name, number in resources.items()},
            parse_seconds("timeout", timeout, call="request", zero=True),
        )

    def adaptive_log(self) -> AdaptiveLog:
        """Return the decisions of :meth:`adapt` with their reasons.

        Returns
        -------
        AdaptiveLog
            The decisions, oldest first; a table as its repr.
        """
        return self.scaling.log()

    # -- display -------------------------------------------------------------------------------------------------------

    @synced
    async def get_logs(
        self,
        cluster: bool = True,
        scheduler: bool = True,
        workers: bool | Iterable[str] = True,
        agents: bool = False,
    ) -> Logs:
        """Return the logs of the cluster object, the scheduler, the workers and the agents.

        Parameters
        ----------
        cluster, scheduler
            Whether those of the cluster object and of the scheduler.
        workers : bool or iterable of str
            Whether those of the workers, or the addresses or names of some.
        agents : bool
            Also the last lines of each node's agent, by node name; as many as ``agentcluster.log.lines``.

        Returns
        -------
        Logs
            Name -> log. Awaitable when the cluster is asynchronous.

        Raises
        ------
        ConfigError
            For a worker that there is not.
        """
        for key, value in (("cluster", cluster), ("scheduler", scheduler), ("agents", agents)):
            parse_flag(key, value)
        chosen = parse_workers(workers, self.scheduler_info["workers"])
        logs: Logs = await self._get_logs(cluster=cluster, scheduler=scheduler, workers=chosen)
        if agents:
            logs.update({name: Log("\n".join(lines)) for name, lines in (await self.display.agent_logs()).items()})
        return logs

    def __repr__(self) -> str:
        return self.display.line(super().__repr__())

    def _repr_html_(self, cluster_status: str | None = None) -> str:
        return self.display.html(cluster_status) + self.nodes._repr_html_()

    def _widget(self) -> object:
        panel = self.display.panel()
        return None if panel is None else panel.root
