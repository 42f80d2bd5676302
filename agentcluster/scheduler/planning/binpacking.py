"""Which workers the tasks of the moment need, on which nodes and in which of their modes.

Pure: needs, nodes and bounds go in, a :class:`Fit` comes out, the same each time. Tasks that few workers can run are
seen to first. Who runs is used before anybody comes, a node takes more workers of its mode before another changes its
mode, and a node that no task holds in another mode goes back to its first one.
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
from agentcluster.scheduler.planning.change import Amount, difference
from agentcluster.scheduler.planning.demand import Bounds, Need, Spot, amount, kinds

#: Of the workers' memory, the part that may be in use before more workers are wanted, as dask has it.
CROWDED = 0.6

#: How many times what is held the memory of those that stay must be, as dask has it.
SPARE = 2


@dataclass(frozen=True)
class Fit:
    """What is to be.

    Attributes
    ----------
    modes
        Node -> the mode that it changes to.
    go
        Workers that go, of nodes that keep their mode.
    come
        Node -> workers that come.
    unmet
        Needs that no node can ever serve.
    short
        Needs for which no room is left now -> how many tasks more should run at once.
    lacking
        How much of what is wanted is missing, tasks and lower bounds together; 0 when nothing is. Only for comparing.
    """

    modes: Mapping[str, str]
    go: frozenset[str]
    come: Mapping[str, tuple[WorkerSpec, ...]]
    unmet: tuple[Need, ...]
    short: Mapping[int, int]
    lacking: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether anything is to change."""
        return bool(self.modes or self.go or any(self.come.values()))


def fitted(
    needs: Sequence[Need], spots: Sequence[Spot], bounds: Bounds, may_go: Callable[[str], bool] = lambda name: True
) -> Fit:
    """Return which workers are to run.

    Parameters
    ----------
    needs
        What tasks ask for; ``Seat.runs`` refers to positions here.
    spots
        The nodes.
    bounds
        Limits. The upper ones hold for all that comes; the lower ones as far as there is room.
    may_go
        Whether a worker, or all workers of a node that goes back to its first mode, have not been needed for long
        enough; asked by name.
    """
    solver = _Solver(needs, spots, bounds, may_go)
    order = sorted(range(len(needs)), key=lambda i: (not needs[i].resources, solver.choices(i), i))
    solver.running()
    for index in order:
        if not needs[index].resources:
            solver.go_home()
        solver.serve(index)
    solver.go_home()
    solver.least()
    return solver.fit()


class _Place:
    """One worker that runs or may come, and what it has left."""

    __slots__ = ("left", "name", "nbytes", "node", "spec", "threads", "used")

    def __init__(self, node: int, spec: WorkerSpec, name: str | None, nbytes: int = 0) -> None:
        self.node, self.spec, self.name, self.nbytes = node, spec, name, nbytes
        self.threads = spec.nthreads or 1
        self.left = spec.resources
        self.used = False

    def take(self, need: Need, slots: int) -> int:
        """Take up to so many slots; return how many were there."""
        most = max(0, min(slots, need.at_once(self.threads, self.left)))
        if most:
            self.threads -= most
            if need.resources:
                less = {name: self.left[name] - most * each for name, each in need.resources.items() if each > 0}
                self.left = {**self.left, **less}
        return most


