"""Hosts, launchers and the lines they exchange, over real subprocesses and real SSH servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import distributed
import psutil
import pytest

from agentcluster.errors import LaunchError, LaunchTimeout
from agentcluster.launch import Host, launchers_for
from agentcluster.launch.local import LocalLauncher
from agentcluster.launch.protocol import Launcher, Ready, Settings
from agentcluster.wire import PROTOCOL, plain
from tests.support import ssh_servers
from tests.support.ssh_servers import SSHServer
from tests.support.waiting import wait_until
from tests.support.zygote import Zygote

#: Seconds that no launch of these tests may come near.
PLENTY = 30.0

SECRET = "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n"


@pytest.fixture(params=["local", *ssh_servers.KINDS])
async def any_launcher(
    request: pytest.FixtureRequest, tmp_path: Path, zygote: Zygote
) -> AsyncIterator[Callable[..., Launcher]]:
    """How to make a launcher for a given python, locally and over each SSH server."""
    if request.param == "local":
        yield lambda python=None: LocalLauncher(python=python)
        return
    async with ssh_servers.serve(request.param, tmp_path, zygote) as server:
        yield lambda python=None: _ssh(server, remote_python=python)


def _host(server: SSHServer, **changes: Any) -> Host:
    options = {**server.connect_options, **changes.pop("options", {})}
    host = Host(server.host, user=server.username, port=server.port, connect_options=options)
    return dataclasses.replace(host, **changes)


def _ssh(server: SSHServer, **changes: Any) -> Launcher:
    (launcher,) = launchers_for(_host(server, **changes))
    return launcher


def _script(path: Path, text: str) -> str:
    """Write a program that is run in place of Python."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def _refusal(launcher: Launcher, timeout: float = PLENTY) -> LaunchError:
    """Return the error of a launch that must fail, and must do so before its deadline but for a LaunchTimeout."""
    start = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        await launcher.launch(Settings(security={"tls_client_key": SECRET}), timeout=timeout)
    assert time.monotonic() - start < timeout + 5
    assert str(caught.value).startswith(f"agent on {launcher.where} did not start: ")
    assert "secret" not in str(caught.value)
    return caught.value


# --- the two lines


# --- what processes say


# --- hosts


