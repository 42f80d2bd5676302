"""The rollout machines: whole rollouts in every order of events, and each arrow of the drawings in their docstring."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.requests import OnFailure, Strategy
from agentcluster.scheduler.planning.change import NodeChange
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.scheduler.planning.rollout import (
    BackEnded,
    Cancel,
    Pause,
    Resume,
    Rollout,
    RolloutCommand,
    RolloutEvent,
    RunBack,
    RunWave,
    WaveEnded,
    roll,
    roll_on,
)
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

NODES = ("n0", "n1", "n2", "n3")
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
ON_FAILURE: tuple[OnFailure, ...] = get_args(OnFailure)
EVERY_EVENT: tuple[Event, ...] = (
    Retired(),
    RetireRefused("no room"),
    *(kind(node) for node in NODES for kind in (Started, Stopped)),
    *(StartFailed(node, "broken") for node in NODES),
)


def node_change(name: str, old: Sequence[str], new: tuple[str, ...], restored: tuple[str, ...] = ()) -> NodeChange:
    """Return a change of the named workers; their settings do not matter here."""
    spec = WorkerSpec("cpu", "distributed.Nanny")
    node = Node(name, f"tcp://{name}:1", Hardware(name, 8, 2**30))
    remove, add = dict.fromkeys(old, spec), (spec,) * len(new)
    return NodeChange(node, Mode("none"), remove=remove, add=add, names=new, restore_names=restored)


def answers(command: Command) -> list[Event]:
    """Return what can become true of a command that was given."""
    match command:
        case Start(node):
            return [Started(node), StartFailed(node, f"{node} is broken")]
        case RetireOld() | RetireNew():
            return [Retired(), RetireRefused("no room")]
        case Stop(node):
            return [Stopped(node)]
        case _:
            return []


class AnyOrder(RuleBasedStateMachine):
    """Answers the commands that are out in any order and any way, and keeps a world of workers beside them.

    A worker that runs and was not retired holds the only copy of something; only when `Retired` is answered does it
    hold nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[str, set[str]] = {node: set() for node in NODES}
        self.holding: set[str] = set()
        self.lost: set[str] = set()
        self.numbers = itertools.count()
        self.wave: Wave | None = None
        self.due: list[Command] = []
        self.rollout = Rollout(())

    # -- beginning -----------------------------------------------------------------------------------------------------

    def names(self, node: str, count: int, what: str) -> tuple[str, ...]:
        return tuple(f"{node}-{what}-{next(self.numbers)}" for _ in range(count))

    @initialize(sizes=st.lists(st.integers(0, 3), min_size=len(NODES), max_size=len(NODES)))
    def first_workers(self, sizes: list[int]) -> None:
        for node, size in zip(NODES, sizes, strict=True):
            self.running[node] = set(self.names(node, size, "first"))
            self.holding |= self.running[node]
        self.rollout = Rollout((), state="over")

    @precondition(lambda self: self.rollout.state == "over")
    @rule(
        sizes=st.lists(st.integers(0, 3), min_size=len(NODES), max_size=len(NODES)),
        strategies=st.lists(st.sampled_from(STRATEGIES), min_size=len(NODES), max_size=len(NODES)),
        on_failure=st.sampled_from(ON_FAILURE),
        max_parallel=st.integers(1, len(NODES)),
        canary=st.booleans(),
    )
    def new_rollout(
        self,
        sizes: list[int],
        strategies: list[Strategy],
        on_failure: OnFailure,
        max_parallel: int,
        canary: bool,
    ) -> None:
        nodes = [node for node in NODES if node not in self.lost]
        self.sizes = dict(zip(NODES, sizes, strict=True))
        self.before = {node: set(self.running[node]) for node in nodes}
        self.brought_back: set[str] = set()
        # Nothing is replaced where nothing goes or comes.
        self.strategies = {
            node: strategy if self.running[node] and self.sizes[node] else "surge"
            for node, strategy in zip(NODES, strategies, strict=True)
        }
        waves: list[tuple[str, ...]] = []
        for strategy in STRATEGIES:
            chosen = [node for node in nodes if self.strategies[node] == strategy]
            if canary and not waves and chosen:
                waves.append((chosen.pop(0),))
            waves += [tuple(chosen[i : i + max_parallel]) for i in range(0, len(chosen), max_parallel)]
        self.waves_run: list[tuple[str, ...]] = []
        self.whole = Rollout(tuple(waves), on_failure)
        self.rollout, command = roll(self.whole)
        self.obey(command)

    def obey(self, command: RolloutCommand | None) -> None:
        """Carry a rollout's command out as `RolloutRun` does."""
        match command:
            case RunWave(nodes):
                assert nodes not in self.waves_run, f"{nodes} ran twice"
                self.waves_run.append(nodes)
                self.ended: set[str] = set(nodes) & self.lost
                self.queue = [(nodes, self.sizes)]
                self.next_wave()
            case RunBack(nodes):
                assert set(nodes) == set(self.rollout.changed)
                self.ended = set(nodes) & self.lost
                sizes = {node: len(self.before[node]) for node in nodes}
                surge = tuple(node for node in nodes if self.strategies[node] == "surge")
                others = [(node,) for node in nodes if self.strategies[node] != "surge"]
                self.queue = [(each, sizes) for each in [surge, *others] if each]
                self.next_wave()

    def next_wave(self) -> None:
        while self.queue:
            nodes, sizes = self.queue.pop(0)
            alive = [node for node in nodes if node not in self.lost]
            self.ended |= set(nodes) - set(alive)
            if not alive:
                continue
            strategy = self.strategies[alive[0]]
            changes = []
            for node in alive:
                go = tuple(sorted(self.running[node]))
                back = self.names(node, len(go) if strategy == "replace" else 0, "back")
                changes.append(node_change(node, go, self.names(node, sizes[node], "new"), back))
            self.wave = Wave(tuple(changes), strategy, self.rollout.on_failure == "continue")
            if self.rollout.cancelled is not None and self.rollout.state == "running":
                self.wave, _ = advance(self.wave, Cancelled(self.rollout.cancelled))
            self.given: list[Command] = []
            self.wave, commands = begin(self.wave)
            self.take(commands)
            return
        event: RolloutEvent = WaveEnded(frozenset(self.ended))
        if self.rollout.state == "back":
            self.brought_back = set(self.rollout.changed) - self.ended
            event = BackEnded(frozenset(self.ended))
        self.rollout, command = roll_on(self.rollout, event)
        self.obey(command)

    # -- commands ------------------------------------------------------------------------------------------------------

    def change(self, node: str) -> NodeChange:
        assert self.wave is not None
        [found] = [each for each in self.wave.changes if each.name == node]
        return found

    def take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            assert command not in self.given, f"{command} was given twice"
            self.given.append(command)
            if answers(command):
                self.due.append(command)
            self.look_at(command)
        self.settle()

    def look_at(self, command: Command) -> None:
        assert self.wave is not None
        changes = self.wave.changes
        match command:
            case Start(node, workers):
                assert workers in (self.change(node).names, self.change(node).restore_names)
                assert workers
                if self.wave.strategy == "replace":
                    assert not self.running[node], "new workers came before the old had gone"
            case RetireOld(workers):
                for each in changes:
                    if each.old and each.old[0] in workers:
                        assert set(each.old) <= set(workers)
                        if self.wave.strategy == "surge":
                            self.all_new_are_there(each)
            case RetireNew(workers):
                assert self.wave.strategy == "surge"
                new = {worker for each in changes for worker in each.names}
                assert set(workers) == new & set().union(*self.running.values()) | self.gone(workers)
            case Stop(node, workers):
                assert workers
                assert set(workers) <= self.running[node] | self.gone(workers), "what did not run was stopped"
                assert not set(workers) & self.holding, "a worker was stopped that held the only copy of something"
                if self.wave.strategy == "surge" and set(workers) & set(self.change(node).old):
                    self.all_new_are_there(self.change(node))
            case GiveUpRetiring():
                assert any(isinstance(each, RetireOld) for each in self.due)
            case GiveUpStarting():
                assert any(isinstance(each, Start) for each in self.due)

    def gone(self, workers: Iterable[str]) -> set[str]:
        return {worker for worker in workers if worker.split("-")[0] in self.lost}

    def all_new_are_there(self, change: NodeChange) -> None:
        if change.name not in self.lost:
            assert set(change.names) <= self.running[change.name], "the old were to go before the new were there"

    # -- events --------------------------------------------------------------------------------------------------------

    def happen(self, command: Command, event: Event) -> None:
        """Make `event`, the answer to `command`, true in the world, and tell the machine."""
        assert self.wave is not None
        self.due.remove(command)
        match command, event:
            case Start(node, workers), Started():
                self.running[node] |= set(workers)
                self.holding |= set(workers)
            case ((RetireOld(workers) | RetireNew(workers)), Retired()):
                self.holding -= set(workers)
            case Stop(node, workers), Stopped():
                self.running[node] -= set(workers)
        self.wave, commands = advance(self.wave, event)
        self.take(commands)

    def settle(self) -> None:
        """When the wave is over, look whether the world is as it says, and go on with the rollout."""
        if self.wave is None or not self.wave.over:
            return
        assert not self.due
        wave, self.wave = self.wave, None
        for each in wave.changes:
            if each.name in self.lost:
                continue
            runs = self.running[each.name]
            failed = each.name in wave.failed_nodes
            may_be = {frozenset(each.old), frozenset(each.restore_names)} if failed else {frozenset(each.names)}
            if wave.both and each.name in wave.started:
                may_be = {frozenset((*each.old, *each.names))}
            if failed and (
                wave.strategy == "replace"
                and f"not restored: {each.name} is broken" in dict((why, node) for node, why in wave.failures)
            ):
                may_be.add(frozenset())
            assert frozenset(runs) in may_be, f"{each} ended as {sorted(runs)}"
            assert runs <= self.holding, "a worker that runs is out of the scheduler"
        assert wave.phase == "done" or wave.failures
        self.ended |= wave.failed_nodes | {each.name for each in wave.changes if each.name in self.lost}
        self.next_wave()

    @precondition(lambda self: self.due)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(self.due))
        self.happen(command, data.draw(st.sampled_from(answers(command))))

    @precondition(lambda self: any(isinstance(command, Start | Stop) for command in self.due))
    @rule(data=st.data())
    def lose_a_node(self, data: st.DataObject) -> None:
        command = data.draw(st.sampled_from([each for each in self.due if isinstance(each, Start | Stop)]))
        self.holding -= self.running[command.node]
        self.running[command.node] = set()
        self.lost.add(command.node)
        self.happen(command, answers(command)[-1])

    @rule()
    def cancel(self) -> None:
        over = self.rollout.state == "over"
        before = self.rollout
        self.control(Cancel("it was cancelled"))
        if over:
            assert self.rollout == before
        if self.wave is not None and self.rollout.state == "running":
            self.wave, commands = advance(self.wave, Cancelled("it was cancelled"))
            self.take(commands)

    @rule()
    def pause(self) -> None:
        self.control(Pause())

    @rule()
    def resume(self) -> None:
        self.control(Resume())

    def control(self, event: RolloutEvent) -> None:
        self.rollout, command = roll_on(self.rollout, event)
        self.obey(command)

    @rule(event=st.sampled_from(EVERY_EVENT))
    def refuse_what_cannot_happen(self, event: Event) -> None:
        if self.wave is None:
            return
        possible = {(type(each), getattr(each, "node", None)) for command in self.due for each in answers(command)}
        if (type(event), getattr(event, "node", None)) in possible:
            return
        with pytest.raises(ValueError, match="cannot happen while"):
            advance(self.wave, event)

    @rule(event=st.sampled_from([WaveEnded(), BackEnded()]))
    def refuse_an_end_of_what_does_not_run(self, event: RolloutEvent) -> None:
        if self.rollout.state != ("running" if isinstance(event, WaveEnded) else "back"):
            with pytest.raises(ValueError, match="cannot happen while"):
                roll_on(self.rollout, event)

    # -- always --------------------------------------------------------------------------------------------------------

    @invariant()
    def it_goes_on_until_it_is_over(self) -> None:
        assert (self.wave is not None) == bool(self.due)
        assert (self.wave is not None) == (self.rollout.state in ("running", "back") and bool(self.due))
        if self.rollout.state in ("running", "back"):
            assert self.due

    @invariant()
    def no_data_is_lost_but_with_its_node(self) -> None:
        assert self.holding <= set().union(*self.running.values())

    @invariant()
    def the_end_is_as_the_rollout_says(self) -> None:
        if self.rollout.state != "over" or not hasattr(self, "before"):
            return
        rollout = self.rollout
        touched = {node for wave in self.waves_run for node in wave}
        assert not set(rollout.changed) & self.brought_back
        assert set(rollout.changed) | set(rollout.failed) | self.brought_back == touched
        for node in set(self.before) - touched - self.lost:
            assert self.running[node] == self.before[node]
        for node in self.brought_back - self.lost:
            assert len(self.running[node]) == len(self.before[node])
        ended_well = not rollout.failed and rollout.cancelled is None
        if ended_well or (rollout.on_failure == "continue" and rollout.cancelled is None):
            assert self.waves_run == list(self.whole.waves)
        if ended_well or rollout.on_failure == "stop":
            assert not self.brought_back

    def teardown(self) -> None:
        for _ in range(200):
            if self.due:
                self.happen(self.due[0], answers(self.due[0])[0])
            elif self.rollout.state == "paused":
                self.resume()
            else:
                break
        assert self.rollout.state == "over"
        self.the_end_is_as_the_rollout_says()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=settings.default.max_examples * 3 // 2, stateful_step_count=40, deadline=None
)


