"""The launcher of docs/deploy/launcher.rst: agents that Marathon runs, adopted by a cluster.

There is no Marathon here. :class:`Marathon` answers the few calls as its API does (statuses and JSON forms are those of
its source, after version 1.11), and runs each app's command as a real process, again when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import re
import shlex
import signal
import socket
import string
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import dask.array as da
import psutil
import pytest
import pytest_asyncio
from distributed import Client, Security, wait
from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

from agentcluster import AgentCluster
from agentcluster.errors import LaunchError, LaunchTimeout
from tests.support.programs import CALM_ENVIRON, ROOT, gone
from tests.support.waiting import INTERVAL, wait_until
from tests.support.zygote import Forked, Zygote

pytestmark = pytest.mark.deploy

EXAMPLE = ROOT / "docs" / "examples" / "marathon.py"
AGENT = f"{sys.executable} -m agentcluster.cli.dask_agent"
ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}
TWO = {"nworkers": 2, "nthreads": 1, "memory_limit": "512MiB"}
QUIET: dict[str, Any] = {
    "scheduler_options": {"dashboard": False, "dashboard_address": ":0", "host": "127.0.0.1"},
    "security": False,
    "asynchronous": True,
}

#: Seconds that a process has for ending after SIGTERM; Marathon's taskKillGracePeriodSeconds.
GRACE = 10.0


def example() -> ModuleType:
    """Import the file that the documentation shows."""
    spec = importlib.util.spec_from_file_location("marathon_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MarathonLauncher = example().MarathonLauncher


@dataclass
class App:
    """An app: what was posted, its process of the moment, and how the last one ended."""

    definition: dict[str, Any]
    task: dict[str, Any] | None = None
    process: subprocess.Popen[bytes] | Forked | None = None
    failure: dict[str, Any] | None = None
    supervisor: asyncio.Task[None] | None = None
    looks: int = 0


@dataclass
class Marathon:
    """The state behind the API, and a process for each app."""

    directory: Path
    apps: dict[str, App] = field(default_factory=dict)
    deployments: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    offers: bool = True
    url: str = ""
    started: int = 0
    zygote: Zygote | None = None

    def create(self, definition: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the answer of ``POST /v2/apps``."""
        name = str(definition.get("id", ""))
        if not re.fullmatch(r"/?([a-z0-9]+([a-z0-9-]*[a-z0-9]+)?)(/[a-z0-9-]+)*", name):
            return 422, invalid("/id", f"must fully match regular expression, got '{name}'")
        if definition["cpus"] < 0:
            return 422, invalid("/cpus", f"got {definition['cpus']}, expected 0.0 or more")
        path = "/" + name.strip("/")
        if path in self.apps:
            return 409, {"message": f"An app with id [{path}] already exists."}
        deployment = uuid.uuid4().hex
        app = self.apps[path] = App({**definition, "id": path})
        app.supervisor = asyncio.create_task(self._supervise(app))
        counts = {"tasksStaged": 0, "tasksRunning": 0, "tasksHealthy": 0, "tasksUnhealthy": 0}
        return 201, {**app.definition, **counts, "deployments": [{"id": deployment}]}

    def look(self, path: str) -> tuple[int, Any]:
        """Return the status and the answer of ``GET /v2/apps/{id}``."""
        if path not in self.apps:
            return 404, {"message": f"App '{path}' does not exist"}
        app = self.apps[path]
        app.looks += 1
        state = "TASK_STAGING" if app.looks == 1 else "TASK_RUNNING"
        tasks = [] if app.task is None else [{**app.task, "state": state}]
        failure = {} if app.failure is None else {"lastTaskFailure": app.failure}
        return 200, {"app": {**app.definition, "tasks": tasks, "deployments": [], **failure}}

    def delete(self, path: str) -> tuple[int, Any]:
        """Return the status and the answer of ``DELETE /v2/apps/{id}``; the processes end after it."""
        if path not in self.apps:
            return 404, {"message": f"App '{path}' does not exist"}
        deployment = uuid.uuid4().hex
        self.deployments[deployment] = asyncio.create_task(self._end(self.apps.pop(path), deployment))
        return 200, {"version": "2026-01-01T00:00:00.000Z", "deploymentId": deployment}

    async def _supervise(self, app: App) -> None:
        """Run the app's command, again and again."""
        while not self.offers:
            await asyncio.sleep(INTERVAL)
        while True:
            await self._run(app)

    async def _run(self, app: App) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        task = f"{app.definition['id'].strip('/')}.instance-{uuid.uuid4()}"
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_"))}
        environ |= {
            "PYTHONPATH": str(ROOT),
            **CALM_ENVIRON,
            "HOST": "127.0.0.1",
            "PORT0": str(port),
            "MESOS_TASK_ID": task,
        }
        self.started += 1
        app.process = self._start(app.definition["cmd"], environ, self.directory / f"task-{self.started}.log")
        app.task = {"id": task, "appId": app.definition["id"], "host": "127.0.0.1", "ports": [port], "slaveId": "a-0"}
        while app.process.poll() is None:
            await asyncio.sleep(INTERVAL)
        code = app.process.returncode
        app.task = None
        app.failure = {
            "appId": app.definition["id"],
            "host": "127.0.0.1",
            "message": f"Command exited with status {code}" if code >= 0 else f"Command terminated with signal {-code}",
            "state": "TASK_FAILED",
            "taskId": task,
        }

    def _start(self, command: str, environ: dict[str, str], log: Path) -> subprocess.Popen[bytes] | Forked:
        """Run a command as a shell does; an agent is forked where the shell would start just that."""
        words = tuple(shlex.split(string.Template(command.removeprefix("exec ")).safe_substitute(environ)))
        log.touch()
        if self.zygote and words[0] == sys.executable and self.zygote.can_run(words[1:], environ):
            return self.zygote.start(words[1:], environ, self.directory, (os.devnull, str(log), str(log)))
        with log.open("wb") as file:
            return subprocess.Popen(["sh", "-c", command], env=environ, cwd=self.directory, stdout=file, stderr=file)

    async def _end(self, app: App, deployment: str) -> None:
        await ended(app)
        self.deployments.pop(deployment, None)

    async def close(self) -> None:
        """End whatever still runs."""
        await asyncio.gather(*self.deployments.values(), *(ended(app) for app in self.apps.values()))

    def output(self) -> str:
        """Return all that the processes wrote."""
        return "\n".join(log.read_text() for log in sorted(self.directory.glob("task-*.log")))


