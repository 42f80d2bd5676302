"""Waiting for an agent's answer ends with the node, not with the patience of a connection."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from agentcluster.model import Hardware
from agentcluster.scheduler import rollouts
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.scheduler.rollouts import NodeEvents

#: Far beyond any of these waits; a test that gets there fails.
LATE = 20.0


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "LOST_GRACE", 0.0)


@pytest.fixture
def node() -> Node:
    return Node("a", "tcp://127.0.0.1:1", Hardware("a", 1, 2**30))


class Call:
    """A call of an agent that is under way until it is told what to answer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    async def __call__(self) -> str:
        try:
            return await self.answer
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def turns() -> None:
    """Let all that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_an_answer_is_returned(node: Node) -> None:
    call = Call()
    waiting = asyncio.ensure_future(NodeEvents().unless_lost(node, call()))
    await turns()
    assert not waiting.done()
    call.answer.set_result("OK")
    assert await asyncio.wait_for(waiting, LATE) == "OK"


async def test_an_error_is_raised(node: Node) -> None:
    call = Call()
    call.answer.set_exception(OSError("refused"))
    with pytest.raises(OSError, match="refused"):
        await asyncio.wait_for(NodeEvents().unless_lost(node, call()), LATE)


async def test_a_lost_node_ends_its_call(node: Node) -> None:
    events, call = NodeEvents(), Call()
    waiting = asyncio.ensure_future(events.unless_lost(node, call()))
    await turns()
    await events.notify()  # of another node
    await turns()
    assert not waiting.done()
    node.to("lost")
    await events.notify()
    assert await asyncio.wait_for(waiting, LATE) is None
    assert call.cancelled


async def test_a_call_that_ends_with_the_connection_is_waited_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "LOST_GRACE", LATE)
    events, call = NodeEvents(), Call()
    waiting = asyncio.ensure_future(events.unless_lost(node, call()))
    await turns()
    node.to("lost")
    await events.notify()
    await turns()
    call.answer.set_exception(OSError("closed"))
    with pytest.raises(OSError, match="closed"):
        await asyncio.wait_for(waiting, LATE)
    assert not call.cancelled


async def test_a_node_that_is_lost_already_is_not_waited_for(node: Node) -> None:
    node.to("lost")
    assert await asyncio.wait_for(NodeEvents().unless_lost(node, Call()()), LATE) is None


async def test_a_node_that_leaves_is_lost_for_its_calls() -> None:
    registry, events, call = Registry(), NodeEvents(), Call()
    node = Node("a", "tcp://127.0.0.1:1", Hardware("a", 1, 2**30))
    registry.nodes["a"] = node
    waiting = asyncio.ensure_future(events.unless_lost(node, call()))
    await turns()
    registry.unregister("a")
    await events.notify()
    assert await asyncio.wait_for(waiting, LATE) is None
    assert node.problem == "its agent left"


async def test_who_gives_up_cancels_the_call(node: Node) -> None:
    call = Call()
    waiting = asyncio.ensure_future(NodeEvents().unless_lost(node, call()))
    await turns()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(waiting, LATE)
    assert call.cancelled
