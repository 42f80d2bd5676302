"""Types of what users call, as mypy sees them: on a synchronous cluster, and on an asynchronous one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import agentcluster

CHECKOUT = Path(agentcluster.__file__).parents[1]

USE = """
from collections.abc import Awaitable, Coroutine
from typing import Any, Literal, assert_type

from distributed import Adaptive
from distributed.utils import Logs

from agentcluster import AgentCluster, Host, Mode
from agentcluster.client.adaptive import AgentAdaptive
from agentcluster.client.rollouts import RolloutControl
from agentcluster.client.scaling import Request
from agentcluster.model import NodeProgress, RolloutStatus
from agentcluster.reports import AdaptiveLog, Decision, Nodes, RolloutReport, ScaleReport


class Mine(Adaptive):
    pass


def synchronous() -> None:
    cluster = AgentCluster(["gpu-1", Host("gpu-2")], mode={"gpu-1": "auto-gpu", "gpu-2": Mode("none")})
    assert_type(cluster, AgentCluster[Literal[False]])
    assert_type(cluster.nodes, Nodes)
    assert_type(cluster.standby, tuple[str, ...])
    assert_type(cluster.refresh(), Nodes)
    assert_type(cluster.reprovision("uniform", {"nthreads": 1}, nodes=lambda node: True), RolloutReport)
    assert_type(cluster.rollout, RolloutControl[Literal[False]])
    assert_type(cluster.rollout.undo(), RolloutReport)
    assert_type(cluster.rollout.status(), RolloutStatus | None)
    assert_type(cluster.rollout_status(), RolloutStatus | None)
    if status := cluster.rollout.status():
        assert_type(status.nodes["gpu-1"], NodeProgress)
    assert_type(cluster.scale(4, strict=True), ScaleReport)
    assert_type(cluster.scale(gpu=4).short, str | None)
    assert_type(cluster.add_host("gpu-3"), str)
    assert_type(cluster.get_logs(agents=True), Logs)
    assert_type(cluster.request(gpu=4), Request)
    assert_type(cluster.adaptive_log(), AdaptiveLog)
    assert_type(cluster.adaptive_log()[0], Decision)
    assert_type(cluster.adaptive_log()[:2], AdaptiveLog)
    assert_type(cluster.adapt(minimum=1, gpu=(0, 2)), AgentAdaptive)
    assert_type(cluster.adapt(Mine, minimum=1), Mine)
    assert_type(cluster.adapt(worker_key=lambda worker: worker.host), Adaptive)
    with cluster.request(cpu=1) as request, AgentCluster() as other:
        assert_type(request, Request)
        assert_type(other, AgentCluster[Literal[False]])
    cluster.rollout.pause()
    cluster.remove_host("gpu-3")
    cluster.close()


def annotated(cluster: AgentCluster) -> ScaleReport:
    return cluster.scale(1)


async def asynchronous() -> None:
    cluster = await AgentCluster(asynchronous=True)
    assert_type(cluster, AgentCluster[Literal[True]])
    assert_type(cluster.nodes, Nodes)
    assert_type(await cluster.refresh(), Nodes)
    change = assert_type(cluster.reprovision("uniform"), Coroutine[Any, Any, RolloutReport])
    assert_type(await change, RolloutReport)
    assert_type(cluster.rollout, RolloutControl[Literal[True]])
    assert_type(await cluster.rollout.undo(), RolloutReport)
    assert_type(await cluster.rollout.status(), RolloutStatus | None)
    assert_type(await cluster.rollout_status(), RolloutStatus | None)
    assert_type(await cluster.scale(4), ScaleReport)
    assert_type(await cluster.add_host("gpu-3"), str)
    assert_type(await cluster.get_logs(), Logs)
    assert_type(cluster.adapt(minimum=1), AgentAdaptive)
    async with cluster.request(cpu=1) as request, AgentCluster(asynchronous=True) as other:
        assert_type(request, Request)
        assert_type(other, AgentCluster[Literal[True]])
    await cluster.rollout.pause()
    await cluster.remove_host("gpu-3")
    assert_type(cluster.close(), Awaitable[None])


def either(asynchronous: bool) -> None:
    cluster = AgentCluster(asynchronous=asynchronous)
    report = assert_type(cluster.scale(1), ScaleReport | Awaitable[ScaleReport])
    print(report)
"""

WRONG = """
from agentcluster import AgentCluster


async def forgets_to_wait() -> None:
    cluster = AgentCluster(asynchronous=True)
    cluster.rollout.pause()  # unused-coroutine


def calls_wrongly() -> None:
    cluster = AgentCluster(n_workers=4)  # arg-type
    cluster.reprovision("uniform", strategy="slow")  # arg-type
    cluster.remove_host(nam="gpu-1")  # call-arg
    cluster.scale("4")  # arg-type
    cluster.rollout.status().nodes  # union-attr
"""


@pytest.mark.types
@pytest.mark.timeout(300)
def test_types_of_calls(tmp_path: Path) -> None:
    """One run of mypy, after that of the lint step, which leaves what it knows of dask."""
    paths = []
    for name, program in (("use.py", USE), ("wrong.py", WRONG)):
        paths.append(tmp_path / name)
        paths[-1].write_text(program)
    # In the checkout, so that what mypy knows from an earlier run, such as that of the lint step, is used.
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *map(str, paths)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    found = re.findall(r"(use|wrong)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    marked = [
        (number, line.rpartition("  # ")[2]) for number, line in enumerate(WRONG.splitlines(), 1) if "  # " in line
    ]
    assert found == [("wrong", str(number), code) for number, code in marked], done.stdout