async def ended(app: App) -> None:
    """End the app's process, as the Mesos executor does."""
    if app.supervisor is not None:
        app.supervisor.cancel()
        await asyncio.gather(app.supervisor, return_exceptions=True)
    if app.process is None or app.process.poll() is not None:
        return
    tree = [psutil.Process(app.process.pid), *psutil.Process(app.process.pid).children(recursive=True)]
    app.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while app.process.poll() is None and time.monotonic() < deadline:
        await asyncio.sleep(INTERVAL)
    if app.process.poll() is None:
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        app.process.wait(GRACE)


def invalid(path: str, error: str) -> dict[str, Any]:
    return {"message": "Object is not valid", "details": [{"path": path, "errors": [error]}]}


class Api(RequestHandler):
    """Hands a call to :class:`Marathon`."""

    def initialize(self, marathon: Marathon) -> None:
        self.marathon = marathon

    def prepare(self) -> None:
        self.marathon.calls.append(f"{self.request.method} {self.request.path}")
        if self.marathon.refusal is not None:
            status, body = self.marathon.refusal
            self.set_status(status)
            self.finish(body)

    def post(self, path: str) -> None:
        assert path == "/apps"
        assert self.request.headers["Content-Type"] == "application/json"
        self.answer(*self.marathon.create(json.loads(self.request.body)))

    def get(self, path: str) -> None:
        if path == "/deployments":
            self.answer(200, [{"id": each, "affectedApps": []} for each in self.marathon.deployments])
        else:
            self.answer(*self.marathon.look(path.removeprefix("/apps")))

    def delete(self, path: str) -> None:
        self.answer(*self.marathon.delete(path.removeprefix("/apps")))

    def answer(self, status: int, body: Any) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(body))

    def log_exception(self, *info: Any) -> None:
        logging.getLogger(__name__).error("in the test's Marathon", exc_info=info)  # type: ignore[arg-type]