class _Solver:
    def __init__(
        self, needs: Sequence[Need], spots: Sequence[Spot], bounds: Bounds, may_go: Callable[[str], bool]
    ) -> None:
        self.needs, self.spots, self.bounds, self.may_go = needs, spots, bounds, may_go
        self.mode = [spot.mode for spot in spots]
        self.seats = [
            [_Place(node, seat.spec, name, seat.nbytes) for name, seat in spot.seats.items()]
            for node, spot in enumerate(spots)
        ]
        self.room = [self._room(node) for node in range(len(spots))]
        self.busy = [0] * len(spots)
        #: Needs whose tasks hold a node in its mode.
        self.held: list[set[int]] = [set() for _ in spots]
        self.leaving: list[_Place] = []
        self.missing = {index: need.slots for index, need in enumerate(needs)}
        there = [place.spec for seats in self.seats for place in seats]
        self.total = [sum(column) for column in zip([0.0] * 3, *map(amount, there), strict=True)]
        self._fits: dict[tuple[int, int], int] = {}
        self._kinds: dict[int, set[str]] = {}
        self.count = {kind: sum(kind in self.kinds(spec) for spec in there) for kind in bounds.kinds}
        self._unbounded = not bounds.kinds and min(bounds.most) == math.inf
        self.below = 0.0

    # -- steps ---------------------------------------------------------------------------------------------------------

    def running(self) -> None:
        """Count what runs where it runs: its worker stays."""
        for node, spot in enumerate(self.spots):
            for place, seat in zip(self.seats[node], spot.seats.values(), strict=True):
                for index, tasks in seat.runs.items():
                    self._use(place, index, tasks)

    def serve(self, index: int) -> None:
        """Find workers for the tasks of a need: those that run, those for which there is room, then other modes."""
        if self.missing[index]:
            seats = (p for seats in self.seats for p in seats if p.threads and self.fits(index, p.spec))
            for place in sorted(seats, key=lambda p: (not p.used, self.extra(p), -p.nbytes)):
                self._use(place, index, self.missing[index])
        self._fill(index)
        for node, mode in self._others(index):
            if not self.missing[index]:
                return
            if self.mode[node] == self.spots[node].mode and self._better(index, node, self.spots[node].offers[mode]):
                self._change(node, mode)
                self._fill(index, node)

    def _fill(self, index: int, *nodes: int) -> None:
        """Have workers come that serve a need, first where fewest are busy."""
        for place in self._coming(lambda spec: self.fits(index, spec) > 0, nodes or range(len(self.spots))):
            if not self.missing[index]:
                return
            self._seat(place)
            self._use(place, index, self.missing[index])

    def _coming(self, helps: Callable[[WorkerSpec], bool], nodes: Iterable[int]) -> Iterator[_Place]:
        """Yield workers that may come, one of each node in turn, those first where fewest are busy."""
        fewest = [(self.spots[node].extra, self.busy[node], node, 0) for node in nodes if self.room[node]]
        heapq.heapify(fewest)
        offered = {node: tuple(self.room[node]) for *_, node, _ in fewest}
        while fewest:
            extra, _, node, position = heapq.heappop(fewest)
            place = offered[node][position]
            if helps(place.spec) and self._allowed(place.spec):
                yield place
            if position + 1 < len(offered[node]):
                heapq.heappush(fewest, (extra, self.busy[node], node, position + 1))

    def _others(self, index: int) -> list[tuple[int, str]]:
        """Return the nodes, and their other modes, that could serve a need; those first that give up least.

        There are none for tasks that any worker can run: for them nodes go back to their first mode, not to another.
        """
        found = []
        for node, spot in enumerate(self.spots) if self.missing[index] and self.needs[index].resources else ():
            for number, (mode, offer) in enumerate(spot.offers.items()):
                serves = mode != spot.mode and self._better(index, node, offer)
                if serves and all(self._any(other, offer) for other in self.held[node]):
                    tasks = sum(sum(seat.runs.values()) for seat in spot.seats.values())
                    nbytes = sum(seat.nbytes for seat in spot.seats.values())
                    found.append((tasks, nbytes, len(spot.seats), node, number, mode))
        return [(node, mode) for *_, node, _, mode in sorted(found)]

    def _better(self, index: int, node: int, offer: Sequence[WorkerSpec]) -> bool:
        """Whether a node in another mode can run more tasks of a need than it can now, within the upper bounds."""
        now = sum(self.fits(index, place.spec) for place in (*self.seats[node], *self.room[node]))
        leaving = [place.spec for place in self.seats[node]]
        then = sum(self.fits(index, spec) for spec in offer if self._allowed(spec, leaving))
        return then > now

    def go_home(self) -> None:
        """Have nodes that nothing holds in another mode go back to their first one."""
        for node, spot in enumerate(self.spots):
            home = next(iter(spot.offers), spot.mode)
            if self.mode[node] == spot.mode != home and not self.busy[node] and self.may_go(spot.name):
                self._change(node, home)

    def least(self) -> None:
        """Have as many as there must be at least, and where memory is short twice as many as there are."""
        for kind, (few, _) in self.bounds.kinds.items():
            self._up_to((few,), lambda spec, kind=kind: (float(kind in self.kinds(spec)),))  # type: ignore[misc]
        self._up_to(self.bounds.least, amount)
        there = [place for seats in self.seats for place in seats if place.name is not None]
        memory = sum(place.spec.memory_limit or math.inf for place in there)
        if sum(place.nbytes for place in there) > CROWDED * memory:
            self._up_to((SPARE * len(there), 0, 0), amount, at_home=False)

    def _up_to(self, wanted: Amount, measure: Callable[[WorkerSpec], Amount], at_home: bool = True) -> None:
        """Keep who runs, those first that hold most, then have others come, until there is enough by some measure.

        What there must be is to be on ordinary nodes, as far as they have room, so that the others can be let go.
        """
        if not any(wanted):
            return
        there = [0.0] * len(wanted)

        def helps(spec: WorkerSpec) -> bool:
            return any(m and have < want for m, have, want in zip(measure(spec), there, wanted, strict=True))

        seats = sorted((p for seats in self.seats for p in seats), key=lambda p: (not p.used, -p.nbytes))
        for extra in (False, True):
            nodes = [node for node, spot in enumerate(self.spots) if (at_home and spot.extra) == extra]
            own = (place for place in seats if (at_home and self.extra(place)) == extra)
            for place in itertools.chain(own, self._coming(helps, nodes)):
                if place.used or helps(place.spec):
                    if place.name is None and not place.used:
                        self._seat(place)
                    self._keep(place)
                    there = [have + part for have, part in zip(there, measure(place.spec), strict=True)]
        self.below += sum(1 - have / want for have, want in zip(there, wanted, strict=True) if have < want)

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def extra(self, place: _Place) -> bool:
        """Whether a worker is on a node that is there only for what the others have no room for."""
        return self.spots[place.node].extra

    def fits(self, index: int, spec: WorkerSpec) -> int:
        """Return how many tasks of a need a worker can run at once; a worker's settings are there many times."""
        key = index, id(spec)
        if key not in self._fits:
            self._fits[key] = self.needs[index].fits(spec)
        return self._fits[key]

    def kinds(self, spec: WorkerSpec) -> set[str]:
        """Return what a worker is called in bounds."""
        if id(spec) not in self._kinds:
            self._kinds[id(spec)] = kinds(spec)
        return self._kinds[id(spec)]

    def choices(self, index: int) -> int:
        """Return how many nodes could serve a need, each counted once for each mode in which it could."""
        return sum(self._any(index, offer) for spot in self.spots for offer in spot.offers.values())

    def _any(self, index: int, offer: Iterable[WorkerSpec]) -> bool:
        return any(self.fits(index, spec) for spec in offer)

    def _room(self, node: int) -> list[_Place]:
        offer = self.spots[node].offers.get(self.mode[node], ())
        current = {str(number): place.spec for number, place in enumerate(self.seats[node])}
        return [_Place(node, spec, None) for spec in difference(current, offer).come]

    def _allowed(self, spec: WorkerSpec, leaving: Sequence[WorkerSpec] = ()) -> bool:
        """Whether one more such worker is within the upper bounds, once those that leave have left."""
        if self._unbounded:
            return True
        less = [sum(column) for column in zip((0, 0, 0), *map(amount, leaving), strict=True)]
        more = [have + part - gone for have, part, gone in zip(self.total, amount(spec), less, strict=True)]
        if any(have > most for have, most in zip(more, self.bounds.most, strict=True)):
            return False
        return all(
            self.count[kind] - sum(kind in self.kinds(each) for each in leaving) < most
            for kind, (_, most) in self.bounds.kinds.items()
            if kind in self.kinds(spec)
        )

    def _use(self, place: _Place, index: int, slots: int) -> None:
        taken = place.take(self.needs[index], slots)
        if taken:
            self.missing[index] = max(0, self.missing[index] - taken)
            if self.needs[index].resources:
                self.held[place.node].add(index)
            self._keep(place)

    def _keep(self, place: _Place) -> None:
        self.busy[place.node] += not place.used
        place.used = True

    def _count(self, place: _Place, sign: int) -> None:
        """Count a worker that is there or comes, or does not count any more."""
        self.total = [have + sign * part for have, part in zip(self.total, amount(place.spec), strict=True)]
        for kind in self.count:
            self.count[kind] += sign * (kind in self.kinds(place.spec))

    def _seat(self, place: _Place) -> None:
        self.room[place.node].remove(place)
        self.seats[place.node].append(place)
        self._count(place, 1)

    def _change(self, node: int, mode: str) -> None:
        """Have a node's workers leave for those of another mode."""
        for place in self.seats[node]:
            self._count(place, -1)
        self.mode[node] = mode
        self.leaving += self.seats[node]
        self.seats[node], self.busy[node] = [], 0
        self.room[node] = self._room(node)

    def fit(self) -> Fit:
        """Return what was found."""
        return Fit(
            modes={spot.name: mode for spot, mode in zip(self.spots, self.mode, strict=True) if mode != spot.mode},
            go=frozenset(self._going()),
            come={
                spot.name: come
                for spot, seats in zip(self.spots, self.seats, strict=True)
                if (come := tuple(place.spec for place in seats if place.name is None))
            },
            unmet=tuple(
                need for index, need in enumerate(self.needs) if self.missing[index] and not self.choices(index)
            ),
            short={index: slots for index, slots in self.missing.items() if slots},
            lacking=sum(self.missing.values()) + self.below,
        )

    def _going(self) -> list[str]:
        """Return who is not needed and may go: the memory of those that stay must do for all data."""
        stay = [place for seats in self.seats for place in seats]
        held = sum(place.nbytes for place in (*stay, *self.leaving))
        unlimited = sum(not place.spec.memory_limit for place in stay)
        memory, count = sum(place.spec.memory_limit or 0 for place in stay), len(stay)
        go = []
        for place in sorted((p for p in stay if not p.used), key=lambda p: (p.nbytes, not self.extra(p), p.node)):
            limit = place.spec.memory_limit or 0
            roomy = unlimited - (not limit) > 0 or memory - limit >= SPARE * held
            if self.may_go(str(place.name)) and (not held or (count > 1 and roomy)):
                go.append(str(place.name))
                count, memory, unlimited = count - 1, memory - limit, unlimited - (not limit)
        return go


