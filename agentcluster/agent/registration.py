"""One node's belonging to one scheduler: from its registration until it leaves, or the scheduler ends.

A :class:`Membership` registers the node, brings the plugin along if the scheduler has none, says how the host and its
workers are, and notices the scheduler's end. It owns the connection that stands for all this and the node's workers;
:meth:`Membership.leave` gives both up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from dask.utils import format_bytes
from distributed.comm.core import Comm, CommClosedError, connect
from distributed.core import clean_exception, rpc
from distributed.security import Security

from agentcluster import modes
from agentcluster.agent import hardware
from agentcluster.agent.nanny import RestartPolicy
from agentcluster.agent.supervisor import Supervisor
from agentcluster.config import Config
from agentcluster.errors import PreflightError, SchedulerUnfit
from agentcluster.model import Hardware, Mode, WorkerState, like_dask
from agentcluster.requests import NodeRegistration
from agentcluster.security import connection_args
from agentcluster.shipping import shipped
from agentcluster.wire import NO_PLUGIN, PLUGIN, RETIRED, check_protocol, spoken, to_wire

logger = logging.getLogger(__name__)

#: Seconds in which a scheduler, or a worker, that has nothing else to do answers.
PROMPT = 1.0

#: Seconds that workers have for ending by themselves after their scheduler.
ORPHAN_GRACE = 3.0

IS_IT_THERE = "is one running there, and does it speak this protocol (tcp://, tls://)?"


class Membership:
    """What ties a node to a scheduler.

    Parameters
    ----------
    scheduler
        Address of the scheduler.
    security
        Credentials of the agent and its workers.
    settings
        The agent's configuration.
    host_options
        Keyword arguments for every worker on this host, whatever its mode.
    lasting
        Whether the node stays when its last worker was retired.
    spelling
        Worker name -> the object that the scheduler is to know the worker by, where that is not the name itself.
    on_end
        Called with the reason, once, when the node is at its end: the scheduler is gone and the workers had their time
        to end after it, or the last worker was retired.

    Attributes
    ----------
    name
        The name that the scheduler gave the node; "" before :meth:`join`.
    supervisor
        The node's workers.
    """

    def __init__(
        self,
        scheduler: str,
        *,
        security: Security,
        settings: Config,
        host_options: Mapping[str, Any],
        lasting: bool,
        spelling: Mapping[str, Any],
        on_end: Callable[[str], None],
    ) -> None:
        self.scheduler = scheduler
        self.name = ""
        self.supervisor = Supervisor(
            scheduler,
            security=security,
            host_options=host_options,
            policy=RestartPolicy(
                settings.worker_restart_limit,
                settings.worker_restart_window,
                settings.worker_restart_backoff,
                settings.worker_restart_backoff_max,
            ),
            on_change=self._report,
            in_touch=self._in_touch,
            spelling=spelling,
        )
        self._connection = connection_args(security, scheduler)
        self._settings = settings
        self._lasting = lasting
        self._on_end = on_end
        self._stream: Comm | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, node: NodeRegistration, timeout: float | None = None) -> None:
        """Register the node, and take part from then on.

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
        comm = await self._reach(timeout)
        try:
            problem = await _bring_plugin(comm)
            # Even so: where plugins cannot be sent, it may be there by --preload.
            await comm.write({"op": "register_node", "registration": to_wire(node), "stream": True, **spoken()})
            answer = await comm.read()
            if answer is None:  # dask's way to say that it does not know the call
                raise SchedulerUnfit(self.scheduler, f"{NO_PLUGIN}; it said: {problem}" if problem else NO_PLUGIN)
            _raise_remote(answer)
            scheduler = f"the scheduler at {self.scheduler}"
            check_protocol(scheduler, answer.get("protocol"), answer.get("version"), here=f"the agent of {node.name}")
        except BaseException:
            comm.abort()
            raise
        self.name = answer["name"]
        self._stream = comm
        self._spawn(self._beat(comm, node.hardware), "agent heartbeat")
        self._spawn(self._follow(comm), "agent follows scheduler")
        logger.info("Node %s registered to: %s", self.name, self.scheduler)

    async def provisioned(self, timeout: float) -> str:
        """Wait until the node has the workers that it is meant to have, or raise why it has none; return their mode."""
        async with self._scheduler() as scheduler:
            return str((await scheduler.await_nodes(names=[self.name], timeout=timeout))[self.name]["mode"])

    async def retire(self) -> None:
        """Have the workers' data moved to other nodes and the workers stopped; log why not, where that cannot be.

        The scheduler gets ``agentcluster.stop-timeout`` for moving the data, and as long again for all the rest; only
        :data:`PROMPT` where the workers have neither data nor tasks.
        """
        if not self._in_touch() or not self.supervisor.states():
            return
        seconds = self._settings.stop_timeout
        try:
            async with asyncio.timeout(2 * seconds), self._scheduler() as scheduler:
                terms = {"ends": True, "drain": "data", "timeout": seconds, "wait": seconds}
                order = asyncio.ensure_future(scheduler.retire_node(name=self.name, **terms))
                done, _ = await asyncio.wait([order], timeout=PROMPT)
                if not done and await self._idle():
                    order.cancel()
                    logger.info("Node %s: its workers have nothing, and the scheduler does not answer", self.name)
                    return
                report = await order
        except (OSError, TimeoutError):
            logger.info("Node %s closes with its data: the scheduler at %s did not answer", self.name, self.scheduler)
        except Exception as error:  # whatever the scheduler answers, it does not keep this process from ending
            why = error.refusals.get(self.name) if isinstance(error, PreflightError) else None
            logger.info("Node %s closes with its data: %s", self.name, why or error)
        else:
            for name, moved in report["nodes"].items():
                size = format_bytes(moved["nbytes"])
                logger.info("Node %s: %d keys (%s) moved to others", name, moved["keys"], size)

    async def _idle(self) -> bool:
        """Whether no worker has data or runs a task; one that does not say so may, one that still starts cannot."""

        async def has_nothing(address: str) -> bool:
            try:
                async with asyncio.timeout(PROMPT), rpc(address, connection_args=self._connection) as worker:
                    return not await worker.keys() and not await worker.call_stack()
            except (OSError, TimeoutError, ValueError):
                return False

        there = [state for state in self.supervisor.states() if state.address or state.state != "starting"]
        return all(await asyncio.gather(*(has_nothing(state.address or "") for state in there)))

    async def leave(self) -> None:
        """Take the node from the scheduler and stop its workers."""
        stream, self._stream = self._stream, None
        if stream is not None and not stream.closed():
            # First, so that no more orders come; and before the reading task is cancelled, which aborts the stream.
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write("leaving")
            await stream.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.supervisor.close(self._settings.stop_timeout)

    # -- joining -------------------------------------------------------------------------------------------------------

    async def _reach(self, timeout: float | None) -> Comm:
        try:
            comm: Comm = await connect(self.scheduler, timeout=timeout, **self._connection)
        except OSError as error:
            raise OSError(f"scheduler at {self.scheduler} cannot be reached: {error}; {IS_IT_THERE}") from error
        return comm

    def _scheduler(self) -> Any:
        return rpc(self.scheduler, connection_args=self._connection)

    # -- taking part ---------------------------------------------------------------------------------------------------

    def _in_touch(self) -> bool:
        return self._stream is not None and not self._stream.closed()

    def _report(self, state: WorkerState) -> None:
        if self._stream is not None:
            self._spawn(self._say({"workers": [to_wire(state)]}), f"agent reports {state.name}")

    async def _beat(self, comm: Comm, host: Hardware) -> None:
        while True:
            load = await asyncio.to_thread(hardware.metrics, host)
            await self._say({"workers": to_wire(self.supervisor.states()), "metrics": to_wire(load)})
            await asyncio.sleep(self._settings.node_heartbeat_interval)

    async def _say(self, message: Mapping[str, Any]) -> None:
        stream = self._stream
        if stream is not None and not stream.closed():
            with contextlib.suppress(CommClosedError, OSError):
                await stream.write(message)

    async def _follow(self, comm: Comm) -> None:
        """Wait for the end of the scheduler, and of the workers after it; or to hear that all were retired."""
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

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _bring_plugin(comm: Comm) -> str | None:
    """Have the scheduler take the plugin, unless it has one; return what it said against it.

    It is sent without asking: a call that a scheduler does not know makes it log a traceback.
    """
    await comm.write({"op": "register_scheduler_plugin", "plugin": shipped(), "name": PLUGIN, "idempotent": True})
    answer = await comm.read()
    if not isinstance(answer, Mapping):
        return None
    _, error, _ = clean_exception(**answer)
    return str(error)  # without "…Error": dask-jobqueue takes a line with that word for a failed start


