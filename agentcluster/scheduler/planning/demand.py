"""What tasks need, what nodes have and could have, and how much of it there may be: the values of adaptive scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentcluster.model import WorkerSpec
from agentcluster.requests import AdaptiveRequest
from agentcluster.scheduler.planning.change import Amount


@dataclass(frozen=True)
class Need:
    """Tasks that ask for the same resources.

    Attributes
    ----------
    resources
        What each takes of a worker; {} for nothing in particular.
    slots
        How many of them should run at once.
    tasks
        How many there are, waiting or running; 0 for room that was requested before they come.
    example
        The key of one.
    name
        What tasks of that key are called.
    """

    resources: Mapping[str, float]
    slots: int
    tasks: int = 0
    example: str = ""
    name: str = ""

    def fits(self, spec: WorkerSpec) -> int:
        """Return how many of them a worker can run at once."""
        return self.at_once(spec.nthreads or 1, spec.resources)

    def at_once(self, threads: int, offered: Mapping[str, float]) -> int:
        """Return for how many of them so many threads and resources are enough."""
        for name, each in self.resources.items():
            if each > 0:
                threads = min(threads, int(offered.get(name, 0) // each))
        return threads


@dataclass(frozen=True)
class Seat:
    """A worker that runs.

    Attributes
    ----------
    spec
        Its settings.
    nbytes
        What it holds.
    runs
        Number of its tasks, by position of their need.
    """

    spec: WorkerSpec
    nbytes: int = 0
    runs: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Spot:
    """A node.

    Attributes
    ----------
    name
        Its name.
    mode
        The name of its mode.
    seats
        Its workers by name.
    offers
        What it would have in each mode that it can and may have; the first is the one that it goes back to.
    extra
        Whether it is there only for what the others have no room for.
    """

    name: str
    mode: str
    seats: Mapping[str, Seat]
    offers: Mapping[str, Sequence[WorkerSpec]]
    extra: bool = False


@dataclass(frozen=True)
class Bounds:
    """How few and how many there may be.

    Attributes
    ----------
    least, most
        Workers, threads, and bytes of their memory limits, together.
    kinds
        Resource or kind of worker, in lower case -> the least and the greatest number of workers.
    """

    least: Amount = (0, 0, 0)
    most: Amount = (math.inf, math.inf, math.inf)
    kinds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, request: AdaptiveRequest) -> Bounds:
        """Return the limits that a request sets."""
        kinds = {kind: (least or 0, _limit(most)) for kind, (least, most) in request.kinds.items()}
        return cls(request.least, tuple(map(_limit, request.most)), kinds)


def _limit(most: float | None) -> float:
    return math.inf if most is None else most


def kinds(spec: WorkerSpec) -> set[str]:
    """Return what a worker is called in bounds."""
    return {spec.kind, *(name.lower() for name in spec.resources)}


def amount(spec: WorkerSpec) -> Amount:
    """Return workers, threads and bytes that one worker counts for."""
    return 1, spec.nthreads or 1, spec.memory_limit or 0
