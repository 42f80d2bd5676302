"""How long a swap of workers takes, against what people do without it: ``python -m benchmarks.swap``.

Everything is compared within one run, in turns (ours, theirs, ours, theirs, …), each alone on the machine, and summed
up as the ratio of two medians. Ends with exit code 1 when a floor does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distributed
from distributed import Client, LocalCluster, SSHCluster
from distributed.diagnostics.plugin import SchedulerPlugin

from benchmarks.common import Floor, exit_code, median, parts, spread, times, titled

# agentcluster is imported where it is used: workers that LocalCluster spawns import this module, and would pay for it.

SAMPLE = 0.01
SMALL, LARGE, THREE_GB = "400 small keys", "1 GB in 100 keys", "3GiB"
US, LOCAL, SSH, RESTART = "reprovision", "LocalCluster", "SSHCluster", "client.restart()"

Swap = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Scenario:
    """What is in memory while workers are swapped.

    Attributes
    ----------
    data
        What it is called.
    fill
        Puts it into memory; returns the futures.
    workers, memory
        How many workers with one thread each, and the memory limit of each.
    """

    data: str
    fill: Callable[[Client], Awaitable[list[Any]]]
    workers: int = 4
    memory: str = "1GiB"


def small_keys(number: int) -> Callable[[Client], Awaitable[list[Any]]]:
    """Return what puts small values into memory, which nobody could compute again."""

    async def fill(client: Client) -> list[Any]:
        return await client.scatter(list(range(number)), hash=False) if number else []

    return fill


def block(number: int) -> Any:
    """Return 10 MB that are no zeros."""
    import numpy

    return numpy.full(10_000_000, number % 255 + 1, dtype="u1")


async def gigabyte(client: Client) -> list[Any]:
    """Put 100 keys of 10 MB each into memory, made on the workers."""
    futures = client.map(block, range(100), pure=False)
    await distributed.wait(futures)
    return list(futures)


SCENARIOS = (
    Scenario("nothing", small_keys(0)),
    Scenario(SMALL, small_keys(400)),
    Scenario(LARGE, gigabyte, memory=THREE_GB),
    Scenario("20,000 small keys", small_keys(20_000)),
    Scenario(SMALL, small_keys(400), workers=16),
)


# -- ours --------------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """An AgentCluster on one local node whose workers can all be swapped for as many others."""

    cluster: Any
    client: Client
    workers: int
    memory: str
    numbers: Iterator[int]

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, workers: int, memory: str) -> AsyncIterator[Ours]:
        """Have one for the block."""
        from agentcluster import AgentCluster

        numbers = itertools.count()
        async with (
            AgentCluster(
                mode="spec",
                config=_shape(workers, memory, next(numbers)),
                scheduler_options={"dashboard": False},
                asynchronous=True,
                silence_logs=logging.ERROR,
            ) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            yield cls(cluster, client, workers, memory, numbers)

    async def swap(self, **terms: Any) -> Any:
        """Replace each worker by one with another resource; return the report."""
        return await self.cluster.reprovision("spec", _shape(self.workers, self.memory, next(self.numbers)), **terms)

    @property
    def threads(self) -> int:
        """Threads of the workers that can be given tasks right now."""
        return sum(ws.nthreads for ws in self.cluster.scheduler.running)


def _shape(workers: int, memory: str, number: int) -> dict[str, Any]:
    options = {
        "nthreads": 1,
        "memory_limit": memory,
        "resources": {f"swap-{number}": 1},
        "silence_logs": logging.ERROR,  # as LocalCluster's are
    }
    return {"spec": {"cls": "dask.distributed.Nanny", "opts": options}, "nworkers": workers}


# -- theirs ------------------------------------------------------------------------------------------------------------


@dataclass
class Reopened:
    """A cluster of dask's, which is closed and made again to have other workers."""

    make: Callable[[], Any]
    workers: int
    cluster: Any = None

    async def open(self) -> None:
        """Make it and wait for its workers."""
        self.cluster = await self.make()
        while len((await self.cluster.scheduler_comm.identity())["workers"]) < self.workers:
            await asyncio.sleep(SAMPLE)

    async def close(self) -> None:
        """Close it."""
        if self.cluster is not None:
            await self.cluster.close()

    async def swap(self) -> float:
        """Close it and make it again; return the seconds."""
        began = time.perf_counter()
        await self.close()
        await self.open()
        return time.perf_counter() - began


