"""The operator's command on a real cluster: what it prints, as text and as JSON, what it changes, its exit codes."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from distributed import Client, Event, LocalCluster
from distributed.security import Security

from agentcluster import AgentCluster
from agentcluster.cli.main import main
from tests.support.inprocess import here
from tests.support.plugin import SCHEDULER
from tests.support.programs import ROOT
from tests.support.waiting import wait_blocking

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "300MiB"}
OPTIONS: dict[str, Any] = {"scheduler_options": SCHEDULER}

Run = Callable[..., Result]


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """Two nodes, two workers each."""
    return {"hosts": here(2), "config": {**ONE, "nworkers": 2}, **OPTIONS}


@pytest.fixture
def run(sync_cluster: AgentCluster) -> Run:
    """Run the command, which has its own event loop, on the cluster."""

    def run(*arguments: str) -> Result:
        environ = {"DASK_SCHEDULER_ADDRESS": ""}
        return CliRunner().invoke(main, [*arguments, "--scheduler", sync_cluster.scheduler_address], env=environ)

    return run


def said(result: Result, code: int = 0) -> str:
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


def test_nodes(run: Run) -> None:
    header, *rows = said(run("nodes")).splitlines()
    assert header.split() == ["node", "state", "mode", "workers", "cores", "memory", "GPUs"]
    assert [row.split()[:3] for row in rows] == [["local", "ready", "auto-cpu"], ["local.2", "ready", "auto-cpu"]]
    found = json.loads(said(run("nodes", "--json")))
    assert list(found) == ["local", "local.2"]
    assert found["local"]["state"] == "ready"


def test_reprovision(run: Run, sync_cluster: AgentCluster) -> None:
    with Client(sync_cluster) as client:
        kept = client.scatter(list(range(20)), hash=False)
        config = json.dumps(ONE)
        planned = said(run("reprovision", "uniform", "--config", config, "--dry-run"))
        assert planned.startswith("uniform: planned only, nothing was changed")
        assert "uniform" not in said(run("nodes"))
        report = said(run("reprovision", "uniform", "--config", config, "--nodes", "local.*"))
        assert re.match(r"uniform: 1 node, \d+ keys? \(.*\) moved, ", report)
        assert {n: node["mode"] for n, node in json.loads(said(run("nodes", "--json"))).items()} == {
            "local": "auto-cpu",
            "local.2": "uniform",
        }
        planned = said(run("reprovision", "uniform", "-o", "nthreads=1", "-o", "memory_limit=302MiB", "--dry-run"))
        assert "1 thread, 302.00 MiB" in planned
        answer = json.loads(said(run("reprovision", "uniform", "--config", config, "--drain-timeout", "5s", "--json")))
        assert answer["mode"] == "uniform"
        assert set(answer["nodes"]) == {"local", "local.2"}
        assert client.gather(kept) == list(range(20))


def test_it_asks_before_data_is_given_up(run: Run, sync_cluster: AgentCluster) -> None:
    with Client(sync_cluster) as client:
        kept = client.scatter(list(range(20)), hash=False)
        config = json.dumps({**ONE, "memory_limit": "301MiB"})
        change = ("reprovision", "uniform", "--config", config, "--drain", "now")
        refused = said(run(*change), 2)
        assert "nothing was changed; it would give up 20 keys" in refused
        assert "--yes does it, --drain data moves it first" in refused
        assert "give up" in said(run(*change, "--dry-run"))
        assert client.gather(kept) == list(range(20))
        assert re.match(r"uniform: 2 nodes, 20 keys \(.*\) lost, ", said(run(*change, "--yes")))
        said(run(*change))  # nothing is left to give up


def test_scale(run: Run, sync_cluster: AgentCluster) -> None:
    said(run("reprovision", "auto-cpu", "--config", json.dumps({**ONE, "nworkers": 2})))
    assert said(run("scale", "3")).count("ready") == 2
    assert len(sync_cluster.scheduler.workers) == 3
    assert json.loads(said(run("scale", "--kind", "cpu=2", "--json")))["workers"] == 2
    said(run("scale", "--on-nodes", "1"))
    assert len(sync_cluster.scheduler.workers) == 2
    assert "room for 4 workers" in run("scale", "9").stderr
    assert "room for 4 workers; nothing was changed" in said(run("scale", "9", "--strict"), 2)
    said(run("scale", "--cores", "4", "--memory", "100 MiB"))
    assert len(sync_cluster.scheduler.workers) == 4


def test_logs_and_events(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agentcluster")  # as agents have it in their processes
    said(run("reprovision", "uniform", "--config", json.dumps(ONE), "--nodes", "local"))
    said(run("reprovision", "auto-cpu", "--config", json.dumps({**ONE, "nworkers": 2})))
    lines = said(run("logs", "local")).splitlines()
    assert all(line.startswith("local  ") for line in lines)
    assert any("started at tcp://" in line for line in lines)
    assert said(run("logs", "local", "-n", "1")).splitlines() == lines[-1:]
    assert said(run("logs", "-n", "0")) == ""
    assert json.loads(said(run("logs", "local", "-n", "1", "--json"))) == {"node": "local", "line": lines[-1][7:]}
    steps = said(run("events")).splitlines()
    assert any(re.search(r'^\d\d:\d\d:\d\d  rollout auto-cpu  .*node="local"', line) for line in steps)
    assert json.loads(said(run("events", "--json")).splitlines()[-1])["when"] > 0


def test_top_on_paper(run: Run) -> None:
    looks = said(run("top", "-n", "2", "--interval", "0.1"))
    assert looks.count("2 nodes, ") == 2
    assert re.search(r"local\.2 +ready +\S+ +.* [█░]{6} +\d+% +[█░]{6} [\d.]+ of [\d.]+ GiB", looks)
    first = json.loads(said(run("top", "-n", "1", "--json")))
    assert list(first["nodes"]) == ["local", "local.2"]


#: Arguments -> what the message names.
REFUSED: tuple[tuple[list[str], list[str]], ...] = (
    (["reprovision", "unifrom"], ["'unifrom'", "'uniform'"]),
    (["reprovision", "uniform", "--config", "{"], ["JSON"]),
    (["reprovision", "uniform", "--config", '{"nthreads": 99999}'], ["99999", "local", "cores"]),
    (["reprovision", "uniform", "--nodes", "box-*"], ["'box-*'", "local"]),
    (["reprovision", "uniform", "--timeout", "soon"], ["--timeout is 'soon'", "30s"]),
    (["reprovision", "uniform", "--drain", "never"], ["--drain", "never"]),
    (["reprovision", "uniform", "-o", "nthreads"], ["--option 'nthreads'", "nthreads=2"]),
    (["reprovision", "uniform", "-o", "nthread=2"], ["'nthread'", "did you mean 'nthreads'"]),
    (["reprovision", "uniform", "--config", '{"nthreads": 1}', "-o", "nthreads=2"], ["'nthreads'", "given twice"]),
    (["reprovision", "uniform", "-o", "nthreads=1", "-o", "nthreads=2"], ["'nthreads'", "given twice"]),
    (["reprovision", "uniform", "--nodes", ""], ["--nodes ''", "leave it out for all"]),
    (["scale", "--kind", "cpu=1", "--kind", "cpu=2"], ["'cpu'", "given twice"]),
    (["reprovision"], ["MODE"]),
    (["scale"], ["--kind"]),
    (["scale", "--kind", "gpu"], ["'gpu'", "gpu=2"]),
    (["scale", "--kind", "tpu=1"], ["tpu", "no node"]),
    (["scale", "--memory", "much"], ["--memory is 'much'", "64 GiB"]),
    (["logs", "nobody"], ["'nobody'", "local"]),
)


def test_what_is_refused(run: Run, sync_cluster: AgentCluster) -> None:
    before = set(sync_cluster.scheduler.workers)
    for arguments, parts in REFUSED:
        message = said(run(*arguments), 2)
        for part in parts:
            assert part in message
    assert set(sync_cluster.scheduler.workers) == before


def test_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcluster.cli.connection.CONNECT", 1.0)

    def refused(code: int, *arguments: str) -> str:
        return said(CliRunner().invoke(main, ["nodes", *arguments], env={"DASK_SCHEDULER_ADDRESS": ""}), code)

    assert "no scheduler: give --scheduler" in refused(2)
    assert "'nonsense://x' is not an address" in refused(2, "--scheduler", "nonsense://x")
    assert "no scheduler answers at tcp://127.0.0.1:1" in refused(3, "--scheduler", "tcp://127.0.0.1:1")
    assert "speaks TLS, which needs credentials: give --cred" in refused(2, "--scheduler", "tls://127.0.0.1:1")
    (tmp_path / "ca.pem").write_text(str(Security.temporary().tls_ca_file))
    plain_text = ("--scheduler", "tcp://127.0.0.1:1", "--tls-ca-file", str(tmp_path / "ca.pem"))
    assert "is not encrypted, and encryption is required here; use tls://" in refused(2, *plain_text)
    (tmp_path / "file").write_text("{}")
    assert "was not written by a scheduler" in refused(2, "--scheduler-file", str(tmp_path / "file"))
    assert "give one of them" in refused(2, "--scheduler-file", str(tmp_path / "file"), "--scheduler", "tcp://x:1")
    with LocalCluster(n_workers=0, dashboard_address=":0") as plain:
        assert "has no agentcluster" in refused(3, "--scheduler", plain.scheduler_address)


def test_scheduler_file_and_tls(tmp_path: Path) -> None:
    security = Security.temporary()
    with AgentCluster(hosts=here(), config=ONE, security=security, **OPTIONS) as cluster:
        (tmp_path / "scheduler.json").write_text(json.dumps({"address": cluster.scheduler_address}))
        files = {"ca-file": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key}
        arguments = ["--scheduler-file", str(tmp_path / "scheduler.json")]
        for name, text in files.items():
            (tmp_path / name).touch(0o600)
            (tmp_path / name).write_text(str(text))
            arguments += [f"--tls-{name}", str(tmp_path / name)]
        assert cluster.scheduler_address.startswith("tls://")
        assert "local" in said(CliRunner().invoke(main, ["nodes", *arguments]))


def test_top_and_following_in_a_terminal(sync_cluster: AgentCluster, run: Run) -> None:
    """Real processes on a pseudo-terminal; Ctrl-C ends them with 0 and without a traceback."""
    drawn = {}
    for command, until in ((["top", "--interval", "0.2"], "local.2"), (["events", "-f"], 'step="ready"')):
        parent, child = pty.openpty()
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        process = subprocess.Popen(
            [sys.executable, "-m", "agentcluster.cli.main", *command, "--scheduler", sync_cluster.scheduler_address],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environ,
            start_new_session=True,
        )
        os.close(child)
        try:
            seen, ends = "", time.monotonic() + 30
            while until not in seen:
                assert time.monotonic() < ends, seen
                seen += _read(parent, 1.0)
            process.send_signal(signal.SIGINT)
            while chunk := _read(parent, 5.0):
                seen += chunk
            assert process.wait(20) == 0, seen
        finally:
            process.kill()
            process.wait(10)
            os.close(parent)
        assert "Traceback" not in seen
        drawn[command[0]] = seen
    assert "\x1b[?1049h" in drawn["top"]  # a screen of its own, which is left again
    assert "\x1b[?1049l" in drawn["top"]


def test_ctrl_c_leaves_a_change_to_the_scheduler(sync_cluster: AgentCluster) -> None:
    """What goes on without the command is said, and the exit code is that of an interrupt."""
    with Client(sync_cluster) as client:
        busy = client.submit(Event("go").wait, 30, pure=False)
        wait_blocking(lambda: any(ws.processing for ws in sync_cluster.scheduler.workers.values()))
        change = ("reprovision", "uniform", "--config", json.dumps({**ONE, "memory_limit": "303MiB"}))
        process = subprocess.Popen(
            [sys.executable, "-m", "agentcluster.cli.main", *change, "--scheduler", sync_cluster.scheduler_address],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_blocking(sync_cluster.rollout.status, 20)
        process.send_signal(signal.SIGINT)
        _, seen = process.communicate(timeout=20)
        Event("go", client=client).set()
        assert busy.result()
    assert process.returncode == 130
    assert "interrupted; the scheduler carries the reprovision on, and `agentcluster top` shows it" in seen
    assert "Traceback" not in seen
    wait_blocking(lambda: {node["mode"] for node in sync_cluster.refresh().values()} == {"uniform"}, 20)


def _read(terminal: int, seconds: float) -> str:
    if not select.select([terminal], [], [], seconds)[0]:
        return ""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # Linux's way to say that the other side is closed
        return ""
