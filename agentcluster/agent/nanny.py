"""Supervised nannies: dask's nannies with a warm start method, and restarts with increasing delays after crashes.

:func:`supervised` puts :class:`SupervisedNanny` in front of a nanny's class, also of one that a user brought;
:func:`build_cuda_nanny` does it for the nannies of dask-cuda.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from queue import Empty
from typing import Any, Literal, Protocol

import dask
from distributed import Nanny, Status, Worker
from distributed.comm.core import CommClosedError
from distributed.nanny import WorkerProcess
from distributed.protocol.pickle import dumps

from agentcluster.agent import forkserver
from agentcluster.agent.options import WorkerOptions
from agentcluster.config import Config

logger = logging.getLogger("agentcluster.agent.supervisor")

METHOD_KEY = "distributed.worker.multiprocessing-method"

#: Module that a worker with a dashboard imports, with bokeh: three quarters of all the time that its start takes.
DASHBOARD = "distributed.dashboard.worker"

#: Reasons of workers that close because they lost the scheduler; each also asks its nanny not to start it again.
LOST_SCHEDULER = ("worker-handle-scheduler-connection-broken", "worker-heartbeat-error")

#: Seconds that a worker which is stopped while it starts gets to complete its start, so that it ends in order.
START_GRACE = 0.25

#: Measurements that a server makes of its process, 50 times a second; the agent, in the same process, makes them too.
MEASURED_BY_AGENT = ("tick", "ticks", "monitor")


class WorkerServer(Protocol):
    """Server that the supervisor runs for a worker: a nanny, a worker without one, or a class of the user's.

    This is the protocol of ``distributed.SpecCluster``. A nanny has more, such as ``process``.
    """

    name: str | int
    status: Status

    def __await__(self) -> Generator[object, None, object]: ...

    async def finished(self) -> None: ...

    async def close(self) -> object: ...


# -- when to restart ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RestartPolicy:
    """Rule by which a crashed worker is started again.

    Attributes
    ----------
    limit
        Crashes within `window` after which the worker is given up.
    window
        Seconds.
    backoff, backoff_max
        Seconds before the second restart within `window`, doubled for each further one, and their maximum. The first
        restart is immediate.
    """

    limit: int = 5
    window: float = 60.0
    backoff: float = 1.0
    backoff_max: float = 30.0

    def delay(self, crashes: list[float], now: float) -> float | None:
        """Return the delay before the next start.

        Parameters
        ----------
        crashes
            Times of the crashes so far, this one included, in the clock of `now`.
        now
            The present time, seconds.

        Returns
        -------
        float or None
            Seconds; None to give the worker up.
        """
        recent = sum(1 for at in crashes if now - at < self.window)
        if recent > self.limit:
            return None
        if recent <= 1:
            return 0.0
        # Far below where a float overflows, and far beyond any wait.
        return min(self.backoff * 2.0 ** min(recent - 2, 64), self.backoff_max)


@dataclass(frozen=True)
class Supervision:
    """Link of a nanny to its supervisor.

    Attributes
    ----------
    policy
        Rule for restarts.
    in_touch
        Returns whether the agent itself has its connection to the scheduler.
    changed
        Called with the worker's name when its state has changed.
    """

    policy: RestartPolicy
    in_touch: Callable[[], bool]
    changed: Callable[[str], None]


# -- the nanny ---------------------------------------------------------------------------------------------------------


class SupervisedNanny(Nanny):
    """Nanny whose process starts with its own environment, and is restarted by a policy.

    Attributes
    ----------
    supervision
        Set before the nanny is started.
    crashes
        Times of the worker's crashes, in the clock of :func:`time.monotonic`.
    problem
        Reason why the worker was given up; None while it runs and after an end on purpose.
    """

    supervision: Supervision
    crashes: list[float]
    problem: str | None = None
    #: The process is ended by this nanny, so that its end is no crash.
    _killed: bool = False
    #: The worker closes because it lost the scheduler, which the agent has not.
    _cut_off: bool = False

    def supervise(self, supervision: Supervision) -> None:
        """Link the nanny to its supervisor.

        Parameters
        ----------
        supervision
            The link.
        """
        self.supervision = supervision
        self.crashes = []
        # Nanny would put these into this process's environment, under other workers that are being started; they are in
        # the forkserver's, and in its env.
        self.pre_spawn_env = {}
        for measured in MEASURED_BY_AGENT:
            self.periodic_callbacks.pop(measured, None)

    def close_gracefully(self, reason: str = "nanny-close-gracefully") -> None:
        """Allow the worker to end; but start it again if it alone lost the scheduler, and the agent did not."""
        if reason in LOST_SCHEDULER and self.supervision.in_touch():
            self._cut_off = True
        else:
            super().close_gracefully(reason=reason)

    async def instantiate(self) -> Status:
        """Start the worker's process; called at the first start, after a crash and by ``Client.restart`` alike."""
        if self.status in (Status.closing, Status.closed):  # while it asked the scheduler for plugins
            raise RuntimeError(f"nanny {self.name} was closed before its worker's process was made")
        queues: list[forkserver.MessageQueue] = []
        try:
            with forkserver.starting(self.env) as queues:
                result: Status = await super().instantiate()
            if result is not Status.running and (error := _reported_error(queues)):
                # A nanny before 2026.8 does not read the message that its process sent when it ended right after.
                await self.close(reason="nanny-instantiate-failed")
                raise error
        except Exception as error:
            # By now the nanny has closed itself, which must not read as "retired on purpose".
            self.problem = f"could not be started: {describe_error(error)}"
            _release_frames(error)
            raise
        finally:
            queues.clear()
        self.supervision.changed(str(self.name))
        return result

    async def close(  # type: ignore[override]
        self, timeout: float = 5, reason: str = "nanny-close"
    ) -> Literal["OK"]:
        """Stop the worker, then the nanny."""
        if self.status is not Status.running or self.process is None or self.process.status is not Status.running:
            return await super().close(timeout=timeout, reason=reason)
        # Nanny stops listening before its worker has ended. A worker whose heartbeat has just found it out of the
        # scheduler calls its nanny first, and would wait for the answer until it is killed.
        self.close_gracefully(reason=reason)
        try:
            await self.kill(timeout=timeout, reason=reason)
        except BaseException:
            self.process = None  # as Nanny does: it would wait again for a process that does not end
            raise
        finally:
            await super().close(timeout=timeout, reason=reason)
        return "OK"

    async def kill(self, timeout: float = 5, reason: str = "nanny-kill") -> None:
        """End the worker's process, also one that is still starting."""
        process = self.process
        closing = self.status is not Status.running
        if closing and process is not None and process.status is Status.starting:
            await asyncio.wait({asyncio.ensure_future(process.running.wait())}, timeout=START_GRACE)
        if closing and process is not None and process.status is Status.starting:
            await _end_start(process)
        # Client.restart ends the process this way while the nanny's status stays "running": no crash.
        self._killed = process is not None and process.status is not Status.stopped
        await super().kill(timeout=timeout, reason=reason)

    async def _on_worker_exit(self, exitcode: int) -> None:
        killed, self._killed = self._killed, False
        cut_off, self._cut_off = self._cut_off, False
        if killed or self.status is not Status.running:
            await super()._on_worker_exit(exitcode)
        elif cut_off and not self.supervision.in_touch():
            await self.close(reason="scheduler-gone")
        else:
            await self._restart_after_crash(exitcode, cut_off)

    async def _restart_after_crash(self, exitcode: int, cut_off: bool) -> None:
        policy = self.supervision.policy
        how = "cut off from the scheduler" if cut_off else f"with exit code {exitcode}"
        now = time.monotonic()
        self.crashes.append(now)
        delay = policy.delay(self.crashes, now)
        self.supervision.changed(str(self.name))
        # The scheduler must know at once, so that the tasks go elsewhere while this worker waits.
        await self._unregister()  # type: ignore[no-untyped-call]
        if delay is None:
            self.problem = f"crashed {policy.limit + 1} times within {policy.window:g} s, last {how}; not restarted"
            logger.error("Worker %s %s", self.name, self.problem)
            await self.close(reason="crash-loop")
            return
        if cut_off:  # the agent may be so too, and notice it a little later
            delay = max(delay, policy.backoff)
        logger.warning("Worker %s ended %s; restart in %.1f s", self.name, how, delay)
        await asyncio.sleep(delay)
        if cut_off and not self.supervision.in_touch():
            await self.close(reason="scheduler-gone")
        # Meanwhile it may have been closed, or started again by Client.restart: then it is left alone.
        if self.status is Status.running and self.process is not None and self.process.status is Status.stopped:
            with contextlib.suppress(Exception):  # logged by Nanny.instantiate, and kept as the problem
                await self.instantiate()


