"""AgentCluster on this machine: what SpecCluster's users rely on, swaps that lose nothing, and errors before harm."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import psutil
import pytest
from distributed import Client, LocalCluster, Scheduler, wait
from distributed.core import Status

from agentcluster import AgentCluster, Mode
from agentcluster.errors import (
    ConfigError,
    LaunchError,
    ModeRefused,
    NodeExists,
    NodeNotFound,
    PreflightError,
    SwapError,
    WorkerStartError,
)
from tests.support.forked import ForkedHosts
from tests.support.inprocess import here
from tests.support.waiting import wait_blocking, wait_until

QUIET = {"scheduler_options": {"dashboard": False, "dashboard_address": ":0"}}
FOUR = {"nworkers": 4, "nthreads": 1, "memory_limit": "1GiB"}


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """One local agent with two workers of one thread."""
    return {"hosts": here(), "config": {"nworkers": 2, "nthreads": 1}}


def names(cluster: AgentCluster) -> set[str]:
    return {str(ws.name) for ws in cluster.scheduler.workers.values()}


async def pids(client: Client) -> dict[str, int]:
    found = await client.run(os.getpid)
    return {str(client.cluster.scheduler.workers[address].name): pid for address, pid in found.items()}


# -- life --------------------------------------------------------------------------------------------------------------


def test_embedded_default_in_a_script() -> None:
    with AgentCluster(**QUIET) as cluster, Client(cluster) as client:
        assert list(cluster.nodes) == ["local"]
        assert cluster.nodes["local"]["state"] == "ready"
        assert cluster.plan == cluster.requested == cluster.observed == {f"local-{i}" for i in range(len(cluster.plan))}
        assert client.submit(sum, [1, 2]).result() == 3
        cluster.wait_for_workers(len(cluster.plan), timeout=5)
        assert "AgentCluster" in repr(cluster)
        assert "auto-cpu" in cluster._repr_html_()
    assert cluster.status is Status.closed


async def test_context_managers_and_close_twice() -> None:
    cluster = await AgentCluster(asynchronous=True, **QUIET)
    await asyncio.gather(cluster.close(), cluster.close())
    await cluster.close()
    assert cluster.status is Status.closed


async def test_close_before_start() -> None:
    cluster = AgentCluster(asynchronous=True, **QUIET)
    await cluster.close()
    assert cluster.status is Status.closed


@pytest.mark.parametrize("steps", [0, 1, 2, 100])
async def test_close_while_starting(steps: int) -> None:
    cluster = AgentCluster(hosts=["local", "local"], asynchronous=True, **QUIET)
    starting = asyncio.ensure_future(_enter(cluster))
    async with asyncio.timeout(30):
        while not cluster.hosts.opening:
            await asyncio.sleep(0)  # each step, so that it is also closed before a launch has taken its first one
    for _ in range(steps):
        await asyncio.sleep(0)
    await cluster.close()
    with pytest.raises(BaseException):  # noqa: B017, PT011 (cancelled, or closed under it: either is an end)
        await starting
    assert cluster.status is Status.closed


async def _enter(cluster: AgentCluster) -> None:
    await cluster


async def test_close_after_the_agent_was_killed(forked: ForkedHosts) -> None:
    async with AgentCluster(forked(), config={"nworkers": 2, "nthreads": 1}, asynchronous=True, **QUIET) as cluster:
        os.kill(cluster.workers["local"].launched.ready.pid, signal.SIGKILL)
        await wait_until(lambda: not cluster.scheduler.workers)
        await wait_until(lambda: cluster.nodes["local"]["state"] == "lost")


async def test_close_after_the_scheduler_closed(cluster: AgentCluster) -> None:
    await cluster.scheduler.close()
    dask.config.set({"distributed.comm.timeouts.connect": "500ms"})  # what is closed then asks for it in vain


async def test_two_clusters_in_one_process(cluster: AgentCluster) -> None:
    async with AgentCluster(hosts=here(), mode="none", asynchronous=True, **QUIET) as other:
        assert other.nodes["local"]["state"] == "standby"
        assert cluster.nodes["local"]["state"] == "ready"


async def test_logs(forked: ForkedHosts) -> None:
    async with AgentCluster(hosts=forked(), mode="none", asynchronous=True, **QUIET) as cluster:
        logs = await cluster.get_logs(agents=True)
    assert {"Cluster", "Scheduler", "local"} <= set(logs)
    assert "registered to" in logs["local"]


@pytest.mark.parametrize("victim", ["script", "agent"])
def test_kill_9_leaves_nothing(victim: str, tmp_path: Path) -> None:
    """Whoever is killed, agents and workers are gone in a few seconds."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, json\n"
        "from agentcluster import AgentCluster\n"
        "if __name__ == '__main__':\n"
        "    cluster = AgentCluster(scheduler_options={'dashboard_address': ':0', 'dashboard': False})\n"
        "    print(json.dumps(cluster.workers['local'].launched.ready.pid), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        agent = json.loads(process.stdout.readline())
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 3
        os.kill(process.pid if victim == "script" else agent, signal.SIGKILL)
        left = [each for each in started if victim == "script" or _descends(each, agent)]
        wait_blocking(lambda: not any(_runs(each) for each in left), timeout=5)
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descends(process: psutil.Process, ancestor: int) -> bool:
    try:
        return ancestor in [process.pid, *(each.pid for each in process.parents())]
    except psutil.NoSuchProcess:
        return True


