"""Handshake of a cluster and an agent in standby: short lines of JSON, and proof that both know one secret.

1. The cluster sends the versions of its protocol and a nonce.
2. The agent sends its own; with a secret its proof too, and ``wanted``: whether it wants one in return.
3. The cluster sends the digest of its request, with its proof.
4. The cluster sends the request, a :class:`~agentcluster.launch.protocol.Settings` line, which may be long.

The agent answers with a :class:`~agentcluster.launch.protocol.Ready` line when it has joined; ``{"refused": reason}``
takes the place of any of its answers. A proof is an HMAC over the sender's role, the nonces of both, the port at which
the agent listens and the digest: whoever listens learns neither the secret nor anything to send again, and who stands
between the two has another port.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.config
import platformdirs
from dask.utils import parse_timedelta

from agentcluster.config import Config
from agentcluster.errors import ConfigError
from agentcluster.security import written_aside
from agentcluster.wire import check_protocol, spoken

#: Bytes of the longest line before the peer is known, and of the longest afterwards.
SHORT, LONG = 4096, 64 * 1024 * 1024

#: Bytes of a secret, and of a nonce.
SIZE = 32

NOT_AN_AGENT = "the process that listens there is not an agent in standby"

#: Seconds for the end of a connection.
CLOSE = 2.0


class HandshakeFailed(ConnectionError):
    """A peer is not what it should be, or has not proved it."""


class Channel:
    """A connection that carries lines of JSON, each a mapping.

    Parameters
    ----------
    reader, writer
        The two directions of the connection.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._reader = reader
        self._rest = b""
        keep_alive(writer.get_extra_info("socket"))

    @property
    def host(self) -> str:
        """IP address of the other end."""
        return str((self._writer.get_extra_info("peername") or ["unknown"])[0])

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Speak TLS from here on, as the side that was connected to.

        Parameters
        ----------
        context
            Credentials of this side.

        Raises
        ------
        OSError
            When the other side does not, or its certificate is not trusted.
        """
        await self._writer.start_tls(context)

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Parameters
        ----------
        message
            Plain data.

        Raises
        ------
        OSError
            When the connection is lost.
        """
        await self.send_line(json.dumps(message, separators=(",", ":")))

    async def send_line(self, line: str) -> None:
        """Send a line.

        Parameters
        ----------
        line
            The line, without its newline.

        Raises
        ------
        OSError
            When the connection is lost.
        """
        self._writer.write(line.encode() + b"\n")
        await self._writer.drain()

    async def receive(self) -> dict[str, Any]:
        """Return the next message, of :data:`SHORT` bytes at most; an empty one for a line that is none.

        Raises
        ------
        HandshakeFailed
            When the connection ends first, or its next line is too long or no text.
        OSError
            When the connection is lost.
        """
        return _parse(await self.receive_line(SHORT))

    async def receive_line(self, limit: int) -> str:
        """Return the next line, without its newline.

        Parameters
        ----------
        limit
            Bytes of the longest line that is read.

        Raises
        ------
        HandshakeFailed
            When the connection ends first, or its next line is too long or no text.
        OSError
            When the connection is lost.
        """
        parts, size = [self._rest], len(self._rest)
        while b"\n" not in parts[-1]:
            if size > limit:
                raise HandshakeFailed(f"a line of more than {limit} bytes")
            if not (chunk := await self._reader.read(65536)):
                raise HandshakeFailed("it closed the connection")
            parts.append(chunk)
            size += len(chunk)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        try:
            return line.decode()
        except ValueError:
            raise HandshakeFailed("it sent no text") from None

    async def ended(self) -> None:
        """Return when the other end has closed the connection, sent anything more, or is lost."""
        with contextlib.suppress(OSError):
            await self._reader.read(1)

    async def close(self) -> None:
        """Close the connection; one whose TLS was cut off half-way is never told to asyncio as closed."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CLOSE):
                await self._writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        """Close the connection at once, without what was not sent yet."""
        self._writer.transport.abort()


def keep_alive(connection: socket.socket) -> None:
    """Set the time after which the kernel ends a connection whose other end does not answer.

    Parameters
    ----------
    connection
        The connection's socket; the time is ``distributed.comm.timeouts.tcp``.
    """
    probes = 4
    given = parse_timedelta(dask.config.get("distributed.comm.timeouts.tcp"), default="s")
    seconds = max(probes + 1, int(given))
    interval = max(1, seconds // (probes + 1))
    values = {
        (socket.SOL_SOCKET, "SO_KEEPALIVE"): 1,
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE"): seconds - probes * interval,
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL"): interval,
        (socket.IPPROTO_TCP, "TCP_KEEPCNT"): probes,
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"): seconds * 1000,
    }
    for (level, name), value in values.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has all of them
            with contextlib.suppress(OSError):  # of one that is closed already
                connection.setsockopt(level, option, value)


# -- the secret --------------------------------------------------------------------------------------------------------


def secret_file() -> Path:
    """Return the path of this user's secret: ``agentcluster.secret-file``, or its default."""
    given = Config.load().secret_file
    return Path(given).expanduser() if given else platformdirs.user_state_path("agentcluster") / "standby-secret"


