"""Rollouts over real nodes: order, pause, cancel and undo, what a failure leaves, drains, refusals and reports."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import dask
import psutil
import pytest
import pytest_asyncio
from distributed import Client, Event, Scheduler
from distributed.core import connect

from agentcluster import AgentCluster
from agentcluster.errors import ConfigError, PreflightError, RolloutBusy, SwapError
from agentcluster.launch.protocol import Launcher
from agentcluster.model import Mode, RolloutStatus
from agentcluster.wire import TOPIC, to_wire
from tests.support.census import children
from tests.support.forked import ForkedHosts
from tests.support.inprocess import here
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("by_value")

QUIET = {"scheduler_options": {"dashboard": False, "dashboard_address": ":0"}}
ONE = {"nworkers": 1, "nthreads": 1}
NEXT = {**ONE, "resources": {"next": 1}}
OTHER = {**ONE, "resources": {"other": 1}}

#: In the order of their names, which is that of a rollout; the order in which they joined is another one.
ALL = ["local", "local.2", "local.3"]

#: How many events there were when the nodes had joined.
EVENTS: WeakKeyDictionary[AgentCluster, int] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def nodes(count: int, process: Launcher | None = None) -> AsyncIterator[AgentCluster]:
    """Run agents with one worker of one thread each: ``local``, ``local.2``, ``local.3``; one may be a process."""
    hosts = [process if process is not None and each.name == process.name else each for each in here(count)]
    async with AgentCluster(hosts=hosts, config=ONE, asynchronous=True, **QUIET) as cluster:
        EVENTS[cluster] = len(cluster.scheduler.get_events(TOPIC))
        yield cluster


@pytest_asyncio.fixture
async def one() -> AsyncIterator[AgentCluster]:
    async with nodes(1) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def two() -> AsyncIterator[AgentCluster]:
    async with nodes(2) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def three() -> AsyncIterator[AgentCluster]:
    async with nodes(3) as cluster:
        yield cluster


def names(cluster: AgentCluster) -> set[str]:
    return {str(ws.name) for ws in cluster.scheduler.workers.values()}


def plans(cluster: AgentCluster) -> dict[str, str]:
    """Return node name -> what its workers offer, besides a CPU; "" for the first plan."""
    return {
        name: ",".join("".join(set(spec["resources"]) - {"CPU"}) for spec in node["plan"].values())
        for name, node in cluster.nodes.items()
    }


def told(cluster: AgentCluster, action: str) -> list[dict[str, Any]]:
    events = cluster.scheduler.get_events(TOPIC)[EVENTS[cluster] :]
    return [event for _, event in events if event["action"] == action]


def steps(cluster: AgentCluster, step: str) -> list[str]:
    return [event["node"] for event in told(cluster, "step") if event["step"] == step]


def preload(tmp_path: Path, text: str) -> dict[str, Any]:
    """Return options of workers that run a program before they join."""
    path = tmp_path / "before_they_join.py"
    path.write_text(f"import os\n\ndef dask_setup(worker):\n    {text}\n")
    return {**NEXT, "preload": [str(path)]}


def broken(tmp_path: Path, node: str) -> dict[str, Any]:
    """Return options of workers that cannot start on one node."""
    return preload(tmp_path, f"if str(worker.name).rpartition('-')[0] == {node!r}: os._exit(3)")


@contextlib.contextmanager
def slow(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Give options of workers that do not join before the end of the block."""
    path = tmp_path / "lock"
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield preload(tmp_path, f"import fcntl; fcntl.flock(open({str(path)!r}), fcntl.LOCK_SH)")


async def running(cluster: AgentCluster, **facts: Any) -> RolloutStatus:
    """Wait until a rollout runs of which `facts` are true, and return its status."""

    async def found() -> Any:
        status = await cluster.rollout_status()
        return status and facts.items() <= vars(status).items() and status

    return await wait_until(found)


async def at_step(cluster: AgentCluster, node: str, step: str) -> None:
    async def found() -> bool:
        status = await cluster.rollout_status()
        return status is not None and status.nodes[node].step == step

    await wait_until(found)


# -- order -------------------------------------------------------------------------------------------------------------


