"""Hosts of a cluster: launch their agents and end them, standby hosts when their workers are needed."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from distributed.core import Status

from agentcluster.client.calls import Plain
from agentcluster.client.interface import warn, warn_of_workers
from agentcluster.client.processes import Blueprint, NodeEntry, NodeProcess, in_standby
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound, one_line
from agentcluster.launch.protocol import Launcher
from agentcluster.model import Hardware, Mode
from agentcluster.reports import NodeSnapshot
from agentcluster.wire import from_wire, to_wire, with_cause

if TYPE_CHECKING:
    from agentcluster.client.cluster import AsyncCluster

logger = logging.getLogger(__name__)

#: Called after standby hosts were launched: with all of them, and with those that failed -> reason.
Launches = Callable[[Sequence[str], Mapping[str, str]], Awaitable[None]]


class Hosts:
    """Hosts of a cluster: launch agents and end them.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster; everything here runs in its event loop.
    launchers
        Launcher of each host.
    blueprint
        Factory for the entries of the nodes.
    mode
        First mode of the nodes.
    modes_by_name
        Node name -> first mode of that node.
    start_timeout
        Seconds that a node's first workers have to join.
    on_failure
        Whether a host that fails raises, or is left out with a warning.
    """

    def __init__(
        self,
        cluster: AsyncCluster,
        launchers: Sequence[Launcher],
        blueprint: Blueprint,
        *,
        mode: Mode,
        modes_by_name: Mapping[str, Mode],
        start_timeout: float,
        on_failure: Literal["raise", "warn"],
    ) -> None:
        self.reserve = Reserve(launcher for launcher in launchers if in_standby(launcher))
        self.opening: set[asyncio.Future[NodeSnapshot]] = set()
        self._cluster = cluster
        self._blueprint = blueprint
        self._mode = mode
        self._modes = modes_by_name
        self._start_timeout = start_timeout
        self._on_failure = on_failure
        self._processes: weakref.WeakSet[NodeProcess] = weakref.WeakSet()
        self._missed: dict[str, BaseException] = {}
        self._leaving: dict[str, NodeEntry] = {}
        self._task: asyncio.Task[None] | None = None
        self._launching: tuple[str, ...] = ()

    def __repr__(self) -> str:
        standby = ", ".join(self.reserve.here)
        return f"<Hosts: {', '.join(self._cluster.workers) or 'none'}{f'; in standby {standby}' if standby else ''}>"

    # -- SpecCluster's entries -----------------------------------------------------------------------------------------

    async def open(self, names: Sequence[str]) -> None:
        """Launch the agents of nodes in ``worker_spec``, and wait until they have their workers.

        Parameters
        ----------
        names
            Names of the nodes.

        Raises
        ------
        LaunchError, ModeRefused, WorkerStartError
            When a host fails that must not fail.
        """
        cluster = self._cluster
        address = str(getattr(cluster.scheduler, "contact_address", None) or cluster.scheduler.address)
        entries = {name: cluster.worker_spec[name] for name in names}
        nodes = {name: entry["cls"](address, **entry["options"]) for name, entry in entries.items()}
        self._processes.update(nodes.values())
        starts = {name: asyncio.ensure_future(self._start(node)) for name, node in nodes.items()}
        self.opening |= set(starts.values())
        try:
            if starts:
                await asyncio.wait(starts.values())
        except BaseException:
            for start in starts.values():
                start.cancel()
            await asyncio.gather(*starts.values(), return_exceptions=True)
            raise
        finally:
            self.opening -= set(starts.values())
        failed: dict[str, BaseException] = {}
        came: dict[str, NodeSnapshot] = {}
        for name, start in starts.items():
            error = asyncio.CancelledError() if start.cancelled() else start.exception()
            if error is None:
                cluster.workers[name] = nodes[name]
                came[name] = start.result()
                continue
            cluster.worker_spec.pop(name, None)
            # launch() returns why a standby host failed: there may be other hosts.
            (self._missed if name in self.reserve else failed)[name] = error
        self._raise(failed)
        warn_of_workers(came)

    async def _start(self, node: NodeProcess) -> NodeSnapshot:
        try:
            await node
            answer = await self._cluster.scheduler_comm.await_nodes(names=[node.name], timeout=self._start_timeout)
            return answer[node.name]
        except BaseException as error:
            await asyncio.shield(node.close())
            if isinstance(error, AgentClusterError):
                raise with_cause(error) from error.__cause__
            raise

    def _raise(self, failed: Mapping[str, BaseException]) -> None:
        """Raise the first failure, or warn of each, as `on_failure` says."""
        if not failed:
            return
        first = next(iter(failed.values()))
        if self._on_failure == "raise" or not self._cluster.workers or not isinstance(first, Exception):
            raise first
        for name, error in failed.items():
            warn(f"host {name} is left out: {error}")

    async def close(self, names: Sequence[str]) -> None:
        """End the agents of nodes, after their data was moved to other nodes.

        Parameters
        ----------
        names
            Names of the nodes.

        Raises
        ------
        PreflightError, SwapError
            When the data of a node cannot be moved; its agent continues. Not while the cluster closes.
        """
        cluster = self._cluster
        closing = cluster.status is not Status.running
        if not cluster.view.lost and (not closing or not cluster.shutdown_scheduler):
            for name in names:
                try:
                    await cluster.scheduler_comm.retire_node(name=name)
                except (AgentClusterError, OSError) as error:
                    if not closing:
                        cluster.worker_spec[name] = self._leaving[name]
                        raise
                    logger.warning("Node %s closes with its data: %s", name, error)
        nodes = [cluster.workers.pop(name) for name in names]
        await asyncio.gather(*(node.close() for node in nodes))

    async def cancel(self) -> None:
        """Cancel the launches in progress, because the cluster closes."""
        opening = list(self.opening)
        for start in opening:
            start.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for node in list(self._processes):
            if node.status is Status.created:  # its start was cancelled before the first step
                await node.close()

    # -- hosts that come and go ----------------------------------------------------------------------------------------

    async def announce(self) -> None:
        """Set the first modes of the nodes on the scheduler."""
        comm, own = self._cluster.scheduler_comm, _modes_to_wire(self._modes)
        if self._cluster.shutdown_scheduler:
            await comm.set_provision_mode(mode=self._mode.name, config=self._mode.config, nodes=own)
        else:
            # Others may use this scheduler: its default mode is theirs, ours is for our nodes.
            await comm.set_provision_mode(nodes=self._default_modes(self._cluster.worker_spec) | own)

    def _default_modes(self, names: Iterable[str]) -> dict[str, Plain]:
        """Return the cluster's mode for each node, where the scheduler's default mode is not the cluster's."""
        return {} if self._cluster.shutdown_scheduler else {name: to_wire(self._mode) for name in names}

    async def add(self, host: object) -> str:
        """Launch or adopt one more agent, or add a standby host.

        Parameters
        ----------
        host
            As in `hosts` of the cluster.

        Returns
        -------
        str
            Name of the node.

        Raises
        ------
        ConfigError
            When the host cannot be used, or its name is taken.
        LaunchError, ModeRefused, WorkerStartError
            When the host fails.
        """
        launcher = self._blueprint.launcher(host)
        name = launcher.name
        if name in self._cluster.worker_spec or name in self.reserve:
            raise ConfigError(f"host {launcher.where!r}: a node named {name!r} is already there; use Host(…, name=…)")
        if in_standby(launcher):
            self.reserve.add(launcher)
            return name
        if default := self._default_modes([name]):
            await self._cluster.scheduler_comm.set_provision_mode(nodes=default)
        self._cluster.worker_spec[name] = self._blueprint.node(launcher)
        await self._cluster._correct_state()
        return name

    async def remove(self, name: str) -> None:
        """End the agent of a node, after its data was moved, and forget its host.

        Parameters
        ----------
        name
            Name of the node.

        Raises
        ------
        NodeNotFound
            When the cluster has no such node.
        PreflightError, SwapError
            When its data cannot be moved; the node stays as it was.
        """
        if not isinstance(name, str) or (name not in self._cluster.worker_spec and name not in self.reserve):
            raise NodeNotFound(name, [*self._cluster.worker_spec, *self.reserve.here])
        await self._leave([name])
        self.reserve.forget(name)

    async def _leave(self, names: Iterable[str]) -> None:
        spec = self._cluster.worker_spec
        self._leaving = {name: spec.pop(name) for name in names if name in spec}
        if self._leaving:
            await self._cluster._correct_state()

    # -- standby hosts -------------------------------------------------------------------------------------------------

    def extra(self) -> tuple[str, ...]:
        """Return the standby hosts whose agents run.

        Returns
        -------
        tuple of str
            Names of the hosts.
        """
        return tuple(name for name in self.reserve.out if name in self._cluster.workers)

    def candidates(self) -> dict[str, Hardware | None]:
        """Return the standby hosts that may be launched, first those that are being launched.

        Returns
        -------
        dict
            Host -> its hardware; None where it is unknown.
        """
        return {**dict.fromkeys(self._launching), **self.reserve.ready(time.monotonic())}

    async def launch(self, names: Sequence[str]) -> dict[str, str]:
        """Launch standby hosts, without workers.

        Parameters
        ----------
        names
            Names of the hosts.

        Returns
        -------
        dict
            Host that failed -> reason.
        """
        cluster = self._cluster
        own = _modes_to_wire({name: self._modes[name] for name in names if name in self._modes})
        await cluster.scheduler_comm.set_provision_mode(nodes=self._default_modes(names) | own, bare=list(names))
        for name in names:
            cluster.worker_spec[name] = self._blueprint.node(self.reserve.take(name))
        try:
            await cluster._correct_state()
        finally:
            now = time.monotonic()
            for name in names:
                if name not in cluster.workers:
                    self.reserve.failed(name, now)
                elif name in cluster.view.nodes:
                    self.reserve.came(name, cluster.view.nodes[name]["hardware"])
        return {name: str(error) for name in names if (error := self._missed.pop(name, None))}

    def launch_soon(self, names: Sequence[str], then: Launches) -> None:
        """Launch standby hosts in the background, unless some are being launched.

        Parameters
        ----------
        names
            Names of the hosts; those that were launched since they were chosen are left out.
        then
            Called afterwards, unless there was nothing to launch.
        """
        names = [name for name in names if name in self.reserve.here]
        if names and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._launch(names, then), name="agentcluster launches standby hosts")

    async def _launch(self, names: Sequence[str], then: Launches) -> None:
        self._launching = tuple(names)
        try:
            failed = await self.launch(names)
        except Exception as error:  # whatever it is, `then` reports it
            failed = dict.fromkeys(names, one_line(error))
        finally:
            self._launching = ()
        try:
            await then(names, failed)
        except Exception as error:  # the cluster was closed meanwhile
            logger.debug("The launch of %s could not be reported: %s", ", ".join(names), error)

    async def end_idle(self) -> list[str]:
        """End the agents on standby hosts that have no workers.

        Returns
        -------
        list of str
            Names of the hosts.
        """
        idle = [name for name in self.extra() if _idle(self._cluster.view.nodes.get(name))]
        if idle:
            try:
                await self._leave(idle)
            finally:
                for name in idle:
                    if name not in self._cluster.workers:
                        self.reserve.back(name)
        return idle

    async def end_idle_unless_launching(self) -> list[str]:
        """Refresh the cluster's nodes and :meth:`end_idle`, unless hosts are being launched.

        Returns
        -------
        list of str
            Names of the hosts.
        """
        if self._launching or not self.extra():
            return []
        await self._cluster.view.refresh()
        return await self.end_idle()


