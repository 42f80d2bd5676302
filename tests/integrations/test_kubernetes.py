"""The Kubernetes operator of dask with dask-agent in its worker pods: its manifests, its own functions, no Kubernetes.

What a pod would run is run here, as a process, with the command line and the environment that the operator gives it.
What the operator does to a cluster is done by its own code, which is told where the scheduler is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from distributed import Client, Scheduler

from tests.support.managed import SCHEDULER, Work, clean, names, reprovision, there, workers
from tests.support.programs import Program, Start, gone
from tests.support.waiting import wait_until

pytestmark = pytest.mark.deploy
pytest.importorskip("dask_kubernetes", reason="dask-kubernetes is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

CRDS = "operator/deployment/helm/dask-kubernetes-operator/crds"
COMMAND = "dask-agent --nthreads 1 --memory-limit 300MiB"
GROUP = "simple-default"


def manifest(worker_command: str | list[str] = COMMAND, **options: Any) -> dict[str, Any]:
    """Return a cluster as the operator reads it back: without what is null, as Kubernetes stores it."""
    from dask_kubernetes.operator import make_cluster_spec

    made = make_cluster_spec(name="simple", worker_command=worker_command, **options)
    return dict(_without_null(json.loads(json.dumps(made))))


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list) else value


def pod_of(cluster: dict[str, Any], uuid: str) -> dict[str, Any]:
    """Return the one container of a worker, made by the operator's own function."""
    from dask_kubernetes.operator.controller.controller import build_worker_deployment_spec

    deployment = build_worker_deployment_spec(
        worker_group_name=GROUP,
        namespace="default",
        cluster_name=cluster["metadata"]["name"],
        uuid=uuid,
        pod_spec=cluster["spec"]["worker"]["spec"],
        annotations={},
        labels={},
    )
    assert deployment["metadata"]["name"] == f"{GROUP}-worker-{uuid}"
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