def test_nothing_heavy_is_imported_without_an_ssh_host() -> None:
    code = (
        "import sys; from agentcluster.launch import launchers_for, protocol; launchers_for('local');"
        "assert not {'asyncssh', 'distributed', 'dask'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PLENTY, cwd=ssh_servers.ROOT)


# --- what goes wrong before there is a process


async def test_wrong_port(server: SSHServer, unused_tcp_port: int) -> None:
    for host in ("127.0.0.1", "localhost"):
        error = await _refusal(_ssh(server, host=host, port=unused_tcp_port))
        assert f"connection refused at {host}:{unused_tcp_port}; is sshd running there" in error.reason


async def test_unknown_host_name(server: SSHServer) -> None:
    error = await _refusal(_ssh(server, host="gpu-1.invalid"))
    assert "the name 'gpu-1.invalid' is not known" in error.reason
    assert "check its spelling" in error.reason


async def test_wrong_key(server: SSHServer, tmp_path: Path) -> None:
    async with ssh_servers.serve("asyncssh", tmp_path) as other:
        keys = other.connect_options["client_keys"]
        error = await _refusal(_ssh(server, options={"client_keys": keys}))
    assert f"Permission denied for user {server.username}" in error.reason
    assert f"with key {keys[0]}; add your public key to ~/.ssh/authorized_keys there" in error.reason
    assert "connect_options={'client_keys': ['…']}" in error.reason


async def test_missing_and_damaged_key_file(server: SSHServer, tmp_path: Path) -> None:
    missing, damaged = str(tmp_path / "missing"), tmp_path / "damaged"
    damaged.write_text("not a key")
    error = await _refusal(_ssh(server, options={"client_keys": [missing]}))
    assert f"cannot read {missing!r}: No such file or directory; check connect_options" in error.reason
    error = await _refusal(_ssh(server, options={"client_keys": [str(damaged)]}))
    assert f"key {damaged} cannot be read: Invalid private key" in error.reason


async def test_encrypted_key_without_its_passphrase(server: SSHServer, tmp_path: Path) -> None:
    import asyncssh

    path = tmp_path / "locked"
    asyncssh.generate_private_key("ssh-rsa").write_private_key(path, passphrase="secret", format_name="pkcs8-pem")
    error = await _refusal(_ssh(server, options={"client_keys": [str(path)]}))
    assert f"key {path} cannot be read" in error.reason
    assert "'passphrase': …" in error.reason
    error = await _refusal(_ssh(server, options={"client_keys": [str(path)], "passphrase": "wrong-secret"}))
    assert f"key {path} cannot be read" in error.reason


def test_a_key_that_needs_bcrypt_says_how_to_get_it() -> None:
    import asyncssh

    from agentcluster.launch.ssh import _why_no_connection

    error = asyncssh.KeyEncryptionError("OpenSSH private key encryption requires bcrypt with KDF support")
    said = _why_no_connection(error, Host("gpu-1", connect_options={"client_keys": ["id"]}))
    assert said == 'key id is encrypted; to read it, run here: pip install "agentcluster[bcrypt]"'


async def test_unknown_host_key(server: SSHServer, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text("")
    error = await _refusal(_ssh(server, options={"known_hosts": str(tmp_path / "known_hosts")}))
    assert "its host key is not trusted" in error.reason
    assert f"'ssh-keyscan -p {server.port} 127.0.0.1 >> ~/.ssh/known_hosts'" in error.reason
    assert "connect_options={'known_hosts': None}" in error.reason


async def test_a_host_key_that_has_changed_is_not_one_that_is_unknown(server: SSHServer, tmp_path: Path) -> None:
    import asyncssh

    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {other}")
    error = await _refusal(_ssh(server, options={"known_hosts": str(known)}))
    assert "its host key has changed" in error.reason
    assert f"(ssh-keygen -R '[127.0.0.1]:{server.port}' -f {known})" in error.reason
    assert "ssh-keyscan" not in error.reason
    assert "None" not in error.reason


async def test_option_of_the_wrong_type(server: SSHServer) -> None:
    error = await _refusal(_ssh(server, options={"keepalive_interval": "soup"}))
    assert "asyncssh cannot use its options" in error.reason


async def test_port_that_says_nothing(server: SSHServer) -> None:
    connected: list[asyncio.StreamWriter] = []
    mute = await asyncio.start_server(lambda _, writer: connected.append(writer), "127.0.0.1", 0)
    async with mute:
        port = mute.sockets[0].getsockname()[1]
        error = await _refusal(_ssh(server, port=port), timeout=0.5)
        assert isinstance(error, LaunchTimeout)
        assert error.reason == "no connection was made within 0.5 s"
        for writer in connected:
            writer.close()
            await writer.wait_closed()


# --- what goes wrong with the process


async def test_missing_python(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    missing = str(tmp_path / "no such" / "python")
    error = await _refusal(any_launcher(missing))
    assert "Python cannot be run" in error.reason
    assert repr(missing) in error.reason
    if error.host != "local":
        assert "set remote_python= to the path of a Python there" in error.reason
        assert "not found" in error.last_output or "No such file" in error.last_output


async def test_a_tilde_is_the_home_there(server: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = _script(tmp_path / "my python", 'echo "this is $0" >&2; exit 3')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (await _refusal(LocalLauncher(python="~/my python"))).last_output == f"this is {python}"
    said = (await _refusal(_ssh(server, remote_python="~/my python"))).last_output
    # sshd does not take this process's home, but that of the user
    assert said == f"this is {python}" or f"{pwd.getpwuid(os.getuid()).pw_dir}/my python: not found" in said


async def test_python_that_may_not_be_run(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text("")
    error = await _refusal(any_launcher(str(path)))
    assert "Python cannot be run" in error.reason
    assert str(path) in error.reason


async def test_python_without_agentcluster(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    # -I -S: no PYTHONPATH, no working directory, no site-packages.
    bare = _script(tmp_path / "bare", f'exec {sys.executable} -I -S "$@"')
    error = await _refusal(any_launcher(bare))
    assert f"has no module 'agentcluster'; install agentcluster into it: {bare} -m pip install" in error.reason
    assert "No module named 'agentcluster'" in error.last_output


async def test_another_module_that_is_missing_is_named(any_launcher: Callable[..., Launcher]) -> None:
    options = plain({"plugins": [MadeElsewhere()]})
    settings = Settings(scheduler="tcp://127.0.0.1:1", options=options)
    with pytest.raises(LaunchError) as caught:
        await any_launcher().launch(settings, timeout=PLENTY)
    assert "has no module 'made_elsewhere', which it was made to import; install it there" in caught.value.reason
    assert "No module named 'made_elsewhere', imported at" in caught.value.last_output


class MadeElsewhere:
    """A value that is unpickled by a module that is nowhere."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("made_elsewhere",)


async def test_process_that_ends(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    error = await _refusal(any_launcher(_script(tmp_path / "p", "echo out; echo; echo the end >&2; exit 3")))
    assert error.reason == "ended with exit code 3 before it was ready"
    assert error.last_output in ("the end", "out")  # two streams: either may be read last
    error = await _refusal(any_launcher(_script(tmp_path / "p", "kill -9 $$")))
    assert error.reason == "was ended by signal 9 before it was ready"


async def test_process_that_closes_its_output(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    error = await _refusal(any_launcher(_script(tmp_path / "p", "echo $$ > $0.pid; exec sleep 1000 >&- 2>&-")))
    assert error.reason == "it closed its output, or its connection was lost, before it was ready"
    assert not psutil.pid_exists(int((tmp_path / "p.pid").read_text()))


async def test_process_that_floods(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    """Ten MB without a newline on each stream neither block the process nor reach the message."""
    flood = "head -c 10000000 /dev/zero | tr '\\0' x"
    error = await _refusal(any_launcher(_script(tmp_path / "p", f"{flood}; {flood} >&2; exit 4")))
    assert error.reason == "ended with exit code 4 before it was ready"
    assert len(error.last_output) < 1000


@pytest.mark.parametrize("deaf", ["", "trap '' TERM; "])
async def test_silent_process(any_launcher: Callable[..., Launcher], tmp_path: Path, deaf: str) -> None:
    silent = _script(tmp_path / "p", f"{deaf}echo $$ > $0.pid; exec sleep 1000")
    error = await _refusal(any_launcher(silent), timeout=1)
    assert isinstance(error, LaunchTimeout)
    assert isinstance(error, TimeoutError)
    assert error.reason == "it printed nothing within 1 s"
    assert not psutil.pid_exists(int((tmp_path / "p.pid").read_text()))


async def test_process_that_is_late(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    late = _script(tmp_path / "p", "printf 'Password: '; exec sleep 1000")
    error = await _refusal(any_launcher(late), timeout=1)
    assert isinstance(error, LaunchTimeout)
    assert error.reason == "it was not ready within 1 s"
    assert error.last_output == "Password:"


async def test_process_of_another_version(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    line = Ready("tcp://127.0.0.1:1", 1).encode().replace(f'"protocol":{PROTOCOL}', '"protocol":2')
    error = await _refusal(any_launcher(_script(tmp_path / "p", f"echo '{line}'; exec sleep 1000")))
    assert "the launched process has" in error.reason
    assert "with protocol 2, the cluster has" in error.reason


async def test_cancellation_leaves_no_process(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    silent = _script(tmp_path / "p", "echo $$ > $0.pid; exec sleep 1000")
    pid_file = tmp_path / "p.pid"
    launch = asyncio.create_task(any_launcher(silent).launch(Settings(), timeout=PLENTY))
    await wait_until(lambda: pid_file.exists() and pid_file.read_text())
    launch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launch
    assert not psutil.pid_exists(int(pid_file.read_text()))


async def test_cancellation_at_any_moment(any_launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    """Also before its id came back, or the answer that it runs: what ignores the end of its stdin ends too."""
    deaf = _script(tmp_path / "p", "echo $$ >> $0.pid; exec sleep 1000")

    async def cancelled(after: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                await any_launcher(deaf).launch(Settings(), timeout=PLENTY)

    for attempt in range(15):
        await cancelled(0.01 * attempt)
    await cancelled(1.5)
    pids = [int(line) for line in (tmp_path / "p.pid").read_text().split()]
    assert pids
    await wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


async def test_server_that_dies_during_launch(server: SSHServer, tmp_path: Path) -> None:
    # cat: it ends at EOF, as an agent does.
    mute = _script(tmp_path / "p", "echo $$ > $0.pid; exec cat > /dev/null")
    pid_file = tmp_path / "p.pid"
    launch = asyncio.create_task(_refusal(_ssh(server, remote_python=mute)))
    await wait_until(lambda: pid_file.exists() and pid_file.read_text())
    server.kill()
    error = await launch
    assert error.reason == "it closed its output, or its connection was lost, before it was ready"
    pid = int(pid_file.read_text())
    await wait_until(lambda: not psutil.pid_exists(pid))


# --- what goes right


def _settings(scheduler: distributed.Scheduler, **options: Any) -> Settings:
    environ = {"AGENTCLUSTER_SECRET": "known-to-nobody"}
    return Settings(scheduler=scheduler.address, config={"x": "known-to-nobody"}, environ=environ, options=options)


async def _tree(pid: int, scheduler: distributed.Scheduler) -> list[psutil.Process]:
    """Return a process and all below it, once its workers are there."""
    await wait_until(lambda: scheduler.workers)
    process = psutil.Process(pid)
    tree = [process, *process.children(recursive=True)]
    assert len(tree) > 1
    return tree


def _ended(tree: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in tree)


async def test_an_agent_runs_until_it_is_closed(
    any_launcher: Callable[..., Launcher], scheduler: distributed.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A variable that counts at the start: it is a new Python, and none that was forked.
    monkeypatch.setenv("PYTHONNODEBUGRANGES", "1")
    launcher = any_launcher()
    launched = await launcher.launch(_settings(scheduler), timeout=PLENTY)
    ready = launched.ready
    assert ready.address.startswith("tcp://")
    assert ready.hardware is not None
    assert ready.hardware.cpus > 0
    assert ready.versions["dask"] == importlib.metadata.version("dask")
    tree = await _tree(ready.pid, scheduler)
    assert tree[0].cmdline() == [sys.executable, "-m", "agentcluster.cli.launched"]
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any("known-to-nobody" in word for command in commands for word in command)

    waiting = asyncio.create_task(launched.wait())
    first = asyncio.create_task(launched.close(PLENTY))
    second = asyncio.create_task(launched.close(PLENTY))
    await asyncio.sleep(0)
    first.cancel()  # which must not stop the work that the second waits for
    await second
    await wait_until(lambda: _ended(tree))  # its resource tracker ends after it
    assert await waiting == 0
    await launched.close(0)
    assert await launched.wait() == 0

    # A launcher can be used again.
    again = await launcher.launch(_settings(scheduler), timeout=PLENTY)
    assert again.ready.pid != ready.pid
    await again.close(PLENTY)


async def test_an_agent_that_does_not_end_at_eof_is_made_to(
    any_launcher: Callable[..., Launcher], scheduler: distributed.Scheduler
) -> None:
    launched = await any_launcher().launch(_settings(scheduler), timeout=PLENTY)
    tree = await _tree(launched.ready.pid, scheduler)
    tree[0].suspend()
    await launched.close(0.1)
    assert await launched.wait() == -9
    await wait_until(lambda: _ended(tree))


async def test_the_end_of_an_agent_is_seen(
    any_launcher: Callable[..., Launcher], scheduler: distributed.Scheduler
) -> None:
    launched = await any_launcher().launch(_settings(scheduler), timeout=PLENTY)
    tree = await _tree(launched.ready.pid, scheduler)
    tree[0].kill()
    assert await asyncio.wait_for(launched.wait(), 10) == -9
    await wait_until(lambda: _ended(tree))
    await launched.close(PLENTY)
    assert await launched.wait() == -9


async def test_a_lost_connection_ends_the_agent(server: SSHServer, scheduler: distributed.Scheduler) -> None:
    launched = await _ssh(server).launch(_settings(scheduler), timeout=PLENTY)
    tree = await _tree(launched.ready.pid, scheduler)
    server.kill()
    assert await asyncio.wait_for(launched.wait(), 10) is None
    assert any(line.startswith("connection lost: ") for line in launched.log.lines())
    await wait_until(lambda: _ended(tree))
    await launched.close(PLENTY)


@pytest.mark.sshd
@pytest.mark.skipif(ssh_servers.SSHD is None, reason="OpenSSH's sshd is not installed")
@pytest.mark.parametrize("noticed", [True, False])
async def test_a_network_that_says_nothing_any_more(
    tmp_path: Path, scheduler: distributed.Scheduler, noticed: bool
) -> None:
    async with ssh_servers.serve("sshd", tmp_path) as server:
        options = {"keepalive_interval": 0.2} if noticed else {}
        launched = await _ssh(server, options=options).launch(_settings(scheduler), timeout=PLENTY)
        tree = await _tree(launched.ready.pid, scheduler)
        silent = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("sshd")]
        for process in silent:
            process.suspend()
        try:
            if noticed:
                assert await asyncio.wait_for(launched.wait(), 10) is None
            await asyncio.wait_for(launched.close(0.5), 15)
            assert await launched.wait() is None
        finally:
            for process in silent:
                process.resume()
        await wait_until(lambda: _ended(tree))


async def test_environment_reaches_the_workers(
    server: SSHServer, scheduler: distributed.Scheduler, tmp_path: Path
) -> None:
    (tmp_path / "only_there.py").write_text("def value():\n    return 5\n")
    launcher = _ssh(server, env={"AGENTCLUSTER_TEST_VALUE": "of the host", "PYTHONPATH": str(tmp_path)})
    launched = await launcher.launch(_settings(scheduler), timeout=PLENTY)
    try:
        await wait_until(lambda: scheduler.workers)
        async with distributed.Client(scheduler.address, asynchronous=True) as client:
            values = await client.run(os.getenv, "AGENTCLUSTER_TEST_VALUE")
            assert set(values.values()) == {"of the host"}
            assert await client.submit(lambda: __import__("only_there").value()) == 5
            # the agent's own interpreter had started by then
            paths = await client.run(lambda: __import__("sys").path, nanny=True)
            assert all(str(tmp_path) in path for path in paths.values())
    finally:
        await launched.close(PLENTY)


async def test_an_agent_refuses_settings_of_another_version(any_launcher: Callable[..., Launcher]) -> None:
    with pytest.raises(LaunchError) as caught:
        await any_launcher().launch(Settings(protocol=PROTOCOL + 1), timeout=PLENTY)
    assert caught.value.reason == "ended with exit code 1 before it was ready"
    assert "with protocol 2, the launched process has" in caught.value.last_output


LAUNCH = """
import asyncio, json, sys
from agentcluster.launch import Host, launchers_for
from agentcluster.launch.protocol import Settings

async def main():
    host, scheduler = json.loads(sys.stdin.readline())
    (launcher,) = launchers_for("local" if host is None else Host(**host))
    launched = await launcher.launch(Settings(scheduler=scheduler), timeout=30)
    print(launched.ready.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["local", *ssh_servers.KINDS])
async def test_killing_the_launching_process_ends_the_agent(
    kind: str, tmp_path: Path, scheduler: distributed.Scheduler
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        host = None
        if kind != "local":
            server = await stack.enter_async_context(ssh_servers.serve(kind, tmp_path))
            host = dataclasses.asdict(_host(server))
        pipe = asyncio.subprocess.PIPE
        python = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LAUNCH, stdin=pipe, stdout=pipe, cwd=ssh_servers.ROOT
        )
        assert python.stdin is not None
        assert python.stdout is not None
        python.stdin.write(json.dumps([host, scheduler.address]).encode() + b"\n")
        tree = await _tree(int(await python.stdout.readline()), scheduler)
        python.kill()
        await python.wait()
        await wait_until(lambda: _ended(tree))
