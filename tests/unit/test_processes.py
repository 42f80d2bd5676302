"""Entries of a cluster: what is launched, with which settings, and what they show of themselves."""

from __future__ import annotations

import pytest
from distributed import Scheduler
from distributed.security import Security

from agentcluster import ConfigError, Host
from agentcluster.client.processes import Blueprint, JoinedScheduler, LaunchedProcess, NodeProcess

BLUEPRINT = Blueprint(
    security=Security(),
    worker_options={"resources": {"A": 1}, "env": {"TOKEN": "hunter2"}},
    launch_options={"connect_options": {"password": "hunter2"}},
    launch_timeout=60.0,
    stop_timeout=5.0,
)


def test_a_node() -> None:
    entry = BLUEPRINT.node(BLUEPRINT.launcher(Host("local", name="box", labels={"rack": "a"})))
    node = entry["cls"]("tcp://127.0.0.1:8786", **entry["options"])
    assert isinstance(node, NodeProcess)
    assert repr(node) == "<Node 'box' on local: created>"
    assert (node.settings.scheduler, node.settings.name, node.settings.role) == ("tcp://127.0.0.1:8786", "box", "agent")
    assert node.settings.options["labels"] == {"rack": "a"}
    assert node.settings.options["resources"] == {"A": 1}
    assert (entry["group"], node.lines(), node.ended) == ([], [], False)


def test_schedulers() -> None:
    here = BLUEPRINT.scheduler(None, {"port": 0})
    assert here["cls"] is Scheduler
    assert here["options"] == {"security": BLUEPRINT.security, "port": 0}
    launched = BLUEPRINT.scheduler("gpu-1", {})
    process = launched["cls"](**launched["options"])
    assert isinstance(process, LaunchedProcess)
    assert repr(process) == "<Scheduler on gpu-1: created>"
    joined = BLUEPRINT.scheduler("tcp://10.0.0.1:8786", {})
    assert repr(joined["cls"](**joined["options"])) == "<Scheduler at tcp://10.0.0.1:8786, started by others>"
    assert joined["cls"] is JoinedScheduler
    with pytest.raises(ConfigError, match="it already runs"):
        BLUEPRINT.scheduler("tcp://10.0.0.1:8786", {"port": 1})


def test_a_secret_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(BLUEPRINT)