def _raise_remote(answer: Any) -> None:
    """Raise the error that a handler on the other side answered with."""
    if isinstance(answer, Mapping) and answer.get("status") == "uncaught-error":
        _, error, _ = clean_exception(**answer)
        raise error or SchedulerUnfit("", str(answer.get("exception_text")))


class Alone(Membership):
    """A membership that the scheduler knows nothing of.

    Parameters
    ----------
    mode
        What runs.
    **terms
        As for :class:`Membership`; the end, there the scheduler's, is here that of the last worker.
    """

    def __init__(self, *terms: Any, mode: Mode, **more: Any) -> None:
        super().__init__(*terms, **more)
        self._mode = mode

    async def join(self, node: NodeRegistration, timeout: float | None = None) -> None:
        """Start the workers."""
        self.name = node.name
        specs = modes.plan(self._mode, node.hardware, node=self.name)
        named = dict(zip(like_dask(self.name, len(specs)), specs, strict=True))
        await self.supervisor.start(named, self._settings.start_timeout)

    async def provisioned(self, timeout: float) -> str:
        """Return at once: they were waited for."""
        return self._mode.name

    async def retire(self) -> None:
        """Have dask move the workers' data to others; it does not say what became of it."""
        # also of those of which only the scheduler knows yet that they are up
        names = [state.name for state in self.supervisor.states()]
        try:
            async with asyncio.timeout(self._settings.stop_timeout), self._scheduler() as scheduler:
                await scheduler.retire_workers(names=names, close_workers=False, remove=True)
        except Exception as error:  # whatever the scheduler answers, it does not keep this process from ending
            logger.info("Node %s closes with its data: %s", self.name, error or type(error).__name__)

    def _report(self, state: WorkerState) -> None:
        others = [each for each in self.supervisor.states() if each.name != state.name]
        if state.state in ("retired", "failed") and not others:
            logger.info("Node %s ends: its last worker %s", self.name, state.problem or "was retired")
            self._on_end("workers-gone")
