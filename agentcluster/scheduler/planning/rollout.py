"""Rollout over many nodes as a pure state machine: events in, commands out.

A :class:`~agentcluster.scheduler.planning.wave.Wave` changes a few nodes together. A :class:`Rollout` is waves, one
after the other, with pauses. When one fails, those before it are rolled back or left, or the next ones go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from agentcluster.requests import OnFailure, Strategy
from agentcluster.scheduler.planning.change import NodeChange
from agentcluster.scheduler.planning.wave import (
    Cancelled,
    Command,
    Event,
    GiveUpRetiring,
    GiveUpStarting,
    Retired,
    RetireNew,
    RetireOld,
    RetireRefused,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Wave,
    advance,
    begin,
)

__all__ = [
    "BackEnded",
    "Cancel",
    "Cancelled",
    "Command",
    "Event",
    "GiveUpRetiring",
    "GiveUpStarting",
    "NodeChange",
    "OnFailure",
    "Pause",
    "Resume",
    "RetireNew",
    "RetireOld",
    "RetireRefused",
    "Retired",
    "Rollout",
    "RolloutCommand",
    "RolloutEvent",
    "RolloutStep",
    "RunBack",
    "RunWave",
    "Start",
    "StartFailed",
    "Started",
    "Stop",
    "Stopped",
    "Strategy",
    "Wave",
    "WaveEnded",
    "advance",
    "begin",
    "roll",
    "roll_on",
]


@dataclass(frozen=True)
class Rollout:
    """Waves, one after the other.

    Attributes
    ----------
    waves
        Nodes of each wave, in order.
    on_failure
        What happens to the others when a wave fails: ``rollback`` brings those that were changed back, ``stop`` leaves
        them, ``continue`` goes on.
    position
        Index of the next wave.
    state
        ``running`` a wave, ``paused`` before the next, ``back`` while changed nodes are brought back, or ``over``.
    pausing
        Whether to pause when the wave that runs has ended.
    changed, failed
        Nodes that have their new workers, and that have not.
    cancelled
        Why no further wave begins.
    """

    waves: tuple[tuple[str, ...], ...]
    on_failure: OnFailure = "rollback"
    position: int = 0
    state: Literal["new", "running", "paused", "back", "over"] = "new"
    pausing: bool = False
    changed: tuple[str, ...] = ()
    failed: tuple[str, ...] = field(default=())
    cancelled: str | None = None


@dataclass(frozen=True)
class WaveEnded:
    """The wave that ran has ended; `failed` names its nodes that have not got their new workers."""

    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class BackEnded:
    """The nodes that were to be brought back are back, but for `failed`."""

    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pause:
    """Begin no further wave until :class:`Resume`."""


@dataclass(frozen=True)
class Resume:
    """Go on."""


@dataclass(frozen=True)
class Cancel:
    """Begin no further wave, and treat what was changed as `on_failure` says."""

    why: str


@dataclass(frozen=True)
class RunWave:
    """Change these nodes."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class RunBack:
    """Bring these nodes back to the plan they had."""

    nodes: tuple[str, ...]


RolloutEvent = WaveEnded | BackEnded | Pause | Resume | Cancel
RolloutCommand = RunWave | RunBack
RolloutStep = tuple[Rollout, RolloutCommand | None]


def roll(rollout: Rollout) -> RolloutStep:
    """Return a rollout's first state after ``new``, and its first command."""
    return _next(rollout)


def roll_on(rollout: Rollout, event: RolloutEvent) -> RolloutStep:
    """Return what follows from an event.

    Raises
    ------
    ValueError
        When the event cannot be true in this state.
    """
    match event:
        case WaveEnded(failed) if rollout.state == "running":
            nodes = rollout.waves[rollout.position]
            rollout = replace(
                rollout,
                position=rollout.position + 1,
                changed=(*rollout.changed, *(node for node in nodes if node not in failed)),
                failed=(*rollout.failed, *(node for node in nodes if node in failed)),
            )
            return _next(rollout)
        case BackEnded(failed) if rollout.state == "back":
            return replace(rollout, state="over", changed=tuple(n for n in rollout.changed if n in failed)), None
        case Pause():
            return (rollout if rollout.state == "over" else replace(rollout, pausing=True)), None
        case Resume():
            rollout = replace(rollout, pausing=False)
            return _next(rollout) if rollout.state == "paused" else (rollout, None)
        case Cancel() if rollout.state == "over":
            return rollout, None
        case Cancel(why):
            rollout = replace(rollout, cancelled=rollout.cancelled or why)
            return _next(rollout) if rollout.state == "paused" else (rollout, None)
        case WaveEnded() | BackEnded():
            raise ValueError(f"{event} cannot happen while {rollout.state}")
        case _:
            assert_never(event)


def _next(rollout: Rollout) -> RolloutStep:
    bad = bool(rollout.failed) and rollout.on_failure != "continue"
    if bad or rollout.cancelled is not None:
        if rollout.on_failure != "stop" and rollout.changed:
            return replace(rollout, state="back"), RunBack(rollout.changed)
        return replace(rollout, state="over"), None
    if rollout.position == len(rollout.waves):
        return replace(rollout, state="over"), None
    if rollout.pausing:
        return replace(rollout, state="paused"), None
    return replace(rollout, state="running"), RunWave(rollout.waves[rollout.position])