# -- the arrows of the drawings ----------------------------------------------------------------------------------------


def change(node: str, go: int, come: int, back: int = 0) -> NodeChange:
    names = ((f"{node}-{what}-{i}" for i in range(n)) for what, n in (("old", go), ("new", come), ("back", back)))
    return node_change(node, *map(tuple, names))


A, B = change("n0", 1, 1), change("n1", 2, 1)
OLD = ("n0-old-0", "n1-old-0", "n1-old-1")
NEW = ("n0-new-0", "n1-new-0")
STARTS = [Start("n0", A.names), Start("n1", B.names)]
C, D = change("n0", 1, 1, back=1), change("n1", 2, 1, back=2)


def play(wave: Wave, *events: Event) -> tuple[Wave, list[list[Command]]]:
    """Return the last state, and the commands that followed from the beginning and from each event."""
    wave, commands = begin(wave)
    given = [list(commands)]
    for event in events:
        wave, commands = advance(wave, event)
        given.append(list(commands))
    return wave, given


def test_surge_starts_then_retires_then_stops() -> None:
    events = (Started("n1"), Started("n0"), Retired(), Stopped("n0"), Stopped("n1"))
    wave, given = play(Wave((A, B)), *events)
    assert given == [STARTS, [], [RetireOld(OLD)], [Stop("n0", A.old), Stop("n1", B.old)], [], []]
    assert wave == Wave((A, B), phase="done", started=frozenset({"n0", "n1"}))
    assert not wave.failed_nodes


