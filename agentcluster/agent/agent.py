"""Server on a host: one node of the cluster, with the calls that the scheduler, a cluster and an operator make.

The agent is plain. It reports what the host is, starts the workers that it is told to start, restarts those that
crash, stops those that it is told to stop, and sends heartbeats. The scheduler decides what should run
(:mod:`agentcluster.scheduler`); :mod:`agentcluster.agent.registration` joins a node to a scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from distributed.comm.core import Comm, CommClosedError
from distributed.core import Server, Status, error_message
from distributed.security import Security

from agentcluster import modes
from agentcluster.agent import hardware
from agentcluster.agent.logs import LastLines
from agentcluster.agent.nanny import StartMethod
from agentcluster.agent.options import (
    LIKE_DASK_WORKER,
    listen_address,
    room,
    scheduler_address,
    take_mode,
    take_scheduler,
    with_resources,
)
from agentcluster.agent.registration import IS_IT_THERE, Alone, Membership
from agentcluster.agent.supervisor import Supervisor
from agentcluster.config import Config, warn_untested
from agentcluster.errors import AgentClusterError, ConfigError, SchedulerUnfit, VersionMismatch, WorkerStartError
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import NodeRegistration
from agentcluster.security import connection_args
from agentcluster.units import parse_seconds
from agentcluster.wire import check_protocol, from_wire, spoken, to_wire, unpickled

logger = logging.getLogger(__name__)

#: Seconds that a call waits for this agent's registration to be complete.
JOIN_GRACE = 2.0


class Agent(Server):
    """One host's agent.

    Follows the protocol of dask's Worker and Nanny (awaitable, :meth:`close`, :meth:`finished`), so that whatever
    starts one of these can start it.

    Parameters
    ----------
    scheduler : str, optional
        Address of the scheduler. Without one, here or in dask's configuration as ``scheduler-address``, the agent is in
        standby until it is adopted; a `lasting` one does not look there.
    name : str or int, optional
        The node's name; default is the host's own name, made unique by the scheduler. Given to an agent that is not
        `lasting` it is also the name of its first worker, as for ``dask worker``, and stays one of its workers'.
    mode : str or Mode, optional
        First mode of this node; default is what the scheduler has for its nodes.
    config : mapping or str, optional
        Options of `mode`.
    fallback : str or Mode, optional
        First mode of this node when neither `mode` is given nor anybody has set one for the scheduler's nodes.
    security : Security or dict, optional
        Credentials of the agent and its workers.
    host, interface, protocol : str, optional
        Where the agent and its workers listen, as for a Nanny.
    port : int, optional
        Port of the agent; default is any free one.
    listen_host : str, optional
        Where the agent itself listens, when that is not where its workers do.
    death_timeout : str or float, optional
        Seconds for reaching the scheduler; default is ``distributed.comm.timeouts.connect``.
    lasting : bool, optional
        Stay when the last worker was retired, by a client or a cluster manager, and wait for others; without it the
        agent ends then, as ``dask worker`` does. An agent that was adopted stays.
    **worker_options
        Keyword arguments for every worker on this host, whatever its mode (``local_directory``, ``resources``, …), and
        ``labels``, words about the host such as ``{"rack": "a"}`` by which its node can be chosen. An agent that is not
        `lasting` may stand where a worker stood: ``scheduler_ip``, ``scheduler_port`` and ``scheduler_file`` name its
        scheduler then, and ``nthreads`` and ``memory_limit`` are its first worker's.

    Attributes
    ----------
    node_name : str
        The name that the scheduler gave the node.
    hardware : Hardware
        What was detected here.
    """

    def __init__(
        self,
        scheduler: str | None = None,
        *,
        name: str | int | None = None,
        mode: str | Mode | None = None,
        config: Mapping[str, Any] | str | None = None,
        fallback: str | Mode | None = None,
        security: Security | Mapping[str, Any] | None = None,
        host: str | None = None,
        interface: str | None = None,
        protocol: str | None = None,
        port: int | None = None,
        listen_host: str | None = None,
        death_timeout: str | float | None = None,
        lasting: bool = False,
        **worker_options: Any,
    ) -> None:
        if not lasting:
            scheduler = take_scheduler(worker_options) if scheduler is None else scheduler
        warn_untested()
        self.settings = Config.load()
        self.security = security if isinstance(security, Security) else Security(**(security or {}))
        self.scheduler_address = None if scheduler is None else scheduler_address(scheduler)
        self.death_timeout = None
        if death_timeout is not None:
            self.death_timeout = parse_seconds("death_timeout", death_timeout, call="Agent")
        if not lasting and scheduler is not None and mode is None:
            mode = take_mode(worker_options)
            fallback = fallback or LIKE_DASK_WORKER
        self.own_mode = None if mode is None else modes.parse(mode, config)
        self.fallback = None if fallback is None else modes.parse(fallback)
        self.given_name = name if name is not None else self.settings.node_name
        self.node_name = str(self.given_name if self.given_name is not None else socket.gethostname())
        self.hardware = Hardware(self.node_name, 0, 0)
        self.lasting = lasting
        self._where: dict[str, Any] = {"host": host, "interface": interface, "protocol": protocol}
        self._own_place: dict[str, Any] = {"port": port or 0, "listen_host": listen_host}
        self._worker_options = worker_options
        self._membership: Membership | None = None
        self._joined = asyncio.Event()
        self._adopted: asyncio.Event | None = None
        self._callers: list[Comm] = []
        self._held = False
        self._closing: asyncio.Task[str] | None = None
        self._lines = LastLines(self.settings.log_lines)
        super().__init__(
            handlers={
                **Orders(self._serving).handlers(),
                "agent_logs": self.agent_logs,
                "adopt": self.adopt,
                "terminate": self.terminate,
            },
            connection_args=connection_args(self.security, self.scheduler_address),
            # Otherwise a lock file stays open for as long as dask remembers the agent's handlers.
            needs_workdir=False,
        )

    def __repr__(self) -> str:
        return f"<Agent {self.node_name!r} at {self.address_safe}, scheduler {self.scheduler_address}>"

    @property
    def worker_address(self) -> str | None:
        """The agent's own address: what dask asks of anything that it starts as a worker."""
        return self.address_safe

    # -- life ----------------------------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._started().__await__()

    async def _started(self) -> Self:
        try:
            await self.start()
        except TimeoutError:
            if self.scheduler_address is None or self.death_timeout is None:
                raise
            raise TimeoutError(
                f"scheduler at {self.scheduler_address} did not take this agent within {self.death_timeout:g} s; "
                f"{IS_IT_THERE}"
            ) from None
        except RuntimeError as error:
            # A server hides the reason in "Agent failed to start".
            cause = error.__cause__ or error
            if isinstance(cause, MemoryError):  # what it says is read as the length of what it will say
                raise SchedulerUnfit(str(self.scheduler_address), "what answers there is no scheduler") from None
            raise cause from None
        return self

    async def start_unsafe(self) -> Agent:
        """Listen, detect the hardware, and join the scheduler if there is one to join."""
        self._lines.begin()
        StartMethod.acquire()
        self._held = True
        await super().start_unsafe()
        self.hardware = await asyncio.to_thread(hardware.detect)
        await self._listen()
        if self.scheduler_address is not None:
            await self._join(self.scheduler_address)
        return self

    async def _listen(self) -> None:
        where = "any address"
        try:
            where = listen_address(self.scheduler_address, self.security, **self._where, **self._own_place)
            connection_args(self.security, where)
            await self.listen(where, **self.security.get_listen_args("worker"))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else " ".join(map(str, error.args))
            raise ConfigError(
                f"cannot listen at {where}: {why}; check host, interface, protocol and port (--listen-address)"
            ) from error

    async def _join(self, scheduler: str) -> None:
        """Register this node with a scheduler, and take orders from it."""
        adopted, options = self._adopted, with_resources(self._worker_options)
        labels = options.pop("labels", None) or {}
        terms: dict[str, Any] = {
            "security": self.security,
            "settings": self.settings,
            "host_options": {k: v for k, v in {**self._where, **options}.items() if v is not None},
            "lasting": self.lasting or adopted is not None,
            "on_end": lambda why: self._after(why, adopted),
        }
        # Who gave the node its name, and did not stay to look after it, knows its workers by it.
        tracked = self.given_name is not None and not terms["lasting"]
        terms["spelling"] = {str(self.given_name): self.given_name} if tracked else {}
        own = adopted is None
        node = NodeRegistration(
            name=self.node_name,
            address=self.address,
            hardware=self.hardware,
            mode=self.own_mode if own else None,
            fallback=self.fallback if own else None,
            exact=self.given_name is not None,
            external_name=self.given_name if tracked else None,
            slots=room(options),
            resources=options.get("resources") or {},
            labels={str(key): str(value) for key, value in labels.items()},
        )
        membership = Membership(scheduler, **terms)
        try:
            await membership.join(node, self.death_timeout)
        except SchedulerUnfit as unfit:
            mode = self.own_mode or self.fallback
            if mode is None or adopted is not None:
                raise
            logger.warning("Node %s cannot be reprovisioned: %s", self.node_name, unfit)
            self._membership = membership = Alone(scheduler, **terms, mode=mode)
            await membership.join(node, self.death_timeout)
        self.node_name = membership.name
        self._membership = membership
        self._joined.set()

    def _after(self, why: str, adopted: asyncio.Event | None) -> None:
        """End too, or return to standby."""
        if adopted is not None:
            adopted.set()
        elif self._closing is None:
            self._closing = asyncio.create_task(self._close(why))

    async def provisioned(self) -> str | None:
        """Wait until this node has the workers that it is meant to have; return the name of their mode.

        Raises
        ------
        ModeRefused, WorkerStartError
            Why it has none.
        TimeoutError
            When that took longer than twice ``agentcluster.start-timeout``.
        """
        return await self._membership.provisioned(2 * self.settings.start_timeout) if self._membership else None

    async def retire(self, hurry: asyncio.Event) -> None:
        """Have the scheduler move the data of this node's workers to others, before the agent is closed.

        Returns without having moved all when nobody can take it, when the scheduler does not answer within twice
        ``agentcluster.stop-timeout``, and as soon as `hurry` is set; the log says which.
        """
        if self._membership is not None and not hurry.is_set():
            await _either(self._membership.retire(), hurry.wait())

    async def leave(self) -> None:
        """Stop the workers and take this node from the scheduler; the agent stays."""
        self._joined.clear()
        membership, self._membership = self._membership, None
        if membership is not None:
            await membership.leave()

    async def close(self, timeout: float | None = None, reason: str = "agent-close") -> str:  # type: ignore[override]
        """Stop the workers, leave the scheduler, and end; every caller waits for the same end."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(reason))
        return await asyncio.shield(self._closing)

    async def _close(self, reason: str) -> str:
        if self.status == Status.closed:
            return "OK"
        self.status = Status.closing
        if not reason.startswith("failure-to-start"):  # that error is the caller's to show
            logger.info("Closing agent of node %s. Reason: %s", self.node_name, reason)
        await self.leave()
        for comm in self._callers:
            with contextlib.suppress(CommClosedError, OSError):
                await comm.write("OK")
        self.status = Status.closed
        await super().close()
        if self._held:
            self._held = False
            StartMethod.release()
        self._lines.end()
        return "OK"

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def terminate(self, comm: Comm, reason: str = "terminate") -> Any:
        """Close; the answer comes when the workers have ended."""
        self._callers.append(comm)
        await self.close(reason=reason)
        return Status.dont_reply

    async def agent_logs(self) -> list[str]:
        """Return the last lines that this agent logged."""
        return self._lines.lines()

    async def adopt(
        self,
        comm: Comm,
        scheduler: str = "",
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        protocol: object = None,
        version: object = None,
        **newer: object,
    ) -> Any:
        """Join a cluster for as long as the caller keeps this connection open; one cluster at a time.

        The versions are the cluster's (:func:`agentcluster.wire.spoken`); another protocol is refused before anything
        else of the message is read. The answer is ``{"address", "pid", "hardware", "name"}`` with the agent's versions.
        Any message, the end of the connection or the end of the scheduler stops the workers and returns the agent to
        standby; the connection is closed after that.
        """
        try:
            check_protocol(
                f"the cluster at {comm.peer_address}", protocol, version, here=f"the agent at {self.address}"
            )
        except VersionMismatch as mismatch:
            return error_message(mismatch, status="uncaught-error")
        if self._adopted is not None or self.scheduler_address is not None:
            error = ConfigError(
                f"agent at {self.address} already belongs to the cluster at {self.scheduler_address}; "
                f"close that cluster first"
            )
            return error_message(error, status="uncaught-error")
        self._adopted = released = asyncio.Event()
        self.scheduler_address = scheduler
        before = self.given_name, self._worker_options
        self.given_name = name or self.given_name
        self._worker_options = {**self._worker_options, **unpickled(options or {})}
        self.node_name = str(self.given_name or self.hardware.hostname)
        try:
            await self._join(scheduler)
            await comm.write({"status": "OK", **self.introduction()})
            await _either(comm.read(), released.wait())
        except AgentClusterError as error:
            await comm.write(error_message(error, status="uncaught-error"))
        except (OSError, CommClosedError) as error:
            with contextlib.suppress(OSError, CommClosedError):
                await comm.write(error_message(SchedulerUnfit(scheduler, str(error)), status="uncaught-error"))
        finally:
            await self.leave()
            logger.info("Agent of node %s was released by %s", self.node_name, scheduler)
            self._adopted = self.scheduler_address = None
            self.given_name, self._worker_options = before
            await comm.close()
        return Status.dont_reply

    def introduction(self) -> dict[str, Any]:
        """Return what a launcher wants to know of an agent that is ready."""
        return {
            "address": self.address,
            "pid": os.getpid(),
            "name": self.node_name,
            "hardware": to_wire(self.hardware),
            **spoken(),
        }

    async def _serving(self) -> Supervisor:
        # The scheduler may call as soon as it has this node, before its answer has come back here. But a call of a
        # cluster that let go must not reach the workers of the next.
        scheduler = self.scheduler_address
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOIN_GRACE):
                await self._joined.wait()
        if self._membership is None or self.scheduler_address != scheduler:
            raise ConfigError(f"agent of node {self.node_name!r} is in standby: it belongs to no cluster")
        return self._membership.supervisor


async def _either(*awaitables: Coroutine[Any, Any, Any]) -> None:
    """Wait until the first of them is done or failed; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Orders:
    """Calls of an agent.

    Parameters
    ----------
    serving
        Returns the supervisor of the workers that the caller means, or raises why there is none.
    """

    serving: Callable[[], Awaitable[Supervisor]]

    def handlers(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Return the calls by name."""
        calls = (self.check_workers, self.start_workers, self.stop_workers, self.rename_workers)
        return {call.__name__: call for call in calls}

    async def check_workers(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Return, for each worker that could not be started here, why; touches nothing."""
        return (await self.serving()).check(_parsed(specs))

    async def start_workers(self, specs: Mapping[str, Mapping[str, Any]], timeout: float) -> Any:
        """Start workers; all of them, or none.

        Returns
        -------
        dict
            ``{"states": [WorkerState as plain data, …]}``, or ``{"failures": {worker name: why}}``: a scheduler does
            not deserialize errors that its peers raise.
        """
        try:
            return {"states": to_wire(await (await self.serving()).start(_parsed(specs), timeout))}
        except WorkerStartError as error:
            return {"failures": error.failures}

    async def stop_workers(self, names: Sequence[str], timeout: float) -> None:
        """Stop workers; returns when their processes have ended."""
        await (await self.serving()).stop(names, timeout)

    async def rename_workers(self, names: Mapping[str, str]) -> None:
        """Give workers other names, old name -> new name; unknown names are those that ended already."""
        await (await self.serving()).rename(names)


def _parsed(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, WorkerSpec]:
    return {name: from_wire(WorkerSpec, spec, f"worker {name}") for name, spec in specs.items()}
