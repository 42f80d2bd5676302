"""dask-agent as a process: what it starts from its options, how it ends, and what it says when it cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from dask.system import CPU_COUNT
from distributed import Client, Future, Scheduler
from distributed.deploy.utils import nprocesses_nthreads

import agentcluster
from agentcluster.errors import PreflightError
from tests.support.programs import (
    AGENT,
    ROOT,
    SCHEDULER,
    SCHEDULER_AGAINST,
    SCHEDULER_WITHOUT,
    Program,
    Start,
    gone,
    start_scheduler,
)
from tests.support.waiting import wait_until

NOWHERE = "tcp://127.0.0.1:1"
ONE = ("--nworkers", "1", "--nthreads", "1", "--memory-limit", "512MiB")


async def nodes(client: Client) -> dict[str, Any]:
    return await client.scheduler.get_nodes() or {}


async def settled(client: Client, count: int = 1, state: str = "ready") -> dict[str, Any]:
    """Return the nodes once there are `count` in `state`, all their workers with the scheduler."""

    async def look() -> dict[str, Any] | None:
        found = await nodes(client)
        if [node["state"] for node in found.values()] != [state] * count:
            return None
        planned = {worker for node in found.values() for worker in node["plan"]}
        return found if planned == {str(w["name"]) for w in await workers(client)} else None

    return await wait_until(look, 40)


async def workers(client: Client) -> list[dict[str, Any]]:
    found = (await client.scheduler.identity(n_workers=-1))["workers"]
    return [{**worker, "address": address} for address, worker in found.items()]


def shape(found: list[dict[str, Any]]) -> list[int]:
    return [worker["nthreads"] for worker in found]


@dataclass
class Done:
    """A command that has ended.

    Attributes
    ----------
    returncode
        Its exit code.
    output
        What it wrote to stdout and stderr.
    """

    returncode: int
    output: str


Run = Callable[..., Done]


@pytest.fixture
def run(start: Start) -> Run:
    """A function that runs dask-agent to its end."""

    def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 20) -> Done:
        agent = start(*AGENT, *arguments, env=env)
        return Done(agent.popen.wait(timeout), agent.output())

    return run


def sentence(output: str) -> str:
    """Return the one line that says why, which is the last."""
    assert "Traceback" not in output, output
    said = [line for line in output.splitlines() if line.startswith(("dask-agent: ", "Error: "))]
    assert len(said) == 1, output
    last = [line for line in output.splitlines() if not line.endswith(("- End worker", "- Timed out starting worker"))]
    assert last[-1] == said[0], output
    return said[0].partition(": ")[2]


# -- what it starts ----------------------------------------------------------------------------------------------------


async def test_without_mode_it_is_what_dask_worker_is(scheduler: Scheduler, client: Client, start: Start) -> None:
    agent = start(*AGENT, scheduler.address)
    (node,) = (await settled(client)).values()
    (worker,) = await workers(client)
    assert worker["nthreads"] == CPU_COUNT
    assert node["hardware"]["cpus"] == CPU_COUNT
    assert worker["memory_limit"] == node["hardware"]["memory"]
    assert worker["resources"] == {}  # our label comes with a mode that was asked for
    await client.scheduler.reprovision_nodes(mode="uniform", config={"nworkers": 1})
    assert [each["resources"] for each in await workers(client)] == [{"CPU": 1.0}]
    assert await client.submit(sum, [1, 2]) == 3
    assert (node["mode"], node["name"]) == ("auto-cpu", os.uname().nodename)
    assert worker["address"].startswith("tcp://127.0.0.1:")
    assert len(agent.children()) >= 1


@pytest.mark.parametrize("option", ["--dashboard", "--no-dashboard"])
async def test_bokeh_is_imported_once_for_all_workers(
    scheduler: Scheduler, client: Client, start: Start, option: str
) -> None:
    """In the process that they are forked from, whose command line says what it imports."""
    # A variable that counts at the start: it is a new Python, and none that was forked.
    agent = start(*AGENT, scheduler.address, *ONE, option, env={"PYTHONNODEBUGRANGES": "1"})
    await settled(client)
    commands = [" ".join(child.cmdline()) for child in psutil.Process(agent.pid).children()]
    (server,) = [command for command in commands if "forkserver import main" in command]
    assert ("distributed.dashboard.worker" in server) is (option == "--dashboard")


@pytest.mark.parametrize("options", [["--mode", "auto-cpu"], ["--nworkers", "auto"]], ids=" ".join)
async def test_auto_splits_as_local_cluster(scheduler: Scheduler, client: Client, start: Start, options: Any) -> None:
    start(*AGENT, scheduler.address, *options)
    await settled(client)
    count, threads = nprocesses_nthreads()
    assert shape(await workers(client)) == [threads] * count


@pytest.mark.parametrize(
    ("options", "threads", "limit"),
    [
        (["--nworkers", "2", "--nthreads", "1", "--memory-limit", "300MiB"], [1, 1], 300 * 2**20),
        (["--mode", "uniform", "--config", '{"nthreads": 1, "nworkers": 1, "memory_limit": "1GB"}'], [1], 10**9),
        (["--config", '{"nworkers": 2, "nthreads": 1}', "--memory-limit", "0"], [1, 1], 0),
        (["--spec", '{"cls": "dask.distributed.Nanny", "opts": {"nthreads": 3, "memory_limit": 500000000}}'], [3], 5e8),
    ],
    ids=["shape", "uniform", "config", "spec"],
)
async def test_mode_options(
    scheduler: Scheduler, client: Client, start: Start, options: list[str], threads: list[int], limit: int
) -> None:
    start(*AGENT, scheduler.address, *options)
    await settled(client)
    found = await workers(client)
    assert shape(found) == threads
    assert {worker["memory_limit"] or 0 for worker in found} == {limit}


async def test_spec_file_of_several_workers(scheduler: Scheduler, client: Client, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        "thin: {cls: dask.distributed.Nanny, opts: {nthreads: 1}}\n"
        "wide:\n  cls: dask.distributed.Nanny\n  options:\n    nthreads: 2\n    resources: {WIDE: 1}\n"
    )
    start(*AGENT, scheduler.address, "--spec-file", str(file))
    await settled(client)
    found = await workers(client)
    assert sorted(shape(found)) == [1, 2]
    (wide,) = (worker for worker in found if worker["nthreads"] == 2)
    assert wide["resources"]["WIDE"] == 1


async def test_spec_from_a_pipe(scheduler: Scheduler, client: Client, start: Start, tmp_path: Path) -> None:
    """As a shell makes it of ``<(…)``: it can be read once."""
    pipe = tmp_path / "spec"
    os.mkfifo(pipe)
    start(*AGENT, scheduler.address, "--spec-file", str(pipe))
    spec = json.dumps({"cls": "dask.distributed.Nanny", "opts": {"nthreads": 3}})
    await asyncio.wait_for(asyncio.to_thread(pipe.write_text, spec), 20)
    await settled(client)
    assert shape(await workers(client)) == [3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_spec_of_a_scheduler(start: Start, number: signal.Signals) -> None:
    """As `dask spec`, in whose place SSHCluster and SubprocessCluster can have this command."""
    opts = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"}
    started = start(*AGENT, "--spec", json.dumps({"cls": "dask.distributed.Scheduler", "opts": opts}))
    address = (await started.says("Scheduler at: ")).rpartition(" ")[2]
    agent = start(*AGENT, address, *ONE)
    async with Client(address, asynchronous=True) as client:
        await settled(client)
        assert await client.submit(sum, [1, 2]) == 3
    started.popen.send_signal(number)
    assert await started.ended() == 0
    await agent.ended()


@pytest.mark.parametrize("cls", ["dask.distributed.Worker", "dask.distributed.Nanny"])
async def test_spec_that_says_all_as_dask_spec_has_it(
    scheduler: Scheduler, client: Client, start: Start, cls: str
) -> None:
    opts = {"scheduler_ip": scheduler.address, "name": "foo", "nthreads": 3, "nanny": False}
    agent = start(*AGENT, "--spec", json.dumps({"cls": cls, "opts": opts}))
    ((name, node),) = (await settled(client)).items()
    (worker,) = await workers(client)
    assert (worker["name"], worker["nthreads"], name, node["mode"]) == ("foo", 3, "foo", "spec")
    agent.kill(signal.SIGTERM)
    assert await agent.ended() == 0


async def test_host_options_stay_after_a_reprovision(
    scheduler: Scheduler, client: Client, start: Start, tmp_path: Path
) -> None:
    directory = tmp_path / "scratch"
    host = ["--host", "127.0.0.2", "--local-directory", str(directory), "--resources", "GPU=1 MEM=2e9"]
    start(*AGENT, scheduler.address, *ONE, "--name", "box", *host)

    def check(found: list[dict[str, Any]]) -> None:
        for worker in found:
            assert worker["address"].startswith("tcp://127.0.0.2:")
            assert worker["resources"] | {"GPU": 1, "MEM": 2e9} == worker["resources"]
            assert Path(worker["local_directory"]).is_relative_to(directory)

    node = (await settled(client))["box"]
    assert node["address"].startswith("tcp://127.0.0.2:")
    first = await workers(client)
    assert [worker["name"] for worker in first] == ["box"]
    check(first)
    await client.scheduler.reprovision_nodes(mode="auto-cpu", config={"nworkers": 2, "nthreads": 1})
    await settled(client)
    second = await workers(client)
    assert len(second) == 2
    assert {w["address"] for w in first}.isdisjoint(w["address"] for w in second)
    check(second)


async def test_scheduler_file_and_interface(start: Start, tmp_path: Path) -> None:
    _, address = await start_scheduler(start, tmp_path)
    loopback = next(name for name, (first, *_) in psutil.net_if_addrs().items() if first.address == "127.0.0.1")
    start(*AGENT, "--scheduler-file", str(tmp_path / "scheduler.json"), *ONE, "--interface", loopback)
    async with Client(address, asynchronous=True) as client:
        (node,) = (await settled(client)).values()
        assert node["address"].startswith("tcp://127.0.0.1:")


async def test_scheduler_address_in_the_environment(scheduler: Scheduler, client: Client, start: Start) -> None:
    start(*AGENT, *ONE, env={"DASK_SCHEDULER_ADDRESS": scheduler.address})
    await settled(client)


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_it_cleanly(
    scheduler: Scheduler, client: Client, start: Start, number: signal.Signals
) -> None:
    agent = start(*AGENT, scheduler.address, *ONE)
    await settled(client)
    tree = agent.kill(number)
    assert len(tree) >= 2
    await wait_until(lambda: _empty(client), 2)
    assert await agent.ended() == 0
    await gone(tree)
    assert not scheduler.workers
    assert f"Received signal {number.name} ({int(number)})" in agent.output()
    assert "Traceback" not in agent.output()


async def test_labels_choose_nodes(client: Client, scheduler: Scheduler, start: Start) -> None:
    for name, rack in (("one", "a"), ("other", "b")):
        start(*AGENT, scheduler.address, *ONE, "--name", name, "--label", f"rack={rack}", "--label", "site=x=y")
    await settled(client, 2)
    found = await nodes(client)
    assert {name: node["labels"] for name, node in found.items()} == {
        "one": {"rack": "a", "site": "x=y"},
        "other": {"rack": "b", "site": "x=y"},
    }
    options = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
    assert client.scheduler is not None
    await client.scheduler.reprovision_nodes(mode="uniform", config=options, nodes="rack=b")
    assert {name: node["mode"] for name, node in (await nodes(client)).items()} == {
        "one": "auto-cpu",
        "other": "uniform",
    }


@pytest.mark.parametrize("nanny", [[], ["--no-nanny"]], ids=["nanny", "no-nanny"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_is_no_error_beside_a_scheduler_that_does_not_answer(
    scheduler: Scheduler, start: Start, number: signal.Signals, nanny: list[str]
) -> None:
    agent = start(*AGENT, scheduler.address, *ONE, *nanny)
    await wait_until(lambda: scheduler.workers, 30)
    agent.popen.send_signal(number)
    assert agent.popen.wait(20) == 0  # in the event loop that is the scheduler's too
    assert await agent.ended() == 0
    said = agent.output()
    assert "End worker" in said
    assert not re.search("error|exception|timed out", said, re.IGNORECASE), said


@pytest.fixture
async def holders(scheduler: Scheduler, client: Client, start: Start) -> tuple[Program, Program, list[Future]]:
    """Two agents whose workers hold 200 keys, some on each."""
    a, b = (start(*AGENT, scheduler.address, *ONE, "--name", name) for name in ("a", "b"))
    await settled(client, 2)
    kept = await client.scatter([f"value {number}" for number in range(200)], hash=False)
    await wait_until(lambda: [len(ws.has_what) for ws in scheduler.workers.values()] == [100, 100])
    return a, b, kept


@pytest.mark.parametrize("all_get_it", [False, True])
async def test_sigterm_moves_the_data_to_others(
    scheduler: Scheduler, client: Client, holders: tuple[Program, Program, list[Future]], all_get_it: bool
) -> None:
    a, b, kept = holders
    tree = [psutil.Process(a.pid), *a.children()]
    for process in reversed(tree if all_get_it else tree[:1]):  # all of them by scancel, or by `timeout`
        process.send_signal(signal.SIGTERM)
    assert await a.ended() == 0
    await gone(tree)
    assert [key for future in kept if not scheduler.tasks[key := future.key].who_has] == []
    assert await client.gather(kept) == [f"value {number}" for number in range(200)]
    assert sorted(await nodes(client)) == ["b"]
    (line,) = [line for line in a.output().splitlines() if "moved" in line]
    assert "Node a: 100 keys (" in line

    began = time.monotonic()
    b.kill(signal.SIGTERM)
    assert await b.ended() == 0
    assert time.monotonic() - began < 20
    assert "Node b closes with its data: its workers hold the only copies of 200 keys" in b.output()
    for agent in (a, b):
        assert not [word for word in ("error", "exception", "traceback") if word in agent.output().lower()]


LATE = """
import asyncio
from distributed import Worker

