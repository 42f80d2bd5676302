"""Server on a host: it owns the host's workers and answers the calls of the scheduler, of a cluster and of an operator.

The agent decides nothing. It detects the host's hardware, starts the workers that it is asked to start, restarts those
that crash, stops those that it is asked to stop, and sends heartbeats. The scheduler decides what runs
(:mod:`agentcluster.scheduler`); :mod:`agentcluster.agent.registration` joins a node to a scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from distributed.comm.core import Comm, CommClosedError
from distributed.core import Server, Status
from distributed.security import Security

from agentcluster import modes
from agentcluster.agent import hardware
from agentcluster.agent.logs import LastLines
from agentcluster.agent.nanny import StartMethod
from agentcluster.agent.options import (
    LIKE_DASK_WORKER,
    WorkerOptions,
    add_resources,
    keep_http_private,
    listen_address,
    scheduler_address,
    slots,
    take_mode,
    take_scheduler,
)
from agentcluster.agent.registration import IS_IT_THERE, Registration, StandaloneRegistration, Terms
from agentcluster.agent.supervisor import Supervisor
from agentcluster.config import Config, warn_untested
from agentcluster.errors import ConfigError, SchedulerUnfit, WorkerStartError, WorkerStartTimeout
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.modes.options import check_keywords
from agentcluster.requests import NodeRegistration, check_label, check_name
from agentcluster.security import connection_args, parse_security
from agentcluster.units import parse_seconds
from agentcluster.wire import Handshakes, from_wire, handler, limit_handshakes, to_wire

logger = logging.getLogger(__name__)

#: Seconds that a call waits for this agent's registration to be complete.
JOIN_GRACE = 2.0

#: Seconds for the handshakes of TLS and of dask, each.
HANDSHAKE = 10.0

#: Greatest number of connections that have not finished them, of one host and in all.
MOST_OF_ONE, MOST = 64, 256


@dataclass(frozen=True)
class _Membership:
    """Settings of the node in its cluster.

    Attributes
    ----------
    name
        The node's name, if it was given one.
    options
        Keyword arguments for every worker, and ``labels``.
    lasting
        Whether the node stays when its last worker was retired.
    mode, fallback
        First mode of the node, and the one where neither this nor the scheduler's was set.
    """

    name: str | int | None
    options: WorkerOptions
    lasting: bool
    mode: Mode | None = None
    fallback: Mode | None = None

    @property
    def external_name(self) -> str | int | None:
        """The name by which a cluster manager knows the node's workers; a cluster of agents knows the node itself."""
        return None if self.lasting else self.name

    def request(self, name: str, address: str, hardware: Hardware) -> NodeRegistration:
        """Return the request that registers the node."""
        options = add_resources(self.options)
        return NodeRegistration(
            name=name,
            address=address,
            hardware=hardware,
            mode=self.mode,
            fallback=self.fallback,
            exact=self.name is not None,
            external_name=self.external_name,
            slots=slots(options),
            resources=options.get("resources") or {},
            labels={str(key): str(value) for key, value in (options.get("labels") or {}).items()},
        )

    def terms(self, scheduler: str, security: Security, settings: Config, listen: WorkerOptions) -> Terms:
        """Return the terms on which the node takes part."""
        options = {**listen, **add_resources(self.options)}
        options.pop("labels", None)
        external = self.external_name
        return Terms(
            scheduler=scheduler,
            security=security,
            settings=settings,
            worker_options={key: value for key, value in options.items() if value is not None},
            lasting=self.lasting,
            external_names={} if external is None else {str(external): external},
        )