def read_secret(path: Path) -> bytes | None:
    """Read a secret.

    Parameters
    ----------
    path
        Its file.

    Returns
    -------
    bytes or None
        The secret; None where there is no file.

    Raises
    ------
    ConfigError
        When the file belongs to another user, others may read or write it, or it has no secret in it.
    """
    try:
        with open(path, "rb") as file:
            found, text = os.fstat(file.fileno()), file.read(4 * SIZE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"secret file {str(path)!r} cannot be read: {error.strerror}", key="secret-file") from None
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"secret file {str(path)!r} has mode {stat.S_IMODE(found.st_mode):04o} and user id {found.st_uid}; it must "
            f"be readable by user id {os.getuid()} alone: chmod 600 it, or remove it and let an agent make another",
            key="secret-file",
        )
    if len(text.strip()) != 2 * SIZE:
        raise ConfigError(
            f"secret file {str(path)!r} has no secret of {2 * SIZE} characters; remove it and start the agent again",
            key="secret-file",
        )
    return text.strip()


def make_secret(path: Path) -> bytes:
    """Read a secret, or make it where there is none.

    Parameters
    ----------
    path
        Its file; it gets mode 0600, and its folder 0700 where that is made too.

    Raises
    ------
    ConfigError
        When it can be neither made nor read.
    """
    if (known := read_secret(path)) is not None:
        return known
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Linked, not moved: of two that make it one is first, and the other takes that.
        with (
            written_aside(path, f"{secrets.token_hex(SIZE)}\n".encode()) as aside,
            contextlib.suppress(FileExistsError),
        ):
            os.link(aside, path)
    except OSError as error:
        raise ConfigError(
            f"secret file {str(path)!r} cannot be made: {error.strerror}; set agentcluster.secret-file to a path in a "
            f"folder of your own",
            key="secret-file",
        ) from None
    made = read_secret(path)
    if made is None:
        raise ConfigError(f"secret file {str(path)!r} was removed as soon as it was made", key="secret-file")
    return made


# -- the two sides -----------------------------------------------------------------------------------------------------


