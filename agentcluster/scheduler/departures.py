"""Workers that leave: the tasks that are bound to them, the calls on their way to them, and what they still say.

- :class:`Bindings`. ``client.submit(…, workers=[address])`` binds a task to a worker, and dask leaves it without a
  worker for ever when that one has gone. Here it is bound to the worker's successors on the same node instead, and
  ``workers=["node"]`` means the workers of a node. A worker that drains still takes the tasks that may run nowhere
  else: tasks of a training wait for each other.
- :class:`CallsInFlight`. A worker is not removed while data is sent to it, or ``client.run`` runs on it.
- :class:`SendableResults`. A worker is not removed while it has a result that cannot be sent and is still needed.
- :class:`LateMessages`. A worker is out of the scheduler some milliseconds before its process ends; what it says in
  between, dask takes for a fault.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from dask.typing import Key
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.metrics import monotonic, time
from distributed.protocol.pickle import dumps
from distributed.scheduler import TaskState, WorkerState

from agentcluster.errors import ConfigError
from agentcluster.scheduler.planning.change import Departed, Lineage
from agentcluster.scheduler.planning.nodes import Registry
from agentcluster.wire import tell_unsendable

logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

#: Keys of ``Scheduler.extensions`` under which :class:`Bindings`, :class:`CallsInFlight`, :class:`SendableResults` are.
BINDINGS, CALLS, RESULTS = "agentcluster-bindings", "agentcluster-calls", "agentcluster-results"

#: Start of the stimulus of a worker that a change removes.
STIMULUS = "agentcluster-evacuate-"

#: States of a task that no worker has, and of one that has not ended.
UNPLACED = ("waiting", "queued", "no-worker")
UNFINISHED = (*UNPLACED, "processing")

#: Seconds that a worker has to say which of its results cannot be sent.
ASKED = 5.0

#: Seconds for which a removed worker is answered; its agent ends its process much sooner.
LATE = 60.0


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binding:
    """Workers that a user bound a task to.

    Attributes
    ----------
    workers
        Addresses of workers.
    nodes
        Names of nodes: any of their workers.
    hosts
        Other texts, which dask takes for hosts.
    """

    workers: frozenset[str]
    nodes: frozenset[str]
    hosts: frozenset[str]


class Bindings(SchedulerPlugin):
    """Tasks that are bound to workers of nodes.

    What the user asked for is kept beside the task; the restrictions that dask reads are computed from it whenever a
    worker comes, leaves, or stops taking tasks. Tasks are found by the workers and nodes that they are bound to, so
    that a change costs only as much as it has bound tasks.

    Parameters
    ----------
    scheduler, registry
        The scheduler and its nodes.

    Attributes
    ----------
    tasks
        Bound task -> what its user bound it to.
    draining
        Workers that take only the tasks that may run nowhere else.
    closed
        Workers that take no tasks, and leave.
    """

    name = BINDINGS

    def __init__(self, scheduler: Scheduler, registry: Registry) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self.draining: set[WorkerState] = set()
        self.closed: set[WorkerState] = set()
        self._lineage = Lineage()
        self.tasks: WeakKeyDictionary[TaskState, Binding] = WeakKeyDictionary()
        self._bound_to: defaultdict[str, WeakSet[TaskState]] = defaultdict(WeakSet)
        # Name of tasks -> the one worker that each of them is bound to -> the tasks.
        self._gangs: defaultdict[str, defaultdict[str, WeakSet[TaskState]]] = defaultdict(lambda: defaultdict(WeakSet))
        self._leaving: dict[str, list[str]] = {}
        self._came: dict[str, tuple[str, ...]] = {}
        self._valid_workers: Callable[[TaskState], set[WorkerState] | None] = scheduler.valid_workers

    # -- doors ---------------------------------------------------------------------------------------------------------

    def drain(self, workers: Iterable[WorkerState]) -> None:
        """Let workers take only the tasks that may run nowhere else.

        Parameters
        ----------
        workers
            The workers; the scheduler does not count them as running.
        """
        self.draining.update(workers)

    def cordon(self, workers: Collection[WorkerState]) -> None:
        """Bind the tasks of workers that leave, and those that come for them, to their successors.

        Parameters
        ----------
        workers
            The workers.
        """
        self.draining.difference_update(workers)
        self.closed.update(workers)
        self._follow(ws.address for ws in workers)

    def uncordon(self, workers: Collection[WorkerState]) -> None:
        """Let workers that stay take all tasks again; those that were bound to them are again.

        Parameters
        ----------
        workers
            The workers.
        """
        self.draining.difference_update(workers)
        self.closed.difference_update(workers)
        self._follow(ws.address for ws in workers)

    def valid_workers(self, ts: TaskState) -> set[WorkerState] | None:
        """Return the workers that a task may run on, like ``Scheduler.valid_workers``.

        Parameters
        ----------
        ts
            The task.

        Returns
        -------
        set of WorkerState or None
            Workers that drain are among them where no other worker is valid, and where a task needs the result that a
            bound task has left there; None when all running workers are.
        """
        valid = self._valid_workers(ts)
        if not self.draining or valid:
            return valid
        if valid is None:
            return self._beside_result(ts)
        added = self.draining - self.scheduler.running
        self.scheduler.running |= added
        try:
            return self._valid_workers(ts)
        finally:
            self.scheduler.running -= added

    def _beside_result(self, ts: TaskState) -> set[WorkerState] | None:
        """Return the worker that drains and alone has the result of a bound task, for a task that needs that.

        LightGBM, for one, hands a socket from task to task in this way, which no other worker could have.
        """
        for needed in ts.dependencies:
            if needed in self.tasks and needed.who_has and needed.who_has <= self.draining:
                return set(needed.who_has)
        return None

    # -- workers that come and leave -----------------------------------------------------------------------------------

    def leave(self, node: str, names: Sequence[str]) -> None:
        """Note that workers of a node leave.

        Parameters
        ----------
        node
            Name of the node.
        names
            Names of the workers, in the order of their slots.
        """
        by_name = self._by_name()
        leaving = [(name, by_name[name].address) for name in names if name in by_name]
        for name, address in leaving:
            self._lineage.leave(address, name, node)
        self._leaving[node] = [address for _, address in leaving]

    def arrive(self, node: str, names: Sequence[str]) -> None:
        """Note that workers of a node are there, in place of those that left last.

        Parameters
        ----------
        node
            Name of the node.
        names
            Names of the workers, in the order of their slots.
        """
        by_name = self._by_name()
        there = [by_name[name].address for name in names if name in by_name]
        self._came[node] = tuple(names)
        self._lineage.succeed(self._leaving.pop(node, []), there)
        self._follow([node, *self._lineage.of_node(node)])

    def remove_worker(self, scheduler: Scheduler, worker: str, **facts: object) -> None:
        """Bind the tasks of a worker that is gone to its successors, if there are any.

        Parameters
        ----------
        scheduler, worker, **facts
            As dask passes them.
        """
        self.draining = {ws for ws in self.draining if ws.address != worker}
        self.closed = {ws for ws in self.closed if ws.address != worker}
        if self._lineage.departed(worker) is None and (found := self._owner(worker)):
            self._lineage.leave(worker, *found)  # it crashed; its nanny may restart it
        self._follow([worker])
        self._forget_empty()

    def _forget_empty(self) -> None:
        """Forget places to which no task is bound, and nodes that left."""
        for place in [place for place, tasks in self._bound_to.items() if not tasks]:
            del self._bound_to[place]
        for name in [name for name, gang in self._gangs.items() if not any(gang.values())]:
            del self._gangs[name]
        for node in self._came.keys() - self.registry.nodes.keys():
            del self._came[node]

    def joined(self, name: str) -> None:
        """Bind the tasks of a worker that its nanny has restarted, under another address, to it.

        Parameters
        ----------
        name
            Name of the worker.
        """
        if before := self._lineage.named(name):
            self._follow([before])

    def _owner(self, address: str) -> tuple[str, str] | None:
        """Return the names of a worker and of its node, as its agent reported them."""
        for node in self.registry.nodes.values():
            for state in node.workers.values():
                if state.address == address:
                    return state.name, node.name
        return None

    def _by_name(self) -> dict[str, WorkerState]:
        return {str(ws.name): ws for ws in self.scheduler.workers.values()}

    def _of_node(self, node: str) -> list[str]:
        """Return the addresses of the workers that a node has."""
        if node not in self.registry.nodes:
            return []
        names = {*self.registry.nodes[node].plan.workers, *self._came.get(node, ())}
        return [ws.address for name, ws in self._by_name().items() if name in names]

    def _is_open(self, address: str) -> bool:
        ws = self.scheduler.workers.get(address)
        return ws is not None and ws not in self.closed

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def update_graph(
        self, scheduler: Scheduler, *, annotations: Mapping[str, Mapping[Key, object]], **facts: object
    ) -> None:
        """Note the workers that new tasks are bound to, and bind them to the successors of those that are gone.

        Parameters
        ----------
        scheduler, annotations, **facts
            As dask passes them, before it chooses workers for the tasks.
        """
        for annotation in ("workers", "restrictions"):
            for key in annotations.get(annotation, ()):
                self._bind(scheduler.tasks[key])

    def _bind(self, ts: TaskState) -> None:
        """Keep what a user bound a task to, and compute what dask is to read."""
        workers = set(ts.worker_restrictions or ())
        nodes, hosts = set(), set()
        for host in ts.host_restrictions or ():
            if address := self._lineage.named(host):
                workers.add(address)
            elif host in self.registry.nodes:
                nodes.add(host)
            else:
                hosts.add(host)
        binding = self.tasks[ts] = Binding(frozenset(workers), frozenset(nodes), frozenset(hosts))
        if _Joins.name not in self.scheduler.plugins:
            self.scheduler.add_plugin(_Joins(self))
        for place in itertools.chain(workers, nodes):
            self._bound_to[place].add(ts)
        if len(workers) == 1 and not nodes and not hosts:
            self._gangs[ts.prefix.name][min(workers)].add(ts)
        self._restrict(ts, binding)

    def _restrict(self, ts: TaskState, binding: Binding) -> bool:
        """Write the restrictions of a task; return whether they are others than before."""
        if ts.annotations and "shuffle_original_restrictions" in ts.annotations:
            return False  # dask binds it for a shuffle, which begins again where a worker of it leaves
        found: set[str] = set()
        for address in binding.workers:
            found |= self.resolve(address) or {address}
        for node in binding.nodes:
            found |= set(self._of_node(node))
        # Without a worker of the node it waits for one.
        hosts = binding.hosts if found or not binding.nodes else binding.hosts | binding.nodes
        before = ts.worker_restrictions, ts.host_restrictions
        ts.worker_restrictions, ts.host_restrictions = found or None, set(hosts) or None
        for address in found - binding.workers:
            self._bound_to[address].add(ts)
        return before != (ts.worker_restrictions, ts.host_restrictions)

    def resolve(self, address: str) -> frozenset[str]:
        """Return the workers that a task bound to an address may run on.

        Parameters
        ----------
        address
            Address of a worker that is there or has gone.

        Returns
        -------
        frozenset of str
            Addresses; empty when the worker has gone and nothing came in its place.
        """
        return self._lineage.resolve(address, self._is_open, self._in_place_of)

    def _in_place_of(self, departed: Departed) -> list[str]:
        """Return the workers that stand in for one without successors: itself, restarted, or all of its node."""
        again = self.scheduler.aliases.get(departed.name)
        return [again] if again is not None and self._is_open(again) else self._of_node(departed.node)

    def present(self, worker: object) -> Sequence[object]:
        """Return what a user means by a worker: itself, its successors if it has gone, or the workers of a node.

        Parameters
        ----------
        worker
            Address or name of a worker, or name of a node.

        Returns
        -------
        list
            Addresses; the argument itself where nothing is known of it.
        """
        if worker in self.scheduler.workers or worker in self.scheduler.aliases or not isinstance(worker, str):
            return [worker]
        return sorted(self.resolve(self._lineage.named(worker) or worker)) or self._of_node(worker) or [worker]

    def departed(self, address: str) -> str | None:
        """Describe a worker that has gone; return None when there was none at this address.

        Parameters
        ----------
        address
            Address of a worker.
        """
        if (departed := self._lineage.departed(address)) is None:
            return None
        there = ", ".join(sorted(self.resolve(address))) or "nothing"
        return f"{departed.name} of node {departed.node}, in whose place there is {there}"

    def bound_to(self, places: Iterable[str]) -> set[TaskState]:
        """Return the tasks that are bound to workers or to nodes.

        Parameters
        ----------
        places
            Addresses of workers, of those that have gone too, and names of nodes.
        """
        return {ts for place in places if place in self._bound_to for ts in self._bound_to[place]}

    def of_nodes(self, nodes: Iterable[str]) -> set[TaskState]:
        """Return the tasks that are bound to nodes, to their workers, or to those that left them.

        Parameters
        ----------
        nodes
            Names of nodes.
        """
        names = list(nodes)
        return self.bound_to(
            [*names, *itertools.chain.from_iterable((*self._of_node(n), *self._lineage.of_node(n)) for n in names)]
        )

    def following(self, address: str) -> int:
        """Count the unfinished tasks that are bound to the successors of a worker, and not to it.

        Parameters
        ----------
        address
            Address of the worker.
        """
        bound = (ts for ts in self.bound_to([address]) if ts.state in UNFINISHED)
        return sum(1 for ts in bound if ts.worker_restrictions and address not in ts.worker_restrictions)

    def awaited(self, worker: str, *, all_bound: bool) -> list[str]:
        """Return the names of tasks bound to a worker that are not begun, though others of their gang are.

        A gang is the tasks of one name that are bound to one worker each, and not all to the same: those of a
        distributed training wait for each other.

        Parameters
        ----------
        worker
            Address of the worker.
        all_bound
            Whether to count those of no gang too.
        """
        unplaced = [ts for ts in self.bound_to([worker]) if ts.state in UNPLACED]
        if all_bound:
            return [ts.prefix.name for ts in unplaced]
        begun = {name: self._begun(name) for name in {ts.prefix.name for ts in unplaced}}
        return [ts.prefix.name for ts in unplaced if begun[ts.prefix.name] - self.tasks[ts].workers]

    def _begun(self, name: str) -> set[str]:
        """Return the workers that the tasks of a gang which have begun are bound to."""
        gang: Mapping[str, Iterable[TaskState]] = self._gangs.get(name, {})
        return {worker for worker, tasks in gang.items() if any(ts.state == "processing" for ts in tasks)}

    def in_gang(self, ts: TaskState) -> bool:
        """Return whether there are unfinished tasks of the same name that are bound to another worker each.

        Parameters
        ----------
        ts
            The task. XGBoost binds loosely what may not run elsewhere.
        """
        if (binding := self.tasks.get(ts)) is None or len(binding.workers) != 1 or ts.prefix.name not in self._gangs:
            return False
        gang = self._gangs[ts.prefix.name]
        others = (tasks for worker, tasks in gang.items() if worker not in binding.workers)
        return any(each.state in UNFINISHED for tasks in others for each in tasks)

    def _follow(self, places: Iterable[str]) -> None:
        """Bind the tasks that are bound to workers or nodes anew, and start those that wait for a worker."""
        ready: dict[Key, Any] = {}
        for ts in self.bound_to(places):
            if self._restrict(ts, self.tasks[ts]) and ts.state == "no-worker":
                ready[ts.key] = "processing"
        if ready:
            self.scheduler.transitions(ready, f"{BINDINGS}-follow")


class _Joins(SchedulerPlugin):
    """Watch for workers that join; a plugin of the scheduler once a task is bound."""

    name = f"{BINDINGS}-joins"

    def __init__(self, bindings: Bindings) -> None:
        self._bindings = bindings

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        self._bindings.joined(str(scheduler.workers[worker].name))


# -- calls -------------------------------------------------------------------------------------------------------------


class CallsInFlight:
    """Calls on workers that are under way: ``scatter``, whose data is on no worker until it has arrived, and ``run``.

    Parameters
    ----------
    scheduler
        The scheduler, whose own methods are called.
    bindings
        Know the workers that have gone, and those that take no further calls.
    """

    def __init__(self, scheduler: Scheduler, bindings: Bindings) -> None:
        self.scheduler = scheduler
        self._bindings = bindings
        self._calls: dict[asyncio.Future[None], frozenset[str] | None] = {}
        self._scatter: Callable[..., Awaitable[list[Key]]] = scheduler.scatter
        self._broadcast: Callable[..., Awaitable[dict[str, object]]] = scheduler.broadcast

    async def scatter(
        self, data: object, workers: Iterable[object] | None, *args: object, **kwargs: object
    ) -> list[Key]:
        """Call ``Scheduler.scatter``; of workers that have gone the successors get the data.

        Parameters
        ----------
        data, workers, *args, **kwargs
            Arguments of ``Scheduler.scatter``.

        Returns
        -------
        list
            Keys of the data.
        """
        if workers is not None:
            workers = list(itertools.chain.from_iterable(map(self._bindings.present, workers)))
        return await self._tracked(self._scatter(data, workers, *args, **kwargs), None)

    async def broadcast(
        self, *, msg: Mapping[str, object], workers: Collection[str] | None = None, **how: object
    ) -> dict[str, object]:
        """Call ``Scheduler.broadcast``, without the workers that are about to leave unless they are named.

        Parameters
        ----------
        msg, workers, **how
            Arguments of ``Scheduler.broadcast``.

        Returns
        -------
        dict
            Address of a worker -> its answer.

        Raises
        ------
        ConfigError
            When a worker that is named has gone.
        """
        closed = {ws.address for ws in self._bindings.closed}
        if workers is None and not how.get("hosts") and closed:
            workers = [address for address in self.scheduler.workers if address not in closed]
        for address in workers or ():
            if address not in self.scheduler.workers and (found := self._bindings.departed(address)):
                raise ConfigError(f"worker {address} ({found}) has gone; name the workers that are there now")
        asked = frozenset(self.scheduler.workers if workers is None else workers)
        return await self._tracked(self._broadcast(msg=msg, workers=workers, **how), asked)

    async def _tracked(self, call: Awaitable[AnswerT], workers: frozenset[str] | None) -> AnswerT:
        """Await a call; `workers` are those that answer it, None for data that is sent to any."""
        under_way = asyncio.get_running_loop().create_future()
        self._calls[under_way] = workers
        try:
            return await call
        finally:
            del self._calls[under_way]
            under_way.set_result(None)

    def on(self, worker: str) -> int:
        """Count the calls that a worker answers.

        Parameters
        ----------
        worker
            Address of the worker.
        """
        return sum(1 for asked in self._calls.values() if asked is not None and worker in asked)

    async def scattered(self, timeout: float) -> None:
        """Wait until the data that is being sent now has arrived.

        Parameters
        ----------
        timeout
            Greatest number of seconds to wait.
        """
        if scatters := [call for call, asked in self._calls.items() if asked is None]:
            await asyncio.wait(scatters, timeout=timeout)


class SendableResults:
    """Ask workers which of their results cannot be sent to others, such as a socket or a lock.

    That is asked before such a result is fetched: distributed answers a failed fetch in such a way that the next fetch
    on the same connection fails too, and the result of that is never fetched again.

    Parameters
    ----------
    scheduler
        The scheduler.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._asked: dict[str, asyncio.Future[Collection[Key]]] = {}

    async def unsendable(self, address: str, keys: Collection[Key]) -> Collection[Key]:
        """Return the keys whose results a worker cannot send; none when it does not answer.

        Parameters
        ----------
        address
            Address of the worker.
        keys
            Keys of small results that it has.
        """
        answer: asyncio.Future[Collection[Key]] = asyncio.get_running_loop().create_future()
        self._asked[address] = answer
        try:
            async with asyncio.timeout(ASKED):
                call = self.scheduler.rpc(address).run(function=dumps(tell_unsendable), args=dumps((list(keys),)))
                await call
                return await answer
        except (OSError, TimeoutError) as error:
            logger.debug("Worker %s did not say which of its results it cannot send: %r", address, error)
            return ()
        finally:
            self._asked.pop(address, None)

    def told(self, keys: Collection[Key], worker: str) -> None:
        """Receive the answer of a worker.

        Parameters
        ----------
        keys, worker
            As the worker sends them.
        """
        if (answer := self._asked.get(worker)) is not None and not answer.done():
            answer.set_result(keys)


