"""Which worker takes which copies of the data of workers that leave: the ones with most room, and near ones first.

Pure: reads the scheduler's states of workers and tasks, asks nobody for anything.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

#: Part of its memory limit up to which a worker on the same host is preferred: its copies cross no network.
CROWDED = 0.6


def placed(tasks: Sequence[Any], recipients: Sequence[Any]) -> dict[str, list[Any]]:
    """Return who is to fetch a copy of what.

    Parameters
    ----------
    tasks
        ``TaskState`` of the scheduler, each in the memory of some worker.
    recipients
        ``WorkerState`` of the workers that may take copies.

    Returns
    -------
    dict
        Address of a recipient -> keys. Each task is there once; none is when there is no recipient.
    """
    by_host: dict[str | None, list[tuple[float, int, Any]]] = defaultdict(list)
    for number, ws in enumerate(recipients):
        for host in (ws.host, None):
            heapq.heappush(by_host[host], (ws.memory.optimistic / _room(ws), number, ws))
    wanted: defaultdict[str, list[Any]] = defaultdict(list)
    for holder, bundle in _bundles(tasks, len(recipients)) if recipients else ():
        near = by_host.get(holder.host if holder else None)
        heap = near if near and near[0][0] < CROWDED else by_host[None]
        load, number, ws = heap[0]
        nbytes = sum(ts.get_nbytes() for ts in bundle)
        heapq.heapreplace(heap, (load + nbytes / _room(ws), number, ws))
        wanted[ws.address] += [ts.key for ts in bundle]
    return dict(wanted)


def _bundles(tasks: Sequence[Any], recipients: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a holder and some of its tasks, about a recipient's share: a connection costs more than 100 small keys."""
    by_holder: defaultdict[Any, list[Any]] = defaultdict(list)
    for ts in tasks:
        by_holder[next(iter(ts.who_has or ()), None)].append(ts)
    share = max(1.0, sum(ts.get_nbytes() for ts in tasks) / recipients)
    for holder, held in by_holder.items():
        before = accumulate((ts.get_nbytes() for ts in held[:-1]), initial=0)
        for _, bundle in groupby(zip(held, before, strict=True), lambda pair: pair[1] // share):
            yield holder, [ts for ts, _ in bundle]


def _room(ws: Any) -> int:
    """Return a worker's memory limit; one without is taken to have much."""
    return ws.memory_limit or 2**40
