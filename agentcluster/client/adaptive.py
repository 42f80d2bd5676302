"""Adaptive scaling: ask the scheduler, again and again, to give nodes the workers that tasks need.

The scheduler decides and changes the nodes in one step, a *look* (:mod:`agentcluster.scheduler.controller`). This
module decides when to look, when workers that were not needed may go, and how long to wait after a failure; it keeps
the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import dask
from distributed.deploy.adaptive import Adaptive

from agentcluster import modes
from agentcluster.client.calls import AdaptAnswer, SchedulerCalls
from agentcluster.client.hosts import Launches
from agentcluster.errors import ConfigError, RolloutBusy, one_line
from agentcluster.model import Hardware, Mode
from agentcluster.reports import Decision, Nodes
from agentcluster.requests import MOST, AdaptiveRequest
from agentcluster.units import parse_nbytes, parse_seconds
from agentcluster.wire import TOPIC, to_wire

logger = logging.getLogger(__name__)

#: Seconds between two looks for tasks without a worker.
TASK_PAUSE = 0.1

#: Seconds between two looks for requests.
REQUEST_PAUSE = 0.5

#: Longest wait in seconds: after repeated failures, and for news from the scheduler.
LONGEST_WAIT = 60.0


class Clock(Protocol):
    """Clock of adaptive scaling."""

    def monotonic(self) -> float:
        """Return the time in seconds, for durations."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """Clock of the machine."""

    def monotonic(self) -> float:
        """Return the time in seconds, for durations."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class AdaptiveView(Protocol):
    """View of the nodes, see :class:`agentcluster.client.display.NodeView`."""

    nodes: Nodes

    async def refresh(self) -> None: ...


class AdaptiveHosts(Protocol):
    """Standby hosts, see :class:`agentcluster.client.hosts.Hosts`."""

    def extra(self) -> tuple[str, ...]: ...

    def candidates(self) -> dict[str, Hardware | None]: ...

    def launch_soon(self, names: Sequence[str], then: Launches) -> None: ...

    async def end_idle_unless_launching(self) -> list[str]: ...


class AdaptiveCluster(Protocol):
    """Parts of an :class:`~agentcluster.AgentCluster` that adaptive scaling uses."""

    scheduler_comm: SchedulerCalls

    @property
    def view(self) -> AdaptiveView: ...

    @property
    def hosts(self) -> AdaptiveHosts: ...

    @property
    def workers(self) -> Mapping[str, object]: ...


@dataclass
class Patience:
    """Rules for when workers may come or go, and for how long to wait after failures; all times are passed in.

    Attributes
    ----------
    idle_timeout
        Seconds for which a worker must not have been needed before it goes.
    up_delay
        Seconds for which tasks must have had no worker before some come.
    """

    idle_timeout: float = 0.0
    up_delay: float = 0.0
    _idle: dict[str, tuple[int, float]] = field(default_factory=dict, init=False)
    _waiting_since: float | None = field(default=None, init=False)
    _failures: int = field(default=0, init=False)
    _not_before: float = field(default=-math.inf, init=False)

    def expired(self, idle: Iterable[str], wait_count: int, now: float) -> list[str]:
        """Count a look, and return the workers that were not needed for long enough.

        Parameters
        ----------
        idle
            Workers that are not needed now.
        wait_count
            Number of looks in a row in which a worker must not have been needed.
        now
            Time in seconds.

        Returns
        -------
        list of str
            Those that may go.
        """
        known = self._idle
        self._idle = {name: (known.get(name, (0, now))[0] + 1, known.get(name, (0, now))[1]) for name in idle}
        return [
            name
            for name, (number, since) in self._idle.items()
            if number >= wait_count and now - since >= self.idle_timeout
        ]

    def may_come(self, now: float) -> bool:
        """Return whether workers may come.

        Parameters
        ----------
        now
            Time in seconds.

        Returns
        -------
        bool
            True when tasks have had no worker for `up_delay`.
        """
        since = self._waiting_since
        return self.up_delay == 0 or (since is not None and now - since >= self.up_delay)

    def waits(self, waits: bool, now: float) -> None:
        """Record whether tasks wait for workers that may not come yet.

        Parameters
        ----------
        waits
            Whether they do.
        now
            Time in seconds.
        """
        if not waits:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now

    def ready(self, now: float) -> bool:
        """Return whether the wait after the last failure is over.

        Parameters
        ----------
        now
            Time in seconds.

        Returns
        -------
        bool
            True as well when there was no failure.
        """
        return now >= self._not_before

    def failed(self, interval: float, now: float) -> float:
        """Record a failure.

        Parameters
        ----------
        interval
            Seconds between two looks; the wait is twice that, doubled after each further failure.
        now
            Time in seconds.

        Returns
        -------
        float
            Seconds to wait.
        """
        self._failures += 1
        wait = min(LONGEST_WAIT, interval * 2.0 ** min(self._failures, 32))
        self._not_before = now + wait
        return wait

    def succeeded(self) -> None:
        """Record that a look succeeded."""
        self._failures, self._not_before = 0, -math.inf