class Late(Worker):
    async def start(self):
        await super().start()
        await asyncio.sleep(2)
        return self
"""


@pytest.mark.parametrize("command", [SCHEDULER, SCHEDULER_AGAINST], ids=["plugin", "no plugin"])
async def test_sigterm_moves_data_of_a_worker_that_only_the_scheduler_knows(
    start: Start, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """It works as soon as it has registered; its agent hears of that later."""
    (tmp_path / "late.py").write_text(LATE)
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    _, address = await start_scheduler(start, tmp_path, command=command)
    start(*AGENT, address, *ONE, "--name", "b")
    async with Client(address, asynchronous=True) as client:
        await wait_until(async_len(client, 1), 40)
        agent = start(*AGENT, address, *ONE, "--name", "a", "--worker-class", "late.Late", env=path)
        await wait_until(async_len(client, 2), 40)
        kept = await client.scatter([f"value {i}" for i in range(20)], hash=False, workers=["a"])
        assert [len(keys) for keys in (await client.has_what()).values() if keys] == [20]
        agent.kill(signal.SIGTERM)
        assert await agent.ended() == 0
        assert await client.gather(kept) == [f"value {i}" for i in range(20)]


async def test_ctrl_c_moves_the_data_to_others(
    scheduler: Scheduler, client: Client, holders: tuple[Program, Program, list[Future]]
) -> None:
    """A terminal sends the signal to all processes of the agent."""
    a, _, kept = holders
    for process in a.kill(signal.SIGINT)[1:]:
        process.send_signal(signal.SIGINT)
    assert await a.ended() == 0
    assert await client.gather(kept) == [f"value {number}" for number in range(200)]
    assert "Ctrl-C again ends at once" in a.output()
    assert "100 keys" in a.output()
    assert "Traceback" not in a.output()


async def test_ctrl_c_twice_ends_it_at_once(start: Start, tmp_path: Path) -> None:
    dask_scheduler, address = await start_scheduler(start, tmp_path)
    agent = start(*AGENT, address, *ONE, env={"DASK_AGENTCLUSTER__STOP_TIMEOUT": "1 minute"})
    async with Client(address, asynchronous=True) as client:
        await settled(client)
        kept = await client.scatter({"x": 1})
        dask_scheduler.popen.send_signal(signal.SIGSTOP)
        try:
            tree = agent.kill(signal.SIGINT)
            await agent.says("Ctrl-C again ends at once")
            agent.kill(signal.SIGINT)
            assert await agent.ended(12) == 0
            await gone(tree)
        finally:
            dask_scheduler.popen.send_signal(signal.SIGCONT)
        assert kept
    assert "did not answer" not in agent.output()


@pytest.mark.parametrize("holds", [True, False], ids=["data", "no data"])
async def test_sigterm_beside_a_scheduler_that_does_not_answer(start: Start, tmp_path: Path, holds: bool) -> None:
    """It is waited for a few seconds when there is something to move, and a moment where there is not."""
    dask_scheduler, address = await start_scheduler(start, tmp_path)
    agent = start(*AGENT, address, *ONE, env={"DASK_AGENTCLUSTER__STOP_TIMEOUT": "1 minute"})
    async with Client(address, asynchronous=True) as client:
        await settled(client)
        kept = await client.scatter({"x": 1}) if holds else {}
        dask_scheduler.popen.send_signal(signal.SIGSTOP)
        try:
            tree = agent.kill(signal.SIGTERM)
            assert await agent.ended(12) == 0
            await gone(tree)
        finally:
            dask_scheduler.popen.send_signal(signal.SIGCONT)
        del kept
    if holds:
        assert f"closes with its data: the scheduler at {address} did not answer" in agent.output()
    else:
        assert "its workers have nothing, and the scheduler does not answer" in agent.output()


async def _empty(client: Client) -> bool:
    return await nodes(client) == {}


async def test_signal_while_it_starts(scheduler: Scheduler, client: Client, start: Start) -> None:
    agent = start(*AGENT, scheduler.address, *ONE)
    await wait_until(lambda: nodes(client), 15)
    tree = agent.kill(signal.SIGTERM)
    assert await agent.ended() == 0
    await gone(tree)
    await wait_until(lambda: _empty(client), 2)
    assert not scheduler.workers


async def test_kill_takes_its_workers_along(scheduler: Scheduler, client: Client, start: Start) -> None:
    agent = start(*AGENT, scheduler.address, *ONE, "--name", "box")
    await settled(client)
    tree = agent.kill(signal.SIGKILL)
    await gone(tree)
    found = (await settled(client, state="lost"))["box"]
    assert found["workers"] == {}
    assert "connection" in found["problem"]
    await wait_until(lambda: not scheduler.workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_it_ends_with_its_scheduler(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    dask_scheduler, address = await start_scheduler(start, tmp_path)
    agent = start(*AGENT, address, *ONE)
    async with Client(address, asynchronous=True) as client:
        await settled(client)
    tree = agent.children()
    dask_scheduler.kill(number)
    assert await agent.ended() == 0
    await gone(tree)
    assert "Reason: scheduler-gone" in agent.output()


async def test_a_name_is_free_again_after_a_crash(scheduler: Scheduler, client: Client, start: Start) -> None:
    agent = start(*AGENT, scheduler.address, *ONE, "--name", "box")
    await settled(client)
    agent.kill()
    await settled(client, state="lost")
    start(*AGENT, scheduler.address, *ONE, "--name", "box")
    assert list((await settled(client))["box"]["plan"]) == ["box"]


# -- the scheduler's side ----------------------------------------------------------------------------------------------


async def test_preload(start: Start, tmp_path: Path) -> None:
    _, address = await start_scheduler(start, tmp_path, "--preload", "agentcluster")
    async with Client(address, asynchronous=True) as client:
        assert await client.scheduler.get_nodes() == {}
        assert (await client.scheduler.get_provision_mode())["mode"] == "auto-cpu"


@pytest.mark.slow
async def test_many_agents_at_once_register_the_plugin_once(start: Start, tmp_path: Path) -> None:
    _, address = await start_scheduler(start, tmp_path)
    agents = [start(*AGENT, address, *ONE) for _ in range(5)]
    async with Client(address, asynchronous=True) as client:
        assert await client.scheduler.get_nodes() is None
        found = await wait_until(lambda: settled(client, 5), 40)
        own = os.uname().nodename
        assert sorted(found) == [own, *(f"{own}.{number}" for number in range(2, 6))]

        def plugins(dask_scheduler: Scheduler) -> list[str]:
            return [name for name, plugin in dask_scheduler.plugins.items() if type(plugin).__name__ == "AgentPlugin"]

        assert await client.run_on_scheduler(plugins) == ["agentcluster"]
    ended = [agent.kill(signal.SIGTERM) for agent in agents]
    assert await asyncio.gather(*(agent.ended() for agent in agents)) == [0] * 5
    for tree in ended:
        await gone(tree)


async def test_scheduler_without_agentcluster_gets_it(start: Start, tmp_path: Path) -> None:
    scheduler, address = await start_scheduler(start, tmp_path, command=SCHEDULER_WITHOUT)
    start(*AGENT, address, *ONE, "--name", "a")
    start(*AGENT, address, *ONE, "--name", "b")
    async with Client(address, asynchronous=True) as client:
        await wait_until(async_len(client, 2), 40)  # before there is a plugin, nobody may ask for nodes
        await settled(client, 2)

        def home(dask_scheduler: Scheduler) -> str:
            import agentcluster.scheduler.plugin

            assert type(dask_scheduler.plugins["agentcluster"]) is agentcluster.scheduler.plugin.AgentPlugin
            return f"{agentcluster.scheduler.plugin.__file__} {agentcluster.__version__}"

        assert (
            await client.run_on_scheduler(home)
            == f"shipped/agentcluster/scheduler/plugin.py {agentcluster.__version__}"
        )
        kept = await client.scatter([f"value {i}" for i in range(20)], hash=False)
        with pytest.raises(PreflightError, match="no GPU"):
            await client.scheduler.reprovision_nodes(mode="auto-gpu")
        await client.scheduler.reprovision_nodes(mode="uniform", config={"nworkers": 2, "memory_limit": "300MiB"})
        assert len(await workers(client)) == 4
        assert await client.gather(kept) == [f"value {i}" for i in range(20)]
    assert "agentcluster" not in str([each.name for each in tmp_path.iterdir()])
    assert "Traceback" not in scheduler.output()


@pytest.mark.parametrize("options", [(), ("--mode", "uniform")], ids=["fallback", "mode"])
async def test_scheduler_that_cannot_have_agentcluster(start: Start, tmp_path: Path, options: tuple[str, ...]) -> None:
    scheduler, address = await start_scheduler(start, tmp_path, command=SCHEDULER_AGAINST)
    one, other = (start(*AGENT, address, *ONE, *options, "--name", name) for name in ("a", "b"))
    async with Client(address, asynchronous=True) as client:
        await wait_until(async_len(client, 2), 40)
        for agent in (one, other):
            (warning,) = [line for line in agent.output().splitlines() if "WARNING" in line]
            assert f"cannot be reprovisioned: scheduler at {address} cannot hold nodes" in warning
            assert "pip install agentcluster" in warning
            assert "dask scheduler --preload agentcluster" in warning
        kept = await client.scatter([f"value {i}" for i in range(20)], hash=False)
        tree = one.kill(signal.SIGTERM)
        assert await one.ended() == 0
        await gone(tree)
        assert await client.gather(kept) == [f"value {i}" for i in range(20)]
        tree = [psutil.Process(other.pid), *other.children()]
    scheduler.kill()
    assert await other.ended() == 0
    await gone(tree)


def async_len(client: Client, count: int) -> Any:
    async def look() -> bool:
        return len(await workers(client)) == count

    return look


@pytest.mark.parametrize("command", [SCHEDULER, SCHEDULER_AGAINST], ids=["plugin", "no plugin"])
async def test_it_ends_when_its_workers_were_retired(start: Start, tmp_path: Path, command: tuple[str, ...]) -> None:
    _, address = await start_scheduler(start, tmp_path, command=command)
    agent = start(*AGENT, address, "--nworkers", "2", "--nthreads", "1", "--memory-limit", "300MiB", "--name", "a")
    async with Client(address, asynchronous=True) as client:
        await wait_until(async_len(client, 2), 40)
        first, second = await workers(client)
        await client.retire_workers([first["address"]])
        await wait_until(lambda: len(agent.children()) <= 3)
        assert agent.popen.poll() is None
        tree = [psutil.Process(agent.pid), *agent.children()]
        await client.scheduler.retire_workers(workers=[second["address"]], close_workers=True)
        assert await agent.ended() == 0
        await gone(tree)
    # Of ours: a worker's own process may log an error of dask's about the queue that it closes under a waiting thread.
    ours = [line.lower() for line in agent.output().splitlines() if " - agentcluster" in line]
    assert ours
    assert not [line for line in ours if "error" in line or "exception" in line]


async def test_it_stays_when_a_client_wants_no_workers(scheduler: Scheduler, client: Client, start: Start) -> None:
    agent = start(*AGENT, scheduler.address, *ONE)
    await settled(client)
    await client.scheduler.reprovision_nodes(mode="none")
    await settled(client, state="standby")
    await client.scheduler.reprovision_nodes(mode="uniform", config={"nworkers": 1, "memory_limit": "300MiB"})
    await settled(client)
    assert agent.popen.poll() is None


async def test_two_agents_of_one_name(scheduler: Scheduler, client: Client, start: Start) -> None:
    start(*AGENT, scheduler.address, *ONE, "--name", "box")
    before = (await settled(client))["box"]
    second = start(*AGENT, scheduler.address, *ONE, "--name", "box")
    assert await second.ended() == 1
    said = sentence(second.output())
    assert said.startswith(f"a node named 'box' is already registered by the agent at {before['address']}")
    assert "--name" in said
    assert (await settled(client))["box"]["address"] == before["address"]


# -- options of dask worker --------------------------------------------------------------------------------------------


async def test_what_every_worker_gets_whatever_its_mode(
    scheduler: Scheduler, client: Client, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "said.py").write_text(
        "import click, os\n"
        "@click.command()\n"
        "@click.option('--word')\n"
        "def dask_setup(worker, word):\n"
        "    worker.word = word\n"
    )  # fmt: skip
    (tmp_path / "own.py").write_text("from distributed import Worker\nclass Own(Worker):\n    pass\n")
    (tmp_path / "nanny_said.py").write_text(
        f"def dask_setup(nanny):\n    open({str(tmp_path / 'nannies')!r}, 'a').write('x')\n"
    )
    agent = start(
        *AGENT,
        scheduler.address,
        *ONE,
        *("--worker-class", "own.Own", "--pid-file", str(tmp_path / "pid"), "--dashboard-address", "127.0.0.1:0"),
        *("--lifetime", "1 hour", "--lifetime-stagger", "1 minute", "--lifetime-restart"),
        *("--preload-nanny", "nanny_said", "--preload", "said", "--word", "hello"),
        env={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    await settled(client)
    assert (tmp_path / "pid").read_text() == str(agent.pid)

    def look(dask_worker: Any) -> tuple[Any, ...]:
        lifetime = dask_worker.lifetime
        return type(dask_worker).__qualname__, dask_worker.word, 3500 < lifetime < 3700, dask_worker.lifetime_restart

    for nannies in (1, 3):
        found = await client.run(look)
        assert set(found.values()) == {("Own", "hello", True, True)}
        assert len(found) == (1 if nannies == 1 else 2)
        assert (tmp_path / "nannies").read_text() == "x" * nannies
        mode = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
        if nannies == 1:
            await client.scheduler.reprovision_nodes(mode="uniform", config=mode)
    agent.kill(signal.SIGTERM)
    assert await agent.ended() == 0
    assert not (tmp_path / "pid").exists()


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [NOWHERE, "tcp://does-not-exist.invalid:8786"])
def test_unreachable_scheduler(address: str, run: Run) -> None:
    began = time.monotonic()
    done = run(address, "--death-timeout", "2")
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    said = sentence(done.output)
    assert f"scheduler at {address}" in said
    assert "is one running there" in said


async def test_an_address_where_something_else_answers(start: Start) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        agent = start(*AGENT, address, "--death-timeout", "5")
        assert await agent.ended() == 1
    said = sentence(agent.output())
    assert address in said
    assert "is not a scheduler" in said


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        (["--mode", "auto-gpu"], {"CUDA_VISIBLE_DEVICES": ""}, ["'auto-gpu'", "GPU"]),
        (["--spec", '{"cls": "dask.distributed.Nan", "opts": {}}'], {}, ["dask.distributed.Nan", "cannot import"]),
        (["--spec", '{"cls": "dask.distributed.Nanny", "opts": {"nthread": 2}}'], {}, ["'nthread'", "'nthreads'"]),
        (["--mode", "uniform", "--config", '{"nthreads": 4096}'], {}, ["'uniform'", "4096"]),
        (["--mode", "uniform", "--config", '{"nthreads": 1, "memory_limit": "1PiB"}'], {}, ["'uniform'", "memory"]),
    ],
    ids=["no gpu", "spec class", "spec option", "threads", "memory"],
)
async def test_refused_first_mode(
    scheduler: Scheduler, client: Client, start: Start, options: list[str], env: dict[str, str], expected: list[str]
) -> None:
    agent = start(*AGENT, scheduler.address, *options, env=env)
    code = await agent.ended()
    assert code in (1, 2)
    said = sentence(agent.output())
    assert all(each in said for each in expected), said
    assert await nodes(client) == {}


async def test_worker_that_does_not_start(scheduler: Scheduler, client: Client, start: Start) -> None:
    spec = {"cls": "dask.distributed.Nanny", "opts": {"preload": ["no_such_module_here"]}}
    agent = start(*AGENT, scheduler.address, "--spec", json.dumps(spec))
    assert await agent.ended() == 1
    (said,) = [line for line in agent.output().splitlines() if line.startswith("dask-agent: ")]
    assert said.startswith("dask-agent: workers on node")
    assert "no_such_module_here" in said
    await wait_until(lambda: _empty(client), 2)


#: What is wrong on the command line itself, and what the answer must hold.
WRONG = [
    ([], ["no scheduler", "--scheduler-file"]),
    ([NOWHERE, "--mode", "auto-cqu"], ["--mode 'auto-cqu'", "did you mean 'auto-cpu'"]),
    ([NOWHERE, "--mode", "auto-cpu", "--config", "{"], ["--config", "is not JSON"]),
    ([NOWHERE, "--config", "[1]"], ["--config", "JSON object"]),
    ([NOWHERE, "--config", '{"nthread": 1}'], ["'nthread'", "did you mean 'nthreads'"]),
    ([NOWHERE, "--spec", "{"], ["--spec", "not JSON"]),
    ([NOWHERE, "--spec", '{"opts": {}}'], ['"cls" is missing', "dask.distributed.Nanny"]),
    ([NOWHERE, "--spec-file", "/no/such/file"], ["--spec-file '/no/such/file'", "No such file"]),
    ([NOWHERE, "--spec", '{"cls": "a.B"}', "--spec-file", "x"], ["--spec", "--spec-file", "together"]),
    ([NOWHERE, "--mode", "auto-gpu", "--spec", '{"cls": "a.B"}'], ["--spec", "--mode 'auto-gpu'"]),
    ([NOWHERE, "--name", "a", "--spec", '{"cls": "a.B", "opts": {"name": "b"}}'], ["name", "twice", "'a'", "'b'"]),
    ([NOWHERE, "--spec", '{"cls": "a.B", "opts": {"scheduler_ip": "x:1"}}'], ["scheduler", "twice", NOWHERE, "'x:1'"]),
    (
        [NOWHERE, "--spec", '{"cls": "dask.distributed.Scheduler", "opts": {}}'],
        ["scheduler cannot be given with a spec"],
    ),
    ([NOWHERE, "--spec", '{"a": {"cls": "distributed.Scheduler"}}'], ["distributed.Scheduler", "a spec of its own"]),
    ([NOWHERE, "--nworkers", "x"], ["nworkers", "'x'", "whole number"]),
    ([NOWHERE, "--memory-limit", "x"], ["memory_limit", "'x'", "4GiB"]),
    ([NOWHERE, "--resources", "GPU"], ["--resources 'GPU'", "GPU=2"]),
    ([NOWHERE, "--death-timeout", "x"], ["--death-timeout is 'x'", "such as '30s'"]),
    ([NOWHERE, "--scheduler-file", "x"], ["twice", "--scheduler-file 'x'"]),
    (["--scheduler-file", "/no/such/file", "--death-timeout", "1"], ["--scheduler-file '/no/such/file'"]),
    ([NOWHERE, "--standby"], ["--standby", f"'{NOWHERE}'"]),
    (["--standby", "--nthreads", "2"], ["--nthreads", "--standby"]),
    (["--standby", "--mode", "auto-cpu"], ["--mode", "--standby"]),
    (["--standby", "--listen-address", "tcp://127.0.0.1"], ["--listen-address", "port", "tcp://0.0.0.0:8790"]),
    (["--standby", "--listen-address", "foo://127.0.0.1:0"], ["--listen-address", "'foo'"]),
    (["--standby", "--listen-address", "tcp://127.0.0.1:0", "--host", "127.0.0.1"], ["--host", "both"]),
    ([NOWHERE, "--nmworkers", "2"], ["--nmworkers", "--nworkers"]),
    ([NOWHERE, "--no-nanny", "--nworkers", "2"], ["--no-nanny", "--nworkers"]),
    ([NOWHERE, "--no-nanny", "--mode", "auto-gpu"], ["--no-nanny", "'auto-gpu'"]),
    ([NOWHERE, "--contact-address", "tcp://127.0.0.1:1"], ["--contact-address", "--listen-address"]),
    ([NOWHERE, "--listen-address", "tcp://127.0.0.1:1", "--worker-port", "1"], ["--listen-address", "--worker-port"]),
    ([NOWHERE, "--listen-address", "tcp://127.0.0.1:1", "--nworkers", "2"], ["--listen-address", "--nworkers"]),
    ([NOWHERE, "--listen-address", "tcp://127.0.0.1"], ["--listen-address 'tcp://127.0.0.1'", "port"]),
    (
        [NOWHERE, "--nworkers", "3", "--worker-port", "9:10"],
        ["Not enough ports in range --worker-port 9:10", "3 workers"],
    ),
    (
        [NOWHERE, "--nworkers", "2", "--nanny-port", "9"],
        ["Not enough ports in range --nanny-port 9 for 2", "ports for 1"],
    ),
    ([NOWHERE, "--worker-port", "9:x"], ["--worker-port: '9:x'", "a range"]),
    ([NOWHERE, "--label", "rack"], ["--label 'rack'", "rack=a"]),
    ([NOWHERE, "--worker-class", "os.Worker"], ["--worker-class 'os.Worker'", "module.Class"]),
    ([NOWHERE, "--pid-file", "/no/such/directory/pid"], ["--pid-file '/no/such/directory/pid'", "No such file"]),
    ([NOWHERE, "more"], ["unexpected extra argument", "more"]),
    ([NOWHERE, "--tls-ca-file", "/no/such/file"], ["--tls-ca-file", "/no/such/file"]),
]

#: Runs dask-agent with each list of arguments in one process, since nothing is started.
EACH = """
import contextlib, io, json, sys
from agentcluster.cli.dask_agent import main

