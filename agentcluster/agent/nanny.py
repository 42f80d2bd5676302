"""What the supervisor adds to dask's nannies: a start method, environments at process start, restarts with back-off.

:class:`Supervised` goes in front of a nanny's class, also of one that the user or dask-cuda brought.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty
from typing import Any

import dask
from distributed import Status
from distributed.comm.core import CommClosedError
from distributed.protocol.pickle import dumps

from agentcluster.agent import forkserver
from agentcluster.config import Config

logger = logging.getLogger("agentcluster.agent.supervisor")

METHOD_KEY = "distributed.worker.multiprocessing-method"

#: Why workers close that nobody has asked to: each also tells its nanny not to start it again.
CUT_OFF = ("worker-handle-scheduler-connection-broken", "worker-heartbeat-error")

#: Seconds that a worker which is asked to end while it starts may take to be there, so that it ends in order.
ALMOST_THERE = 0.25


@dataclass(frozen=True)
class RestartPolicy:
    """When a crashed worker is started again.

    Attributes
    ----------
    limit
        Crashes within `window` after which the worker is given up.
    window
        Seconds.
    backoff, backoff_max
        Seconds before the second restart within `window`, doubled for each further one, and their most. The first
        restart is immediate.
    """

    limit: int = 5
    window: float = 60.0
    backoff: float = 1.0
    backoff_max: float = 30.0

    def delay(self, crashes: list[float], now: float) -> float | None:
        """Return the seconds to wait before the next start, or None to give up.

        Parameters
        ----------
        crashes
            Times of the crashes so far, this one included, in the clock of `now`.
        now
            The present time, seconds.
        """
        recent = sum(1 for at in crashes if now - at < self.window)
        if recent > self.limit:
            return None
        if recent <= 1:
            return 0.0
        # Far below where a float overflows, and far beyond any wait.
        return min(self.backoff * 2.0 ** min(recent - 2, 64), self.backoff_max)


class Supervised:
    """What the supervisor adds to a nanny: its own environment at process start, and restarts that back off."""

    policy: RestartPolicy
    crashes: list[float]
    problem: str | None
    changed: Callable[[], None]
    in_touch: Callable[[], bool]
    killed: bool = False
    cut_off: bool = False

    def close_gracefully(self, reason: str = "nanny-close-gracefully") -> None:
        if reason in CUT_OFF and self.in_touch():
            self.cut_off = True
        else:
            super().close_gracefully(reason=reason)  # type: ignore[misc]

    async def instantiate(self) -> Any:
        # Called at the first start, after a crash and by Client.restart alike.
        queues: list[Any] = []
        try:
            with forkserver.starting(self.env) as queues:  # type: ignore[attr-defined]
                result = await super().instantiate()  # type: ignore[misc]
            if result is not Status.running and (error := _last_words(queues)):
                # A nanny before 2026.8 does not read what its process said when it ended right after.
                await self.close(reason="nanny-instantiate-failed")
                raise error
        except Exception as error:
            # By now the nanny has closed itself, which must not read as "retired on purpose".
            self.problem = f"could not be started: {words(error)}"
            _forget_frames(error)
            raise
        finally:
            queues.clear()
        self.changed()
        return result

    async def close(self, timeout: float = 5, reason: str = "nanny-close") -> Any:
        nanny: Any = self
        if nanny.status is not Status.running or nanny.process is None or nanny.process.status is not Status.running:
            return await super().close(timeout=timeout, reason=reason)  # type: ignore[misc]
        # Nanny stops listening before its worker has ended. A worker whose heartbeat has just found it out of the
        # scheduler says so to its nanny first, and would wait to be heard until it is killed.
        nanny.close_gracefully(reason=reason)
        try:
            await self.kill(timeout=timeout, reason=reason)
        except BaseException:
            nanny.process = None  # as Nanny does: it would wait again for a process that does not end
            raise
        finally:
            await super().close(timeout=timeout, reason=reason)  # type: ignore[misc]
        return "OK"

    async def kill(self, timeout: float = 5, reason: str = "nanny-kill") -> None:
        process = self.process  # type: ignore[attr-defined]
        closing = self.status is not Status.running  # type: ignore[attr-defined]
        if closing and process is not None and process.status is Status.starting:
            await asyncio.wait({asyncio.ensure_future(process.running.wait())}, timeout=ALMOST_THERE)
        if closing and process is not None and process.status is Status.starting:
            await _abandon(process)
        # Client.restart ends the process this way while the nanny's status stays "running": no crash.
        self.killed = process is not None and process.status is not Status.stopped
        await super().kill(timeout=timeout, reason=reason)  # type: ignore[misc]

    async def _on_worker_exit(self, exitcode: int) -> None:
        killed, self.killed = self.killed, False
        cut_off, self.cut_off = self.cut_off, False
        if killed or self.status is not Status.running:  # type: ignore[attr-defined]
            await super()._on_worker_exit(exitcode)  # type: ignore[misc]
            return
        if cut_off and not self.in_touch():
            await self.close(reason="scheduler-gone")
            return
        how = "cut off from the scheduler" if cut_off else f"with exit code {exitcode}"
        now = time.monotonic()
        self.crashes.append(now)
        delay = self.policy.delay(self.crashes, now)
        self.changed()
        # The scheduler must know at once, so that the tasks go elsewhere while this worker waits.
        await self._unregister()  # type: ignore[attr-defined]
        if delay is None:
            self.problem = (
                f"crashed {self.policy.limit + 1} times within {self.policy.window:g} s, last {how}; not restarted"
            )
            logger.error("Worker %s %s", self.name, self.problem)  # type: ignore[attr-defined]
            await self.close(reason="crash-loop")
            return
        if cut_off:  # the agent may be so too, and hear of it a little later
            delay = max(delay, self.policy.backoff)
        logger.warning("Worker %s ended %s; restart in %.1f s", self.name, how, delay)  # type: ignore[attr-defined]
        await asyncio.sleep(delay)
        if cut_off and not self.in_touch():
            await self.close(reason="scheduler-gone")
        # Meanwhile it may have been closed, or started again by Client.restart: then it is left alone.
        if self.status is Status.running and self.process.status is Status.stopped:  # type: ignore[attr-defined]
            with contextlib.suppress(Exception):  # logged by Nanny.instantiate, and kept as the problem
                await self.instantiate()


def taken_over(nanny: Any) -> Any:
    """Have a nanny that somebody else made be a supervised one, also for those who call it from outside."""
    cls: Any = type(nanny)
    nanny.__class__ = supervised(cls)
    own = {op: call.__name__ for op, call in nanny.handlers.items() if getattr(call, "__self__", None) is nanny}
    nanny.handlers.update({op: getattr(nanny, name) for op, name in own.items()})
    return nanny


def _last_words(queues: list[Any]) -> Exception | None:
    """Return the error that a process sent its nanny before it ended, if it sent one."""
    for queue in queues:
        with contextlib.suppress(Empty, OSError, ValueError):
            message = queue.get_nowait()
            if isinstance(message, Mapping) and isinstance(message.get("exception"), Exception):
                error: Exception = message["exception"]
                return error
    return None


def _forget_frames(error: BaseException) -> None:
    """Drop what the frames behind an error hold: the pipes to a process that did not start.

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


