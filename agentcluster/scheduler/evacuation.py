"""Taking workers out of a scheduler without losing what they hold, and saying when they may be stopped.

The only place that touches the scheduler's own state. ``Scheduler.retire_workers`` polls once in 0.25 s or more when a
worker holds 100 keys, has no deadline, does not wait for running tasks, and counts a worker as empty though a task has
just ended there. So the moving is done here, with the same means (``acquire-replicas``, work stealing): a leaving
worker gets no new tasks, gives those away that it has not begun, is waited for while it runs others, and is removed in
the very step that finds no only copy of a key on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler, Status
from distributed.metrics import monotonic, time

from agentcluster.requests import Drain
from agentcluster.scheduler.planning.placement import placed

#: Where a scheduler has what counts the data that is on its way (:mod:`agentcluster.scheduler.evacuation`).
ARRIVING = "agentcluster-arriving"

#: Seconds between two looks at what has moved. Each costs only what has moved since.
INTERVAL = 0.005

#: Seconds that are left to the scheduler for each second of looking.
SHARE = 4

#: Seconds that a worker has to say that it works again.
ANSWER = 10.0

#: Seconds without progress after which the moving of a key is asked for again, of another worker perhaps.
RETRY = 1.0

#: Seconds that the workers which could take data may be gone, or paused: one that was killed is started again.
GRACE = 3.0

#: Seconds between two looks at each task that may still run.
LOOK = 0.25

#: Seconds after which the workers' heartbeats have said what they execute.
HEARD = 1.5


@dataclass(frozen=True)
class Evacuation:
    """What became of some workers that were to leave.

    Attributes
    ----------
    keys, nbytes
        Worker name -> keys that only leaving workers held, and their bytes, when their tasks had ended.
    rerun
        Worker name -> tasks that ran there when their time was up, and run again elsewhere.
    drain
        Seconds until the last task there had ended, or its time was up.
    problem
        Why not all could leave; None when all did.
    """

    keys: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    rerun: dict[str, int] = field(default_factory=dict)
    drain: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far an evacuation is: keys and bytes that have another copy already, of all, and tasks that still run."""

    keys: int
    all_keys: int
    nbytes: int
    all_nbytes: int
    tasks: int


def actors(scheduler: Scheduler, names: Iterable[str]) -> dict[str, list[str]]:
    """Return worker name -> keys of the actors it holds; an actor cannot be moved."""
    return {str(ws.name): sorted(str(ts.key) for ts in ws.actors) for ws in _states(scheduler, names) if ws.actors}


def held(scheduler: Scheduler, names: Iterable[str]) -> dict[str, int]:
    """Return worker name -> bytes of data that it holds."""
    return {str(ws.name): ws.nbytes for ws in _states(scheduler, names)}