async def test_a_canary_goes_first_then_as_many_as_may(three: AgentCluster) -> None:
    dry = await three.reprovision("auto-cpu", NEXT, canary=True, max_parallel=2, dry_run=True)
    assert set(plans(three).values()) == {""}
    assert {node.outcome for node in dry.nodes.values()} == {"unchanged"}
    assert not told(three, "began")
    report = await three.reprovision("auto-cpu", NEXT, canary=True, max_parallel=2)
    assert [event["waves"] for event in told(three, "began")] == [[["local"], ["local.2", "local.3"]]]
    happened = [(e["node"], e["step"]) for e in told(three, "step")]
    assert happened.index(("local", "ready")) < min(happened.index((n, "start")) for n in ("local.2", "local.3"))
    last_start = max(happened.index((n, "start")) for n in ("local.2", "local.3"))
    assert last_start < min(happened.index((n, "ready")) for n in ("local.2", "local.3"))
    assert set(plans(three).values()) == {"next"}
    assert {node.outcome for node in report.nodes.values()} == {"changed"}
    assert told(three, "ended")[0]["outcomes"] == dict.fromkeys(ALL, "changed")
    assert await three.rollout_status() is None
    assert await three.rollout.status() is None


async def test_pause_resume_and_pause_again(three: AgentCluster) -> None:
    with pytest.raises(ConfigError, match="cannot pause: no rollout runs"):
        await three.rollout.pause()
    change = asyncio.ensure_future(three.reprovision("auto-cpu", NEXT, nodes=ALL, max_parallel=1))
    await running(three, state="running")
    await three.rollout.pause()
    status = await running(three, state="paused")
    assert status.wave == 1
    await wait_until(lambda: plans(three) == {"local": "next", "local.2": "", "local.3": ""})
    await asyncio.gather(three.rollout.resume(), three.rollout.resume(), three.rollout.pause())
    await running(three, state="paused", wave=2)
    assert steps(three, "start") == ["local", "local.2"]
    assert (await three.rollout.status()).state == "paused"
    await three.rollout.resume()
    report = await change
    assert steps(three, "start") == ["local", "local.2", "local.3"]
    assert {node.outcome for node in report.nodes.values()} == {"changed"}


@pytest.mark.parametrize("on_failure", ["rollback", "stop"])
async def test_cancel_in_a_pause(two: AgentCluster, on_failure: Any) -> None:
    change = asyncio.ensure_future(
        two.reprovision("auto-cpu", NEXT, nodes=ALL[:2], max_parallel=1, on_failure=on_failure)
    )
    await running(two, state="running")
    await two.rollout.pause()
    await running(two, state="paused")
    # In one turn of the loop: neither may be forgotten.
    rolling = two.scheduler.extensions["agentcluster"].controller.running
    rolling.resume()
    rolling.cancel("it was cancelled")
    with pytest.raises(SwapError, match="it was cancelled") as caught:
        await change
    local = {"rollback": "", "stop": "next"}[on_failure]
    assert plans(two) == {"local": local, "local.2": ""}
    assert steps(two, "start").count("local.2") == 0
    assert caught.value.report["nodes"]["local.2"]["outcome"] == "failed"
    assert names(two) == two.plan


async def test_cancel_while_workers_start_leaves_the_old(two: AgentCluster, tmp_path: Path) -> None:
    before, workers = children(), names(two)
    with slow(tmp_path) as options:
        change = asyncio.ensure_future(two.reprovision("auto-cpu", options, timeout=50))
        await at_step(two, "local.2", "start")
        await wait_until(lambda: len(children()) > len(before))
        await two.rollout.cancel()
        with pytest.raises(SwapError, match=r"it was cancelled; the workers that ran before still run"):
            await change
        await wait_until(lambda: children() == before)
    assert names(two) == workers == two.plan
    assert plans(two) == {"local": "", "local.2": ""}
    await two.reprovision("auto-cpu", NEXT)
    assert plans(two) == {"local": "next", "local.2": "next"}


async def test_cancel_while_tasks_are_waited_for(one: AgentCluster) -> None:
    async with Client(one, asynchronous=True) as client:
        before = names(one)
        event = Event("go", client=client)
        future = client.submit(lambda: Event("go").wait(), pure=False)
        await wait_until(lambda: [ws for ws in one.scheduler.workers.values() if ws.processing])
        change = asyncio.ensure_future(one.reprovision("auto-cpu", NEXT))
        await at_step(one, "local", "drain")
        await one.rollout.cancel()
        with pytest.raises(SwapError, match="it was cancelled; the workers that ran before still run"):
            await change
        assert names(one) == before == one.plan
        await event.set()
        assert await future
        assert await client.submit(int, "3") == 3


