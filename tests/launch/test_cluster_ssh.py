"""AgentCluster on hosts that are reached by SSH: the whole job, over asyncssh's own server and OpenSSH's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import psutil
import pytest
from distributed import Client, futures_of, wait

from agentcluster import AgentCluster, Host
from agentcluster.errors import LaunchError, LaunchTimeout, ModeRefused
from tests.support.ssh_servers import SSHServer
from tests.support.waiting import wait_until

LOOPBACK = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}


def on(server: SSHServer, **more: Any) -> AgentCluster:
    options = {"connect_options": server.connect_options, "scheduler_options": LOOPBACK, "asynchronous": True}
    return AgentCluster(**{"hosts": [server.address, server.address], **options, **more})


async def test_the_main_job(server: SSHServer) -> None:
    """Two hosts, a real dask.array job, to `uniform` and back with the persisted result in memory, and closed."""
    config = {"nworkers": 1, "nthreads": 2}
    async with on(server, config=config) as cluster, Client(cluster, asynchronous=True) as client:
        assert list(cluster.nodes) == ["127.0.0.1", "127.0.0.1.2"]
        assert cluster.scheduler_address.startswith("tls://")
        assert cluster.observed == cluster.plan == {"127.0.0.1-0", "127.0.0.1.2-0"}
        x = client.persist(da.random.default_rng(1).random((1000, 1000), chunks=(200, 200)))
        await wait(x)
        expected = await client.compute(x.sum())
        keys = {future.key for future in futures_of(x)}
        assert len(keys) == 25
        for mode, options in (("uniform", {"nthreads": 1}), ("auto-cpu", config)):
            report = await cluster.reprovision(mode, options)
            assert report.keys == 25
            assert set(report.nodes) == {"127.0.0.1", "127.0.0.1.2"}
            assert {cluster.scheduler.tasks[key].state for key in keys} == {"memory"}
        assert await client.compute(x.sum()) == expected
        agents = [node.launched.ready.pid for node in cluster.workers.values()]
        for pid in agents:
            command = psutil.Process(pid).cmdline()
            # one that was forked shows what it was forked from
            assert command[1:] in (["-m", "agentcluster.cli.launched"], ["-m", "tests.support.zygote"])
        assert "registered to" in (await cluster.get_logs(agents=True))["127.0.0.1.2"]
    await wait_until(lambda: not any(map(psutil.pid_exists, agents)), timeout=5)


async def test_a_dead_connection_ends_the_agents(server: SSHServer) -> None:
    async with on(server, config={"nworkers": 1}) as cluster:
        agents = [node.launched.ready.pid for node in cluster.workers.values()]
        server.kill()
        await wait_until(lambda: not any(map(psutil.pid_exists, agents)), timeout=5)
        await wait_until(lambda: [node["state"] for node in cluster.nodes.values()] == ["lost", "lost"])
        assert "its agent ended" in repr(cluster.nodes)
        assert not cluster.scheduler.workers


async def test_the_environment_of_a_host(server: SSHServer) -> None:
    host = Host(server.host, user=server.username, port=server.port, name="special", env={"SPECIAL": "yes"})
    async with on(server, hosts=[host]) as cluster, Client(cluster, asynchronous=True) as client:
        assert set((await client.run(lambda: __import__("os").environ.get("SPECIAL"))).values()) == {"yes"}
        assert {name.rpartition("-")[0] for name in cluster.plan} == {"special"}


async def test_the_configuration_of_the_launching_process_and_of_a_host(server: SSHServer, tmp_path: Path) -> None:
    """What the launching process sets goes first; what it leaves at the default is as the host's own files have it."""
    there = tmp_path / "dask.yaml"
    there.write_text("distributed: {worker: {resources: {GPU: 2, DISK: 3}, profile: {interval: 25ms}}, nanny: {x: 1}}")
    python = f"{Path(sys.executable).parent}/./{Path(sys.executable).name}"  # one that is forked has read its files
    host = Host(server.host, user=server.username, port=server.port, name="box", remote_python=python)
    host = dataclasses.replace(host, env={"DASK_CONFIG": str(there)})
    keys = ["distributed.worker.profile.interval", "distributed.worker.profile.cycle", "distributed.nanny.x"]
    here = {"distributed.worker.resources": {"GPU": 5, "FAST": 1}, "distributed.worker.profile.cycle": "700ms"}
    config = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}
    with dask.config.set(here):
        async with on(server, hosts=[host], config=config) as cluster, Client(cluster, asynchronous=True) as client:
            (worker,) = cluster.scheduler.workers.values()
            assert worker.resources == {"CPU": 1, "GPU": 5, "FAST": 1, "DISK": 3}
            seen = await client.submit(lambda: [dask.config.get(key) for key in keys])
            assert seen == ["25ms", "700ms", 1]


async def test_scheduler_on_a_host(server: SSHServer) -> None:
    async with (
        on(server, hosts=[server.address], scheduler=server.address) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert await client.submit(int, "5") == 5
        await cluster.reprovision("uniform", {"nthreads": 2})
        assert await client.submit(int, "6") == 6


async def test_a_list_of_connect_options(server: SSHServer) -> None:
    """Each is of one of the first hosts; the scheduler's is that of its host, and later hosts bring their own."""
    options = [server.connect_options, {**server.connect_options, "client_keys": ["/no/such/key"]}]
    async with on(server, hosts=[server.address], connect_options=options[:1], scheduler=server.address) as cluster:
        later = Host(server.host, user=server.username, port=server.port)
        known = dataclasses.replace(later, name="known", connect_options=server.connect_options)
        assert await cluster.add_host(known) == "known"
        with pytest.raises(LaunchError, match=r"Permission denied|not trusted"):
            await cluster.add_host(dataclasses.replace(later, name="unknown"))
    with pytest.raises(LaunchError, match="/no/such/key"):
        await on(server, connect_options=options)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"hosts": ["nobody@127.0.0.1:1"]}, LaunchError, r"nobody@127\.0\.0\.1:1 .*refused.*another port"),
        ({"hosts": ["no-such-host.invalid"]}, LaunchError, r"no-such-host\.invalid"),
        ({"remote_python": "/no/such/python"}, LaunchError, r"/no/such/python.*remote_python"),
        ({"mode": "auto-gpu"}, ModeRefused, "no GPU"),
        ({"launch_timeout": "50ms"}, LaunchTimeout, r"within 0\.05 s"),
    ],
)
async def test_what_is_wrong_is_said_and_nothing_stays(
    server: SSHServer, wrong: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await on(server, **wrong)


async def test_a_wrong_key(server: SSHServer, tmp_path: Path) -> None:
    import asyncssh

    asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "wrong")
    options = {**server.connect_options, "client_keys": [str(tmp_path / "wrong")]}
    with pytest.raises(LaunchError, match="client_keys"):
        await on(server, connect_options=options)


async def test_one_wrong_host_among_good_ones(server: SSHServer) -> None:
    hosts = [server.address, Host(server.host, user=server.username, port=server.port, remote_python="/bin/false")]
    with pytest.raises(LaunchError, match="exit code 1"):
        await on(server, hosts=hosts)
    with pytest.warns(UserWarning, match="is left out"):
        async with on(server, hosts=hosts, on_host_failure="warn") as cluster:
            assert list(cluster.nodes) == ["127.0.0.1"]