def local_cluster(workers: int, memory: str) -> Reopened:
    """Return a LocalCluster to be opened."""

    def make() -> Any:
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=memory,
            dashboard_address=None,
            asynchronous=True,
            silence_logs=logging.ERROR,
        )

    return Reopened(make, workers)


def ssh_cluster(server: Any, workers: int, memory: str) -> Reopened:
    """Return an SSHCluster to be opened, whose scheduler and workers run over a real server on this machine."""

    def make() -> Any:
        return SSHCluster(
            [server.host, server.host],
            connect_options={**server.connect_options, "port": server.port, "username": server.username},
            scheduler_options={"port": 0, "dashboard": False},
            worker_options={"nthreads": 1, "memory_limit": memory, "n_workers": workers},
            asynchronous=True,
        )

    return Reopened(make, workers)


@contextlib.asynccontextmanager
async def ssh_server() -> AsyncIterator[tuple[Any, str]]:
    """Run sshd for the block; yields it, or None and why there is none."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    try:
        import ssh_servers
    except ImportError as error:
        yield None, f"{error}"
        return
    finally:
        sys.path.pop(0)
    if ssh_servers.SSHD is None:
        yield None, "OpenSSH's sshd is not installed"
        return
    with tempfile.TemporaryDirectory() as directory:
        async with ssh_servers.serve("sshd", Path(directory)) as server:
            yield server, ""


# -- swaps in turns ----------------------------------------------------------------------------------------------------


class Marks(SchedulerPlugin):
    """Notes when workers join: name -> time at which it asked to, and at which it was in."""

    def __init__(self) -> None:
        self.joined: dict[str, tuple[float, float]] = {}

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Note it; its clock is ours."""
        ws, now = scheduler.workers[worker], time.time()
        self.joined[str(ws.name)] = (now - ws.time_delay, now)


@dataclass
class Measured:
    """What one scenario came to.

    Attributes
    ----------
    seconds
        Contender -> seconds of each swap.
    steps
        Of each of our swaps, its parts.
    ready
        Of each of our swaps, threads that were ready before, at the least during it, and after.
    keys, lost
        Keys that were in memory, and how many of them are not any more.
    """

    scenario: Scenario
    seconds: dict[str, list[float]] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    ready: list[tuple[int, int, int]] = field(default_factory=list)
    keys: int = 0
    lost: int = 0

    def row(self) -> tuple[str, ...]:
        """Return it as a row of the table."""
        cells = [str(self.scenario.workers), self.scenario.data, spread(self.seconds[US])]
        for name in (LOCAL, SSH, RESTART):
            theirs = self.seconds.get(name)
            cells.append(f"{spread(theirs)}  {times(self.seconds[US], theirs):.1f}x" if theirs else "-")
        return (*cells, str(self.lost))


async def measure(scenario: Scenario, repeat: int, server: Any) -> Measured:
    """Swap workers in turns, our way and the others'; each alone, as idle workers of another would take its time."""
    measured = Measured(scenario)
    rivals = {LOCAL: local_cluster(scenario.workers, scenario.memory)}
    if server is not None and scenario.workers == 4:
        rivals[SSH] = ssh_cluster(server, scenario.workers, scenario.memory)
    for turn in range(repeat):
        took = {US: await _our_turn(scenario, measured)}
        for name, rival in rivals.items():
            await rival.open()
            try:
                took[name] = await rival.swap()
                if name == LOCAL and scenario.workers == 4:
                    took[RESTART] = await _restart(rival)
            finally:
                await rival.close()
        for name, seconds in took.items():
            measured.seconds.setdefault(name, []).append(seconds)
        said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items())
        _say(f"{scenario.workers} workers, {scenario.data}, {turn + 1} of {repeat}: {said}")
    return measured