@dataclass(frozen=True)
class HeldRequest:
    """Request for capacity.

    Attributes
    ----------
    resources
        Resource -> number of tasks that need one of it.
    granted
        Done when there is capacity; has an error when there can never be.
    """

    resources: Mapping[str, int]
    granted: asyncio.Future[None]


class AgentAdaptive(Adaptive):
    """Adaptive scaling of an :class:`~agentcluster.AgentCluster`: the workers that tasks need, of the kind they need.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.
    interval : str or float, optional
        Time between checks; default is ``distributed.adaptive.interval``.
    minimum, maximum : int, optional
        Limits of the number of workers.
    wait_count : int, optional
        Number of checks in a row in which a worker was not needed before it goes.
    target_duration : str or float, optional
        Time in which all tasks should be done; a shorter one brings more workers.
    modes : list of (str or Mode), optional
        Modes that nodes may have. A node changes its mode for tasks that need it, and returns to the first that it can
        have when they are done. Default: nodes keep their mode.
    minimum_cores, maximum_cores : int, optional
        Limits of the threads of all workers together.
    minimum_memory, maximum_memory : str or int, optional
        Limits of the memory of all workers together, in bytes or as in "100 GiB".
    idle_timeout : str or float, optional
        Time for which a worker must not have been needed before it goes, in addition to `wait_count`.
    up_delay : str or float, optional
        Time for which tasks must have been without workers before some come.
    clock : Clock, optional
        Source of time, for tests.
    **kinds : (int, int)
        The least and the greatest number of workers of a kind, as in ``gpu=(0, 2)``.

    Attributes
    ----------
    decisions : deque of Decision
        The log, oldest first; as many as ``distributed.admin.low-level-log-length``.

    Raises
    ------
    ConfigError
        When an option cannot be used.
    """

    cluster: AdaptiveCluster  # type: ignore[assignment]
    state: Literal["starting", "running", "stopped", "inactive"] = "inactive"  # so that a refused object has one
    _watcher: asyncio.Task[None] | None = None
    _requester: asyncio.Task[None] | None = None

    def __init__(
        self,
        cluster: AdaptiveCluster,
        interval: str | float | None = None,
        minimum: int | None = None,
        maximum: float | None = None,
        wait_count: int | None = None,
        target_duration: str | float | None = None,
        *,
        modes: Sequence[str | Mode] | None = None,
        minimum_cores: int | None = None,
        maximum_cores: int | None = None,
        minimum_memory: str | int | None = None,
        maximum_memory: str | int | None = None,
        idle_timeout: str | float = 0,
        up_delay: str | float = 0,
        clock: Clock | None = None,
        **kinds: tuple[int, int | None],
    ) -> None:
        # All before dask's own: in a synchronous cluster the first look may begin in its thread while this goes on.
        if interval is not None:
            parse_seconds("interval", interval, call="adapt", zero=True)
        if target_duration is not None:
            parse_seconds("target_duration", target_duration, call="adapt")
        _check_whole("wait_count", wait_count, least=1)
        least, most = _nbytes("minimum_memory", minimum_memory), _nbytes("maximum_memory", maximum_memory)
        _check_limits("", minimum, None if maximum == math.inf else maximum)
        _check_limits("_cores", minimum_cores, maximum_cores)
        _check_limits("_memory", least, most)
        self._modes = _modes(modes)
        self._kinds = {kind: _limits(kind, limits) for kind, limits in kinds.items()}
        self._least, self._most = (minimum_cores or 0, least or 0), (maximum_cores, most)
        self._patience = Patience(
            parse_seconds("idle_timeout", idle_timeout, call="adapt", zero=True),
            parse_seconds("up_delay", up_delay, call="adapt", zero=True),
        )
        self._clock = clock or SystemClock()
        self._unmet: set[str] = set()
        self._requests: dict[int, HeldRequest] = {}
        self._numbers = itertools.count()
        self._between = asyncio.Event()  # set while no look is in progress
        self._between.set()
        self.decisions: deque[Decision] = deque(maxlen=dask.config.get("distributed.admin.low-level-log-length"))
        super().__init__(cluster, interval, minimum, maximum, wait_count, target_duration)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        limits = {"workers": (self.minimum or 0, None if math.isinf(self.maximum) else self.maximum), **self._kinds}
        parts = [self.state, *(f"{name} {_range(*each)}" for name, each in limits.items())]
        if self._modes:
            parts.append(f"modes {', '.join(mode.name for mode in self._modes)}")
        return f"<AgentAdaptive: {'; '.join(parts)}>"

    # -- when to look --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        super()._start()
        if self.state == "running":
            self._watcher = asyncio.ensure_future(self._look_for_tasks())

    def stop(self, reason: str = "unknown") -> None:
        """Stop adaptive scaling; the workers that are there stay.

        Parameters
        ----------
        reason
            Reason, for the log.
        """
        super().stop(reason)
        if self._watcher or self._requester:
            self.loop.add_callback(self._end, (self._watcher, self._requester))
            self._watcher = self._requester = None

    def _end(self, tasks: Sequence[asyncio.Task[None] | None]) -> None:
        for task in filter(None, tasks):
            task.cancel()
        for request in self._pending():
            request.granted.set_exception(ConfigError("adaptive scaling was stopped before there was capacity"))

    async def adapt(self) -> None:
        """Look once, as in each interval; workers that were not needed several times in a row may go."""
        await self._look(counts=True)

    async def _look_for_tasks(self) -> None:
        """Look as soon as tasks wait because there is no worker for them."""
        while self.state == "running":
            try:
                if await self.cluster.scheduler_comm.await_demand(timeout=LONGEST_WAIT):
                    await self._look()
                    await self._clock.sleep(min(TASK_PAUSE, self.interval or TASK_PAUSE))
            except Exception as error:  # whatever it is, the look in the next interval meets it too and reports it
                logger.debug("Adaptive scaling is not told of waiting tasks: %s", error)
                await self._clock.sleep(self.interval or 1.0)

    async def hold(self, resources: Mapping[str, int], timeout: float) -> int:
        """Wait until there is capacity for tasks that are not submitted yet, and hold it.

        Parameters
        ----------
        resources
            Resource -> number of tasks that need one of it.
        timeout
            Seconds.

        Returns
        -------
        int
            Number of the request, for :meth:`release`.

        Raises
        ------
        ConfigError
            When no node can ever have the capacity, or adaptive scaling is stopped.
        TimeoutError
            When there is no capacity within the timeout.
        """
        number = next(self._numbers)
        request = HeldRequest(resources, asyncio.get_running_loop().create_future())
        self._requests[number] = request
        if self._requester is None:
            self._requester = asyncio.create_task(self._look_for_requests())
        expiry = asyncio.ensure_future(self._clock.sleep(timeout))
        try:
            await asyncio.wait([request.granted, expiry], return_when=asyncio.FIRST_COMPLETED)
            if not request.granted.done():
                needs = ", ".join(f"{name}={amount}" for name, amount in resources.items())
                raise TimeoutError(f"no room for {needs} within {timeout:g} s; see adaptive_log()")
            request.granted.result()
        except BaseException:
            self.release(number)
            raise
        finally:
            expiry.cancel()
        return number

    def release(self, number: int) -> None:
        """Release a request; unknown ones are released already.

        Parameters
        ----------
        number
            The number that :meth:`hold` returned.
        """
        if request := self._requests.pop(number, None):
            request.granted.cancel()

    def _pending(self) -> list[HeldRequest]:
        return [request for request in self._requests.values() if not request.granted.done()]

    async def _look_for_requests(self) -> None:
        """Look while requests have no capacity: when one is made, and then in pauses, because tasks may have ended."""
        try:
            while self._pending():
                if self._adapting:
                    await self._between.wait()  # a look that began before a request does not count it
                else:
                    await self._look()
                    await self._clock.sleep(REQUEST_PAUSE)
        finally:
            self._requester = None

    def _grant(self, asked: Iterable[int], answer: AdaptAnswer) -> None:
        """Resolve the requests for which the scheduler found capacity, or can never have any."""
        for number in asked:
            request = self._requests.get(number)
            if request is None or request.granted.done():
                continue
            found = [answer["requests"].get(name, False) for name in request.resources]
            if never := [why for why in found if isinstance(why, str)]:
                request.granted.set_exception(ConfigError(f"cannot hold what was requested: {'; '.join(never)}"))
            elif all(found):
                request.granted.set_result(None)

    # -- one look ------------------------------------------------------------------------------------------------------

    async def _look(self, counts: bool = False) -> None:
        if self._adapting or not self._patience.ready(self._clock.monotonic()):
            return
        self._adapting = True
        self._between.clear()
        requests = dict(self._requests)
        try:
            if not self.decisions:
                await self._log("", "begins", "")
            answer = await self._ask(requests.values())
            if counts and (expired := self._expired(answer)):
                answer = await self._ask(requests.values(), may_go=expired)
            self._patience.succeeded()
            self._grant(requests, answer)
            await self._report_unmet(answer)
            await self._change_hosts(answer, counts)
        except RolloutBusy as busy:
            logger.debug("Adaptive scaling waits: %s", busy)
        except Exception as error:  # whatever it is, it is reported, and tried again
            await self._fail(error)
        finally:
            self._adapting = False
            self._between.set()

    def _expired(self, answer: AdaptAnswer) -> list[str]:
        return self._patience.expired(answer["could_go"], self.wait_count, self._clock.monotonic())

    async def _ask(self, requests: Iterable[HeldRequest], may_go: Sequence[str] = ()) -> AdaptAnswer:
        """Let the scheduler decide and change the nodes."""
        now = self._clock.monotonic()
        needed: Counter[str] = Counter()
        for request in requests:
            needed.update(request.resources)
        asked = AdaptiveRequest(
            modes=self._modes,
            target_duration=self.target_duration,
            least=(self.minimum or 0, *self._least),
            most=(None if math.isinf(self.maximum) else self.maximum, *self._most),
            kinds=self._kinds,
            requests=needed,
            may_go=tuple(may_go),
            may_come=self._patience.may_come(now),
            reserve=self.cluster.hosts.candidates(),
            extra=self.cluster.hosts.extra(),
        )
        nodes = list(self.cluster.workers)
        answer = await self.cluster.scheduler_comm.adapt_nodes(asked=to_wire(asked), nodes=nodes, wait=False)
        self._patience.waits(answer["waits"], now)
        if answer["decided"]:
            await self._note(answer["saw"], answer["decided"], _shortfall(answer), answer["seconds"])
        return answer

    async def _change_hosts(self, answer: AdaptAnswer, counts: bool) -> None:
        """Launch the standby hosts that are needed; end those that have no workers left."""
        if answer["launch"]:
            began = time.time()

            async def launched(names: Sequence[str], failed: Mapping[str, str]) -> None:
                came = ", ".join(name for name in names if name not in failed)
                why = "; ".join(f"{name}: {error}" for name, error in failed.items())
                decided = f"launched {came}" if came else "nothing"
                await self._note(answer["saw"], decided, why, time.time() - began)
                if self.state == "running":
                    await self._look()

            self.cluster.hosts.launch_soon(answer["launch"], launched)
        elif counts and (ended := await self.cluster.hosts.end_idle_unless_launching()):
            await self._note(answer["saw"], f"let go of {', '.join(ended)}", "no workers there", 0.0)

    # -- the log -------------------------------------------------------------------------------------------------------

    async def _report_unmet(self, answer: AdaptAnswer) -> None:
        """Report once what tasks need and no node can ever have."""
        for resources, why in answer["unmet"].items():
            if resources not in self._unmet:
                self._unmet.add(resources)
                logger.warning("Adaptive scaling cannot help: %s", why)
                await self._log(answer["saw"], "nothing", why)
        self._unmet &= set(answer["unmet"])

    async def _note(self, saw: str, decided: str, why: str, took: float) -> None:
        """Log a change of the nodes."""
        await self.cluster.view.refresh()
        await self._log(saw, decided, why, took)
        self.log.append((time.time(), {"status": "adapt", "saw": saw, "decided": decided}))
        logger.info("Adaptive scaling: %s (%s)", decided, saw)

    async def _log(self, saw: str, decided: str, why: str, took: float = 0.0) -> None:
        """Add a decision to the log and to the scheduler's events."""
        workers = dict(sorted(self.cluster.view.nodes.kinds().items()))
        decision = Decision(time.time(), saw, decided, why, took, workers)
        self.decisions.append(decision)
        with contextlib.suppress(OSError):  # a scheduler that cannot be reached is reported by the look
            await self.cluster.scheduler_comm.log_event(topic=TOPIC, msg={"adapt": to_wire(decision)})

    async def _fail(self, error: Exception) -> None:
        """Report a failure, and wait, longer after each."""
        wait = self._patience.failed(self.interval or 1.0, self._clock.monotonic())
        text = one_line(error)
        logger.warning("Adaptive scaling failed, the next try is in %.0f s: %s", wait, text)
        await self._log("", "nothing", text)


