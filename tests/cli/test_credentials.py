"""``agentcluster credentials``: what it writes, who trusts whom with it, and what is said when it has expired."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import ssl
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from distributed import Client, Scheduler

from agentcluster import AgentCluster
from agentcluster.cli.credentials import write
from agentcluster.cli.main import main
from agentcluster.errors import ConfigError, LaunchError
from agentcluster.security import ROLES, credentials
from tests.support.forked import ForkedHosts
from tests.support.plugin import SCHEDULER
from tests.support.programs import AGENT, Start
from tests.support.waiting import wait_until

ONE = {"nworkers": 1, "nthreads": 1, "memory_limit": "512MiB"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["credentials", *map(str, arguments)])


def operate(command: str, address: str, *options: object) -> Result:
    return CliRunner().invoke(main, [command, "--scheduler", address, *map(str, options)])


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of credentials."""
    place = tmp_path / "secrets"
    write(place, days=365)
    return place


def test_what_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "secrets"
    done = run(folder, "--days", "30")
    assert done.exit_code == 0, done.output
    names = {"ca.pem", "ca.key", *(f"{role}.{kind}" for role in ROLES for kind in ("pem", "key"))}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    ends = f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%d}"
    assert re.search(rf"worker\.pem  expires {ends}$", done.output, flags=re.MULTILINE)
    assert "PRIVATE KEY" not in done.output


def test_it_never_overwrites(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = run(folder)
    assert again.exit_code == 2
    assert f"{folder} has credentials already; --renew" in again.output
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_renewed_certificates_are_of_the_same_ca(folder: Path) -> None:
    old = {role: certificate(folder / f"{role}.pem") for role in ROLES}
    ca = (folder / "ca.pem").read_bytes()
    assert run(folder, "--renew", "--days", "700").exit_code == 0
    assert (folder / "ca.pem").read_bytes() == ca
    for role in ROLES:
        new = certificate(folder / f"{role}.pem")
        assert new.public_key() != old[role].public_key()
        assert new.not_valid_after_utc > old[role].not_valid_after_utc
        new.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))


