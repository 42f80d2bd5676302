"""Tasks bound to workers that leave, calls on their way to them, and what they still say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from distributed import Event, Worker, wait

from agentcluster.errors import ConfigError
from agentcluster.model import WorkerState
from agentcluster.scheduler.evacuation import evacuate
from tests.support.departing import LONG, Cluster, departing, until, where
from tests.support.waiting import wait_until


async def on(dask_worker: Worker) -> str:
    return str(dask_worker.name)


async def on_when_free(dask_worker: Worker) -> str:
    while dask_worker.name not in FREE:
        await asyncio.sleep(0.01)
    return str(dask_worker.name)


#: Names of workers, all in this process, on which a call may end.
FREE: set[str] = set()


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Two workers, ``a`` and ``b``, of a node ``n``."""
    async with departing("n") as cluster:
        await cluster.start("a", "b")
        yield cluster


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["address", "name"])
async def test_a_task_for_a_worker_that_was_replaced_runs_on_its_successor(cluster: Cluster, by: str) -> None:
    before = {name: cluster.address(name) if by == "address" else name for name in "ab"}
    assert (await cluster.replace("ab", "cd")).problem is None
    futures = [cluster.bound(before[name]) for name in "abba"]
    assert await cluster.client.gather(futures) == ["c", "d", "d", "c"]
    both = cluster.bound(before["a"], before["b"])
    assert await both in ("c", "d")


async def test_a_task_for_a_node_runs_on_any_of_its_workers(cluster: Cluster) -> None:
    other = await Worker(cluster.scheduler.address, name="elsewhere", nthreads=1)
    try:
        assert {*await cluster.client.gather([cluster.bound("n") for _ in range(20)])} <= {"a", "b"}
        await cluster.replace("ab", "c")
        assert {*await cluster.client.gather([cluster.bound("n") for _ in range(20)])} == {"c"}
    finally:
        await other.close()


async def test_a_task_that_waits_for_its_data_follows_its_worker(cluster: Cluster) -> None:
    held = cluster.client.submit(until, "go", workers=["b"], pure=False)
    waiting = cluster.client.submit(lambda _: where(), held, workers=["a"], pure=False)
    await cluster.state(waiting, "waiting")
    result = await cluster.replace("a", "c")
    assert (result.problem, result.rerun, result.followed) == (None, {}, {"a": 1})
    await Event("go", client=cluster.client).set()
    assert await waiting == "c"


async def test_a_task_that_could_not_run_does_when_a_worker_comes(cluster: Cluster) -> None:
    gone = cluster.address("a")
    cluster.bindings.leave("n", ["a", "b"])
    other = await Worker(cluster.scheduler.address, name="elsewhere", nthreads=1)
    assert (await cluster.leave("ab")).problem is None
    futures = [cluster.bound(gone), cluster.bound("n")]
    await asyncio.gather(*(cluster.state(future, "no-worker") for future in futures))
    await cluster.start("c")
    cluster.bindings.arrive("n", ["c"])
    assert await cluster.client.gather(futures) == ["c", "c"]
    await other.close()


async def test_a_worker_that_was_restarted_under_its_name_runs_the_tasks_of_the_old_one(cluster: Cluster) -> None:
    gone = cluster.address("a")
    cluster.node.workers["a"] = WorkerState("a", "running", gone)
    await asyncio.gather(*(cluster.workers[name].close() for name in "ab"))
    await wait_until(lambda: not cluster.scheduler.workers)
    waiting = cluster.bound(gone)
    await cluster.state(waiting, "no-worker")
    await cluster.start("a")
    assert await cluster.client.gather([waiting, cluster.bound(gone)]) == ["a", "a"]


