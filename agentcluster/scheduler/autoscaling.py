"""What a scheduler's tasks need, and what its nodes have and could have, as the values that :mod:`fitting` takes."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from agentcluster import modes
from agentcluster.errors import ConfigError, ModeRefused
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import AdaptiveRequest
from agentcluster.scheduler.planning.binpacking import Fit, called_up, fitted
from agentcluster.scheduler.planning.demand import Bounds, Need, Seat, Spot
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.tables import count

#: Of tasks that wait together, how many are looked at; the others are taken to be like them, as dask does.
SAMPLE = 100

Resources = frozenset[tuple[str, float]]


class Demand:
    """What the tasks of a scheduler need now.

    Parameters
    ----------
    scheduler
        The scheduler.
    target_duration
        Seconds within which all that is to do should be done.

    Attributes
    ----------
    needs
        One for each set of resources that tasks ask for. Tasks that are bound to workers or hosts are left out: no
        other worker could run them.
    runs
        Worker name -> position in `needs` -> number of tasks that it has.
    """

    def __init__(self, scheduler: Scheduler, target_duration: float) -> None:
        self._scheduler: Any = scheduler
        self._tasks: defaultdict[Resources, float] = defaultdict(float)
        self._seconds: defaultdict[Resources, float] = defaultdict(float)
        self._example: dict[Resources, tuple[str, str]] = {}
        has: dict[str, dict[Resources, float]] = {}
        for ws in self._scheduler.workers.values():
            has[str(ws.name)] = self._add(ws.processing, len(ws.processing))
        self._add((ts for ts in self._scheduler.unrunnable if not _bound(ts)), None)
        self._add(self._scheduler.queued, len(self._scheduler.queued))
        order = list(self._tasks)
        self.needs = [self._need(each, target_duration) for each in order]
        self.runs = {
            name: {order.index(each): math.ceil(tasks) for each, tasks in groups.items()}
            for name, groups in has.items()
        }

    def _add(self, tasks: Iterable[Any], count: int | None) -> dict[Resources, float]:
        """Add tasks, or a sample of so many, to what is needed; return how many ask for what."""
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

    def _need(self, asked: Resources, target_duration: float) -> Need:
        tasks = math.ceil(self._tasks[asked])
        slots = min(tasks, max(1, math.ceil(self._seconds[asked] / target_duration)))
        return Need(dict(asked), slots, tasks, *self._example[asked])


def _bound(ts: Any) -> bool:
    return bool((ts.worker_restrictions or ts.host_restrictions) and not ts.loose_restrictions)


class Watch(SchedulerPlugin):
    """Hears of tasks that wait because there is no worker for them, for as long as somebody wants to know."""

    name = "agentcluster-watch"

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._listeners = 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Hear of a task; called for each step of each one."""
        if self._listeners and finish in ("no-worker", "queued"):
            self._news.set()

    async def news(self, timeout: float) -> bool:
        """Return whether there was such a task within `timeout` seconds."""
        self._listeners += 1
        try:
            async with asyncio.timeout(timeout):
                await self._news.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._listeners -= 1
            self._news.clear()


