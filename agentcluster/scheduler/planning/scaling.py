"""Plan of ``scale()``: the workers that come to and leave each node, so that a target is met.

Pure. Workers that stay are not touched, and those that hold least data leave. A node changes its mode only where a kind
of worker is wanted that its mode does not have: to ``mixed``, which has both CPU and GPU workers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentcluster import modes
from agentcluster.errors import ConfigError, suggest
from agentcluster.model import Mode, WorkerSpec
from agentcluster.requests import ScaleTarget
from agentcluster.scheduler.planning.change import NodeChange, change_without, match_workers
from agentcluster.scheduler.planning.demand import Amount, amount, total
from agentcluster.scheduler.planning.nodes import Node


@dataclass(frozen=True)
class ScalePlan:
    """Changes that bring nodes to a target.

    Attributes
    ----------
    changes
        Node name -> the change of its workers.
    short
        Unit or kind that the nodes lack capacity for -> how much of it there can be; {} when the target is met.
    """

    changes: Mapping[str, NodeChange]
    short: Mapping[str, int]


@dataclass(frozen=True)
class Load:
    """Load of a worker that runs.

    Attributes
    ----------
    nbytes
        Bytes of data that it holds.
    amount
        What it counts for, in each unit of the target.
    """

    nbytes: int
    amount: Amount


def plan_scale(
    target: ScaleTarget, nodes: Sequence[Node], mode_of: Mapping[str, Mode], nbytes: Mapping[str, int]
) -> ScalePlan:
    """Plan the changes that bring nodes to a target.

    Parameters
    ----------
    target
        The workers wanted on all the nodes together.
    nodes
        The nodes.
    mode_of
        Node name -> its mode.
    nbytes
        Worker -> bytes of data that it holds.

    Returns
    -------
    ScalePlan
        As near to the target as the nodes have capacity.

    Raises
    ------
    ConfigError
        For a kind of worker that no node can have, and for an amount of memory where no worker has a limit.
    """
    drafts = [_draft(node, mode_of[node.name]) for node in nodes]
    if target.nodes is not None:
        return _scale_nodes(target.nodes, drafts, nbytes)
    if target.kinds:
        return _scale_kinds(target.kinds, drafts, nbytes, target.extra)
    wanted = {"workers": target.workers or 0, "cores": target.cores or 0, "memory": target.memory or 0}
    return _scale_amounts(wanted, drafts, nbytes, target.extra)


# -- one node ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """Draft of a node's change: its mode, the workers that can stay, and the candidates that could come."""

    node: Node
    mode: Mode
    stay: Mapping[str, WorkerSpec]
    candidates: tuple[WorkerSpec, ...]
    named: tuple[tuple[str, WorkerSpec], ...] = ()
    changes_mode: bool = False

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def specs(self) -> tuple[WorkerSpec, ...]:
        """Settings of all workers that the node could have at once."""
        return (*self.stay.values(), *self.candidates)

    def data(self, nbytes: Mapping[str, int]) -> int:
        """Return the bytes that workers which can stay hold.

        Parameters
        ----------
        nbytes
            Worker name -> bytes of data that it holds; a missing worker counts as 0.

        Returns
        -------
        int
            Bytes on all of them together.
        """
        return sum(nbytes.get(worker, 0) for worker in self.stay)

    def kinds(self, spec: WorkerSpec) -> frozenset[str]:
        """Return the kinds of a worker: its own, each resource that it offers, and its name in a spec.

        Parameters
        ----------
        spec
            Settings of the worker.

        Returns
        -------
        frozenset of str
            The kinds; a resource is there as it is written and in lower case.
        """
        named = (name for name, each in self.named if each == spec)
        offers = self.node.offers(spec)
        return frozenset({spec.kind, *(each.lower() for each in offers), *offers, *named})

    def kind(self, spec: WorkerSpec, wanted: Iterable[str]) -> str | None:
        """Return the first of the wanted kinds that a worker is of; it counts for no other.

        Parameters
        ----------
        spec
            Settings of the worker.
        wanted
            The kinds wanted, in the order in which they are tried.

        Returns
        -------
        str or None
            The kind; None when the worker is of none of them.
        """
        its = self.kinds(spec)
        return next((kind for kind in wanted if kind in its), None)

    def change(self, leaving: Collection[str], add: Sequence[WorkerSpec]) -> NodeChange:
        """Return the change in which some workers leave, and all that cannot stay.

        Parameters
        ----------
        leaving
            Names of the workers that leave; names of other nodes' workers are ignored.
        add
            Settings of the workers that come.

        Returns
        -------
        NodeChange
            The change, to the mode of this draft.
        """
        here = self.node.plan.workers
        return change_without(self.node, self.mode, {w for w in here if w in leaving or w not in self.stay}, add)


def _draft(node: Node, mode: Mode) -> _Draft:
    """Return the draft of a node that keeps its mode: all its workers can stay."""
    full = modes.plan(mode, node.hardware, node=node.name)
    _, missing = match_workers(node.plan.workers, full)
    return _Draft(node, mode, node.plan.workers, missing, modes.named(mode, full))


