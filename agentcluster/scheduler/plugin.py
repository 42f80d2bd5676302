"""Scheduler plugin: the registry of nodes, the agents' connections, and the calls that clients make.

One :class:`AgentPlugin` is in a scheduler, however many agents register it. Its methods are the calls on the scheduler;
arguments are parsed here, and :mod:`agentcluster.scheduler.controller` decides and acts. Its
:class:`AgentConnections` receive the agents' messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distributed import Scheduler, Status
from distributed.comm.core import Comm, CommClosedError
from distributed.core import PooledRPCCall
from distributed.diagnostics.plugin import SchedulerPlugin

from agentcluster import modes
from agentcluster.config import Config, warn_untested
from agentcluster.errors import AgentClusterError, ConfigError, LaunchError, WorkerStartTimeout, printable
from agentcluster.model import HostMetrics, Mode, WorkerState
from agentcluster.requests import AdaptiveRequest, NodeRegistration, RolloutPolicy, ScaleTarget
from agentcluster.scheduler import managers, metrics
from agentcluster.scheduler.controller import Controller
from agentcluster.scheduler.planning.nodes import SETTLED, Node, Registry
from agentcluster.scheduler.rollouts import Answer, NodeEvents
from agentcluster.units import parse_seconds
from agentcluster.wire import (
    PLUGIN,
    RETIRED,
    Handshakes,
    check_protocol,
    from_wire,
    handler,
    limit_handshakes,
    spoken,
    to_wire,
)

logger = logging.getLogger(__name__)

#: Seconds for the handshakes of TLS and of dask, each; many, for a scheduler that is busy.
HANDSHAKE = 60.0

#: Greatest number of connections to the scheduler that have not finished them, of one host and in all.
MOST_OF_ONE, MOST = 256, 1024

#: Methods of :class:`AgentPlugin` that become handlers of the scheduler.
CALLS = (
    *("register_node", "unregister_node", "get_nodes", "await_nodes", "get_node_logs"),
    *("await_demand", "get_provision_mode", "set_provision_mode", "reprovision_nodes", "scale_nodes", "adapt_nodes"),
    *("retire_node", "retire_node_workers", "undo_rollout", "rollout_status", "control_rollout"),
)


class BackgroundTasks:
    """Background tasks, kept until they end and cancelled together."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task.

        Parameters
        ----------
        coroutine
            The work.
        name
            Name of the task, for logs and debuggers.
        """
        task = asyncio.create_task(coroutine, name=f"agentcluster: {name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their end."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


class AgentConnections:
    """Receive the messages of agents, and mark silent nodes as lost.

    An agent keeps the connection of its registration open. Its messages are heartbeats with the host's metrics and the
    states of workers; the end of the connection is the end of the node.

    Parameters
    ----------
    controller
        Evacuates the remaining workers of a node that was retired from outside.
    tasks
        Runs that in the background.
    """

    def __init__(self, controller: Controller, tasks: BackgroundTasks) -> None:
        self._controller = controller
        self._registry = controller.registry
        self._events = controller.events
        self._tasks = tasks
        self._comms: dict[str, Comm] = {}

    async def listen(self, node: Node, comm: Comm) -> None:
        """Read an agent's messages until its connection ends; the node ends with it.

        Parameters
        ----------
        node, comm
            The agent's node, and the connection.
        """
        self._comms[node.name] = comm
        why = "its agent's connection ended"
        try:
            while (message := await comm.read()) != "leaving":
                self._receive(node, message)
            self._registry.unregister(node.name)
            logger.info("Node %s left", node.name)
        except (CommClosedError, OSError):
            pass
        except AgentClusterError as error:
            why = f"its agent sent a message that cannot be read, perhaps it has another version: {error}"
        finally:
            comm.abort()
            if self._comms.get(node.name) is comm:
                del self._comms[node.name]
            if self._registry.nodes.get(node.name) is node:
                self._lose(node, why)
            await self._events.notify()

    async def expire(self, ttl: float) -> None:
        """Mark nodes whose agent was silent for `ttl` seconds as lost, for ever.

        Parameters
        ----------
        ttl
            Seconds.
        """
        while True:
            await asyncio.sleep(ttl / 4)
            for node in self._registry.stale(time.monotonic(), ttl):
                self._lose(node, f"its agent was not heard for {ttl:g} s")
                if comm := self._comms.get(node.name):
                    # If the agent lives it must not continue alone: without this connection it ends, or stands by.
                    comm.abort()
                await self._events.notify()

    def _receive(self, node: Node, message: Answer) -> None:
        """Take the facts of one message: metrics of the host, and workers whose state changed."""
        node.heard = time.monotonic()
        if "metrics" in message:
            node.metrics = from_wire(HostMetrics, message["metrics"])
        for each in message.get("workers", ()):
            state = from_wire(WorkerState, each)
            if state.state in ("retired", "failed"):
                self._worker_ended(node, state)
            elif state.name in node.plan.workers:
                before = node.workers.get(state.name)
                self._controller.totals.restarted(node.name, state.restarts - (before.restarts if before else 0))
                node.workers[state.name] = state

    def _worker_ended(self, node: Node, state: WorkerState) -> None:
        """Remove a worker that was retired from outside, or failed, from its node's plan."""
        logger.info("Worker %s of node %s %s", state.name, node.name, state.problem or "was retired")
        was_last = node.drop(state.name)
        if state.problem:
            node.problem = f"worker {state.name} {state.problem}"
            return
        lost_names = node.forget(state.name)
        # A manager that retires the last of its names, or a user that retires the last worker, retires the node.
        if lost_names or (was_last and node.external_name is None):
            self._tasks.spawn(self._retire(node), f"retire {node.name}")

    async def _retire(self, node: Node) -> None:
        """Evacuate the remaining workers of a node, and tell its agent that it is retired."""
        if node.plan.workers:
            with contextlib.suppress(AgentClusterError, TimeoutError):
                await self._controller.empty(node.name, RolloutPolicy(drain="data"))
        if comm := self._comms.get(node.name):
            with contextlib.suppress(CommClosedError, OSError):
                await comm.write(RETIRED)

    def _lose(self, node: Node, why: str) -> None:
        """Mark a node as lost; its workers are gone."""
        if node.state != "lost":
            logger.info("Node %s is lost: %s", node.name, why)
            node.to("lost")
            node.problem = why
            node.workers.clear()
            node.plan = type(node.plan)(node.plan.revision, node.plan.mode)


