"""Launcher of agents on other hosts over SSH, with asyncssh: the only module that imports it.

``~/.ssh/config``, known hosts, SSH agents and keys work as in asyncssh by default. The command line has the Python
interpreter and the module, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import inspect
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import asyncssh

from agentcluster.config import Config
from agentcluster.errors import ConfigError, LaunchError, suggest
from agentcluster.launch import Host
from agentcluster.launch.process import GRACE, MODULE, launch
from agentcluster.launch.protocol import Launched, Settings

#: Runs as ``sh -c START python``, whatever the login shell is. ``exec``: no shell stays in between. Python starts only
#: after an empty line, which is sent once the process id is known here: a process that could not be ended never starts.
#: "~/" is that host's home: the argument is quoted, so that no shell expands it.
START = (
    f'echo agentcluster-pid $$; read -r go && case "$0" in "~/"*) exec "$HOME/${{0#??}}" -m {MODULE};; '
    f'*) exec "$0" -m {MODULE};; esac'
)
PID = re.compile(rb"agentcluster-pid (\d+)\r?\n")

#: Runs as ``sh -c … pid``. A session of sshd is a process group, to which the workers belong.
SIGNALS = {"TERM": 'kill -s TERM "$0"', "KILL": 'kill -s KILL -- "-$0" 2>/dev/null || kill -s KILL "$0"'}


class SSHLauncher:
    """A :class:`~agentcluster.launch.protocol.Launcher` of an agent on a host over SSH.

    Parameters
    ----------
    host
        The host, with its options.

    Raises
    ------
    ConfigError
        When a name in its ``connect_options`` is not an option of asyncssh.
    """

    def __init__(self, host: Host) -> None:
        if not isinstance(host, Host):
            raise ConfigError(f"SSHLauncher(host={host!r}): give a Host, such as Host('gpu-1')", key="host")
        self.name = host.name or host.host
        self.where = str(host)
        self.standby = host.standby
        self.labels = host.labels
        self._host = host
        self._python = host.remote_python or sys.executable
        _check_options(host.connect_options, self.where)

    def __repr__(self) -> str:
        return f"SSHLauncher({self.where!r}, name={self.name!r})"

    async def launch(self, settings: Settings, *, timeout: float) -> Launched:
        """Start the agent; see :class:`~agentcluster.launch.protocol.Launcher`."""
        settings = dataclasses.replace(settings, environ={**settings.environ, **self._host.env})
        return await launch(self._start, settings, where=self.where, python=self._python, timeout=timeout)

    def _options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``asyncssh.connect``."""
        config = Config.load()
        keepalive = {
            "keepalive_interval": config.ssh_keepalive_interval,
            "keepalive_count_max": config.ssh_keepalive_count,
        }
        own = {"port": self._host.port, "username": self._host.user}
        return {**keepalive, **self._host.connect_options, **{k: v for k, v in own.items() if v is not None}}

    async def _start(self) -> _RemoteProcess:
        """Connect, and start the process."""
        try:
            connection = await asyncssh.connect(self._host.host, **self._options())
        except (OSError, ValueError, TypeError, asyncssh.Error) as error:
            raise LaunchError(self.where, _why_no_connection(error, self._host)) from error
        try:
            # A terminal, which ~/.ssh/config may ask for, would echo the settings and mix stderr into stdout.
            command = "exec " + shlex.join(["sh", "-c", START, self._python])
            process = await connection.create_process(command, encoding=None, request_pty=False)
            return _RemoteProcess(connection, process)
        except BaseException as error:
            await _hang_up(connection)
            if isinstance(error, OSError | asyncssh.Error):
                reason = f"the login succeeded, but the host refused to run a command: {error}"
                raise LaunchError(self.where, reason) from error
            raise


def _check_options(options: Mapping[str, object], where: str) -> None:
    """Refuse options that asyncssh does not have."""
    prepare = getattr(asyncssh.SSHClientConnectionOptions, "prepare", None)
    if prepare is None:
        return
    known = {*inspect.signature(prepare).parameters, *inspect.signature(asyncssh.connect).parameters}
    known -= {"self", "loop", "last_config", "reload", "canonical", "final", "host", "kwargs"}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"connect_options for {where}: asyncssh has no option {name!r}; {suggest(str(name), known)}",
                key=str(name),
            )


