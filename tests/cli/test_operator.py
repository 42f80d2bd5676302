"""The operator's command at its edges: a scheduler of another version, and the rollout that ``top`` draws."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from distributed import LocalCluster
from rich.console import Console

from agentcluster import AgentCluster, AgentClusterError, __version__
from agentcluster.cli.commands import picture
from agentcluster.cli.main import main
from agentcluster.model import RolloutStatus
from agentcluster.scheduler.plugin import AgentPlugin
from agentcluster.wire import PLUGIN, PROTOCOL, to_wire
from tests.support.forked import ForkedHosts
from tests.support.waiting import wait_blocking

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}
TWO = {**ONE, "nworkers": 2}


def run(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--scheduler", address], env={"DASK_SCHEDULER_ADDRESS": ""})


class OtherPlugin(AgentPlugin):
    """Plugin of another version, which counts the calls that it answers."""

    versions: dict[str, Any] = {"protocol": PROTOCOL + 1, "version": "9.9"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.listed = 0

    async def get_provision_mode(self) -> dict[str, Any]:
        self.asked += 1
        answer = dict(await super().get_provision_mode())
        del answer["protocol"], answer["version"]
        return answer | self.versions

    async def get_nodes(self, *args: Any, **kwargs: Any) -> Any:
        self.listed += 1
        return await super().get_nodes(*args, **kwargs)


@pytest.fixture
def plugin() -> OtherPlugin:
    return OtherPlugin()


@pytest.fixture
def address(plugin: OtherPlugin) -> Iterator[str]:
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster:
        cluster.sync(cluster.scheduler.register_scheduler_plugin, plugin, name=PLUGIN, idempotent=True)
        yield cluster.scheduler_address


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (OtherPlugin.versions, f"has agentcluster 9.9 with protocol {PROTOCOL + 1}"),
        ({}, "has another version of agentcluster with protocol None"),
    ],
)
def test_another_protocol_ends_with_3(
    plugin: OtherPlugin, address: str, versions: dict[str, Any], message: str
) -> None:
    plugin.versions = versions
    for arguments in (["nodes"], ["top", "-n", "1"], ["events"], ["logs"], ["scale", "1"], ["reprovision", "none"]):
        result = run(address, *arguments)
        assert result.exit_code == 3
        assert result.stderr.startswith(f"agentcluster: the scheduler at {address} {message}, this command has ")
        assert f"agentcluster {__version__} with protocol {PROTOCOL}; upgrade agentcluster where " in result.stderr
        assert result.stdout == ""
    assert plugin.listed == 0


def test_the_protocol_is_checked_once(plugin: OtherPlugin, address: str) -> None:
    plugin.versions = {"protocol": PROTOCOL, "version": "9.9"}
    assert run(address, "top", "-n", "3", "--interval", "0.1").exit_code == 0
    assert (plugin.asked, plugin.listed) == (1, 3)


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"state": "running"}, "rollout to uniform: running, wave 2 of 3, 4 s"),
        ({"state": "running", "pausing": True}, "rollout to uniform: pauses after wave 2 of 3, 4 s"),
        ({"state": "paused", "pausing": True}, "rollout to uniform: paused before wave 2 of 3, 4 s"),
        ({"state": "back"}, "rollout to uniform: rolling back, 4 s"),
    ],
)
def test_top_names_the_rollout(changes: dict[str, Any], title: str) -> None:
    status = to_wire(RolloutStatus("uniform", seconds=4.2, wave=1, waves=(("a",), ("b", "c"), ("d",)), **changes))
    status["nodes"] = {
        "b": {"step": "retire", "keys": 5, "all_keys": 10, "tasks": 0},
        "c": {"step": "start", "workers": ["c-0"]},
    }
    console = Console(width=100)
    with console.capture() as drawn:
        console.print(picture("tcp://127.0.0.1:8786", {}, status))
    lines = [line.rstrip() for line in drawn.get().splitlines()]
    assert lines[-3:] == [title, "  b  ████░░ 5 of 10 keys moved", "  c  █░░░░░ start"]


def test_top_during_a_rollout(forked: ForkedHosts) -> None:
    options: dict[str, Any] = {"scheduler_options": {"dashboard_address": ":0"}}
    with AgentCluster(hosts=forked(2), config=ONE, **options) as cluster:
        change = threading.Thread(target=cluster.reprovision, args=("uniform", TWO), kwargs={"canary": True})
        change.start()
        try:
            wait_blocking(lambda: pauses(cluster))
            wait_blocking(lambda: "paused before" in run(cluster.scheduler_address, "top", "-n", "1").stdout)
            lines = run(cluster.scheduler_address, "top", "-n", "1").stdout.splitlines()
            (title,) = [line for line in lines if line.startswith("rollout to ")]
            assert title.startswith("rollout to uniform: paused before wave 2 of 2, ")
            assert [line.split()[0] for line in lines[lines.index(title) + 1 :]] == ["local", "local.2"]
        finally:
            cluster.rollout.resume()
            change.join()
        assert "rollout to" not in run(cluster.scheduler_address, "top", "-n", "1").stdout


def pauses(cluster: AgentCluster) -> bool:
    """Pause the rollout; return whether one runs."""
    try:
        cluster.rollout.pause()
    except AgentClusterError:
        return False
    return True
