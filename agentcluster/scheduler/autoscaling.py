"""Adaptive scaling: read demand and capacity from the scheduler, and let the planner pack one onto the other.

:class:`Demand` reads the tasks; :class:`Autoscaler` adds what nodes have and could have, calls
:mod:`agentcluster.scheduler.planning.binpacking`, and explains the result; :class:`DemandWatch` wakes an adaptive
cluster when a task has no worker. Nothing is awaited between reading and deciding, so that a decision is about one
moment.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeGuard

from dask.typing import Key
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps
from distributed.scheduler import TaskState

from agentcluster import modes
from agentcluster.errors import by_reason
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import AdaptiveRequest
from agentcluster.scheduler.planning.binpacking import SPARE, Packing, pack, select_hosts
from agentcluster.scheduler.planning.demand import (
    Bounds,
    NodeCapacity,
    ResourceRequest,
    RunningWorker,
    amount,
    kinds,
    total,
)
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.tables import count

#: Greatest number of tasks of a group that are read; the others are assumed to be alike, as dask does.
SAMPLE = 100

#: Greatest number of nodes that are named with one reason; the others are counted.
NAMED = 3

logger = logging.getLogger(__name__)

Resources = frozenset[tuple[str, float]]

#: Workers of a node in a mode, or the reason why it cannot have them.
Offer = modes.Workers | str


class Demand:
    """Demand of the tasks that wait or run in a scheduler now.

    Parameters
    ----------
    scheduler
        The scheduler.
    target_duration
        Seconds within which all tasks should be done.

    Attributes
    ----------
    requests
        One for each set of resources that tasks require. Waiting tasks that are bound to workers or hosts are left out:
        no other worker could run them.
    runs
        Worker name -> position in `requests` -> number of tasks that it has.
    """

    def __init__(self, scheduler: Scheduler, target_duration: float) -> None:
        self._scheduler = scheduler
        self._tasks: defaultdict[Resources, float] = defaultdict(float)
        self._seconds: defaultdict[Resources, float] = defaultdict(float)
        self._example: dict[Resources, tuple[str, str]] = {}
        has: dict[str, dict[Resources, float]] = {}
        for ws in self._scheduler.workers.values():
            has[str(ws.name)] = self._add(ws.processing, len(ws.processing))
        self._add((ts for ts in self._scheduler.unrunnable if not _bound(ts)), None)
        self._add(self._scheduler.queued, len(self._scheduler.queued))
        order = list(self._tasks)
        self.requests = [self._request(each, target_duration) for each in order]
        self.runs = {
            name: {order.index(each): math.ceil(tasks) for each, tasks in groups.items()}
            for name, groups in has.items()
        }

    def _add(self, tasks: Iterable[TaskState], count: int | None) -> dict[Resources, float]:
        """Add tasks, or a sample that stands for `count`; return the number of tasks per set of resources."""
        sample = list(tasks if count is None else islice(tasks, SAMPLE))
        weight = count / len(sample) if count and sample else 1.0
        found: defaultdict[Resources, float] = defaultdict(float)
        for ts in sample:
            required = frozenset((ts.resource_restrictions or {}).items())
            found[required] += weight
            self._tasks[required] += weight
            self._seconds[required] += weight * self._scheduler._get_prefix_duration(ts.prefix)
            self._example.setdefault(required, (str(ts.key), str(ts.prefix.name)))
        return found

    def _request(self, required: Resources, target_duration: float) -> ResourceRequest:
        """Return the request of all tasks that require the same resources."""
        tasks = math.ceil(self._tasks[required])
        slots = min(tasks, max(1, math.ceil(self._seconds[required] / target_duration)))
        return ResourceRequest(dict(required), slots, tasks, *self._example[required])


def _bound(ts: TaskState) -> bool:
    """Return whether a task can run on certain workers or hosts only."""
    return bool((ts.worker_restrictions or ts.host_restrictions) and not ts.loose_restrictions)


#: Seconds for which tasks must have had no worker before users are warned; most wait for a change that is under way.
GRACE = 5.0


class DemandWatch(SchedulerPlugin):
    """Wake calls that wait for tasks without a worker, and warn clients of tasks that nobody is going to run.

    Parameters
    ----------
    scheduler
        The scheduler.
    changes
        Returns whether nodes change just now.
    """

    name = "agentcluster-watch"

    def __init__(self, scheduler: Scheduler, changes: Callable[[], bool]) -> None:
        self._scheduler = scheduler
        self._changes = changes
        self._arrived = asyncio.Event()
        self._waiting = 0
        self._look: asyncio.TimerHandle | None = None
        self._warned: set[Resources] = set()

    def transition(self, key: Key, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Note a task without a worker; dask calls this for each step of each task.

        Parameters
        ----------
        key, start, finish, *args, **kwargs
            As dask passes them.
        """
        if self._waiting and finish in ("no-worker", "queued"):
            self._arrived.set()
        if finish == "no-worker" and self._look is None:
            self._look = asyncio.get_running_loop().call_later(GRACE, self._warn)

    def _warn(self) -> None:
        """Warn, once for each set of resources, of tasks that need some which no worker has."""
        self._look = None
        offered = {name for ws in self._scheduler.workers.values() for name in ws.resources}
        self._warned = {each for each in self._warned if not {name for name, _ in each} <= offered}
        requests = [each for each in Demand(self._scheduler, 1.0).requests if set(each.resources) - offered]
        if not requests:
            return
        if self._changes() or self._waiting:  # adaptive scaling explains itself
            self._look = asyncio.get_running_loop().call_later(GRACE, self._warn)
            return
        for request in requests:
            resources = frozenset(request.resources.items())
            if resources not in self._warned:
                self._warned.add(resources)
                lacking = ", ".join(sorted(set(request.resources) - offered))
                text = (
                    f"{describe(request)}, and no worker has {lacking}: a mode with such workers gives it, as auto-gpu "
                    f"does GPU, or the option resources of any mode"
                )
                logger.warning("%s", text)
                # The topic and the form of dask's own warn(), which clients show.
                self._scheduler.log_event("warn", {"message": dumps(text), "category": dumps(UserWarning)})

    async def wait(self, timeout: float) -> bool:
        """Wait for a task that no worker can take now.

        Parameters
        ----------
        timeout
            Seconds to wait.

        Returns
        -------
        bool
            Whether there was one within `timeout`.
        """
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
            self._arrived.clear()


