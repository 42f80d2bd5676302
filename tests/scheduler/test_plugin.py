"""Calls of the plugin on a scheduler: what they answer, and what they leave behind."""

from __future__ import annotations

import asyncio
import logging

import pytest
from distributed import Client, Scheduler
from distributed.utils_test import captured_logger

from agentcluster import Agent, dask_setup
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound
from agentcluster.requests import RolloutPolicy
from agentcluster.scheduler.plugin import CALLS
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("call", "arguments", "error"),
    [
        ("retire_node", {"name": "nowhere"}, NodeNotFound),
        ("control_rollout", {"action": "pause"}, ConfigError),
        ("reprovision_nodes", {"mode": "auto-cpu", "drainn": "now"}, ConfigError),
        ("await_nodes", {"names": ["nowhere"], "timeout": 0.01}, TimeoutError),
        ("register_node", {"protocol": 99}, AgentClusterError),
    ],
)
async def test_errors_are_answers_and_not_faults_in_the_log(
    scheduler: Scheduler, client: Client, call: str, arguments: dict[str, object], error: type[Exception]
) -> None:
    await dask_setup(scheduler)
    with captured_logger("distributed.core") as log, pytest.raises(error):
        await getattr(client.scheduler, call)(**arguments)
    assert "Exception while handling" not in log.getvalue()


async def test_each_call_is_a_handler(scheduler: Scheduler) -> None:
    await dask_setup(scheduler)
    assert {scheduler.handlers[call].__name__ for call in CALLS} == set(CALLS)


async def test_locks_of_nodes_that_left_are_dropped(scheduler: Scheduler, client: Client) -> None:
    async with (
        Agent(scheduler.address, name="blue", mode="none") as blue,
        Agent(scheduler.address, name="red", mode="none") as red,
    ):
        await asyncio.gather(blue.provisioned(), red.provisioned())
        await client.scheduler.reprovision_nodes(mode="none")
        plugin = scheduler.extensions["agentcluster"]
        async with plugin.controller._nodes(None, RolloutPolicy()) as nodes:
            assert {node.name for node in nodes} == set(plugin.controller._locks) == {"blue", "red"}
    await wait_until(lambda: not plugin.registry.nodes)
    assert not plugin.controller._locks


async def test_logs_of_agents_have_no_control_characters(scheduler: Scheduler, client: Client) -> None:
    async with Agent(scheduler.address, name="blue", mode="none") as blue:
        await blue.provisioned()
        logging.getLogger("agentcluster").warning("plain \x1b[2J\x07 ✓")
        logs = await client.scheduler.get_node_logs()
    assert any(line.endswith("plain \\x1b[2J\\x07 ✓") for line in logs["blue"])
    assert all(line.isprintable() for line in logs["blue"])
