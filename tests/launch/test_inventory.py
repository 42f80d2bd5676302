"""Nodes of a cluster chosen by name, pattern, label and function."""

from __future__ import annotations

from typing import Any

import pytest

from agentcluster import AgentCluster
from agentcluster.errors import ConfigError
from tests.support.inprocess import InProcess, here
from tests.support.plugin import SCHEDULER


async def test_in_a_cluster() -> None:
    one = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}
    hosts = [InProcess(f"box-{rack}", labels={"rack": rack}) for rack in "ab"]
    options: dict[str, Any] = {"asynchronous": True, "scheduler_options": SCHEDULER}
    async with AgentCluster(hosts=[*hosts, *here()], config=one, **options) as cluster:

        def modes() -> dict[str, str]:
            return {name: node["mode"] for name, node in cluster.nodes.items()}

        assert {name: node["labels"] for name, node in cluster.nodes.items()} == {
            "box-a": {"rack": "a"},
            "box-b": {"rack": "b"},
            "local": {},
        }
        await cluster.reprovision("uniform", one, nodes="rack=b")
        assert modes() == {"box-a": "auto-cpu", "box-b": "uniform", "local": "auto-cpu"}
        await cluster.reprovision("uniform", one, nodes=["box-*"])
        assert modes() == {"box-a": "uniform", "box-b": "uniform", "local": "auto-cpu"}
        await cluster.reprovision("auto-cpu", one, nodes=lambda node: node["labels"].get("rack") == "a")
        assert modes() == {"box-a": "auto-cpu", "box-b": "uniform", "local": "auto-cpu"}
        with pytest.raises(ConfigError, match="selects no node"):
            await cluster.reprovision("none", nodes=lambda node: node["hardware"]["cpus"] > 10**6)