# -- failure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_failure", "outcomes", "says"),
    [
        ("rollback", ("rolled back", "failed", "unchanged"), "local was brought back; the workers that ran before"),
        ("stop", ("changed", "failed", "unchanged"), "local changed, the other nodes have the workers that they had"),
        ("continue", ("changed", "failed", "changed"), r"local, local\.3 changed, the other nodes have"),
    ],
)
async def test_one_of_three_nodes_cannot(
    three: AgentCluster, tmp_path: Path, on_failure: Any, outcomes: tuple[str, ...], says: str
) -> None:
    first = names(three)
    options = broken(tmp_path, "local.2")
    with pytest.raises(SwapError, match=rf"workers on node 'local\.2' did not start: .*{says}") as caught:
        await three.reprovision("auto-cpu", options, nodes=ALL, max_parallel=1, on_failure=on_failure)
    assert {name: each["outcome"] for name, each in caught.value.report["nodes"].items()} == dict(
        zip(ALL, outcomes, strict=True)
    )
    expected = {n: "next" if outcome == "changed" else "" for n, outcome in zip(ALL, outcomes, strict=True)}
    assert plans(three) == expected
    assert names(three) == three.plan
    assert {name for name in first if name.startswith("local.2-")} <= names(three)
    assert all(node["state"] == "ready" for node in three.nodes.values())


async def test_nodes_of_one_wave_go_on_without_the_one_that_cannot(three: AgentCluster, tmp_path: Path) -> None:
    with pytest.raises(SwapError, match=r"local, local\.3 changed"):
        await three.reprovision("auto-cpu", broken(tmp_path, "local.2"), nodes=ALL, on_failure="continue")
    assert plans(three) == {"local": "next", "local.2": "", "local.3": "next"}
    assert names(three) == three.plan


async def test_a_node_lost_before_its_turn_fails_alone(forked: ForkedHosts) -> None:
    async with nodes(3, process=forked(2)[1]) as three:
        await lose_a_node_before_its_turn(three)


async def lose_a_node_before_its_turn(three: AgentCluster) -> None:
    change = asyncio.ensure_future(
        three.reprovision("auto-cpu", NEXT, nodes=ALL, max_parallel=1, on_failure="continue")
    )
    await running(three, state="running")
    await three.rollout.pause()
    await running(three, state="paused")
    os.kill(three.workers["local.2"].launched.ready.pid, signal.SIGKILL)
    await wait_until(lambda: three.nodes["local.2"]["state"] == "lost")
    await three.rollout.resume()
    with pytest.raises(SwapError, match=r"node local\.2 is lost .*local\.2 has no workers") as caught:
        await change
    outcomes = {name: each["outcome"] for name, each in caught.value.report["nodes"].items()}
    assert outcomes == {"local": "changed", "local.2": "failed", "local.3": "changed"}
    assert plans(three) == {"local": "next", "local.2": "", "local.3": "next"}


async def test_a_changed_node_that_is_lost_cannot_be_brought_back(tmp_path: Path, forked: ForkedHosts) -> None:
    async with nodes(3, process=forked(1)[0]) as three:
        await lose_a_changed_node(three, tmp_path)


async def lose_a_changed_node(three: AgentCluster, tmp_path: Path) -> None:
    options = broken(tmp_path, "local.3")
    change = asyncio.ensure_future(three.reprovision("auto-cpu", options, nodes=ALL, max_parallel=1))
    await running(three, state="running")
    await three.rollout.pause()
    await running(three, state="paused")
    await three.rollout.resume()
    await three.rollout.pause()
    await running(three, state="paused", wave=2)
    os.kill(three.workers["local"].launched.ready.pid, signal.SIGKILL)
    await wait_until(lambda: three.nodes["local"]["state"] == "lost")
    await three.rollout.resume()
    with pytest.raises(SwapError, match=r"local\.2 was brought back; local could not be brought back"):
        await change
    assert plans(three) == {"local": "", "local.2": "", "local.3": ""}
    assert three.nodes["local.2"]["state"] == three.nodes["local.3"]["state"] == "ready"


async def test_a_worker_that_ended_before_its_nodes_turn(two: AgentCluster) -> None:
    """By a retirement that is not ours, while the rollout was paused; and where the old would go first."""
    change = asyncio.ensure_future(two.reprovision("auto-cpu", NEXT, nodes=ALL[:2], strategy="replace"))
    await running(two, state="running")
    await two.rollout.pause()
    await running(two, state="paused")
    async with Client(two, asynchronous=True) as client:
        [address] = [ws.address for ws in two.scheduler.workers.values() if str(ws.name).startswith("local.2-")]
        await client.retire_workers([address])
    await wait_until(lambda: two.nodes["local.2"]["plan"] == {})
    await two.rollout.resume()
    report = await change
    assert report.nodes["local.2"].old == ()
    assert plans(two) == {"local": "next", "local.2": "next"}