#: Seconds before a failed launch is tried again, doubled for each further failure.
RETRY = 10.0

#: Upper limit of those seconds.
LONGEST_RETRY = 600.0


class Reserve:
    """Standby hosts, in the order in which they are launched.

    Parameters
    ----------
    launchers
        Launcher of each host.

    Notes
    -----
    The hardware of a host is known once it was launched.
    """

    def __init__(self, launchers: Iterable[Launcher] = ()) -> None:
        self._launchers = {launcher.name: launcher for launcher in launchers}
        self._out: set[str] = set()
        self._hardware: dict[str, Hardware] = {}
        self._failures: dict[str, tuple[int, float]] = {}

    def __repr__(self) -> str:
        return f"<Reserve: in standby {', '.join(self.here) or 'none'}; launched {', '.join(self.out) or 'none'}>"

    def __contains__(self, name: object) -> bool:
        return name in self._launchers

    @property
    def here(self) -> tuple[str, ...]:
        """Hosts that are not launched: those without a failure first, then in the order in which they were given."""
        names = [name for name in self._launchers if name not in self._out]
        return tuple(sorted(names, key=lambda name: self._failures.get(name, (0, 0.0))))

    @property
    def out(self) -> tuple[str, ...]:
        """Hosts that are launched, or are being launched."""
        return tuple(name for name in self._launchers if name in self._out)

    def add(self, launcher: Launcher) -> None:
        """Add a host.

        Parameters
        ----------
        launcher
            Launcher of the host.
        """
        self._launchers[launcher.name] = launcher

    def forget(self, name: str) -> None:
        """Remove a host, if it is here.

        Parameters
        ----------
        name
            Name of the host.
        """
        self._launchers.pop(name, None)
        self._out.discard(name)

    def ready(self, now: float) -> dict[str, Hardware | None]:
        """Return the hosts that may be launched now.

        Parameters
        ----------
        now
            Time in seconds.

        Returns
        -------
        dict
            Host -> its hardware; None where it is unknown.
        """
        return {name: self._hardware.get(name) for name in self.here if self._failures.get(name, (0, 0.0))[1] <= now}

    def take(self, name: str) -> Launcher:
        """Mark a host as launched.

        Parameters
        ----------
        name
            Name of the host.

        Returns
        -------
        Launcher
            Its launcher.
        """
        self._out.add(name)
        return self._launchers[name]

    def failed(self, name: str, now: float) -> None:
        """Put a host back whose launch failed; it is not :meth:`ready` for a while, longer after each failure.

        Parameters
        ----------
        name
            Name of the host.
        now
            Time in seconds.
        """
        number = self._failures.get(name, (0, 0.0))[0] + 1
        self._failures[name] = number, now + min(RETRY * 2.0 ** min(number - 1, 32), LONGEST_RETRY)
        self._out.discard(name)

    def came(self, name: str, hardware: Plain) -> None:
        """Record the hardware of a host whose launch succeeded.

        Parameters
        ----------
        name
            Name of the host.
        hardware
            Its :class:`~agentcluster.model.Hardware`, as plain data.
        """
        self._failures.pop(name, None)
        self._hardware[name] = from_wire(Hardware, hardware, f"hardware of {name}")

    def back(self, name: str) -> None:
        """Put a host back whose agent has ended.

        Parameters
        ----------
        name
            Name of the host.
        """
        self._out.discard(name)


def _modes_to_wire(modes_by_name: Mapping[str, Mode]) -> dict[str, Plain]:
    return {name: to_wire(mode) for name, mode in modes_by_name.items()}


def _idle(node: NodeSnapshot | None) -> bool:
    """Return whether a node has no workers and is not about to get some."""
    return node is not None and not node["plan"] and node["state"] in ("standby", "refused", "lost")