for arguments in json.loads(sys.argv[1]):
    code, said = None, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DASK_")} | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", EACH, json.dumps([options for options, _ in WRONG])]
    done = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(WRONG)), ids=[" ".join(options)[:60] for options, _ in WRONG])
def test_wrong_options(answers: list[Any], index: int) -> None:
    code, output = answers[index]
    said = sentence(output)
    assert all(each in said for each in WRONG[index][1]), said
    # As dask worker: what click itself refuses, and what the command does.
    assert code == (2 if "Usage:" in output else 1)
    assert ("Failed to launch worker. " in said) == (code == 1)


def test_wrong_option_of_the_real_command(run: Run) -> None:
    # A variable that counts at the start: it is a new Python, and none that was forked.
    done = run(NOWHERE, "--mode", "auto-cqu", env={"PYTHONNODEBUGRANGES": "1"})
    assert done.returncode == 1
    assert "did you mean 'auto-cpu'" in sentence(done.output)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["localhost"], ["scheduler 'localhost'", "port", "tcp://HOST:8786"]),
        (["foo://127.0.0.1:1"], ["scheduler 'foo://127.0.0.1:1'", "tcp"]),
        (["tls://127.0.0.1:1"], ["tls://127.0.0.1:1", "--tls-ca-file", "--tls-cert", "--tls-key"]),
        ([NOWHERE, "--interface", "no-such-if"], ["'no-such-if'", "lo"]),
        ([NOWHERE, "--host", "192.0.2.1"], ["cannot listen at tcp://192.0.2.1:0"]),
        (["--standby", "--listen-address", "tls://127.0.0.1:0"], ["tls://127.0.0.1:0", "--tls-ca-file"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_wrong_addresses(options: list[str], expected: list[str], run: Run) -> None:
    done = run(*options, "--death-timeout", "5")
    assert done.returncode == 1
    said = sentence(done.output)
    assert all(each in said for each in expected), said


def test_broken_credentials(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "broken.pem"
    file.write_text("no certificate")
    done = run("tls://127.0.0.1:1", "--tls-ca-file", str(file), "--tls-cert", str(file), "--tls-key", str(file))
    assert done.returncode == 1
    assert str(file) in sentence(done.output)


def test_taken_port(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        done = run("--standby", "--listen-address", address)
    assert done.returncode == 1
    said = sentence(done.output)
    assert f"cannot listen at {address}" in said
    assert "in use" in said


async def test_encryption_required(scheduler: Scheduler, run: Run) -> None:
    done = await asyncio.to_thread(run, scheduler.address, env={"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"})
    assert done.returncode == 1
    assert "encryption is required" in sentence(done.output)


# -- as a command ------------------------------------------------------------------------------------------------------


def test_help_and_version(run: Run) -> None:
    text = run("--help").output
    for option in (
        "--mode",
        "--name",
        "--nworkers",
        "--nthreads",
        "--memory-limit",
        "--resources",
        "--local-directory",
    ):
        assert option in text
    for option in ("--interface", "--host", "--spec", "--spec-file", "--tls-ca-file", "--standby", "--listen-address"):
        assert option in text
    assert "--death-timeout" in text


def test_version(run: Run) -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        expected = version("agentcluster")
    except PackageNotFoundError:
        pytest.skip("agentcluster is not installed")
    done = run("--version")
    assert done.returncode == 0
    assert expected in done.output


@pytest.mark.parametrize("command", [["dask", "agent"], ["dask-agent"]], ids=" ".join)
def test_installed_command(command: list[str]) -> None:
    from importlib.metadata import entry_points

    if not entry_points(group="dask_cli", name="agent"):
        pytest.skip("agentcluster is not installed")
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{command[0]} is not installed beside this Python")
    done = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "--standby" in done.stdout