class Autoscaler:
    """Decide which workers present tasks need, and explain demand that cannot be met.

    The workers of a node in a mode are planned once, and again when its hardware has changed.
    """

    def __init__(self) -> None:
        self._offers: dict[tuple[str, str], tuple[Hardware, Offer]] = {}

    def decide(
        self, scheduler: Scheduler, nodes: Sequence[Node], asked: AdaptiveRequest, nbytes: Mapping[str, int]
    ) -> tuple[Packing, dict[str, Any]]:
        """Pack the scheduler's demand onto nodes.

        Parameters
        ----------
        scheduler
            The scheduler with the tasks.
        nodes
            The nodes.
        asked
            Limits, resource requests, and the workers that may leave.
        nbytes
            Worker name -> bytes of data that it holds.

        Returns
        -------
        Packing
            The workers that come and leave.
        dict
            Facts about the decision, see :meth:`agentcluster.scheduler.controller.Controller.adapt`.
        """
        demand = Demand(scheduler, asked.target_duration)
        requested = {name: ResourceRequest({name: 1}, number) for name, number in sorted(asked.requests.items())}
        requests = [*demand.requests, *requested.values()]
        capacities = [self._capacity(node, asked, demand, nbytes) for node in nodes]
        bounds = Bounds.of(asked)
        # The planner leaves busy workers where they are, also beyond limits that have become smaller since they came.
        surplus = beyond_limits(capacities, bounds)
        capacities = [_without(each, surplus) for each in capacities] if surplus else capacities
        may_go = frozenset[str]() if surplus else frozenset(asked.may_go)
        packing = pack(requests, capacities, bounds, may_go.__contains__)
        if_all_may_leave = pack(requests, capacities, bounds)
        launch = select_hosts(
            asked,
            requests,
            next((node.hardware for node in reversed(nodes)), None),
            lambda name, hardware: self._capacity_of_host(name, hardware, asked, nodes),
            lambda more: pack(requests, [*capacities, *more], bounds) if more else packing,
        )
        waits = bool(packing.add or packing.modes or launch) and not asked.may_come
        unmet = {_key(each): self._explain(each, nodes, asked) for each in packing.unmet if not launch}
        granted = {
            name: unmet.get(_key(request)) or (index not in packing.missing and not waits)
            for index, (name, request) in enumerate(requested.items(), len(demand.requests))
        }
        add = {node.name: self._without_host_resources(packing, node, asked.modes) for node in nodes}
        self._forget_all_but({*asked.reserve, *(node.name for node in nodes)})
        idle = {*if_all_may_leave.remove, *if_all_may_leave.modes} - {*packing.remove, *packing.modes}
        add = {name: specs for name, specs in add.items() if name in packing.add}
        return replace(packing, add=add, remove=packing.remove | surplus), {
            "saw": "; ".join(map(describe, requests)) or "no tasks",
            "could_go": sorted(idle),
            "unmet": unmet,
            "short": [describe(requests[i]) for i in packing.missing if requests[i] not in packing.unmet],
            "requests": granted,
            "waits": waits,
            "launch": launch if asked.may_come else (),
        }

    # -- capacity ------------------------------------------------------------------------------------------------------

    def _capacity(self, node: Node, asked: AdaptiveRequest, demand: Demand, nbytes: Mapping[str, int]) -> NodeCapacity:
        """Return the workers that a node has, and those that it could have."""
        offers = {label(mode): self._offer(node, mode) for mode in asked.modes or [node.plan.mode]}
        workers = {
            name: RunningWorker(_with_host_resources(node, [spec])[0], nbytes.get(name, 0), demand.runs.get(name, {}))
            for name, spec in node.plan.workers.items()
        }
        possible = {name: _with_host_resources(node, offer) for name, offer in offers.items() if _possible(offer)}
        return NodeCapacity(node.name, label(node.plan.mode), workers, possible, node.name in asked.extra)

    def _capacity_of_host(
        self, name: str, hardware: Hardware, asked: AdaptiveRequest, nodes: Sequence[Node]
    ) -> NodeCapacity:
        """Return the workers that a standby host could have."""
        allowed = asked.modes or [nodes[-1].plan.mode if nodes else Mode("auto-cpu")]
        offers = {label(mode): self._offer_of_host(mode, hardware, name) for mode in allowed}
        possible = {key: offer for key, offer in offers.items() if _possible(offer)}
        return NodeCapacity(name, next(iter(possible), ""), {}, possible, extra=True)

    def _offer(self, node: Node, mode: Mode) -> Offer:
        """Return the workers of a node in a mode."""
        return self._offer_of_host(mode, node.hardware, node.name)

    def _offer_of_host(self, mode: Mode, hardware: Hardware, name: str) -> Offer:
        """Return the workers of a host in a mode."""
        key = name, label(mode)
        known = self._offers.get(key)
        if known is not None and known[0] == hardware:
            return known[1]
        offer = modes.try_plan(mode, hardware, node=name)
        self._offers[key] = hardware, offer
        return offer

    def _forget_all_but(self, names: Collection[str]) -> None:
        """Drop the offers of hosts that left."""
        self._offers = {key: offer for key, offer in self._offers.items() if key[0] in names}

    def _without_host_resources(self, packing: Packing, node: Node, allowed: Sequence[Mode]) -> tuple[WorkerSpec, ...]:
        """Return the workers that come to a node as their mode has them; their host adds its resources itself."""
        wanted = packing.modes.get(node.name, label(node.plan.mode))
        mode = next((mode for mode in allowed if label(mode) == wanted), node.plan.mode)
        offer = self._offer(node, mode)
        if not _possible(offer):
            return ()
        offered = _with_host_resources(node, offer)
        return tuple(offer[offered.index(spec)] for spec in packing.add.get(node.name, ()))

    # -- explanations --------------------------------------------------------------------------------------------------

    def _explain(self, request: ResourceRequest, nodes: Sequence[Node], asked: AdaptiveRequest) -> str:
        """Explain why no node can ever satisfy a request."""
        why = [(node.name, self._reason(request, node, asked.modes or [node.plan.mode])) for node in nodes]
        why += [(name, "a standby host that would not have it either") for name in asked.reserve]
        example = f" ({request.example})" if request.example else ""
        return f"{describe(request)}{example}, which no node has: {'; '.join(by_reason(why, NAMED)) or 'there is none'}"

    def _reason(self, request: ResourceRequest, node: Node, allowed: Sequence[Mode]) -> str:
        """Return the reason why a node cannot satisfy a request, if possible with a remedy."""
        named = [mode.name for mode in allowed]
        others = [Mode(name) for name in ("auto-cpu", "auto-gpu", "mixed") if name not in named]
        for mode in others:
            offer = self._offer(node, mode)
            if _possible(offer) and any(map(request.slots_on, _with_host_resources(node, offer))):
                return f"it could in mode {mode.name!r}: adapt(modes={[*named, mode.name]})"
        gpu = self._offer(node, Mode("auto-gpu"))
        if "GPU" in request.resources and isinstance(gpu, str):
            return gpu
        offers = [_with_host_resources(node, offer) for mode in allowed if _possible(offer := self._offer(node, mode))]
        missing = [
            name for name in request.resources if not any(name in spec.resources for each in offers for spec in each)
        ]
        if missing:
            return f"no worker has {missing[0]}; a mode's option resources={{{missing[0]!r}: …}} gives it to them"
        return "no worker has enough"