class Agent(Server):
    """One host's agent.

    Follows the protocol of dask's Worker and Nanny (awaitable, :meth:`close`, :meth:`finished`), so that whatever
    starts one of these can start it.

    Parameters
    ----------
    scheduler : str, optional
        Address of the scheduler; default is ``scheduler-address`` in dask's configuration, but for a `lasting` one.
    name : str or int, optional
        The node's name; default is the host's own name, made unique by the scheduler. Given to an agent that is not
        `lasting` it is also the name of its first worker, as for ``dask worker``, and stays one of its workers'.
    mode : str or Mode, optional
        First mode of this node; default is the mode that the scheduler has for its nodes.
    config : mapping or str, optional
        Options of `mode`.
    fallback : str or Mode, optional
        First mode of this node where neither `mode` is given nor a mode was set for the scheduler's nodes.
    security : Security or dict, optional
        Credentials of the agent and its workers.
    host, interface, protocol : str, optional
        Where the agent and its workers listen, as for a Nanny.
    port : int, optional
        Port of the agent; default is any free one.
    death_timeout : str or float, optional
        Seconds for reaching the scheduler; default is ``distributed.comm.timeouts.connect``.
    lasting : bool, optional
        Stay when the last worker was retired, by a client or a cluster manager, and wait for others; without it the
        agent ends then, as ``dask worker`` does.
    **worker_options
        Keyword arguments for every worker on this host, whatever its mode (``local_directory``, ``resources``, …), and
        ``labels``, words about the host such as ``{"rack": "a"}`` by which its node can be chosen. An agent that is not
        `lasting` can take the place of a worker: ``scheduler_ip``, ``scheduler_port`` and ``scheduler_file`` name its
        scheduler then, and ``nthreads`` and ``memory_limit`` are for its first worker.

    Attributes
    ----------
    node_name : str
        The name that the scheduler gave the node.
    scheduler_address : str
        The scheduler that the node belongs to.
    hardware : Hardware
        The hardware of the host.
    first_mode : str or None
        Name of the mode of the first workers, once they are there; None for a `lasting` agent.
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
        death_timeout: str | float | None = None,
        lasting: bool = False,
        **worker_options: Any,
    ) -> None:
        # Options, checked here once.
        if not isinstance(lasting, bool):
            raise ConfigError(f"Agent(lasting={lasting!r}): give True or False", key="lasting")
        if name is not None:
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise ConfigError(f"Agent(name={name!r}): give text or a number", key="name")
            check_name("node", str(name))
        if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536):
            raise ConfigError(f"Agent(port={port!r}): give a number from 0 to 65535", key="port")
        if config is not None and mode is None:
            raise ConfigError("Agent(config=…) needs the mode that it is of: give mode= with it", key="config")
        check_keywords("Agent", {"host": host, "interface": interface, "protocol": protocol, **worker_options})
        for label, value in (worker_options.get("labels") or {}).items():
            check_label(label, value)
        if not lasting and scheduler is None:
            scheduler = take_scheduler(worker_options)
        if not lasting and scheduler is not None and mode is None:
            mode = take_mode(worker_options)
            fallback = LIKE_DASK_WORKER if fallback is None else fallback
        warn_untested()
        self.settings = Config.load()
        self.security = parse_security(security)
        if scheduler is None:
            raise ConfigError("an agent needs the address of its scheduler, such as Agent('tcp://10.0.0.1:8786')")
        self.scheduler_address = scheduler_address(scheduler)
        self.death_timeout = None
        if death_timeout is not None:
            self.death_timeout = parse_seconds("death_timeout", death_timeout, call="Agent")
        self._membership = _Membership(
            name=name if name is not None else self.settings.node_name,
            options=keep_http_private(worker_options, self.security),
            lasting=lasting,
            mode=None if mode is None else modes.parse(mode, config),
            fallback=None if fallback is None else modes.parse(fallback),
        )
        self._wanted_port = port or 0
        self._listen_options: WorkerOptions = {"host": host, "interface": interface, "protocol": protocol}
        # The host.
        self.node_name = str(self._membership.name if self._membership.name is not None else socket.gethostname())
        self.hardware = Hardware(self.node_name, 0, 0)
        self.first_mode: str | None = None
        # The cluster that the node belongs to.
        self._registration: Registration | None = None
        self._joined = asyncio.Event()
        # The agent's start and end.
        self._begun = False
        self._closing: asyncio.Task[str] | None = None
        self._terminating: list[Comm] = []
        self._exit_stack = contextlib.ExitStack()
        self._lines = LastLines(self.settings.log_lines)
        calls: list[Callable[..., Awaitable[object]]] = [
            *(self.check_workers, self.start_workers, self.stop_workers, self.rename_workers),
            *(self.agent_logs, self.terminate),
        ]
        super().__init__(
            handlers={call.__name__: handler(call) for call in calls},
            connection_args=connection_args(self.security, self.scheduler_address),
            # Otherwise a lock file stays open for as long as dask remembers the agent's handlers.
            needs_workdir=False,
        )

    def __repr__(self) -> str:
        return f"<Agent {self.node_name!r} at {self.address_safe}, scheduler {self.scheduler_address}>"

    @property
    def worker_address(self) -> str | None:
        """The agent's own address: dask asks whatever it starts as a worker for it."""
        return self.address_safe

    # -- start and registration ----------------------------------------------------------------------------------------

    def __await__(self) -> Generator[object, None, Self]:
        return self._started().__await__()

    async def _started(self) -> Self:
        first, self._begun = not self._begun, True
        try:
            await self.start()
        except TimeoutError:
            if self.death_timeout is None:
                raise
            raise TimeoutError(
                f"scheduler at {self.scheduler_address} did not take this agent within {self.death_timeout:g} s; "
                f"{IS_IT_THERE}"
            ) from None
        except RuntimeError as error:
            # A server hides the reason in "Agent failed to start".
            cause = error.__cause__ or error
            if isinstance(cause, MemoryError):  # of a peer with another protocol: its first bytes are read as a length
                raise SchedulerUnfit(self.scheduler_address, "the server there is not a scheduler") from None
            raise cause from None
        # Connections of the scheduler, which starts the workers, await the agent too, before they are served.
        if first and not self._membership.lasting:
            await self._first_workers()
        return self

    async def _first_workers(self) -> None:
        """Wait for them, as whoever starts a worker by dask's protocol expects; close when none come."""

        async def provisioned() -> None:
            self.first_mode = await self.provisioned()

        try:
            await _wait_for_first(provisioned(), self.finished())
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return  # the scheduler has gone, and the agent ends after it
            ended = self.status is not Status.running
            await self.close(reason="failure-to-start-workers")
            if not ended:
                raise
            raise self._ended_early() from error
        if self.status is not Status.running:
            raise self._ended_early()

    def _ended_early(self) -> WorkerStartError:
        return WorkerStartError(self.node_name, {"its agent": "it was closed before they had started"})

    async def start_unsafe(self) -> Agent:
        """Listen, detect the hardware, and join the scheduler; called by dask.

        Raises
        ------
        ConfigError
            When the agent cannot listen at the address that it was given.
        AgentClusterError, OSError
            When the scheduler does not take the node.
        """
        self._begun = True
        self._exit_stack.callback(self._lines.end)
        self._lines.begin()
        self._exit_stack.callback(StartMethod.release)
        StartMethod.acquire(dashboard=bool(self._membership.options.get("dashboard")))
        await super().start_unsafe()
        self.hardware = await asyncio.to_thread(hardware.detect)
        if self._membership.mode is not None and not self._membership.lasting:
            # What is known to be wrong is said before a scheduler is looked for.
            modes.plan(self._membership.mode, self.hardware, node=self.node_name)
        await self._listen()
        await self._join()
        return self

    async def _listen(self) -> None:
        where = "any address"
        try:
            where = listen_address(
                self.scheduler_address,
                self.security,
                **self._listen_options,
                port=self._wanted_port,
            )
            connection_args(self.security, where)
            await self.listen(where, **self.security.get_listen_args("worker"))
            limit_handshakes(self.listeners, Handshakes(HANDSHAKE, of_one=MOST_OF_ONE, of_all=MOST))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else " ".join(map(str, error.args))
            raise ConfigError(f"cannot listen at {where}: {why}; check host, interface, protocol and port") from error

    async def _join(self) -> None:
        """Register the node; without the plugin at the scheduler, run the mode that the agent itself was given."""
        membership = self._membership
        node = membership.request(self.node_name, self.address, self.hardware)
        terms = membership.terms(self.scheduler_address, self.security, self.settings, self._listen_options)
        registration = Registration(terms, self._end)
        try:
            await registration.join(node, self.death_timeout)
        except SchedulerUnfit as unfit:
            mode = membership.mode or membership.fallback
            if mode is None:
                raise
            logger.warning("Node %s cannot be reprovisioned: %s", self.node_name, unfit)
            # Known before it has joined, so that its workers are stopped when the agent is closed meanwhile.
            self._registration = registration = StandaloneRegistration(terms, self._end, mode=mode)
            await registration.join(node, self.death_timeout)
        self.node_name = registration.name
        self._registration = registration
        self._joined.set()

    async def provisioned(self) -> str | None:
        """Wait until this node has all workers of its plan.

        Returns
        -------
        str or None
            Name of the workers' mode; None before the agent has joined.

        Raises
        ------
        ModeRefused, WorkerStartError
            The reason why the node has no workers.
        TimeoutError
            When that took longer than twice ``agentcluster.start-timeout``.
        """
        return await self._registration.provisioned(2 * self.settings.start_timeout) if self._registration else None

    # -- end -----------------------------------------------------------------------------------------------------------

    async def retire(self, hurry: asyncio.Event) -> None:
        """Move the data of this node's workers to other nodes, before the agent is closed.

        Returns without having moved all when no other node can take it, when the scheduler does not answer within twice
        ``agentcluster.stop-timeout``, and as soon as `hurry` is set; the log names the reason.

        Parameters
        ----------
        hurry
            Ends the call when it is set.
        """
        if self._registration is not None and not hurry.is_set():
            await _wait_for_first(self._registration.retire(), hurry.wait())

    async def kill(self, timeout: float = 5.0, reason: str = "agent-kill") -> None:
        """End the processes of all workers; the agent starts them again, as a Nanny does.

        Parameters
        ----------
        timeout
            Seconds for a worker to end by itself.
        reason
            Reason for the log.
        """
        if self._registration is not None:
            await self._registration.supervisor.kill(timeout, reason)

    async def close(self, timeout: float | None = None, reason: str = "agent-close") -> str:  # type: ignore[override]
        """Stop the workers, leave the scheduler, and end; all callers wait for the same end.

        Parameters
        ----------
        timeout
            Not used; part of the protocol of dask's servers.
        reason
            Reason for the log.

        Returns
        -------
        str
            ``"OK"``, when the workers have ended.
        """
        self._end(reason)
        assert self._closing is not None
        return await asyncio.shield(self._closing)

    def _end(self, reason: str) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(reason))

    async def _close(self, reason: str) -> str:
        if self.status == Status.closed:
            return "OK"
        self.status = Status.closing
        if not reason.startswith("failure-to-start"):  # the caller shows that error
            logger.info("Closing agent of node %s. Reason: %s", self.node_name, reason)
        self._joined.clear()
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.leave()
        for comm in self._terminating:
            with contextlib.suppress(CommClosedError, OSError):
                await comm.write("OK")
        self.status = Status.closed
        await super().close()
        self._exit_stack.close()
        return "OK"

    # -- calls of the scheduler ----------------------------------------------------------------------------------------

    async def check_workers(self, specs: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
        """Check whether workers could be started here; start nothing.

        Parameters
        ----------
        specs
            Worker name -> its :class:`~agentcluster.model.WorkerSpec` as plain data.

        Returns
        -------
        dict
            Worker name -> problem, for those that could not be started.
        """
        return (await self._supervisor()).check(_parse_specs(specs))

    async def start_workers(self, specs: Mapping[str, Mapping[str, object]], timeout: float) -> dict[str, object]:
        """Start workers; all of them, or none.

        Parameters
        ----------
        specs
            Worker name -> its :class:`~agentcluster.model.WorkerSpec` as plain data.
        timeout
            Seconds for all of them.

        Returns
        -------
        dict
            ``{"states": [WorkerState as plain data, …]}``, or ``{"failures": {worker name: its
            :data:`~agentcluster.errors.Failure`}, "late": …}``: a scheduler does not deserialize errors that its peers
            raise; ``late`` is whether the time was up.
        """
        try:
            return {"states": to_wire(await (await self._supervisor()).start(_parse_specs(specs), timeout))}
        except WorkerStartError as error:
            return {"failures": error.answer(), "late": isinstance(error, WorkerStartTimeout)}

    async def stop_workers(self, names: Sequence[str], timeout: float) -> None:
        """Stop workers; returns when their processes have ended.

        Parameters
        ----------
        names
            Names of the workers; unknown ones are taken for those that have ended already.
        timeout
            Seconds for a worker to end by itself.
        """
        await (await self._supervisor()).stop(names, timeout)

    async def rename_workers(self, names: Mapping[str, str]) -> None:
        """Rename workers.

        Parameters
        ----------
        names
            Old name -> new name; unknown workers are taken for those that have ended already.
        """
        await (await self._supervisor()).rename(names)

    async def agent_logs(self) -> list[str]:
        """Return the last lines that this agent logged, ``agentcluster.log.lines`` at most; the oldest first."""
        return self._lines.lines()

    async def _supervisor(self) -> Supervisor:
        """Return the supervisor of this node's workers, or raise :class:`ConfigError` where it has not joined."""
        # The scheduler may call as soon as it has this node, before its answer has come back here.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOIN_GRACE):
                await self._joined.wait()
        if self._registration is None:
            raise ConfigError(f"agent of node {self.node_name!r} belongs to no cluster")
        return self._registration.supervisor

    # -- calls of an operator ------------------------------------------------------------------------------------------

    async def terminate(self, comm: Comm, reason: str = "terminate") -> Status:
        """Close; the answer comes when the workers have ended.

        Parameters
        ----------
        comm
            Connection to the caller.
        reason
            Reason for the log.
        """
        self._terminating.append(comm)
        await self.close(reason=reason)
        return Status.dont_reply


async def _wait_for_first(*awaitables: Coroutine[object, object, object]) -> None:
    """Wait until the first of them is done, or raise its error; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _parse_specs(specs: Mapping[str, Mapping[str, object]]) -> dict[str, WorkerSpec]:
    return {name: from_wire(WorkerSpec, spec, f"worker {name}") for name, spec in specs.items()}
