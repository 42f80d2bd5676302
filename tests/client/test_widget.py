"""The panel in a notebook: what it shows and what its buttons do, without a browser; test_browser.py has one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask
import pytest
from distributed import Client

from agentcluster import AgentCluster, Host
from tests.support.inprocess import InProcess, here
from tests.support.plugin import SCHEDULER
from tests.support.waiting import wait_blocking

ipywidgets = pytest.importorskip("ipywidgets", reason="ipywidgets is not installed (extra 'jupyter')")

SMALL = {"nworkers": 2, "nthreads": 1, "memory_limit": "256MiB"}
OPTIONS: dict[str, Any] = {"config": SMALL, "scheduler_options": SCHEDULER}


class Screen:
    """A panel as who looks at it sees it."""

    def __init__(self, cluster: AgentCluster) -> None:
        self.root = cluster._widget()
        self.header, self.table, tabs = self.root.children
        self.tabs = dict(zip(tabs.titles, tabs.children, strict=True))

    def all(self, tab: str) -> Iterator[Any]:
        def walk(widget: Any) -> Iterator[Any]:
            yield widget
            for child in getattr(widget, "children", ()):
                yield from walk(child)

        return walk(self.tabs[tab])

    def named(self, tab: str, name: str) -> Any:
        (found,) = (each for each in self.all(tab) if getattr(each, "description", None) == name)
        return found

    def says(self, tab: str, *texts: str, timeout: float = 20) -> str:
        """Wait until one thing that a tab says has all the texts."""

        def look() -> str | None:
            said = [each.value for each in self.all(tab) if isinstance(each, ipywidgets.HTML)]
            return next((each for each in said if all(text in each for text in texts)), None)

        return str(wait_blocking(look, timeout))

    def press(self, tab: str, name: str) -> None:
        button = self.named(tab, name)
        wait_blocking(lambda: not button.disabled)
        button.click()


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """Two nodes."""
    return {"hosts": [InProcess("box-1"), InProcess("box-2")], **OPTIONS}


def test_a_change(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    assert screen.root is sync_cluster._widget()
    wait_blocking(lambda: "box-2" in screen.table.value and "auto-cpu" in screen.table.value)
    assert "running, 2 nodes, 4 workers" in screen.header.value
    assert screen.named("Reprovision", "Pause").disabled
    with Client(sync_cluster) as client:
        kept = client.scatter(list(range(100)), hash=False)
        wait_blocking(lambda: "in 100 keys" in screen.table.value or screen.table.value.count("keys") == 2)
        screen.named("Reprovision", "mode").value = "uniform"
        screen.named("Reprovision", "options").value = '{"nthreads": 1, "nworkers": 1, "memory_limit": "300MiB"}'
        screen.named("Reprovision", "nodes").value = "box-*"
        screen.press("Reprovision", "Dry run")
        screen.says("Reprovision", "planned only", "box-2", "on box-*, strategy surge, drain tasks")
        assert {node["mode"] for node in sync_cluster.nodes.values()} == {"auto-cpu"}
        screen.press("Reprovision", "Reprovision")
        assert screen.named("Reprovision", "Reprovision").disabled
        screen.says("Reprovision", "reprovisioning box-* to uniform", timeout=1)
        acted = (
            "uniform {&quot;nthreads&quot;: 1, &quot;nworkers&quot;: 1, &quot;memory_limit&quot;: &quot;300MiB&quot;}"
        )
        screen.says("Reprovision", "uniform: 2 nodes", "changed", "moved", acted, "on box-*")
        wait_blocking(lambda: screen.table.value.count("uniform") == 2)
        screen.press("Reprovision", "Undo")
        screen.says("Reprovision", "undo: 2 nodes", "box-1", "box-2", "auto-cpu")
        wait_blocking(lambda: screen.table.value.count("auto-cpu") == 2)
        assert client.gather(kept) == list(range(100))


def test_it_asks_before_data_is_given_up(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    with Client(sync_cluster) as client:
        kept = client.scatter(list(range(10)), hash=False)
        screen.named("Reprovision", "drain").value = "now"
        screen.named("Reprovision", "options").value = '{"nworkers": 1, "memory_limit": "300MiB"}'
        screen.press("Reprovision", "Reprovision")
        screen.says("Reprovision", "#d64541", "it would give up 10 keys", "Reprovision again does it")
        assert client.gather(kept) == list(range(10))
        screen.press("Reprovision", "Reprovision")
        screen.says("Reprovision", "#d64541", "10 keys", " lost, ")


def test_picked_nodes_are_named(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    (names,) = (each for each in screen.all("Reprovision") if isinstance(each, ipywidgets.SelectMultiple))
    wait_blocking(lambda: names.options == ("box-1", "box-2"))
    names.value = ["box-2"]
    assert screen.named("Reprovision", "nodes").value == "box-2"
    screen.named("Reprovision", "mode").value = "none"
    screen.press("Reprovision", "Reprovision")
    screen.says("Reprovision", "none: 1 node")
    wait_blocking(lambda: sync_cluster.nodes["box-2"]["state"] == "standby")
    assert sync_cluster.nodes["box-1"]["state"] == "ready"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("options", "{nthreads", "JSON"),
        ("options", '{"nthread": 1}', "unknown option"),
        ("nodes", "<b>nowhere</b>", "&lt;b&gt;nowhere"),
    ],
)
def test_what_is_wrong_is_said(sync_cluster: AgentCluster, field: str, value: str, said: str) -> None:
    screen = Screen(sync_cluster)
    screen.named("Reprovision", field).value = value
    screen.press("Reprovision", "Reprovision")
    assert "<b>" not in screen.says("Reprovision", "#d64541", said)
    wait_blocking(lambda: not screen.named("Reprovision", "Reprovision").disabled)
    assert {node["mode"] for node in sync_cluster.nodes.values()} == {"auto-cpu"}


def test_a_rollout_is_watched_and_paused(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    with Client(sync_cluster) as client:
        where = list(sync_cluster.nodes["box-1"]["plan"])[:1]
        sleeping = client.submit(time.sleep, 3, workers=where, allow_other_workers=True, pure=False)
        wait_blocking(lambda: client.processing() and any(client.processing().values()))
        order = sync_cluster.sync(begun, sync_cluster)
        screen.says("Reprovision", "rollout to uniform: running", "box-1")
        button = screen.named("Reprovision", "Pause")
        screen.press("Reprovision", "Pause")
        screen.says("Reprovision", "box-2", "waiting")
        screen.says("Reprovision", "pause: the rollout to uniform on box-1, box-2")
        screen.says("Reprovision", "rollout to uniform: paused")
        assert sync_cluster.nodes["box-2"]["mode"] == "auto-cpu"
        screen.press("Reprovision", "Resume")
        screen.says("Reprovision", "resume: the rollout to uniform on box-1, box-2")
        report = sync_cluster.sync(ended, order)
        assert [node.outcome for node in report.nodes.values()] == ["changed", "changed"]
        wait_blocking(lambda: button.disabled and button.description == "Pause")
        assert sleeping.result() is None


async def begun(cluster: AgentCluster) -> asyncio.Future[Any]:
    config = {"nthreads": 1, "nworkers": 1, "memory_limit": "300MiB"}
    return asyncio.ensure_future(cluster.reprovision("uniform", config, max_parallel=1))


async def ended(order: asyncio.Future[Any]) -> Any:
    return await order


def test_scale(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    screen.says("Scale", "workers now: 4 cpu")
    screen.named("Scale", "workers").value = "1"
    screen.press("Scale", "Scale")
    screen.says("Scale", "scale(1): 1 worker, 2 nodes changed")
    screen.says("Scale", "workers now: 1 cpu")
    screen.named("Scale", "cpu workers").value = "3"
    screen.press("Scale", "Scale kinds")
    screen.says("Scale", "scale(cpu=3): 3 workers")
    screen.says("Scale", "workers now: 3 cpu")
    for text in ("", "many", "-1"):
        screen.named("Scale", "workers").value = text
        screen.press("Scale", "Scale")
        screen.says("Scale", "is not a whole number")
    screen.named("Scale", "cpu workers").value = ""
    screen.press("Scale", "Scale kinds")
    screen.says("Scale", "enter the number of workers of a kind")


@pytest.mark.filterwarnings("ignore:scale")
def test_scale_beyond_what_there_is(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    screen.named("Scale", "workers").value = "99"
    screen.press("Scale", "Scale")
    screen.says("Scale", "scale(99): 4 workers", "room for 4 workers")


def test_adapt(sync_cluster: AgentCluster) -> None:
    screen = Screen(sync_cluster)
    screen.named("Adapt", "minimum").value = "1"
    screen.named("Adapt", "maximum").value = "2"
    screen.press("Adapt", "Adapt")
    screen.says("Adapt", "adapting: minimum 1, maximum 2")
    screen.says("Adapt", "<td>begins</td>")
    wait_blocking(lambda: sum(len(node["plan"]) for node in sync_cluster.nodes.values()) <= 2, 30)
    screen.press("Adapt", "Stop")
    screen.says("Adapt", "not adapting: stopped, ", " there")
    screen.press("Adapt", "Stop")
    screen.says("Adapt", "not adapting: it did not run")
    assert sync_cluster._adaptive.state == "stopped"


def test_logs() -> None:
    hosts = [InProcess("box-1"), Host("local", name="box-2")]  # only a process has a log of its own
    with AgentCluster(hosts=hosts, mode="none", scheduler_options=SCHEDULER) as cluster:
        screen = Screen(cluster)
        wait_blocking(lambda: screen.named("Logs", "node").options == ("box-1", "box-2"))
        screen.named("Logs", "node").value = "box-2"
        screen.press("Logs", "Show")
        screen.says("Logs", "log of box-2, all of it", "<pre>")


def test_a_closed_cluster_says_so() -> None:
    with AgentCluster(hosts=here(), **OPTIONS) as cluster:
        screen = Screen(cluster)
        wait_blocking(lambda: "running" in screen.header.value)
    assert "closed" in screen.header.value
    assert all(each.disabled for each in screen.all("Reprovision") if isinstance(each, ipywidgets.Button))


def test_a_panel_that_is_first_shown_when_the_cluster_is_closed() -> None:
    with AgentCluster(hosts=here(), **OPTIONS) as cluster:
        pass
    screen = Screen(cluster)
    assert "closed" in screen.header.value
    assert screen.named("Scale", "Scale").disabled


def test_a_lost_scheduler_is_said() -> None:
    dask.config.set({"distributed.comm.timeouts.connect": "1s"})
    with AgentCluster(scheduler="local", **{**OPTIONS, "scheduler_options": {"dashboard": False}}) as cluster:
        screen = Screen(cluster)
        wait_blocking(lambda: "running, 1 node" in screen.header.value)
        os.kill(cluster.scheduler.launched.ready.pid, signal.SIGKILL)
        wait_blocking(lambda: "cannot reach the scheduler" in screen.header.value, 30)
        assert "auto-cpu" in screen.table.value
        screen.press("Reprovision", "Reprovision")
        screen.says("Reprovision", "#d64541", timeout=30)


def test_without_ipywidgets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("agentcluster.client.widget")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with AgentCluster(hosts=here(), **OPTIONS) as cluster:
        assert cluster._widget() is None
        assert "auto-cpu" in cluster._repr_html_()
        assert "nodes=1, workers=2" in repr(cluster)