@functools.cache
def supervised(cls: type[Nanny]) -> type[SupervisedNanny]:
    """Return a class of nannies with :class:`SupervisedNanny` in front of it, under its own name.

    Parameters
    ----------
    cls
        The nanny's class.
    """
    return type(cls.__name__, (SupervisedNanny, cls), {"__module__": cls.__module__})


def build_cuda_nanny(scheduler: str, arguments: WorkerOptions, device: str) -> SupervisedNanny:
    """Build dask-cuda's nanny for one device.

    ``CUDAWorker`` builds, unstarted, a nanny for each device that it sees in the environment, so it is shown one: then
    there are no others to close, and core affinity and device memory are those of this device. (Shown several, it takes
    those of device ``2 * i`` for the `i`-th: it rotates the list, then counts `i` on in it.) It takes no class for its
    nannies but looks it up by name: while it builds them, the name stands for a supervised one.

    Parameters
    ----------
    scheduler
        Address of the scheduler.
    arguments
        Keyword arguments of ``CUDAWorker``.
    device
        The device, as ``CUDA_VISIBLE_DEVICES`` names it.

    Returns
    -------
    SupervisedNanny
        The nanny, not started.
    """
    from dask_cuda import cuda_worker

    original = cuda_worker.Nanny
    cuda_worker.Nanny = supervised(original)
    try:
        with forkserver.environment({"CUDA_VISIBLE_DEVICES": device}):
            [nanny] = cuda_worker.CUDAWorker(scheduler, **arguments).nannies
    finally:
        cuda_worker.Nanny = original
    assert isinstance(nanny, SupervisedNanny), "dask-cuda builds its nannies otherwise"
    return nanny


