"""What tests of deployment tools have in common: work that goes on while nodes are changed, and how to look at it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distributed import Client, Future, wait

from tests.support.waiting import wait_until

HOST = {"host": "127.0.0.1"}

#: A scheduler in this process, or by ``dask spec``.
SCHEDULER = {**HOST, "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}

#: Options of each worker, here and in what ``reprovision_nodes`` is asked for.
SHAPE = {"nthreads": 1, "memory_limit": "300MiB"}


class Work:
    """Scattered data, results in memory, and tasks that go on; all of it is asked for at the end.

    Parameters
    ----------
    client
        An asynchronous client.
    directory
        Each run of a task leaves a mark here, so that one that ran twice is found wherever the scheduler is.
    """

    KEYS = 40
    RUNNING = 30
    SECONDS = 0.2

    def __init__(self, client: Client, directory: Path) -> None:
        self.client = client
        self.directory = directory
        self.scattered: list[Future] = []
        self.results: list[Future] = []

    async def begin(self) -> None:
        """Put data into memory and start tasks; the first of them run when this returns."""
        self.directory.mkdir()

        def task(number: int, directory: str, seconds: float) -> int:
            import time
            from pathlib import Path

            with (Path(directory) / str(number)).open("a") as file:
                file.write("x")
            time.sleep(seconds)
            return 2 * number

        place = str(self.directory)
        self.scattered = await self.client.scatter([f"value {n}" for n in range(self.KEYS)], hash=False)
        self.results = self.client.map(task, range(self.KEYS), directory=place, seconds=0, pure=False)
        await wait(self.results, timeout=20)
        more = range(self.KEYS, self.KEYS + self.RUNNING)
        self.results += self.client.map(task, more, directory=place, seconds=self.SECONDS, pure=False)
        await wait_until(lambda: len(list(self.directory.iterdir())) > self.KEYS, 20)

    async def all_there(self, once: bool = True) -> None:
        """Have all of it, each result from one run; dask's own retirement runs tasks again that it interrupts."""
        assert await self.client.gather(self.results) == [2 * n for n in range(len(self.results))]
        assert await self.client.gather(self.scattered) == [f"value {n}" for n in range(self.KEYS)]
        runs = {int(path.name): path.read_text() for path in self.directory.iterdir()}
        assert set(runs) == set(range(len(self.results)))
        assert not once or set(runs.values()) == {"x"}


async def workers(client: Client) -> dict[Any, dict[str, Any]]:
    """Return worker name -> what the scheduler says of it, and its address."""
    found = (await client.scheduler.identity(n_workers=-1))["workers"]
    assert len({worker["name"] for worker in found.values()}) == len(found)
    return {worker["name"]: {**worker, "address": address} for address, worker in found.items()}


async def names(client: Client) -> set[Any]:
    return set(await workers(client))


async def there(client: Client, *expected: Any, timeout: float = 40) -> None:
    """Wait until the scheduler has workers by these names, and no other."""

    async def look() -> bool:
        return await names(client) == set(expected)

    await wait_until(look, timeout)


async def reprovision(client: Client, nworkers: int) -> dict[str, Any]:
    """Give every node as many small workers, none of which it had; return the nodes' reports."""
    before = {worker["address"] for worker in (await workers(client)).values()}
    # workers that are as they should be would stay
    config = {"nthreads": 1, "nworkers": nworkers, "memory_limit": f"{300 + nworkers}MiB"}
    report = await client.scheduler.reprovision_nodes(mode="auto-cpu", config=config)
    assert {node["outcome"] for node in report["nodes"].values()} == {"changed"}, report
    assert not before & {worker["address"] for worker in (await workers(client)).values()}
    return dict(report["nodes"])


#: dask's own, of a worker that was closed in the middle of a heartbeat: the line, and its traceback.
HEARTBEAT = re.compile(
    r"^.*Failed to communicate with scheduler during heartbeat\.\n(?:(?!\d{4}-\d\d-\d\d ).*\n)*", re.M
)


def clean(output: str) -> None:
    """Check that what a program wrote has no word that tools take for a failure."""
    output = HEARTBEAT.sub("", output)
    assert not [word for word in ("error", "exception", "traceback") if word in output.lower()], output
