"""Which workers stay, which go and where new ones come: pure arithmetic over plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentcluster.model import WorkerSpec


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


def scaled(
    current: Mapping[str, Mapping[str, int]], capacity: Mapping[str, int], total: int
) -> tuple[set[str], dict[str, int]]:
    """Return which workers go, and how many come on each node, so that `total` run.

    Parameters
    ----------
    current
        Node -> worker -> bytes that it holds.
    capacity
        Node -> the most workers that its mode puts there.
    total
        Workers wanted over all nodes.

    Returns
    -------
    set of str
        Workers that go: those that hold least, on the nodes that have most.
    dict
        Node -> number of workers that come: first where fewest run. In sum less than asked when capacity ends.
    """
    count = {node: len(workers) for node, workers in current.items()}
    go: set[str] = set()
    while sum(count.values()) > total:
        _, _, node, worker = min(
            (nbytes, -count[node], node, worker)
            for node, workers in current.items()
            for worker, nbytes in workers.items()
            if worker not in go
        )
        go.add(worker)
        count[node] -= 1
    come = dict.fromkeys(current, 0)
    while sum(count.values()) < total:
        room = [node for node in current if count[node] < capacity[node]]
        if not room:
            break
        node = min(room, key=lambda n: count[n])
        count[node] += 1
        come[node] += 1
    return go, come