def test_surge_a_failed_start_is_settled_once_the_others_have() -> None:
    events = (StartFailed("n0", "no CUDA"), Started("n1"), Retired(), Stopped("n1"))
    wave, given = play(Wave((A, B)), *events)
    assert given == [STARTS, [], [RetireNew(B.names)], [Stop("n1", B.names)], []]
    assert wave.phase == "failed"
    assert not wave.both
    assert wave.failures == (("n0", "no CUDA"),)
    assert wave.failed_nodes == {"n0", "n1"}


def test_surge_when_no_start_succeeds_there_is_nothing_to_undo() -> None:
    wave, given = play(Wave((A, B)), StartFailed("n0", "no CUDA"), StartFailed("n1", "late"))
    assert given == [STARTS, [], []]
    assert wave.phase == "failed"
    assert wave.failures == (("n0", "no CUDA"), ("n1", "late"))


def test_surge_tolerant_leaves_out_whoever_does_not_start() -> None:
    events = (StartFailed("n0", "no CUDA"), Started("n1"), Retired(), Stopped("n1"))
    wave, given = play(Wave((A, B), tolerant=True), *events)
    assert given == [STARTS, [], [RetireOld(B.old)], [Stop("n1", B.old)], []]
    assert wave.phase == "done"
    assert wave.failed_nodes == {"n0"}