async def test_a_client_that_dies_changes_nothing(one: AgentCluster) -> None:
    comm = await connect(one.scheduler_address)
    await comm.write({"op": "reprovision_nodes", "mode": "auto-cpu", "config": NEXT, "reply": True})
    await at_step(one, "local", "start")
    comm.abort()
    await wait_until(lambda: plans(one) == {"local": "next"})
    await wait_until(lambda: names(one) == one.plan)
    assert await one.rollout_status() is None
    await one.reprovision("auto-cpu", OTHER, wait=5)
    assert plans(one) == {"local": "other"}


# -- undo, and two at once ---------------------------------------------------------------------------------------------


async def test_undo_and_undo_that(two: AgentCluster) -> None:
    with pytest.raises(ConfigError, match="there is no rollout to undo"):
        await two.rollout.undo()
    scheduler, registry = two.scheduler_comm, two.scheduler.extensions["agentcluster"].registry
    await two.reprovision("auto-cpu", NEXT, nodes="local")
    await scheduler.set_provision_mode(nodes={"local.3": to_wire(Mode("none"))})
    await two.reprovision("uniform", {**OTHER, "nworkers": 2})
    assert "local.3" not in registry.wanted
    assert (await scheduler.get_provision_mode())["mode"] == "uniform"
    report = await two.rollout.undo()
    assert plans(two) == {"local": "next", "local.2": ""}
    assert {node.mode for node in report.nodes.values()} == {"auto-cpu"}
    assert (await scheduler.get_provision_mode())["mode"] == "auto-cpu"
    assert registry.wanted["local.3"] == Mode("none")
    await two.rollout.undo()
    assert plans(two) == {"local": "other,other", "local.2": "other,other"}
    assert (await scheduler.get_provision_mode())["mode"] == "uniform"
    assert names(two) == two.plan


@pytest.mark.parametrize("wait", [False, 0.2])
async def test_whoever_does_not_want_to_wait_is_told_for_what(one: AgentCluster, tmp_path: Path, wait: Any) -> None:
    with slow(tmp_path) as options:
        change = asyncio.ensure_future(one.reprovision("auto-cpu", options, timeout=50))
        await at_step(one, "local", "start")
        with pytest.raises(RolloutBusy, match=r"a rollout to 'auto-cpu' has run for \d+ s") as caught:
            await one.reprovision("uniform", OTHER, wait=wait)
        assert caught.value.label == "auto-cpu"
        second = asyncio.ensure_future(one.reprovision("uniform", OTHER))
        assert (await one.rollout_status()).mode == "auto-cpu"
    assert (await change).nodes["local"].outcome == "changed"
    assert (await second).nodes["local"].outcome == "changed"
    assert plans(one) == {"local": "other"}


# -- replace -----------------------------------------------------------------------------------------------------------


async def test_replace_loses_nothing_where_another_node_can_take_it(two: AgentCluster) -> None:
    async with Client(two, asynchronous=True) as client:
        scattered = await client.scatter({f"k{i}": i for i in range(100)})
        report = await two.reprovision("auto-cpu", NEXT, nodes=ALL[:2], strategy="replace")
        assert await client.gather(scattered) == {f"k{i}": i for i in range(100)}
    assert {(node.strategy, node.because, node.outcome) for node in report.nodes.values()} == {
        ("replace", "asked for", "changed")
    }
    assert report.keys >= 100
    assert report.nbytes > 0
    happened = [(e["node"], e["step"]) for e in told(two, "step")]
    for node in two.nodes:
        assert happened.index((node, "stop")) < happened.index((node, "start"))
    assert happened.index(("local", "ready")) < happened.index(("local.2", "swap"))
    assert names(two) == two.plan
    assert plans(two) == {"local": "next", "local.2": "next"}