async def _our_turn(scenario: Scenario, measured: Measured) -> float:
    """Swap twice under data, and return the seconds of the second; of the others too it is the second that is timed."""
    async with Ours.running(scenario.workers, scenario.memory) as ours:
        marks = Marks()
        ours.cluster.scheduler.add_plugin(marks)
        futures = await scenario.fill(ours.client)
        await ours.swap()
        seconds = await _our_swap(ours, marks, measured)
        states = ours.cluster.scheduler.tasks
        measured.lost += sum(f.key not in states or states[f.key].state != "memory" for f in futures)
        measured.keys += len(futures)
        await _forgotten(ours, futures)
    return seconds


async def _restart(rival: Reopened) -> float:
    async with Client(rival.cluster, asynchronous=True) as client:
        began = time.perf_counter()
        await client.restart()
        return time.perf_counter() - began


async def _our_swap(ours: Ours, marks: Marks, measured: Measured) -> float:
    before, least = ours.threads, [ours.threads]

    async def sample() -> None:
        while True:
            least[0] = min(least[0], ours.threads)
            await asyncio.sleep(SAMPLE)

    sampling = asyncio.create_task(sample())
    called, began = time.time(), time.perf_counter()
    report = await ours.swap()
    seconds = time.perf_counter() - began
    sampling.cancel()
    measured.ready.append((before, least[0], ours.threads))
    measured.steps.append(taken_apart(ours.cluster, report, marks, called, seconds))
    return seconds


# -- a swap taken apart ------------------------------------------------------------------------------------------------


def taken_apart(cluster: Any, report: Any, marks: Marks, called: float, seconds: float) -> dict[str, float]:
    """Return the parts of a swap in seconds; those of its start are of the worker that joined last.

    Linux keeps the start of a process in hundredths of a second, so those parts are no more exact than that.
    """
    [node] = report.nodes.values()
    [started] = [
        when
        for when, event in cluster.scheduler.get_events("agentcluster")
        if event.get("action") == "step" and event["step"] == "start" and when >= called
    ]
    workers = {str(ws.name): ws for ws in cluster.scheduler.workers.values() if str(ws.name) in node.new}
    slowest = max(workers, key=lambda name: marks.joined[name][1])
    state = cluster.nodes[node.node]["workers"]
    forked = {name: _forked(state[name]["pid"], called) for name in workers}
    made = Path(workers[slowest].local_directory).stat().st_ctime
    sent, joined = marks.joined[slowest]
    found = {
        "start: ask the agent, until it starts the first": min(forked.values()) - called,
        "start: fork, until the last is started": forked[slowest] - min(forked.values()),
        "start: set up the worker": made - forked[slowest],
        "start: listen, connect": sent - made,
        "start: register": joined - sent,
        "start: until the swap knows": started + node.start - joined,
        "drain": node.drain,
        "retire": node.retire,
        "stop": node.stop,
    }
    found = {part: max(0.0, value) for part, value in found.items()}
    return {**found, "rest": max(0.0, seconds - sum(found.values()))}


