"""Which hosts of the reserve are worth a launch: those without which something is missing, and that could bring it.

Pure: what is missing is asked of :mod:`fitting`, with the hosts added that might help.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from agentcluster.fitting import Fit
from agentcluster.model import Hardware, WorkerSpec
from agentcluster.modes.classes import NANNY
from agentcluster.needs import Asked, Need, Spot


def called_up(
    asked: Asked,
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
