"""Version of the wire protocol: checked at each meeting of two processes, before anything else is read."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import Scheduler
from distributed.core import rpc

from agentcluster import VersionMismatch
from agentcluster.scheduler.plugin import dask_setup
from agentcluster.wire import PROTOCOL, spoken

NEWER = {"protocol": PROTOCOL + 98, "version": "9.9"}


@pytest.mark.parametrize("sent", [NEWER, {}, {"protocol": True}, {"protocol": "1"}])
async def test_register_node_refuses_another_protocol(scheduler: Scheduler, sent: dict[str, Any]) -> None:
    await dask_setup(scheduler)
    async with rpc(scheduler.address) as there:
        with pytest.raises(VersionMismatch, match="upgrade agentcluster where the"):
            await there.register_node(registration={"no": "fields"}, **sent)
        assert await there.get_nodes() == {}


async def test_scheduler_answers_with_its_versions(scheduler: Scheduler) -> None:
    await dask_setup(scheduler)
    async with rpc(scheduler.address) as there:
        answer = await there.get_provision_mode()
    assert {key: answer[key] for key in spoken()} == spoken()
