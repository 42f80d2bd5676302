"""Registration of a node with a scheduler: join, send heartbeats, leave; without the plugin too.

:class:`Registration` registers the node, sends the plugin along in case the scheduler has none, reports the load of the
host and the states of its workers, and notices the scheduler's end. :class:`StandaloneRegistration` starts the workers
at a scheduler that cannot have the plugin. Each owns the node's workers and the connection to the scheduler;
:meth:`Registration.leave` ends both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field

from dask.utils import format_bytes
from distributed.comm.core import Comm, CommClosedError, connect
from distributed.core import clean_exception, rpc
from distributed.security import Security

from agentcluster import modes
from agentcluster.agent import hardware
from agentcluster.agent.nanny import RestartPolicy
from agentcluster.agent.options import WorkerOptions
from agentcluster.agent.supervisor import Supervisor
from agentcluster.config import Config
from agentcluster.errors import AgentClusterError, PreflightError, SchedulerUnfit
from agentcluster.model import Hardware, Mode, WorkerState, like_dask
from agentcluster.requests import NodeRegistration
from agentcluster.security import connection_args
from agentcluster.shipping import shipped
from agentcluster.wire import NO_PLUGIN, PLUGIN, RETIRED, check_protocol, spoken, to_wire, with_cause

logger = logging.getLogger(__name__)

#: Seconds within which a scheduler or a worker without other work answers.
PROMPT = 1.0

#: Seconds after which a scheduler that has not answered is not waited for by workers with data; whoever ends a process
#: (Docker, a terminal, a test) often kills it after 10.
SILENCE = 6.0

#: Seconds that workers have to end by themselves after their scheduler.
ORPHAN_GRACE = 3.0

IS_IT_THERE = "is one running there, and does it speak this protocol (tcp://, tls://)?"


@dataclass(frozen=True)
class Terms:
    """Terms on which a node takes part in a cluster.

    Attributes
    ----------
    scheduler
        Address of the scheduler.
    security
        Credentials of the agent and its workers.
    settings
        The agent's configuration.
    worker_options
        Keyword arguments for every worker on this host, whatever its mode.
    lasting
        Whether the node stays when its last worker was retired.
    external_names
        Worker name -> the name object that the scheduler gets in its place, such as a number.
    """

    scheduler: str
    security: Security
    settings: Config
    worker_options: WorkerOptions = field(default_factory=dict)
    lasting: bool = False
    external_names: Mapping[str, str | int] = field(default_factory=dict)


class Registration:
    """Registration of a node with a scheduler that has the plugin.

    Parameters
    ----------
    terms
        Terms on which the node takes part.
    on_end
        Called with the reason, once, when the registration ends by itself: the scheduler is gone and the workers had
        time to end after it, or the last worker was retired.

    Attributes
    ----------
    name
        The name that the scheduler gave the node; "" before :meth:`join`.
    supervisor
        The node's workers.
    """

    def __init__(self, terms: Terms, on_end: Callable[[str], None]) -> None:
        self.name = ""
        self.scheduler = terms.scheduler
        settings = terms.settings
        self.supervisor = Supervisor(
            terms.scheduler,
            security=terms.security,
            host_options=terms.worker_options,
            policy=RestartPolicy(
                settings.worker_restart_limit,
                settings.worker_restart_window,
                settings.worker_restart_backoff,
                settings.worker_restart_backoff_max,
            ),
            on_change=self._worker_changed,
            in_touch=self._in_touch,
            external_names=terms.external_names,
        )
        self._settings = settings
        self._lasting = terms.lasting
        self._on_end = on_end
        self._connection = connection_args(terms.security, terms.scheduler)
        self._stream: Comm | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, node: NodeRegistration, timeout: float | None = None) -> None:
        """Register the node, then send heartbeats and follow the scheduler.

        Parameters
        ----------
        node
            The node.
        timeout
            Seconds for reaching the scheduler; None for dask's own.

        Raises
        ------
        SchedulerUnfit
            When the scheduler has no plugin and cannot have one.
        VersionMismatch
            When the scheduler has another version of the protocol.
        OSError
            When it cannot be reached.
        """
        comm = await self._connect(timeout)
        try:
            problem = await _send_plugin(comm)
            # Also after a problem: where plugins cannot be sent, it may be there by --preload.
            await comm.write({"op": "register_node", "registration": to_wire(node), "stream": True, **spoken()})
            answer = await comm.read()
            if answer is None:  # dask's answer to a call that it does not know
                raise SchedulerUnfit(self.scheduler, f"{NO_PLUGIN}; it said: {problem}" if problem else NO_PLUGIN)
            _raise_remote(answer)
            scheduler = f"the scheduler at {self.scheduler}"
            check_protocol(scheduler, answer.get("protocol"), answer.get("version"), here=f"the agent of {node.name}")
        except BaseException:
            comm.abort()
            raise
        self.name = answer["name"]
        self._stream = comm
        self._spawn(self._send_heartbeats(node.hardware), "agent heartbeat")
        self._spawn(self._follow_scheduler(comm), "agent follows scheduler")
        logger.info("Node %s registered to: %s", self.name, self.scheduler)

    async def provisioned(self, timeout: float) -> str:
        """Wait until the node has all workers of its plan.

        Parameters
        ----------
        timeout
            Seconds to wait.

        Returns
        -------
        str
            Name of the workers' mode.

        Raises
        ------
        ModeRefused, WorkerStartError
            The reason why the node has no workers.
        TimeoutError
            When the time is up.
        """
        async with self._call_scheduler() as scheduler:
            try:
                return str((await scheduler.await_nodes(names=[self.name], timeout=timeout))[self.name]["mode"])
            except AgentClusterError as error:
                raise with_cause(error) from error.__cause__

    async def retire(self) -> None:
        """Move the workers' data to other nodes and stop the workers; log the reason where that is not possible.

        The scheduler gets ``agentcluster.stop-timeout`` for moving the data, and as long again for all the rest; only
        :data:`SILENCE` when it does not answer, and :data:`PROMPT` where the workers have neither data nor tasks too.
        """
        if not self._in_touch() or not self.supervisor.states():
            return
        seconds = self._settings.stop_timeout
        try:
            async with asyncio.timeout(2 * seconds), self._call_scheduler() as scheduler:
                call = scheduler.retire_node(name=self.name, ends=True, drain="data", timeout=seconds, wait=seconds)
                retired = asyncio.ensure_future(call)
                try:
                    done, _ = await asyncio.wait([retired], timeout=PROMPT)
                    if not done and await self._idle():
                        logger.info("Node %s: its workers have nothing, and the scheduler does not answer", self.name)
                        return
                    if not done:
                        async with asyncio.timeout(SILENCE - PROMPT):
                            await scheduler.echo(data="")
                    report = await retired
                finally:
                    retired.cancel()
        except (OSError, TimeoutError):
            logger.info("Node %s closes with its data: the scheduler at %s did not answer", self.name, self.scheduler)
        except Exception as error:  # whatever the scheduler answers, it does not keep this process from ending
            why = error.refusals.get(self.name) if isinstance(error, PreflightError) else None
            logger.info("Node %s closes with its data: %s", self.name, why or error)
        else:
            for name, moved in report["nodes"].items():
                size = format_bytes(moved["nbytes"])
                logger.info("Node %s: %d keys (%s) moved to others", name, moved["keys"], size)

    async def leave(self) -> None:
        """Take the node from the scheduler and stop its workers."""
        stream, self._stream = self._stream, None
        if stream is not None and not stream.closed():
            # First, so that no more calls come; and before the reading task is cancelled, which aborts the stream.
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write("leaving")
            await stream.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.supervisor.close(self._settings.stop_timeout)

    # -- the scheduler -------------------------------------------------------------------------------------------------

    async def _connect(self, timeout: float | None) -> Comm:
        connecting: asyncio.Future[Comm] = asyncio.ensure_future(
            connect(self.scheduler, timeout=timeout, **self._connection)
        )
        try:
            return await asyncio.shield(connecting)
        except OSError as error:
            raise OSError(f"scheduler at {self.scheduler} cannot be reached: {error}; {IS_IT_THERE}") from error
        except asyncio.CancelledError:
            # dask's own leaves a connection open that is being made when it is cancelled.
            await asyncio.wait({connecting}, timeout=PROMPT)
            if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
                connecting.result().abort()
            connecting.cancel()
            raise

    def _call_scheduler(self) -> rpc:
        return rpc(self.scheduler, connection_args=self._connection)

    def _in_touch(self) -> bool:
        return self._stream is not None and not self._stream.closed()

    async def _send(self, message: Mapping[str, object]) -> None:
        stream = self._stream
        if stream is not None and not stream.closed():
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write(message)

    async def _send_heartbeats(self, host: Hardware) -> None:
        while True:
            load = await asyncio.to_thread(hardware.metrics, host)
            await self._send({"workers": to_wire(self.supervisor.states()), "metrics": to_wire(load)})
            await asyncio.sleep(self._settings.node_heartbeat_interval)

    async def _follow_scheduler(self, comm: Comm) -> None:
        """Wait for the end of the scheduler, and of the workers after it; or for the message that all were retired."""
        with contextlib.suppress(CommClosedError, OSError):
            while await comm.read() != RETIRED or self._lasting:
                pass
            logger.info("Node %s ends: its workers were retired", self.name)
            self._on_end("workers-retired")
            return
        logger.info("Node %s lost the scheduler at %s", self.name, self.scheduler)
        # The workers lost it too and end by themselves; a worker that is asked as well waits for its nanny, in vain.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ORPHAN_GRACE):
                while self.supervisor.states():
                    await asyncio.sleep(0.05)
        self._on_end("scheduler-gone")

    # -- the workers ---------------------------------------------------------------------------------------------------

    def _worker_changed(self, state: WorkerState) -> None:
        if self._stream is not None:
            self._spawn(self._send({"workers": [to_wire(state)]}), f"agent reports {state.name}")

    async def _idle(self) -> bool:
        """Return whether no worker has data or runs a task; one that does not answer may, one that starts cannot."""

        async def is_empty(address: str) -> bool:
            try:
                async with asyncio.timeout(PROMPT), rpc(address, connection_args=self._connection) as worker:
                    return not await worker.keys() and not await worker.call_stack()
            except (OSError, TimeoutError, ValueError):
                return False

        started = [state for state in self.supervisor.states() if state.address or state.state != "starting"]
        return all(await asyncio.gather(*(is_empty(state.address or "") for state in started)))

    def _spawn(self, coroutine: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class StandaloneRegistration(Registration):
    """Workers of one mode at a scheduler that cannot have the plugin and knows nothing of the node.

    Parameters
    ----------
    terms
        Terms on which the node takes part.
    on_end
        Called with the reason, once, when the last worker has ended; the scheduler's end is not noticed.
    mode
        Mode of the workers.
    """

    def __init__(self, terms: Terms, on_end: Callable[[str], None], *, mode: Mode) -> None:
        super().__init__(terms, on_end)
        self._mode = mode

    async def join(self, node: NodeRegistration, timeout: float | None = None) -> None:
        """Start the workers.

        Parameters
        ----------
        node
            The node.
        timeout
            Not used: ``agentcluster.start-timeout`` is for the workers.

        Raises
        ------
        ModeRefused
            When the node cannot serve the mode.
        WorkerStartError
            When a worker does not start.
        """
        self.name = node.name
        specs = modes.plan(self._mode, node.hardware, node=self.name)
        named = dict(zip(like_dask(self.name, len(specs)), specs, strict=True))
        await self.supervisor.start(named, self._settings.start_timeout)

    async def provisioned(self, timeout: float) -> str:
        """Return the name of the mode at once: :meth:`join` has waited for the workers."""
        return self._mode.name

    async def retire(self) -> None:
        """Move the workers' data to others by dask's own call, whose answer does not tell how much was moved."""
        # the scheduler may know already that a worker which still starts here is up
        names = [state.name for state in self.supervisor.states()]
        try:
            async with asyncio.timeout(self._settings.stop_timeout), self._call_scheduler() as scheduler:
                await scheduler.retire_workers(names=names, close_workers=False, remove=True)
        except Exception as error:  # whatever the scheduler answers, it does not keep this process from ending
            logger.info("Node %s closes with its data: %s", self.name, error or type(error).__name__)

    def _worker_changed(self, state: WorkerState) -> None:
        others = [each for each in self.supervisor.states() if each.name != state.name]
        if state.state in ("retired", "failed") and not others:
            logger.info("Node %s ends: its last worker %s", self.name, state.problem or "was retired")
            self._on_end("workers-gone")


async def _send_plugin(comm: Comm) -> str | None:
    """Send the plugin to a scheduler, which ignores it if it has one; return its error, if any.

    It is sent without asking: a call that a scheduler does not know makes it log a traceback.
    """
    await comm.write({"op": "register_scheduler_plugin", "plugin": shipped(), "name": PLUGIN, "idempotent": True})
    answer = await comm.read()
    if not isinstance(answer, Mapping):
        return None
    _, error, _ = clean_exception(**answer)
    return str(error)  # without "…Error": dask-jobqueue takes a line with that word for a failed start


def _raise_remote(answer: object) -> None:
    """Raise the error that a handler on the other side answered with."""
    if isinstance(answer, Mapping) and answer.get("status") == "uncaught-error":
        _, error, _ = clean_exception(**answer)
        raise error or SchedulerUnfit("", str(answer.get("exception_text")))
