"""What a scheduler's rollouts came to since it began: numbers that only grow, for whoever watches it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Sums over all rollouts; the first workers of a node that joins are none.

    Attributes
    ----------
    swaps
        Outcome, such as ``changed`` or ``failed`` -> number of nodes.
    rollouts, seconds
        Number of rollouts, and their time in sum.
    keys, nbytes
        What was moved.
    restarts
        Node -> how often a worker crashed and was started again.
    """

    swaps: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    seconds: float = 0.0
    keys: int = 0
    nbytes: int = 0
    restarts: Counter[str] = field(default_factory=Counter)

    def add(self, report: Mapping[str, Any]) -> None:
        """Count a rollout that has ended, by its report as plain data."""
        self.rollouts += 1
        self.seconds += report["seconds"]
        for node in report["nodes"].values():
            self.swaps[node["outcome"]] += 1
            self.keys += node["keys"]
            self.nbytes += node["nbytes"]

    def restarted(self, node: str, times: int) -> None:
        """Count restarts; fewer than before are those of another worker."""
        if times > 0:
            self.restarts[node] += times