async def _abandon(process: Any) -> None:
    """Have a nanny's process that is not ready yet (a ``WorkerProcess``) end; ``Nanny.kill`` would wait until it is.

    After a start that was cancelled or failed to make a process it would not even do that, but raise.
    """
    somebody_starts = not process.running.is_set()
    # Waited for from now on: a word of success that crosses the kill sets it, and the process's end clears it again.
    started = asyncio.ensure_future(process.running.wait())
    await asyncio.sleep(0)
    if process.status is not Status.starting:
        started.cancel()
        return
    try:
        await process.process.kill()  # queued behind the start, so it ends one that is just being made too
    except Exception as error:  # whatever there is to say of a process that was never made
        logger.debug("There was no worker process to end: %s", words(error))
        started.cancel()
        process.process.close()
        process.child_stop_q.close()
        process.process = process.child_stop_q = process.init_result_q = None
        process.status = Status.stopped
        return
    if somebody_starts:
        await started
        if process.process is None:
            # Before 2026.8 a word of success that crossed the kill makes it "running".
            process.status = Status.stopped
    elif process.status is Status.starting:
        process.status = Status.failed


@functools.cache
def supervised(cls: Any) -> Any:
    return type(cls.__name__, (Supervised, cls), {"__module__": cls.__module__})


def _take_name(name: str | int, dask_worker: Any) -> None:
    """Run in a worker's process."""
    dask_worker.name = name


async def tell_name(server: Any, name: str | int) -> None:
    """Have a nanny, or a worker without one, bear another name, and what the nanny runs now and later too."""
    server.name = name
    if (process := getattr(server, "process", None)) is None:
        return
    process.worker_kwargs["name"] = name
    if process.status is Status.running:
        with contextlib.suppress(OSError, CommClosedError):  # it ended just then
            async with server.rpc(server.worker_address) as worker:
                await worker.run(function=dumps(_take_name), args=dumps((name,)))


def words(error: BaseException) -> str:
    """Say an error in one line, with the root of its causes."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # "Nanny failed to start."
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return _line(error) if root is error else f"{_line(error)} ({_line(root)})"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def plain_method() -> dict[str, str]:
    """Keep our start method out of the workers' own configuration: their processes do not know it."""
    return {METHOD_KEY: StartMethod.configured}


class StartMethod:
    """Holds agentcluster's start method in dask's configuration while at least one agent lives in this process."""

    #: The user's own, which stays that of what runs in the workers.
    configured = "spawn"
    _users = 0
    _set: Any = None

    @classmethod
    def acquire(cls) -> None:
        """Install the start method and warm the forkserver, unless that was done."""
        cls._users += 1
        if cls._users == 1 and (method := forkserver.install()):
            cls.configured = dask.config.get(METHOD_KEY)
            cls._set = dask.config.set({METHOD_KEY: method})
            configured = dask.config.get("distributed.nanny.pre-spawn-environ")
            forkserver.warm(forkserver.pre_spawn_environ(configured), Config.load().forkserver_preload)

    @classmethod
    def release(cls) -> None:
        """Undo one :meth:`acquire`; the last one puts dask's configuration back. The forkserver stays warm."""
        cls._users -= 1
        if cls._users == 0 and cls._set is not None:
            cls._set.__exit__(None, None, None)
            cls._set = None
