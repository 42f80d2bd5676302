"""A change of workers on one or many nodes, as a pure state machine: events in, commands out.

::

    starting ──all started──▶ retiring ──confirmed──▶ stopping ──all stopped──▶ done
       │                         │
       └──one failed──▶ ┌────────┴─refused─▶ returning ──confirmed──▶ undoing ──all stopped──▶ failed
         (once the      │                       │
          others settled)                       └──refused──▶ failed (both run)

New workers come up on every node first; only when all are ready does data leave the old ones, and only when the
scheduler confirms that an old worker holds no only copy of a key is it stopped. A failure before that point takes the
new workers away again, data first, and leaves the old as they were. Whoever carries the commands out feeds what became
true back in; the machine asks for nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

Phase = Literal["starting", "retiring", "stopping", "returning", "undoing", "done", "failed"]


@dataclass(frozen=True)
class NodeChange:
    """The named workers that go from and come to one node."""

    node: str
    go: tuple[str, ...] = ()
    come: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """A node's new workers have all joined the scheduler."""

    node: str


@dataclass(frozen=True)
class StartFailed:
    """A node's new workers failed or were late; none of them runs."""

    node: str
    why: str


@dataclass(frozen=True)
class Retired:
    """The scheduler confirmed: the workers asked about hold no only copy of a key and get no more tasks."""


@dataclass(frozen=True)
class RetireRefused:
    """Some of the workers asked about still hold data that could not be moved; all of them go on working."""

    why: str


@dataclass(frozen=True)
class Stopped:
    """A node's workers that were to stop have ended."""

    node: str


Event = Started | StartFailed | Retired | RetireRefused | Stopped


@dataclass(frozen=True)
class Start:
    """Start a node's new workers."""

    change: NodeChange


@dataclass(frozen=True)
class RetireOld:
    """Move data off all old workers, and take them from the scheduler when that is done."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class RetireNew:
    """Move data off the new workers, back to the old."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """End processes of a node's workers that hold nothing any more."""

    node: str
    workers: tuple[str, ...]


Command = Start | RetireOld | RetireNew | Stop


@dataclass(frozen=True)
class Rollout:
    """The state of one change.

    Attributes
    ----------
    changes
        One per node.
    phase
        See the drawing above.
    waiting
        Nodes whose answer is due in this phase.
    started
        Nodes whose new workers run.
    failures
        What went wrong: (node, or "" for all, and why).
    both
        Whether old and new workers run side by side in the end, because neither could be retired.
    """

    changes: tuple[NodeChange, ...]
    phase: Phase = "starting"
    waiting: frozenset[str] = frozenset()
    started: frozenset[str] = frozenset()
    failures: tuple[tuple[str, str], ...] = ()
    both: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("done", "failed")


Step = tuple[Rollout, Sequence[Command]]


def begin(changes: Sequence[NodeChange]) -> Step:
    """Return a new rollout and its first commands.

    Raises
    ------
    ValueError
        When a node has more than one change, or a worker would both go and come.
    """
    nodes = [change.node for change in changes]
    workers = [worker for change in changes for worker in (*change.go, *change.come)]
    if len(set(nodes)) != len(nodes) or len(set(workers)) != len(workers):
        raise ValueError(f"a node or a worker is in more than one change: {list(changes)}")
    coming = [change for change in changes if change.come]
    rollout = Rollout(tuple(changes), waiting=frozenset(change.node for change in coming))
    if not coming:
        return _retire(rollout)
    return rollout, [Start(change) for change in coming]


def advance(rollout: Rollout, event: Event) -> Step:
    """Return what follows from an event: the next state, and the commands to carry out now.

    Raises
    ------
    ValueError
        When the event cannot be true in this state.
    """
    match event:
        case Started(node) if rollout.phase == "starting" and node in rollout.waiting:
            return _start_settled(replace(rollout, started=rollout.started | {node}), node)
        case StartFailed(node, why) if rollout.phase == "starting" and node in rollout.waiting:
            return _start_settled(replace(rollout, failures=(*rollout.failures, (node, why))), node)
        case Retired() if rollout.phase == "retiring":
            return _stop(rollout, "stopping", {c.node: c.go for c in rollout.changes})
        case Retired() if rollout.phase == "returning":
            return _stop(rollout, "undoing", {c.node: c.come for c in rollout.changes if c.node in rollout.started})
        case RetireRefused(why) if rollout.phase == "retiring":
            return _return(replace(rollout, failures=(*rollout.failures, ("", why))))
        case RetireRefused(why) if rollout.phase == "returning":
            failures = (*rollout.failures, ("", why))
            return replace(rollout, phase="failed", both=True, failures=failures), []
        case Stopped(node) if rollout.phase in ("stopping", "undoing") and node in rollout.waiting:
            return _stop_settled(replace(rollout, waiting=rollout.waiting - {node}))
        case Started() | StartFailed() | Retired() | RetireRefused() | Stopped():
            raise ValueError(f"{event} cannot happen while {rollout.phase}, waiting for {sorted(rollout.waiting)}")
        case _:
            assert_never(event)


def _start_settled(rollout: Rollout, node: str) -> Step:
    rollout = replace(rollout, waiting=rollout.waiting - {node})
    if rollout.waiting:
        return rollout, []
    return _return(rollout) if rollout.failures else _retire(rollout)


def _retire(rollout: Rollout) -> Step:
    old = tuple(worker for change in rollout.changes for worker in change.go)
    if not old:
        return replace(rollout, phase="done"), []
    return replace(rollout, phase="retiring"), [RetireOld(old)]


def _return(rollout: Rollout) -> Step:
    new = tuple(worker for change in rollout.changes if change.node in rollout.started for worker in change.come)
    if not new:
        return replace(rollout, phase="failed"), []
    return replace(rollout, phase="returning"), [RetireNew(new)]


def _stop(rollout: Rollout, phase: Phase, workers: dict[str, tuple[str, ...]]) -> Step:
    ending = {node: names for node, names in workers.items() if names}
    rollout = replace(rollout, phase=phase, waiting=frozenset(ending))
    return rollout, [Stop(node, names) for node, names in ending.items()]


def _stop_settled(rollout: Rollout) -> Step:
    if rollout.waiting:
        return rollout, []
    return replace(rollout, phase="done" if rollout.phase == "stopping" else "failed"), []