def called_up(
    asked: AdaptiveRequest,
    needs: Sequence[Need],
    like: Hardware | None,
    unseen: Callable[[str, Hardware], Spot],
    fit: Callable[[Sequence[Spot]], Fit],
) -> tuple[str, ...]:
    """Return which hosts are to be launched: as few as bring all that they can.

    A host that was never seen is taken to be like a node that is there. Where that helps nobody, or there is no node,
    one such host is launched, to be seen, unless an upper bound keeps anybody from helping.

    Parameters
    ----------
    asked
        The limits, and the reserve.
    needs
        What tasks ask for.
    like
        What hosts that were never seen are taken to have.
    unseen
        Returns a host of the reserve as :mod:`fitting` takes it.
    fit
        Returns what there would be with hosts in addition.
    """
    now = fit(())
    if not asked.reserve or not now.lacking:
        return ()
    guesses = [(name, found) for name, hardware in asked.reserve.items() if (found := hardware or like)]
    chosen: list[Spot] = []
    lacking = now.lacking
    for hardware, names in groupby(guesses, key=lambda guess: guess[1]):
        alike = [unseen(name, hardware) for name, _ in names]
        most = fit([*chosen, *alike]).lacking
        if most < lacking:
            chosen += alike[: _fewest(alike, lambda some: fit([*chosen, *some]).lacking <= most)]  # noqa: B023
            lacking = most
    if chosen:
        return tuple(spot.name for spot in chosen)
    never_seen = [name for name, hardware in asked.reserve.items() if hardware is None]
    anything = Spot("", "", {}, {"": tuple(_whatever([needs[index] for index in now.short], asked.kinds))}, extra=True)
    return tuple(never_seen[:1]) if fit([anything]).lacking < now.lacking else ()


def _fewest(spots: Sequence[Spot], enough: Callable[[Sequence[Spot]], bool]) -> int:
    """Return how many of the first are enough, where all are."""
    return 1 + bisect_left(range(1, len(spots)), True, key=lambda count: enough(spots[:count]))


def _whatever(needs: Iterable[Need], kinds: Mapping[str, object]) -> Iterable[WorkerSpec]:
    """Return workers that would do for anything that may be missing."""
    for resources in ({}, *(need.resources for need in needs), *({kind: 1.0} for kind in kinds)):
        gpu = any(name.lower() == "gpu" for name in resources)
        yield WorkerSpec("gpu" if gpu else "cpu", NANNY, nthreads=1, memory_limit=1, resources=dict(resources))