def test_surge_tolerant_fails_when_nobody_starts() -> None:
    wave, given = play(Wave((A, B), tolerant=True), StartFailed("n0", "no CUDA"), StartFailed("n1", "late"))
    assert given == [STARTS, [], []]
    assert wave.failed_nodes == {"n0", "n1"}


def test_surge_a_refused_retirement_takes_the_new_away_again() -> None:
    events = (Started("n0"), Started("n1"), RetireRefused("no room"), Retired(), Stopped("n1"), Stopped("n0"))
    wave, given = play(Wave((A, B)), *events)
    assert given[3:] == [[RetireNew(NEW)], [Stop("n0", A.names), Stop("n1", B.names)], [], []]
    assert wave.phase == "failed"
    assert not wave.both
    assert wave.failures == (("", "no room"),)


def test_surge_when_neither_can_be_retired_both_run() -> None:
    events = (Started("n0"), Started("n1"), RetireRefused("no room"), RetireRefused("nor here"))
    wave, given = play(Wave((A, B)), *events)
    assert given[-1] == []
    assert wave.phase == "failed"
    assert wave.both
    assert wave.failures == (("", "no room"), ("", "nor here"))


def test_surge_cancelled_while_workers_start_waits_for_the_answers_and_takes_them_away() -> None:
    events = (Started("n0"), Cancelled("enough"), StartFailed("n1", "given up"), Retired(), Stopped("n0"))
    wave, given = play(Wave((A, B)), *events)
    assert given == [STARTS, [], [GiveUpStarting()], [RetireNew(A.names)], [Stop("n0", A.names)], []]
    assert wave.phase == "failed"
    assert ("", "enough") in wave.failures