async def test_a_bound_task_runs_while_its_worker_drains_and_others_do_not(cluster: Cluster) -> None:
    busy = cluster.client.submit(until, "go", workers=["a"], pure=False)
    await cluster.state(busy, "processing")
    leaving = asyncio.create_task(cluster.replace("ab", "cd"))
    await wait_until(lambda: len(cluster.bindings.draining) == 2)
    assert await cluster.bound("b") == "b", "it is idle, and waits for a"
    assert set(await cluster.client.gather([cluster.client.submit(where, pure=False) for _ in range(9)])) <= {"c", "d"}
    queued = cluster.bound("a")
    await cluster.state(queued, "processing")
    assert not leaving.done()
    await Event("go", client=cluster.client).set()
    assert (await leaving).problem is None
    assert await cluster.client.gather([busy, queued]) == ["a", "a"]


async def test_two_tasks_that_need_each_other_both_run(cluster: Cluster) -> None:
    def member(me: str, other: str) -> str:
        Event(me).set()
        return where() if Event(other).wait(LONG) else "alone"

    busy = cluster.client.submit(until, "go", workers=["b"], pure=False)
    await cluster.state(busy, "processing")
    pair = [cluster.client.submit(member, *names, workers=[at]) for at, names in {"a": "xy", "b": "yx"}.items()]
    await wait_until(lambda: len(cluster.workers["a"].state.executing) == 1)
    leaving = asyncio.create_task(cluster.replace("ab", "cd"))
    await wait_until(lambda: len(cluster.bindings.draining) == 2)
    await Event("go", client=cluster.client).set()
    assert (await asyncio.wait_for(leaving, LONG)).rerun == {}
    assert await asyncio.wait_for(cluster.client.gather(pair), LONG) == ["a", "b"]


async def test_a_gang_of_which_one_waits_for_its_data_is_let_to_its_end(cluster: Cluster) -> None:
    await cluster.start("feeder")

    def member(me: str, other: str, _: str | None = None) -> str:
        Event(me).set()
        return where() if Event(other).wait(LONG) else "alone"

    data = cluster.client.submit(until, "go", workers=["feeder"], pure=False)
    first = cluster.client.submit(member, "x", "y", workers=["b"], key="member-1")
    await wait_until(lambda: len(cluster.workers["b"].state.executing) == 1)
    second = cluster.client.submit(member, "y", "x", data, workers=["a"], key="member-2")
    await cluster.state(second, "waiting")
    leaving = asyncio.create_task(cluster.replace("a", "c"))  # b is of a later wave
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(leaving), 0.5)
    await Event("go", client=cluster.client).set()
    assert (await asyncio.wait_for(leaving, LONG)).problem is None
    assert await asyncio.wait_for(cluster.client.gather([first, second]), LONG) == ["b", "a"]


async def test_at_the_end_of_the_drain_timeout_bound_tasks_go_to_the_successors(cluster: Cluster) -> None:
    busy = cluster.client.submit(until, "go", workers=["a"], pure=False)
    await wait_until(lambda: len(cluster.workers["a"].state.executing) == 1)
    queued = [cluster.bound("a") for _ in range(3)]
    await wait_until(lambda: len(cluster.scheduler.workers[cluster.address("a")].processing) == 4)
    result = await cluster.replace("a", "c", drain_timeout=1.7)
    assert (result.problem, result.rerun, result.followed) == (None, {"a": 1}, {"a": 4})
    await Event("go", client=cluster.client).set()
    assert await cluster.client.gather([busy, *queued]) == ["c"] * 4


