"""Removal of workers without loss: move their data and tasks to others, then take them out of the scheduler.

The only module that changes the scheduler's own state of workers. ``Scheduler.retire_workers`` polls once in 0.25 s or
more when a worker holds 100 keys, has no deadline, does not wait for running tasks, and counts a worker as empty though
a task has just ended there. :func:`evacuate` uses the same means (``acquire-replicas``, work stealing): a leaving
worker is cordoned, gives away the tasks that it has not begun and others may run, gets time for the rest, and is
removed in the same step of the event loop that finds no sole replica of a key on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

from dask.typing import Key
from distributed import Scheduler, Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.metrics import monotonic, time
from distributed.scheduler import TaskState, WorkerState
from distributed.stealing import WorkStealing

from agentcluster.model import NodeProgress
from agentcluster.requests import Bound, Drain
from agentcluster.scheduler.departures import (
    BINDINGS,
    CALLS,
    RESULTS,
    STIMULUS,
    Bindings,
    CallsInFlight,
    SendableResults,
)
from agentcluster.scheduler.planning.placement import choose_recipients
from agentcluster.scheduler.preflight import holders, sole_replicas, workers_named

#: Seconds between two looks at what has moved. Each costs only what has moved since.
INTERVAL = 0.005

#: Seconds that are left to the scheduler for each second of looking.
SHARE = 4

#: Seconds that a worker has to confirm that it takes tasks again.
ANSWER = 10.0

#: Seconds without progress after which the copy of a key is requested again, of another worker perhaps.
RETRY = 1.0

#: Bytes of a result, and the types of it, that may be such as cannot be sent; others are not tried, to save time.
SMALL = 2**14
PLAIN = {"NoneType", "bool", "bytes", "complex", "float", "int", "str", "numpy.ndarray"}

#: Greatest number of tasks that the progress of a worker names.
NAMED = 5

#: Seconds for which all possible recipients may be missing or paused: one that was killed is started again.
GRACE = 3.0

#: Seconds between two looks at the tasks that leaving workers have not begun.
LOOK = 0.25

#: Seconds after which the workers' heartbeats have reported what they execute.
HEARD = 1.5


@dataclass(frozen=True)
class Evacuation:
    """Result of an evacuation.

    Attributes
    ----------
    keys, nbytes
        Worker name -> sole replicas on leaving workers, and their bytes, when the tasks there had ended: those moved.
    given_up, given_up_nbytes
        Worker name -> sole replicas, and their bytes, that were not moved but given up.
    lost
        Worker name -> number of those that cannot be computed again.
    rerun
        Worker name -> tasks that still ran there at the deadline, and run again elsewhere.
    followed
        Worker name -> unfinished tasks that were bound to it, and are bound to its successors.
    drain
        Seconds until the last task there had ended, or until the deadline for tasks.
    problem
        Reason why not all workers left; None when all did.
    """

    keys: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, int] = field(default_factory=dict)
    given_up_nbytes: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    rerun: dict[str, int] = field(default_factory=dict)
    followed: dict[str, int] = field(default_factory=dict)
    drain: float = 0.0
    problem: str | None = None


#: Called with the progress of each worker that leaves, by name.
Report = Callable[[Mapping[str, NodeProgress]], None]


async def evacuate(
    scheduler: Scheduler,
    names: Sequence[str],
    timeout: float,
    *,
    drain: Drain = "tasks",
    drain_timeout: float = 0.0,
    bound: Bound = "follow",
    progress: Report = lambda progress: None,
) -> Evacuation:
    """Move data off workers and remove them from the scheduler: all of them, or none.

    Parameters
    ----------
    scheduler
        The scheduler.
    names
        Names of the workers that leave; those that the scheduler does not have count as removed.
    timeout
        Seconds for moving the data, after the running tasks have ended or `drain_timeout` is over.
    drain
        ``tasks`` waits for running tasks up to `drain_timeout`, ``data`` does not, ``now`` does not move data either.
    drain_timeout
        Seconds that running tasks get; those that still run then are run again elsewhere, which does not count as a
        failure of theirs.
    bound
        ``wait`` counts tasks that are bound to the workers as running, also those that none has begun.
    progress
        Called with the progress of each worker, some times per second.

    Returns
    -------
    Evacuation
        With a `problem` when not all could leave: then those that are left take tasks again.
    """
    leaving = _Leaving(scheduler, names, progress, all_bound=bound == "wait")
    problem: str | None = None
    try:
        # A worker that crashes in between comes back under another address: the end is when no name is left.
        while problem is None and leaving.present():
            leaving.cordon()
            if drain != "now":
                await leaving.calls.scattered(timeout)
            problem = await leaving.drain(drain_timeout if drain == "tasks" else 0.0)
            if problem is None and drain != "now":
                problem = await leaving.empty(timeout)
            if problem is None:
                await (leaving.give_up() if drain == "now" else leaving.remove(force=False))
    finally:
        # Also after a cancellation: the caller may want to move data back to the workers that did not leave.
        leaving.uncordon()
        await leaving.reinstated()
    return Evacuation(
        keys={} if drain == "now" else leaving.keys,
        nbytes={} if drain == "now" else leaving.nbytes,
        given_up=leaving.given_up,
        given_up_nbytes=leaving.given_up_nbytes,
        lost=leaving.lost,
        rerun=leaving.rerun,
        followed=leaving.followed,
        drain=leaving.drained or 0.0,
        problem=problem,
    )


class _Leaving:
    """State of the workers that leave, and the steps of their evacuation."""

    def __init__(self, scheduler: Scheduler, names: Sequence[str], report: Report, *, all_bound: bool) -> None:
        self.scheduler = scheduler
        self.names = frozenset(names)
        self.report = report
        self.all_bound = all_bound
        self.keys, self.nbytes = sole_replicas(scheduler, names)
        self.stimulus_id = f"{STIMULUS}{time()}"
        self.began = monotonic()
        self.drained: float | None = None
        self.closed = False
        self.rerun: dict[str, int] = {}
        self.followed: dict[str, int] = {}
        self.given_up: Counter[str] = Counter()
        self.given_up_nbytes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.bindings: Bindings = scheduler.extensions[BINDINGS]
        self.calls: CallsInFlight = scheduler.extensions[CALLS]
        self.results: SendableResults = scheduler.extensions[RESULTS]
        self._before: dict[WorkerState, Status] = {}
        self._told: set[WorkerState] = set()
        self._unsendable: set[TaskState] = set()
        self._asked: WeakSet[TaskState] = WeakSet()
        self._pending: list[TaskState] = []
        self._handed_over = 0.0
        # A worker that joined just now may not have reported yet that it runs.
        self._recipients_seen = self.began if len(scheduler.workers) > len(self.present()) else float("-inf")

    def present(self) -> frozenset[WorkerState]:
        """Return the leaving workers that are in the scheduler.

        Returns
        -------
        frozenset of WorkerState
            The workers; empty when all have left.
        """
        return frozenset(workers_named(self.scheduler, self.names))

    def cordon(self) -> None:
        """Send the workers only tasks that may run nowhere else, and give the others that they have not begun away.

        The workers themselves do not know yet: they begin the tasks that they have and get.
        """
        for ws in self.present():
            self._before.setdefault(ws, ws.status)
            if ws.status is Status.running:  # again, where it was paused meanwhile
                self.scheduler.handle_worker_status_change(Status.closing_gracefully, ws, self.stimulus_id)
        self.bindings.drain(ws for ws in self.present() if ws.status is Status.closing_gracefully)
        self.hand_over_tasks()

    def close(self) -> None:
        """Let the workers begin no further task; what is bound to them is bound to their successors."""
        self.closed = True
        for ws in self.present() - self._told:
            # On both sides at once, as Scheduler.retire_workers does, so that nothing is sent there in between.
            self.scheduler.handle_worker_status_change(Status.closing_gracefully, ws, self.stimulus_id)
            self._set_status(ws, Status.closing_gracefully)
            self._told.add(ws)
        self.bindings.cordon(self.present())
        self.hand_over_tasks()

    def uncordon(self) -> None:
        """Restore the status of the workers that did not leave."""
        for ws in self.present():
            before = self._before.get(ws, Status.running)
            if ws.status is Status.closing_gracefully and ws in self._told:
                self._set_status(ws, before)
            elif ws.status is Status.closing_gracefully:
                self.scheduler.handle_worker_status_change(before, ws, self.stimulus_id)
        self.bindings.uncordon(self.present())

    async def reinstated(self) -> None:
        """Wait until the scheduler knows the status again: only running workers can take data back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER):
                while any(
                    self._before.get(ws) is Status.running and ws.status is not Status.running for ws in self.present()
                ):
                    await asyncio.sleep(INTERVAL)

    def _set_status(self, ws: WorkerState, status: Status) -> None:
        message = {"op": "worker-status-change", "status": status.name, "stimulus_id": self.stimulus_id}
        self.scheduler.worker_send(ws.address, message)

    async def drain(self, wait: float) -> str | None:
        """Wait until the tasks there have ended, at most `wait` seconds; return why the data cannot be moved.

        The workers take tasks that may run nowhere else until `wait` is over, or until they are removed. No copies are
        made meanwhile. Dask drops one of two copies, here that of the worker that leaves, and a new worker that is
        given up afterwards would have the sole replica.

        Parameters
        ----------
        wait
            Seconds for the tasks, from the beginning of the evacuation.

        Returns
        -------
        str or None
            The reason; None when the tasks have ended or the time is over.
        """
        while (now := monotonic()) < self.began + wait and (needs := self.needed_for()):
            if now - self._handed_over > LOOK:
                self.cordon()
            if (problem := self.obstacle(now)) is not None:
                return problem
            self.report(self.progress(self.began + wait - now, needs))
            await self.rest(now)
        if now >= self.began + wait:
            self.close()
        if self.drained is None or not self.closed:
            self.drained = now - self.began
        keys, nbytes = sole_replicas(self.scheduler, self.names)
        self.keys = {name: max(number, self.keys.get(name, 0)) for name, number in keys.items()}
        self.nbytes = {name: max(number, self.nbytes.get(name, 0)) for name, number in nbytes.items()}
        return None

    async def empty(self, timeout: float) -> str | None:
        """Wait until every key has a copy elsewhere; return why that is not possible.

        Parameters
        ----------
        timeout
            Seconds for the copies, from the end of :meth:`drain`.

        Returns
        -------
        str or None
            The reason; None when every key has a copy elsewhere or was released, or when tasks run there again.
        """
        ends = self.began + (self.drained or 0.0) + timeout
        asked = moved = monotonic()
        await self.request_all()
        while True:
            now = monotonic()
            if self.prune():
                moved = now
            if not self._pending or now - max(asked, moved) > RETRY:
                await self.request_all()
                asked = now
            if not self._pending:
                return None
            if (problem := self.obstacle(now)) is not None:
                return problem
            if not self.is_free():
                return None  # a task has come that may run nowhere else
            if self.unsendable():
                return (
                    f"results cannot be sent to another worker, for example because pickle refuses: {self.describe()}"
                )
            if now > ends:
                return f"data could not be moved within {timeout:g} s: {self.describe()}"
            self.report(self.progress())
            await self.rest(now)

    async def rest(self, began: float) -> None:
        """Leave time to the scheduler, in proportion to that of the look that began at `began`.

        Parameters
        ----------
        began
            Time of the monotonic clock at which the look began, in seconds.
        """
        await asyncio.sleep(min(max(INTERVAL, SHARE * (monotonic() - began)), LOOK))

    def obstacle(self, now: float) -> str | None:
        """Return why the data cannot be moved, if that is certain by now.

        Parameters
        ----------
        now
            Time of the monotonic clock, in seconds.

        Returns
        -------
        str or None
            The reason: actors, or no other worker for longer than :data:`GRACE`; None when neither is certain.
        """
        if any(ws.actors for ws in self.present()):
            return f"actors cannot be moved: {self.describe()}"
        if self.recipients():
            self._recipients_seen = now
        elif now - self._recipients_seen > GRACE and self.sole():
            return f"data could not be moved to another worker: {self.describe()}"
        return None

    async def remove(self, force: bool) -> None:
        """Remove the workers in one step of the event loop, unless one of them holds a sole replica.

        ``remove_worker`` forgets the worker before it first awaits, and the coroutines that ``gather`` starts take
        their first steps without anything in between: what the first of them finds is true for all.

        Parameters
        ----------
        force
            True to remove them even if they hold sole replicas, which are lost then.
        """
        leaving = self.present()
        free: list[bool] = []

        async def remove(ws: WorkerState) -> None:
            if not free:
                free.append(force or (leaving == self.present() and not self.sole() and self.is_free()))
                if free[0]:
                    self.bindings.cordon(leaving)
            if free[0]:
                if followed := self.bindings.following(ws.address):
                    self.followed[str(ws.name)] = followed
                if begun := self.begun(ws):
                    self.rerun[str(ws.name)] = self.rerun.get(str(ws.name), 0) + begun
                await self.scheduler.remove_worker(ws.address, expected=True, close=False, stimulus_id=self.stimulus_id)

        await asyncio.gather(*map(remove, leaving))

    def is_free(self) -> bool:
        """Return whether the workers need not wait for tasks: none runs there, or their time is over."""
        return self.closed or not self.needed_for()

    async def give_up(self) -> None:
        """Remove the workers with their sole replicas; count those, and those that dask has no way to compute again."""
        held = {ts.key: (min(str(ws.name) for ws in holders(ts)), ts.get_nbytes()) for ts in self.sole()}
        await self.remove(force=True)
        for key, (worker, nbytes) in held.items():
            self.given_up[worker] += 1
            self.given_up_nbytes[worker] += nbytes
            self.lost[worker] += key not in self.scheduler.tasks

    # -- data ----------------------------------------------------------------------------------------------------------

    def sole(self) -> list[TaskState]:
        """Return the tasks whose results only leaving workers hold.

        Returns
        -------
        list of TaskState
            The tasks, each once, in no particular order.
        """
        leaving = self.present()
        return list({ts for ws in leaving for ts in ws.has_what if holders(ts) <= leaving})

    def prune(self) -> bool:
        """Forget, from the end, the keys that have a copy elsewhere or were released; return whether there were any.

        Returns
        -------
        bool
            True when at least one key was forgotten.
        """
        leaving = self.present()
        before = len(self._pending)
        while self._pending and not ((there := holders(self._pending[-1])) and there <= leaving):
            self._pending.pop()
        return len(self._pending) < before

    async def look_for_unsendable(self, tasks: Sequence[TaskState]) -> None:
        """Ask the workers which of their small results cannot be sent; each result is asked for once.

        Parameters
        ----------
        tasks
            Tasks whose results only leaving workers hold.
        """
        by_worker: defaultdict[str, dict[Key, TaskState]] = defaultdict(dict)
        for ts in tasks:
            scattered = ts.run_spec is None  # it was sent before
            if not scattered and ts not in self._asked and ts.get_nbytes() < SMALL and ts.type not in PLAIN:
                self._asked.add(ts)
                by_worker[min(ws.address for ws in holders(ts))][ts.key] = ts
        if by_worker:
            calls = (self.results.unsendable(address, mine) for address, mine in by_worker.items())
            for mine, keys in zip(by_worker.values(), await asyncio.gather(*calls), strict=True):
                self._unsendable.update(mine[key] for key in keys if key in mine)

    def unsendable(self) -> set[TaskState]:
        """Return the tasks whose results only leaving workers hold, and that these cannot send to others."""
        leaving = self.present()
        return {ts for ts in self._unsendable if (there := holders(ts)) and there <= leaving}

    def recipients(self) -> list[WorkerState]:
        """Return the workers that can take data and tasks.

        Returns
        -------
        list of WorkerState
            The running workers that do not leave; paused ones are left out.
        """
        leaving = self.present()
        return [ws for ws in self.scheduler.running if ws not in leaving]

    async def request_all(self) -> None:
        """Ask other workers for copies of all that only leaving workers hold, and that can be sent."""
        await self.look_for_unsendable(self.sole())
        self._pending = self.sole()  # some may have been released meanwhile
        self.request_replicas([ts for ts in self._pending if ts not in self._unsendable])

    def request_replicas(self, tasks: Sequence[TaskState]) -> None:
        """Ask other workers to fetch copies.

        Parameters
        ----------
        tasks
            Tasks whose results are to be copied; nothing is requested while there are no recipients.
        """
        for address, keys in choose_recipients(tasks, self.recipients()).items():
            self.scheduler.request_acquire_replicas(address, keys, stimulus_id=self.stimulus_id)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def hand_over_tasks(self) -> None:
        """Hand tasks that a leaving worker has not begun to others, by work stealing, which asks the worker first.

        Once is not enough: a task that dask was just moving to a leaving worker arrives later, and would stay there,
        because a cordoned worker begins no task.
        """
        stealing: WorkStealing | None = self.scheduler.extensions.get("stealing")
        self._handed_over = monotonic()
        if stealing is None:
            return
        given: Counter[WorkerState] = Counter()  # their state does not show yet what they were given just now
        for ws in self.present():
            for ts in list(ws.processing):
                others = () if ts in ws.executing or ts in ws.long_running else self.takers(ts)
                if others:
                    taker = min(others, key=lambda each: (len(each.processing) + given[each]) / (each.nthreads or 1))
                    given[taker] += 1
                    stealing.move_task_request(ts, ws, taker)

    def takers(self, ts: TaskState) -> list[WorkerState]:
        """Return the other workers that could run a task.

        Parameters
        ----------
        ts
            The task.

        Returns
        -------
        list of WorkerState
            The workers that its restrictions allow; all recipients when none is allowed and the restrictions are loose,
            unless others of its gang are bound to other workers.
        """
        valid, others = self.scheduler.valid_workers(ts), self.recipients()
        fit = [ws for ws in others if valid is None or ws in valid]
        return fit or (others if ts.loose_restrictions and not self.bindings.in_gang(ts) else [])

    def needed_for(self) -> dict[str, list[str]]:
        """Return what the leaving workers are still needed for.

        Returns
        -------
        dict
            Name of a worker -> the names of tasks that it runs or will, of tasks that are bound to it and that others
            wait for, and of what else must end before it leaves; workers that are needed for nothing are left out.
            Tasks that a paused worker has not begun do not count: it will not.
        """
        present = self.present()
        shuffling, unsendable, found = self.shuffling(present), self.unsendable(), {}
        for ws in present:
            tasks = sorted(ts.prefix.name for ts in ws.processing)
            needs = tasks[: self.begun(ws)] if ws.status is Status.paused else tasks
            needs += self.bindings.awaited(ws.address, all_bound=self.all_bound)
            needs += ["a shuffle"] * (ws in shuffling) + ["a call of client.run"] * self.calls.on(ws.address)
            needs += ["a result that cannot be sent"] * any(ws in holders(ts) for ts in unsendable)
            if needs:
                found[str(ws.name)] = needs
        return found

    def shuffling(self, workers: Collection[WorkerState]) -> list[WorkerState]:
        """Return the workers that take part in a shuffle; it begins again when one of them leaves.

        Parameters
        ----------
        workers
            Workers.
        """
        shuffles: SchedulerPlugin | None = self.scheduler.extensions.get("shuffle")
        if shuffles is None:
            return []
        free = shuffles.valid_workers_downscaling(self.scheduler, list(workers))
        return [ws for ws in workers if ws not in free]

    def begun(self, ws: WorkerState) -> int:
        """Count the tasks that a worker has begun, as far as the scheduler knows.

        Parameters
        ----------
        ws
            The worker.

        Returns
        -------
        int
            The number that its heartbeat gave; before it can have given one, at least one for each thread.
        """
        known = len(ws.processing & (ws.executing.keys() | ws.long_running))
        young = monotonic() - self.began < HEARD
        return max(known, min(len(ws.processing), ws.nthreads)) if young else known

    # -- words ---------------------------------------------------------------------------------------------------------

    def progress(
        self, left: float | None = None, needs: Mapping[str, list[str]] | None = None
    ) -> dict[str, NodeProgress]:
        """Return the progress of each worker; bytes are estimated from the number of keys.

        Parameters
        ----------
        left
            Seconds that running tasks have yet; None when data moves.
        needs
            What workers are waited for, see :meth:`needed_for`.

        Returns
        -------
        dict
            Name of a worker -> its progress; no key counts as moved before the tasks have ended.
        """
        drains, present = left is not None, {str(ws.name): ws for ws in self.present()}
        sole = self.keys if drains else Counter(str(ws.name) for ts in self._pending for ws in holders(ts))
        found = {}
        for name in sorted(self.names):
            keys, nbytes = self.keys.get(name, 0), self.nbytes.get(name, 0)
            moved = max(0, keys - sole.get(name, 0))
            found[name] = NodeProgress(
                "drain" if drains else "retire",
                keys=moved,
                all_keys=keys,
                nbytes=nbytes * moved // keys if keys else 0,
                all_nbytes=nbytes,
                tasks=len(present[name].processing) if name in present else 0,
                left=max(left or 0.0, 0.0),
                needs=tuple(sorted(set((needs or {}).get(name, ())))[:NAMED]),
            )
        return found

    def describe(self) -> str:
        """Describe which worker keeps which keys.

        Returns
        -------
        str
            Names of the workers, each with at most three keys and the number of the others.
        """
        leaving = self.present()
        parts = []
        for ws in leaving:
            some = sorted(str(ts.key) for ts in ws.has_what if holders(ts) <= leaving)
            more = f" and {len(some) - 3} more" if len(some) > 3 else ""
            if some:
                parts.append(f"worker {ws.name} keeps {', '.join(some[:3])}{more}")
        return "; ".join(sorted(parts)) or f"{', '.join(sorted(self.names))} could not leave"