def _mixed(draft: _Draft) -> _Draft | str:
    """Return the draft of a node in mode ``mixed``, or the reason why the node cannot have that mode."""
    config, name = draft.mode.config, draft.mode.name
    sides = {"auto-cpu": {"cpu": config}, "auto-gpu": {"gpu": config}, "auto": config}
    if name not in sides:
        return f"mode {name!r} has only its own kinds of workers; reprovision to 'mixed' first"
    mode = Mode("mixed", {side: options for side, options in sides[name].items() if side in ("cpu", "gpu")})
    full = modes.try_plan(mode, draft.node.hardware, node=draft.name)
    if isinstance(full, str):
        return full
    return _Draft(draft.node, mode, *match_workers(draft.node.plan.workers, full), changes_mode=True)


# -- by number of nodes ------------------------------------------------------------------------------------------------


def _scale_nodes(wanted: int, drafts: Sequence[_Draft], nbytes: Mapping[str, int]) -> ScalePlan:
    usable = [draft for draft in drafts if draft.specs]
    data = {draft.name: draft.data(nbytes) if draft.stay else None for draft in usable}
    empty, fill = choose_nodes(data, wanted)
    changes = {}
    for draft in drafts:
        full = draft.name in fill or (bool(draft.stay) and draft.name not in empty)
        changes[draft.name] = draft.change(draft.stay if draft.name in empty else (), draft.candidates if full else ())
    return ScalePlan(changes, {"nodes": len(usable)} if wanted > len(usable) else {})


def choose_nodes(nbytes: Mapping[str, int | None], wanted: int) -> tuple[list[str], list[str]]:
    """Choose the nodes to empty and to fill, so that `wanted` nodes have workers.

    Parameters
    ----------
    nbytes
        Node -> bytes that its workers hold; None for a node without workers.
    wanted
        Number of nodes that are to have workers.

    Returns
    -------
    list of str, list of str
        Nodes to empty, those that hold least; nodes to fill, the first without workers.
    """
    used = sorted((held, node) for node, held in nbytes.items() if held is not None)
    free = [node for node, held in nbytes.items() if held is None]
    return [node for _, node in used[: max(0, len(used) - wanted)]], free[: max(0, wanted - len(used))]


# -- by amount ---------------------------------------------------------------------------------------------------------


def _scale_amounts(
    wanted: Mapping[str, int], drafts: Sequence[_Draft], nbytes: Mapping[str, int], extra: Collection[str]
) -> ScalePlan:
    """Scale to amounts in the units of :func:`~agentcluster.scheduler.planning.demand.amount`, in its order."""
    if wanted["memory"] and not any(spec.memory_limit for draft in drafts for spec in draft.specs):
        raise ConfigError("scale(memory=…): the workers of these nodes have no memory limit", key="memory")
    current = {d.name: {w: Load(nbytes.get(w, 0), amount(spec)) for w, spec in d.stay.items()} for d in drafts}
    candidates = {draft.name: [amount(spec) for spec in draft.candidates] for draft in drafts}
    leaving, coming = choose_workers(current, candidates, tuple(wanted.values()), extra)
    changes = {d.name: d.change(leaving, [d.candidates[index] for index in coming[d.name]]) for d in drafts}
    after = [spec for change in changes.values() for spec in (*change.keep.values(), *change.add)]
    reached = dict(zip(wanted, total(map(amount, after), len(wanted)), strict=True))
    return ScalePlan(changes, {unit: int(reached[unit]) for unit in wanted if reached[unit] < wanted[unit]})


def choose_workers(
    current: Mapping[str, Mapping[str, Load]],
    candidates: Mapping[str, Sequence[Amount]],
    wanted: Amount,
    extra: Collection[str] = (),
) -> tuple[set[str], dict[str, list[int]]]:
    """Choose the workers that leave and come, so that the wanted amount is there in every unit.

    Parameters
    ----------
    current
        Node -> worker -> its load.
    candidates
        Node -> amounts of the workers that could come, in the order in which they would.
    wanted
        Amount in each unit, such as workers, threads and bytes of memory; 0 where that does not matter.
    extra
        Nodes on which workers come last, and from which they leave first among those that hold as much.

    Returns
    -------
    set of str
        Workers that leave: those that hold least, on the nodes with most workers; none that is needed for a unit.
    dict
        Node -> positions in `candidates` of the workers that come: first where fewest run, none that adds nothing.
        They are less than wanted when there is no capacity for more.
    """
    count = {node: len(workers) for node, workers in current.items()}
    there = total((load.amount for workers in current.values() for load in workers.values()), len(wanted))
    leaving, there = _choose_leaving(current, count, there, wanted, extra)
    return leaving, _choose_coming(candidates, count, there, wanted, extra)


