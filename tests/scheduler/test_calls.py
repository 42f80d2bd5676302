"""Calls on a scheduler and an agent with arguments that no client of ours sends: one sentence, and nothing changes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
import pytest_asyncio
from distributed import Scheduler
from distributed.core import rpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentcluster import Agent
from agentcluster.errors import LONGEST, AgentClusterError
from agentcluster.scheduler.plugin import CALLS, AgentPlugin, dask_setup
from agentcluster.wire import spoken

#: Values of which each call takes some, and refuses the others.
STRANGE: list[Any] = [
    0,
    -1.5,
    True,
    None,
    "",
    "\n\x1b[31m",
    b"\x00",
    [],
    [[]],
    {},
    {"": {}},
    {"a": [1]},
    [None],
    "x" * 10**5,
]


@pytest_asyncio.fixture
async def node(scheduler: Scheduler) -> AsyncIterator[Agent]:
    await dask_setup(scheduler)
    async with Agent(scheduler.address, name="n", mode="none", lasting=True) as agent:
        await agent.provisioned()
        yield agent


def parameters(owner: type, call: str) -> list[str]:
    found = inspect.signature(getattr(owner, call)).parameters.values()
    return [each.name for each in found if each.kind is not each.VAR_KEYWORD and each.name not in ("self", "comm")]


async def is_refused(answer: Awaitable[object]) -> bool:
    """Return whether a call was refused; check that it says so in one sentence, of a length that a person reads."""
    try:
        await answer
    except (AgentClusterError, TimeoutError) as error:
        said = str(error)
    else:
        return False
    assert said.replace("\t", " ").isprintable()
    assert len(said) <= LONGEST + 1
    return True


@pytest.mark.parametrize("call", CALLS)
async def test_plugin_refuses_in_one_sentence(
    scheduler: Scheduler, node: Agent, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    plugin = scheduler.extensions["agentcluster"]
    caplog.set_level(logging.WARNING)
    async with rpc(scheduler.address) as there:
        for name in parameters(AgentPlugin, call) if call != "await_demand" else ():
            refused = 0
            for value in STRANGE:
                arguments = {name: value, **({"timeout": 0.01} if call == "await_nodes" and name != "timeout" else {})}
                if call == "register_node":
                    arguments = {**spoken(), "registration": {}, **arguments}
                refused += await is_refused(getattr(there, call)(**arguments))
            assert refused >= 3 or name in ("stream", "version"), name
        with pytest.raises((AgentClusterError, TimeoutError)) as caught:
            await getattr(there, call)(soup=1)
    assert "soup" in str(caught.value) or "is missing" in str(caught.value) or call in ("register_node", "undo_rollout")
    assert list(plugin.registry.nodes) == ["n"]
    assert plugin.registry.nodes["n"].state == "standby"
    assert not [record for record in caplog.records if record.exc_info]


AGENT = ("check_workers", "start_workers", "stop_workers", "rename_workers")


@pytest.mark.parametrize("call", AGENT)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_agent_refuses_in_one_sentence(node: Agent, call: str, data: st.DataObject) -> None:
    plain = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
    arguments = {name: data.draw(plain, name) for name in parameters(Agent, call)}
    async with rpc(node.address) as there:
        await is_refused(getattr(there, call)(**arguments))