def only_copies(scheduler: Scheduler, names: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return worker name -> number of keys, and bytes, that no other than the named workers hold."""
    return _count(_states(scheduler, names))


def stranded(scheduler: Scheduler, names: Iterable[str]) -> dict[str, int]:
    """Return worker name -> keys that would be lost if the named workers went and none came; {} when others stay."""
    leaving = _states(scheduler, names)
    if scheduler.running - set(leaving):
        return {}
    keys, _ = _count(leaving)
    return {name: count for name, count in keys.items() if count}


async def evacuate(
    scheduler: Scheduler,
    names: Sequence[str],
    timeout: float,
    *,
    drain: Drain = "tasks",
    drain_timeout: float = 0.0,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Evacuation:
    """Move data off workers and remove them from the scheduler; all of them, or none.

    Parameters
    ----------
    scheduler
        The scheduler.
    names
        Names of the workers that leave. Those that are gone already count as left.
    timeout
        Seconds for moving the data, after the running tasks have ended or their time is up.
    drain
        ``tasks`` waits for running tasks up to `drain_timeout`, ``data`` does not, ``now`` does not move data either.
    drain_timeout
        Seconds that running tasks get; those that still run then are run again elsewhere, and that does not count as
        a failure of theirs.
    progress
        Called every now and then.

    Returns
    -------
    Evacuation
        With a `problem` when not all could leave: then those that are still there take tasks again.
    """
    leaving = _Leaving(scheduler, names, progress)
    problem: str | None = None
    try:
        # A worker that crashes in between comes back under another address: the end is when no name is left.
        while problem is None and leaving.present():
            leaving.close_doors()
            if drain != "now" and (arriving := scheduler.extensions.get(ARRIVING)) is not None:
                await arriving.landed(timeout)
            if leaving.drained is None:
                problem = await leaving.drain(drain_timeout if drain == "tasks" else 0.0)
            if problem is None and drain != "now":
                problem = await leaving.empty(timeout)
            if problem is None:
                await leaving.remove(force=drain == "now")
    finally:
        # Also after a cancellation: who asked for it may want to move data back to those that did not leave.
        leaving.open_doors()
        await leaving.reinstated()
    return Evacuation(leaving.keys, leaving.nbytes, leaving.rerun, leaving.drained or 0.0, problem)


class _Leaving:
    """Workers that are to leave, and how far that is."""

    def __init__(self, scheduler: Scheduler, names: Sequence[str], tell: Callable[[Progress], None]) -> None:
        self.scheduler = scheduler
        self.names = frozenset(names)
        self.tell = tell
        self.keys, self.nbytes = only_copies(scheduler, names)
        self.stimulus_id = f"agentcluster-evacuate-{time()}"
        self.began = monotonic()
        self.drained: float | None = None
        self.rerun: dict[str, int] = {}
        self._before: dict[Any, Status] = {}
        self._pending: list[Any] = []
        self._looked = 0.0
        self._passed = 0.0
        self._running = 0
        # A worker that joined just now may not have said yet that it runs.
        self._taken = self.began if len(scheduler.workers) > len(self.present()) else float("-inf")

    def present(self) -> frozenset[Any]:
        """Return the workers of these names that are in the scheduler."""
        return frozenset(_states(self.scheduler, self.names))

    def close_doors(self) -> None:
        """Let no new task come, and give those that were not begun to others."""
        for ws in self.present():
            if ws not in self._before:
                self._before[ws] = ws.status
                # On both sides at once, as Scheduler.retire_workers does, so that nothing is sent there in between.
                self.scheduler.handle_worker_status_change(Status.closing_gracefully, ws, self.stimulus_id)
                self._tell(ws, Status.closing_gracefully)
        self.pass_on()

    def open_doors(self) -> None:
        """Let the workers that did not leave take tasks again, or do what they did before."""
        for ws in self.present():
            if ws.status is Status.closing_gracefully:
                self._tell(ws, self._before.get(ws, Status.running))

    async def reinstated(self) -> None:
        """Wait until the scheduler has heard of it: who is to take data back from others must count as running."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER):
                while any(
                    self._before.get(ws) is Status.running and ws.status is not Status.running for ws in self.present()
                ):
                    await asyncio.sleep(INTERVAL)

    def _tell(self, ws: Any, status: Status) -> None:
        message = {"op": "worker-status-change", "status": status.name, "stimulus_id": self.stimulus_id}
        self.scheduler.worker_send(ws.address, message)

    async def drain(self, wait: float) -> str | None:
        """Wait until the tasks there have ended, or their time is up; return why the workers will not get empty.

        No copies are made meanwhile. Dask drops one of two copies, here that of the worker that leaves, and a new
        worker that then proves to be no good would have the only one.
        """
        while (now := monotonic()) < self.began + wait and self.running_tasks(now):
            if now - self._passed > LOOK:
                self.pass_on()
            if (problem := self.hopeless(now)) is not None:
                return problem
            self.tell(self.progress())
            await self.rest(now)
        self.drained = monotonic() - self.began
        self.keys, self.nbytes = only_copies(self.scheduler, self.names)
        return None

    async def empty(self, timeout: float) -> str | None:
        """Wait until every key has another copy; return why that cannot be."""
        ends = self.began + (self.drained or 0.0) + timeout
        asked = moved = monotonic()
        self._pending = self.lonely()
        self.ask_for(self._pending)
        while True:
            now = monotonic()
            if self.prune():
                moved = now
            if not self._pending or now - max(asked, moved) > RETRY:
                self._pending = self.lonely()  # some of the old ones may be released by now
                self.ask_for(self._pending)
                asked = now
            if not self._pending:
                return None
            if (problem := self.hopeless(now)) is not None:
                return problem
            if now > ends:
                return f"data could not be moved within {timeout:g} s: {self.describe()}"
            self.tell(self.progress())
            await self.rest(now)

    async def rest(self, began: float) -> None:
        """Leave time to the scheduler: a look at many keys and tasks, since `began`, takes of it."""
        await asyncio.sleep(min(max(INTERVAL, SHARE * (monotonic() - began)), LOOK))

    def hopeless(self, now: float) -> str | None:
        """Say why the data will not be moved, when that is plain."""
        if any(ws.actors for ws in self.present()):
            return f"actors cannot be moved: {self.describe()}"
        if self.recipients():
            self._taken = now
        elif now - self._taken > GRACE and self.lonely():
            return f"data could not be moved to another worker: {self.describe()}"
        return None

    async def remove(self, force: bool) -> None:
        """Take the workers out, all in one step of the event loop, unless one holds a key that none else has.

        `remove_worker` forgets the worker before it first awaits, and what `gather` starts takes its first step
        without anything in between: what the first of them finds is true for all.
        """
        leaving = self.present()
        free: list[bool] = []

        async def remove(ws: Any) -> None:
            if not free:
                free.append(force or (leaving == self.present() and not self.lonely()))
            if free[0]:
                if ws.processing:
                    self.rerun[str(ws.name)] = self.rerun.get(str(ws.name), 0) + len(ws.processing)
                await self.scheduler.remove_worker(ws.address, expected=True, close=False, stimulus_id=self.stimulus_id)

        await asyncio.gather(*map(remove, leaving))

    # -- data ----------------------------------------------------------------------------------------------------------

    def lonely(self) -> list[Any]:
        """Return the tasks whose results only leaving workers hold."""
        leaving = self.present()
        return list({ts for ws in leaving for ts in ws.has_what if ts.who_has <= leaving})

    def prune(self) -> bool:
        """Forget, from the end, what has another copy by now, or no need of one; say whether there was any."""
        leaving = self.present()
        before = len(self._pending)
        while self._pending and not (self._pending[-1].who_has and self._pending[-1].who_has <= leaving):
            self._pending.pop()
        return len(self._pending) < before

    def recipients(self) -> list[Any]:
        """Return the workers that can take data and tasks."""
        leaving = self.present()
        return [ws for ws in self.scheduler.running if ws not in leaving]

    def ask_for(self, tasks: Sequence[Any]) -> None:
        """Ask other workers to fetch copies."""
        for address, keys in placed(tasks, self.recipients()).items():
            self.scheduler.request_acquire_replicas(address, keys, stimulus_id=self.stimulus_id)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def pass_on(self) -> None:
        """Give tasks that a leaving worker has not begun to others, by the work stealing that asks the worker first.

        Once is not enough: a task that dask was just moving between two leaving workers, or to one, arrives, and would
        stay there, because a worker that leaves begins nothing.
        """
        stealing: Any = self.scheduler.extensions.get("stealing")
        self._passed = monotonic()
        if stealing is None:
            return
        given: Counter[Any] = Counter()  # what they were given just now does not show in their state yet
        for ws in self.present():
            for ts in list(ws.processing):
                others = () if ts in ws.executing or ts in ws.long_running else self.takers(ts)
                if others:
                    taker = min(others, key=lambda each: (len(each.processing) + given[each]) / (each.nthreads or 1))
                    given[taker] += 1
                    stealing.move_task_request(ts, ws, taker)

    def takers(self, ts: Any) -> list[Any]:
        """Return the workers that could run a task instead."""
        valid, others = self.scheduler.valid_workers(ts), self.recipients()
        fit = [ws for ws in others if valid is None or ws in valid]
        return fit or (others if ts.loose_restrictions else [])

    def running_tasks(self, now: float) -> int:
        """Count the tasks that run on leaving workers, as far as can be known.

        What no other worker could run cannot be asked away, so there the heartbeat says whether it was begun.
        """
        present = self.present()
        if now - self.began < HEARD:
            return sum(len(ws.processing) for ws in present)
        if now - self._looked > LOOK:
            self._looked = now
            self._running = sum(
                1
                for ws in present
                for ts in ws.processing
                if ts in ws.executing or ts in ws.long_running or self.takers(ts)
            )
        return self._running

    # -- words ---------------------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """Return how far it is; bytes are reckoned from the keys."""
        keys, nbytes = sum(self.keys.values()), sum(self.nbytes.values())
        moved = 0 if self.drained is None else max(0, keys - len(self._pending))
        tasks = sum(len(ws.processing) for ws in self.present())
        return Progress(moved, keys, nbytes * moved // keys if keys else 0, nbytes, tasks)

    def describe(self) -> str:
        """Say which worker keeps which keys."""
        leaving = self.present()
        parts = []
        for ws in leaving:
            some = sorted(str(ts.key) for ts in ws.has_what if ts.who_has <= leaving)
            more = f" and {len(some) - 3} more" if len(some) > 3 else ""
            if some:
                parts.append(f"worker {ws.name} keeps {', '.join(some[:3])}{more}")
        return "; ".join(sorted(parts)) or f"{', '.join(sorted(self.names))} could not leave"


def _states(scheduler: Scheduler, names: Iterable[str]) -> list[Any]:
    wanted = set(names)
    return [ws for ws in scheduler.workers.values() if str(ws.name) in wanted]


def _count(states: Sequence[Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Count the keys, and their bytes, that no staying worker holds; a key that several hold counts once."""
    leaving = frozenset(states)
    keys = {str(ws.name): 0 for ws in states}
    nbytes = dict(keys)
    seen = set()
    for ws in states:
        for ts in ws.has_what:
            if ts not in seen and ts.who_has <= leaving:
                seen.add(ts)
                keys[str(ws.name)] += 1
                nbytes[str(ws.name)] += ts.get_nbytes()
    return keys, nbytes


class Arriving:
    """The calls of ``scatter`` that a scheduler is carrying out.

    Parameters
    ----------
    scheduler
        The scheduler.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.calls: set[asyncio.Future[None]] = set()
        self._scheduler: Any = scheduler
        self._scatter: Any = scheduler.scatter

    def install(self) -> None:
        """Have the scheduler's ``scatter`` counted."""
        self._scheduler.scatter = self._scheduler.handlers["scatter"] = self.scatter
        self._scheduler.extensions[ARRIVING] = self

    async def scatter(self, *args: Any, **kwargs: Any) -> Any:
        """Do what ``Scheduler.scatter`` does."""
        call = asyncio.get_running_loop().create_future()
        self.calls.add(call)
        try:
            return await self._scatter(*args, **kwargs)
        finally:
            self.calls.discard(call)
            call.set_result(None)

    async def landed(self, timeout: float) -> None:
        """Wait for the data that is on its way now, for at most so many seconds."""
        if self.calls:
            await asyncio.wait(set(self.calls), timeout=timeout)
