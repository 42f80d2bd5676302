"""Adaptive scaling: read the demand of a scheduler's tasks and the capacity of nodes, and call the pure planner.

:mod:`agentcluster.scheduler.planning.binpacking` decides. Nothing is awaited between reading and deciding, so that a
decision is about one moment.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from dask.typing import Key
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from agentcluster import modes
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import AdaptiveRequest
from agentcluster.scheduler.planning.binpacking import Packing, pack, select_hosts
from agentcluster.scheduler.planning.demand import Bounds, NodeCapacity, ResourceRequest, RunningWorker
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.tables import count

#: Number of tasks that are read of those that wait together; the others are taken to be like them, as in dask.
SAMPLE = 100

#: Nodes that are named for one reason; of more only the number is given.
NAMED = 3

Resources = frozenset[tuple[str, float]]


class Demand:
    """Demand of the tasks of a scheduler at this moment.

    Parameters
    ----------
    scheduler
        The scheduler.
    target_duration
        Seconds within which all known work should be done.

    Attributes
    ----------
    requests
        One for each set of resources that tasks ask for. Tasks that are restricted to workers or hosts are left out: no
        other worker could run them.
    running
        Worker name -> position in `requests` -> number of tasks that the worker has.
    """

    def __init__(self, scheduler: Scheduler, target_duration: float) -> None:
        self._scheduler: Any = scheduler
        self._tasks: defaultdict[Resources, float] = defaultdict(float)
        self._seconds: defaultdict[Resources, float] = defaultdict(float)
        self._example: dict[Resources, tuple[str, str]] = {}
        has: dict[str, dict[Resources, float]] = {}
        for ws in self._scheduler.workers.values():
            has[str(ws.name)] = self._add(ws.processing, len(ws.processing))
        self._add((ts for ts in self._scheduler.unrunnable if not _restricted(ts)), None)
        self._add(self._scheduler.queued, len(self._scheduler.queued))
        order = list(self._tasks)
        self.requests = [self._request(each, target_duration) for each in order]
        self.running = {
            name: {order.index(each): math.ceil(tasks) for each, tasks in groups.items()}
            for name, groups in has.items()
        }

    def _add(self, tasks: Iterable[Any], count: int | None) -> dict[Resources, float]:
        """Add tasks, or a sample of `count` of them, to the demand; return their number by resources."""
        sample = list(tasks if count is None else islice(tasks, SAMPLE))
        weight = count / len(sample) if count and sample else 1.0
        found: defaultdict[Resources, float] = defaultdict(float)
        for ts in sample:
            asked = frozenset((ts.resource_restrictions or {}).items())
            found[asked] += weight
            self._tasks[asked] += weight
            self._seconds[asked] += weight * self._scheduler._get_prefix_duration(ts.prefix)
            self._example.setdefault(asked, (str(ts.key), str(ts.prefix.name)))
        return found

    def _request(self, asked: Resources, target_duration: float) -> ResourceRequest:
        tasks = math.ceil(self._tasks[asked])
        slots = min(tasks, max(1, math.ceil(self._seconds[asked] / target_duration)))
        return ResourceRequest(dict(asked), slots, tasks, *self._example[asked])


def _restricted(ts: Any) -> bool:
    """Whether a task may run on some workers or hosts only."""
    return bool((ts.worker_restrictions or ts.host_restrictions) and not ts.loose_restrictions)


class DemandWatch(SchedulerPlugin):
    """Wake calls that wait for tasks without a worker."""

    name = "agentcluster-watch"

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self._waiting = 0

    def transition(self, key: Key, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Note a task without a worker; dask calls this for each step of each task.

        Parameters
        ----------
        key, start, finish, *args, **kwargs
            As dask passes them.
        """
        if self._waiting and finish in ("no-worker", "queued"):
            self._arrived.set()

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
    """Decisions about the workers that tasks need; plans of nodes are kept from one decision to the next."""

    def __init__(self) -> None:
        self._plans: dict[tuple[str, str], tuple[Hardware, modes.Workers | str]] = {}

    def look(
        self, scheduler: Scheduler, nodes: Sequence[Node], asked: AdaptiveRequest, nbytes: Mapping[str, int]
    ) -> tuple[Packing, dict[str, Any]]:
        """Decide which workers the tasks of a scheduler need.

        Parameters
        ----------
        scheduler
            The scheduler with the tasks.
        nodes
            The nodes.
        asked
            The limits, the workers that may leave, and the standby hosts.
        nbytes
            Worker -> bytes of data that it holds.

        Returns
        -------
        Packing, dict
            The decision, and the answer to the client as plain data; see
            :meth:`agentcluster.scheduler.controller.Controller.adapt`.
        """
        demand = Demand(scheduler, asked.target_duration)
        ahead = {name: ResourceRequest({name: 1}, slots) for name, slots in sorted(asked.requests.items())}
        requests = [*demand.requests, *ahead.values()]
        capacities = [self._capacity(node, asked, demand, nbytes) for node in nodes]
        bounds, may_leave = Bounds.of(asked), set(asked.may_go)
        packing = pack(requests, capacities, bounds, may_leave.__contains__)
        later = pack(requests, capacities, bounds)
        launch = select_hosts(
            asked,
            requests,
            next((node.hardware for node in reversed(nodes)), None),
            lambda name, hardware: self._capacity_of_host(name, hardware, asked, nodes),
            lambda more: pack(requests, [*capacities, *more], bounds) if more else packing,
        )
        waits = bool(packing.add or packing.modes or launch) and not asked.may_come
        unmet = {_key(each): self._explain(each, nodes, asked) for each in packing.unmet if not launch}
        answers = {
            name: unmet.get(_key(request)) or (index not in packing.missing and not waits)
            for index, (name, request) in enumerate(ahead.items(), len(demand.requests))
        }
        add = {node.name: self._as_planned(packing, node, asked.modes) for node in nodes if node.name in packing.add}
        return replace(packing, add=add), {
            "saw": "; ".join(map(describe, requests)) or "no tasks",
            "could_go": sorted({*later.remove, *later.modes} - {*packing.remove, *packing.modes}),
            "unmet": unmet,
            "short": [describe(requests[index]) for index in packing.missing if requests[index] not in packing.unmet],
            "requests": answers,
            "waits": waits,
            "launch": launch if asked.may_come else (),
        }

    def _capacity_of_host(
        self, name: str, hardware: Hardware, asked: AdaptiveRequest, nodes: Sequence[Node]
    ) -> NodeCapacity:
        """Return the capacity of a standby host."""
        allowed = asked.modes or [nodes[-1].plan.mode if nodes else Mode("auto-cpu")]
        plans = {label(mode): self._planned(mode, hardware, name) for mode in allowed}
        offers = {key: plan for key, plan in plans.items() if not isinstance(plan, str)}
        return NodeCapacity(name, next(iter(offers), ""), {}, offers, extra=True)

    def _capacity(self, node: Node, asked: AdaptiveRequest, demand: Demand, nbytes: Mapping[str, int]) -> NodeCapacity:
        """Return the capacity of a node; its workers offer the resources of their host too."""
        plans = {label(mode): self._plan(node, mode) for mode in asked.modes or [node.plan.mode]}
        workers = {
            name: RunningWorker(_offering(node, [spec])[0], nbytes.get(name, 0), demand.running.get(name, {}))
            for name, spec in node.plan.workers.items()
        }
        offers = {name: _offering(node, plan) for name, plan in plans.items() if not isinstance(plan, str)}
        return NodeCapacity(node.name, label(node.plan.mode), workers, offers, node.name in asked.extra)

    def _plan(self, node: Node, mode: Mode) -> modes.Workers | str:
        """Return the workers of a node in a mode, or the reason why it cannot have them."""
        return self._planned(mode, node.hardware, node.name)

    def _planned(self, mode: Mode, hardware: Hardware, name: str) -> modes.Workers | str:
        """Return a plan, made once for the same hardware."""
        key = name, label(mode)
        known = self._plans.get(key)
        if known is None or known[0] != hardware:
            self._plans[key] = known = (hardware, modes.try_plan(mode, hardware, node=name))
        return known[1]

    def _as_planned(self, packing: Packing, node: Node, allowed: Sequence[Mode]) -> modes.Workers:
        """Return the workers that come to a node as their mode has them, without the resources of their host."""
        wanted = packing.modes.get(node.name, label(node.plan.mode))
        mode = next((mode for mode in allowed if label(mode) == wanted), node.plan.mode)
        plan = self._plan(node, mode)
        assert not isinstance(plan, str)
        offered = _offering(node, plan)
        return tuple(plan[offered.index(spec)] for spec in packing.add[node.name])

    def _explain(self, request: ResourceRequest, nodes: Sequence[Node], asked: AdaptiveRequest) -> str:
        """Describe a request that no node can serve, with the reason of each node."""
        reasons = [(node.name, self._reason(request, node, asked.modes or [node.plan.mode])) for node in nodes]
        reasons += [(name, "a host in standby that would not have it either") for name in asked.reserve]
        example = f" ({request.example})" if request.example else ""
        return f"{describe(request)}{example}, which no node has: {_by_reason(reasons) or 'there is none'}"

    def _reason(self, request: ResourceRequest, node: Node, allowed: Sequence[Mode]) -> str:
        """Return the reason why a node cannot serve a request, and what would help."""
        named = [mode.name for mode in allowed]
        others = [Mode(name) for name in ("auto-cpu", "auto-gpu", "mixed") if name not in named]
        for mode in others:
            plan = self._plan(node, mode)
            if not isinstance(plan, str) and any(map(request.slots_on, _offering(node, plan))):
                return f"it could in mode {mode.name!r}: adapt(modes={[*named, mode.name]})"
        gpu = self._plan(node, Mode("auto-gpu"))
        if "GPU" in request.resources and isinstance(gpu, str):
            return gpu
        plans = [_offering(node, plan) for mode in allowed if not isinstance(plan := self._plan(node, mode), str)]
        missing = [
            name for name in request.resources if not any(name in spec.resources for plan in plans for spec in plan)
        ]
        if missing:
            return f"no worker has {missing[0]}; a mode's option resources={{{missing[0]!r}: …}} gives it to them"
        return "no worker has so much"