class Offers:
    """What nodes could have in the modes that they may have; planned once for each."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Any, tuple[WorkerSpec, ...] | str]] = {}

    def look(
        self, scheduler: Scheduler, nodes: Sequence[Node], asked: AdaptiveRequest, nbytes: Mapping[str, int]
    ) -> tuple[Fit, dict[str, Any]]:
        """Return which workers tasks need, and what there is to say of it.

        Parameters
        ----------
        scheduler
            The scheduler with the tasks.
        nodes
            The nodes.
        asked
            The limits, and who may go.
        nbytes
            Worker -> bytes of data that it holds.
        """
        demand = Demand(scheduler, asked.target_duration)
        requests = {name: Need({name: 1}, count) for name, count in sorted(asked.requests.items())}
        needs = [*demand.needs, *requests.values()]
        spots = [self.spot(node, asked, demand, nbytes) for node in nodes]
        bounds, may_go = Bounds.of(asked), set(asked.may_go)
        fit = fitted(needs, spots, bounds, may_go.__contains__)
        later = fitted(needs, spots, bounds)
        launch = called_up(
            asked,
            needs,
            next((node.hardware for node in reversed(nodes)), None),
            lambda name, hardware: self._unseen(name, hardware, asked, nodes),
            lambda more: fitted(needs, [*spots, *more], bounds) if more else fit,
        )
        waits = bool(fit.come or fit.modes or launch) and not asked.may_come
        unmet = {_resources(need): self.explain(need, nodes, asked) for need in fit.unmet if not launch}
        held = {
            name: unmet.get(_resources(need)) or (index not in fit.short and not waits)
            for index, (name, need) in enumerate(requests.items(), len(demand.needs))
        }
        come = {node.name: self._come(fit, node, asked.modes) for node in nodes if node.name in fit.come}
        return replace(fit, come=come), {
            "saw": "; ".join(map(wants, needs)) or "no tasks",
            "could_go": sorted({*later.go, *later.modes} - {*fit.go, *fit.modes}),
            "unmet": unmet,
            "short": [wants(needs[index]) for index in fit.short if needs[index] not in fit.unmet],
            "requests": held,
            "waits": waits,
            "launch": launch if asked.may_come else (),
        }

    def _unseen(self, name: str, hardware: Hardware, asked: AdaptiveRequest, nodes: Sequence[Node]) -> Spot:
        """Return a host that may be launched as :mod:`fitting` takes it."""
        allowed = asked.modes or [nodes[-1].plan.mode if nodes else Mode("auto-cpu")]
        plans = {label(mode): self._planned(mode, hardware, name) for mode in allowed}
        offers = {key: plan for key, plan in plans.items() if not isinstance(plan, str)}
        return Spot(name, next(iter(offers), ""), {}, offers, extra=True)

    def plan(self, node: Node, mode: Mode) -> tuple[WorkerSpec, ...] | str:
        """Return the workers of a node in a mode, or why it cannot have them."""
        return self._planned(mode, node.hardware, node.name)

    def _planned(self, mode: Mode, hardware: Hardware, name: str) -> tuple[WorkerSpec, ...] | str:
        key = name, label(mode)
        known = self._known.get(key)
        if known is None or known[0] != hardware:
            try:
                found: tuple[WorkerSpec, ...] | str = modes.plan(mode, hardware, node=name)
            except ConfigError as error:
                found = error.reason if isinstance(error, ModeRefused) else str(error)
            self._known[key] = known = (hardware, found)
        return known[1]

    def spot(self, node: Node, asked: AdaptiveRequest, demand: Demand, nbytes: Mapping[str, int]) -> Spot:
        """Return a node as :mod:`fitting` takes it."""
        plans = {label(mode): self.plan(node, mode) for mode in asked.modes or [node.plan.mode]}
        seats = {
            name: Seat(_offering(node, [spec])[0], nbytes.get(name, 0), demand.runs.get(name, {}))
            for name, spec in node.plan.workers.items()
        }
        offers = {name: _offering(node, plan) for name, plan in plans.items() if not isinstance(plan, str)}
        return Spot(node.name, label(node.plan.mode), seats, offers, node.name in asked.extra)

    def _come(self, fit: Fit, node: Node, allowed: Sequence[Mode]) -> tuple[WorkerSpec, ...]:
        """Return the workers that come as their mode has them: without what their host gives them anyway."""
        wanted = fit.modes.get(node.name, label(node.plan.mode))
        mode = next((mode for mode in allowed if label(mode) == wanted), node.plan.mode)
        plan = self.plan(node, mode)
        assert not isinstance(plan, str)
        offered = _offering(node, plan)
        return tuple(plan[offered.index(spec)] for spec in fit.come[node.name])

    def explain(self, need: Need, nodes: Sequence[Node], asked: AdaptiveRequest) -> str:
        """Say of tasks that nobody can run what they need, and why no node has it."""
        why = [(node.name, self._why(need, node, asked.modes or [node.plan.mode])) for node in nodes]
        why += [(name, "a host in standby that would not have it either") for name in asked.reserve]
        example = f" ({need.example})" if need.example else ""
        return f"{wants(need)}{example}, which no node has: {by_reason(why) or 'there is none'}"

    def _why(self, need: Need, node: Node, allowed: Sequence[Mode]) -> str:
        named = [mode.name for mode in allowed]
        others = [Mode(name) for name in ("auto-cpu", "auto-gpu", "mixed") if name not in named]
        for mode in others:
            plan = self.plan(node, mode)
            if not isinstance(plan, str) and any(map(need.fits, _offering(node, plan))):
                return f"it could in mode {mode.name!r}: adapt(modes={[*named, mode.name]})"
        gpu = self.plan(node, Mode("auto-gpu"))
        if "GPU" in need.resources and isinstance(gpu, str):
            return gpu
        plans = [_offering(node, plan) for mode in allowed if not isinstance(plan := self.plan(node, mode), str)]
        missing = [
            name for name in need.resources if not any(name in spec.resources for plan in plans for spec in plan)
        ]
        if missing:
            return f"no worker has {missing[0]}; a mode's option resources={{{missing[0]!r}: …}} gives it to them"
        return "no worker has so much"


def _offering(node: Node, plan: Sequence[WorkerSpec]) -> tuple[WorkerSpec, ...]:
    """Return workers with the resources that their host gives them too."""
    if not node.resources:
        return tuple(plan)
    return tuple(replace(spec, resources=node.offers(spec)) for spec in plan)


def _resources(need: Need) -> str:
    return str(sorted(need.resources.items()))


def by_reason(why: Iterable[tuple[str, str]]) -> str:
    """Say of each node why, nodes of one reason together."""
    groups: dict[str, list[str]] = {}
    for node, reason in why:
        groups.setdefault(reason, []).append(node)
    return "; ".join(
        f"{', '.join(nodes[:3])}{f' and {len(nodes) - 3} more' if len(nodes) > 3 else ''}: {reason}"
        for reason, nodes in groups.items()
    )


def wants(need: Need) -> str:
    """Say what tasks need, as in "60 'train' tasks need GPU=1"."""
    what = ", ".join(f"{name}={amount:g}" for name, amount in sorted(need.resources.items())) or "any worker"
    if not need.tasks:
        return f"a request for {count(need.slots, 'task')} with {what}"
    return f"{need.tasks} {need.name!r} tasks need {what}" if need.tasks > 1 else f"a {need.name!r} task needs {what}"


def label(mode: Mode) -> str:
    """Return what a mode is called in a :class:`Spot`: other options make it another."""
    return f"{mode.name} {dict(mode.config)}" if mode.config else mode.name
