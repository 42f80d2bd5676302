"""Changes of nodes: which workers stay, go and come. Decided by the controller, carried out by a swap."""

from __future__ import annotations

import heapq
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from agentcluster.model import Mode, NodeReport, WorkerSpec
from agentcluster.reports import shape_of
from agentcluster.requests import Strategy
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.wire import to_wire


@dataclass(frozen=True)
class Proposal:
    """What is to change on one node.

    Attributes
    ----------
    node
        The node.
    change
        Which workers stay, go and come.
    named
        The workers that come, by name.
    mode
        The mode that the node has afterwards.
    strategy, because
        Whether the new workers come before the old go, and why not, when they do not.
    """

    node: Node
    change: Change
    named: Mapping[str, WorkerSpec]
    mode: Mode
    strategy: Strategy = "surge"
    because: str = ""


def planned(name: str, proposal: Proposal) -> NodeReport:
    """Return what is to be done on one node."""
    return NodeReport(
        node=name,
        mode=proposal.mode.name,
        strategy=proposal.strategy,
        because=proposal.because,
        old=proposal.change.go,
        new=tuple(proposal.named),
        shape=shape_of(to_wire(proposal.named)) if proposal.named else "",
        kept=tuple(proposal.change.keep),
    )


#: How much of each unit, such as workers, threads and bytes of memory.
Amount = tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """What turns one node's plan into the next.

    Attributes
    ----------
    keep
        Workers that stay as they are: name -> settings.
    go
        Names of workers that go.
    come
        Settings of workers that come, not named yet.
    """

    keep: Mapping[str, WorkerSpec]
    go: tuple[str, ...]
    come: tuple[WorkerSpec, ...]


def difference(current: Mapping[str, WorkerSpec], wanted: Sequence[WorkerSpec]) -> Change:
    """Return the least change from `current` to `wanted`: a worker whose settings are still wanted is kept.

    Parameters
    ----------
    current
        Worker name -> settings, as they run.
    wanted
        The settings wanted, one per worker.
    """
    missing = list(wanted)
    keep = {}
    for name, spec in current.items():
        if spec in missing:
            missing.remove(spec)
            keep[name] = spec
    return Change(keep, tuple(name for name in current if name not in keep), tuple(missing))


@dataclass(frozen=True)
class Held:
    """A worker that runs.

    Attributes
    ----------
    nbytes
        What it holds in memory.
    amount
        What it counts for, in each unit that is asked for.
    """

    nbytes: int
    amount: Amount


def scaled(
    current: Mapping[str, Mapping[str, Held]],
    room: Mapping[str, Sequence[Amount]],
    wanted: Amount,
    extra: Container[str] = (),
) -> tuple[set[str], dict[str, list[int]]]:
    """Return which workers go, and which come on each node, so that what is wanted is there in every unit.

    Parameters
    ----------
    current
        Node -> worker -> what it holds and counts for.
    room
        Node -> what the workers count for that could come there, in the order in which they would.
    wanted
        Amount in each unit, such as workers, threads and bytes of memory; 0 where that does not matter.
    extra
        Nodes on which workers come last, and from which they go first among those that hold as much.

    Returns
    -------
    set of str
        Workers that go: those that hold least, on the nodes that have most; none without which something is missing.
    dict
        Node -> positions in `room` of the workers that come: first where fewest run, none that brings nothing. They are
        less than wanted when there is no room for more.
    """
    count = {node: len(workers) for node, workers in current.items()}
    there = [sum(held.amount[unit] for each in current.values() for held in each.values()) for unit in _units(wanted)]
    go: set[str] = set()
    least = [
        (held.nbytes, node not in extra, -count[node], node, name)
        for node, workers in current.items()
        for name, held in workers.items()
    ]
    heapq.heapify(least)
    while least:
        nbytes, stays, negated, node, worker = heapq.heappop(least)
        if -negated != count[node]:  # one went from there since
            heapq.heappush(least, (nbytes, stays, -count[node], node, worker))
            continue
        left = [have - part for have, part in zip(there, current[node][worker].amount, strict=True)]
        if all(have >= want for have, want in zip(left, wanted, strict=True)):
            go.add(worker)
            count[node] -= 1
            there = left
    come: dict[str, list[int]] = {node: [] for node in current}
    order = {node: number for number, node in enumerate(current)}
    fewest = [(node in extra, count[node], order[node], 0) for node in current if room[node]]
    heapq.heapify(fewest)
    nodes = list(current)
    while fewest and (missing := [unit for unit in _units(wanted) if there[unit] < wanted[unit]]):
        last, number, position, index = heapq.heappop(fewest)
        offered = room[nodes[position]]
        if any(offered[index][unit] for unit in missing):
            come[nodes[position]].append(index)
            there = [have + part for have, part in zip(there, offered[index], strict=True)]
            number += 1
        if index + 1 < len(offered):
            heapq.heappush(fewest, (last, number, position, index + 1))
    return go, come


def _units(amount: Amount) -> range:
    return range(len(amount))


def filled(nbytes: Mapping[str, int | None], wanted: int) -> tuple[list[str], list[str]]:
    """Return which nodes are emptied and which are filled, so that `wanted` have workers.

    Parameters
    ----------
    nbytes
        Node -> what its workers hold; None for a node that has none.
    wanted
        How many nodes are to have workers.

    Returns
    -------
    list of str, list of str
        Nodes to empty, those that hold least; nodes to fill, the first that have none.
    """
    used = sorted((held, node) for node, held in nbytes.items() if held is not None)
    free = [node for node, held in nbytes.items() if held is None]
    return [node for _, node in used[: max(0, len(used) - wanted)]], free[: max(0, wanted - len(used))]
