"""The long-lived process on a host: one node of the cluster, and the owner of that host's workers.

The agent is plain. It says what the host is, starts what it is told, restarts what crashed, stops what it is told, and
reports. What should run is decided by :mod:`agentcluster.plugin` in the scheduler, which it brings along if the
scheduler has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Self

from dask.utils import parse_timedelta
from distributed.comm.addressing import (
    address_from_user_args,
    get_address_host,
    get_address_host_port,
    parse_address,
    unparse_host_port,
)
from distributed.comm.core import Comm, CommClosedError, connect
from distributed.core import Server, Status, clean_exception, coerce_to_address, error_message, rpc
from distributed.protocol import pickle
from distributed.security import Security
from distributed.utils import get_ip

from agentcluster import hardware, modes
from agentcluster.config import Config
from agentcluster.errors import AgentClusterError, ConfigError, SchedulerUnfit, WorkerStartError
from agentcluster.model import Hardware, Mode, WorkerSpec, WorkerState, from_wire, to_wire, unpickled
from agentcluster.plugin import NAME, AgentPlugin
from agentcluster.supervisor import RestartPolicy, StartMethod, Supervisor

logger = logging.getLogger(__name__)

#: Seconds that a call waits for this agent's registration to be complete.
JOIN_GRACE = 2.0

NO_PLUGIN = (
    "it has no agentcluster plugin and cannot import one: install agentcluster where the scheduler runs "
    "(pip install agentcluster, same version), or start it with: dask scheduler --preload agentcluster"
)

#: Seconds that workers have for ending by themselves after their scheduler.
ORPHAN_GRACE = 3.0

IS_IT_THERE = "is one running there, and does it speak this protocol (tcp://, tls://)?"


class Agent(Server):
    """One host's agent.

    Follows the protocol of dask's Worker and Nanny (awaitable, :meth:`close`, :meth:`finished`), so that whatever
    starts one of these can start it.

    Parameters
    ----------
    scheduler : str, optional
        Address of the scheduler. Without one the agent is in standby until it is adopted.
    name : str, optional
        The node's name; default is the host's own name, made unique by the scheduler.
    mode : str or Mode, optional
        First mode of this node; default is what the scheduler has for its nodes.
    config : mapping or str, optional
        Options of `mode`.
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
    **worker_options
        Keyword arguments for every worker on this host, whatever its mode (``local_directory``, ``resources``, …).

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
        name: str | None = None,
        mode: str | Mode | None = None,
        config: Mapping[str, Any] | str | None = None,
        security: Security | Mapping[str, Any] | None = None,
        host: str | None = None,
        interface: str | None = None,
        protocol: str | None = None,
        port: int | None = None,
        listen_host: str | None = None,
        death_timeout: str | float | None = None,
        **worker_options: Any,
    ) -> None:
        self.settings = Config.load()
        self.security = security if isinstance(security, Security) else Security(**(security or {}))
        self.scheduler_address = None if scheduler is None else _address(scheduler)
        self.death_timeout = None if death_timeout is None else seconds("death_timeout", death_timeout)
        self.own_mode = None if mode is None else modes.parse(mode, config)
        self.given_name = name if name is not None else self.settings.node_name
        self.node_name = str(self.given_name if self.given_name is not None else socket.gethostname())
        self.hardware = Hardware(self.node_name, 0, 0)
        self._where = {"host": host, "interface": interface, "protocol": protocol}
        self._wanted_port = port or 0
        self._listen_host = listen_host
        self._worker_options = worker_options
        self._supervisor: Supervisor | None = None
        self._stream: Comm | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._joined = asyncio.Event()
        self._closing: asyncio.Task[str] | None = None
        self._log: deque[str] = deque(maxlen=self.settings.log_lines)
        self._handler = _Keep(self._log)
        super().__init__(
            handlers={
                "check_workers": self.check_workers,
                "start_workers": self.start_workers,
                "stop_workers": self.stop_workers,
                "agent_logs": self.agent_logs,
                "adopt": self.adopt,
                "terminate": self.close,
            },
            connection_args=_credentials(self.security, self.scheduler_address),
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
            raise (error.__cause__ or error) from None
        return self

    async def start_unsafe(self) -> Agent:
        """Listen, detect the hardware, and join the scheduler if there is one to join."""
        logging.getLogger("agentcluster").addHandler(self._handler)
        StartMethod.acquire()
        self._held = True
        await super().start_unsafe()
        self.hardware = await asyncio.to_thread(hardware.detect)
        await self._listen()
        if self.scheduler_address is not None:
            await self.join(self.scheduler_address, self.security, self.own_mode)
        return self

    async def _listen(self) -> None:
        where = "any address"
        try:
            where = self._wanted_address()
            _credentials(self.security, where)
            await self.listen(where, **self.security.get_listen_args("worker"))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else " ".join(map(str, error.args))
            raise ConfigError(
                f"cannot listen at {where}: {why}; check host, interface, protocol and port (--listen-address)"
            ) from error

    def _wanted_address(self) -> str:
        host, interface, protocol = (self._where[key] for key in ("host", "interface", "protocol"))
        if self._listen_host:
            host, interface = self._listen_host, None
            protocol = None if "://" in host else protocol
        elif self.scheduler_address is not None:
            protocol = protocol or self.scheduler_address.split("://")[0]
            if not host and not interface:
                host = unparse_host_port(get_ip(get_address_host(self.scheduler_address)))
        return str(
            address_from_user_args(
                host=host, port=self._wanted_port, interface=interface, protocol=protocol, security=self.security
            )
        )

    async def join(self, scheduler: str, security: Security, mode: Mode | None) -> None:
        """Register this node with a scheduler, and take orders from it.

        Raises
        ------
        SchedulerUnfit
            When the scheduler has no plugin and cannot have one.
        OSError
            When it cannot be reached.
        """
        connection = _credentials(security, scheduler)
        comm = await self._reach(scheduler, connection)
        try:
            answer = await self._register(comm, mode)
            if answer is None:
                await self._bring_plugin(scheduler, connection)
                answer = await self._register(comm, mode)
            if answer is None:
                raise SchedulerUnfit(scheduler, NO_PLUGIN)
            _raise_remote(answer)
        except BaseException:
            comm.abort()
            raise
        self.node_name = answer["name"]
        self._stream = comm
        self._supervisor = Supervisor(
            scheduler,
            security=security,
            host_options={k: v for k, v in {**self._where, **self._worker_options}.items() if v is not None},
            policy=RestartPolicy(
                self.settings.worker_restart_limit,
                self.settings.worker_restart_window,
                self.settings.worker_restart_backoff,
                self.settings.worker_restart_backoff_max,
            ),
            on_change=self._report,
        )
        self._joined.set()
        self._tasks = [
            asyncio.create_task(self._beat(comm), name="agent heartbeat"),
            asyncio.create_task(self._follow(comm), name="agent follows scheduler"),
        ]
        logger.info("Node %s registered to: %s", self.node_name, scheduler)

    async def provisioned(self) -> None:
        """Wait until this node has the workers that it is meant to have.

        Raises
        ------
        ModeRefused, WorkerStartError
            Why it has none.
        TimeoutError
            When that took longer than twice ``agentcluster.start-timeout``.
        """
        timeout = 2 * self.settings.start_timeout
        async with rpc(
            self.scheduler_address, connection_args=self.security.get_connection_args("worker")
        ) as scheduler:
            await scheduler.await_nodes(names=[self.node_name], timeout=timeout)

    async def _reach(self, scheduler: str, connection: Mapping[str, Any]) -> Comm:
        try:
            comm: Comm = await connect(scheduler, timeout=self.death_timeout, **connection)
        except OSError as error:
            raise OSError(f"scheduler at {scheduler} cannot be reached: {error}; {IS_IT_THERE}") from error
        return comm

    async def _register(self, comm: Comm, mode: Mode | None) -> Any:
        await comm.write(
            {
                "op": "register_node",
                "name": self.node_name,
                "address": self.address,
                "hardware": to_wire(self.hardware),
                "mode": None if mode is None else to_wire(mode),
                "exact": self.given_name is not None,
                "stream": True,
            }
        )
        return await comm.read()  # None where the scheduler does not know the call

    async def _bring_plugin(self, scheduler: str, connection: Mapping[str, Any]) -> None:
        comm = await self._reach(scheduler, connection)
        try:
            await comm.write(
                {
                    "op": "register_scheduler_plugin",
                    "plugin": pickle.dumps(AgentPlugin()),
                    "name": NAME,
                    "idempotent": True,
                }
            )
            answer = await comm.read()
        finally:
            await comm.close()
        if isinstance(answer, Mapping) and answer.get("status") == "uncaught-error":
            raise SchedulerUnfit(scheduler, f"{NO_PLUGIN}; it said: {answer.get('exception_text', '')}")

    async def leave(self) -> None:
        """Stop the workers and take this node from the scheduler; the agent stays."""
        self._joined.clear()
        stream, self._stream = self._stream, None
        supervisor, self._supervisor = self._supervisor, None
        if stream is not None and not stream.closed():
            # First, so that no more orders come; and before the reading task is cancelled, which aborts the stream.
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write("leaving")
            await stream.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if supervisor is not None:
            await supervisor.close(self.settings.stop_timeout)

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
        self.status = Status.closed
        await super().close()
        if getattr(self, "_held", False):
            self._held = False
            StartMethod.release()
        logging.getLogger("agentcluster").removeHandler(self._handler)
        return "OK"

    # -- reporting -----------------------------------------------------------------------------------------------------

    def _report(self, state: WorkerState) -> None:
        if self._stream is not None:
            self._background(self._say({"workers": [to_wire(state)]}))

    async def _beat(self, comm: Comm) -> None:
        while True:
            states = self._supervisor.states() if self._supervisor else ()
            load = await asyncio.to_thread(hardware.metrics, self.hardware)
            await self._say({"workers": to_wire(states), "metrics": to_wire(load)})
            await asyncio.sleep(self.settings.node_heartbeat_interval)

    async def _say(self, message: Mapping[str, Any]) -> None:
        stream = self._stream
        if stream is not None and not stream.closed():
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write(message)

    async def _follow(self, comm: Comm) -> None:
        """Wait for the end of the scheduler, then end too, or return to standby."""
        adopted = self._adopted
        with contextlib.suppress(CommClosedError, OSError):
            await comm.read()
        logger.info("Node %s lost the scheduler at %s", self.node_name, self.scheduler_address)
        self._background(self._after_scheduler(adopted))

    async def _after_scheduler(self, adopted: asyncio.Event | None) -> None:
        # The workers lost it too and end by themselves; a worker that is asked as well waits for its nanny, in vain.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ORPHAN_GRACE):
                while self._supervisor is not None and self._supervisor.states():
                    await asyncio.sleep(0.05)
        if adopted is not None:
            adopted.set()
        else:
            await self.close(reason="scheduler-gone")

    def _background(self, coroutine: Any) -> None:
        self._ongoing_background_tasks.call_soon(lambda: coroutine)

    # -- calls ---------------------------------------------------------------------------------------------------------

    _adopted: asyncio.Event | None = None

    async def check_workers(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Return, for each worker that could not be started here, why; touches nothing."""
        parsed = {name: from_wire(WorkerSpec, spec, f"worker {name}") for name, spec in specs.items()}
        return (await self._serving()).check(parsed)

    async def start_workers(self, specs: Mapping[str, Mapping[str, Any]], timeout: float) -> Any:
        """Start workers; all of them, or none.

        Returns
        -------
        dict
            ``{"states": [WorkerState as plain data, …]}``, or ``{"failures": {worker name: why}}``: a scheduler does
            not deserialize errors that its peers raise.
        """
        parsed = {name: from_wire(WorkerSpec, spec, f"worker {name}") for name, spec in specs.items()}
        try:
            return {"states": to_wire(await (await self._serving()).start(parsed, timeout))}
        except WorkerStartError as error:
            return {"failures": error.failures}

    async def stop_workers(self, names: Sequence[str], timeout: float) -> None:
        """Stop workers; returns when their processes have ended."""
        await (await self._serving()).stop(names, timeout)

    async def agent_logs(self) -> list[str]:
        """Return the last lines that this agent logged."""
        return list(self._log)

    async def adopt(
        self,
        comm: Comm,
        scheduler: str,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        protocol: int = 1,
    ) -> Any:
        """Join a cluster for as long as the caller keeps this connection open; one cluster at a time.

        The answer is ``{"address", "pid", "hardware", "name"}``. Any message, the end of the connection or the end
        of the scheduler stops the workers and returns the agent to standby; the connection is closed after that.
        """
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
            await self.join(scheduler, self.security, None)
            await comm.write({"status": "OK", **self.introduction()})
            await _until_end(comm, released)
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
        }

    async def _serving(self) -> Supervisor:
        # The scheduler may call as soon as it has this node, before its answer has come back here. But a call of a
        # cluster that let go must not reach the workers of the next.
        scheduler = self.scheduler_address
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(JOIN_GRACE):
                await self._joined.wait()
        if self._supervisor is None or self.scheduler_address != scheduler:
            raise ConfigError(f"agent of node {self.node_name!r} is in standby: it belongs to no cluster")
        return self._supervisor


def _address(scheduler: str) -> str:
    """Return the address of a scheduler in full, or raise :class:`ConfigError`."""
    address = str(coerce_to_address(scheduler))
    try:
        if not address.startswith("inproc://"):
            get_address_host_port(address, strict=True)
    except ValueError as error:
        raise ConfigError(f"scheduler {scheduler!r} is no address: {error}; give one such as tcp://HOST:8786") from None
    return address


def seconds(key: str, value: str | float) -> float:
    """Return a time in seconds, or raise :class:`ConfigError` that names `key`."""
    try:
        number = float(parse_timedelta(value, "s"))
    except (ValueError, KeyError, TypeError):
        number = -1.0
    if number <= 0:
        raise ConfigError(f"{key} {value!r} must be a time above 0, such as 30 (seconds) or '1 minute'", key=key)
    return number


def _credentials(security: Security, address: str | None) -> dict[str, Any]:
    """Return the connection arguments of an agent, or raise :class:`ConfigError` where `address` needs others."""
    try:
        arguments: dict[str, Any] = security.get_connection_args("worker")
    except OSError as error:
        fields = ("tls_ca_file", "tls_worker_cert", "tls_worker_key")
        files = ", ".join(str(value) for field in fields if _is_path(value := getattr(security, field, None)))
        raise ConfigError(
            f"TLS credentials {files or 'in memory'} cannot be loaded: {error}", key="security"
        ) from error
    scheme = None if address is None else parse_address(address)[0]
    if scheme == "tcp" and security.require_encryption:
        raise ConfigError(f"{address} is not encrypted, and encryption is required here; use tls://", key="security")
    if scheme == "tls" and arguments.get("ssl_context") is None:
        raise ConfigError(
            f"{address} speaks TLS, which needs credentials: give --tls-ca-file, --tls-cert and --tls-key "
            f"(security=Security(tls_ca_file=…, tls_worker_cert=…, tls_worker_key=…))",
            key="security",
        )
    return arguments


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "\n" not in value


async def _until_end(comm: Comm, released: asyncio.Event) -> None:
    """Wait until the other side of `comm` is gone, or `released` is set."""
    read = asyncio.ensure_future(comm.read())
    freed = asyncio.ensure_future(released.wait())
    try:
        await asyncio.wait([read, freed], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (read, freed):
            task.cancel()
        await asyncio.gather(read, freed, return_exceptions=True)


def _raise_remote(answer: Any) -> None:
    """Raise the error that a handler on the other side answered with."""
    if isinstance(answer, Mapping) and answer.get("status") == "uncaught-error":
        _, error, _ = clean_exception(**answer)
        raise error or SchedulerUnfit("", str(answer.get("exception_text")))


class _Keep(logging.Handler):
    """Keeps the last formatted lines."""

    def __init__(self, lines: deque[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
