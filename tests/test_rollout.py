"""The rollout machine: every order of events over several nodes, and each path of the drawing in its docstring."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentcluster.rollout import (
    Command,
    Event,
    NodeChange,
    Retired,
    RetireNew,
    RetireOld,
    RetireRefused,
    Rollout,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    advance,
    begin,
)

NODES = ("n0", "n1", "n2", "n3")
EVERY_EVENT: tuple[Event, ...] = (
    Retired(),
    RetireRefused("no room"),
    *(kind(node) for node in NODES for kind in (Started, Stopped)),
    *(StartFailed(node, "broken") for node in NODES),
)


def change(node: str, go: int, come: int) -> NodeChange:
    return NodeChange(node, tuple(f"{node}-old-{i}" for i in range(go)), tuple(f"{node}-new-{i}" for i in range(come)))


def answers(command: Command) -> list[Event]:
    """Return what can become true of a command that was given."""
    match command:
        case Start(each):
            return [Started(each.node), StartFailed(each.node, f"{each.node} is broken")]
        case RetireOld() | RetireNew():
            return [Retired(), RetireRefused("no room")]
        case Stop(node):
            return [Stopped(node)]


class AnyOrder(RuleBasedStateMachine):
    """Answers the commands that are out in any order and either way, and keeps a world of workers beside it."""

    rollout: Rollout
    due: list[Command]

    @initialize(sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=len(NODES)))
    def begin(self, sizes: list[tuple[int, int]]) -> None:
        self.changes = [change(node, *size) for node, size in zip(NODES, sizes, strict=False)]
        self.old = {worker for each in self.changes for worker in each.go}
        self.new = {worker for each in self.changes for worker in each.come}
        self.running = set(self.old)
        self.free: set[str] = set()
        self.stopping: set[str] = set()
        self.broken = False
        self.given: list[Command] = []
        self.due = []
        self.rollout, commands = begin(self.changes)
        self.take(commands)

    def take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            assert command not in self.given, f"{command} was given twice"
            self.given.append(command)
            self.due.append(command)
            match command:
                case Start(each):
                    assert each in self.changes
                    assert each.come
                case RetireOld(workers):
                    assert set(workers) == self.old
                    assert self.new <= self.running, "data left the old workers before all new ones were ready"
                case RetireNew(workers):
                    assert self.broken
                    assert set(workers) == self.running & self.new, "only new workers that started can be retired"
                case Stop(node, workers):
                    self.stop(node, set(workers))

    def stop(self, node: str, workers: set[str]) -> None:
        assert workers
        assert all(worker.startswith(f"{node}-") for worker in workers)
        assert not workers & self.stopping, "a worker was stopped twice"
        assert workers <= self.free, "a worker was stopped that was not confirmed to hold nothing"
        self.stopping |= workers
        if workers & self.old:
            assert workers <= self.old
            assert self.new <= self.running, "an old worker was stopped before all new ones were ready"
            assert not self.broken, "an old worker was stopped although something failed"
        else:
            assert self.broken
            assert workers <= self.running, "a new worker was stopped that never ran"

    def happen(self, command: Command, event: Event) -> None:
        """Make `event`, the answer to `command`, true in the world."""
        self.due.remove(command)
        match command, event:
            case Start(each), Started():
                self.running |= set(each.come)
            case RetireOld(workers) | RetireNew(workers), Retired():
                self.free |= set(workers)
            case Stop(_, workers), Stopped():
                self.running -= set(workers)
            case _:
                self.broken = True
        self.rollout, commands = advance(self.rollout, event)
        self.take(commands)

    @precondition(lambda self: self.due)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(self.due))
        self.happen(command, data.draw(st.sampled_from(answers(command))))

    @rule(event=st.sampled_from(EVERY_EVENT))
    def refuse_what_cannot_happen(self, event: Event) -> None:
        possible = [type(each) for command in self.due for each in answers(command)]
        nodes = {
            command.change.node if isinstance(command, Start) else command.node
            for command in self.due
            if isinstance(command, Start | Stop)
        }
        if type(event) in possible and getattr(event, "node", None) in {None, *nodes}:
            return
        before = self.rollout
        with pytest.raises(ValueError, match="cannot happen while"):
            advance(self.rollout, event)
        assert self.rollout == before

    @invariant()
    def it_goes_on_until_it_is_over(self) -> None:
        if hasattr(self, "rollout"):
            assert self.rollout.over == (not self.due)

    @invariant()
    def a_failure_leaves_the_old_workers(self) -> None:
        if hasattr(self, "rollout") and self.broken:
            assert self.old <= self.running
            assert not self.old & self.stopping
            assert self.rollout.failures

    def teardown(self) -> None:
        if not hasattr(self, "rollout"):
            return
        while self.due:
            self.happen(self.due[0], answers(self.due[0])[0])
        if self.rollout.phase == "done":
            assert not self.broken
            assert self.running == self.new
        else:
            assert self.rollout.phase == "failed"
            assert self.broken
            assert self.old <= self.running
            assert self.rollout.both == bool(self.running & self.new)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=25, deadline=None)

A, B = change("n0", 1, 1), change("n1", 2, 1)
OLD = ("n0-old-0", "n1-old-0", "n1-old-1")


def play(changes: list[NodeChange], *events: Event) -> tuple[Rollout, list[list[Command]]]:
    """Return the last state, and the commands that followed from the beginning and from each event."""
    rollout, commands = begin(changes)
    given = [list(commands)]
    for event in events:
        rollout, commands = advance(rollout, event)
        given.append(list(commands))
    return rollout, given


def test_the_new_start_then_the_old_are_retired_then_stopped() -> None:
    events = (Started("n1"), Started("n0"), Retired(), Stopped("n0"), Stopped("n1"))
    rollout, given = play([A, B], *events)
    assert given == [
        [Start(A), Start(B)],
        [],
        [RetireOld(OLD)],
        [Stop("n0", A.go), Stop("n1", B.go)],
        [],
        [],
    ]
    assert rollout == Rollout((A, B), phase="done", started=frozenset({"n0", "n1"}))


def test_a_failed_start_is_settled_once_the_others_have() -> None:
    events = (StartFailed("n0", "no CUDA"), Started("n1"), Retired(), Stopped("n1"))
    rollout, given = play([A, B], *events)
    assert given == [[Start(A), Start(B)], [], [RetireNew(B.come)], [Stop("n1", B.come)], []]
    assert rollout.phase == "failed"
    assert not rollout.both
    assert rollout.failures == (("n0", "no CUDA"),)


def test_when_no_start_succeeds_there_is_nothing_to_undo() -> None:
    rollout, given = play([A, B], StartFailed("n0", "no CUDA"), StartFailed("n1", "late"))
    assert given == [[Start(A), Start(B)], [], []]
    assert rollout.phase == "failed"
    assert rollout.failures == (("n0", "no CUDA"), ("n1", "late"))


def test_a_refused_retirement_takes_the_new_away_again() -> None:
    events = (Started("n0"), Started("n1"), RetireRefused("no room"), Retired(), Stopped("n1"), Stopped("n0"))
    rollout, given = play([A, B], *events)
    assert given[3:] == [[RetireNew((*A.come, *B.come))], [Stop("n0", A.come), Stop("n1", B.come)], [], []]
    assert rollout.phase == "failed"
    assert not rollout.both
    assert rollout.failures == (("", "no room"),)


def test_when_neither_can_be_retired_both_run() -> None:
    events = (Started("n0"), Started("n1"), RetireRefused("no room"), RetireRefused("nor here"))
    rollout, given = play([A, B], *events)
    assert given[-1] == []
    assert rollout.phase == "failed"
    assert rollout.both
    assert rollout.failures == (("", "no room"), ("", "nor here"))


def test_a_refusal_without_new_workers_ends_there() -> None:
    rollout, given = play([change("n0", 2, 0)], RetireRefused("no room"))
    assert given == [[RetireOld(("n0-old-0", "n0-old-1"))], []]
    assert rollout.phase == "failed"
    assert not rollout.both


def test_scaling_up_only_starts() -> None:
    rollout, given = play([change("n0", 0, 2)], Started("n0"))
    assert given == [[Start(change("n0", 0, 2))], []]
    assert rollout.phase == "done"


@pytest.mark.parametrize("changes", [[], [change("n0", 0, 0), change("n1", 0, 0)]])
def test_no_change_is_done_at_once(changes: list[NodeChange]) -> None:
    rollout, given = play(changes)
    assert given == [[]]
    assert rollout.phase == "done"
    assert rollout.over


def test_a_node_that_only_loses_workers_waits_for_the_others() -> None:
    less, more = change("n0", 1, 0), change("n1", 0, 1)
    rollout, given = play([less, more], Started("n1"), Retired(), Stopped("n0"))
    assert given == [[Start(more)], [RetireOld(less.go)], [Stop("n0", less.go)], []]
    assert rollout.phase == "done"


@pytest.mark.parametrize("event", [Stopped("n1"), Retired(), Started("n0"), StartFailed("n9", "who?")])
def test_a_late_or_foreign_answer_is_an_error(event: Event) -> None:
    rollout, _ = play([A, B], Started("n0"))
    with pytest.raises(ValueError, match=r"cannot happen while starting, waiting for \['n1'\]"):
        advance(rollout, event)


@pytest.mark.parametrize(
    "changes",
    [[A, A], [A, NodeChange("n0")], [NodeChange("n0", ("w",), ("w",))], [A, NodeChange("n1", A.go)]],
    ids=["twice", "two changes of a node", "goes and comes", "on two nodes"],
)
def test_a_node_or_a_worker_has_one_change(changes: list[NodeChange]) -> None:
    with pytest.raises(ValueError, match="more than one change"):
        begin(changes)