def beyond_limits(nodes: Sequence[NodeCapacity], bounds: Bounds) -> frozenset[str]:
    """Select the workers that run beyond upper limits: those with fewest tasks, and of those with least data.

    Parameters
    ----------
    nodes
        The nodes with their workers.
    bounds
        The limits.

    Returns
    -------
    frozenset of str
        Names of the workers; none that the others have too little memory to take the data of.
    """
    running = {name: worker for node in nodes for name, worker in node.workers.items()}
    if not any(map(any, _excess([worker.spec for worker in running.values()], bounds))):
        return frozenset()  # as nearly always: nothing else is computed
    data = sum(worker.nbytes for worker in running.values())
    stay = dict(running)
    for name in sorted(running, key=lambda name: (sum(running[name].tasks.values()), running[name].nbytes)):
        excess, full = _excess([worker.spec for worker in stay.values()], bounds)
        if not any(excess) and not full:
            break
        spec = running[name].spec
        helps = any(part and over for part, over in zip(amount(spec), excess, strict=True)) or full & kinds(spec)
        others = [worker.spec.memory_limit for other, worker in stay.items() if other != name]
        enough = not data or (others and (not all(others) or sum(filter(None, others)) >= SPARE * data))
        if helps and enough:
            del stay[name]
    return frozenset(running.keys() - stay.keys())


