"""A fault in each step of a swap, made for real: afterwards is true what the table in ``docs/faults.rst`` says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dask
import psutil
import pytest
from distributed import Client, Event
from distributed.core import Status

from agentcluster import AgentCluster
from agentcluster.errors import SwapError
from agentcluster.scheduler.planning.nodes import SETTLED
from tests.support.forked import ForkedHosts
from tests.support.inprocess import here
from tests.support.programs import AGENT, Start, gone, start_scheduler
from tests.support.waiting import wait_until

SMALL = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}
LARGE = {"nworkers": 1, "nthreads": 2, "memory_limit": "1GiB"}
KEYS = 20

#: Seconds after which a step was not reached; far more than it takes, unless the machine has much else to do.
LATE = 40.0

pytestmark = pytest.mark.timeout(120)

Step = Literal["start", "retire", "stop"]
STEPS: list[Step] = ["start", "retire", "stop"]

#: Marks that a worker came here, then waits for one byte.
WAIT = (
    "import os, pathlib; pathlib.Path({marks!r}, str(os.getpid())).touch(); os.read(os.open({fifo!r}, os.O_RDONLY), 1)"
)


class Gate:
    """A preload that a worker goes through when it starts, or when it ends, and where it waits to be let through."""

    def __init__(self, directory: Path, when: Literal["start", "stop"]) -> None:
        self.marks = directory / when
        self.marks.mkdir()
        fifo = directory / f"{when}.fifo"
        os.mkfifo(fifo)
        # Both ends, so that nobody waits for the other end to be opened.
        self.fd = os.open(fifo, os.O_RDWR)
        self.code = WAIT.format(marks=str(self.marks), fifo=str(fifo))
        self.preload = directory / f"{when}_gate.py"
        self.preload.write_text(self.code if when == "start" else f"def dask_teardown(worker):\n    {self.code}\n")

    @property
    def waiting(self) -> int:
        """How many workers came here so far."""
        return len(os.listdir(self.marks))

    def open(self) -> None:
        """Let all through, also those that come later."""
        os.write(self.fd, b"x" * 100)

    def close(self) -> None:
        os.close(self.fd)


Gates = Callable[[Literal["start", "stop"]], Gate]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gates]:
    made: list[Gate] = []

    def make(when: Literal["start", "stop"]) -> Gate:
        made.append(Gate(tmp_path, when))
        return made[-1]

    yield make
    for each in made:
        each.close()


def preloading(*preloads: Path, **options: Any) -> dict[str, Any]:
    """Return options of a mode whose workers run these files when they start."""
    return {"preload": [str(each) for each in preloads], **options}


def listening(pid: int) -> set[int]:
    """Return the processes below one that listen: an agent's workers."""
    found = set()
    try:
        for process in psutil.Process(pid).children(recursive=True):
            try:
                if any(each.status == psutil.CONN_LISTEN for each in process.net_connections("inet")):
                    found.add(process.pid)
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return found


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


async def begun(client: Client, **where: Any) -> Any:
    """Return a task that runs until the event "go" comes."""

    def wait_for_it() -> str:
        Event("go").wait()
        return "done"

    future = client.submit(wait_for_it, pure=False, **where)

    async def processing() -> bool:
        return any(future.key in keys for keys in (await client.processing()).values())

    await wait_until(processing)
    return future


async def reached(look: Callable[[], Awaitable[Any]], node: str, step: str) -> None:
    """Wait until a node is in a step of the rollout that runs; before data is moved, tasks are waited for."""
    steps = {step, "drain"} if step == "retire" else {step}

    async def there() -> bool:
        status = await look()
        return status is not None and status["nodes"][node]["step"] in steps

    await wait_until(there, LATE)


