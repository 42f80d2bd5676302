"""What tests of agents under a cluster manager share: work that goes on while a client changes the nodes below it."""

from __future__ import annotations

import asyncio
import importlib
import signal
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future, SchedulerPlugin

from tests.support.waiting import wait_until

SCATTERED = 60
PERSISTED = 40
#: Tasks of each wave of work, and the seconds that each takes. Two waves overlap, so that there is always some left.
WAVE = 200
TASK = 0.02


def imported(name: str) -> Any:
    """Import a module of dask-jobqueue, and put back the handler of SIGINT that it replaces.

    It must be done before the first test: the defaults that it adds to dask's configuration are then there in all.
    """
    handler = signal.getsignal(signal.SIGINT)
    module = importlib.import_module(name)
    signal.signal(signal.SIGINT, handler)
    return module


class Watch(SchedulerPlugin):
    """Notes what no reprovision may cause: tasks that erred, and workers that died with tasks on them."""

    name = "under-manager"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.erred: set[str] = set()
        self.blamed: set[str] = set()
        self.finished = 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.finished += start == "processing" and finish == "memory"
        if finish == "erred":
            self.erred.add(str(key))
        ts = self.scheduler.tasks.get(key)
        if ts is not None and ts.suspicious:
            self.blamed.add(str(key))


@dataclass(frozen=True)
class Data:
    """What is in the memory of workers, and there only."""

    scattered: list[Future]
    persisted: list[Future]
    values: tuple[list[Any], list[Any]]

    @classmethod
    async def put(cls, client: Client) -> Data:
        """Scatter values, and have results that no task would give a second time."""
        numbers = [f"value {number}" for number in range(SCATTERED)]
        scattered = await client.scatter(numbers, hash=False)
        persisted = client.map(lambda number: (number, uuid.uuid4().hex), range(PERSISTED), pure=False)
        return cls(scattered, persisted, (numbers, await client.gather(persisted)))

    async def check(self, client: Client) -> None:
        """Fail unless all is there, and as it was."""
        held = [*self.scattered, *self.persisted]
        assert [future.key for future in held if future.status != "finished"] == []
        assert (await client.gather(self.scattered), await client.gather(self.persisted)) == self.values


@asynccontextmanager
async def working(client: Client, scheduler: Any) -> AsyncIterator[Data]:
    """Run waves of short tasks during the block, over data that workers hold; check all of it at the end."""
    data, watch, enough = await Data.put(client), Watch(scheduler), asyncio.Event()
    scheduler.add_plugin(watch)

    def task(seconds: float, number: int, value: str) -> str:
        import time

        time.sleep(seconds)
        return f"{number} {value}"

    def result(number: int) -> str:
        return f"{number} value {number % SCATTERED}"

    async def work() -> int:
        waves = 0
        while not enough.is_set():
            futures = [
                client.submit(task, TASK, number, data.scattered[number % SCATTERED], pure=False)
                for number in range(WAVE)
            ]
            assert await client.gather(futures) == [result(number) for number in range(WAVE)]
            waves += 1
        return waves

    running = asyncio.gather(work(), work())
    try:
        await wait_until(lambda: watch.finished or running.done(), 30)
        yield data
        assert not running.done(), await running
        enough.set()
        assert min(await asyncio.wait_for(running, 90)) >= 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        scheduler.remove_plugin(watch.name)
    await data.check(client)
    assert (watch.erred, watch.blamed) == (set(), set())


async def nodes(client: Client) -> dict[str, Any]:
    return await client.scheduler.get_nodes() or {}


async def ready(client: Client, names: Sequence[str], timeout: float = 60) -> dict[str, Any]:
    """Return the nodes once they are those of these names, each with all its workers; killed ones do not count."""

    async def look() -> dict[str, Any] | None:
        found = {name: node for name, node in (await nodes(client)).items() if node["state"] != "lost"}
        settled = all(each["state"] == "ready" for each in found.values())
        return found if settled and sorted(found) == sorted(names) else None

    return await wait_until(look, timeout)


async def reprovision(client: Client, nworkers: int) -> dict[str, Any]:
    """Give every node that many other workers, as any client can; return what became of the nodes."""
    config = {"nworkers": nworkers, "nthreads": 1, "memory_limit": f"{300 + nworkers}MiB"}
    report = await client.scheduler.reprovision_nodes(mode="auto-cpu", config=config)
    changed = {name: node for name, node in report["nodes"].items() if node["outcome"] == "changed"}
    assert changed, report
    assert all(node["new"] and not node["kept"] for node in changed.values()), report
    return changed


def names(scheduler: Any) -> set[str]:
    """Return the names of the workers that a scheduler has."""
    return {str(ws.name) for ws in scheduler.workers.values()}
