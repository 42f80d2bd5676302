"""Placement of data that moves: the recipient of each replica, by free memory, preferably on the same host.

Pure: reads the scheduler's states of workers and tasks, and sends nothing.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Protocol

from dask.typing import Key

#: Part of its memory limit up to which a worker on the same host is preferred: its replicas cross no network.
CROWDED = 0.6

#: Bytes of memory that a worker without a limit is taken to have.
UNLIMITED = 2**40


class Memory(Protocol):
    """Part of dask's ``MemoryState`` that is read here."""

    @property
    def optimistic(self) -> int:
        """Bytes in use, without memory that was allocated only lately."""


class Worker(Protocol):
    """Part of dask's ``WorkerState`` that is read here."""

    @property
    def address(self) -> str:
        """Address of the worker."""

    @property
    def host(self) -> str:
        """Its host."""

    @property
    def memory(self) -> Memory:
        """Memory of its process."""

    @property
    def memory_limit(self) -> int:
        """Its memory limit in bytes; 0 for none."""


class StoredTask(Protocol):
    """Part of dask's ``TaskState`` that is read here."""

    @property
    def key(self) -> Key:
        """Key of the task."""

    @property
    def who_has(self) -> Collection[Worker] | None:
        """Workers that hold the result."""

    def get_nbytes(self) -> int:
        """Return the size of the result in bytes."""


def choose_recipients(tasks: Sequence[StoredTask], recipients: Sequence[Worker]) -> dict[str, list[Key]]:
    """Choose the worker that fetches a replica of each result.

    Parameters
    ----------
    tasks
        Tasks with their results in the memory of some worker.
    recipients
        Workers that may take replicas.

    Returns
    -------
    dict
        Address of a recipient -> keys. Each task is there once; none is when there is no recipient.
    """
    # Host -> heap of its workers by load, the fraction of their memory in use; None -> heap of all workers.
    by_host: dict[str | None, list[tuple[float, int, Worker]]] = defaultdict(list)
    for number, ws in enumerate(recipients):
        for host in (ws.host, None):
            heapq.heappush(by_host[host], (ws.memory.optimistic / _limit(ws), number, ws))
    chosen: defaultdict[str, list[Key]] = defaultdict(list)
    for holder, bundle in _bundles(tasks, len(recipients)) if recipients else ():
        near = by_host.get(holder.host if holder else None)
        heap = near if near and near[0][0] < CROWDED else by_host[None]
        load, number, ws = heap[0]
        nbytes = sum(ts.get_nbytes() for ts in bundle)
        heapq.heapreplace(heap, (load + nbytes / _limit(ws), number, ws))
        chosen[ws.address] += [ts.key for ts in bundle]
    return dict(chosen)


def _bundles(tasks: Sequence[StoredTask], recipients: int) -> Iterator[tuple[Worker | None, list[StoredTask]]]:
    """Yield a holder and some of its tasks, about a recipient's share: a connection costs more than 100 small keys."""
    by_holder: defaultdict[Worker | None, list[StoredTask]] = defaultdict(list)
    for ts in tasks:
        by_holder[next(iter(ts.who_has or ()), None)].append(ts)
    share = max(1.0, sum(ts.get_nbytes() for ts in tasks) / recipients)
    for holder, stored in by_holder.items():
        before = accumulate((ts.get_nbytes() for ts in stored[:-1]), initial=0)
        for _, bundle in groupby(zip(stored, before, strict=True), lambda pair: pair[1] // share):
            yield holder, [ts for ts, _ in bundle]


def _limit(ws: Worker) -> int:
    return ws.memory_limit or UNLIMITED