def _forked(pid: int, otherwise: float) -> float:
    """Return when a nanny's worker process was made."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        clock = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return otherwise
    return int(fields[19]) / os.sysconf("SC_CLK_TCK") + clock


# -- data, moved and copied --------------------------------------------------------------------------------------------


async def measure_bytes(repeat: int) -> tuple[list[float], list[float]]:
    """Return bytes a second of evacuations, and of ``client.replicate`` to as many other workers, in turns."""
    moved, copied = [], []
    async with Ours.running(4, THREE_GB) as ours:
        for turn in range(repeat):
            futures = await gigabyte(ours.client)
            [node] = (await ours.swap()).nodes.values()
            moved.append(node.nbytes / node.retire)
            await _forgotten(ours, futures)
            futures = await gigabyte(ours.client)
            beside = await ours.swap(remove_existing=False)
            [node] = beside.nodes.values()
            states = ours.cluster.scheduler.workers.values()
            began = time.perf_counter()
            await ours.client.replicate(futures, n=1, workers=[ws.address for ws in states if str(ws.name) in node.new])
            seconds = time.perf_counter() - began
            copied.append(sum(ours.cluster.scheduler.tasks[f.key].nbytes for f in futures) / seconds)
            await _forgotten(ours, futures)
            await ours.swap()
            _say(f"1 GB, {turn + 1} of {repeat}: moved {moved[-1] / 1e6:.0f} MB/s, copied {copied[-1] / 1e6:.0f} MB/s")
    return moved, copied


async def _forgotten(ours: Ours, futures: list[Any]) -> None:
    while futures:
        futures.pop().release()
    while ours.cluster.scheduler.tasks:
        await asyncio.sleep(SAMPLE)


# -- what is printed ---------------------------------------------------------------------------------------------------


def floors(results: Sequence[Measured], moved: Sequence[float], copied: Sequence[float]) -> list[Floor]:
    """Return what has to hold."""
    found = []
    for each in results:
        ours, workers = each.seconds[US], each.scenario.workers
        if each.scenario.data == SMALL:
            for name, least in ((LOCAL, 8 if workers == 16 else 5), (SSH, 12)):
                if name in each.seconds:
                    what = f"{workers} workers, {SMALL}: times faster than {name}"
                    found.append(Floor(what, times(ours, each.seconds[name]), least))
        what = f"{workers} workers, {each.scenario.data}"
        ready = min(least / min(before, after) for before, least, after in each.ready)
        found.append(Floor(f"{what}: least threads ready, part of before or after", ready, 1))
        if each.keys:
            found.append(Floor(f"{what}: part of the keys still in memory", 1 - each.lost / each.keys, 1))
    if moved:
        found.append(Floor("1 GB evacuated, part of the speed of client.replicate", times(copied, moved), 0.7))
    return found


def tables(results: Sequence[Measured], moved: Sequence[float], copied: Sequence[float]) -> Iterator[str]:
    """Yield the tables."""
    header = ("workers", "in memory", US, LOCAL, SSH, RESTART, "keys lost")
    yield titled(
        "Seconds until the workers are replaced: median (range), and how many times ours. The others lose the data: "
        "they only\nhave to come up again with their workers; client.restart() cannot change what the workers are.",
        header,
        [each.row() for each in results],
    )
    if moved:
        rates = [(name, f"{median(each) / 1e6:.0f}") for name, each in (("evacuated", moved), ("replicated", copied))]
        yield titled("1 GB in 100 keys to 4 other workers of the same host", ("", "MB/s"), rates)
    for each in results:
        before, least, after = (f"{min(column)}" for column in zip(*each.ready, strict=True))
        yield titled(
            f"{each.scenario.workers} workers, {each.scenario.data}: a swap taken apart. Threads ready: {before} "
            f"before, never less than {least} during, {after} after",
            ("part", "ms", "share"),
            parts(each.steps),
        )


def machine() -> str:
    """Say where this ran."""
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores, load {load:.1f} before; Python {platform.python_version()}, "
        f"distributed {distributed.__version__}"
    )


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


async def run(repeat: int, quick: bool) -> int:
    """Measure everything, print it, and return the exit code."""
    where = machine()
    scenarios = [each for each in SCENARIOS if not quick or each.data == SMALL]
    async with ssh_server() as (server, why):
        results = [await measure(each, repeat, server) for each in scenarios]
    moved, copied = await measure_bytes(repeat)
    print(f"{where}; {repeat} turns")
    if why:
        print(f"No SSHCluster: {why}")
    for text in tables(results, moved, copied):
        print(f"\n{text}")
    found = floors(results, moved, copied)
    print("\n" + titled("Floors", ("what", "is", "must be", ""), [floor.row() for floor in found]))
    return exit_code(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="turns per scenario (default: 5)")
    parser.add_argument("--quick", action="store_true", help="only what the floors are about")
    chosen = parser.parse_args(arguments)
    if chosen.repeat < 1:
        parser.error("--repeat must be 1 or more")
    logging.getLogger("distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="(?s).*Port .* is already in use")
    return asyncio.run(run(chosen.repeat, chosen.quick))


if __name__ == "__main__":
    sys.exit(main())
