"""How measurements are summed up and printed: medians, ratios within one run, floors and tables.

Pure, and without heavy imports: workers that are spawned import the benchmark's main module again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


def median(values: Iterable[float]) -> float:
    """Return the median; of no values it is an error."""
    return statistics.median(values)


def times(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many times faster we are: the ratio of the two medians, 0 where ours took no time to measure."""
    return median(theirs) / median(ours) if median(ours) else 0.0


def spread(values: Sequence[float]) -> str:
    """Say seconds as median and range: ``0.41 (0.38-0.52)``."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


@dataclass(frozen=True)
class Floor:
    """A value that must not be below another.

    Attributes
    ----------
    what
        What was measured.
    value, least
        What it came to, and the least that will do.
    """

    what: str
    value: float
    least: float

    @property
    def holds(self) -> bool:
        """Whether the value is high enough."""
        return self.value >= self.least

    def row(self) -> tuple[str, ...]:
        """Return it as a row of a table."""
        return (self.what, f"{self.value:.2f}", f">= {self.least:g}", "PASS" if self.holds else "FAIL")


def exit_code(floors: Iterable[Floor]) -> int:
    """Return 0 when every floor holds."""
    return 0 if all(floor.holds for floor in floors) else 1


def parts(steps: Sequence[Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """Return, of several runs that were taken apart, each part's name, median in ms and share of the sum of medians."""
    names = list(dict.fromkeys(name for step in steps for name in step))
    medians = {name: median([step.get(name, 0.0) for step in steps]) for name in names}
    whole = sum(medians.values())
    return [(name, f"{1000 * m:.0f}", f"{100 * m / whole:.0f}%" if whole else "-") for name, m in medians.items()]


def titled(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table under its title."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([title, *text])
