"""Adaptive scaling by a clock that a test moves: when it looks, which workers may go, when it tries again."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from tornado.ioloop import IOLoop

from agentcluster.client.adaptive import LONGEST_WAIT, REQUEST_PAUSE, AgentAdaptive, Patience
from agentcluster.client.calls import AdaptAnswer
from agentcluster.client.hosts import Launches
from agentcluster.errors import ConfigError, RolloutBusy
from agentcluster.reports import Nodes


class Clock:
    """A clock that moves when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        waker = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), waker))
        await waker

    async def forward(self, seconds: float) -> None:
        """Let time pass; whoever sleeps wakes when it is due."""
        end = self.now + seconds
        await settled()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.now, _, waker = heapq.heappop(self._sleepers)
            if not waker.done():
                waker.set_result(None)
            await settled()
        self.now = end


async def settled() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


def answer(**facts: Any) -> AdaptAnswer:
    quiet: AdaptAnswer = {
        "saw": "no tasks",
        "decided": "",
        "could_go": [],
        "unmet": {},
        "short": [],
        "requests": {},
        "waits": False,
        "launch": [],
        "seconds": 0.0,
    }
    return quiet | facts  # type: ignore[return-value, operator]


class Cluster:
    """What adaptive scaling needs of a cluster; a test answers for the scheduler, at a time of the clock."""

    def __init__(self, clock: Clock, reply: Callable[[Mapping[str, Any]], AdaptAnswer]) -> None:
        self.clock = clock
        self.reply = reply
        self.looks: list[tuple[float, Mapping[str, Any]]] = []
        self.events: list[Mapping[str, Any]] = []
        self.launched: list[tuple[Sequence[str], Launches]] = []
        self.nodes = Nodes()
        self.workers = {"local": object()}
        self.busy = asyncio.Event()  # clear while a look of the scheduler takes its time
        self.busy.set()
        self.scheduler_comm: Any = self
        self.view = self.hosts = self
        self.loop = IOLoop.current()

    # the scheduler
    async def adapt_nodes(self, *, asked: Mapping[str, Any], nodes: Sequence[str], wait: bool) -> AdaptAnswer:
        self.looks.append((self.clock.now, asked))
        await self.busy.wait()
        return self.reply(asked)

    async def log_event(self, *, topic: str, msg: Mapping[str, Any]) -> None:
        self.events.append(msg["adapt"])

    # the view and the hosts
    async def refresh(self) -> None:
        pass

    def extra(self) -> tuple[str, ...]:
        return ()

    def candidates(self) -> dict[str, Any]:
        return {"cloud-1": None}

    def launch_soon(self, names: Sequence[str], then: Launches) -> None:
        self.launched.append((names, then))

    async def end_idle_unless_launching(self) -> list[str]:
        return []

    @property
    def times(self) -> list[float]:
        return [when for when, _ in self.looks]


def scaling(reply: Callable[[Mapping[str, Any]], AdaptAnswer], **options: Any) -> tuple[AgentAdaptive, Cluster, Clock]:
    """Return an AgentAdaptive without an interval: it looks when it is told to, and for requests."""
    clock = Clock()
    cluster = Cluster(clock, reply)
    return AgentAdaptive(cluster, interval=0, clock=clock, **options), cluster, clock


def told(adaptive: AgentAdaptive) -> list[tuple[str, str]]:
    return [(each.decided, each.why) for each in adaptive.decisions]


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_a_request_is_looked_for_at_once_and_then_twice_a_second() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(requests={"GPU": False}))
    request = asyncio.ensure_future(adaptive.hold({"GPU": 4}, timeout=3))
    await clock.forward(2.9)
    assert cluster.times == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert all(asked["requests"] == {"GPU": 4} for _, asked in cluster.looks)
    assert not request.done()
    await clock.forward(0.2)
    with pytest.raises(TimeoutError, match=r"no room for GPU=4 within 3 s; see adaptive_log\(\)"):
        await request
    looks = len(cluster.looks)
    await clock.forward(60)
    assert len(cluster.looks) == looks, "one that is given up is not looked for any longer"


async def test_a_request_is_held_until_it_is_released() -> None:
    adaptive, cluster, clock = scaling(
        lambda asked: answer(requests=dict.fromkeys(asked["requests"], clock.now >= 0.5))
    )
    request = asyncio.ensure_future(adaptive.hold({"GPU": 1}, timeout=3))
    await clock.forward(0.5)
    number = await request
    await clock.forward(10)
    assert cluster.times == [0.0, 0.5]
    await adaptive.adapt()
    assert cluster.looks[-1][1]["requests"] == {"GPU": 1}
    adaptive.release(number)
    adaptive.release(number)
    await adaptive.adapt()
    assert cluster.looks[-1][1]["requests"] == {}


