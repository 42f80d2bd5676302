"""A few nodes that change together, as a pure state machine: events in, commands out.

With the strategy ``surge``::

    starting ──all started──▶ retiring ──confirmed──▶ stopping ──all stopped──▶ done
       │                         │
       └─failed, or cancelled─▶ ─┴─refused─▶ returning ──confirmed──▶ undoing ──all stopped──▶ failed
         (once the others settled)              └──refused──▶ failed (both run)

New workers are up on every node of the wave before data leaves the old ones, and only when the scheduler confirms that
an old worker is out, with no only copy of a key on it, is it stopped. Until then a failure takes the new ones away
again, data first, and leaves the old as they were. With ``replace`` the old go first, their data to other nodes::

    retiring ──confirmed──▶ stopping ──all stopped──▶ starting ──all started──▶ done
       │                                                  │
       └─refused─▶ failed (old run)                       └─failed─▶ restoring (the old plan) ──▶ failed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from agentcluster.requests import Strategy
from agentcluster.scheduler.planning.change import NodeChange

Phase = Literal["new", "starting", "retiring", "stopping", "returning", "undoing", "restoring", "done", "failed"]


# -- what became true --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A node's workers, new ones or those restored, have all joined the scheduler."""

    node: str


@dataclass(frozen=True)
class StartFailed:
    """A node's workers failed, were late, or the node is lost; none of them runs."""

    node: str
    why: str


@dataclass(frozen=True)
class Retired:
    """The workers asked about are out of the scheduler, and no only copy of a key is on them."""


@dataclass(frozen=True)
class RetireRefused:
    """Some of the workers asked about still hold data that could not be moved; all of them go on working."""

    why: str


@dataclass(frozen=True)
class Stopped:
    """A node's workers that were to stop have ended."""

    node: str


@dataclass(frozen=True)
class Cancelled:
    """Somebody wants the wave to end with the old workers, if that is still possible."""

    why: str


Event = Started | StartFailed | Retired | RetireRefused | Stopped | Cancelled


# -- what to do --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Start workers on a node; those that come, or those that are restored."""

    node: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class RetireOld:
    """Move data off the old workers of all nodes of the wave, and take them from the scheduler."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class RetireNew:
    """Move data off the new workers, back to the old, and take them from the scheduler."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """End processes of workers that are out of the scheduler."""

    node: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class GiveUpStarting:
    """Wait no longer for workers that start; the answers are failures, or those that were quicker."""


@dataclass(frozen=True)
class GiveUpRetiring:
    """Stop moving data; the answer is a refusal, or a confirmation that was quicker."""


Command = Start | RetireOld | RetireNew | Stop | GiveUpStarting | GiveUpRetiring
Step = tuple["Wave", Sequence[Command]]


@dataclass(frozen=True)
class Wave:
    """The state of one wave.

    Attributes
    ----------
    changes
        One per node.
    strategy
        The order in which old and new workers take turns.
    tolerant
        Whether nodes whose new workers do not start are left out, instead of failing the others.
    phase
        See the drawings above.
    waiting
        Nodes whose answer is due in this phase.
    started
        Nodes whose new workers run.
    failures
        What went wrong: node, or "" for all, and why.
    both
        Whether old and new workers run side by side in the end, because neither could be retired.
    cancelled
        Why the wave is to end with the old workers.
    """

    changes: tuple[NodeChange, ...]
    strategy: Strategy = "surge"
    tolerant: bool = False
    phase: Phase = "new"
    waiting: frozenset[str] = frozenset()
    started: frozenset[str] = frozenset()
    restored: frozenset[str] = frozenset()
    failures: tuple[tuple[str, str], ...] = ()
    both: bool = False
    cancelled: str | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("done", "failed")

    @property
    def failed_nodes(self) -> frozenset[str]:
        """Nodes that have not got their new workers, or not only them."""
        if self.phase == "failed":
            # Where the old went first, the new that did come are all that there is.
            changed = self.started if self.strategy == "replace" else frozenset()
            return frozenset(change.name for change in self.changes) - changed
        return frozenset(node for node, _ in self.failures if node)


def begin(wave: Wave) -> Step:
    """Return a wave's first state after ``new``, and its first commands."""
    if wave.cancelled is not None:
        return replace(wave, phase="failed", failures=(("", wave.cancelled),)), []
    return _start(wave) if wave.strategy == "surge" else _retire(wave)


