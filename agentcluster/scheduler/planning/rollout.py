"""Rollout over many nodes as a pure state machine: events in, commands out.

A :class:`~agentcluster.scheduler.planning.wave.Wave` changes a few nodes together. A :class:`Rollout` is waves, one
after the other, with pauses. When one fails, those before it are rolled back or left, or the next ones continue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, assert_never

from agentcluster.requests import OnFailure


@dataclass(frozen=True)
class Rollout:
    """State of one rollout.

    Attributes
    ----------
    waves
        Nodes of each wave, in order.
    on_failure
        Handling of a wave that fails: ``rollback`` returns the changed nodes to their earlier plans, ``stop`` leaves
        them, ``continue`` runs the other waves.
    position
        Index of the next wave.
    state
        ``running`` a wave, ``paused`` before the next, ``back`` while changed nodes are rolled back, or ``over``.
    pausing
        Whether it pauses when the present wave has ended.
    changed, failed
        Nodes that have their new workers, and those that failed to get them.
    cancelled
        Reason why no further wave begins.
    """

    waves: tuple[tuple[str, ...], ...]
    on_failure: OnFailure = "rollback"
    position: int = 0
    state: Literal["new", "running", "paused", "back", "over"] = "new"
    pausing: bool = False
    changed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    cancelled: str | None = None


@dataclass(frozen=True)
class WaveEnded:
    """The wave has ended; `failed` are its nodes that do not have their new workers."""

    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class BackEnded:
    """The rollback has ended; `failed` are the nodes that do not have their earlier plan."""

    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pause:
    """No further wave is to begin until :class:`Resume`."""


@dataclass(frozen=True)
class Resume:
    """The rollout is to continue."""


@dataclass(frozen=True)
class Cancel:
    """No further wave is to begin, and changed nodes are handled as after a failure."""

    why: str


@dataclass(frozen=True)
class RunWave:
    """Change these nodes."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class RunBack:
    """Return these nodes to the plans that they had."""

    nodes: tuple[str, ...]


RolloutEvent = WaveEnded | BackEnded | Pause | Resume | Cancel
RolloutCommand = RunWave | RunBack
RolloutStep = tuple[Rollout, RolloutCommand | None]


def roll(rollout: Rollout) -> RolloutStep:
    """Begin a rollout.

    Parameters
    ----------
    rollout
        A rollout in state ``new``.

    Returns
    -------
    Rollout, RunWave or RunBack or None
        The next state, and the command to carry out now.
    """
    return _next(rollout)


def roll_on(rollout: Rollout, event: RolloutEvent) -> RolloutStep:
    """Advance a rollout by one event.

    Parameters
    ----------
    rollout
        The state.
    event
        The event.

    Returns
    -------
    Rollout, RunWave or RunBack or None
        The next state, and the command to carry out now; None to wait for the next event.

    Raises
    ------
    ValueError
        When the event cannot happen in this state.
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
    """Return the step after a wave, a pause, or the beginning."""
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