@dataclass
class World:
    """A cluster of local nodes with one small worker each, that hold keys; the scheduler is in this process."""

    cluster: AgentCluster
    client: Client
    agents: dict[str, int]
    pids: dict[str, set[int]]
    kept: dict[str, list[Any]] = field(default_factory=dict)
    tasks: list[Any] = field(default_factory=list)

    @property
    def nodes(self) -> Any:
        return self.cluster.scheduler.extensions["agentcluster"].registry.nodes

    def names(self) -> set[str]:
        return {str(ws.name) for ws in self.cluster.scheduler.workers.values()}

    def holds(self, node: str, future: Any) -> bool:
        """Whether a worker of a node holds a key."""
        return any(str(ws.name).startswith(f"{node}-") for ws in self.cluster.scheduler.tasks[future.key].who_has)

    def worker(self, name: str) -> Any:
        return next((ws for ws in self.cluster.scheduler.workers.values() if str(ws.name) == name), None)

    def change(self, options: dict[str, Any] | None = None, **terms: Any) -> asyncio.Future[Any]:
        """Begin to give nodes a large worker."""
        return asyncio.ensure_future(self.cluster.reprovision("uniform", {**LARGE, **(options or {})}, **terms))

    async def in_step(self, node: str, step: str) -> None:
        await reached(self.cluster.scheduler_comm.rollout_status, node, step)

    async def hold(self, worker: str) -> None:
        """Run a task on a worker, until :meth:`let_go`: what drains it waits."""

        where = [self.worker(worker).address]
        self.tasks.append(await begun(self.client, workers=where, allow_other_workers=True))

    async def let_go(self) -> None:
        await Event("go", client=self.client).set()

    async def truth(self, timeout: float = LATE) -> dict[str, tuple[str, list[str]]]:
        """Return each node's state and workers once plan, scheduler and processes say the same."""

        def same() -> dict[str, tuple[str, list[str]]] | None:
            if self.cluster.scheduler.extensions["agentcluster"].controller.running is not None:
                return None
            planned = {worker for node in self.nodes.values() for worker in node.plan.workers}
            if planned != self.names() or any(node.state not in SETTLED for node in self.nodes.values()):
                return None
            if any(ws.status is not Status.running for ws in self.cluster.scheduler.workers.values()):
                return None
            by_pid: Counter[int] = Counter()  # agents may share this process
            for name, pid in self.agents.items():
                by_pid[pid] += len(self.nodes[name].plan.workers)
            if any(len(listening(pid)) != count for pid, count in by_pid.items()):
                return None
            return {name: (node.state, sorted(node.plan.workers)) for name, node in self.nodes.items()}

        return await wait_until(same, timeout)

    async def lost(self, nodes: list[str] | None = None) -> int:
        """Count the keys that were on nodes and are not in memory any more."""
        chosen = nodes if nodes is not None else list(self.kept)
        futures = [future for node in chosen for future in self.kept[node]]
        found = await self.client.gather(futures, errors="skip")
        expected = [f"{node} {i}" for node in chosen for i in range(KEYS)]
        assert set(found) <= set(expected)
        return len(expected) - len(found)