def _excess(specs: Sequence[WorkerSpec], bounds: Bounds) -> tuple[list[bool], set[str]]:
    """Return which of the amounts, and which kinds, are beyond their upper limits."""
    have = total(map(amount, specs), len(bounds.most))
    numbers = Counter(kind for spec in specs for kind in kinds(spec)) if bounds.kinds else {}
    full = {kind for kind, (_, most) in bounds.kinds.items() if numbers.get(kind, 0) > most}
    return [part > most for part, most in zip(have, bounds.most, strict=True)], full


def _without(node: NodeCapacity, names: Collection[str]) -> NodeCapacity:
    """Return a node without some of its workers."""
    return replace(node, workers={name: worker for name, worker in node.workers.items() if name not in names})


def _possible(offer: Offer) -> TypeGuard[tuple[WorkerSpec, ...]]:
    """Return whether an offer has workers, and is not a reason why there are none."""
    return not isinstance(offer, str)


def _with_host_resources(node: Node, specs: Sequence[WorkerSpec]) -> tuple[WorkerSpec, ...]:
    """Return workers with the resources that their host adds to theirs."""
    if not node.resources:
        return tuple(specs)
    return tuple(replace(spec, resources=node.offers(spec)) for spec in specs)


def _key(request: ResourceRequest) -> str:
    """Return the resources of a request as a key of the answer."""
    return str(sorted(request.resources.items()))


def describe(request: ResourceRequest) -> str:
    """Describe the demand of tasks, as in "60 'train' tasks need GPU=1".

    Parameters
    ----------
    request
        Their request.
    """
    what = ", ".join(f"{name}={amount:g}" for name, amount in sorted(request.resources.items())) or "any worker"
    if not request.tasks:
        return f"a request for {count(request.slots, 'task')} with {what}"
    if request.tasks > 1:
        return f"{request.tasks} {request.name!r} tasks need {what}"
    return f"a {request.name!r} task needs {what}"


def label(mode: Mode) -> str:
    """Return the name of a mode within a decision: a mode with other options is another one.

    Parameters
    ----------
    mode
        The mode.
    """
    return f"{mode.name} {dict(mode.config)}" if mode.config else mode.name