@pytest_asyncio.fixture
async def marathon(tmp_path: Path, zygote: Zygote) -> AsyncIterator[Marathon]:
    marathon = Marathon(tmp_path, zygote=zygote)
    server = HTTPServer(Application([(r"/v2(/.*)", Api, {"marathon": marathon})], log_function=lambda handler: None))
    server.listen(0, "127.0.0.1")
    port = next(iter(server._sockets.values())).getsockname()[1]
    marathon.url = f"http://127.0.0.1:{port}"
    try:
        yield marathon
    finally:
        await marathon.close()
        server.stop()
        await server.close_all_connections()


def launcher(marathon: Marathon, name: str = "dask-0", **options: Any) -> Any:
    return MarathonLauncher(name, marathon.url, **{"agent": AGENT, "protocol": "tcp", **options})


def cluster_of(*hosts: Any, config: Any = ONE, **options: Any) -> AgentCluster:
    return AgentCluster(hosts=list(hosts), config=config, **{**QUIET, **options})


def agent_process(marathon: Marathon, name: str) -> psutil.Process:
    """Return the process of a node's task."""
    [app] = [app for path, app in marathon.apps.items() if path.startswith(f"/{name}-")]
    assert app.process is not None
    return psutil.Process(app.process.pid)


async def test_nodes_appear_and_close_deletes_the_apps(marathon: Marathon) -> None:
    marathon.zygote = None  # as Marathon does it: through a shell
    async with (
        cluster_of(launcher(marathon, "dask-0"), launcher(marathon, "dask-1"), config=TWO) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        assert sorted(cluster.nodes) == ["dask-0", "dask-1"]
        assert [node["state"] for node in cluster.nodes.values()] == ["ready", "ready"]
        assert len(cluster.scheduler.workers) == 4
        assert sorted(path[:7] for path in marathon.apps) == ["/dask-0", "/dask-1"]
        assert await client.submit(sum, [1, 2]) == 3
        trees = [
            each
            for name in cluster.nodes
            for each in (agent_process(marathon, name), *agent_process(marathon, name).children(recursive=True))
        ]
        assert len(trees) >= 6
    # Not waited for: the cluster's close has done so.
    assert marathon.apps == {}
    assert marathon.deployments == {}
    await gone(trees)
    assert sum(call.startswith("DELETE") for call in marathon.calls) == 2


def increments(client: Client, count: int, gate: Path | None = None) -> list[Any]:
    """Start that many tasks of 20 ms each; with a `gate`, none ends before that file is there."""

    def slow(x: int, gate: str | None) -> int:  # inside: workers cannot import this module
        import os
        import time

        time.sleep(0.02)
        while gate is not None and not os.path.exists(gate):
            time.sleep(0.02)
        return x + 1

    futures: list[Any] = client.map(slow, range(count), gate=gate and str(gate), pure=False)
    return futures


async def test_reprovision_under_load(marathon: Marathon) -> None:
    async with (
        cluster_of(launcher(marathon, "dask-0"), launcher(marathon, "dask-1")) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        kept = client.persist(da.ones((400, 400), chunks=(100, 100)) + 1)
        await wait(kept)
        before = set(cluster.scheduler.workers)
        agents = {name: agent_process(marathon, name) for name in cluster.nodes}
        futures = increments(client, 150)
        await wait_until(lambda: any(future.done() for future in futures), 15)
        report = await cluster.reprovision("auto-cpu", {**TWO, "memory_limit": "600MiB"})
        assert report.keys > 0
        assert not before & set(cluster.scheduler.workers)
        assert len(cluster.scheduler.workers) == 4
        assert await client.gather(futures) == list(range(1, 151))
        assert await client.compute(kept.sum()) == 2 * 400 * 400
        assert agents == {name: agent_process(marathon, name) for name in cluster.nodes}
    assert marathon.apps == {}


async def test_scale_by_number_of_workers_and_of_nodes(marathon: Marathon) -> None:
    async with (
        cluster_of(launcher(marathon, "dask-0"), config=TWO) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        kept = await client.scatter(list(range(20)))
        await cluster.scale(1)
        assert len(cluster.scheduler.workers) == 1
        assert len(marathon.apps) == 1
        await cluster.scale(2)
        assert len(cluster.scheduler.workers) == 2
        with pytest.warns(UserWarning, match=r"scale\(4\): .* room for 2 workers"):
            await cluster.scale(4)
        assert await cluster.add_host(launcher(marathon, "dask-1")) == "dask-1"
        assert len(marathon.apps) == 2
        await cluster.scale(4)
        assert len(cluster.scheduler.workers) == 4
        await cluster.remove_host("dask-0")
        assert [path[:7] for path in marathon.apps] == ["/dask-1"]
        assert marathon.deployments == {}
        assert await client.gather(kept) == list(range(20))
        assert list(cluster.nodes) == ["dask-1"]


async def test_adapt_on_the_nodes_that_are_there(marathon: Marathon, tmp_path: Path) -> None:
    async with (
        cluster_of(launcher(marathon, "dask-0"), config=TWO) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        await cluster.scale(1)
        adaptive = cluster.adapt(minimum=1, maximum=2, interval="100ms", wait_count=2, target_duration="100ms")
        futures = increments(client, 300, tmp_path / "gate")
        await wait_until(lambda: len(cluster.scheduler.workers) == 2, 30)
        (tmp_path / "gate").touch()
        assert await client.gather(futures) == list(range(1, 301))
        await wait_until(lambda: len(cluster.scheduler.workers) == 1, 30)
        assert await client.gather(futures) == list(range(1, 301))
        assert len(marathon.apps) == 1
        adaptive.stop()


async def test_adapt_brings_apps_and_deletes_them(marathon: Marathon, tmp_path: Path) -> None:
    hosts = [launcher(marathon, f"dask-{number}", standby=True) for number in range(2)]
    async with cluster_of(*hosts, config=TWO) as cluster, Client(cluster, asynchronous=True) as client:
        assert marathon.apps == {}
        cluster.adapt(interval="100ms", wait_count=2, target_duration="100ms")
        futures = increments(client, 300, tmp_path / "gate")
        await wait_until(lambda: len(cluster.scheduler.workers) == 4, 30)
        (tmp_path / "gate").touch()
        assert len(marathon.apps) == 2
        assert await client.gather(futures) == list(range(1, 301))
        del futures
        await wait_until(lambda: cluster.standby == ("dask-0", "dask-1"), 30)
        assert (marathon.apps, marathon.deployments) == ({}, {})


async def test_task_that_dies_is_noticed_and_can_be_replaced(marathon: Marathon) -> None:
    async with (
        cluster_of(launcher(marathon, "dask-0"), launcher(marathon, "dask-1")) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        process = agent_process(marathon, "dask-0")
        tree = [process, *process.children(recursive=True)]
        process.kill()
        await gone(tree, 15)
        await wait_until(lambda: cluster.nodes["dask-0"]["state"] == "lost", 15)
        await wait_until(lambda: len(cluster.scheduler.workers) == 1, 15)
        assert await client.submit(sum, [1, 2]) == 3
        # Marathon has started it again, but nobody adopts it.
        await wait_until(lambda: marathon.started == 3, 15)
        await cluster.remove_host("dask-0")
        assert len(marathon.apps) == 1
        await cluster.add_host(launcher(marathon, "dask-0"))
        await wait_until(lambda: cluster.nodes["dask-0"]["state"] == "ready", 15)
        assert len(cluster.scheduler.workers) == 2
    assert marathon.apps == {}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, "<html>\n<title>Error 401 Unauthorized</title></html>", "Error 401 Unauthorized"),
        (409, json.dumps({"message": "App is locked by one or more deployments."}), "locked by one or more deploy"),
        (503, "", "HTTP 503"),
    ],
)
async def test_refusal_names_marathon(marathon: Marathon, status: int, body: str, said: str) -> None:
    marathon.refusal = (status, body)
    with pytest.raises(LaunchError) as caught:
        await cluster_of(launcher(marathon))
    message = str(caught.value)
    for part in ("Marathon at 127.0.0.1 (app dask-0)", "POST /v2/apps", f"HTTP {status}", said):
        assert part in message
    assert "\n" not in message
    assert marathon.calls == ["POST /v2/apps"]


async def test_app_that_is_not_valid(marathon: Marathon) -> None:
    with pytest.raises(LaunchError, match=r"app dask-0\).*422.*not valid.*/cpus.*expected 0\.0 or more"):
        await cluster_of(launcher(marathon, cpus=-1))
    assert marathon.apps == {}


async def test_nobody_there() -> None:
    with pytest.raises(LaunchError, match=r"Marathon at 127\.0\.0\.1 \(app dask-0\).*cannot be reached"):
        await cluster_of(MarathonLauncher("dask-0", "http://127.0.0.1:1"))


async def test_command_that_is_not_there(marathon: Marathon) -> None:
    with pytest.raises(LaunchError, match=r"app dask-0.*ended: Command exited with status 127"):
        await cluster_of(launcher(marathon, agent="no-such-command-here"))
    assert marathon.apps == {}
    assert marathon.deployments == {}


async def test_no_offer_in_time(marathon: Marathon) -> None:
    marathon.offers = False
    with pytest.raises(LaunchTimeout, match=r"app dask-0\) did not start: its agent was not ready within 2 s"):
        await cluster_of(launcher(marathon), launch_timeout=2)
    assert marathon.apps == {}


async def test_one_of_two_is_refused(marathon: Marathon) -> None:
    with pytest.raises(LaunchError, match=r"app dask-1.*422"):
        await cluster_of(launcher(marathon, "dask-0"), launcher(marathon, "dask-1", cpus=-1))
    assert marathon.apps == {}
    assert marathon.deployments == {}


async def test_cancelled_launch_leaves_no_app(marathon: Marathon) -> None:
    cluster = cluster_of(launcher(marathon))
    opening = asyncio.ensure_future(cluster)  # type: ignore[arg-type]
    await wait_until(lambda: marathon.started == 1, 15)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    await cluster.close()
    assert marathon.apps == {}
    assert marathon.deployments == {}


async def test_encryption_that_the_agent_does_not_have(marathon: Marathon) -> None:
    with pytest.raises(LaunchError, match=r"without encryption and this cluster requires it.*--tls-ca-file"):
        await cluster_of(launcher(marathon), security=None)
    assert marathon.apps == {}


async def test_encryption_with_files(marathon: Marathon, tmp_path: Path) -> None:
    temporary = Security.temporary()
    files = {}
    for name, kind in (("ca", "tls_ca_file"), ("cert", "tls_worker_cert"), ("key", "tls_worker_key")):
        files[name] = str(tmp_path / f"{name}.pem")
        Path(files[name]).write_text(getattr(temporary, kind))
    pairs = {
        f"tls_{role}_{kind}": files[kind] for role in ("client", "worker", "scheduler") for kind in ("cert", "key")
    }
    security = Security(tls_ca_file=files["ca"], require_encryption=True, **pairs)
    command = f"{AGENT} --tls-ca-file {files['ca']} --tls-cert {files['cert']} --tls-key {files['key']}"
    encrypted = launcher(marathon, agent=command, protocol="tls")
    async with cluster_of(encrypted, security=security) as cluster, Client(cluster, asynchronous=True) as client:
        assert await client.submit(sum, [1, 2]) == 3
        assert all(address.startswith("tls://") for address in cluster.scheduler.workers)
    assert marathon.apps == {}


async def test_close_twice_and_cancelled(marathon: Marathon) -> None:
    cluster = await cluster_of(launcher(marathon))
    [node] = cluster.workers.values()
    first = asyncio.ensure_future(node.launched.close(10))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(node.launched.close(10), node.launched.close(10), first, return_exceptions=True)
    assert marathon.apps == {}
    assert sum(call.startswith("DELETE") for call in marathon.calls) == 1
    await cluster.close()
