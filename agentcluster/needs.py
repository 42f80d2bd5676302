"""What tasks need, what nodes have and could have, and how much of it there may be: the values of adaptive scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentcluster.allocate import Amount
from agentcluster.model import Hardware, Mode, WorkerSpec


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
class Asked:
    """What an adaptive cluster asks the scheduler for, again and again.

    Attributes
    ----------
    modes
        What nodes may run; () for what they do. The first that a node can have is the one that it goes back to.
    target_duration
        Seconds within which all that is to do should be done.
    least, most
        Workers, threads, and bytes of their memory limits, together; None for no limit.
    kinds
        Resource or kind of worker, in lower case -> the least and the greatest number of workers; None for no limit.
    requests
        Resource -> how many tasks that need one of it there is to be room for, whether they are there or not.
    may_go
        Workers, and nodes that go back to their first mode, that have not been needed for long enough.
    may_come
        Whether workers may come.
    reserve
        Host that may be launched, in the order in which they are -> its hardware; None where that is not known.
    extra
        Nodes on such hosts: they have workers only for what the others have no room for.
    """

    modes: tuple[Mode, ...] = ()
    target_duration: float = 5.0
    least: tuple[float, ...] = (0, 0, 0)
    most: tuple[float | None, ...] = (None, None, None)
    kinds: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    requests: Mapping[str, int] = field(default_factory=dict)
    may_go: tuple[str, ...] = ()
    may_come: bool = True
    reserve: Mapping[str, Hardware | None] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    def bounds(self) -> Bounds:
        """Return the limits as :mod:`fitting` takes them."""
        kinds = {kind: (least or 0, _limit(most)) for kind, (least, most) in self.kinds.items()}
        return Bounds(self.least, tuple(map(_limit, self.most)), kinds)


def _limit(most: float | None) -> float:
    return math.inf if most is None else most


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


def kinds(spec: WorkerSpec) -> set[str]:
    """Return what a worker is called in bounds."""
    return {spec.kind, *(name.lower() for name in spec.resources)}


def amount(spec: WorkerSpec) -> Amount:
    """Return workers, threads and bytes that one worker counts for."""
    return 1, spec.nthreads or 1, spec.memory_limit or 0
