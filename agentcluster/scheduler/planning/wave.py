"""Wave of a rollout, the nodes that change together, as a pure state machine: events in, commands out.

With the strategy ``surge``::

    starting ──all started──▶ retiring ──confirmed──▶ stopping ──all stopped──▶ done
       │                         │
       └─failed, or cancelled─▶ ─┴─refused─▶ returning ──confirmed──▶ undoing ──all stopped──▶ failed
         (once the others settled)              └──refused──▶ failed (both run)

New workers run on every node of the wave before data leaves the old ones, and an old worker is stopped only when the
scheduler confirms that it is retired and holds no sole replica. Until then a failure removes the new workers, their
data first, and leaves the old ones as they were. With ``replace`` the old leave first, and other nodes get their data::

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


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """All workers that a node was to start, new or restored, have joined the scheduler."""

    node: str


@dataclass(frozen=True)
class StartFailed:
    """The workers that a node was to start failed or were late, or the node is lost; none of them runs."""

    node: str
    why: str


@dataclass(frozen=True)
class Retired:
    """The scheduler has removed the workers that were to be retired, and they hold no sole replica."""


@dataclass(frozen=True)
class RetireRefused:
    """Some of the workers that were to be retired hold data that could not be moved; all of them continue."""

    why: str


@dataclass(frozen=True)
class Stopped:
    """The workers that a node was to stop have ended."""

    node: str


@dataclass(frozen=True)
class Cancelled:
    """The wave is to end with the old workers, if that is still possible."""

    why: str


Event = Started | StartFailed | Retired | RetireRefused | Stopped | Cancelled


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Start workers on a node: the new ones, or those that are restored."""

    node: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class RetireOld:
    """Evacuate the old workers of all nodes of the wave, and remove them from the scheduler."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class RetireNew:
    """Evacuate the new workers, to the old ones, and remove them from the scheduler."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """End the processes of workers that the scheduler has removed."""

    node: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class GiveUpStarting:
    """Stop waiting for workers that start; each answer is a failure, or a start that was quicker."""


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
        Whether the new workers come before the old leave (``surge``) or after (``replace``).
    tolerant
        Whether nodes whose new workers do not start are left out, and the others continue.
    phase
        Phase, see the diagrams above.
    waiting
        Nodes whose answer is awaited in this phase.
    started
        Nodes whose new workers run.
    restored
        Nodes whose old workers were started again.
    failures
        Failures: the node, or "" for all, and the reason.
    both
        Whether old and new workers both run in the end, because neither could be retired.
    cancelled
        Reason why the wave is to end with the old workers.
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
        """Return whether the wave has ended."""
        return self.phase in ("done", "failed")

    @property
    def failed_nodes(self) -> frozenset[str]:
        """Nodes that do not have their new workers, or have their old ones too."""
        if self.phase == "failed":
            # Where the old workers left first, a node that started its new ones has only those.
            changed = self.started if self.strategy == "replace" else frozenset()
            return frozenset(change.name for change in self.changes) - changed
        return frozenset(node for node, _ in self.failures if node)


def begin(wave: Wave) -> Step:
    """Begin a wave.

    Parameters
    ----------
    wave
        A wave in phase ``new``.

    Returns
    -------
    Wave, sequence of Command
        The next state, and the commands to carry out now.
    """
    if wave.cancelled is not None:
        return replace(wave, phase="failed", failures=(("", wave.cancelled),)), []
    return _start(wave) if wave.strategy == "surge" else _retire(wave)


def advance(wave: Wave, event: Event) -> Step:
    """Advance a wave by one event.

    Parameters
    ----------
    wave
        The state.
    event
        The event.

    Returns
    -------
    Wave, sequence of Command
        The next state, and the commands to carry out now.

    Raises
    ------
    ValueError
        When the event cannot happen in this state.
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
    """Start the old workers of nodes that are empty now; nodes that started their new workers keep those."""
    empty = [change for change in wave.changes if change.name not in wave.started and change.restore_names]
    wave = replace(wave, phase="restoring", waiting=frozenset(change.name for change in empty))
    if not empty:
        return replace(wave, phase="failed"), []
    return wave, [Start(change.name, change.restore_names) for change in empty]


def _restore_settled(wave: Wave, node: str) -> Step:
    wave = replace(wave, waiting=wave.waiting - {node})
    return (wave, []) if wave.waiting else (replace(wave, phase="failed"), [])


def _cancel(wave: Wave, why: str) -> Step:
    """Note a cancellation where the old workers still run, and give up the step under way."""
    if wave.cancelled is not None or wave.over:
        return wave, []
    if wave.phase == "new":
        return replace(wave, cancelled=why), []
    if wave.phase == "starting" and wave.strategy == "surge":
        return replace(wave, cancelled=why), [GiveUpStarting()]
    if wave.phase == "retiring":
        return replace(wave, cancelled=why), [GiveUpRetiring()]
    return wave, []