async def test_replace_alone_is_refused_with_what_would_help(one: AgentCluster) -> None:
    async with Client(one, asynchronous=True) as client:
        scattered = await client.scatter({f"k{i}": i for i in range(10)})
        before = children()
        with pytest.raises(
            PreflightError,
            match=r"its old workers must go before the new ones come \(asked for\), and no other worker could take the "
            r"only copies of 10 keys; start a worker on another node, release those results, or give them up with "
            r"drain='now'",
        ):
            await one.reprovision("auto-cpu", NEXT, strategy="replace")
        assert children() == before
        assert sorted((await client.gather(scattered)).values()) == list(range(10))
        planned = await one.reprovision("auto-cpu", NEXT, strategy="replace", drain="now", dry_run=True)
        assert (planned.keys, planned.given_up) == (0, 10)
        report = await one.reprovision("auto-cpu", NEXT, strategy="replace", drain="now")
        assert report.nodes["local"].outcome == "changed"
        assert (report.keys, report.given_up, report.lost) == (0, 10, 10)
        assert [future.status for future in scattered.values()] == ["cancelled"] * 10
        assert plans(one) == {"local": "next"}
        assert names(one) == one.plan


async def test_replace_restores_the_old_plan_where_the_new_does_not_start(two: AgentCluster, tmp_path: Path) -> None:
    first = names(two)
    async with Client(two, asynchronous=True) as client:
        scattered = await client.scatter({f"k{i}": i for i in range(20)})
        with pytest.raises(SwapError, match=r"workers on node 'local\.2' did not start.*local was brought back"):
            await two.reprovision("auto-cpu", broken(tmp_path, "local.2"), nodes=ALL[:2], strategy="replace")
        assert sorted((await client.gather(scattered)).values()) == list(range(20))
    assert plans(two) == {"local": "", "local.2": ""}
    assert names(two) == two.plan
    assert len(names(two)) == 2
    assert not first & names(two)
    assert {node["mode"] for node in two.nodes.values()} == {"auto-cpu"}


# -- drain -------------------------------------------------------------------------------------------------------------


def blocked(path: str) -> str:
    """Note that it began, wait for a word, return who it was."""
    from distributed import get_worker

    with open(path, "a") as file:
        file.write(f"{get_worker().name}\n")
    Event("go").wait()
    return str(get_worker().name)