def _choose_leaving(
    current: Mapping[str, Mapping[str, Load]],
    count: dict[str, int],
    there: Amount,
    wanted: Amount,
    extra: Collection[str],
) -> tuple[set[str], Amount]:
    """Choose the workers that leave, and return what is left; `count`, the workers of each node, follows.

    The heap has each worker once, under the number of workers that its node had when it was pushed; one that is out of
    date is pushed again.
    """
    leaving: set[str] = set()
    heap = [
        (load.nbytes, node not in extra, -count[node], node, worker)
        for node, workers in current.items()
        for worker, load in workers.items()
    ]
    heapq.heapify(heap)
    while heap:
        nbytes, ordinary, negative, node, worker = heapq.heappop(heap)
        if -negative != count[node]:
            heapq.heappush(heap, (nbytes, ordinary, -count[node], node, worker))
            continue
        left = tuple(have - part for have, part in zip(there, current[node][worker].amount, strict=True))
        if all(have >= want for have, want in zip(left, wanted, strict=True)):
            leaving.add(worker)
            count[node] -= 1
            there = left
    return leaving, there


def _choose_coming(
    candidates: Mapping[str, Sequence[Amount]],
    count: Mapping[str, int],
    there: Amount,
    wanted: Amount,
    extra: Collection[str],
) -> dict[str, list[int]]:
    """Choose the workers that come; the heap has the next candidate of each node that has one left."""
    coming: dict[str, list[int]] = {node: [] for node in candidates}
    nodes = list(candidates)
    heap = [(node in extra, count[node], order, 0) for order, node in enumerate(nodes) if candidates[node]]
    heapq.heapify(heap)
    while heap and (missing := [unit for unit, want in enumerate(wanted) if there[unit] < want]):
        last, number, order, index = heapq.heappop(heap)
        offered = candidates[nodes[order]]
        if any(offered[index][unit] for unit in missing):
            coming[nodes[order]].append(index)
            there = tuple(have + part for have, part in zip(there, offered[index], strict=True))
            number += 1
        if index + 1 < len(offered):
            heapq.heappush(heap, (last, number, order, index + 1))
    return coming


# -- by kind -----------------------------------------------------------------------------------------------------------


def _scale_kinds(
    wanted: Mapping[str, int], drafts: Sequence[_Draft], nbytes: Mapping[str, int], extra: Collection[str]
) -> ScalePlan:
    """Scale each kind of worker by itself; workers of other kinds stay as they are."""
    for kind, count in wanted.items():
        drafts = _with_kind(kind, count, drafts, nbytes)
    leaving: set[str] = set()
    # A node that changes its mode gets the workers of the kinds that were not asked for too.
    coming = {
        draft.name: {index for index, kind in _kinds_of(draft, wanted) if draft.changes_mode and kind is None}
        for draft in drafts
    }
    for kind, count in wanted.items():
        current = {
            draft.name: {
                worker: Load(nbytes.get(worker, 0), (1,))
                for worker, spec in draft.stay.items()
                if draft.kind(spec, wanted) == kind
            }
            for draft in drafts
        }
        of_kind = {draft.name: [index for index, its in _kinds_of(draft, wanted) if its == kind] for draft in drafts}
        ones = {name: [(1,)] * len(indices) for name, indices in of_kind.items()}
        go, come = choose_workers(current, ones, (count,), extra)
        leaving |= go
        for name, chosen in come.items():
            coming[name] |= {of_kind[name][position] for position in chosen}
    changes = {d.name: d.change(leaving, [d.candidates[index] for index in sorted(coming[d.name])]) for d in drafts}
    after = Counter(
        draft.kind(spec, wanted)
        for draft in drafts
        for spec in (*changes[draft.name].keep.values(), *changes[draft.name].add)
    )
    return ScalePlan(changes, {kind: after[kind] for kind in wanted if after[kind] < wanted[kind]})


def _kinds_of(draft: _Draft, wanted: Iterable[str]) -> list[tuple[int, str | None]]:
    """Return the position and the kind of each candidate."""
    return [(index, draft.kind(spec, wanted)) for index, spec in enumerate(draft.candidates)]


def _with_kind(kind: str, count: int, drafts: Sequence[_Draft], nbytes: Mapping[str, int]) -> list[_Draft]:
    """Change nodes to ``mixed`` until there is capacity for `count` workers of a kind; those that hold least first.

    Raises
    ------
    ConfigError
        When no node can have workers of that kind; with the reason of each node that could not change its mode.
    """
    drafts = list(drafts)
    capacity = [sum(kind in draft.kinds(spec) for spec in draft.specs) for draft in drafts]
    known = {each for draft in drafts for spec in draft.specs for each in draft.kinds(spec)}
    reasons: dict[str, list[str]] = {}
    for index in sorted(range(len(drafts)), key=lambda index: drafts[index].data(nbytes)):
        if kind not in ("cpu", "gpu") or (any(capacity) and sum(capacity) >= count):
            break
        if capacity[index]:
            continue
        mixed = _mixed(drafts[index])
        if isinstance(mixed, str):
            reasons.setdefault(mixed, []).append(drafts[index].name)
        else:
            drafts[index] = mixed
            capacity[index] = sum(kind in mixed.kinds(spec) for spec in mixed.specs)
    if not any(capacity):
        found = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        why = "; ".join(found) if found else suggest(kind, sorted(known))
        raise ConfigError(f"scale({kind}={count}): no node has workers of the kind {kind!r}; {why}", key=kind)
    return drafts
