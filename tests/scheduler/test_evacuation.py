"""Moving data off real workers in a real scheduler: nothing is lost, and who could not leave goes on working."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import ANY

import dask
import pytest
import pytest_asyncio
from distributed import Client, Event, Scheduler, Status, Worker, wait

from agentcluster.model import NodeProgress
from agentcluster.scheduler import evacuation, managers
from agentcluster.scheduler.evacuation import Evacuation, evacuate
from agentcluster.scheduler.planning.nodes import Registry
from agentcluster.scheduler.preflight import actors, stored_bytes, stranded
from tests.support.waiting import wait_until

LONG = 20.0
SHORT = 0.3


@dataclass
class World:
    """A scheduler, a client, and workers by name, all in this process."""

    scheduler: Scheduler
    client: Client
    stack: AsyncExitStack
    workers: dict[str, Worker] = field(default_factory=dict)

    async def worker(self, name: str) -> Worker:
        # Without a memory limit nothing but the test pauses it.
        worker = await self.stack.enter_async_context(
            Worker(self.scheduler.address, name=name, nthreads=1, memory_limit=0)
        )
        self.workers[name] = worker
        return worker

    async def put(self, name: str, value: Any, *others: str) -> str:
        """Scatter a value to the named workers; return its key."""
        where = [self.workers[each].address for each in (name, *others)]
        # A broadcast would wait until no worker is being retired.
        future = await self.client.scatter(value, workers=where, broadcast=bool(others), hash=False)
        self.client.kept.append(future)  # type: ignore[attr-defined]
        return str(future.key)

    def holders(self, key: str) -> set[str]:
        return {str(ws.name) for ws in self.scheduler.tasks[key].who_has or ()}

    def names(self) -> set[str]:
        return {str(ws.name) for ws in self.scheduler.workers.values()}

    async def value(self, key: str) -> Any:
        return (await self.client.gather({"x": next(f for f in self.kept if f.key == key)}))["x"]

    @property
    def kept(self) -> list[Any]:
        return self.client.kept  # type: ignore[attr-defined,no-any-return]

    async def works(self, *names: str) -> None:
        """Hold that each worker runs a task that may run nowhere else."""
        for name in names:
            address = self.workers[name].address
            await wait_until(lambda a=address: self.scheduler.workers[a].status is Status.running)
            future = self.client.submit(str.upper, name, workers=[address], pure=False)
            # The result is not fetched: a muted worker would not give it.
            await asyncio.wait_for(wait(future), 10)
            assert future.status == "finished"
            assert self.holders(future.key) == {name}

    def mute(self, name: str) -> None:
        """Let a worker answer "busy" to whoever asks it for data."""
        self.workers[name].transfer_outgoing_count_limit = 0

    def unmute(self, name: str) -> None:
        self.workers[name].transfer_outgoing_count_limit = 10

    async def pause(self, name: str) -> None:
        worker = self.workers[name]
        worker.status = Status.paused
        await wait_until(lambda: self.scheduler.workers[worker.address].status is Status.paused)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    """Three workers, ``a``, ``b`` and ``c``."""
    with dask.config.set({"distributed.worker.http.routes": []}):
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0") as scheduler,
            Client(scheduler.address, asynchronous=True) as client,
            AsyncExitStack() as stack,
        ):
            managers.install(scheduler, Registry(), LONG)
            client.kept = []
            world = World(scheduler, client, stack)
            await asyncio.gather(*map(world.worker, "abc"))
            yield world


async def test_only_copies_are_counted_and_nothing_is_lost(world: World) -> None:
    only = await world.put("a", b"x" * 1000)
    shared = await world.put("a", "elsewhere too", "b")
    result = await evacuate(world.scheduler, ["a"], LONG)
    assert (result.keys, result.nbytes) == ({"a": 1}, {"a": world.scheduler.tasks[only].nbytes})
    assert (result.problem, result.rerun) == (None, {})
    assert result.nbytes["a"] >= 1000
    assert world.names() == {"b", "c"}
    assert world.holders(only) <= {"b", "c"}
    assert world.holders(shared) == {"b"}, "a key that is held elsewhere need not move"
    assert await world.value(only) == b"x" * 1000
    assert await world.value(shared) == "elsewhere too"


async def test_a_key_that_only_leaving_workers_hold_counts_once_and_moves(world: World) -> None:
    both = await world.put("a", "both", "b")
    result = await evacuate(world.scheduler, ["a", "b"], LONG)
    assert result.problem is None
    assert sum(result.keys.values()) == 1
    assert world.names() == world.holders(both) == {"c"}
    assert await world.value(both) == "both"


async def test_many_keys_of_several_workers_all_arrive(world: World) -> None:
    for i in range(60):
        await world.put("ab"[i % 2], i)
    keys = [future.key for future in world.kept]
    result = await evacuate(world.scheduler, ["a", "b"], LONG)
    assert result.problem is None
    assert result.keys == {"a": 30, "b": 30}
    assert all(world.holders(key) == {"c"} for key in keys)
    assert await world.client.gather(world.kept) == list(range(60))


async def test_what_a_removed_worker_still_says_is_no_fault(world: World, caplog: pytest.LogCaptureFixture) -> None:
    worker = world.workers["a"]
    assert await evacuate(world.scheduler, ["a"], LONG) == Evacuation(keys={"a": 0}, nbytes={"a": 0}, drain=ANY)
    key = await world.put("b", 1)
    # It asks for a key that exists and for one that does not, and is alive in its own eyes.
    worker.batched_send({"op": "request-refresh-who-has", "keys": [key, "gone"], "stimulus_id": "test"})
    worker.log_event("test", "read")
    await worker.heartbeat()
    await wait_until(lambda: bool(world.scheduler.get_events("test")))  # the scheduler has read what was sent before
    assert worker.status is Status.closing_gracefully
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    # One that is unknown for another reason ends, as in dask.
    with caplog.at_level("WARNING"):
        await world.scheduler.remove_worker(world.workers["b"].address, stimulus_id="test", close=False)
        await world.workers["b"].heartbeat()
    assert world.workers["b"].status is Status.closed
    assert "unregistered worker" in caplog.text


async def test_an_evacuated_worker_gets_no_more_tasks(world: World) -> None:
    gone = world.workers["a"]
    assert (await evacuate(world.scheduler, ["a"], LONG)).problem is None
    futures = world.client.map(lambda n: n + 1, range(30))
    assert await world.client.gather(futures) == list(range(1, 31))
    assert {name for future in futures for name in world.holders(future.key)} == {"b", "c"}
    assert not gone.state.tasks
    assert gone.status is not Status.closed, "its process is its agent's to end"


async def test_a_running_task_goes_on_elsewhere_and_is_not_blamed(world: World) -> None:
    def wait_for_it() -> str:
        Event("go").wait(20)
        return "done"

    future = world.client.submit(wait_for_it, workers=["a", "b"], pure=False)
    await wait_until(lambda: world.scheduler.tasks.get(future.key) and world.scheduler.tasks[future.key].processing_on)
    busy = str(world.scheduler.tasks[future.key].processing_on.name)
    assert (await evacuate(world.scheduler, [busy], LONG)).problem is None
    await Event("go", client=world.client).set()
    assert await asyncio.wait_for(future, 10) == "done"
    assert world.scheduler.tasks[future.key].suspicious == 0


async def test_a_running_task_is_waited_for_and_what_was_not_begun_goes_elsewhere(world: World) -> None:
    def wait_for_it() -> str:
        Event("go").wait(20)
        return "done"

    where = [world.workers["a"].address]
    running = world.client.submit(wait_for_it, workers=where, allow_other_workers=True, pure=False)
    await wait_until(lambda: world.workers["a"].state.executing)
    waiting = world.client.map(str, range(5), workers=where, allow_other_workers=True, pure=False)
    await wait_until(lambda: len(world.scheduler.workers[where[0]].processing) == 6)
    task = asyncio.create_task(evacuate(world.scheduler, ["a"], LONG, drain="tasks", drain_timeout=LONG))
    assert await asyncio.wait_for(world.client.gather(waiting), 10) == ["0", "1", "2", "3", "4"]
    assert {name for future in waiting for name in world.holders(future.key)} <= {"b", "c"}
    assert not task.done()
    await Event("go", client=world.client).set()
    result = await asyncio.wait_for(task, 10)
    assert (result.problem, result.rerun) == (None, {})
    assert result.drain > 0
    assert await running == "done"
    assert world.holders(running.key) <= {"b", "c"}
    assert world.workers["a"].state.transition_counter
    assert world.scheduler.tasks[running.key].suspicious == 0


async def test_what_was_not_begun_is_spread(world: World) -> None:
    where = [world.workers["a"].address]
    go = Event("go", client=world.client)

    def task(i: int) -> int:
        Event("go").wait()
        return i

    tasks = world.client.map(task, range(21), workers=where, allow_other_workers=True, pure=False)
    a, b, c = (world.scheduler.workers[world.workers[name].address] for name in "abc")
    await wait_until(lambda: len(a.processing) + len(b.processing) + len(c.processing) == 21)
    given = {}

    async def leave() -> Evacuation:
        return await evacuate(world.scheduler, ["a"], LONG, drain_timeout=LONG)

    leaving = asyncio.create_task(leave())
    await wait_until(lambda: len(a.processing) <= 1)
    given = {len(b.processing), len(c.processing)}
    await go.set()
    assert (await leaving).problem is None
    assert max(given) - min(given) <= 2, given
    assert sorted(await world.client.gather(tasks)) == list(range(21))


async def test_time_is_up_for_a_running_task(world: World) -> None:
    def wait_for_it() -> str:
        Event("go").wait(20)
        return "done"

    where = [world.workers["a"].address]
    future = world.client.submit(wait_for_it, workers=where, allow_other_workers=True, pure=False)
    await wait_until(lambda: world.workers["a"].state.executing)
    result = await evacuate(world.scheduler, ["a"], LONG, drain="tasks", drain_timeout=SHORT)
    assert (result.problem, result.rerun) == (None, {"a": 1})
    assert SHORT <= result.drain < SHORT + 2
    await Event("go", client=world.client).set()
    assert await asyncio.wait_for(future, 10) == "done"
    assert world.scheduler.tasks[future.key].suspicious == 0


async def test_a_result_that_comes_between_the_last_look_and_the_removal_is_moved_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late() -> str:
        Event("go").wait(20)
        return "late"

    future = world.client.submit(late, workers=[world.workers["a"].address], allow_other_workers=True, pure=False)
    await wait_until(lambda: world.workers["a"].state.executing)
    empty, looks = evacuation._Leaving.empty, []

    async def then_it_ends(self: Any, timeout: float) -> str | None:
        looks.append(problem := await empty(self, timeout))
        await Event("go", client=world.client).set()
        await wait_until(lambda: world.scheduler.tasks[future.key].state == "memory")
        return problem

    monkeypatch.setattr(evacuation._Leaving, "empty", then_it_ends)
    result = await evacuate(world.scheduler, ["a"], LONG, drain="data")
    assert (result.problem, result.rerun, len(looks)) == (None, {}, 2)
    assert await future == "late"
    assert world.names() == {"b", "c"}


@pytest.mark.parametrize("held", [0, 1])
async def test_no_key_counts_as_moved_before_the_tasks_have_ended(world: World, held: int) -> None:
    for _ in range(held):
        await world.put("a", "x" * 1000)
    seen: list[Mapping[str, NodeProgress]] = []
    where = [world.workers["a"].address]
    future = world.client.submit(lambda: Event("go").wait(20), workers=where, allow_other_workers=True, pure=False)
    await wait_until(lambda: world.workers["a"].state.executing)
    work = evacuate(world.scheduler, ["a", "b"], LONG, drain_timeout=LONG, progress=seen.append)
    task = asyncio.create_task(work)
    await wait_until(lambda: seen)
    for each in seen:  # each worker has its own
        assert (each["a"].keys, each["a"].all_keys, each["a"].nbytes, each["a"].tasks) == (0, held, 0, 1)
        assert (each["b"].all_keys, each["b"].tasks, each["b"].step) == (0, 0, "drain")
        assert LONG - 10 < each["a"].left <= LONG
    await Event("go", client=world.client).set()
    assert (await asyncio.wait_for(task, 10)).problem is None
    assert await future
    last = seen[-1]["a"]
    assert last.keys <= last.all_keys == held + 1
    assert (last.step, last.left) == ("retire", 0.0)


async def test_now_moves_nothing(world: World) -> None:
    key = await world.put("a", "lost")
    again = world.client.submit(str, 7, workers=[world.workers["a"].address], allow_other_workers=True, pure=False)
    await again
    result = await evacuate(world.scheduler, ["a"], LONG, drain="now")
    assert (result.problem, result.keys) == (None, {})
    assert (result.given_up, result.lost) == ({"a": 2}, {"a": 1})
    assert result.given_up_nbytes["a"] > 0
    assert key not in world.scheduler.tasks
    assert await again == "7"
    assert world.names() == {"b", "c"}


async def test_a_task_that_may_run_nowhere_else_runs_before_its_worker_leaves(world: World) -> None:
    def wait_for_it() -> None:
        Event("go").wait(20)

    where = [world.workers["a"].address]
    first = world.client.submit(wait_for_it, workers=where, pure=False)
    await wait_until(lambda: world.workers["a"].state.executing)
    bound = world.client.submit(str, 1, workers=where, pure=False)
    ws = world.scheduler.workers[where[0]]
    await wait_until(lambda: len(ws.processing) == 2)
    task = asyncio.create_task(evacuate(world.scheduler, ["a"], LONG, drain="tasks", drain_timeout=LONG))
    await wait_until(lambda: ws.status is Status.closing_gracefully)
    late = world.client.submit(str, 2, workers=where, pure=False)
    other = world.client.submit(str, 3, pure=False)
    await wait_until(lambda: len(ws.processing) == 3)
    assert await other == "3"
    assert world.holders(other.key) <= {"b", "c"}
    await Event("go", client=world.client).set()
    result = await asyncio.wait_for(task, 10)
    assert (result.problem, result.rerun) == (None, {})
    assert first.status == bound.status == late.status == "finished"


async def test_nobody_can_take_the_data_and_all_go_on(world: World) -> None:
    key = await world.put("b", "only here")
    result = await evacuate(world.scheduler, ["a", "b", "c"], LONG)
    assert result.problem == f"data could not be moved to another worker: worker b keeps {key}"
    assert result.keys == {"a": 0, "b": 1, "c": 0}
    assert world.names() == {"a", "b", "c"}, "all leave, or none"
    assert world.holders(key) == {"b"}
    await world.works("a", "b", "c")


async def test_a_paused_worker_takes_no_data(world: World) -> None:
    key = await world.put("a", "only here")
    await world.pause("b")
    await world.pause("c")
    result = await evacuate(world.scheduler, ["a"], LONG)
    assert result.problem == f"data could not be moved to another worker: worker a keeps {key}"
    await world.works("a")
    assert world.workers["b"].status is Status.paused
    world.workers["c"].status = Status.running
    await world.works("c")
    assert (await evacuate(world.scheduler, ["a"], LONG)).problem is None
    assert world.holders(key) == {"c"}


async def test_a_worker_that_was_paused_is_paused_again(world: World) -> None:
    await world.put("a", "only here")
    await world.put("b", "only here")
    await world.pause("c")
    await world.pause("b")
    assert (await evacuate(world.scheduler, ["a", "b"], LONG)).problem
    await world.works("a")
    ws = world.scheduler.workers[world.workers["b"].address]
    await wait_until(lambda: ws.status is world.workers["b"].status is Status.paused)


async def test_too_late_and_all_go_on(world: World) -> None:
    key = await world.put("a", b"x" * 100)
    world.mute("a")
    result = await evacuate(world.scheduler, ["a", "b"], SHORT)
    assert result.problem == f"data could not be moved within {SHORT:g} s: worker a keeps {key}"
    assert world.names() == {"a", "b", "c"}
    assert world.holders(key) == {"a"}
    await world.works("a", "b", "c")
    world.unmute("a")
    assert (await evacuate(world.scheduler, ["a", "b"], LONG)).problem is None
    assert world.names() == world.holders(key) == {"c"}
    assert await world.value(key) == b"x" * 100


async def test_who_could_not_leave_takes_data_at_once(world: World) -> None:
    key = await world.put("c", "goes back")
    await world.put("a", "only here")
    assert (await evacuate(world.scheduler, ["a", "b", "c"], LONG)).problem
    assert {ws.status for ws in world.scheduler.workers.values()} == {Status.running}
    assert (await evacuate(world.scheduler, ["c"], LONG)).problem is None
    assert world.holders(key) <= {"a", "b"}


async def test_data_that_moved_before_the_time_was_over_can_move_back(world: World) -> None:
    key = await world.put("c", "goes back")
    await world.put("a", "only here")
    world.mute("a")
    assert (await evacuate(world.scheduler, ["a", "b"], SHORT)).problem
    assert (await evacuate(world.scheduler, ["c"], LONG)).problem is None
    assert world.holders(key) <= {"a", "b"}


async def test_a_value_too_big_for_the_time_is_not_lost(world: World) -> None:
    key = await world.put("a", bytearray(256 * 2**20))
    result = await evacuate(world.scheduler, ["a"], 0.001)
    assert result.problem == f"data could not be moved within 0.001 s: worker a keeps {key}"
    await world.works("a")
    assert "a" in world.holders(key)


async def test_a_cancelled_evacuation_lets_all_go_on(world: World) -> None:
    key = await world.put("a", "only here")
    world.mute("a")
    task = asyncio.create_task(evacuate(world.scheduler, ["a", "b"], LONG))
    await wait_until(lambda: world.workers["a"].status is Status.closing_gracefully)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.works("a", "b")
    assert world.holders(key) == {"a"}


async def test_who_else_retires_the_worker_goes_on(world: World) -> None:
    key = await world.put("a", "only here")
    world.mute("a")
    other = asyncio.create_task(world.scheduler.retire_workers(names=["a"], close_workers=True))
    await wait_until(lambda: world.workers["a"].status is Status.closing_gracefully)
    assert (await evacuate(world.scheduler, ["a"], SHORT)).problem
    assert world.scheduler.workers[world.workers["a"].address].status is Status.closing_gracefully
    assert world.holders(key) == {"a"}
    world.unmute("a")
    assert list(await asyncio.wait_for(other, 10)) == [world.workers["a"].address]
    assert world.holders(key) <= {"b", "c"}


async def test_workers_that_are_gone_count_as_left(world: World) -> None:
    assert await evacuate(world.scheduler, ["x", "y"], LONG) == Evacuation()
    assert await evacuate(world.scheduler, [], LONG) == Evacuation()
    await world.workers["a"].close()
    result = await evacuate(world.scheduler, ["a", "b"], LONG)
    assert (result.keys, result.nbytes, result.problem) == ({"b": 0}, {"b": 0}, None)
    assert world.names() == {"c"}


async def test_a_worker_that_ends_meanwhile_counts_as_left(world: World) -> None:
    await world.put("a", "lost with a")
    world.mute("a")
    task = asyncio.create_task(evacuate(world.scheduler, ["a", "b"], LONG))
    await wait_until(lambda: world.workers["a"].status is Status.closing_gracefully)
    await world.workers["a"].close()
    assert (await task).problem is None
    assert world.names() == {"c"}


async def test_a_worker_that_comes_back_under_its_name_leaves_too(world: World) -> None:
    await world.put("a", "lost with a")
    late = await world.put("b", "kept")
    world.mute("b")
    task = asyncio.create_task(evacuate(world.scheduler, ["a", "b"], LONG))
    await wait_until(lambda: world.workers["a"].status is Status.closing_gracefully)
    await world.workers["a"].close()
    await world.worker("a")
    new = await world.put("a", "given to the new a")
    world.unmute("b")
    assert (await task).problem is None
    assert world.names() == world.holders(late) == world.holders(new) == {"c"}
    assert await world.value(new) == "given to the new a"


async def test_data_that_arrives_meanwhile_moves_too(world: World) -> None:
    def result() -> str:
        Event("go").wait(20)
        return "late"

    world.mute("a")
    first = await world.put("a", "first")
    future = world.client.submit(result, workers=["a"], allow_other_workers=True, pure=False)
    await wait_until(lambda: future.key in world.scheduler.tasks and world.scheduler.tasks[future.key].processing_on)
    task = asyncio.create_task(evacuate(world.scheduler, ["a"], LONG))
    await wait_until(lambda: world.workers["a"].status is Status.closing_gracefully)
    await Event("go", client=world.client).set()
    await wait_until(lambda: world.holders(future.key))
    world.unmute("a")
    assert (await task).problem is None
    assert world.holders(first) <= {"b", "c"}
    assert world.holders(future.key) <= {"b", "c"}
    assert await future == "late"


class Counter:
    """An actor."""

    n = 0

    def add(self) -> int:
        self.n += 1
        return self.n


async def test_actors_are_named_and_cannot_leave(world: World) -> None:
    future = world.client.submit(Counter, actor=True, workers=["a"])
    counter = await future
    assert actors(world.scheduler, ["a", "b", "x"]) == {"a": [future.key]}
    assert actors(world.scheduler, ["b"]) == {}
    result = await evacuate(world.scheduler, ["a", "b"], LONG)
    assert result.problem == f"actors cannot be moved: worker a keeps {future.key}"
    assert world.names() == {"a", "b", "c"}
    assert await counter.add() == 1
    await world.works("a", "b")


async def test_held_are_the_bytes_of_each(world: World) -> None:
    key = await world.put("a", b"x" * 1000, "b")
    nbytes = world.scheduler.tasks[key].nbytes
    assert stored_bytes(world.scheduler, ["a", "b", "c", "x"]) == {"a": nbytes, "b": nbytes, "c": 0}


async def test_stranded_are_keys_that_nobody_could_take(world: World) -> None:
    await world.put("a", "only here")
    assert stranded(world.scheduler, ["a", "b"]) == {}, "c could"
    assert stranded(world.scheduler, ["a", "b", "c"]) == {"a": 1}
    await world.pause("c")
    assert stranded(world.scheduler, ["a", "b"]) == {"a": 1}
