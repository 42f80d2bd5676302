"""Registration with a scheduler: whenever it is given up, no connection stays."""

from __future__ import annotations

import asyncio
import contextlib

import psutil
import pytest
from distributed import Scheduler
from distributed.comm.addressing import get_address_host_port
from distributed.security import Security

from agentcluster.agent.registration import Registration, Terms
from agentcluster.config import Config
from tests.support.waiting import wait_until


def connections(port: int) -> int:
    """Count the ends of connections with a port that this process has open."""
    return sum(
        each.status == psutil.CONN_ESTABLISHED and port in (each.laddr.port, each.raddr and each.raddr.port)
        for each in psutil.Process().net_connections("tcp")
    )


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20])
async def test_a_connection_that_is_given_up_is_closed(scheduler: Scheduler, turns: int) -> None:
    _, port = get_address_host_port(scheduler.address)
    registration = Registration(Terms(scheduler.address, Security(), Config.load()), on_end=lambda reason: None)
    before = connections(port)
    connecting = asyncio.ensure_future(registration._connect(10))
    for _ in range(turns):
        await asyncio.sleep(0)
    connecting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        (await connecting).abort()
    await wait_until(lambda: connections(port) == before, 5)