async def test_bound_tasks_are_waited_for_where_that_is_asked(cluster: Cluster) -> None:
    held = cluster.client.submit(until, "go", workers=["b"], pure=False)
    waiting = cluster.client.submit(lambda _: where(), held, workers=["a"], pure=False)
    await cluster.state(waiting, "waiting")
    leaving = asyncio.create_task(cluster.replace("a", "c", bound="wait"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(leaving), 0.5)
    await Event("go", client=cluster.client).set()
    assert (await asyncio.wait_for(leaving, LONG)).followed == {}
    assert await asyncio.wait_for(waiting, LONG) == "a"


async def test_workers_that_could_not_leave_have_their_tasks_back(cluster: Cluster) -> None:
    kept = await cluster.client.scatter("only here", workers=["a"], hash=False)
    cluster.workers["a"].transfer_outgoing_count_limit = 0  # it gives its data to nobody
    await cluster.start("c")
    held = cluster.client.submit(until, "go", workers=["b"], pure=False)
    waiting = cluster.client.submit(lambda _: where(), held, workers=["a"], pure=False)
    await cluster.state(waiting, "waiting")
    cluster.bindings.leave("n", "a")
    cluster.bindings.arrive("n", "c")
    result = await evacuate(cluster.scheduler, ["a"], 0.5, drain="data")
    assert result.problem == f"data could not be moved within 0.5 s: worker a keeps {kept.key}"
    assert not cluster.bindings.closed
    assert not cluster.bindings.draining
    await Event("go", client=cluster.client).set()
    await asyncio.wait_for(wait(waiting), LONG)
    assert {str(ws.name) for ws in cluster.scheduler.tasks[waiting.key].who_has or ()} == {"a"}


async def test_loosely_bound_tasks_follow_too(cluster: Cluster) -> None:
    gone = cluster.address("a")
    await cluster.replace("a", "c")
    futures = [cluster.client.submit(where, workers=[gone], allow_other_workers=True, pure=False) for _ in range(5)]
    assert set(await cluster.client.gather(futures)) == {"c"}


async def test_a_loosely_bound_gang_stays_on_its_workers(cluster: Cluster) -> None:
    def member(me: str, other: str) -> str:
        Event(me).set()
        return where() if Event(other).wait(LONG) else "alone"

    busy = cluster.client.submit(until, "go", workers=["b"], pure=False)
    await cluster.state(busy, "processing")
    leaving = asyncio.create_task(cluster.replace("ab", "cd"))
    await wait_until(lambda: len(cluster.bindings.draining) == 2)
    gang = [
        cluster.client.submit(member, *names, workers=[at], allow_other_workers=True, key=f"member-{at}")
        for at, names in {"b": "yx", "a": "xy"}.items()
    ]
    await wait_until(lambda: len(cluster.scheduler.workers[cluster.address("b")].processing) == 2)
    await Event("go", client=cluster.client).set()
    assert (await asyncio.wait_for(leaving, LONG)).problem is None
    assert await asyncio.wait_for(cluster.client.gather(gang), LONG) == ["b", "a"]


async def test_a_persisted_collection_follows(cluster: Cluster) -> None:
    import dask.bag

    bag = dask.bag.from_sequence(range(8), npartitions=8).map(lambda n: n + 1)
    gone = cluster.address("a")
    first = cluster.client.persist(bag, workers=[gone])
    await wait(first)
    await cluster.replace("a", "c")
    with dask.annotate(workers=[gone]):
        again = cluster.client.persist(bag.map(lambda n: n * 2), optimize_graph=False)
    assert sorted(await cluster.client.compute(again)) == [2 * n for n in range(1, 9)]


async def test_what_is_bound_is_forgotten_with_its_task(cluster: Cluster) -> None:
    futures = [cluster.bound("a", key=f"key-{n}") for n in range(3)]
    await wait(futures)
    assert len(cluster.bindings.bound_to([cluster.address("a")])) == 3
    del futures
    await wait_until(lambda: not cluster.scheduler.tasks)
    assert cluster.bindings.bound_to([cluster.address("a")]) == set()
    await cluster.replace("ab", "cd")
    assert not cluster.bindings._bound_to
    assert not cluster.bindings._gangs


async def test_a_task_that_is_submitted_again_among_others_stays_bound_to_what_was_asked(cluster: Cluster) -> None:
    gone = cluster.address("a")
    held = cluster.client.submit(until, "go", workers=["b"], pure=False)
    first = cluster.client.submit(lambda _: where(), held, workers=[gone], key="first")
    await cluster.state(first, "waiting")
    await cluster.replace("a", "c")
    second = cluster.client.submit(lambda *_: where(), first, workers=["n"], key="second")
    await cluster.state(second, "waiting")
    assert cluster.bindings.tasks[cluster.scheduler.tasks["first"]].workers == {gone}
    await Event("go", client=cluster.client).set()
    assert await first == "c"


# -- calls -------------------------------------------------------------------------------------------------------------


async def test_run_goes_on_under_changes(cluster: Cluster) -> None:
    stop = False
    answers: list[dict[str, str]] = []

    async def run() -> None:
        while not stop:
            answers.append(await cluster.client.run(on))

    running = asyncio.create_task(run())
    names = list("ab")
    for turn in range(8):
        new = [f"{turn}-{i}" for i in range(2)]
        assert (await cluster.replace(names, new)).problem is None
        names = new
    stop = True
    await running
    assert len(answers) > 8
    assert all(answers)
    assert set(answers[-1].values()) <= {*names, "6-0", "6-1"}


async def test_a_worker_does_not_leave_while_it_answers_a_call(cluster: Cluster) -> None:
    FREE.clear()
    call = asyncio.create_task(cluster.client.run(on_when_free, workers=[cluster.address("a")]))
    await wait_until(lambda: cluster.calls.on(cluster.address("a")) == 1)
    assert cluster.calls.on(cluster.address("b")) == 0
    leaving = asyncio.create_task(cluster.replace("a", "c"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(leaving), 0.5)
    FREE.add("a")
    assert list((await call).values()) == ["a"]
    assert (await leaving).problem is None


async def test_a_call_on_a_worker_that_has_gone_is_refused_at_once(cluster: Cluster) -> None:
    gone = cluster.address("a")
    await cluster.replace("a", "c")
    with pytest.raises(ConfigError, match=rf"{gone} \(a of node n, in whose place there is {cluster.address('c')}\)"):
        await asyncio.wait_for(cluster.client.run(on, workers=[gone]), 5)


@pytest.mark.parametrize("by", ["address", "name", "node"])
async def test_data_for_a_worker_that_has_gone_goes_to_its_successor(cluster: Cluster, by: str) -> None:
    target = {"address": cluster.address("a"), "name": "a", "node": "n"}[by]
    await cluster.replace("ab", "cd")
    future = await cluster.client.scatter("data", workers=[target], hash=False)
    holders = {str(ws.name) for ws in cluster.scheduler.tasks[future.key].who_has or ()}
    assert holders <= ({"c", "d"} if by == "node" else {"c"})
    assert await future == "data"


# -- results that cannot be sent ---------------------------------------------------------------------------------------


class Unpicklable:
    """A result that stays where it is, like a socket."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        raise TypeError("it cannot be pickled")


async def test_a_worker_stays_while_a_result_that_cannot_be_sent_is_needed(cluster: Cluster) -> None:
    held = cluster.client.submit(Unpicklable, workers=["a"], pure=False)
    await cluster.state(held, "memory")
    leaving = asyncio.create_task(cluster.replace("a", "c"))
    await wait_until(lambda: cluster.bindings.draining)
    await asyncio.sleep(1)
    assert held.key not in cluster.workers["c"].state.tasks, "nobody tried to fetch it"
    late = cluster.client.submit(lambda _: where(), held, workers=["a"], pure=False)
    assert await asyncio.wait_for(late, LONG) == "a", "its only copy is there"
    beside = cluster.client.submit(lambda _: where(), held, pure=False)
    assert await asyncio.wait_for(beside, LONG) == "a"
    assert not leaving.done()
    held.release()
    assert (await leaving).problem is None


async def test_a_result_that_cannot_be_sent_is_named(cluster: Cluster) -> None:
    held = cluster.client.submit(Unpicklable, workers=["a"], pure=False)
    await cluster.state(held, "memory")
    result = await cluster.replace("a", "c", drain_timeout=3)
    assert result.problem == (
        f"results cannot be sent to another worker, for example because pickle refuses: worker a keeps {held.key}"
    )
    assert await cluster.bound("a") == "a"