def _offering(node: Node, plan: Sequence[WorkerSpec]) -> modes.Workers:
    """Return workers with the resources that their host offers too."""
    if not node.resources:
        return tuple(plan)
    return tuple(replace(spec, resources=node.offers(spec)) for spec in plan)


def _key(request: ResourceRequest) -> str:
    """Return the key of a request in the answer to the client."""
    return str(sorted(request.resources.items()))


def _by_reason(reasons: Iterable[tuple[str, str]]) -> str:
    """List nodes with their reasons, nodes of one reason together."""
    groups: dict[str, list[str]] = {}
    for node, reason in reasons:
        groups.setdefault(reason, []).append(node)
    return "; ".join(
        f"{', '.join(nodes[:NAMED])}{f' and {len(nodes) - NAMED} more' if len(nodes) > NAMED else ''}: {reason}"
        for reason, nodes in groups.items()
    )


def describe(request: ResourceRequest) -> str:
    """Describe a request, as in "60 'train' tasks need GPU=1".

    Parameters
    ----------
    request
        The request.
    """
    what = ", ".join(f"{name}={amount:g}" for name, amount in sorted(request.resources.items())) or "any worker"
    if not request.tasks:
        return f"a request for {count(request.slots, 'task')} with {what}"
    if request.tasks == 1:
        return f"a {request.name!r} task needs {what}"
    return f"{request.tasks} {request.name!r} tasks need {what}"


def label(mode: Mode) -> str:
    """Return the name of a mode in a :class:`NodeCapacity`; with other options it is another mode.

    Parameters
    ----------
    mode
        The mode.
    """
    return f"{mode.name} {dict(mode.config)}" if mode.config else mode.name
