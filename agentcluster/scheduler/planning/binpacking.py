"""Bin packing of the demand of tasks onto the workers that nodes have and could have.

Pure, greedy and deterministic: :func:`pack` takes resource requests, nodes and bounds, and returns a :class:`Packing`.

1. Tasks that run keep their workers.
2. Each request is served in turn, those first that few nodes can serve, and last those that any worker can: by running
   workers, then by workers added in the modes that nodes have, then by nodes that change their mode.
3. A node without tasks returns to its first mode; before requests that any worker can serve, and again at the end.
4. Workers are kept or added until the lower bounds are met, and while memory is short.
5. Workers that are not used leave, as far as the memory of the others is enough for all data.

Workers are added on the nodes with fewest used workers, so that load is spread; workers with most data are used first,
so that little is moved.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from agentcluster.model import Hardware, WorkerSpec
from agentcluster.modes.options import NANNY
from agentcluster.requests import AdaptiveRequest
from agentcluster.scheduler.planning.change import match_workers
from agentcluster.scheduler.planning.demand import Amount, Bounds, NodeCapacity, ResourceRequest, amount, kinds, total

#: Fraction of the workers' memory in use above which workers are added, as in dask's adaptive scaling.
CROWDED = 0.6

#: Ratio of memory to data below which no worker leaves, and by which workers are added; as in dask's adaptive scaling.
SPARE = 2


@dataclass(frozen=True)
class Packing:
    """Changes that fit workers to demand.

    Attributes
    ----------
    modes
        Node -> the mode that it changes to.
    remove
        Workers that leave nodes that keep their mode.
    add
        Node -> workers that come.
    unmet
        Requests that no node can serve in any mode.
    missing
        Position of a request -> tasks that should run at once and have no capacity now.
    shortfall
        Missing slots and missed lower bounds together, 0 for none; a number only for comparing packings.
    """

    modes: Mapping[str, str]
    remove: frozenset[str]
    add: Mapping[str, tuple[WorkerSpec, ...]]
    unmet: tuple[ResourceRequest, ...]
    missing: Mapping[int, int]
    shortfall: float = 0.0

    @property
    def changes(self) -> bool:
        """Return whether any node changes."""
        return bool(self.modes or self.remove or any(self.add.values()))


def pack(
    requests: Sequence[ResourceRequest],
    nodes: Sequence[NodeCapacity],
    bounds: Bounds,
    may_leave: Callable[[str], bool] = lambda name: True,
) -> Packing:
    """Choose the workers that run.

    Parameters
    ----------
    requests
        Demand of tasks; `RunningWorker.tasks` refers to positions here.
    nodes
        The nodes.
    bounds
        Limits. No worker is added beyond the upper ones; the lower ones are met as far as there is capacity.
    may_leave
        Whether a worker, or a node's workers for a return to its first mode, were unused for long enough to leave;
        called with the worker's or the node's name.

    Returns
    -------
    Packing
        The same for the same arguments.
    """
    packer = _Packer(requests, nodes, bounds, may_leave)
    packer.place_running_tasks()
    for index in packer.order():
        if not requests[index].resources:
            packer.return_idle_nodes()
        packer.serve(index)
    packer.return_idle_nodes()
    packer.meet_lower_bounds()
    packer.relieve_memory()
    return packer.result()


class _Worker:
    """Worker that runs (`name` is set) or could be added, and what of it is free.

    `used` is set by the first task or lower bound that needs the worker and never cleared; added workers are used.
    """

    __slots__ = ("name", "nbytes", "node", "resources", "spec", "threads", "used")

    def __init__(self, node: _Node, spec: WorkerSpec, name: str | None = None, nbytes: int = 0) -> None:
        self.node, self.spec, self.name, self.nbytes = node, spec, name, nbytes
        self.threads = spec.nthreads or 1
        self.resources = spec.resources
        self.used = False

    def take(self, request: ResourceRequest, wanted: int) -> int:
        """Reserve slots for up to `wanted` tasks; return how many were free."""
        taken = max(0, min(wanted, request.slots_within(self.threads, self.resources)))
        if taken:
            self.threads -= taken
            if request.resources:
                less = {
                    name: self.resources[name] - taken * each for name, each in request.resources.items() if each > 0
                }
                self.resources = {**self.resources, **less}
        return taken

    def use(self) -> None:
        """Mark the worker as used."""
        if not self.used:
            self.used = True
            self.node.busy += 1


class _Node:
    """Node while it is packed.

    - `workers` will run on it, but for those unused in the end; `candidates` could be added. Together they are the
      workers of `mode`, beside running workers that the mode would not start.
    - `mode` changes at most once. After that `workers` are all added ones.
    - `busy` is the number of used workers in `workers`.
    - `served` are the positions of requests for resources that have tasks on the node in the mode that it came with.
    """

    __slots__ = ("busy", "candidates", "capacity", "extra", "mode", "position", "served", "workers")

    def __init__(self, position: int, capacity: NodeCapacity) -> None:
        self.position, self.capacity, self.extra, self.mode = position, capacity, capacity.extra, capacity.mode
        self.workers = [_Worker(self, each.spec, name, each.nbytes) for name, each in capacity.workers.items()]
        running = {name: each.spec for name, each in capacity.workers.items()}
        _, missing = match_workers(running, capacity.offers.get(self.mode, ()))
        self.candidates = [_Worker(self, spec) for spec in missing]
        self.busy = 0
        self.served: set[int] = set()

    @property
    def changed(self) -> bool:
        """Return whether the node has another mode than it came with."""
        return self.mode != self.capacity.mode

    def add(self, worker: _Worker) -> None:
        """Add a candidate, for use."""
        self.candidates.remove(worker)
        self.workers.append(worker)
        worker.use()

    def change_mode(self, mode: str) -> list[_Worker]:
        """Put the candidates of another mode in the place of the workers; return those."""
        leaving = self.workers
        self.mode, self.workers, self.busy = mode, [], 0
        self.candidates = [_Worker(self, spec) for spec in self.capacity.offers[mode]]
        return leaving

    def cost_of_change(self) -> tuple[int, int, int]:
        """Return the tasks, bytes and workers that the node loses with another mode."""
        workers = self.capacity.workers.values()
        return sum(sum(each.tasks.values()) for each in workers), sum(each.nbytes for each in workers), len(workers)


class _Totals:
    """Sums over the `workers` of all nodes, for the upper bounds; not kept where there is no upper bound."""

    __slots__ = ("amounts", "bounds", "kinds", "unbounded")

    def __init__(self, bounds: Bounds, specs: Iterable[WorkerSpec] = ()) -> None:
        self.bounds = bounds
        self.unbounded = not bounds.kinds and min(bounds.most) == math.inf
        self.amounts: Amount = (0.0, 0.0, 0.0)
        self.kinds = dict.fromkeys(bounds.kinds, 0)
        self.count(list(specs), 1)

    def count(self, specs: Sequence[WorkerSpec], sign: int) -> None:
        """Add workers, or with a sign of -1 subtract them."""
        if self.unbounded:
            return
        more = total(map(amount, specs), len(self.amounts))
        self.amounts = tuple(have + sign * part for have, part in zip(self.amounts, more, strict=True))
        for spec in specs if self.kinds else ():
            for kind in kinds(spec):
                if kind in self.kinds:
                    self.kinds[kind] += sign

    def without(self, specs: Sequence[WorkerSpec]) -> _Totals:
        """Return the totals less some workers."""
        less = _Totals(self.bounds)
        less.amounts, less.kinds = self.amounts, dict(self.kinds)
        less.count(specs, -1)
        return less

    def allow(self, spec: WorkerSpec) -> bool:
        """Return whether one more worker is within the upper bounds."""
        if self.unbounded:
            return True
        for have, part, most in zip(self.amounts, amount(spec), self.bounds.most, strict=True):
            if have + part > most:
                return False
        full = [kind for kind, (_, most) in self.bounds.kinds.items() if self.kinds[kind] >= most]
        return not full or kinds(spec).isdisjoint(full)


class _Packer:
    """Steps of :func:`pack`, and their state.

    - `missing` has, by position of a request, the tasks that should run at once and have no slot yet; never below 0.
    - `totals` counts the `workers` of all nodes.
    - `leaving` are the workers of nodes that changed their mode: their data must fit on the others.
    - `shortfall` is how far lower bounds are missed, as a fraction of each.
    """

    def __init__(
        self,
        requests: Sequence[ResourceRequest],
        nodes: Sequence[NodeCapacity],
        bounds: Bounds,
        may_leave: Callable[[str], bool],
    ) -> None:
        self.requests, self.bounds, self.may_leave = requests, bounds, may_leave
        self.nodes = [_Node(position, node) for position, node in enumerate(nodes)]
        self.totals = _Totals(bounds, (worker.spec for worker in self._workers()))
        self.missing = [request.slots for request in requests]
        self.leaving: list[_Worker] = []
        self.shortfall = 0.0
        #: Position of a request -> pairs of a node and a mode that could serve it.
        self.choices = [
            sum(_serves(request, offer) for node in nodes for offer in node.offers.values()) for request in requests
        ]

    def _workers(self) -> Iterator[_Worker]:
        return (worker for node in self.nodes for worker in node.workers)

    def order(self) -> list[int]:
        """Return the positions of the requests in the order in which they are served."""
        return sorted(
            range(len(self.requests)),
            key=lambda index: (not self.requests[index].resources, self.choices[index], index),
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def place_running_tasks(self) -> None:
        """Reserve the slots of tasks that run."""
        for node in self.nodes:
            for worker, running in zip(node.workers, node.capacity.workers.values(), strict=True):
                for index, tasks in running.tasks.items():
                    self._place(worker, index, tasks)

    def serve(self, index: int) -> None:
        """Find slots for a request: on workers that run, on added workers, on nodes that change their mode."""
        request = self.requests[index]
        if self.missing[index]:
            free = [worker for worker in self._workers() if worker.threads and request.slots_on(worker.spec)]
            for worker in sorted(free, key=lambda worker: (not worker.used, worker.node.extra, -worker.nbytes)):
                self._place(worker, index, self.missing[index])
        self._add_for(index, self.nodes)
        for node, mode in self._other_modes(index):
            if not self.missing[index]:
                return
            if not node.changed and self._gains(request, node, mode):
                self._change_mode(node, mode)
                self._add_for(index, [node])

    def _add_for(self, index: int, nodes: Sequence[_Node]) -> None:
        """Add workers that serve a request."""
        request = self.requests[index]
        for worker in self._candidates(nodes, lambda spec: request.slots_on(spec) > 0) if self.missing[index] else ():
            self._add(worker)
            self._place(worker, index, self.missing[index])
            if not self.missing[index]:
                return

    def _place(self, worker: _Worker, index: int, wanted: int) -> None:
        """Place tasks of a request on a worker, as many of those wanted as it has slots for."""
        request = self.requests[index]
        if taken := worker.take(request, wanted):
            self.missing[index] = max(0, self.missing[index] - taken)
            if request.resources:
                worker.node.served.add(index)
            worker.use()

    # -- modes ---------------------------------------------------------------------------------------------------------

    def _other_modes(self, index: int) -> list[tuple[_Node, str]]:
        """Return nodes and modes that could serve a request better, those first that lose least by the change.

        None for tasks that any worker can run: they do not move a node from its first mode.
        """
        request = self.requests[index]
        if not self.missing[index] or not request.resources:
            return []
        found = [
            (*node.cost_of_change(), node.position, number, mode)
            for node in self.nodes
            for number, (mode, offer) in enumerate(node.capacity.offers.items())
            if mode != node.mode
            and not node.changed
            and self._gains(request, node, mode)
            and all(_serves(self.requests[other], offer) for other in node.served)
        ]
        return [(self.nodes[position], mode) for *_, position, _, mode in sorted(found)]

    def _gains(self, request: ResourceRequest, node: _Node, mode: str) -> bool:
        """Return whether a node could run more tasks of a request in another mode, within the upper bounds."""
        now = sum(request.slots_on(worker.spec) for worker in (*node.workers, *node.candidates))
        totals = self.totals.without([worker.spec for worker in node.workers])
        return sum(request.slots_on(spec) for spec in node.capacity.offers[mode] if totals.allow(spec)) > now

    def return_idle_nodes(self) -> None:
        """Change nodes without tasks back to their first mode, where their workers may leave."""
        for node in self.nodes:
            first = node.capacity.first_mode
            if node.mode != first and not node.changed and not node.busy and self.may_leave(node.capacity.name):
                self._change_mode(node, first)

    def _change_mode(self, node: _Node, mode: str) -> None:
        self.totals.count([worker.spec for worker in node.workers], -1)
        self.leaving += node.change_mode(mode)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def meet_lower_bounds(self) -> None:
        """Keep and add workers until the lower bounds are met, or capacity is exhausted.

        Workers on ordinary nodes are counted first, so that extra nodes can be released.
        """
        ordinary = [node for node in self.nodes if not node.extra]
        groups = (ordinary, [node for node in self.nodes if node.extra])
        for kind, (least, _) in self.bounds.kinds.items():
            self._reach((least,), lambda spec, kind=kind: (float(kind in kinds(spec)),), groups)  # type: ignore[misc]
        self._reach(self.bounds.least, amount, groups)

    def relieve_memory(self) -> None:
        """Keep and add workers where the memory of those that run is short of what they hold."""
        running = [worker for worker in self._workers() if worker.name is not None]
        memory = sum(worker.spec.memory_limit or math.inf for worker in running)
        if sum(worker.nbytes for worker in running) > CROWDED * memory:
            self._reach((SPARE * len(running), 0, 0), amount, [self.nodes])

    def _reach(
        self, wanted: Amount, measure: Callable[[WorkerSpec], Amount], groups: Sequence[Sequence[_Node]]
    ) -> None:
        """Use workers until their measures add up to `wanted`: in each group of nodes first those that run.

        Used workers always count; of the others those that hold most data come first.
        """
        if not any(wanted):
            return
        reached = [0.0] * len(wanted)

        def helps(spec: WorkerSpec) -> bool:
            return any(part and have < want for part, have, want in zip(measure(spec), reached, wanted, strict=True))

        for nodes in groups:
            running = [worker for node in nodes for worker in node.workers]
            running.sort(key=lambda worker: (not worker.used, -worker.nbytes))
            for worker in itertools.chain(running, self._candidates(nodes, helps)):
                if worker.used or helps(worker.spec):
                    if worker.name is None and not worker.used:
                        self._add(worker)
                    worker.use()
                    reached = [have + part for have, part in zip(reached, measure(worker.spec), strict=True)]
        self.shortfall += sum(1 - have / want for have, want in zip(reached, wanted, strict=True) if have < want)

    def _candidates(self, nodes: Iterable[_Node], helps: Callable[[WorkerSpec], bool]) -> Iterator[_Worker]:
        """Yield candidates of each node in turn, those of nodes with fewest used workers first, within upper bounds.

        The caller adds each that it gets before it asks for the next one, and may stop at any.
        """
        heap = [(node.extra, node.busy, node.position, 0) for node in nodes if node.candidates]
        heapq.heapify(heap)
        offered = {position: tuple(self.nodes[position].candidates) for _, _, position, _ in heap}
        while heap:
            extra, _, position, number = heapq.heappop(heap)
            worker = offered[position][number]
            if helps(worker.spec) and self.totals.allow(worker.spec):
                yield worker
            if number + 1 < len(offered[position]):
                heapq.heappush(heap, (extra, self.nodes[position].busy, position, number + 1))

    def _add(self, worker: _Worker) -> None:
        worker.node.add(worker)
        self.totals.count([worker.spec], 1)

    # -- result --------------------------------------------------------------------------------------------------------

    def result(self) -> Packing:
        """Return the changes."""
        missing = {index: slots for index, slots in enumerate(self.missing) if slots}
        added = {node: tuple(worker.spec for worker in node.workers if worker.name is None) for node in self.nodes}
        return Packing(
            modes={node.capacity.name: node.mode for node in self.nodes if node.changed},
            remove=frozenset(self._removed()),
            add={node.capacity.name: specs for node, specs in added.items() if specs},
            unmet=tuple(self.requests[index] for index in missing if not self.choices[index]),
            missing=missing,
            shortfall=sum(missing.values()) + self.shortfall,
        )

    def _removed(self) -> Iterator[str]:
        """Yield unused workers that may leave, while the memory of those that stay is enough for all data."""
        stay = list(self._workers())
        data = sum(worker.nbytes for worker in (*stay, *self.leaving))
        count, memory = len(stay), sum(worker.spec.memory_limit or 0 for worker in stay)
        unlimited = sum(not worker.spec.memory_limit for worker in stay)
        unused = [worker for worker in stay if not worker.used and worker.name is not None]
        for worker in sorted(unused, key=lambda worker: (worker.nbytes, not worker.node.extra, worker.node.position)):
            assert worker.name is not None
            limit = worker.spec.memory_limit or 0
            enough = unlimited - (not limit) > 0 or memory - limit >= SPARE * data
            if self.may_leave(worker.name) and (not data or (count > 1 and enough)):
                yield worker.name
                count, memory, unlimited = count - 1, memory - limit, unlimited - (not limit)


def _serves(request: ResourceRequest, offer: Iterable[WorkerSpec]) -> bool:
    """Return whether any worker of a mode can run tasks of a request."""
    return any(request.slots_on(spec) for spec in offer)


def select_hosts(
    asked: AdaptiveRequest,
    requests: Sequence[ResourceRequest],
    like: Hardware | None,
    capacity: Callable[[str, Hardware], NodeCapacity],
    pack_with: Callable[[Sequence[NodeCapacity]], Packing],
) -> tuple[str, ...]:
    """Select the fewest standby hosts that meet as much of the unmet demand as all of them would.

    A host that was never launched is taken to be like a node that is there. Where that does not help, or there is no
    node, the first such host is selected, so that its hardware becomes known; unless an upper bound keeps any host from
    helping.

    Parameters
    ----------
    asked
        The limits, and the standby hosts.
    requests
        Demand of tasks.
    like
        Hardware assumed for hosts that were never launched; None for none.
    capacity
        Called with a host's name and hardware; returns its capacity.
    pack_with
        Called with more nodes; returns the packing onto them and those that there are.

    Returns
    -------
    tuple of str
        Names of hosts to launch, in the order of the reserve.
    """
    now = pack_with(())
    if not asked.reserve or not now.shortfall:
        return ()
    hosts = [(name, assumed) for name, hardware in asked.reserve.items() if (assumed := hardware or like)]
    chosen: list[NodeCapacity] = []
    shortfall = now.shortfall
    for hardware, names in groupby(hosts, key=lambda host: host[1]):
        alike = [capacity(name, hardware) for name, _ in names]
        with_all = pack_with([*chosen, *alike]).shortfall
        if with_all < shortfall:
            chosen += _fewest(alike, lambda some: pack_with([*chosen, *some]).shortfall <= with_all)  # noqa: B023
            shortfall = with_all
    if chosen:
        return tuple(node.name for node in chosen)
    never_seen = [name for name, hardware in asked.reserve.items() if hardware is None]
    anything = tuple(_workers_for([requests[index] for index in now.missing], asked.kinds))
    could_help = pack_with([NodeCapacity("", "", {}, {"": anything}, extra=True)]).shortfall < now.shortfall
    return tuple(never_seen[:1]) if could_help else ()


def _fewest(nodes: Sequence[NodeCapacity], enough: Callable[[Sequence[NodeCapacity]], bool]) -> Sequence[NodeCapacity]:
    """Return the shortest enough beginning of nodes that are enough together."""
    return nodes[: 1 + bisect_left(range(1, len(nodes)), True, key=lambda count: enough(nodes[:count]))]


def _workers_for(requests: Iterable[ResourceRequest], kinds: Iterable[str]) -> Iterator[WorkerSpec]:
    """Yield a worker for each request and bounded kind, with just what it needs."""
    for resources in ({}, *(request.resources for request in requests), *({kind: 1.0} for kind in kinds)):
        gpu = any(name.lower() == "gpu" for name in resources)
        yield WorkerSpec("gpu" if gpu else "cpu", NANNY, nthreads=1, memory_limit=1, resources=dict(resources))