def advance(wave: Wave, event: Event) -> Step:
    """Return what follows from an event: the next state, and the commands to carry out now.

    Raises
    ------
    ValueError
        When the event cannot be true in this state.
    """
    match event:
        case Started(node) if wave.phase == "starting" and node in wave.waiting:
            return _start_settled(replace(wave, started=wave.started | {node}), node)
        case StartFailed(node, why) if wave.phase == "starting" and node in wave.waiting:
            return _start_settled(replace(wave, failures=(*wave.failures, (node, why))), node)
        case Started(node) if wave.phase == "restoring" and node in wave.waiting:
            return _restore_settled(replace(wave, restored=wave.restored | {node}), node)
        case StartFailed(node, why) if wave.phase == "restoring" and node in wave.waiting:
            return _restore_settled(replace(wave, failures=(*wave.failures, (node, f"not restored: {why}"))), node)
        case Retired() if wave.phase == "retiring":
            return _stop(wave, "stopping", {c.name: c.old for c in _going_on(wave)})
        case Retired() if wave.phase == "returning":
            return _stop(wave, "undoing", {c.name: c.names for c in wave.changes if c.name in wave.started})
        case RetireRefused(why) if wave.phase == "retiring":
            refused = replace(wave, failures=(*wave.failures, ("", wave.cancelled or why)))
            return _return(refused)
        case RetireRefused(why) if wave.phase == "returning":
            return replace(wave, phase="failed", both=True, failures=(*wave.failures, ("", why))), []
        case Stopped(node) if wave.phase in ("stopping", "undoing") and node in wave.waiting:
            return _stop_settled(replace(wave, waiting=wave.waiting - {node}))
        case Cancelled(why):
            return _cancel(wave, why)
        case Started() | StartFailed() | Retired() | RetireRefused() | Stopped():
            raise ValueError(f"{event} cannot happen while {wave.phase}, waiting for {sorted(wave.waiting)}")
        case _:
            assert_never(event)


def _going_on(wave: Wave) -> list[NodeChange]:
    """Return the changes of the nodes that did not fail to start."""
    failed = {node for node, _ in wave.failures}
    return [change for change in wave.changes if change.name not in failed]


def _start(wave: Wave) -> Step:
    coming = [change for change in wave.changes if change.names]
    wave = replace(wave, phase="starting", waiting=frozenset(change.name for change in coming))
    if coming:
        return wave, [Start(change.name, change.names) for change in coming]
    return _retire(wave) if wave.strategy == "surge" else (replace(wave, phase="done"), [])


def _start_settled(wave: Wave, node: str) -> Step:
    wave = replace(wave, waiting=wave.waiting - {node})
    if wave.waiting:
        return wave, []
    if wave.strategy == "replace":
        return _restore(wave) if wave.failures else (replace(wave, phase="done"), [])
    if wave.cancelled is not None:
        return _return(replace(wave, failures=(*wave.failures, ("", wave.cancelled))))
    if not wave.failures or (wave.tolerant and _going_on(wave)):
        return _retire(wave)
    return _return(wave)


def _retire(wave: Wave) -> Step:
    old = tuple(worker for change in _going_on(wave) for worker in change.old)
    wave = replace(wave, phase="retiring")
    if old:
        return wave, [RetireOld(old)]
    return _stop(wave, "stopping", {})


def _return(wave: Wave) -> Step:
    new = tuple(worker for change in wave.changes if change.name in wave.started for worker in change.names)
    if not new:
        return replace(wave, phase="failed"), []
    return replace(wave, phase="returning"), [RetireNew(new)]


def _stop(wave: Wave, phase: Phase, workers: Mapping[str, tuple[str, ...]]) -> Step:
    ending = {node: names for node, names in workers.items() if names}
    wave = replace(wave, phase=phase, waiting=frozenset(ending))
    if not ending:
        return _stop_settled(wave)
    return wave, [Stop(node, names) for node, names in ending.items()]


def _stop_settled(wave: Wave) -> Step:
    if wave.waiting:
        return wave, []
    if wave.phase == "undoing":
        return replace(wave, phase="failed"), []
    if wave.strategy == "surge":
        return replace(wave, phase="done"), []
    return _start(wave)


def _restore(wave: Wave) -> Step:
    """Start the old plan of nodes that are empty now; those whose new workers came keep them."""
    empty = [change for change in wave.changes if change.name not in wave.started and change.restore_names]
    wave = replace(wave, phase="restoring", waiting=frozenset(change.name for change in empty))
    if not empty:
        return replace(wave, phase="failed"), []
    return wave, [Start(change.name, change.restore_names) for change in empty]


def _restore_settled(wave: Wave, node: str) -> Step:
    wave = replace(wave, waiting=wave.waiting - {node})
    return (wave, []) if wave.waiting else (replace(wave, phase="failed"), [])


def _cancel(wave: Wave, why: str) -> Step:
    """Remember it where the old workers can still be had; what is under way is given up."""
    if wave.cancelled is not None or wave.over:
        return wave, []
    if wave.phase == "new":
        return replace(wave, cancelled=why), []
    if wave.phase == "starting" and wave.strategy == "surge":
        return replace(wave, cancelled=why), [GiveUpStarting()]
    if wave.phase == "retiring":
        return replace(wave, cancelled=why), [GiveUpRetiring()]
    return wave, []