async def test_a_running_task_may_end(one: AgentCluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with Client(one, asynchronous=True) as client:
        future = client.submit(lambda: blocked(str(log)))
        await wait_until(lambda: log.exists() and log.read_text())
        change = asyncio.ensure_future(one.reprovision("auto-cpu", NEXT, drain="tasks"))
        await at_step(one, "local", "drain")
        assert await client.submit(int, "3") == 3
        await Event("go", client=client).set()
        report = await change
        assert await future == "local-0"
    assert log.read_text().splitlines() == ["local-0"]
    assert report.nodes["local"].rerun == 0
    assert report.nodes["local"].drain > 0


async def test_a_task_whose_time_is_up_runs_again_without_blame(one: AgentCluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with Client(one, asynchronous=True) as client:
        future = client.submit(lambda: blocked(str(log)))
        await wait_until(lambda: log.exists() and log.read_text())
        report = await one.reprovision("auto-cpu", NEXT, drain_timeout=0.2)
        assert report.nodes["local"].rerun == 1
        assert report.nodes["local"].drain == pytest.approx(0.2, abs=0.15)
        assert one.scheduler.tasks[future.key].suspicious == 0
        await Event("go", client=client).set()
        assert await future == "local-1"
    assert log.read_text().splitlines() == ["local-0", "local-1"]


async def test_actors_are_named_and_given_up_only_when_asked(one: AgentCluster) -> None:
    async with Client(one, asynchronous=True) as client:
        future = client.submit(type("Counter", (), {"more": lambda self: 1}), actor=True, key="the-counter")
        await future
        with pytest.raises(
            PreflightError, match=r"worker local-0 holds actors, which cannot be moved: the-counter; .*drain='now'"
        ):
            await one.reprovision("auto-cpu", NEXT)
        assert plans(one) == {"local": ""}
        report = await one.reprovision("auto-cpu", NEXT, drain="now")
        assert report.nodes["local"].outcome == "changed"
        assert plans(one) == {"local": "next"}
        future.release()


# -- reports -----------------------------------------------------------------------------------------------------------


async def test_tasks_that_no_worker_could_run_are_named(one: AgentCluster, tmp_path: Path) -> None:
    await one.reprovision("auto-cpu", {**ONE, "resources": {"BIG": 1}})
    async with Client(one, asynchronous=True) as client:
        busy = client.submit(lambda: blocked(str(tmp_path / "log")), resources={"BIG": 1}, key="busy")
        waiting = client.submit(int, "3", resources={"BIG": 1}, key="waiting")
        await wait_until(lambda: (tmp_path / "log").exists() and "waiting" in one.scheduler.tasks)
        expected = ("busy (resources {'BIG': 1})", "waiting (resources {'BIG': 1})")
        report = await one.reprovision("auto-cpu", NEXT, dry_run=True)
        assert report.nodes["local"].bound == expected
        for said in (*expected, "new start, then old stop", "1 x 1 thread"):
            assert said in repr(report)
        assert (
            not (await one.reprovision("auto-cpu", {**NEXT, "resources": {"BIG": 2}}, dry_run=True))
            .nodes["local"]
            .bound
        )
        with pytest.raises(SwapError) as caught:
            await one.reprovision("auto-cpu", {**NEXT, "preload": ["no_such_module_at_all"]})
        assert caught.value.report["nodes"]["local"]["bound"] == []  # its workers stay
        report = await one.reprovision("auto-cpu", NEXT, drain_timeout=0)
        assert report.nodes["local"].bound == expected
        assert report.nodes["local"].rerun >= 1
        await client.cancel([busy, waiting])
        await Event("go", client=client).set()


async def test_bound_tasks_are_a_reason_to_refuse_where_that_is_asked(one: AgentCluster) -> None:
    async with Client(one, asynchronous=True) as client:
        [address] = one.scheduler.workers
        held = client.submit(lambda: Event("go").wait(20), workers=[address], key="held")
        await wait_until(lambda: "held" in one.scheduler.tasks)
        with pytest.raises(PreflightError, match="1 unfinished task bound to its workers, such as held; wait for the"):
            await one.reprovision("auto-cpu", NEXT, bound="refuse")
        assert list(one.scheduler.workers) == [address]
        await Event("go", client=client).set()
        await held
        assert (await one.reprovision("auto-cpu", NEXT, bound="refuse")).nodes["local"].followed == 0


async def test_a_report_has_all_its_facts(one: AgentCluster) -> None:
    async with Client(one, asynchronous=True) as client:
        scattered = await client.scatter({f"k{i}": bytes(1000) for i in range(7)})
        report = await one.reprovision("auto-cpu", {**NEXT, "nworkers": 2})
        assert len(await client.gather(scattered)) == 7
    node = report.nodes["local"]
    assert (node.node, node.mode, node.outcome, node.strategy, node.because) == (
        "local",
        "auto-cpu",
        "changed",
        "surge",
        "",
    )
    assert (node.old, node.new, node.kept) == (("local-0",), ("local-1", "local-2"), ())
    assert node.keys == 7
    assert node.nbytes >= 7000
    assert (node.rerun, node.bound) == (0, ())
    assert node.start > 0
    assert node.retire > 0
    assert node.stop > 0
    assert report.seconds >= node.start + node.retire + node.stop


async def test_terms_that_cannot_be(one: AgentCluster) -> None:
    for terms, says in (
        ({"max_parallel": 0}, "max_parallel=0 must be a whole number from 1 to"),
        ({"strategy": "surgee"}, "did you mean 'surge'"),
        ({"drain": "data "}, "did you mean 'data'"),
        ({"on_failure": "roll"}, "rollback"),
        ({"drain_timeout": -1}, "drain_timeout=.* is -1, but must be a time of 0 or more"),
        ({"wait": "soon"}, "wait=.* is 'soon'"),
    ):
        with pytest.raises(ConfigError, match=says):
            await one.reprovision("auto-cpu", NEXT, **terms)
    assert plans(one) == {"local": ""}


async def test_a_scheduler_that_closes_mid_rollout_ends_at_once(tmp_path: Path) -> None:
    async with (
        Scheduler(host="127.0.0.1", dashboard_address=":0", dashboard=False) as scheduler,
        AgentCluster(scheduler=scheduler.address, hosts=here(), config=ONE, asynchronous=True) as cluster,
    ):
        with slow(tmp_path) as options:
            change = asyncio.ensure_future(cluster.reprovision("auto-cpu", options, timeout=50))
            await at_step(cluster, "local", "start")
            before = children()
            await asyncio.wait_for(scheduler.close(), 15)
            # What is closed later asks for it in vain.
            dask.config.set({"distributed.comm.timeouts.connect": "500ms"})
            with pytest.raises(OSError, match=r"(?i)closed|connect"):
                await change
        await wait_until(lambda: not any(map(psutil.pid_exists, before)))
