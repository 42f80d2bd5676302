"""Values of adaptive scaling: the resource requests of tasks, the capacity of nodes, and the limits of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agentcluster.model import WorkerSpec
from agentcluster.requests import AdaptiveRequest

#: Amount in each unit: workers, threads, and bytes of memory.
Amount = tuple[float, ...]


@dataclass(frozen=True)
class ResourceRequest:
    """Demand of the tasks that ask for the same resources.

    Attributes
    ----------
    resources
        Amount of each resource that one task takes from its worker; {} for tasks that any worker can run.
    slots
        Number of these tasks that should run at once.
    tasks
        Number of these tasks that wait or run; 0 for capacity that was requested before its tasks come.
    example
        Key of one of the tasks.
    name
        Prefix of that key.
    """

    resources: Mapping[str, float]
    slots: int
    tasks: int = 0
    example: str = ""
    name: str = ""

    def slots_on(self, spec: WorkerSpec) -> int:
        """Count the tasks that an idle worker can run at once.

        Parameters
        ----------
        spec
            Settings of the worker.

        Returns
        -------
        int
            0 where the worker can run none.
        """
        return self.slots_within(spec.nthreads or 1, spec.resources)

    def slots_within(self, threads: int, resources: Mapping[str, float]) -> int:
        """Count the tasks that can run at once with some threads and resources.

        Parameters
        ----------
        threads
            Number of free threads.
        resources
            Free amount of each resource.

        Returns
        -------
        int
            0 where not even one can run.
        """
        for name, each in self.resources.items():
            if each > 0:
                threads = min(threads, int(resources.get(name, 0) // each))
        return threads


@dataclass(frozen=True)
class RunningWorker:
    """Worker that runs.

    Attributes
    ----------
    spec
        Its settings.
    nbytes
        Bytes of data that it holds.
    tasks
        Position of a resource request -> number of its tasks that the worker has.
    """

    spec: WorkerSpec
    nbytes: int = 0
    tasks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeCapacity:
    """Workers that a node has, and those that it could have.

    Attributes
    ----------
    name
        Name of the node.
    mode
        Name of its mode.
    workers
        Worker name -> worker, of those that run.
    offers
        Mode -> the workers that it puts on the node, for each mode that the node can and may have. The first is the
        mode to which the node returns.
    extra
        Whether the node is used only for demand that the other nodes have no capacity for.
    """

    name: str
    mode: str
    workers: Mapping[str, RunningWorker]
    offers: Mapping[str, Sequence[WorkerSpec]]
    extra: bool = False

    @property
    def first_mode(self) -> str:
        """Mode to which the node returns."""
        return next(iter(self.offers), self.mode)


@dataclass(frozen=True)
class Bounds:
    """Lower and upper limits of the workers on all nodes together.

    Attributes
    ----------
    least, most
        Workers, threads, and bytes of their memory limits.
    kinds
        Resource or kind of worker, in lower case -> the least and the greatest number of workers.
    """

    least: Amount = (0, 0, 0)
    most: Amount = (math.inf, math.inf, math.inf)
    kinds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, request: AdaptiveRequest) -> Bounds:
        """Read the limits of an adaptive request.

        Parameters
        ----------
        request
            The request; None is no limit there.

        Returns
        -------
        Bounds
            With infinity in place of None.
        """
        kinds = {kind: (least or 0, _limit(most)) for kind, (least, most) in request.kinds.items()}
        return cls(request.least, tuple(map(_limit, request.most)), kinds)


def _limit(most: float | None) -> float:
    return math.inf if most is None else most


def kinds(spec: WorkerSpec) -> set[str]:
    """Return the kinds of a worker, as the keys of `Bounds.kinds` name them.

    Parameters
    ----------
    spec
        Settings of the worker.

    Returns
    -------
    set of str
        Its kind, and its resources in lower case.
    """
    return {spec.kind, *(name.lower() for name in spec.resources)}


def amount(spec: WorkerSpec) -> Amount:
    """Return the workers, threads and bytes of memory of one worker.

    Parameters
    ----------
    spec
        Settings of the worker.

    Returns
    -------
    tuple of float
        One worker, its threads, and its memory limit; 0 bytes where it has no limit.
    """
    return 1, spec.nthreads or 1, spec.memory_limit or 0


def total(amounts: Iterable[Amount], units: int) -> Amount:
    """Add amounts up, unit by unit.

    Parameters
    ----------
    amounts
        Amounts in the same units.
    units
        Number of these units.

    Returns
    -------
    tuple of float
        Zeros where there are no amounts.
    """
    return tuple(sum(column) for column in zip((0,) * units, *amounts, strict=True))
