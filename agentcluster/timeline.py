"""What a scheduler's events tell of rollouts and of adaptive scaling, as intervals and points in time.

Pure: times are those of the events, in seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

#: Steps after which a node has nothing to do in a rollout any more, or has not begun.
AT_REST = ("waiting", "ready", "standby")

Event = tuple[float, Mapping[str, Any]]


@dataclass(frozen=True)
class Span:
    """One step of one node in a rollout.

    Attributes
    ----------
    rollout
        What it is called: the mode that was asked for.
    node, step
        Which node, and what it did.
    began, ended
        When; `ended` is None while it lasts.
    """

    rollout: str
    node: str
    step: str
    began: float
    ended: float | None = None


def spans(events: Iterable[Event]) -> list[Span]:
    """Return the steps of all rollouts that events tell of, in the order in which they began."""
    found: list[Span] = []
    lasting: dict[tuple[float, str], int] = {}

    def end(key: tuple[float, str], when: float) -> None:
        if key in lasting:
            place = lasting.pop(key)
            found[place] = replace(found[place], ended=when)

    for when, event in events:
        if "rollout" not in event:
            continue
        began = event["began"]
        for key in [key for key in lasting if key[0] != began]:  # one runs at a time: what is left of others has ended
            end(key, when)
        if event.get("action") == "step":
            key = (began, event["node"])
            end(key, when)
            if event["step"] not in AT_REST:
                lasting[key] = len(found)
                found.append(Span(event["rollout"], event["node"], event["step"], when))
        elif event.get("action") == "ended":
            for key in [key for key in lasting if key[0] == began]:
                end(key, when)
    return found


def decisions(events: Iterable[Event]) -> list[Mapping[str, Any]]:
    """Return what adaptive scaling decided, oldest first; see :class:`agentcluster.decisions.Decision`."""
    return [event["adapt"] for _, event in events if "adapt" in event]