# -- last words --------------------------------------------------------------------------------------------------------


class LateMessages(SchedulerPlugin):
    """Keep the addresses of workers that changes removed, and answer their last messages.

    Parameters
    ----------
    scheduler
        The scheduler.
    """

    name = "agentcluster-late-messages"

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._removed: dict[str, float] = {}
        self._heartbeat: Callable[..., dict[str, object]] = scheduler.handlers["heartbeat_worker"]
        self._refresh_who_has: Callable[..., None] = scheduler.stream_handlers["request-refresh-who-has"]

    def remove_worker(self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **facts: object) -> None:
        """Note that a worker was removed.

        Parameters
        ----------
        scheduler, worker, stimulus_id, **facts
            As dask passes them.
        """
        now = monotonic()
        for address in [address for address, when in self._removed.items() if when < now - LATE]:
            del self._removed[address]
        if stimulus_id.startswith(STIMULUS):
            self._removed[worker] = now

    def is_late(self, address: str) -> bool:
        """Return whether a message is that of a worker which a change has removed.

        Parameters
        ----------
        address
            Address of the worker that sent it.
        """
        removed = self._removed.get(address)
        return removed is not None and address not in self.scheduler.workers and monotonic() < removed + LATE

    def heartbeat_worker(self, *, address: str, **facts: object) -> dict[str, object]:
        """Answer a heartbeat like ``Scheduler.heartbeat_worker``; a worker that was removed is not told to end.

        Parameters
        ----------
        address, **facts
            Arguments of ``Scheduler.heartbeat_worker``.

        Returns
        -------
        dict
            The answer of the scheduler; for a removed worker one that asks for no further heartbeat in time.
        """
        if self.is_late(address):
            return {"status": "OK", "time": time(), "heartbeat-interval": LATE}
        return self._heartbeat(address=address, **facts)

    def refresh_who_has(self, keys: Collection[Key], worker: str, stimulus_id: str) -> None:
        """Tell a worker where keys are, like the scheduler's handler; there is no connection to one that was removed.

        Parameters
        ----------
        keys, worker, stimulus_id
            As the worker sends them.
        """
        if worker in self.scheduler.stream_comms:
            self._refresh_who_has(keys=keys, worker=worker, stimulus_id=stimulus_id)