async def test_requests_share_looks() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(requests={"CPU": False, "GPU": True}))
    first = asyncio.ensure_future(adaptive.hold({"CPU": 2}, timeout=100))
    await clock.forward(0.1)
    others = [asyncio.ensure_future(adaptive.hold({"GPU": 1, "CPU": 1}, timeout=100)) for _ in range(5)]
    others += [asyncio.ensure_future(adaptive.hold({"GPU": 1}, timeout=100))]
    await clock.forward(0.3)
    assert cluster.times == [0.0]
    await clock.forward(0.1)
    assert cluster.times == [0.0, 0.5]
    assert cluster.looks[-1][1]["requests"] == {"CPU": 7, "GPU": 6}
    assert [each.done() for each in (first, *others)] == [False] * 6 + [True]
    for each in (first, *others):
        each.cancel()
    await clock.forward(5)
    assert cluster.times == [0.0, 0.5]


async def test_a_look_that_began_before_a_request_does_not_grant_it() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(requests=dict.fromkeys(asked["requests"], True)))
    cluster.busy.clear()
    look = asyncio.ensure_future(adaptive.adapt())
    await settled()
    request = asyncio.ensure_future(adaptive.hold({"GPU": 1}, timeout=100))
    await clock.forward(4)
    assert len(cluster.looks) == 1
    assert not request.done()
    cluster.busy.set()
    await settled()
    assert cluster.times == [0.0, 4.0], "it looks as soon as the other look has ended"
    assert await request == 0
    await look


async def test_a_look_of_the_interval_grants_a_request() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(requests={"GPU": clock.now == 0.2}))
    request = asyncio.ensure_future(adaptive.hold({"GPU": 1}, timeout=100))
    await clock.forward(0.2)
    await adaptive.adapt()
    assert await request == 0
    await clock.forward(5)
    assert cluster.times == [0.0, 0.2]


async def test_a_request_that_no_node_can_serve_is_an_error_at_once() -> None:
    adaptive, cluster, _ = scaling(lambda asked: answer(requests={"TPU": "no worker has TPU"}))
    with pytest.raises(ConfigError, match="cannot hold what was requested: no worker has TPU"):
        await adaptive.hold({"TPU": 1}, timeout=100)
    assert cluster.times == [0.0]


async def test_a_request_ends_with_adaptive_scaling() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(requests={"GPU": False}))
    request = asyncio.ensure_future(adaptive.hold({"GPU": 1}, timeout=100))
    await clock.forward(1)
    adaptive.stop()
    with pytest.raises(ConfigError, match="adaptive scaling was stopped before there was capacity"):
        await asyncio.wait_for(request, 5)
    looks = len(cluster.looks)
    await clock.forward(60)
    assert len(cluster.looks) == looks


# -- looks -------------------------------------------------------------------------------------------------------------


async def test_a_worker_goes_when_it_was_not_needed_for_long_enough() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(could_go=["a"]), wait_count=3, idle_timeout="10s")
    for _ in range(4):
        await adaptive.adapt()
        await clock.forward(4)
    assert [asked["may_go"] for _, asked in cluster.looks] == [[], [], [], [], ["a"]]
    assert cluster.times == [0.0, 4.0, 8.0, 12.0, 12.0]


async def test_looks_for_requests_do_not_count() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(could_go=["a"], requests={"GPU": False}), wait_count=2)
    request = asyncio.ensure_future(adaptive.hold({"GPU": 1}, timeout=10))
    await adaptive.adapt()
    await clock.forward(20)
    assert request.done()
    assert isinstance(request.exception(), TimeoutError)
    assert len(cluster.looks) > 10
    assert not any(asked["may_go"] for _, asked in cluster.looks)
    await adaptive.adapt()
    assert cluster.looks[-1][1]["may_go"] == ["a"]


async def test_workers_come_after_a_delay() -> None:
    adaptive, cluster, clock = scaling(lambda asked: answer(waits=not asked["may_come"]), up_delay="3s")
    for _ in range(5):
        await adaptive.adapt()
        await clock.forward(1)
    assert [asked["may_come"] for _, asked in cluster.looks] == [False, False, False, True, False]


