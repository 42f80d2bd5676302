"""Scheduler plugin: the registry of nodes, the agents' connections, and the calls that clients make.

One :class:`AgentPlugin` lives in a scheduler, however many agents register it. It receives the agents' heartbeats,
keeps the registry true, and answers calls; :mod:`agentcluster.scheduler.controller` decides and carries out changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from distributed import Scheduler, Status
from distributed.comm.core import Comm, CommClosedError
from distributed.core import error_message
from distributed.diagnostics.plugin import SchedulerPlugin

from agentcluster import modes
from agentcluster.config import Config, warn_untested
from agentcluster.errors import AgentClusterError, LaunchError
from agentcluster.model import HostMetrics, Mode, WorkerState
from agentcluster.requests import AdaptiveRequest, NodeRegistration, RolloutPolicy, ScaleTarget
from agentcluster.scheduler import metrics
from agentcluster.scheduler.controller import Changes
from agentcluster.scheduler.planning.nodes import SETTLED, Node, Registry
from agentcluster.wire import PLUGIN, RETIRED, answered, check_protocol, from_wire, spoken, to_wire

logger = logging.getLogger(__name__)

CALLS = (
    *("register_node", "unregister_node", "get_nodes", "await_nodes", "get_node_logs"),
    *("await_demand", "get_provision_mode", "set_provision_mode", "reprovision_nodes", "scale_nodes", "adapt_nodes"),
    *("retire_node", "retire_node_workers", "undo_rollout", "rollout_status", "control_rollout"),
)


class Hearing:
    """What the plugin hears; a base of it."""

    registry: Registry
    changes: Any
    config: Config
    _streams: dict[str, Comm]
    _tasks: set[asyncio.Task[Any]]
    _moved: asyncio.Condition

    async def _listen(self, node: Node, comm: Comm) -> None:
        """Take an agent's messages until its connection ends, and the node with it."""
        self._streams[node.name] = comm
        why = "its agent's connection ended"
        try:
            while (message := await comm.read()) != "leaving":
                self._hear(node, message)
            self.registry.unregister(node.name)
            logger.info("Node %s left", node.name)
        except (CommClosedError, OSError):
            pass
        except AgentClusterError as error:
            why = f"its agent said what is not understood here, is it of another version? {error}"
        finally:
            comm.abort()
            if self._streams.get(node.name) is comm:
                del self._streams[node.name]
            if self.registry.nodes.get(node.name) is node:
                self._lose(node, why)
            await self._notify()

    def _hear(self, node: Node, message: Mapping[str, Any]) -> None:
        node.heard = time.monotonic()
        if "metrics" in message:
            node.metrics = from_wire(HostMetrics, message["metrics"])
        for each in message.get("workers", ()):
            self._worker_changed(node, from_wire(WorkerState, each))

    def _worker_changed(self, node: Node, state: WorkerState) -> None:
        if state.state in ("retired", "failed"):
            logger.info("Worker %s of node %s %s", state.name, node.name, state.problem or "was retired")
            last = node.drop(state.name) and node.given is None
            if not state.problem and (node.forget(state.name) or last):
                self._spawn(self._end(node), f"end {node.name}")
            node.problem = f"worker {state.name} {state.problem}" if state.problem else node.problem
        elif state.name in node.plan.workers:
            before = node.workers.get(state.name)
            self.changes.tally.restarted(node.name, state.restarts - (before.restarts if before else 0))
            node.workers[state.name] = state

    async def _end(self, node: Node) -> None:
        """Tell an agent that its workers were retired, when those that nobody retired by name have gone too."""
        if node.plan.workers:
            with contextlib.suppress(AgentClusterError, TimeoutError):
                await self.changes.empty(node.name, RolloutPolicy(drain="data"))
        if stream := self._streams.get(node.name):
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write(RETIRED)

    def _lose(self, node: Node, why: str) -> None:
        if node.state != "lost":
            logger.info("Node %s is lost: %s", node.name, why)
            node.to("lost")
            node.problem = why
            node.workers.clear()
            node.plan = type(node.plan)(node.plan.revision, node.plan.mode)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self.config.node_ttl / 4)
            for node in self.registry.stale(time.monotonic(), self.config.node_ttl):
                self._lose(node, f"its agent was not heard for {self.config.node_ttl:g} s")
                if stream := self._streams.get(node.name):
                    # If it lives after all it must not go on alone: without this connection it ends, or stands by.
                    stream.abort()
                await self._notify()

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    def _spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        task = asyncio.create_task(coroutine, name=f"agentcluster: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class AgentPlugin(Hearing, SchedulerPlugin):
    """Registry of nodes, and the calls ``register_node``, ``reprovision_nodes``, ``get_nodes`` … on a scheduler.

    Parameters
    ----------
    mode
        The mode that a joining node gets, unless its agent was given one by hand.
    """

    name = PLUGIN
    idempotent = True
    changes: Changes

    def __init__(self, mode: Mode | None = None) -> None:
        self.registry = Registry(mode)
        self._mode = mode

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._mode,)

    async def start(self, scheduler: Scheduler) -> None:
        """Take up work on a scheduler; a second plugin on the same one does nothing."""
        # No await before the extension is set: many agents may be registering the plugin at once.
        if PLUGIN in scheduler.extensions:
            return
        scheduler.extensions[PLUGIN] = self
        self.scheduler = scheduler
        warn_untested()
        self.config = Config.load()
        self._moved = asyncio.Condition()
        self.changes = Changes(scheduler, self.registry, self.config, self._notify)
        self.changes.install()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._streams: dict[str, Comm] = {}
        scheduler.handlers.update({call: getattr(self, call) for call in CALLS})
        self._spawn(self._expire(), "expire nodes")
        metrics.publish(scheduler, self.registry, self.changes.tally)
        self._show()

    def _show(self) -> None:
        """Add the Nodes page where dask has a dashboard; that it cannot be drawn is no reason to have no nodes."""
        if "distributed.dashboard.scheduler" not in sys.modules:  # what would draw it was not imported for dask either
            return
        try:
            importlib.import_module("agentcluster.scheduler.dashboard").publish(
                self.scheduler, self.registry, self._held
            )
        except Exception as error:  # of another bokeh, or another dask
            logger.warning("The dashboard has no page for nodes: %s", error)

    async def before_close(self) -> None:
        """End what the plugin started; called when the scheduler closes."""
        metrics.withdraw(self.registry)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def register_node(
        self,
        comm: Comm,
        registration: Mapping[str, Any] | None = None,
        stream: bool = False,
        protocol: object = None,
        version: object = None,
        **newer: object,
    ) -> Any:
        """Take an agent's node in, and give it its workers.

        Parameters
        ----------
        registration
            A :class:`~agentcluster.requests.NodeRegistration` as plain data.
        stream
            Keep the connection open: its messages are the agent's heartbeats, and its end is the agent's end.
        protocol, version
            The agent's versions of the protocol and of agentcluster, see :func:`agentcluster.wire.spoken`.
        **newer
            Arguments of another version of the protocol; never read.

        Returns
        -------
        dict
            ``{"name": …}``, the name that the node got, and this side's versions.
        """
        try:
            peer, here = f"the agent at {comm.peer_address}", f"the scheduler at {self.scheduler.address}"
            check_protocol(peer, protocol, version, here=here)
            request = from_wire(NodeRegistration, registration, "register_node")
            node = self.registry.register(
                request.name,
                request.address,
                request.hardware,
                now=time.monotonic(),
                own_mode=request.mode,
                fallback=request.fallback,
                exact=request.exact,
                given=request.external_name,
                room=request.slots,
                resources=request.resources,
                labels=request.labels,
            )
        except AgentClusterError as error:
            return error_message(error, status="uncaught-error")
        logger.info("Node %s joined: %s", node.name, node.hardware.describe())
        answer = {"name": node.name, **spoken()}
        if stream:
            await comm.write({"status": "OK", **answer})
        self._spawn(self.changes.provision(node), f"provision {node.name}")
        if not stream:
            return answer
        await self._listen(node, comm)
        return Status.dont_reply

    @answered
    async def unregister_node(self, name: str) -> None:
        """Forget a node; its workers are its agent's to stop."""
        self.registry.unregister(name)
        logger.info("Node %s left", name)
        await self._notify()

    @answered
    async def get_nodes(self) -> dict[str, dict[str, Any]]:
        """Return node name -> what is known of it (see :meth:`agentcluster.scheduler.planning.nodes.Node.snapshot`).

        There is also ``held``: the number of keys that its workers hold, as ``keys``, and their ``nbytes``.
        """
        return {name: {**node.snapshot(), "held": self._held(node)} for name, node in self.registry.nodes.items()}

    def _held(self, node: Node) -> dict[str, int]:
        names = node.plan.workers.keys() | node.workers.keys()
        addresses = (self.scheduler.aliases.get(node.spelled(name)) for name in names)
        workers = [self.scheduler.workers[address] for address in addresses if address in self.scheduler.workers]
        return {"keys": sum(len(each.has_what) for each in workers), "nbytes": sum(each.nbytes for each in workers)}

    @answered
    async def await_nodes(self, names: Sequence[str], timeout: float) -> dict[str, dict[str, Any]]:
        """Wait until nodes have what they are meant to have, or said why not.

        Raises
        ------
        ModeRefused, WorkerStartError
            What the first of them said.
        TimeoutError
            Naming the nodes that were late.
        """

        def settled(name: str) -> bool:
            node = self.registry.nodes.get(name)
            return node is not None and node.state in SETTLED

        try:
            async with asyncio.timeout(timeout), self._moved:
                await self._moved.wait_for(lambda: all(map(settled, names)))
        except TimeoutError:
            late = [name for name in names if not settled(name)]
            raise TimeoutError(f"nodes {', '.join(late)} had no workers after {timeout:g} s") from None
        for name in names:
            if name in self.changes.errors:
                raise self.changes.errors[name]
            if self.registry.get(name).state == "lost":
                raise LaunchError(name, f"node {name!r} is lost: {self.registry.get(name).problem}")
        return {name: self.registry.get(name).snapshot() for name in names}

    @answered
    async def get_provision_mode(self) -> dict[str, Any]:
        """Return the default mode and its options, the mode of each node, and this side's versions."""
        nodes = {name: node.plan.mode.name for name, node in self.registry.nodes.items()}
        default = self.registry.default
        return {"mode": default.name, "config": to_wire(default.config), "nodes": nodes, **spoken()}

    @answered
    async def set_provision_mode(
        self,
        mode: str | None = None,
        config: Mapping[str, Any] | None = None,
        nodes: Mapping[str, Mapping[str, Any]] | None = None,
        bare: Sequence[str] = (),
    ) -> None:
        """Set the mode that nodes get when they join.

        Parameters
        ----------
        mode, config
            For all that have none of their own; None leaves it as it is.
        nodes
            Node name -> a :class:`~agentcluster.model.Mode` as plain data, for nodes that are yet to join.
        bare
            Nodes that are yet to join, and then have no workers until they are given some.
        """
        own = {name: from_wire(Mode, each, f"mode of node {name}") for name, each in (nodes or {}).items()}
        self.registry.expect(None if mode is None else modes.parse(mode, config), own, bare)

    @answered
    async def reprovision_nodes(
        self,
        mode: str,
        config: Mapping[str, Any] | str | None = None,
        nodes: Sequence[str] | str | None = None,
        remove_existing: bool = True,
        **terms: Any,
    ) -> dict[str, Any]:
        """Give nodes the workers that a mode means on them, in place of those that they have.

        Parameters
        ----------
        mode, config
            The mode and its options.
        nodes
            Names of nodes, patterns such as ``gpu-*``, or labels such as ``rack=a``; None for all, and for those that
            join later.
        remove_existing
            False keeps the workers that run and adds the mode's beside them.
        **terms
            How; see :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            ``{"mode": …, "nodes": {name: NodeReport as plain data}, "seconds": float, "dry_run": bool}``.

        Raises
        ------
        ConfigError, PreflightError, NodeNotFound, RolloutBusy
            Before anything is touched.
        SwapError
            When a step failed; it says what is true now.
        """
        how = from_wire(RolloutPolicy, terms, "reprovision_nodes")
        return await self.changes.reprovision(modes.parse(mode, config), nodes, how, remove_existing=remove_existing)

    @answered
    async def scale_nodes(
        self,
        n: int | None = None,
        nodes: Sequence[str] | str | None = None,
        target: Mapping[str, Any] | None = None,
        strict: bool = False,
        **terms: Any,
    ) -> dict[str, Any]:
        """Bring nodes to `n` workers, or another :class:`ScaleTarget`, as far as they have room; data is moved first.

        Returns
        -------
        dict
            As :meth:`reprovision_nodes`, with ``"workers"``, the number that there is now, and ``"short"``, what of the
            target there is no room for, or None.
        """
        wanted = ScaleTarget(workers=n) if target is None else from_wire(ScaleTarget, target, "scale_nodes")
        return await self.changes.scale(wanted, nodes, from_wire(RolloutPolicy, terms, "scale_nodes"), strict=strict)

    @answered
    async def adapt_nodes(
        self, asked: Mapping[str, Any], nodes: Sequence[str] | None = None, **terms: Any
    ) -> dict[str, Any]:
        """Give nodes the workers that tasks need, and no others; what it returns is in :meth:`Changes.adapt`."""
        how = from_wire(RolloutPolicy, terms, "adapt_nodes")
        return await self.changes.adapt(from_wire(AdaptiveRequest, asked, "adapt_nodes"), nodes, how)

    async def await_demand(self, timeout: float) -> bool:
        """Return whether, within `timeout` seconds, a task began to wait because there is no worker for it."""
        return await self.changes.watch.news(timeout)

    @answered
    async def retire_node(self, name: str, ends: bool = False, **terms: Any) -> dict[str, Any]:
        """Move a node's data to others and stop its workers; the node stays, in standby, unless its agent `ends`."""
        return await self.changes.empty(name, from_wire(RolloutPolicy, terms, "retire_node"), ends)

    @answered
    async def retire_node_workers(self, names: Sequence[str], **terms: Any) -> dict[str, Any]:
        """Move the data of the named workers to others and stop them; unknown names are gone already."""
        return await self.changes.retire(map(str, names), from_wire(RolloutPolicy, terms, "retire_node_workers"))

    @answered
    async def undo_rollout(self, **terms: Any) -> dict[str, Any]:
        """Bring the nodes that the last rollout changed back to the plans that they had before it."""
        return await self.changes.undo(from_wire(RolloutPolicy, terms, "undo_rollout"))

    @answered
    async def rollout_status(self) -> dict[str, Any] | None:
        """Return how far the rollout is that runs now; None when none runs."""
        return self.changes.rolling.status() if self.changes.rolling else None

    @answered
    async def control_rollout(self, action: str) -> None:
        """Pause, resume or cancel the rollout that runs now."""
        self.changes.control(action)

    @answered
    async def get_node_logs(self, nodes: Sequence[str] | None = None) -> dict[str, list[str]]:
        """Return node name -> the last lines that its agent logged."""
        chosen = [node for node in self.registry.select(nodes) if node.state != "lost"]
        agents: list[Any] = [self.scheduler.rpc(node.address) for node in chosen]
        lines = await asyncio.gather(*(agent.agent_logs() for agent in agents))
        return {node.name: list(log) for node, log in zip(chosen, lines, strict=True)}


async def dask_setup(scheduler: Scheduler) -> None:
    """Register the plugin; called by ``dask scheduler --preload agentcluster``."""
    await scheduler.register_scheduler_plugin(AgentPlugin(), name=PLUGIN, idempotent=True)