async def agent_side(channel: Channel, secret: bytes | None, *, wanted: bool, port: int, here: str) -> str:
    """Return the request of a cluster that has proved itself.

    Parameters
    ----------
    channel
        Connection to the cluster.
    secret
        The agent's secret; None where certificates have proved the cluster already.
    wanted
        Whether the cluster must know the secret.
    port
        Port at which the agent listens.
    here
        The agent, for messages.

    Raises
    ------
    HandshakeFailed
        When the peer is not a cluster, or has not proved itself.
    VersionMismatch
        When the cluster has another version of the protocol.
    OSError
        When the connection is lost.
    """
    first = await channel.receive()
    theirs, ours = first.get("nonce"), secrets.token_hex(SIZE)
    if not isinstance(theirs, str) or "protocol" not in first:
        raise HandshakeFailed("not the request of a cluster")
    check_protocol(f"the cluster at {channel.host}", first["protocol"], first.get("version"), here=here)
    answer: dict[str, Any] = {**spoken(), "nonce": ours, "wanted": wanted}
    if secret is not None:
        answer["proof"] = _proof(secret, "agent", port, theirs, ours)
    await channel.send(answer)
    second = await channel.receive()
    digest, given = second.get("digest"), second.get("proof")
    if wanted and not (secret is not None and _equal(given, _proof(secret, "cluster", port, theirs, ours, digest))):
        raise HandshakeFailed("its proof of the secret is wrong")
    request = await channel.receive_line(LONG)
    if digest != _digest(request):
        raise HandshakeFailed("its request is not the one that it has proved")
    return request


async def cluster_side(channel: Channel, secret: bytes | None, request: str, *, port: int, there: str) -> None:
    """Prove this cluster to an agent, and send a request.

    Parameters
    ----------
    channel
        Connection to the agent.
    secret
        The secret of this user; None without one, or where certificates have proved both sides already.
    request
        The line to send.
    port
        Port at which the agent listens.
    there
        The agent, for messages.

    Raises
    ------
    HandshakeFailed
        When the peer is not an agent in standby, has not proved itself, or wants a proof that cannot be given.
    VersionMismatch
        When the agent has another version of the protocol.
    OSError
        When the connection is lost.
    """
    ours = secrets.token_hex(SIZE)
    await channel.send({**spoken(), "nonce": ours})
    try:
        line = await channel.receive_line(SHORT)
    except HandshakeFailed as error:
        raise HandshakeFailed(f"{NOT_AN_AGENT}, or it speaks TLS (tls://…): {error}") from None
    answer = _parse(line)
    theirs = answer.get("nonce")
    if not isinstance(theirs, str) or "protocol" not in answer:
        raise HandshakeFailed(refusal(line))
    check_protocol(there, answer["protocol"], answer.get("version"), here="this cluster")
    if secret is not None and "proof" in answer:
        if not _equal(answer["proof"], _proof(secret, "agent", port, ours, theirs)):
            raise HandshakeFailed(f"it does not know the secret in {secret_file()}, so it is another user's")
    elif secret is not None:
        raise HandshakeFailed(f"it gives no proof of the secret in {secret_file()}, so it is another user's")
    elif answer.get("wanted"):
        raise HandshakeFailed(
            f"it wants proof of a secret, and there is none in {secret_file()}; run the cluster as the user that "
            f"started the agent, or set agentcluster.secret-file to the file that the agent's log names"
        )
    digest = _digest(request)
    said = {} if secret is None else {"proof": _proof(secret, "cluster", port, ours, theirs, digest)}
    await channel.send({"digest": digest, **said})
    await channel.send_line(request)


def refusal(line: str) -> str:
    """Return the reason in a refusal.

    Parameters
    ----------
    line
        The line that came in place of an answer.
    """
    reason = _parse(line).get("refused")
    return reason if isinstance(reason, str) else NOT_AN_AGENT


def _parse(line: str) -> dict[str, Any]:
    """Return a message; an empty one for what is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _digest(request: str) -> str:
    return hashlib.sha256(request.encode()).hexdigest()


def _proof(secret: bytes, role: str, port: int, cluster: str, agent: str, digest: object = "") -> str:
    """Return the proof of a sender, for the nonces of both sides."""
    said = json.dumps([role, port, cluster, agent, digest])
    return hmac.new(secret, said.encode(), "sha256").hexdigest()


def _equal(given: object, expected: str) -> bool:
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, expected)
