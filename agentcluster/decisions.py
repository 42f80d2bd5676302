"""What adaptive scaling decided and why, as users read it: a table, and a number of workers over time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import format_time

from agentcluster.markup import amounts, html_table, page, text_table


@dataclass(frozen=True)
class Decision:
    """One thing that was done, or said.

    Attributes
    ----------
    when
        Seconds since the epoch.
    saw
        What tasks needed.
    decided
        What changed on which node.
    why
        Why, where that does not speak for itself.
    took
        Seconds.
    workers
        Kind of worker -> how many there were afterwards.
    """

    when: float
    saw: str
    decided: str
    why: str
    took: float
    workers: Mapping[str, int]


class AdaptiveLog(Sequence[Decision]):
    """Decisions, oldest first, with a table as their repr.

    Examples
    --------
    >>> AdaptiveLog()
    nothing was decided yet
    >>> log = AdaptiveLog([Decision(0.0, "120 'train' tasks need GPU=1", "local: +2 -2 auto-gpu", "", 4.0, {"gpu": 2})])
    >>> log.timeline()
    ([0.0], {'gpu': [2]})
    """

    HEADER = ("when", "saw", "decided", "why", "took", "workers")

    def __init__(self, decisions: Sequence[Decision] = ()) -> None:
        self._decisions = tuple(decisions)

    def __getitem__(self, index: Any) -> Any:
        return self._decisions[index]

    def __len__(self) -> int:
        return len(self._decisions)

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row of text per decision."""
        return [
            (
                time.strftime("%H:%M:%S", time.localtime(each.when)),
                each.saw,
                each.decided,
                each.why,
                format_time(each.took),
                amounts(each.workers),
            )
            for each in self._decisions
        ]

    def __repr__(self) -> str:
        return text_table(self.HEADER, self.rows()) if self._decisions else "nothing was decided yet"

    def _repr_html_(self) -> str:
        return page(html_table(self.HEADER, self.rows()))

    def timeline(self) -> tuple[list[float], dict[str, list[int]]]:
        """Return how many workers of each kind there were, for a plot with steps.

        Returns
        -------
        times : list of float
            Seconds since the epoch, one for each decision.
        workers : dict
            Kind of worker -> their number from each of those times on, lists of the same length.
        """
        kinds = dict.fromkeys(kind for each in self._decisions for kind in each.workers)
        return (
            [each.when for each in self._decisions],
            {kind: [each.workers.get(kind, 0) for each in self._decisions] for kind in kinds},
        )