def test_surge_cancelled_while_data_moves() -> None:
    started = (Started("n0"), Started("n1"), Cancelled("enough"))
    wave, given = play(Wave((A, B)), *started, RetireRefused("given up"), Retired())
    assert given[3:] == [[GiveUpRetiring()], [RetireNew(NEW)], [Stop("n0", A.names), Stop("n1", B.names)]]
    assert wave.failures == (("", "enough"),)
    # The data was quicker.
    wave, given = play(Wave((A, B)), *started, Retired())
    assert given[-1] == [Stop("n0", A.old), Stop("n1", B.old)]
    assert wave.phase == "stopping"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cancelled_before_it_began_nothing_is_touched(strategy: Strategy) -> None:
    wave, commands = advance(Wave((C, D), strategy), Cancelled("enough"))
    assert commands == []
    wave, given = play(wave)
    assert given == [[]]
    assert wave.phase == "failed"
    assert wave.failed_nodes == {"n0", "n1"}
    assert wave.failures == (("", "enough"),)


@pytest.mark.parametrize(
    "events",
    [
        [Started("n0"), Started("n1"), Retired()],
        [Started("n0"), Started("n1"), RetireRefused("no room")],
        [StartFailed("n0", "no CUDA"), Started("n1"), Retired()],
        [StartFailed("n0", "no CUDA"), StartFailed("n1", "no CUDA")],
        [Started("n0"), Cancelled("enough")],
    ],
    ids=["stopping", "returning", "undoing", "over", "cancelled"],
)
def test_a_cancellation_too_late_or_said_twice_changes_nothing(events: list[Event]) -> None:
    wave, _ = play(Wave((A, B)), *events)
    assert advance(wave, Cancelled("enough!")) == (wave, [])