async def test_failures_are_reported_and_tried_again_later_each_time() -> None:
    def fails(asked: Mapping[str, Any]) -> AdaptAnswer:
        if clock.now < 100:
            raise OSError("the scheduler\n is gone")
        return answer()

    adaptive, cluster, clock = scaling(fails)
    for _ in range(200):
        await adaptive.adapt()
        await clock.forward(1)
    times = cluster.times
    assert times[:6] == [0, 2, 6, 14, 30, 62]
    assert times[6:] == [float(each) for each in range(122, 200)]
    assert LONGEST_WAIT == 60
    assert told(adaptive) == [("begins", ""), *[("nothing", "the scheduler is gone")] * 6]
    assert [event["why"] for event in cluster.events] == ["", *["the scheduler is gone"] * 6]


async def test_another_rollout_is_no_failure() -> None:
    def busy(asked: Mapping[str, Any]) -> AdaptAnswer:
        raise RolloutBusy("uniform", 1.0)

    adaptive, cluster, _ = scaling(busy)
    await adaptive.adapt()
    await adaptive.adapt()
    assert len(cluster.looks) == 2
    assert told(adaptive) == [("begins", "")]


async def test_what_no_node_can_run_is_reported_once_until_it_ends() -> None:
    unmet = [{"GPU": "no node has it"}, {"GPU": "no node has it"}, {}, {"GPU": "no node has it"}]
    adaptive, _, _ = scaling(lambda asked: answer(unmet=unmet.pop(0)))
    for _ in range(4):
        await adaptive.adapt()
    assert told(adaptive) == [("begins", ""), *[("nothing", "no node has it")] * 2]


async def test_limits_and_changes_reach_the_scheduler_and_the_log() -> None:
    changed = answer(saw="9 tasks", decided="local: +1 auto-cpu", short=["9 tasks"], seconds=0.5)
    adaptive, cluster, _ = scaling(
        lambda asked: changed,
        minimum=1,
        maximum=4,
        maximum_cores=8,
        minimum_memory="1 GiB",
        modes=["auto-cpu"],
        gpu=(0, 2),
    )
    await adaptive.adapt()
    ((_, asked),) = cluster.looks
    assert (asked["least"], asked["most"], asked["kinds"]) == ([1, 0, 2**30], [4, 8, None], {"gpu": [0, 2]})
    assert [mode["name"] for mode in asked["modes"]] == ["auto-cpu"]
    assert asked["reserve"] == {"cloud-1": None}
    assert told(adaptive)[1:] == [("local: +1 auto-cpu", "there is no room for all of them")]
    assert adaptive.decisions[-1].took == 0.5
    assert repr(adaptive) == "<AgentAdaptive: inactive; workers 1 to 4; gpu 0 to 2; modes auto-cpu>"


async def test_standby_hosts_are_launched_in_the_background() -> None:
    adaptive, cluster, _ = scaling(lambda asked: answer(launch=["cloud-1", "cloud-2"]))
    await adaptive.adapt()
    ((names, then),) = cluster.launched
    assert names == ["cloud-1", "cloud-2"]
    await then(names, {"cloud-2": "no answer"})
    assert told(adaptive)[1:] == [("launched cloud-1", "cloud-2: no answer")]


# -- patience ----------------------------------------------------------------------------------------------------------


def test_looks_are_counted_in_a_row() -> None:
    patience = Patience()
    assert patience.expired(["a", "b"], 2, 0.0) == []
    assert patience.expired(["b"], 2, 1.0) == ["b"]
    assert patience.expired(["a", "b"], 2, 2.0) == ["b"]
    assert patience.expired(["a"], 2, 3.0) == ["a"]


def test_the_delay_begins_again_when_nothing_waits() -> None:
    patience = Patience(up_delay=2.0)
    patience.waits(True, 0.0)
    assert not patience.may_come(1.9)
    assert patience.may_come(2.0)
    patience.waits(False, 2.0)
    assert not patience.may_come(9.0)
    assert Patience().may_come(0.0)


def test_the_wait_after_a_failure_grows_up_to_a_minute() -> None:
    patience = Patience()
    assert patience.ready(0.0)
    assert [patience.failed(1.0, 0.0) for _ in range(8)] == [2, 4, 8, 16, 32, 60, 60, 60]
    assert not patience.ready(59.9)
    assert patience.ready(60.0)
    patience.succeeded()
    assert patience.ready(0.0)
    assert patience.failed(0.05, 0.0) == pytest.approx(0.1)


def test_two_looks_a_second_at_most() -> None:
    assert REQUEST_PAUSE >= 0.5