@asynccontextmanager
async def world_of(nodes: int | list[Any], config: dict[str, Any] | None = None) -> AsyncIterator[World]:
    """Open a cluster, whose agents are in this process where a number is given, and put keys into its workers."""
    async with (
        AgentCluster(
            hosts=here(nodes) if isinstance(nodes, int) else nodes,
            config={**SMALL, **(config or {})},
            scheduler_options={"dashboard": False, "dashboard_address": ":0"},
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        agents = {name: node.launched.ready.pid for name, node in cluster.workers.items()}
        world = World(cluster, client, agents, {name: listening(pid) for name, pid in agents.items()})
        for name in agents:
            where = [world.worker(f"{name}-0").address]
            values = [f"{name} {i}" for i in range(KEYS)]
            world.kept[name] = await client.scatter(values, workers=where, hash=False)
        yield world


# -- new workers -------------------------------------------------------------------------------------------------------


def failing(fault: str, tmp_path: Path, gate: Gates) -> Path:
    if fault == "hangs":
        return gate("start").preload
    preload = tmp_path / "fails.py"
    preload.write_text("raise RuntimeError('no licence')\n")
    return preload


SAID = {"fails": "no licence", "hangs": "had not joined .* after 2 s"}


@pytest.mark.parametrize("fault", ["fails", "hangs"])
async def test_new_worker_does_not_start_and_the_old_were_not_touched(fault: str, tmp_path: Path, gate: Gates) -> None:
    async with world_of(2) as world:
        with pytest.raises(SwapError, match=SAID[fault]):
            await world.change(preloading(failing(fault, tmp_path, gate)), timeout=2)
        assert await world.truth() == {"local": ("ready", ["local-0"]), "local.2": ("ready", ["local.2-0"])}
        assert {name: listening(pid) for name, pid in world.agents.items()} == world.pids
        assert await world.lost() == 0


@pytest.mark.parametrize("fault", ["fails", "hangs"])
async def test_new_worker_does_not_start_when_the_old_went_first(fault: str, tmp_path: Path, gate: Gates) -> None:
    async with world_of(2) as world:
        preload = failing(fault, tmp_path, gate)
        with pytest.raises(SwapError, match=SAID[fault]):
            await world.change(preloading(preload), nodes=["local"], strategy="replace", timeout=2)
        # local-1 was the name of the one that did not come.
        assert await world.truth() == {"local": ("ready", ["local-2"]), "local.2": ("ready", ["local.2-0"])}
        assert world.cluster.scheduler.extensions["agentcluster"].registry.nodes["local"].plan.mode.name == "auto-cpu"
        assert world.worker("local-2").nthreads == 1
        assert await world.lost() == 0


@pytest.mark.parametrize(
    ("on_failure", "first", "second"),
    [("rollback", ("local-2", 1), ("local.2-0", 1)), ("stop", ("local-1", 2), ("local.2-0", 1))],
)
async def test_the_second_node_fails(
    on_failure: Any, first: tuple[str, int], second: tuple[str, int], tmp_path: Path
) -> None:
    preload = tmp_path / "one_only.py"
    preload.write_text(
        "import os\n"
        f"path = {str(tmp_path / 'licence')!r}\n"
        "with open(path, 'a') as file:\n"
        "    file.write(f'{os.getpid()} ')\n"
        "if open(path).read().split()[0] != str(os.getpid()):\n"
        "    raise RuntimeError('no licence')\n"
    )
    async with world_of(2) as world:
        with pytest.raises(SwapError, match="no licence"):
            await world.change(preloading(preload), nodes=["local", "local.2"], max_parallel=1, on_failure=on_failure)
        truth = await world.truth()
        assert truth == {"local": ("ready", [first[0]]), "local.2": ("ready", [second[0]])}
        assert [world.worker(name).nthreads for name, _ in (first, second)] == [first[1], second[1]]
        assert await world.lost() == 0


async def test_new_worker_is_killed_as_soon_as_it_is_ready() -> None:
    async with world_of(1) as world:
        change = world.change()
        killed = await wait_until(lambda: world.worker("local-1"), LATE)
        os.kill(killed.pid, signal.SIGKILL)
        try:
            await change
        except SwapError:
            # It had not told its agent yet that it was ready: then that is a start that failed.
            assert await world.truth() == {"local": ("ready", ["local-0"])}
        else:
            assert await world.truth() == {"local": ("ready", ["local-1"])}
        assert await world.lost() == 0


async def test_new_worker_is_killed_while_the_old_drains() -> None:
    async with world_of(1) as world:
        await world.hold("local-0")
        change = world.change()
        await world.in_step("local", "retire")
        killed = world.worker("local-1").pid
        os.kill(killed, signal.SIGKILL)
        await wait_until(lambda: (new := world.worker("local-1")) and new.pid != killed, LATE)
        assert world.worker("local-0").status is Status.closing_gracefully
        await world.let_go()
        await change
        assert await world.truth() == {"local": ("ready", ["local-1"])}
        assert await world.lost() == 0
        assert await world.tasks[0] == "done"


async def test_new_worker_is_killed_while_data_moves(gate: Gates) -> None:
    entry = gate("start")
    code = entry.code

    def arrive() -> Any:
        exec(code, {})
        return slow()

    def slow() -> Any:
        class Slow:
            """What a worker that receives it is not done with before the gate opens."""

            def __reduce__(self) -> tuple[Any, tuple[()]]:
                return arrive, ()

        return Slow()

    async with world_of(1) as world:
        kept = world.client.submit(slow)
        await wait_until(lambda: kept.status == "finished", LATE)
        change = world.change()
        await wait_until(lambda: entry.waiting == 1, LATE)
        os.kill(world.worker("local-1").pid, signal.SIGKILL)
        await wait_until(lambda: entry.waiting == 2, LATE)
        assert world.holds("local", kept)
        entry.open()
        await change
        assert await world.truth() == {"local": ("ready", ["local-1"])}
        assert world.holds("local", kept)
        assert await world.lost() == 0


async def test_new_worker_dies_again_and_again(tmp_path: Path) -> None:
    dies = tmp_path / "dies.py"
    dies.write_text(
        "import os, threading, time\n"
        "def dask_setup(worker):\n"
        "    threading.Timer(0.5, os._exit, [3]).start()\n"
    )  # fmt: skip
    async with world_of(1) as world:
        await world.hold("local-0")
        change = world.change(preloading(dies))
        with pytest.raises(SwapError):
            await change
        assert await world.truth() == {"local": ("ready", ["local-0"])}
        assert listening(world.agents["local"]) == world.pids["local"]
        assert await world.lost() == 0
        await world.let_go()
        assert await world.tasks[0] == "done"


# -- connections -------------------------------------------------------------------------------------------------------


async def test_connection_of_a_worker_breaks() -> None:
    async with world_of(2) as world:
        cut = world.worker("local-0").address
        world.cluster.scheduler.stream_comms[cut].abort()
        await wait_until(lambda: (new := world.worker("local-0")) and new.address != cut, LATE)
        assert await world.truth() == {"local": ("ready", ["local-0"]), "local.2": ("ready", ["local.2-0"])}
        await wait_until(lambda: world.nodes["local"].workers["local-0"].restarts == 1)
        assert await world.lost(["local.2"]) == 0
        await world.change()
        assert await world.truth() == {"local": ("ready", ["local-1"]), "local.2": ("ready", ["local.2-1"])}
        assert await world.lost(["local.2"]) == 0


# -- data that cannot be moved -----------------------------------------------------------------------------------------


async def test_who_could_take_the_data_is_paused() -> None:
    # Its memory is in use beyond its limits from the start; but what is asked of it before it says so, it takes.
    full = {"config": {"distributed.worker.memory.pause": 1e-6, "distributed.worker.memory.terminate": False}}
    async with world_of(1) as world:
        await world.hold("local-0")
        change = world.change(full)
        await world.in_step("local", "retire")
        await wait_until(lambda: world.worker("local-1").status is Status.paused)
        await world.let_go()
        with pytest.raises(SwapError, match="data could not be moved to another worker: worker local-0 keeps"):
            await change
        assert await world.truth() == {"local": ("ready", ["local-0"])}
        assert listening(world.agents["local"]) == world.pids["local"]
        assert await world.lost() == 0
        assert await world.tasks[0] == "done"


async def test_actors_come_after_the_check(gate: Gates) -> None:
    class Counter:
        """An actor."""

        count = 0

        def add(self) -> int:
            self.count += 1
            return self.count

    entry = gate("start")
    async with world_of(1) as world:
        change = world.change(preloading(entry.preload))
        await wait_until(lambda: entry.waiting == 1, LATE)
        counter = await world.client.submit(Counter, actor=True)
        assert await counter.add() == 1
        entry.open()
        with pytest.raises(SwapError, match="actors cannot be moved"):
            await change
        assert await world.truth() == {"local": ("ready", ["local-0"])}
        assert await counter.add() == 2
        assert await world.lost() == 0


# -- an agent that is killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
async def test_agent_is_killed(step: Step, gate: Gates, forked: ForkedHosts, caplog: pytest.LogCaptureFixture) -> None:
    entry, end = gate("start"), gate("stop")
    async with world_of(forked(2), preloading(end.preload)) as world:
        if step != "start":
            entry.open()
        if step == "retire":
            await world.hold("local-0")
        change = world.change(preloading(entry.preload))
        await wait_until(lambda: entry.waiting == 2, LATE)
        for name in world.agents:
            await world.in_step(name, step)
        if step == "stop":
            await wait_until(lambda: end.waiting == 2, LATE)
        trees = {name: family(pid) for name, pid in world.agents.items()}
        survivors = [future for node in world.kept.values() for future in node if world.holds("local", future)]
        os.kill(world.agents["local.2"], signal.SIGKILL)
        await gone(trees["local.2"], 10)
        await wait_until(lambda: world.nodes["local.2"].state == "lost")
        entry.open()
        end.open()
        await world.let_go()
        with pytest.raises(SwapError, match=r"local\.2"):
            await change
        truth = await world.truth()
        assert truth["local.2"] == ("lost", [])
        [(state, [name])] = [truth["local"]]
        # Its own change was done by then, unless it was still starting: it was brought back.
        assert (state, name, world.worker(name).nthreads) == ("ready", "local-0" if step == "start" else "local-2", 1)
        assert survivors or step == "stop"
        assert {future.status for future in survivors} <= {"finished"}
        assert len(await world.client.gather(survivors)) == len(survivors)
    assert "Timed out" not in caplog.text, "an agent that was gone was asked again and again"


# -- a scheduler that is killed ----------------------------------------------------------------------------------------


@asynccontextmanager
async def change_of_a_cluster(
    step: Step, gate: Gates, scheduler: Any, *hosts: Any
) -> AsyncIterator[tuple[AgentCluster, Any]]:
    """Open a cluster whose scheduler is a process of its own, and bring a change of all nodes into a step."""
    dask.config.set({"distributed.comm.timeouts.connect": "3s"})  # who is left asks for the scheduler in vain
    entry, end = gate("start"), gate("stop")
    async with (
        AgentCluster(
            hosts=list(hosts),
            scheduler=scheduler,
            config={**SMALL, **preloading(end.preload)},
            scheduler_options={"dashboard": False, "dashboard_address": ":0"},
            security=False,
            asynchronous=True,
        ) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        if step != "start":
            entry.open()
        running = await begun(client) if step == "retire" else None
        change = asyncio.ensure_future(cluster.reprovision("uniform", {**LARGE, **preloading(entry.preload)}))
        await wait_until(lambda: entry.waiting == len(hosts), LATE)
        for name in list(cluster.nodes):
            await reached(cluster.scheduler_comm.rollout_status, name, step)
        if step == "stop":
            await wait_until(lambda: end.waiting == len(hosts), LATE)
        yield cluster, change
        await asyncio.gather(change, return_exceptions=True)
        del running  # it would be cancelled without a reference to it


@pytest.mark.parametrize("step", STEPS)
async def test_scheduler_is_killed_and_agents_end(step: Step, gate: Gates, forked: ForkedHosts) -> None:
    async with change_of_a_cluster(step, gate, *forked(1), *forked(2)) as (cluster, change):
        trees = [each for node in cluster.workers.values() for each in family(node.launched.ready.pid)]
        os.kill(cluster.scheduler.launched.ready.pid, signal.SIGKILL)
        await gone(trees, LATE)
        with pytest.raises(OSError, match=r"connect|closed"):
            await change


@pytest.mark.parametrize("step", STEPS)
async def test_scheduler_is_killed_and_adopted_agents_stand_by(
    step: Step, gate: Gates, start: Start, forked: ForkedHosts
) -> None:
    agent = start(*AGENT, "--standby", "--listen-address", "tcp://127.0.0.1:0")
    address = (await agent.says("Standing by at ")).rpartition(" ")[2]
    async with change_of_a_cluster(step, gate, *forked(1), address) as (cluster, _):
        assert listening(agent.pid)
        os.kill(cluster.scheduler.launched.ready.pid, signal.SIGKILL)
        await agent.says("was released", LATE)
        await wait_until(lambda: not listening(agent.pid), LATE)
    options = {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"}
    async with AgentCluster([address], config=SMALL, scheduler_options=options, asynchronous=True) as cluster:
        await wait_until(lambda: len(listening(agent.pid)) == len(cluster.scheduler.workers) == 1)


# -- a client that is killed -------------------------------------------------------------------------------------------

CLIENT = """
import asyncio, json, sys
from distributed import Client

async def main():
    async with Client(sys.argv[1], asynchronous=True) as client:
        await client.scheduler.reprovision_nodes(mode="uniform", config=json.loads(sys.argv[2]))

asyncio.run(main())
"""


@pytest.mark.parametrize("step", STEPS)
async def test_client_is_killed_and_the_rollout_goes_on(step: Step, gate: Gates, start: Start, tmp_path: Path) -> None:
    entry, end = gate("start"), gate("stop")
    _, address = await start_scheduler(start, tmp_path)
    first = ("--mode", "auto-cpu", "--config", json.dumps({**SMALL, **preloading(end.preload)}))
    agents = {name: start(*AGENT, address, "--name", name, *first) for name in ("one", "two")}
    async with Client(address, asynchronous=True) as client:
        look = client.scheduler
        await wait_until(lambda: settled(client, {"one": "one", "two": "two"}), LATE)
        kept = await client.scatter(list(range(KEYS)), hash=False)
        if step != "start":
            entry.open()
        running = await begun(client) if step == "retire" else None
        config = json.dumps({**LARGE, **preloading(entry.preload)})
        other = start("-c", CLIENT, address, config)
        await wait_until(lambda: entry.waiting == 2, LATE)
        for name in agents:
            await reached(look.rollout_status, name, step)
        if step == "stop":
            await wait_until(lambda: end.waiting == 2, LATE)
        await gone(other.kill())
        entry.open()
        end.open()
        await Event("go", client=client).set()
        await wait_until(lambda: settled(client, {"one": "one", "two": "two"}, "uniform"), LATE)
        assert {name: len(listening(agent.pid)) for name, agent in agents.items()} == {"one": 1, "two": 1}
        assert await client.gather(kept) == list(range(KEYS))
        assert running is None or await running == "done"
    for agent in agents.values():
        agent.popen.send_signal(signal.SIGTERM)
        assert await agent.ended() == 0, agent.output()


async def settled(client: Client, expected: dict[str, str], mode: str = "auto-cpu") -> bool:
    """Whether no rollout runs, and each node has the mode and the one worker that is expected, planned and observed."""
    if await client.scheduler.rollout_status() is not None:
        return False
    nodes = await client.scheduler.get_nodes() or {}
    workers = (await client.scheduler.identity(n_workers=-1))["workers"].values()
    planned = {
        name: list(node["plan"]) for name, node in nodes.items() if (node["state"], node["mode"]) == ("ready", mode)
    }
    return planned == {name: [worker] for name, worker in expected.items()} and {
        worker["name"] for worker in workers
    } == set(expected.values())