def _shortfall(answer: AdaptAnswer) -> str:
    """Return what there is no capacity for, as text."""
    needs = "; ".join(answer["short"])
    return needs and f"there is no room for all of {'them' if needs == answer['saw'] else needs}"


def _range(least: int, most: float | None) -> str:
    return f"{least} or more" if most is None else f"{least} to {most}"


def _check_whole(key: str, value: object, least: int = 0) -> None:
    """Refuse what is neither None nor a whole number."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ConfigError(f"adapt({key}={value!r}): give a whole number of at least {least}", key=key)
    if value is not None and value > MOST:
        raise ConfigError(f"adapt({key}={value!r}): give at most {MOST}", key=key)


def _check_limits(what: str, least: object, most: object) -> None:
    """Refuse limits that are no whole numbers, or that nothing can keep."""
    _check_whole(f"minimum{what}", least)
    _check_whole(f"maximum{what}", most)
    if isinstance(least, int) and isinstance(most, int) and least > most:
        raise ConfigError(
            f"adapt(minimum{what}={least}, maximum{what}={most}): the maximum is smaller", key=f"maximum{what}"
        )


def _nbytes(key: str, value: str | int | None) -> int | None:
    return None if value is None else parse_nbytes(key, value, call="adapt")


def _modes(given: Sequence[str | Mode] | str | Mode | None) -> tuple[Mode, ...]:
    if given is None:
        return ()
    if isinstance(given, str | Mode):
        given = [given]
    items: object = given
    if not isinstance(items, Iterable) or isinstance(items, bytes):
        raise ConfigError(f"adapt(modes={given!r}): give a mode, or a list of modes", key="modes")
    return tuple(modes.parse(mode) for mode in given)


def _limits(kind: str, limits: object) -> tuple[int, int | None]:
    least, most = limits if isinstance(limits, tuple | list) and len(limits) == 2 else (-1, None)
    if (
        isinstance(least, int)
        and (most is None or isinstance(most, int))
        and 0 <= least <= (least if most is None else most) <= MOST
    ):
        return least, most
    raise ConfigError(
        f"adapt({kind}={limits!r}): give the least and the greatest number of workers, such as {kind}=(0, 2)", key=kind
    )