def _reported_error(queues: list[forkserver.MessageQueue]) -> Exception | None:
    """Return the error that a process sent its nanny before it ended, if it sent one."""
    for queue in queues:
        with contextlib.suppress(Empty, OSError, ValueError):
            message = queue.get_nowait()
            error = message.get("exception") if isinstance(message, Mapping) else None
            if isinstance(error, Exception):
                return error
    return None


def _release_frames(error: BaseException) -> None:
    """Release the objects in the frames behind an error: the pipes to a process that did not start.

    Nanny has logged the error, and every other nanny of this process keeps the last 10000 records with their
    tracebacks. The frames that came from the other process hang below those of this one.
    """
    chained: BaseException | None = error
    while chained is not None:
        link = chained.__traceback__
        traceback.clear_frames(link)
        while link is not None:
            link.tb_next, link = None, link.tb_next
        chained = chained.__cause__ or chained.__context__


async def _end_start(process: WorkerProcess) -> None:
    """End a nanny's process that is not ready yet; ``Nanny.kill`` would wait until it is.

    After a start that was cancelled or failed to make a process it would not even do that, but raise.
    """
    starts = not process.running.is_set()
    # Waited for from now on: a message of success that crosses the kill sets it, and the process's end clears it again.
    started = asyncio.ensure_future(process.running.wait())
    await asyncio.sleep(0)
    if process.status is not Status.starting:
        started.cancel()
        return
    # Of another type while it starts and after its end.
    handle: Any = process
    try:
        await handle.process.kill()  # queued behind the start, so it ends one that is just being made too
    except Exception as error:  # any error of a process that was never made
        logger.debug("There was no worker process to end: %s", describe_error(error))
        started.cancel()
        handle.process.close()
        handle.child_stop_q.close()
        handle.process = handle.child_stop_q = handle.init_result_q = None
        handle.status = Status.stopped
        return
    if starts:
        await started
        if handle.process is None:
            # Before 2026.8 a message of success that crossed the kill makes it "running".
            handle.status = Status.stopped
    elif handle.status is Status.starting:
        handle.status = Status.failed


# -- names and errors --------------------------------------------------------------------------------------------------


async def rename(server: WorkerServer, name: str | int) -> None:
    """Rename a nanny, or a worker without one, and the worker that the nanny runs, now and after a restart.

    Parameters
    ----------
    server
        The nanny or worker.
    name
        The new name.
    """
    server.name = name
    if not isinstance(server, Nanny) or (process := server.process) is None:
        return
    process.worker_kwargs["name"] = name
    if process.status is Status.running:
        with contextlib.suppress(OSError, CommClosedError):  # it ended just then
            async with server.rpc(server.worker_address) as worker:
                await worker.run(function=dumps(_set_name), args=dumps((name,)))


def _set_name(name: str | int, dask_worker: Worker) -> None:
    """Run in a worker's process."""
    dask_worker.name = name


def own_error(error: BaseException) -> BaseException:
    """Return the error behind those of dask's servers, "Nanny failed to start." and the like.

    Parameters
    ----------
    error
        The error.
    """
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, with the root of its causes.

    Parameters
    ----------
    error
        The error.
    """
    root = error = own_error(error)
    while root.__cause__ is not None:
        root = root.__cause__
    return _one_line(error) if root is error else f"{_one_line(error)} ({_one_line(root)})"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# -- the start method --------------------------------------------------------------------------------------------------


def user_start_method() -> dict[str, str]:
    """Return dask's configuration with the user's start method: the workers' own processes do not know ours."""
    return {METHOD_KEY: StartMethod.configured}


class StartMethod:
    """Keeps agentcluster's start method in dask's configuration while at least one agent lives in this process.

    Attributes
    ----------
    configured
        The user's own method, which the workers keep in their configuration.
    """

    configured = "spawn"
    _users = 0
    _set: dask.config.set | None = None

    @classmethod
    def acquire(cls, dashboard: bool = False) -> None:
        """Install the start method and warm the forkserver, unless another agent has done it.

        Parameters
        ----------
        dashboard
            Whether the workers have a dashboard: then bokeh is imported once for all of them.
        """
        cls._users += 1
        if cls._users == 1 and (method := forkserver.install()):
            cls.configured = dask.config.get(METHOD_KEY)
            cls._set = dask.config.set({METHOD_KEY: method})
            configured = dask.config.get("distributed.nanny.pre-spawn-environ")
            preload = Config.load().forkserver_preload + ((DASHBOARD,) if dashboard else ())
            forkserver.warm(forkserver.pre_spawn_environ(configured), preload)

    @classmethod
    def release(cls) -> None:
        """Undo one :meth:`acquire`; the last one restores dask's configuration. The forkserver stays warm."""
        cls._users -= 1
        if cls._users == 0 and cls._set is not None:
            cls._set.__exit__(None, None, None)
            cls._set = None