def process_of(container: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return command line and environment, with ``$(NAME)`` replaced as Kubernetes does."""
    environ = {each["name"]: each["value"] for each in container["env"]}
    assert "command" not in container  # the image's entry point runs the arguments
    line = [re.sub(r"\$\((\w+)\)", lambda found: environ[found[1]], each) for each in container["args"]]
    return line, environ


# -- the manifest ------------------------------------------------------------------------------------------------------


def schema(name: str) -> dict[str, Any]:
    """Return the operator's own schema of a resource."""
    text = files("dask_kubernetes").joinpath(f"{CRDS}/{name}.yaml").read_text()
    (version,) = yaml.safe_load(text)["spec"]["versions"]
    return dict(version["schema"]["openAPIV3Schema"])


def unknown(schema: dict[str, Any], value: Any, place: str = "") -> Iterator[str]:
    """Yield what the schema has no place for, which Kubernetes drops without a word."""
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from unknown(schema.get("items", {}), each, f"{place}[{number}]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    for key, each in value.items():
        known = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
        if known is None:
            yield f"{place}.{key}"
        elif known is not True:
            yield from unknown(known, each, f"{place}.{key}")


@pytest.mark.parametrize("command", [COMMAND, COMMAND.split(), "dask-agent"], ids=["string", "list", "shortest"])
def test_manifest_fits_the_operators_schema(command: str | list[str]) -> None:
    resources = {"limits": {"memory": "4Gi", "cpu": "2"}}
    cluster = manifest(command, n_workers=2, env={"EXTRA_PIP_PACKAGES": "agentcluster"}, resources=resources)
    found = schema("daskcluster")
    jsonschema.validate(cluster, found)
    # what every resource has is not in the schema of one
    assert list(unknown(found, {"spec": cluster["spec"]})) == []
    (container,) = cluster["spec"]["worker"]["spec"]["containers"]
    assert container["args"] == [
        *(command.split() if isinstance(command, str) else command),
        *("--name", "$(DASK_WORKER_NAME)", "--dashboard", "--dashboard-address", "8788"),
    ]


def test_schema_finds_what_is_wrong() -> None:
    found = schema("daskcluster")
    wrong = manifest(n_workers=2)
    wrong["spec"]["worker"]["replicas"] = "two"
    with pytest.raises(jsonschema.ValidationError, match="'two' is not of type 'integer'"):
        jsonschema.validate(wrong, found)
    wrong["spec"]["worker"]["spec"]["containers"][0]["arguments"] = []
    assert list(unknown(found, {"spec": wrong["spec"]})) == [".spec.worker.spec.containers[0].arguments"]


def test_worker_pod() -> None:
    line, environ = process_of(pod_of(manifest("dask-agent"), "0123456789"))
    assert environ == {
        "DASK_WORKER_NAME": "simple-default-worker-0123456789",
        "DASK_SCHEDULER_ADDRESS": "tcp://simple-scheduler.default.svc.cluster.local:8786",
    }
    expected = ["--name", "simple-default-worker-0123456789", "--dashboard", "--dashboard-address", "8788"]
    assert line == ["dask-agent", *expected]


# -- pods as processes -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["http", "rpc"])
def scheduler_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A scheduler with the HTTP calls that the operator tries first, or without, as is dask's default."""
    if request.param == "http":
        routes = dask.config.get("distributed.scheduler.http.routes")
        dask.config.set({"distributed.scheduler.http.routes": [*routes, "distributed.http.scheduler.api"]})
    return SCHEDULER


@pytest.fixture
def operator(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the operator's code, which finds the scheduler here in place of by Kubernetes."""
    from dask_kubernetes.operator.controller import controller

    async def find(name: str, namespace: str, port_name: str = "tcp-comm", allow_external: bool = True) -> str:
        assert (name, namespace) == ("simple-scheduler", "default")
        if port_name == "tcp-comm":
            return scheduler.address
        return f"http://127.0.0.1:{scheduler.http_server.port}"

    monkeypatch.setattr(controller, "get_scheduler_address", find)
    return controller


async def scale_down(operator: Any, count: int = 1) -> list[str]:
    """Do what the operator does when a group is to have fewer workers; return the deployments that it deletes then."""
    return list(
        await operator.retire_workers(
            n_workers=count,
            scheduler_service_name="simple-scheduler",
            worker_group_name=GROUP,
            namespace="default",
            logger=logging.getLogger("operator"),
        )
    )


def command_of(scheduler: Scheduler, uuid: str) -> tuple[str, list[str], dict[str, str]]:
    """Return a pod's name, and what of it is run here: arguments of Python, and the environment."""
    line, environ = process_of(pod_of(manifest(env={"DASK_SCHEDULER_ADDRESS": scheduler.address}), uuid))
    command = shutil.which(line[0], path=str(Path(sys.executable).parent))
    assert command is not None, f"{line[0]} is not installed beside this Python"
    return environ["DASK_WORKER_NAME"], [command, *line[1:]], environ


def pod(start: Start, scheduler: Scheduler, uuid: str) -> tuple[str, Program]:
    """Start what a worker's pod runs; return its deployment's name too."""
    name, command, environ = command_of(scheduler, uuid)
    return name, start(*command, env=environ)


async def test_reprovision_under_load_then_scale(
    scheduler: Scheduler, client: Client, start: Start, operator: Any, tmp_path: Path
) -> None:
    pods = dict(pod(start, scheduler, uuid * 10) for uuid in "ab")
    await there(client, *pods)
    for worker in (await workers(client)).values():
        assert (worker["nthreads"], worker["memory_limit"]) == (1, 300 * 2**20)
        assert worker["services"].keys() == {"dashboard"}
    work = Work(client, tmp_path / "work")
    await work.begin()
    for nworkers in (2, 1):
        await reprovision(client, nworkers)
        found = await names(client)
        assert len(found) == 2 * nworkers
        assert found >= set(pods)
    await work.all_there()

    trees = {name: program.children() for name, program in pods.items()}
    (name,) = await scale_down(operator)
    assert name in pods
    assert await pods[name].ended() == 0
    await gone(trees[name])
    (other,) = pods.keys() - {name}
    assert await names(client) == {other}
    assert pods[other].popen.poll() is None
    await work.all_there()

    more, program = pod(start, scheduler, "cccccccccc")
    await there(client, other, more)
    await reprovision(client, 2)
    await work.all_there()
    program.kill(signal.SIGTERM)
    assert await program.ended() == 0
    for each in (*pods.values(), program):
        clean(each.output())


async def test_scale_down_of_nodes_with_several_workers(
    scheduler: Scheduler, client: Client, start: Start, operator: Any, tmp_path: Path
) -> None:
    """The operator counts pods, and deletes the deployments whose names it was told."""
    pods = dict(pod(start, scheduler, uuid * 10) for uuid in "abc")
    await there(client, *pods)
    await reprovision(client, 2)
    work = Work(client, tmp_path / "work")
    await work.begin()
    deleted = await scale_down(operator, 2)
    assert len(deleted) == 2
    assert set(deleted) < set(pods)
    for name in deleted:
        assert await pods[name].ended() == 0
    (left,) = pods.keys() - set(deleted)
    assert pods[left].popen.poll() is None
    await wait_until(lambda: len(scheduler.workers) == 2)
    assert left in await names(client)
    await work.all_there(once=False)


async def test_deleted_pods_move_their_data(scheduler: Scheduler, client: Client, start: Start, tmp_path: Path) -> None:
    """A deployment that is deleted has its container sent SIGTERM."""
    pods = dict(pod(start, scheduler, uuid * 10) for uuid in "ab")
    await there(client, *pods)
    await reprovision(client, 2)
    work = Work(client, tmp_path / "work")
    await work.begin()
    name = min(pods)
    tree = pods[name].kill(signal.SIGTERM)
    assert await pods[name].ended(30) == 0
    await gone(tree)
    await work.all_there(once=False)


async def test_a_signal_to_the_whole_container(
    scheduler: Scheduler, client: Client, start: Start, tmp_path: Path
) -> None:
    """The entry point of dask's image, ``tini -g``, gives SIGTERM to the workers' processes as well."""
    line = "import os, sys; os.setpgid(0, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    pods = {}
    for uuid in ("a" * 10, "b" * 10):
        name, command, environ = command_of(scheduler, uuid)
        pods[name] = start("-c", line, *command, env=environ)
    await there(client, *pods)
    work = Work(client, tmp_path / "work")
    await work.begin()
    name = min(pods)
    tree = pods[name].children()
    os.killpg(pods[name].pid, signal.SIGTERM)
    assert await pods[name].ended(30) == 0
    await gone(tree)
    await work.all_there(once=False)


async def test_autoscaler_counts_pods(scheduler: Scheduler, client: Client, start: Start, operator: Any) -> None:
    """Idle nodes that hold data: the operator wants no more pods than there are, though each has three workers."""
    pods = dict(pod(start, scheduler, uuid * 10) for uuid in "ab")
    await there(client, *pods)
    await reprovision(client, 3)
    await client.scatter([f"value {n}" for n in range(40)], hash=False)
    assert await operator.get_desired_workers("simple-scheduler", "default") <= len(pods)
