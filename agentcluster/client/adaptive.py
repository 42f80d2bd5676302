"""What ``cluster.adapt()`` runs: again and again the scheduler is asked to give nodes what tasks need, and no more.

The scheduler decides and carries the decision out in one step (:mod:`agentcluster.scheduler.controller`). Here is
the patience (who may come when, who was not needed for how long, how long to leave it after a failure), and the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import dask
from distributed.deploy.adaptive import Adaptive

from agentcluster import modes
from agentcluster.client.hosts import Launching
from agentcluster.errors import ConfigError, RolloutBusy, one_line
from agentcluster.model import Mode
from agentcluster.reports import Decision
from agentcluster.requests import AdaptiveRequest
from agentcluster.units import parse_nbytes, parse_seconds
from agentcluster.wire import TOPIC, to_wire

logger = logging.getLogger(__name__)

#: Seconds between two looks that tasks without a worker cause.
QUIET = 0.1

#: Seconds that it waits at most after one failure after the other.
LONGEST_WAIT = 60.0


class AgentAdaptive(Adaptive):
    """Gives an :class:`~agentcluster.AgentCluster` the workers that its tasks need, of the kind that they need.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.
    interval : str or float, optional
        Time between checks; default is ``distributed.adaptive.interval``.
    minimum, maximum : int, optional
        Workers to keep around at least, and at most.
    wait_count : int, optional
        Number of checks in a row in which a worker was not needed before it goes.
    target_duration : str or float, optional
        Time within which all that is to do should be done; a shorter one brings more workers.
    modes : list of (str or Mode), optional
        What nodes may run. A node changes its mode for tasks that need it, and goes back to the first that it can have
        when they are done. Default: nodes keep their mode.
    minimum_cores, maximum_cores : int, optional
        Threads of all workers together.
    minimum_memory, maximum_memory : str or int, optional
        Bytes, or such as "100 GiB", of all workers' memory limits together.
    idle_timeout : str or float, optional
        Time for which a worker must not have been needed before it goes, beside `wait_count`.
    up_delay : str or float, optional
        Time for which tasks must have been without workers before some come.
    **kinds : (int, int)
        The least and the greatest number of workers of a kind, as in ``gpu=(0, 2)``.
    """

    cluster: Any
    _watching: asyncio.Task[None] | None = None
    state: Any = "inactive"  # before dask sets it: what is refused here is not stopped

    def __init__(
        self,
        cluster: Any = None,
        interval: Any = None,
        minimum: int | None = None,
        maximum: float | None = None,
        wait_count: int | None = None,
        target_duration: Any = None,
        *,
        modes: Sequence[str | Mode] | None = None,
        minimum_cores: int | None = None,
        maximum_cores: int | None = None,
        minimum_memory: str | int | None = None,
        maximum_memory: str | int | None = None,
        idle_timeout: Any = 0,
        up_delay: Any = 0,
        **kinds: tuple[int, int | None],
    ) -> None:
        self._modes = _modes(modes)
        self._kinds = {kind: _limits(kind, limits) for kind, limits in kinds.items()}
        self._idle_timeout = parse_seconds("idle_timeout", idle_timeout, call="adapt", zero=True)
        self._up_delay = parse_seconds("up_delay", up_delay, call="adapt", zero=True)
        least_memory = parse_nbytes("minimum_memory", minimum_memory or 0, call="adapt")
        most_memory = None if maximum_memory is None else parse_nbytes("maximum_memory", maximum_memory, call="adapt")
        super().__init__(cluster, interval, minimum, maximum, wait_count, target_duration)
        self._least = (self.minimum or 0, minimum_cores or 0, least_memory)
        self._most = (None if math.isinf(self.maximum) else self.maximum, maximum_cores, most_memory)
        self._idle_since: dict[str, float] = {}
        self._idle_count: dict[str, int] = {}
        self._short_since: float | None = None
        self._said: set[str] = set()
        self._requests: dict[int, Mapping[str, int]] = {}
        self._numbers = itertools.count()
        #: Which requests the scheduler knew of when it last answered, and what it said.
        self._answered: tuple[Collection[int], Mapping[str, Any]] = ((), {})
        self._launching = Launching(cluster)
        self._failures = 0
        self._not_before = 0.0
        self.decisions: deque[Decision] = deque(maxlen=dask.config.get("distributed.admin.low-level-log-length"))

    def _start(self) -> None:
        super()._start()
        if self.state == "running":
            self._watching = asyncio.ensure_future(self._watch())

    def stop(self, reason: str = "unknown") -> None:
        """End it; nothing changes any more."""
        super().stop(reason)
        if self._watching is not None:
            self.loop.add_callback(self._watching.cancel)
            self._watching = None

    async def _watch(self) -> None:
        """Look at once when tasks begin to wait because there is no worker for them, and not only after an interval."""
        while self.state == "running":
            try:
                if await self.scheduler.await_demand(timeout=LONGEST_WAIT):
                    await self._look()
                    await asyncio.sleep(min(QUIET, self.interval or QUIET))
            except Exception as error:  # whatever it is, the looks in each interval have to do with it too, and say so
                logger.debug("Adaptive scaling hears of no tasks for now: %s", error)
                await asyncio.sleep(self.interval or 1.0)

    async def adapt(self) -> None:
        """Have the scheduler look, decide and carry out, once; who was not needed this time may go after some more."""
        await self._look(counts=True)

    async def _look(self, counts: bool = False) -> None:
        if self._adapting or time.monotonic() < self._not_before:
            return
        self._adapting = True
        asked = set(self._requests)
        try:
            if not self.decisions:
                await self._keep("", "begins", "")
            answer = await self._once()
            if counts and (firm := self._patience(answer)):
                answer = await self._once(may_go=firm)
            self._answered = (asked, answer)
            self._failures = 0
            self._not_before = 0.0
            await self._say(answer)
            await self._hosts(answer, counts)
        except RolloutBusy as busy:
            logger.debug("Adaptive scaling waits: %s", busy)
        except Exception as error:  # whatever it is, it is said, and tried again
            await self._fail(error)
        finally:
            self._adapting = False

    async def _once(self, may_go: Sequence[str] = ()) -> Mapping[str, Any]:
        now = time.monotonic()
        may_come = self._up_delay == 0 or (self._short_since is not None and now - self._short_since >= self._up_delay)
        asked = AdaptiveRequest(
            self._modes,
            self.target_duration,
            self._least,
            self._most,
            self._kinds,
            self._requested(),
            tuple(may_go),
            may_come,
            self._launching.hosts(),
            self.cluster._extra(),
        )
        answer: Mapping[str, Any] = await self.scheduler.adapt_nodes(
            asked=to_wire(asked), nodes=list(self.cluster.workers), wait=False
        )
        if not answer["waits"]:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        if answer["decided"]:
            await self._note(answer["saw"], answer["decided"], _short(answer), answer["seconds"])
        return answer

    async def _hosts(self, answer: Mapping[str, Any], counts: bool) -> None:
        """Launch hosts in standby that are needed; let go of those that have no workers any more."""
        if answer["launch"]:
            began = time.time()

            async def launched(names: Sequence[str], failed: Mapping[str, str]) -> None:
                came = ", ".join(name for name in names if name not in failed)
                why = "; ".join(f"{name}: {error}" for name, error in failed.items())
                decided = f"launched {came}" if came else "nothing"
                await self._note(answer["saw"], decided, why, time.time() - began)
                if self.state == "running":
                    await self._look()

            self._launching.begin(answer["launch"], launched)
        elif counts and (gone := await self._launching.let_go()):
            await self._note(answer["saw"], f"let go of {', '.join(gone)}", "no workers there", 0.0)

    def _requested(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for request in self._requests.values():
            for name, count in request.items():
                found[name] = found.get(name, 0) + count
        return found

    async def hold(self, request: Mapping[str, int], timeout: float) -> int:
        """Have room for tasks before they come; return what :meth:`release` takes.

        Parameters
        ----------
        request
            Resource -> number of tasks that need one of it.
        timeout
            Seconds.

        Raises
        ------
        ConfigError
            When no node can ever have it.
        TimeoutError
            When there is no room for all within the timeout.
        """
        number = next(self._numbers)
        self._requests[number] = request
        try:
            async with asyncio.timeout(timeout):
                while not self._holds(number):
                    await self._look()
                    await asyncio.sleep(0.02)
        except BaseException as error:
            self.release(number)
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"no room for {dict(request)} within {timeout:g} s; see adaptive_log()") from None
            raise
        return number

    def release(self, number: int) -> None:
        """Hold it no longer."""
        self._requests.pop(number, None)

    def _holds(self, number: int) -> bool:
        """Whether there was room for a request when the scheduler looked last, or raise why there can never be."""
        asked, answer = self._answered
        if number not in asked:
            return False
        found = {name: answer["requests"].get(name) for name in self._requests[number]}
        if never := [why for why in found.values() if isinstance(why, str)]:
            raise ConfigError(f"cannot hold what was requested: {'; '.join(never)}")
        return all(found.values())

    def _patience(self, answer: Mapping[str, Any]) -> list[str]:
        """Return who has not been needed for long enough."""
        now, idle = time.monotonic(), set(answer["could_go"])
        for name in self._idle_since.keys() - idle:
            del self._idle_since[name], self._idle_count[name]
        for name in idle:
            self._idle_since.setdefault(name, now)
            self._idle_count[name] = self._idle_count.get(name, 0) + 1
        return [
            name
            for name in idle
            if self._idle_count[name] >= self.wait_count and now - self._idle_since[name] >= self._idle_timeout
        ]

    async def _say(self, answer: Mapping[str, Any]) -> None:
        """Say once of tasks that nobody can ever run what they need."""
        for what, why in answer["unmet"].items():
            if what not in self._said:
                self._said.add(what)
                logger.warning("Adaptive scaling cannot help: %s", why)
                await self._keep(answer["saw"], "nothing", why)
        self._said &= set(answer["unmet"])

    async def _note(self, saw: str, decided: str, why: str, took: float) -> None:
        await self.cluster._refresh()
        await self._keep(saw, decided, why, took)
        self.log.append((time.time(), {"status": "adapt", "saw": saw, "decided": decided}))
        logger.info("Adaptive scaling: %s (%s)", decided, saw)

    async def _keep(self, saw: str, decided: str, why: str, took: float = 0.0) -> None:
        """Keep a decision, here and among the scheduler's events."""
        workers = dict(sorted(self.cluster.nodes.kinds().items()))
        decision = Decision(time.time(), saw, decided, why, took, workers)
        self.decisions.append(decision)
        with contextlib.suppress(OSError):  # a scheduler that is gone has said so already, or will
            await self.scheduler.log_event(topic=TOPIC, msg={"adapt": to_wire(decision)})

    async def _fail(self, error: Exception) -> None:
        """Leave it for a while, longer each time."""
        self._failures += 1
        wait = min(LONGEST_WAIT, (self.interval or 1.0) * 2**self._failures)
        self._not_before = time.monotonic() + wait
        text = one_line(error)
        logger.warning("Adaptive scaling failed, the next try is in %.0f s: %s", wait, text)
        await self._keep("", "nothing", text)


def _short(answer: Mapping[str, Any]) -> str:
    """Say what there is no room for, where that is anything."""
    needs = "; ".join(answer["short"])
    return needs and f"there is no room for all of {'them' if needs == answer['saw'] else needs}"


def _modes(given: Sequence[str | Mode] | None) -> tuple[Mode, ...]:
    if given is None:
        return ()
    if isinstance(given, str | Mode):
        given = [given]
    return tuple(modes.parse(mode) for mode in given)


def _limits(kind: str, limits: Any) -> tuple[int, int | None]:
    least, most = limits if isinstance(limits, tuple | list) and len(limits) == 2 else (-1, None)
    if (
        isinstance(least, int)
        and (most is None or isinstance(most, int))
        and 0 <= least <= (least if most is None else most)
    ):
        return least, most
    raise ConfigError(
        f"adapt({kind}={limits!r}): give the least and the greatest number of workers, such as {kind}=(0, 2)", key=kind
    )