class AgentPlugin(SchedulerPlugin):
    """Registry of nodes, and the calls ``register_node``, ``reprovision_nodes``, ``get_nodes`` … on a scheduler.

    Parameters
    ----------
    mode
        The mode that a joining node gets, unless its agent was given one by hand.

    Attributes
    ----------
    registry
        The nodes.
    controller
        Carries out changes; it exists once the plugin is in a scheduler.
    """

    name = PLUGIN
    idempotent = True
    scheduler: Scheduler
    controller: Controller
    connections: AgentConnections

    def __init__(self, mode: Mode | None = None) -> None:
        self.registry = Registry(_parsed(mode))
        self._mode = mode
        self._events = NodeEvents()
        self._tasks = BackgroundTasks()

    def __reduce__(self) -> tuple[type[AgentPlugin], tuple[Mode | None]]:
        return type(self), (self._mode,)

    async def start(self, scheduler: Scheduler) -> None:
        """Install the plugin in a scheduler; a second plugin in the same one does nothing.

        Parameters
        ----------
        scheduler
            The scheduler.
        """
        # No await before the extension is set: many agents may be registering the plugin at once.
        if PLUGIN in scheduler.extensions:
            return
        scheduler.extensions[PLUGIN] = self
        self.scheduler = scheduler
        warn_untested()
        config = Config.load()
        names = managers.install(scheduler, self.registry, config.start_timeout)
        self.controller = Controller(scheduler, self.registry, config, self._events, names)
        self.connections = AgentConnections(self.controller, self._tasks)
        scheduler.add_plugin(self.controller.demand)
        scheduler.handlers.update({call: handler(getattr(self, call)) for call in CALLS})
        limit_handshakes(scheduler.listeners, Handshakes(HANDSHAKE, of_one=MOST_OF_ONE, of_all=MOST))
        self._tasks.spawn(self.connections.expire(config.node_ttl), "expire nodes")
        metrics.publish(scheduler, self.registry, self.controller.totals)
        self._add_dashboard()

    def _add_dashboard(self) -> None:
        """Add the Nodes page where dask has a dashboard; a page that cannot be drawn is only a warning."""
        if "distributed.dashboard.scheduler" not in sys.modules:  # dask has not imported bokeh either
            return
        try:
            dashboard = importlib.import_module("agentcluster.scheduler.dashboard")
            dashboard.publish(self.scheduler, self.registry, self._data_on)
        except Exception as error:  # of another version of bokeh or dask
            logger.warning("The dashboard has no page for nodes: %s", error)

    async def before_close(self) -> None:
        """End the plugin's tasks and metrics; dask calls it when the scheduler closes."""
        metrics.withdraw(self.registry)
        await self._tasks.cancel()

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def register_node(
        self,
        comm: Comm,
        registration: Mapping[str, object] | None = None,
        stream: bool = False,
        protocol: object = None,
        version: object = None,
        **newer: object,
    ) -> Mapping[str, object] | Status:
        """Register an agent's node, and give it its workers.

        Parameters
        ----------
        registration
            A :class:`~agentcluster.requests.NodeRegistration` as plain data.
        stream
            Keep the connection open: its messages are the agent's heartbeats, and its end is that of the node.
        protocol, version
            The agent's versions of the protocol and of agentcluster, see :func:`agentcluster.wire.spoken`.
        **newer
            Arguments of another version of the protocol, which is refused with a reason.

        Returns
        -------
        dict
            ``{"name": …}``, the name that the node got, and this side's versions.

        Raises
        ------
        VersionMismatch
            When the agent speaks another version of the protocol.
        ConfigError
            When the registration cannot be read.
        NodeExists
            When another agent has the name.
        """
        peer, here = f"the agent at {comm.peer_address}", f"the scheduler at {self.scheduler.address}"
        check_protocol(peer, protocol, version, here=here)
        request = from_wire(NodeRegistration, registration, "register_node")
        request = replace(request, mode=_parsed(request.mode), fallback=_parsed(request.fallback))
        node = self.registry.register(request, time.monotonic())
        logger.info("Node %s joined: %s", node.name, node.hardware.describe())
        answer = {"name": node.name, **spoken()}
        if stream:
            await comm.write({"status": "OK", **answer})
        self._tasks.spawn(self.controller.provision(node), f"provision {node.name}")
        if not stream:
            return answer
        await self.connections.listen(node, comm)
        return Status.dont_reply

    async def unregister_node(self, name: str) -> None:
        """Remove a node from the registry; its agent stops the workers.

        Parameters
        ----------
        name
            Name of the node.
        """
        self.registry.unregister(name)
        logger.info("Node %s left", name)
        await self._events.notify()

    async def get_nodes(self) -> dict[str, Answer]:
        """Return the state of all nodes.

        Returns
        -------
        dict
            Node name -> its state as plain data, see :meth:`agentcluster.scheduler.planning.nodes.Node.snapshot`, and
            ``held``: the number of ``keys`` that its workers hold, and their ``nbytes``.
        """
        return {name: {**node.snapshot(), "held": self._data_on(node)} for name, node in self.registry.nodes.items()}

    def _data_on(self, node: Node) -> dict[str, int]:
        """Return the number of keys on a node's workers, and their bytes."""
        names = node.plan.workers.keys() | node.workers.keys()
        addresses = (self.scheduler.aliases.get(node.scheduler_name(name)) for name in names)
        workers = [self.scheduler.workers[address] for address in addresses if address in self.scheduler.workers]
        return {"keys": sum(len(each.has_what) for each in workers), "nbytes": sum(each.nbytes for each in workers)}

    async def await_nodes(self, names: Sequence[str], timeout: float) -> dict[str, Answer]:
        """Wait until nodes have their first workers.

        Parameters
        ----------
        names
            Names of nodes.
        timeout
            Seconds to wait.

        Returns
        -------
        dict
            Node name -> its state, as in :meth:`get_nodes`.

        Raises
        ------
        ModeRefused, WorkerStartError
            The error of the first node that could not be given its workers.
        LaunchError
            When a node is lost.
        WorkerStartTimeout
            Names the nodes that were late.
        """

        timeout = parse_seconds("timeout", timeout, call="await_nodes", zero=True)

        def settled(name: str) -> bool:
            node = self.registry.nodes.get(name)
            return node is not None and node.state in SETTLED

        try:
            await self._events.wait_for(lambda: all(map(settled, names)), timeout)
        except TimeoutError:
            late = [name for name in names if not settled(name)]
            why = f"had not joined after {timeout:g} s; start_timeout= gives more time"
            raise WorkerStartTimeout(", ".join(late), {"all": why}) from None
        for name in names:
            if name in self.controller.errors:
                raise self.controller.errors[name]
            if self.registry.get(name).state == "lost":
                raise LaunchError(name, f"node {name!r} is lost: {self.registry.get(name).problem}")
        return {name: self.registry.get(name).snapshot() for name in names}

    async def get_provision_mode(self) -> Answer:
        """Return the modes of nodes.

        Returns
        -------
        dict
            ``mode`` and ``config``: the default mode and its options; ``nodes``: node name -> mode; ``protocol`` and
            ``version`` of this side.
        """
        nodes = {name: node.plan.mode.name for name, node in self.registry.nodes.items()}
        default = self.registry.default
        return {"mode": default.name, "config": to_wire(default.config), "nodes": nodes, **spoken()}

    async def set_provision_mode(
        self,
        mode: str | None = None,
        config: Mapping[str, object] | None = None,
        nodes: Mapping[str, Mapping[str, object]] | None = None,
        bare: Sequence[str] = (),
    ) -> None:
        """Set the mode that nodes get when they join.

        Parameters
        ----------
        mode, config
            Mode of all nodes that were not given one by name or by hand; None leaves it as it is.
        nodes
            Node name -> a :class:`~agentcluster.model.Mode` as plain data, for nodes that join later.
        bare
            Nodes that join later, and have no workers then.
        """
        if mode is None and config:
            raise ConfigError(f"set_provision_mode: config={config!r} needs the mode that it is of", key="config")
        own = {name: modes.parse(from_wire(Mode, each, f"mode of node {name}")) for name, each in (nodes or {}).items()}
        self.registry.expect(None if mode is None else modes.parse(mode, config), own, bare)

    async def reprovision_nodes(
        self,
        mode: str,
        config: Mapping[str, object] | str | None = None,
        nodes: Sequence[str] | str | None = None,
        remove_existing: bool = True,
        **terms: object,
    ) -> Answer:
        """Replace the workers of nodes with those of a mode.

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
            Fields of :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            ``{"mode": …, "nodes": {name: NodeReport as plain data}, "seconds": float, "dry_run": bool}``.

        Raises
        ------
        ConfigError, PreflightError, NodeNotFound, RolloutBusy
            Before anything is touched.
        SwapError
            When a step failed; it describes the state of the workers.
        """
        policy = from_wire(RolloutPolicy, terms, "reprovision_nodes")
        if nodes is not None and not nodes:
            raise ConfigError("reprovision_nodes: nodes=[] selects no node; leave it out for all", key="nodes")
        return await self.controller.reprovision(
            modes.parse(mode, config), nodes, policy, remove_existing=remove_existing
        )

    async def scale_nodes(
        self,
        n: int | None = None,
        nodes: Sequence[str] | str | None = None,
        target: Mapping[str, object] | None = None,
        strict: bool = False,
        **terms: object,
    ) -> Answer:
        """Bring nodes to `n` workers, or another target, as far as their capacity allows; data is moved first.

        Parameters
        ----------
        n
            Number of workers.
        nodes
            As in :meth:`reprovision_nodes`.
        target
            A :class:`~agentcluster.requests.ScaleTarget` as plain data, in place of `n`.
        strict
            Whether a target beyond the nodes' capacity is an error.
        **terms
            Fields of :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            As :meth:`reprovision_nodes`, with ``"workers"``, their number afterwards, and ``"short"``, the part of the
            target that the nodes have no capacity for, or None.

        Raises
        ------
        ConfigError, PreflightError, NodeNotFound, RolloutBusy, SwapError
            As :meth:`reprovision_nodes`.
        """
        policy = from_wire(RolloutPolicy, terms, "scale_nodes")
        if (n is None) == (target is None):
            raise ConfigError(f"scale_nodes: n={n!r} and target={target!r}; give one of them", key="n")
        wanted = ScaleTarget(workers=n) if target is None else from_wire(ScaleTarget, target, "scale_nodes")
        if wanted == ScaleTarget(extra=wanted.extra):
            raise ConfigError(
                f"scale_nodes: target={target!r} is for nothing; give workers, cores, memory, nodes or kinds"
            )
        return await self.controller.scale(wanted, nodes, policy, strict=strict)

    async def adapt_nodes(
        self, asked: Mapping[str, object], nodes: Sequence[str] | None = None, **terms: object
    ) -> Answer:
        """Adapt the workers of nodes to the demand of present tasks.

        Parameters
        ----------
        asked
            An :class:`~agentcluster.requests.AdaptiveRequest` as plain data.
        nodes
            Names of nodes; None for all.
        **terms
            Fields of :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            See :meth:`agentcluster.scheduler.controller.Controller.adapt`.
        """
        request = from_wire(AdaptiveRequest, asked, "adapt_nodes")
        request = replace(request, modes=tuple(map(modes.parse, request.modes)))
        return await self.controller.adapt(request, nodes, from_wire(RolloutPolicy, terms, "adapt_nodes"))

    async def await_demand(self, timeout: float) -> bool:
        """Wait for a task that no worker can take now.

        Parameters
        ----------
        timeout
            Seconds to wait.

        Returns
        -------
        bool
            Whether there was one within `timeout`.
        """
        return await self.controller.demand.wait(timeout)

    async def retire_node(self, name: str, ends: bool = False, **terms: object) -> Answer:
        """Move a node's data to others and stop its workers; the node stays, in standby.

        Parameters
        ----------
        name
            Name of the node.
        ends
            Whether its agent ends.
        **terms
            Fields of :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            As :meth:`reprovision_nodes`.
        """
        return await self.controller.empty(name, from_wire(RolloutPolicy, terms, "retire_node"), ends)

    async def retire_node_workers(self, names: Sequence[str], **terms: object) -> Answer:
        """Move the data of workers to others and stop them.

        Parameters
        ----------
        names
            Names of workers; names that no node has are ignored.
        **terms
            Fields of :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            As :meth:`reprovision_nodes`.
        """
        return await self.controller.retire(map(str, names), from_wire(RolloutPolicy, terms, "retire_node_workers"))

    async def undo_rollout(self, **terms: object) -> Answer:
        """Bring the nodes of the last rollout back to the plans that they had before it.

        Parameters
        ----------
        **terms
            Fields of :class:`agentcluster.requests.RolloutPolicy`.

        Returns
        -------
        dict
            As :meth:`reprovision_nodes`.

        Raises
        ------
        ConfigError
            When there was no rollout.
        """
        return await self.controller.undo(from_wire(RolloutPolicy, terms, "undo_rollout"))

    async def rollout_status(self) -> Answer | None:
        """Return the progress of the rollout that runs now.

        Returns
        -------
        dict or None
            ``mode``, ``state``, ``pausing``, ``seconds``, ``wave``: its position in ``waves``, and ``nodes``: node
            name -> its step and facts about it. None when no rollout runs.
        """
        return self.controller.running.status() if self.controller.running else None

    async def control_rollout(self, action: str) -> None:
        """Pause, resume or cancel the rollout that runs now.

        Parameters
        ----------
        action
            ``pause``, ``resume`` or ``cancel``.

        Raises
        ------
        ConfigError
            When no rollout runs, or for another action.
        """
        self.controller.control(action)

    async def get_node_logs(self, nodes: Sequence[str] | None = None) -> dict[str, list[str]]:
        """Return the last lines of the agents' logs.

        Parameters
        ----------
        nodes
            As in :meth:`reprovision_nodes`.

        Returns
        -------
        dict
            Node name -> lines, without control characters.
        """
        chosen = [node for node in self.registry.select(nodes) if node.state != "lost"]
        agents: list[PooledRPCCall] = [self.scheduler.rpc(node.address) for node in chosen]
        lines = await asyncio.gather(*(agent.agent_logs() for agent in agents))
        return {node.name: [printable(line) for line in log] for node, log in zip(chosen, lines, strict=True)}


def _parsed(mode: Mode | None) -> Mode | None:
    """Check the options of a mode, where one is given."""
    return None if mode is None else modes.parse(mode)


async def dask_setup(scheduler: Scheduler) -> None:
    """Register the plugin; ``dask scheduler --preload agentcluster`` calls this.

    Parameters
    ----------
    scheduler
        The scheduler.
    """
    await scheduler.register_scheduler_plugin(AgentPlugin(), name=PLUGIN, idempotent=True)
