"""Three hosts, a stranger on a fourth, and another user on each: which port of a cluster answers whom.

The hosts are network namespaces of this machine. What each port said to whom is in the log of the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from agentcluster.cli.credentials import write
from tests.support.namespaces import Network, NoNamespaces, network
from tests.support.programs import AGENT, CALM_ENVIRON, ROOT
from tests.support.ssh_servers import SSHD
from tests.support.waiting import wait_blocking

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None or SSHD is None,
        reason="needs root, iproute2 and OpenSSH's sshd",
    ),
]

#: A cluster that says when it is up, and closes when its stdin ends.
CLUSTER = """
import json, sys
from agentcluster import AgentCluster, Host
from distributed import Client
options = json.loads(sys.argv[1])
hosts = [Host(**each) if isinstance(each, dict) else each for each in options.pop("hosts")]
with AgentCluster(hosts, config={"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}, **options) as cluster:
    with Client(cluster) as client:
        print(client.submit(abs, -4).result(), cluster.scheduler_address, cluster.dashboard_link, flush=True)
        sys.stdin.read()
"""

#: dask-jobqueue's cluster whose jobs are processes of its host.
JOBQUEUE = """
import json, sys
from dask_jobqueue.local import LocalCluster
from distributed import Client
options = json.loads(sys.argv[1])
with LocalCluster(cores=1, processes=1, memory="300MiB", **options) as cluster:
    cluster.scale(jobs=1)
    with Client(cluster) as client:
        answer = client.submit(abs, -4).result()
        print(answer, cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


class World:
    """The hosts, and the programs that run in them."""

    def __init__(self, hosts: Network, directory: Path) -> None:
        self.hosts, self.directory = hosts, directory
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, host: str, *command: str, stdin: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a program in a host; return it and its log."""
        log = self.directory / f"{host}-{len(self.running)}.log"
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_"))}
        environ |= {"PYTHONPATH": str(ROOT), **CALM_ENVIRON}
        with log.open("wb") as file:
            inside = self.hosts.inside(host, *command)
            process = subprocess.Popen(inside, stdin=stdin, stdout=file, stderr=file, env=environ, cwd=self.directory)
        self.running.append(process)
        return process, log

    def says(self, started: tuple[subprocess.Popen[bytes], Path], text: str) -> str:
        """Return the line of a program's log with a text in it, once it is there."""
        process, log = started

        def line() -> str | None:
            assert process.poll() is None, log.read_text()[-3000:]
            return next((each for each in log.read_text().splitlines() if text in each), None)

        return str(wait_blocking(line, 60))

    @contextlib.contextmanager
    def cluster(self, host: str = "one", script: str = CLUSTER, **options: Any) -> Iterator[str]:
        """Run a cluster in a host; its first line."""
        started = self.start(host, sys.executable, "-c", script, json.dumps(options), stdin=subprocess.PIPE)
        process = started[0]
        try:
            yield self.says(started, "4 ")
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(30) == 0, started[1].read_text()[-3000:]

    def sshd(self, *hosts: str) -> dict[str, Any]:
        """Run sshd in hosts; return the options that connect to it."""
        place = self.directory / "ssh"
        place.mkdir(mode=0o700)
        for name in ("host_key", "client_key"):
            key = asyncssh.generate_private_key("ssh-ed25519")
            key.write_private_key(place / name)
            key.write_public_key(place / f"{name}.pub")
            (place / name).chmod(0o600)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        environ = " ".join(f"{name}={value}" for name, value in {"PYTHONPATH": ROOT, **CALM_ENVIRON}.items())
        lines = ["Port 22", f"HostKey {place}/host_key", f"AuthorizedKeysFile {place}/client_key.pub", "PidFile none"]
        lines += ["StrictModes no", "UsePAM no", "PasswordAuthentication no", f"SetEnv {environ}", ""]
        (place / "sshd_config").write_text("\n".join(lines))
        assert SSHD is not None
        for host in hosts:
            self.says(self.start(host, SSHD, "-D", "-e", "-f", str(place / "sshd_config")), "listening on 0.0.0.0")
        return {"client_keys": [str(place / "client_key")], "known_hosts": None, "config": None, "agent_path": None}

    def scan(self, before: dict[str, set[tuple[str, int]]]) -> list[tuple[str, str, int, str]]:
        """Return who gets what at each port that was opened: the stranger, and another user of each host."""
        found = []
        for host, address in self.hosts.hosts.items():
            opened = self.hosts.listening(host) - before[host]
            ports = sorted({port for _, port in opened})
            for port, answer in self.hosts.knock("stranger", address, ports).items():
                found.append(("stranger", host, port, answer))
            for where in {where for where, _ in opened}:
                near = "127.0.0.1" if where in ("0.0.0.0", "*", "::", "::1") else where
                here = sorted(port for each, port in opened if each == where)
                for port, answer in self.hosts.knock(host, near, here).items():
                    found.append((f"other user at {where}", host, port, answer))
        for row in found:
            print(*row, sep=" | ")
        return found

    def listening(self) -> dict[str, set[tuple[str, int]]]:
        return {host: self.hosts.listening(host) for host in self.hosts.hosts}

    def close(self) -> None:
        for process in reversed(self.running):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self.running):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(network("one", "two", "three", "stranger"))
        except NoNamespaces as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        world = World(hosts, tmp_path)
        stack.callback(world.close)
        yield world


def answers(found: list[tuple[str, str, int, str]], who: str) -> set[str]:
    """Return what somebody got that is no refusal."""
    return {answer for name, _, _, answer in found if name.startswith(who)} - {"unreachable", "refused"}


@pytest.mark.parametrize("scheduler", ["here", "elsewhere"])
def test_over_ssh(world: World, scheduler: str) -> None:
    connect = world.sshd("two", "three")
    before = world.listening()
    python = {"remote_python": sys.executable, "connect_options": connect}
    hosts = [{"host": world.hosts.hosts[name], **python} for name in ("two", "three")]
    options: dict[str, Any] = {"hosts": hosts}
    if scheduler == "elsewhere":
        options |= {"scheduler": world.hosts.hosts["three"], **python}
    with world.cluster(**options) as line:
        assert "tls://" in line
        assert line.endswith(" None" if scheduler == "elsewhere" else ":8787/status"), line
        found = world.scan(before)
    assert answers(found, "stranger") == set()
    assert all(answer.startswith("http: HTTP/") for answer in answers(found, "other user"))
    assert {host for _, host, _, _ in found} >= {"two", "three"}


def test_standby_with_credentials(world: World) -> None:
    folder = world.directory / "credentials"
    write(folder, days=365)
    before = world.listening()
    for host in ("two", "three"):
        standby = ("--standby", "--listen-address", "tls://:8790", "--credentials", str(folder))
        world.says(world.start(host, sys.executable, *AGENT, *standby), "Standing by at ")
    alone = world.scan(before)
    assert {answer for _, _, _, answer in alone} == {"refused"}
    hosts = [f"tls://{world.hosts.hosts[name]}:8790" for name in ("two", "three")]
    with world.cluster(hosts=hosts, security=str(folder)) as line:
        assert "tls://" in line
        found = world.scan(before)
    assert answers(found, "stranger") == set()
    assert all(answer.startswith("http: HTTP/") for answer in answers(found, "other user"))


def test_standby_without(world: World) -> None:
    before = world.listening()
    started = world.start("two", sys.executable, *AGENT, "--standby")
    address = world.says(started, "Standing by at ").rpartition(" ")[2]
    alone = world.scan(before)
    assert answers(alone, "stranger") == set()
    assert answers(alone, "other user") == {"handshake: a challenge"}
    with world.cluster("two", hosts=[address]):
        found = world.scan(before)
    assert answers(found, "stranger") == set()
    assert {where for name, _, _, _ in found for where in [name.rpartition(" ")[2]]} == {"127.0.0.1", "stranger"}


@pytest.mark.parametrize("scheduler", [None, "local"])
def test_on_this_machine(world: World, scheduler: str | None) -> None:
    before = world.listening()
    with world.cluster(hosts=["local"], scheduler=scheduler):
        found = world.scan(before)
    assert answers(found, "stranger") == set()
    assert {name.rpartition(" ")[2] for name, _, _, _ in found} == {"127.0.0.1", "stranger"}


@pytest.mark.parametrize("command", ["agentcluster.cli.dask_agent", "distributed.cli.dask_worker"])
def test_under_jobqueue(world: World, command: str) -> None:
    """With the options of docs/deploy/jobqueue.rst against strangers; beside it, what dask's own worker opens."""
    before = world.listening()
    options = {"security": True, "shared_temp_directory": str(world.directory), "worker_command": command}
    loopback = {"dashboard_address": "127.0.0.1:0"}
    with world.cluster(script=JOBQUEUE, scheduler_options=loopback, **options) as line:
        assert "tls://" in line
        found = world.scan(before)
    http = {answer for answer in answers(found, "stranger") if answer.startswith("http: HTTP/")}
    assert answers(found, "stranger") == http
    assert bool(http) == (command == "distributed.cli.dask_worker")


def test_the_drop_in_is_no_more_open_than_dask_worker(world: World) -> None:
    """The same scan beside ``dask worker``, which listens on every address."""
    before = world.listening()
    address = f"tcp://{world.hosts.hosts['one']}:8786"
    world.says(world.start("one", sys.executable, "-m", "dask", "scheduler", "--no-dashboard"), "Scheduler at")
    scans = {}
    for name, command in (("dask worker", ("-m", "dask", "worker")), ("dask-agent", AGENT)):
        options = (address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard")
        process, log = world.start("two", sys.executable, *command, *options)
        world.says((process, log), "Registered to")
        found = world.scan(before)
        scans[name] = sorted(answer for who, host, _, answer in found if (who, host) == ("stranger", "two"))
        process.terminate()
        process.wait(30)
    ours, theirs = scans["dask-agent"], scans["dask worker"]
    assert set(ours) <= set(theirs)
    assert len(ours) == len(theirs) + 1, "the agent's own port, for the scheduler's calls"