def test_surge_a_refusal_without_new_workers_ends_there() -> None:
    wave, given = play(Wave((change("n0", 2, 0),)), RetireRefused("no room"))
    assert given == [[RetireOld(("n0-old-0", "n0-old-1"))], []]
    assert wave.phase == "failed"
    assert not wave.both


def test_scaling_up_only_starts() -> None:
    wave, given = play(Wave((change("n0", 0, 2),)), Started("n0"))
    assert given == [[Start("n0", ("n0-new-0", "n0-new-1"))], []]
    assert wave.phase == "done"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("changes", [(), (change("n0", 0, 0), change("n1", 0, 0))])
def test_no_change_is_done_at_once(strategy: Strategy, changes: tuple[NodeChange, ...]) -> None:
    wave, given = play(Wave(changes, strategy))
    assert given == [[]]
    assert wave.phase == "done"
    assert wave.over


def test_a_node_that_only_loses_workers_waits_for_the_others() -> None:
    less, more = change("n0", 1, 0), change("n1", 0, 1)
    wave, given = play(Wave((less, more)), Started("n1"), Retired(), Stopped("n0"))
    assert given == [[Start("n1", more.names)], [RetireOld(less.old)], [Stop("n0", less.old)], []]
    assert wave.phase == "done"


def test_replace_retires_then_stops_then_starts() -> None:
    events = (Retired(), Stopped("n1"), Stopped("n0"), Started("n0"), Started("n1"))
    wave, given = play(Wave((C, D), "replace"), *events)
    stops = [Stop("n0", C.old), Stop("n1", D.old)]
    assert given == [[RetireOld(OLD)], stops, [], [Start("n0", C.names), Start("n1", D.names)], [], []]
    assert wave.phase == "done"
    assert not wave.failed_nodes


def test_replace_a_refused_retirement_leaves_the_old() -> None:
    wave, given = play(Wave((C, D), "replace"), RetireRefused("no room"))
    assert given == [[RetireOld(OLD)], []]
    assert wave.phase == "failed"
    assert wave.failed_nodes == {"n0", "n1"}


def test_replace_restores_the_old_plan_where_the_new_does_not_start() -> None:
    gone = (Retired(), Stopped("n0"), Stopped("n1"))
    wave, given = play(Wave((C, D), "replace"), *gone, StartFailed("n0", "no CUDA"), Started("n1"), Started("n0"))
    assert given[5:] == [[Start("n0", C.restore_names)], []]
    assert wave.phase == "failed"
    assert wave.restored == {"n0"}
    assert wave.failed_nodes == {"n0"}, "n1 has its new workers"
    wave, _ = play(
        Wave((C,), "replace"), Retired(), Stopped("n0"), StartFailed("n0", "no CUDA"), StartFailed("n0", "no more")
    )
    assert wave.phase == "failed"
    assert wave.restored == set()
    assert wave.failures == (("n0", "no CUDA"), ("n0", "not restored: no more"))


def test_replace_cancelled_while_data_moves() -> None:
    wave, given = play(Wave((C, D), "replace"), Cancelled("enough"), RetireRefused("given up"))
    assert given == [[RetireOld(OLD)], [GiveUpRetiring()], []]
    assert wave.phase == "failed"
    assert wave.failures == (("", "enough"),)


@pytest.mark.parametrize("event", [Stopped("n1"), Retired(), Started("n0"), StartFailed("n9", "who?")])
def test_a_late_or_foreign_answer_is_an_error(event: Event) -> None:
    wave, _ = play(Wave((A, B)), Started("n0"))
    with pytest.raises(ValueError, match=r"cannot happen while starting, waiting for \['n1'\]"):
        advance(wave, event)


# -- many waves --------------------------------------------------------------------------------------------------------

THREE = (("n0",), ("n1",), ("n2",))
BAD = WaveEnded(frozenset({"n1"}))


def follow(rollout: Rollout, *events: RolloutEvent) -> tuple[Rollout, list[RolloutCommand | None]]:
    rollout, command = roll(rollout)
    given = [command]
    for event in events:
        rollout, command = roll_on(rollout, event)
        given.append(command)
    return rollout, given