class _RemoteProcess:
    """A remote process with its own connection (a ``Process``)."""

    def __init__(self, connection: asyncssh.SSHClientConnection, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._connection = connection
        self._process = process
        self._before_go = b"\n"
        self.stdout = _RemoteReader(process.stdout, on_pid=self._go)
        self.stderr = _RemoteReader(process.stderr)

    def write(self, data: bytes) -> None:
        if self.stdout.pid is None:
            self._before_go += data
            return
        with contextlib.suppress(OSError):
            self._process.stdin.write(data)

    def _go(self) -> None:
        self.write(self._before_go)

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.write_eof()

    async def terminate(self) -> None:
        await self._signal("TERM")

    async def kill(self) -> None:
        await self._signal("KILL")

    async def _signal(self, name: str) -> None:
        """Send a signal by a command beside the process: sshd refuses SSH's own signals when the user is root."""
        if self.stdout.pid is not None:
            command = shlex.join(["sh", "-c", SIGNALS[name], str(self.stdout.pid)])
            with contextlib.suppress(OSError, asyncssh.Error):  # TimeoutError is an OSError
                async with asyncio.timeout(GRACE):
                    await self._connection.run(command, request_pty=False)
                    return
        with contextlib.suppress(OSError):
            self._process.send_signal(name)

    async def wait(self) -> int | None:
        await self._process.wait_closed()
        return self._process.returncode

    async def release(self) -> None:
        await _hang_up(self._connection)


class _RemoteReader:
    """A stream of a remote process; when the connection is lost, it ends with a line about that.

    Attributes
    ----------
    pid
        Process id on the host, once :data:`START` has printed it. That line is removed from the stream.
    """

    def __init__(self, reader: asyncssh.SSHReader[bytes], on_pid: Callable[[], None] | None = None) -> None:
        self._reader = reader
        self._lost = False
        self._on_pid = on_pid
        self._seen = b""
        self.pid: int | None = None

    async def read(self, n: int, /) -> bytes:
        chunk = await self._read(n)
        if self.pid is not None or self._on_pid is None:
            return chunk
        self._seen = self._seen[-64:] + chunk  # the line can arrive in two pieces
        if match := PID.search(self._seen):
            self.pid = int(match[1])
            self._on_pid()
            chunk = PID.sub(b"", chunk, count=1) or await self._read(n)
        return chunk

    async def _read(self, n: int) -> bytes:
        if self._lost:
            return b""
        try:
            return await self._reader.read(n)
        except (OSError, asyncssh.Error) as error:
            self._lost = True
            return f"connection lost: {error}\n".encode()


async def _hang_up(connection: asyncssh.SSHClientConnection) -> None:
    """Close a connection; abort it when that takes too long."""
    connection.close()
    try:
        async with asyncio.timeout(GRACE):
            await connection.wait_closed()
    except TimeoutError:
        connection.abort()


def _why_no_connection(error: Exception, host: Host) -> str:
    """Explain why there is no connection, with a remedy."""
    port = host.port or host.connect_options.get("port", 22)
    at = f"[{host.host}]:{port}" if ":" in host.host else f"{host.host}:{port}"
    match error:
        case socket.gaierror():
            return (
                f"the name {host.host!r} is not known ({error.strerror}); "
                f"check its spelling, or add it to ~/.ssh/config or DNS"
            )
        case asyncssh.PermissionDenied():
            return (
                f"{error.reason}, with {_keys(host)}; add your public key to ~/.ssh/authorized_keys there, or give "
                f"another user (user@{host.host}) or key (connect_options={{'client_keys': ['…']}})"
            )
        case asyncssh.HostKeyNotVerifiable() if _knows_another_key(host, port):
            return _changed_key(host, port)
        case asyncssh.HostKeyNotVerifiable():
            scan = f"ssh-keyscan -p {port} {host.host}"
            return (
                f"its host key is not trusted ({error.reason}); compare it and add it with '{scan} >> "
                f"~/.ssh/known_hosts', or accept any key (insecure) with connect_options={{'known_hosts': None}}"
            )
        case asyncssh.KeyImportError() | asyncssh.KeyEncryptionError():
            if "bcrypt" in str(error):  # as keys are encrypted by ssh-keygen
                return f'{_keys(host)} is encrypted; to read it, run here: pip install "agentcluster[bcrypt]"'
            return f"{_keys(host)} cannot be read: {error}; check connect_options={{'client_keys': …, 'passphrase': …}}"
        case asyncssh.Error():
            return f"the SSH connection to {at} failed: {error.reason or type(error).__name__}"
        case OSError(filename=str() | bytes() as filename):
            return f"cannot read {filename!r}: {error.strerror}; check connect_options and ~/.ssh/config"
        case ConnectionRefusedError():
            return _refused(at)
        case TimeoutError():
            return f"no answer from {at} in time; is the host up, and does no firewall block the port?"
        case OSError():
            # For a name with several addresses, asyncio raises one error without an errno.
            refused = f"[Errno {errno.ECONNREFUSED}]" in str(error)
            return _refused(at) if refused else f"no connection to {at}: {error}"
    return f"asyncssh cannot use its options: {error}; check connect_options and ~/.ssh/config"


def _knows_another_key(host: Host, port: int) -> bool:
    """Return whether a host, whose key was not accepted, is among the known hosts: with another key."""
    known = host.connect_options.get("known_hosts", ())
    known = os.path.expanduser("~/.ssh/known_hosts") if known == () else known
    try:
        keys, authorities, *_ = asyncssh.match_known_hosts(known, host.host, "", port)
    except (OSError, TypeError, ValueError, asyncssh.Error):  # whatever form it has, asyncssh could not use it either
        return False
    return bool(keys or authorities)


def _changed_key(host: Host, port: int) -> str:
    """Explain that a host showed another key than the known one; never with advice to accept it unseen."""
    name = host.host if port == 22 else f"[{host.host}]:{port}"
    given = host.connect_options.get("known_hosts", ())
    file = f" -f {shlex.quote(os.fspath(given))}" if isinstance(given, str | os.PathLike) else ""
    return (
        f"its host key has changed: it is not the one that is known for {name}. Either the host was installed anew, or "
        f"another machine answers in its place; nothing was sent to it. Compare the key with whoever runs the host, "
        f"and only then remove the old one (ssh-keygen -R {shlex.quote(name)}{file}) and add the new one"
    )


def _refused(at: str) -> str:
    return f"connection refused at {at}; is sshd running there, or does it listen at another port (host:port)?"


def _keys(host: Host) -> str:
    """Name the keys of a connection, never their content."""
    keys = host.connect_options.get("client_keys", ())
    if keys is None:
        return "no key"
    each = keys if isinstance(keys, list | tuple) else [keys]
    # A key can also be given by its content: text, bytes, or an object of asyncssh.
    files = [str(key) for key in each if isinstance(key, str | os.PathLike) and "PRIVATE KEY" not in str(key)]
    if files:
        return f"key {', '.join(files)}"
    return "the key that was given" if each else "the keys in ~/.ssh and those of the SSH agent"
