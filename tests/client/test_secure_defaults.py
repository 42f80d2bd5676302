"""What a cluster opens to others, and what it shows, unless it is told otherwise."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import urllib.request
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client

from agentcluster import AgentCluster, AgentClusterError, ConfigError, Host, LaunchError, Mode
from tests.support.forked import ForkedHosts, ForkedLauncher
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER
from tests.support.zygote import Zygote

ONE: dict[str, Any] = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}
ELSEWHERE = "tcp://192.0.2.1:8790"


def listening() -> dict[tuple[str, int], int]:
    """Return address and port -> process, of all that this process and those below it listen at."""
    me = psutil.Process()
    found = {}
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    found[(each.laddr.ip, each.laddr.port)] = process.pid
    return found


def opened(before: dict[tuple[str, int], int]) -> set[str]:
    return {ip for ip, port in listening() if (ip, port) not in before}


@pytest.mark.parametrize("scheduler", [None, "local"])
@pytest.mark.parametrize("security", [None, True])
async def test_on_one_machine_all_listen_on_loopback(
    forked: ForkedHosts, scheduler: str | None, security: bool | None
) -> None:
    before = listening()
    options: Any = {"config": ONE, "scheduler": scheduler, "security": security, "asynchronous": True}
    async with AgentCluster(forked(), **options) as cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(abs, -1) == 1
        assert opened(before) == {"127.0.0.1"}


async def test_http_beside_tls_is_on_loopback(forked: ForkedHosts) -> None:
    before = listening()
    options: Any = {"config": ONE, "security": True, "asynchronous": True, "scheduler_options": {"host": "0.0.0.0"}}
    async with AgentCluster(forked(), **options) as cluster:
        services = [*cluster.scheduler.services.values()]
        ports = {server.port for server in services}
        ports |= {port for ws in cluster.scheduler.workers.values() for port in ws.services.values()}
        assert len(ports) == 2
        assert {ip for ip, port in listening() if port in ports and (ip, port) not in before} == {"127.0.0.1"}
        link = cluster.dashboard_link
        assert link == f"http://127.0.0.1:{cluster.scheduler.http_server.port}/status"
        assert cluster.dashboard_problem is None


@pytest.mark.parametrize("scheduler", [None, "local"])
def test_the_link_of_the_dashboard_answers_here(forked: ForkedHosts, scheduler: str | None) -> None:
    with AgentCluster(forked(), mode="none", scheduler=scheduler, security=True) as cluster:
        link = cluster.dashboard_link
        assert link is not None
        with urllib.request.urlopen(link, timeout=10) as answer:
            assert answer.status == 200
    assert cluster.dashboard_link is None


async def test_dashboard_address_says_otherwise(forked: ForkedHosts) -> None:
    options: Any = {"config": ONE, "security": True, "asynchronous": True}
    async with AgentCluster(forked(), scheduler_options={"dashboard_address": "0.0.0.0:0"}, **options) as cluster:
        assert cluster.scheduler.http_server.address == "0.0.0.0"


# -- other machines ----------------------------------------------------------------------------------------------------


def test_an_agent_elsewhere_without_tls_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:8790 is reached without .*--credentials DIR .*security=False"):
        AgentCluster([ELSEWHERE])
    with pytest.raises(ConfigError, match=r"has credentials of its own.*security=DIR"):
        AgentCluster(["tls://192.0.2.1:8790"])


async def test_without_tls_by_name() -> None:
    with pytest.raises(LaunchError, match=r"192\.0\.2\.1"):
        await AgentCluster([ELSEWHERE], security=False, launch_timeout=0.5, asynchronous=True)


@pytest.mark.parametrize("host", ["gpu-1", ELSEWHERE, "tls://192.0.2.1:8790", Host("gpu-1", standby=True)])
async def test_a_host_elsewhere_cannot_come_later_without_tls(host: Any) -> None:
    async with AgentCluster(here(), mode="none", scheduler_options=SCHEDULER, asynchronous=True) as cluster:
        with pytest.raises(ConfigError, match=r"this cluster listens on this one alone.*security=True"):
            await cluster.add_host(host)
        assert list(cluster.worker_spec) == ["local"]


# -- secrets -----------------------------------------------------------------------------------------------------------


async def test_values_of_environment_variables_are_not_shown(zygote: Zygote) -> None:
    secret = "of-nobody-else"
    env = {"PASSWORD": secret}
    mode = {
        "local": Mode("auto-cpu", {**ONE, "env": env}),
        "b": Mode("spec", {"spec": {"cls": "distributed.Nanny", "opts": {"nthreads": 1, "env": env}}}),
    }
    hosts = [*here(), ForkedLauncher("b", zygote, env=env)]
    options: Any = {"worker_options": {"env": env}, "scheduler_options": SCHEDULER, "asynchronous": True}
    async with AgentCluster(hosts, mode=mode, **options) as cluster, Client(cluster, asynchronous=True) as client:
        assert set((await client.run(os.getenv, "PASSWORD")).values()) == {secret}
        nodes = await client.scheduler.get_nodes()
        assert nodes["local"]["config"]["env"] == {"PASSWORD": "…"}
        shown = [json.dumps(nodes), repr(cluster.worker_spec), repr(mode), repr(cluster.nodes), cluster._repr_html_()]
        shown += [
            repr(cluster.workers["b"]),
            repr(cluster.workers["b"].settings),
            str(await cluster.get_logs(agents=True)),
        ]
        registry = cluster.scheduler.extensions["agentcluster"].registry
        shown += [repr(node) for node in registry.nodes.values()]
        report = await cluster.reprovision("auto-cpu", {**ONE, "env": env}, nodes=["local"])
        shown += [repr(report), report._repr_html_(), repr(report.nodes)]
        with pytest.raises(ConfigError) as caught:
            await cluster.reprovision("auto-cpu", {"env": {"PASSWORD": [secret]}})
        shown.append(str(caught.value))
        shown.append(str(await client.get_events("agentcluster")))
        assert [text for text in shown if secret in text] == []


async def test_names_are_text_in_html(zygote: Zygote) -> None:
    name = "<img src=x onerror=alert(1)>"
    hosts = [ForkedLauncher(name, zygote)]
    options: Any = {"config": ONE, "scheduler_options": SCHEDULER, "asynchronous": True, "name": "<b>mine"}
    async with AgentCluster(hosts, **options) as cluster:
        assert name in cluster.nodes
        html = cluster._repr_html_()
        assert "<img" not in html
        assert "<b>mine" not in html
        assert "&lt;img src=x" in html


async def test_no_secret_is_shown(zygote: Zygote, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """One marked secret in each place that takes one, and all that is shown of the cluster."""
    caplog.set_level(logging.DEBUG)
    marks = [f"of-nobody-else-{number:02}-" for number in range(12)]
    host, launcher, workers, mode, spec, password, passphrase, config, argv, labels, file, scheduler = marks
    (tmp_path / "secret").write_text(file)
    hosts = [
        ForkedLauncher("a", zygote, env={"TOKEN": launcher}),
        *here(),
        Host("gpu-1", env={"TOKEN": host}, connect_options={"password": password}, standby=True),
        Host("gpu-2", connect_options={"passphrase": passphrase, "client_keys": [str(tmp_path)]}, standby=True),
    ]
    modes = {
        "a": Mode("auto-cpu", {**ONE, "env": {"TOKEN": mode}}),
        "local": Mode("spec", {"spec": {"cls": "distributed.Nanny", "opts": {"nthreads": 1, "env": {"TOKEN": spec}}}}),
    }
    options: Any = {
        "worker_options": {"env": {"OTHER": workers}, "preload_argv": [argv]},
        "scheduler_options": {**SCHEDULER, "preload_argv": [scheduler]},
        "security": True,
        "asynchronous": True,
    }
    with dask.config.set({"of-a-user": {"password": config, "labels": [labels]}}):
        async with AgentCluster(hosts, mode=modes, **options) as cluster, Client(cluster, asynchronous=True) as client:
            assert set((await client.run(os.getenv, "TOKEN")).values()) == {mode, spec}
            assert set((await client.run(dask.config.get, "of-a-user.password")).values()) == {config}
            nodes = await client.scheduler.get_nodes()
            report = await cluster.reprovision("auto-cpu", {**ONE, "env": {"TOKEN": mode}}, nodes=["local"])
            with pytest.raises(AgentClusterError) as caught:
                await cluster.reprovision("spec", {"spec": {"cls": "no.such.Nanny", "env": {"TOKEN": spec}}})
            shown = [json.dumps(nodes), repr(cluster), repr(cluster.worker_spec), repr(modes), cluster._repr_html_()]
            shown += [repr(each) for each in (*hosts, cluster.hosts, cluster.hosts.reserve, cluster.scaling)]
            shown += [repr(cluster.workers["a"]), repr(cluster.workers["a"].settings), repr(cluster.security)]
            shown += [str(await cluster.get_logs(agents=True)), str(await client.get_events("agentcluster"))]
            shown += [repr(report), report._repr_html_(), str(caught.value), repr(cluster.nodes)]
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    shown.append(" ".join(process.cmdline()))
            key = cluster.security.tls_worker_key.splitlines()[3]
    shown += [record.getMessage() for record in caplog.records]
    assert [(mark, text[:300]) for text in shown for mark in (*marks, key) if mark in text] == []
