"""What a wish for more or fewer workers means on the nodes that there are: who goes, who comes, and in which mode.

Pure: a wish goes in, for each node a mode and a change come out. Who stays is not touched, and who goes is who holds
least. A node changes its mode only where a kind is wanted that its mode does not have: to ``mixed``, which has both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentcluster import modes
from agentcluster.errors import ConfigError, ModeRefused, suggest
from agentcluster.model import Mode, WorkerSpec
from agentcluster.requests import ScaleTarget
from agentcluster.scheduler.planning.change import Amount, Change, Held, difference, filled, scaled
from agentcluster.scheduler.planning.nodes import Node

Wishes = dict[str, tuple[Mode, Change]]


@dataclass(frozen=True)
class Answer:
    """What a wish means.

    Attributes
    ----------
    wishes
        Node -> the mode that it has then, and the change of its workers.
    short
        What is wanted and cannot be there -> how much of it can; {} when all can.
    """

    wishes: Wishes
    short: Mapping[str, int]


@dataclass(frozen=True)
class _Place:
    """A node as it is to be: the mode, who of its workers can stay, and who could come."""

    node: Node
    mode: Mode
    stay: Mapping[str, WorkerSpec]
    room: tuple[WorkerSpec, ...]
    named: tuple[tuple[str, WorkerSpec], ...] = ()
    switched: bool = False

    def kinds(self, spec: WorkerSpec) -> frozenset[str]:
        """Return what a worker can be called: what it is, each resource that it has, and its name in a spec."""
        named = (name for name, each in self.named if each == spec)
        offers = self.node.offers(spec)
        return frozenset({spec.kind, *(each.lower() for each in offers), *offers, *named})

    def kind(self, spec: WorkerSpec, wanted: Iterable[str]) -> str | None:
        """Return for which of the wanted kinds a worker counts."""
        its = self.kinds(spec)
        return next((kind for kind in wanted if kind in its), None)


def answered(
    target: ScaleTarget, nodes: Sequence[Node], mode_of: Mapping[str, Mode], nbytes: Mapping[str, int]
) -> Answer:
    """Return what a wish means.

    Parameters
    ----------
    target
        The wish.
    nodes
        The nodes that it is about.
    mode_of
        Node -> its mode.
    nbytes
        Worker -> bytes of data that it holds.

    Raises
    ------
    ConfigError
        For a kind that no node can have.
    """
    places = [_as_it_is(node, mode_of[node.name]) for node in nodes]
    if target.nodes is not None:
        return _by_nodes(target.nodes, places, nbytes)
    if target.kinds:
        return _by_kind(target, places, nbytes)
    wanted = {"workers": target.workers or 0, "cores": target.cores or 0, "memory": target.memory or 0}
    return _by_amount(wanted, places, nbytes, target.extra)


def _as_it_is(node: Node, mode: Mode) -> _Place:
    full = modes.plan(mode, node.hardware, node=node.name)
    return _Place(node, mode, node.plan.workers, difference(node.plan.workers, full).come, modes.named(mode, full))


def _by_nodes(wanted: int, places: Sequence[_Place], nbytes: Mapping[str, int]) -> Answer:
    held = {p.node.name: sum(nbytes.get(w, 0) for w in p.stay) if p.stay else None for p in places if p.stay or p.room}
    empty, fill = filled(held, wanted)
    wishes = {}
    for place in places:
        name = place.node.name
        whole = name in fill or (held.get(name) is not None and name not in empty)
        wishes[name] = _wish(place, place.stay if name in empty else (), place.room if whole else ())
    return Answer(wishes, {"nodes": len(held)} if wanted > len(held) else {})


def _by_amount(
    wanted: Mapping[str, int], places: Sequence[_Place], nbytes: Mapping[str, int], extra: Sequence[str]
) -> Answer:
    def amount(spec: WorkerSpec) -> Amount:
        return 1, spec.nthreads or 1, spec.memory_limit or 0

    if wanted["memory"] and not any(amount(spec)[2] for p in places for spec in (*p.stay.values(), *p.room)):
        raise ConfigError("scale(memory=…): the workers of these nodes have no memory limit", key="memory")
    current = {p.node.name: {w: Held(nbytes.get(w, 0), amount(spec)) for w, spec in p.stay.items()} for p in places}
    room = {p.node.name: [amount(spec) for spec in p.room] for p in places}
    go, come = scaled(current, room, tuple(wanted.values()), extra)
    wishes = {p.node.name: _wish(p, go, [p.room[index] for index in come[p.node.name]]) for p in places}
    there = [sum(column) for column in zip(*map(amount, _after(wishes)), strict=True)] or [0, 0, 0]
    found = dict(zip(wanted, there, strict=True))
    return Answer(wishes, {key: int(found[key]) for key in wanted if found[key] < wanted[key]})


def _by_kind(target: ScaleTarget, places: Sequence[_Place], nbytes: Mapping[str, int]) -> Answer:
    wanted, places = target.kinds, list(places)
    for kind, count in wanted.items():
        _switch(kind, count, places, nbytes)
    go: set[str] = set()
    come: dict[str, set[int]] = {p.node.name: set() for p in places}
    for kind in wanted:
        current: dict[str, dict[str, Held]] = {}
        room: dict[str, list[int]] = {}
        for p in places:
            name = p.node.name
            current[name] = {
                worker: Held(nbytes.get(worker, 0), (1,))
                for worker, spec in p.stay.items()
                if p.kind(spec, wanted) == kind
            }
            room[name] = [index for index, spec in enumerate(p.room) if p.kind(spec, wanted) == kind]
        ones = {name: [(1,)] * len(found) for name, found in room.items()}
        leaving, coming = scaled(current, ones, (wanted[kind],), target.extra)
        go |= leaving
        for name, chosen in coming.items():
            come[name] |= {room[name][index] for index in chosen}
    wishes = {}
    for p in places:
        others = {index for index, spec in enumerate(p.room) if p.switched and p.kind(spec, wanted) is None}
        come[p.node.name] |= others
        wishes[p.node.name] = _wish(p, go, [p.room[index] for index in sorted(come[p.node.name])])
    by_name = {p.node.name: p for p in places}
    there = dict.fromkeys(wanted, 0)
    for name, (_, change) in wishes.items():
        for spec in (*change.keep.values(), *change.come):
            if (found := by_name[name].kind(spec, wanted)) is not None:
                there[found] += 1
    return Answer(wishes, {kind: there[kind] for kind in wanted if there[kind] < wanted[kind]})


def _switch(kind: str, count: int, places: list[_Place], nbytes: Mapping[str, int]) -> None:
    """Have as many nodes change to ``mixed`` as it takes for so many workers of a kind; those that hold least first."""
    offered = [sum(kind in p.kinds(spec) for spec in (*p.stay.values(), *p.room)) for p in places]
    known = {each for p in places for spec in (*p.stay.values(), *p.room) for each in p.kinds(spec)}
    reasons: dict[str, list[str]] = {}
    order = sorted(range(len(places)), key=lambda i: sum(nbytes.get(worker, 0) for worker in places[i].stay))
    for index in order:
        if sum(offered) >= count and any(offered):
            return
        if offered[index] or kind not in ("cpu", "gpu"):
            continue
        place = places[index]
        try:
            mode = _with_both(place.mode)
            full = modes.plan(mode, place.node.hardware, node=place.node.name)
        except ConfigError as error:
            reason = error.reason if isinstance(error, ModeRefused) else str(error)
            reasons.setdefault(reason, []).append(place.node.name)
            continue
        change = difference(place.node.plan.workers, full)
        places[index] = changed = _Place(place.node, mode, change.keep, change.come, switched=True)
        offered[index] = sum(kind in changed.kinds(spec) for spec in full)
    if not any(offered):
        said = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        why = f"; {'; '.join(said)}" if reasons else f"; {suggest(kind, sorted(known))}"
        raise ConfigError(f"scale({kind}={count}): no node has workers of the kind {kind!r}{why}", key=kind)


def _with_both(mode: Mode) -> Mode:
    sides = {"auto-cpu": {"cpu": mode.config}, "auto-gpu": {"gpu": mode.config}, "auto": mode.config}
    if mode.name not in sides:
        raise ConfigError(f"mode {mode.name!r} has only its own kinds of workers; reprovision to 'mixed' first")
    return modes.parse("mixed", {key: side for key, side in sides[mode.name].items() if key in ("cpu", "gpu")})


def _wish(place: _Place, go: Iterable[str], come: Iterable[WorkerSpec]) -> tuple[Mode, Change]:
    leaving = {*go, *(place.node.plan.workers.keys() - place.stay.keys())}
    gone = tuple(worker for worker in place.node.plan.workers if worker in leaving)
    keep = {worker: spec for worker, spec in place.node.plan.workers.items() if worker not in leaving}
    return place.mode, Change(keep, gone, tuple(come))


def _after(wishes: Wishes) -> list[WorkerSpec]:
    return [spec for _, change in wishes.values() for spec in (*change.keep.values(), *change.come)]
