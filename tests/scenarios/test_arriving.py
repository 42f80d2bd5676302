"""Data that is scattered while workers come and go: it is there afterwards, and who sent it hears of no error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client

from agentcluster import AgentCluster
from tests.support.inprocess import here

TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
OPTIONS: dict[str, Any] = {"asynchronous": True, "scheduler_options": {"dashboard_address": ":0"}}


@pytest.mark.parametrize("size", [10, 2_000_000])
async def test_scattering_through_swaps(size: int) -> None:
    sent: list[Any] = []
    async with (
        AgentCluster(hosts=here(2), config=TWO, **OPTIONS) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        done = asyncio.Event()

        async def scatter() -> None:
            while not done.is_set():
                value = len(sent).to_bytes(8, "big") * (size // 8 + 1)
                sent.append(await client.scatter(value, hash=False))
                if len(sent) > 60:
                    sent[len(sent) - 61] = None
                await asyncio.sleep(0)

        scattering = [asyncio.create_task(scatter()) for _ in range(1)]
        for number in range(8):
            await cluster.reprovision("uniform", {**TWO, "nworkers": 1 + number % 2})
        for number in (1, 4, 2, 3):
            await cluster.scale(number)
        done.set()
        await asyncio.gather(*scattering)
        kept = {number: future for number, future in enumerate(sent) if future is not None}
        values = await client.gather(list(kept.values()))
        assert [int.from_bytes(value[:8], "big") for value in values] == list(kept)
        assert len(sent) > 20
