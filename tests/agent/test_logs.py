"""Last lines of an agent's log: as many as ``agentcluster.log.lines``, kept and answered."""

from __future__ import annotations

import logging

import dask
import pytest
from distributed import Scheduler
from distributed.core import rpc

from agentcluster import Agent
from agentcluster.agent.logs import LastLines

LOGGER = logging.getLogger("agentcluster.agent.test")


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agentcluster")


async def test_agent_answers_with_the_configured_number_of_lines(scheduler: Scheduler) -> None:
    dask.config.set({"agentcluster.log.lines": 3})
    async with Agent(scheduler.address, mode="none") as agent, rpc(agent.address) as there:
        for number in range(10):
            LOGGER.info("line %d", number)
        lines = await there.agent_logs()
        assert [line.rpartition("INFO ")[2] for line in lines] == ["line 7", "line 8", "line 9"]


def test_message_of_several_lines_counts_as_many() -> None:
    kept = LastLines(3)
    kept.begin()
    try:
        LOGGER.info("first")
        LOGGER.info("a\nb\nc\nd")
        assert kept.lines() == ["b", "c", "d"]
        LOGGER.info("last")
        assert [kept.lines()[0], kept.lines()[1]] == ["c", "d"]
        assert kept.lines()[2].endswith("last")
    finally:
        kept.end()
    LOGGER.info("after the end")
    assert kept.lines()[-1].endswith("last")