# -- swaps -------------------------------------------------------------------------------------------------------------


async def test_ten_reprovisions_and_a_scale_lose_nothing() -> None:
    """200 scattered and 200 computed keys; LocalCluster, asked the same `scale`, loses scattered ones."""
    async with (
        AgentCluster(hosts=here(), config=FOUR, asynchronous=True, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        scattered, computed = await _fill(client)
        for step in range(10):
            mode = ("uniform", {"nthreads": 2}) if step % 2 == 0 else ("auto-cpu", FOUR)
            report = await cluster.reprovision(*mode)
            assert report.nodes["local"].old
            assert report.nodes["local"].new
            assert report.keys == 400
        await cluster.scale(1)
        assert len(cluster.scheduler.workers) == len(cluster.plan) == 1
        assert await _lost(client, scattered, computed) == (0, 0)
        assert not any(ts.suspicious for ts in cluster.scheduler.tasks.values())


async def test_local_cluster_loses_scattered_keys_at_the_same_scale() -> None:
    """Why `scale` is our own: the behaviour of dask that it must not have."""
    async with (
        LocalCluster(n_workers=4, threads_per_worker=1, asynchronous=True, dashboard_address=":0") as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        scattered, _ = await _fill(client)
        cluster.scale(1)
        await wait_until(lambda: len(cluster.scheduler.workers) == 1)
        lost = sum(1 for future in scattered if future.key not in cluster.scheduler.tasks)
        assert lost > 50


async def _fill(client: Client) -> tuple[list[Any], list[Any]]:
    scattered = await client.scatter([f"scattered {i}" for i in range(200)], hash=False)
    computed = client.map(str, range(200), pure=False)
    await wait([*scattered, *computed])
    return scattered, computed


async def _lost(client: Client, scattered: list[Any], computed: list[Any]) -> tuple[int, int]:
    found = await client.gather(scattered, errors="skip")
    right = set(found) & {f"scattered {i}" for i in range(200)}
    again = await client.gather(computed, errors="skip")
    return 200 - len(right), 200 - len(set(again) & {str(i) for i in range(200)})


async def test_persisted_array_stays_through_a_swap_and_back(cluster: AgentCluster, client: Client) -> None:
    persisted = client.persist(da.ones((400, 400), chunks=(100, 100)) + 1)
    await wait(persisted)
    before = set(cluster.scheduler.tasks)
    for mode, config in (("uniform", {"nthreads": 2}), ("auto-cpu", {"nworkers": 2, "nthreads": 1})):
        await cluster.reprovision(mode, config)
        assert all(ts.state == "memory" for ts in cluster.scheduler.tasks.values())
    assert set(cluster.scheduler.tasks) == before
    assert await client.compute(persisted.sum()) == 400 * 400 * 2


async def test_tasks_run_through_swaps(cluster: AgentCluster, client: Client) -> None:
    x = da.random.default_rng(0).random((600, 600), chunks=(100, 100))
    future = client.compute(((x @ x.T).sum() - (x @ x.T).sum()), optimize_graph=False)
    for mode, config in (("uniform", {"nthreads": 2}), ("auto-cpu", {"nworkers": 2, "nthreads": 1})) * 2:
        await cluster.reprovision(mode, config)
    assert abs(await future) < 1e-3
    assert not any(ts.suspicious for ts in cluster.scheduler.tasks.values())


async def test_whoever_is_still_wanted_stays(cluster: AgentCluster, client: Client) -> None:
    before = await pids(client)
    report = await cluster.reprovision("auto-cpu", {"nworkers": 2, "nthreads": 1})
    assert report.nodes["local"].kept == ("local-0", "local-1")
    assert await pids(client) == before
    await cluster.scale(1)
    [stayer] = names(cluster)
    assert await pids(client) == {stayer: before[stayer]}
    await cluster.scale(2)
    after = await pids(client)
    assert after[stayer] == before[stayer]
    assert set(after) == {stayer, "local-2"}
    assert cluster.plan == {stayer, "local-2"}


async def test_scale_beyond_the_mode_warns_and_goes_to_capacity(cluster: AgentCluster) -> None:
    with pytest.warns(UserWarning, match="room for 2 workers"):
        await cluster.scale(5)
    assert len(names(cluster)) == 2


async def test_scale_by_cores_and_memory(cluster: AgentCluster) -> None:
    await cluster.scale(cores=1)
    assert len(names(cluster)) == 1
    limit = cluster.nodes["local"]["plan"][names(cluster).pop()]["memory_limit"]
    await cluster.scale(memory=limit * 2)
    assert len(names(cluster)) == 2


async def test_scale_by_nodes_and_by_kind() -> None:
    shape = {"nworkers": 2, "nthreads": 1, "memory_limit": "300MiB"}
    async with (
        AgentCluster(hosts=here(2), mode="uniform", config=shape, asynchronous=True, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        scattered, computed = await _fill(client)
        before = await pids(client)
        assert len(before) == 4
        await cluster.scale(nodes=1)
        stay = await pids(client)
        assert len(stay) == 2
        assert stay.items() <= before.items()
        assert sorted(node["state"] for node in cluster.nodes.values()) == ["ready", "standby"]
        await cluster.scale(cpu=3)
        assert stay.items() <= (await pids(client)).items()
        assert len(names(cluster)) == 3
        now = await pids(client)
        with pytest.raises(ConfigError, match=r"scale\(cpu=9\): the nodes have room for 4 cpu; nothing was changed"):
            await cluster.scale(cpu=9, strict=True)
        with pytest.raises(ConfigError, match=r"'gpu'.*'uniform'"):
            await cluster.scale(gpu=1)
        with pytest.raises(ConfigError, match="whole number"):
            await cluster.scale(1.5)  # type: ignore[arg-type]
        assert await pids(client) == now
        assert await _lost(client, scattered, computed) == (0, 0)


async def test_scale_by_the_names_in_a_spec(cluster: AgentCluster, client: Client) -> None:
    nanny = "dask.distributed.Nanny"
    spec = {name: {"cls": nanny, "opts": {"nthreads": n, "memory_limit": "300MiB"}} for name, n in (("a", 1), ("b", 2))}
    await cluster.reprovision("spec", {"spec": spec})
    before = await pids(client)
    await cluster.scale(a=0)
    assert await client.run(lambda dask_worker: dask_worker.state.nthreads) == {
        next(iter(cluster.scheduler.workers)): 2
    }
    await cluster.scale(a=1, b=1)
    after = await pids(client)
    assert len(after) == 2
    assert len(before.items() & after.items()) == 1


async def test_add_beside_what_runs(cluster: AgentCluster, client: Client) -> None:
    before = await pids(client)
    await cluster.reprovision(Mode("uniform", {"nthreads": 2}), remove_existing=False)
    after = await pids(client)
    assert before.items() <= after.items()
    assert set(after) == {"local-0", "local-1", "local-2"}


async def test_dry_run_changes_nothing(cluster: AgentCluster, client: Client) -> None:
    before = await pids(client)
    report = await cluster.reprovision("uniform", {"nthreads": 2}, dry_run=True)
    assert report.dry_run
    assert report.nodes["local"].old == ("local-0", "local-1")
    assert "planned only" in repr(report)
    assert await pids(client) == before


async def test_none_is_standby_and_back(cluster: AgentCluster) -> None:
    await cluster.reprovision("none")
    assert cluster.nodes["local"]["state"] == "standby"
    assert cluster.plan == set()
    await cluster.reprovision("auto-cpu", {"nworkers": 1})
    assert cluster.nodes["local"]["state"] == "ready"
    assert cluster.plan == {"local-2"}


async def test_two_at_once_take_turns(cluster: AgentCluster, client: Client) -> None:
    scattered, computed = await _fill(client)
    await asyncio.gather(
        cluster.reprovision("uniform", {"nthreads": 2}),
        cluster.reprovision("auto-cpu", {"nworkers": 2, "nthreads": 1}),
        cluster.scale(1),
    )
    assert names(cluster) == cluster.plan
    assert await _lost(client, scattered, computed) == (0, 0)


async def test_any_client_can_reprovision(cluster: AgentCluster) -> None:
    async with Client(cluster.scheduler_address, asynchronous=True) as client:
        assert (await client.scheduler.get_provision_mode())["nodes"] == {"local": "auto-cpu"}
        answer = await client.scheduler.reprovision_nodes(mode="uniform", config={"nthreads": 2})
        assert list(answer["nodes"]["local"]["new"]) == ["local-2"]
        await wait_until(lambda: cluster.plan == {"local-2"})
        with pytest.raises(NodeNotFound, match=r"no node named 'lokal'; did you mean 'local'"):
            await client.scheduler.reprovision_nodes(mode="uniform", nodes=["lokal"])


async def test_workers_of_different_classes(cluster: AgentCluster, client: Client) -> None:
    spec = {
        "small": {"cls": "distributed.Nanny", "options": {"nthreads": 1, "resources": {"SMALL": 1}}},
        "large": {"cls": "distributed.Nanny", "opts": {"nthreads": 4, "memory_limit": "2GiB"}},
    }
    await cluster.reprovision("spec", json.dumps(spec))
    found = {(ws.nthreads, ws.memory_limit == 2 * 2**30) for ws in cluster.scheduler.workers.values()}
    assert found == {(1, False), (4, True)}
    assert await client.submit(int, "3", resources={"SMALL": 1}) == 3


async def test_adapt_goes_up_and_down_without_loss(cluster: AgentCluster, client: Client) -> None:
    scattered, computed = await _fill(client)
    adaptive = cluster.adapt(minimum=1, maximum=2, interval="50ms", wait_count=2)
    await wait_until(lambda: len(cluster.scheduler.workers) == 1)
    adaptive.stop()
    assert await _lost(client, scattered, computed) == (0, 0)
    await wait_until(lambda: len(cluster.plan) == 1)
    await cluster.scale(2)
    assert len(names(cluster)) == 2


# -- nodes -------------------------------------------------------------------------------------------------------------


async def test_hosts_come_and_go_with_their_data_moved(cluster: AgentCluster, client: Client) -> None:
    scattered, computed = await _fill(client)
    with pytest.raises(ConfigError, match=r"a node named 'local' is already there"):
        await cluster.add_host("local")
    with pytest.raises(PreflightError, match="only copies of 400 keys"):
        await cluster.remove_host("local")
    assert cluster.nodes["local"]["state"] == "ready"
    assert await _lost(client, scattered, computed) == (0, 0)
    with pytest.raises(NodeNotFound):
        await cluster.remove_host("nowhere")


async def test_mode_by_node_and_removal() -> None:
    modes = {"local": Mode("auto-cpu", {"nworkers": 1}), "local.2": "none"}
    async with (
        AgentCluster(hosts=here(2), mode=modes, asynchronous=True, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert {n: each["state"] for n, each in cluster.nodes.items()} == {"local": "ready", "local.2": "standby"}
        scattered, computed = await _fill(client)
        await cluster.reprovision({"local.2": Mode("uniform", {"nthreads": 2})})
        agent = cluster.workers["local"].launched.agent
        await cluster.remove_host("local")
        assert agent.status is Status.closed
        assert await _lost(client, scattered, computed) == (0, 0)
        assert set(cluster.nodes) == {"local.2"}
        assert cluster.plan == {"local.2-0"}


async def test_join_a_scheduler_that_runs(forked: ForkedHosts) -> None:
    async with Scheduler(host="127.0.0.1", dashboard_address=":0", dashboard=False) as scheduler:
        async with AgentCluster(forked(), mode="auto-cpu", scheduler=scheduler.address, asynchronous=True) as cluster:
            assert {str(ws.name) for ws in scheduler.workers.values()} == cluster.plan
            with pytest.raises(LaunchError, match="already registered"):
                await AgentCluster(forked(), scheduler=scheduler.address, asynchronous=True)
        assert scheduler.status is Status.running
        assert not scheduler.workers


async def test_scheduler_launched_as_a_process() -> None:
    async with (
        AgentCluster(scheduler="local", asynchronous=True, security=True, **QUIET) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        assert await client.submit(int, "4") == 4
        report = await cluster.reprovision("uniform", {"nthreads": 2})
        assert report.nodes["local"].new


async def test_no_secret_is_on_a_command_line_or_in_a_repr() -> None:
    async with AgentCluster(asynchronous=True, security=True, **QUIET) as cluster:
        key = cluster.security.tls_worker_key
        secret = key.splitlines()[3]
        for process in psutil.Process().children(recursive=True):
            assert secret not in " ".join(process.cmdline())
        assert secret not in repr(cluster.workers["local"].settings)
        assert secret not in str(await cluster.get_logs(agents=True))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "config", "error", "says"),
    [
        ("auto-gpus", None, ConfigError, "did you mean 'auto-gpu'"),
        ("auto-cpu", {"nthread": 2}, ConfigError, "did you mean 'nthreads'"),
        ("auto-cpu", {"nworkers": 0}, ConfigError, "nworkers"),
        ("auto-cpu", '{"nworkers": ', ConfigError, "JSON"),
        ("uniform", {"nthreads": 10_000}, PreflightError, "10000"),
        ("auto-gpu", None, PreflightError, "no GPU"),
        ("spec", {"spec": {"cls": "no.such.Klass"}}, PreflightError, "no.such.Klass"),
        ("spec", {"spec": {"options": {}}}, ConfigError, "cls"),
    ],
)
async def test_bad_modes_touch_nothing(
    cluster: AgentCluster, client: Client, mode: str, config: Any, error: type[Exception], says: str
) -> None:
    before = await pids(client)
    with pytest.raises(error, match=says.replace(".", r"\.")):
        await cluster.reprovision(mode, config)
    assert await pids(client) == before
    assert cluster.nodes["local"]["mode"] == "auto-cpu"


async def test_workers_that_do_not_start_leave_the_old_ones(cluster: AgentCluster, client: Client) -> None:
    scattered, computed = await _fill(client)
    before = await pids(client)
    bad = {"spec": {"cls": "distributed.Nanny", "options": {"preload": ["no_such_module_at_all"]}}}
    with pytest.raises(SwapError, match=r"no_such_module_at_all.*the workers that ran before still run"):
        await cluster.reprovision("spec", bad)
    assert await pids(client) == before
    assert cluster.plan == set(before)
    assert await _lost(client, scattered, computed) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"hosts": "http://x"}, ConfigError, "unknown scheme 'http'"),
        ({"hosts": ["gpu-1:99999"]}, ConfigError, "port '99999'"),
        ({"mode": "auto-gpus"}, ConfigError, "did you mean 'auto-gpu'"),
        ({"mode": {"nowhere": "auto-cpu"}}, NodeNotFound, "nowhere"),
        ({"on_host_failure": "ignore"}, ConfigError, "'raise' or 'warn'"),
        ({"security": "yes"}, ConfigError, "credentials 'yes': there is no ca.pem"),
        ({"security": 1}, ConfigError, "security=1 must be"),
        ({"launch_timeout": "soon"}, ConfigError, "launch_timeout=…\\) is 'soon'"),
        ({"scheduler": "tcp://127.0.0.1:1", "scheduler_options": {"port": 1}}, ConfigError, "already runs"),
        ({"hosts": ["tcp://127.0.0.1:1"], "security": True}, ConfigError, "without encryption"),
    ],
)
def test_bad_arguments_start_nothing(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        AgentCluster(**arguments)
    assert not [p for p in psutil.Process().children() if "agentcluster.cli" in " ".join(p.cmdline())]


async def test_a_first_mode_that_cannot_be_closes_everything() -> None:
    with pytest.raises(ModeRefused, match="no GPU"):
        await AgentCluster(hosts=here(), mode="auto-gpu", asynchronous=True, **QUIET)


async def test_first_workers_that_do_not_start_close_everything() -> None:
    with pytest.raises(WorkerStartError, match="no_such_module"):
        await AgentCluster(hosts=here(), config={"preload": ["no_such_module"]}, asynchronous=True, **QUIET)


def test_errors_in_a_script_close_everything() -> None:
    with pytest.raises(ModeRefused, match="no GPU"):
        AgentCluster(hosts=here(), mode="auto-gpu", **QUIET)


async def test_a_host_that_fails_can_be_left_out() -> None:
    hosts = [*here(), "tcp://127.0.0.1:9"]
    with pytest.warns(UserWarning, match=r"host 127\.0\.0\.1 is left out"):
        cluster = await AgentCluster(hosts=hosts, on_host_failure="warn", launch_timeout=1, asynchronous=True, **QUIET)
    async with cluster:
        assert list(cluster.workers) == ["local"]
    with pytest.raises(LaunchError, match=r"tcp://127\.0\.0\.1:9"):
        await AgentCluster(hosts=hosts, launch_timeout=1, asynchronous=True, **QUIET)


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


assert NodeExists  # its message is matched above, inside of a LaunchError
