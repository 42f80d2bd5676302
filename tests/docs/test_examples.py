"""The examples that the docs tell, run as they stand there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from distributed import Client

from agentcluster import AgentCluster
from agentcluster.launch.local import LocalLauncher
from tests.support import nvml
from tests.support.programs import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pinned(directory: Path, cores: int) -> str:
    """Return a Python that sees only so many cores: a machine that is smaller than this one."""
    mine = sorted(os.sched_getaffinity(0))
    path = directory / f"python-{cores}"
    path.write_text(f'#!/bin/sh\nexec taskset -c {",".join(map(str, mine[:cores]))} {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def threads(cluster: AgentCluster) -> dict[str, list[int]]:
    """Return node -> threads of its workers, in order."""
    plans = {name: node["plan"].values() for name, node in cluster.nodes.items()}
    return {name: sorted(spec["nthreads"] for spec in plan) for name, plan in plans.items()}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nodes are unequal only on two cores or more")
def test_shapes(tmp_path: Path) -> None:
    shapes: Any = example("shapes")
    hosts = ["local", *(LocalLauncher(name, python=pinned(tmp_path, 1)) for name in ("one", "other"))]
    options = {"scheduler_options": {"dashboard_address": ":0"}, "config": {"nworkers": 1}}
    with AgentCluster(hosts=hosts, **options) as cluster, Client(cluster) as client:
        kept = client.scatter(list(range(30)), hash=False)
        shapes.unlike_workers(cluster, "local")
        assert threads(cluster)["local"] == [1, 1, 1, 1, 16]
        assert sum(client.gather(client.map(lambda x: x, range(60), pure=False))) == sum(range(60))
        shapes.workers_alike(cluster)
        cores = cluster.nodes["local"]["hardware"]["cpus"]
        assert threads(cluster) == {"local": [1] * cores, "one": [1], "other": [1]}
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert {(each["nthreads"], each["memory_limit"]) for each in workers} == {(1, 2**29)}
        assert client.gather(kept) == list(range(30))


@pytest.mark.gpu_stub
def test_a_day(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
    library = nvml.build(tmp_path_factory.getbasetemp() / "nvml")
    environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environ |= {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__DASHBOARD__ENABLED": "False"}
    environ |= nvml.environ(library=library, gpus=2)
    with open(tmp_path / "stderr", "w") as stderr:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "day.py")],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, (tmp_path / "stderr").read_text()[-3000:]
    rows = done.stdout.splitlines()
    workers = [row.split("  ")[-1].strip() for row in rows[1:]]
    assert workers[0] == "4 cpu"
    assert any("gpu" in each for each in workers)
    assert workers[-1] == "1 cpu"
    assert any("auto-gpu" in row and "'train' tasks need GPU=1" in row for row in rows)
    assert "<svg" in (tmp_path / "day.svg").read_text()
