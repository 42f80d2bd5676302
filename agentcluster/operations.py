"""What users ask of a cluster while it runs: swaps and hosts.

:class:`Operations` is the half of :class:`~agentcluster.AgentCluster` that talks to the plugin in the scheduler. What
it knows of the nodes is kept true in the background, also after what other clients did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from distributed.core import Status

from agentcluster import modes
from agentcluster.display import Display
from agentcluster.elasticity import Elasticity
from agentcluster.entries import Blueprint, NodeProcess, in_standby
from agentcluster.errors import ConfigError, NodeNotFound
from agentcluster.given import as_seconds
from agentcluster.model import Mode, to_wire
from agentcluster.progress import watch
from agentcluster.report import Nodes, Report
from agentcluster.rollout_control import RolloutControl

logger = logging.getLogger(__name__)

#: Seconds in which the news of a swap, one for each worker, are gathered before the scheduler is asked for its nodes.
GATHER = 0.2


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
            drain_timeout=_given("drain_timeout", drain_timeout, zero=True),
            max_parallel=max_parallel,
            canary=canary,
            on_failure=on_failure,
            timeout=_given("timeout", timeout),
            wait=wait if isinstance(wait, bool) else _given("wait", wait, zero=True),
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


def _idle(node: Mapping[str, Any] | None) -> bool:
    """Whether a node has no workers and gets none just now."""
    return node is not None and not node["plan"] and node["state"] in ("standby", "refused", "lost")


def _given(key: str, value: str | float | None, zero: bool = False) -> float | None:
    """Return a time that the user gave in seconds, or None."""
    if value is None or (zero and value == 0):
        return value
    return seconds(key, value, 0.0)


def seconds(key: str, value: str | float | None, default: float) -> float:
    """Return a time that the user gave, in seconds, or the default where none was given."""
    if value is None:
        return default
    found = as_seconds(value)
    if not 0 < found < math.inf:
        raise ConfigError(f"{key}={value!r} must be a time above 0, such as '30s' or 30 (seconds)", key=key)
    return found