@pytest.mark.parametrize("on_failure", ON_FAILURE)
def test_waves_run_one_after_the_other(on_failure: OnFailure) -> None:
    rollout, given = follow(Rollout(THREE, on_failure), WaveEnded(), WaveEnded(), WaveEnded())
    assert given == [*map(RunWave, THREE), None]
    assert rollout.state == "over"
    assert rollout.changed == ("n0", "n1", "n2")


@pytest.mark.parametrize(
    ("on_failure", "then", "changed"),
    [
        ("rollback", [RunBack(("n0",))], ("n0",)),
        ("stop", [None], ("n0",)),
        ("continue", [RunWave(("n2",))], ("n0",)),
    ],
)
def test_when_a_wave_fails(on_failure: OnFailure, then: list[RolloutCommand | None], changed: tuple[str, ...]) -> None:
    rollout, given = follow(Rollout(THREE, on_failure), WaveEnded(), BAD)
    assert given == [RunWave(("n0",)), RunWave(("n1",)), *then]
    assert rollout.changed == changed
    assert rollout.failed == ("n1",)


def test_what_was_brought_back_is_not_changed() -> None:
    rollout, given = follow(Rollout(THREE), WaveEnded(), BAD, BackEnded())
    assert given[-1] is None
    assert (rollout.state, rollout.changed, rollout.failed) == ("over", (), ("n1",))
    rollout, _ = follow(Rollout(THREE), WaveEnded(), BAD, BackEnded(frozenset({"n0"})))
    assert (rollout.state, rollout.changed) == ("over", ("n0",))


def test_a_canary_that_fails_leaves_the_others_alone() -> None:
    rollout, given = follow(Rollout((("n0",), ("n1", "n2"))), WaveEnded(frozenset({"n0"})))
    assert given == [RunWave(("n0",)), None]
    assert rollout.state == "over"


def test_pause_and_resume() -> None:
    rollout, given = follow(Rollout(THREE), Pause(), WaveEnded(), Pause(), Resume(), Resume(), WaveEnded())
    assert given == [RunWave(("n0",)), None, None, None, RunWave(("n1",)), None, RunWave(("n2",))]
    rollout, given = follow(Rollout(THREE), Pause(), Resume(), WaveEnded())
    assert given[-1] == RunWave(("n1",))
    rollout, _ = follow(Rollout(THREE), Pause(), WaveEnded())
    assert rollout.state == "paused"


def test_nothing_is_left_to_pause_before() -> None:
    rollout, given = follow(Rollout((("n0",),)), Pause(), WaveEnded())
    assert given[-1] is None
    assert rollout.state == "over"
    assert roll_on(rollout, Pause()) == (rollout, None)
    assert roll_on(rollout, Resume())[1] is None


@pytest.mark.parametrize(
    ("on_failure", "then"), [("rollback", RunBack(("n0",))), ("continue", RunBack(("n0",))), ("stop", None)]
)
@pytest.mark.parametrize("paused", [False, True])
def test_cancel(on_failure: OnFailure, then: RolloutCommand | None, paused: bool) -> None:
    events: list[RolloutEvent] = [Pause(), WaveEnded(), Cancel("enough")] if paused else [Cancel("enough"), WaveEnded()]
    rollout, given = follow(Rollout(THREE, on_failure), *events)
    assert given[-1] == then
    assert rollout.state == ("over" if then is None else "back")
    assert rollout.cancelled == "enough"


def test_cancel_after_the_end_changes_nothing() -> None:
    rollout, _ = follow(Rollout((("n0",),)), WaveEnded())
    assert roll_on(rollout, Cancel("enough")) == (rollout, None)


@pytest.mark.parametrize(
    ("events", "impossible"),
    [([], BackEnded()), ([Pause(), WaveEnded()], WaveEnded()), ([WaveEnded(), BAD], WaveEnded())],
)
def test_an_end_of_what_does_not_run_is_an_error(events: list[RolloutEvent], impossible: RolloutEvent) -> None:
    rollout, _ = follow(Rollout(THREE), *events)
    with pytest.raises(ValueError, match="cannot happen while"):
        roll_on(rollout, impossible)