def test_a_ca_that_ends_too_early_gets_another_certificate(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    write(folder, days=365, now=datetime.now(UTC) - timedelta(days=3640))
    old, leaf = certificate(folder / "ca.pem"), certificate(folder / "worker.pem")
    write(folder, days=365, renew=True)
    new = certificate(folder / "ca.pem")
    assert new.public_key() == old.public_key()
    assert new.not_valid_after_utc > old.not_valid_after_utc + timedelta(days=300)
    leaf.verify_directly_issued_by(new)


def test_renew_without_a_ca(tmp_path: Path, folder: Path) -> None:
    missing = run(tmp_path / "nothing", "--renew")
    assert missing.exit_code == 2
    assert "has no CA (ca.pem and ca.key) to renew certificates from" in missing.output
    other = tmp_path / "other"
    write(other, days=1)
    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    mixed = run(folder, "--renew")
    assert mixed.exit_code == 2
    assert "ca.key does not belong to ca.pem" in mixed.output


# -- reading them ------------------------------------------------------------------------------------------------------


def test_credentials_of_a_folder(folder: Path) -> None:
    found: Any = credentials(folder)
    assert found.require_encryption
    assert (found.tls_ca_file, found.tls_client_key) == (str(folder / "ca.pem"), str(folder / "client.key"))
    for role in ROLES:
        assert isinstance(found.get_connection_args(role)["ssl_context"], ssl.SSLContext)
    for name in ("client.pem", "client.key", "scheduler.pem", "scheduler.key", "ca.key"):
        (folder / name).unlink()
    agents: Any = credentials(folder, "worker")
    assert agents.tls_worker_cert == str(folder / "worker.pem")
    assert credentials(folder).tls_client_cert is None  # type: ignore[attr-defined]
    (folder / "worker.key").unlink()
    with pytest.raises(ConfigError, match=r"there is no worker\.key; `agentcluster credentials DIR` makes the files"):
        credentials(folder, "worker")
    with pytest.raises(ConfigError, match=r"there is no ca\.pem"):
        credentials(folder / "nowhere")


def test_expired_and_soon_expired(tmp_path: Path) -> None:
    old, soon = tmp_path / "old", tmp_path / "soon"
    write(old, days=30, now=datetime.now(UTC) - timedelta(days=31))
    with pytest.raises(ConfigError, match=r"\.pem' expired on \d{4}-\d\d-\d\d; `agentcluster cred.*--renew"):
        credentials(old)
    write(soon, days=10)
    with pytest.warns(UserWarning, match=r"\.pem' expires on .*--renew") as warned:
        credentials(soon)
    assert len(warned) == 1
    write(old, days=30, renew=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        credentials(old)


def test_a_damaged_certificate(folder: Path) -> None:
    (folder / "worker.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"certificate '.*worker\.pem' cannot be read"):
        credentials(folder)


# -- with them ---------------------------------------------------------------------------------------------------------


async def test_standby_cluster_and_client(folder: Path, start: Start, forked: ForkedHosts) -> None:
    agent = start(*AGENT, "--standby", "--listen-address", "tls://127.0.0.1:0", "--credentials", str(folder))
    address = (await agent.says("Standing by at ")).rpartition(" ")[2]
    options: Any = {"config": ONE, "scheduler_options": SCHEDULER, "asynchronous": True}
    async with AgentCluster([address, *forked()], security=str(folder), **options) as cluster:
        client = await Client(cluster.scheduler_address, security=credentials(folder), asynchronous=True)
        assert sorted(await client.gather(client.map(abs, [-1, -2]))) == [1, 2]
        assert all(worker.startswith("tls://") for worker in cluster.scheduler.workers)
        assert len(cluster.nodes) == 2
        await client.close()
        nodes = await asyncio.to_thread(operate, "nodes", cluster.scheduler_address, "--credentials", folder)
        assert nodes.exit_code == 0, nodes.output
        assert nodes.output.count(" ready ") == 2
        wrong = await asyncio.to_thread(operate, "nodes", cluster.scheduler_address)
        assert wrong.exit_code == 2
        assert "speaks TLS, which needs credentials: give --credentials DIR" in wrong.output
    other = folder.parent / "other"
    write(other, days=365)
    with pytest.raises(LaunchError, match=r"(?i)certificate"):
        await AgentCluster([address], security=other, **options)


async def test_standby_ends_while_handshakes_are_cut_off(folder: Path, start: Start) -> None:
    agent = start(*AGENT, "--standby", "--listen-address", "tls://127.0.0.1:0", "--credentials", str(folder))
    port = int((await agent.says("Standing by at ")).rpartition(":")[2])
    begun = b"\x16\x03\x01\x02\x00\x01\x00"  # of a hello
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]

    def taken() -> list[Any]:
        found = psutil.Process(agent.pid).net_connections("tcp")
        return [each for each in found if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port]

    try:
        for connection in connections:
            connection.sendall(begun)
        await wait_until(lambda: len(taken()) == len(connections))
        for connection in connections[:3]:
            connection.close()
        agent.popen.send_signal(signal.SIGTERM)
        assert await agent.ended(15) == 0
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(("told", "expected"), [((), "127.0.0.1"), (("--dashboard-address", ":0"), "0.0.0.0")])
async def test_a_scheduler_of_dask(folder: Path, start: Start, told: tuple[str, ...], expected: str) -> None:
    """The workers' HTTP, which asks for no certificate, is on loopback unless it is told where."""
    async with Scheduler(security=credentials(folder), **SCHEDULER) as scheduler:
        agent = start(*AGENT, scheduler.address, "--nthreads", "1", "--credentials", str(folder), *told)
        (worker,) = await wait_until(lambda: list(scheduler.workers.values()), 20)
        assert agent.popen.poll() is None
        listening = [each for process in agent.children() for each in process.net_connections("inet")]
        assert {each.laddr.ip for each in listening if each.laddr.port == worker.services["dashboard"]} == {expected}


def test_one_or_the_other(folder: Path, start: Start) -> None:
    both = start(*AGENT, "tls://127.0.0.1:1", "--credentials", str(folder), "--tls-ca-file", str(folder / "ca.pem"))
    assert both.popen.wait(20) == 1
    assert "--credentials cannot be given with --tls-ca-file" in both.output()


def test_files_of_others_are_named(tmp_path: Path, start: Start) -> None:
    missing = start(*AGENT, "tls://127.0.0.1:1", "--credentials", str(tmp_path / "nowhere"))
    assert missing.popen.wait(20) == 1
    assert "there is no ca.pem" in missing.output()
