"""Agent in standby: the port where a cluster proves itself, adopts an agent, and keeps it while it stays connected.

Nothing that a peer sends is unpickled, and only short lines of JSON are read, before the peer has proved itself: by a
certificate where the port speaks TLS, otherwise by the secret in a file of the user
(:mod:`agentcluster.launch.handshake`). Each adoption has an :class:`~agentcluster.agent.agent.Agent` of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import ssl
import time
from collections.abc import Generator
from typing import Any, Self

from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.security import Security
from distributed.utils import get_ip

from agentcluster.agent.agent import Agent
from agentcluster.agent.nanny import StartMethod
from agentcluster.agent.options import listen_address
from agentcluster.cli.launched import introduce
from agentcluster.errors import ConfigError, one_line
from agentcluster.launch import handshake
from agentcluster.launch.handshake import Channel
from agentcluster.launch.protocol import Settings
from agentcluster.security import LOOPBACK, connection_args, has_certificates, is_loopback
from agentcluster.wire import Handshakes, unpickled

logger = logging.getLogger(__name__)

#: Seconds for a peer to prove itself.
HANDSHAKE = 10.0

#: Greatest number of peers that have not proved themselves yet: of one host, and of all.
MOST_OF_ONE, MOST = 8, 64

#: Number of refused peers after which their memory is freed.
COLLECT = 32

#: Seconds between two log records about refused peers.
QUIET = 60.0

WANTS_TLS = (
    "%s is open to others, and who adopts an agent runs any code as its user: give --credentials DIR (made by "
    "`agentcluster credentials DIR`) or --tls-ca-file, --tls-cert and --tls-key for TLS, or listen on this machine "
    "alone, as without --listen-address; --insecure listens there all the same"
)

INSECURE = (
    "No TLS (--insecure): whoever reaches %s can run any code as user id %d, and who is between can read what is sent"
)


class Standby:
    """Listens for clusters, and has an agent for as long as one of them has adopted it.

    Parameters
    ----------
    listen_host
        Where to listen, with or without a scheme; default is `host` or `interface`, or else every address with TLS and
        loopback without.
    port
        Its port; 0 for any free one.
    insecure
        Listen without TLS where others can connect, and adopt whoever asks there.
    security
        Credentials of the agent and its workers.
    **options
        Keyword arguments of :class:`~agentcluster.agent.agent.Agent`; those of a cluster are added to them.

    Attributes
    ----------
    address
        Address at which clusters reach it.
    agent
        The agent, while a cluster has it.
    """

    def __init__(
        self,
        listen_host: str | None = None,
        port: int = 0,
        *,
        insecure: bool = False,
        security: Security | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.security = security if isinstance(security, Security) else Security(**(security or {}))
        self.address = ""
        self.agent: Agent | None = None
        self._listen_host, self._wanted_port, self._insecure = listen_host, port, insecure
        self._options = options
        self._door: _Door | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._log = _RefusalLog()
        self._ended = asyncio.Event()

    def __await__(self) -> Generator[object, None, Self]:
        return self._start().__await__()

    @property
    def node_name(self) -> str:
        """Name of the node."""
        name = self._options.get("name")
        return self.agent.node_name if self.agent is not None else str(name or socket.gethostname())

    # -- start and end -------------------------------------------------------------------------------------------------

    async def _start(self) -> Self:
        where = self._where()
        connection_args(self.security, where)
        scheme, _, location = where.partition("://")
        host, port = parse_host_port(location, 0)
        private = scheme == "tls" or is_loopback(host)
        if not private and not self._insecure:
            raise ConfigError(WANTS_TLS % where)
        tls: ssl.SSLContext | None = None
        secret: bytes | None = None
        if scheme == "tls":
            tls = self.security.get_listen_args("worker")["ssl_context"]
        else:
            path = handshake.secret_file()
            secret = handshake.make_secret(path)
            logger.info("Clusters prove themselves by the secret in %s", path)
        try:
            server = await asyncio.start_server(self._accept, host or None, port or 0)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error
            raise ConfigError(f"cannot listen at {where}: {why}; check --listen-address") from error
        # Every address is two sockets, which may have two ports.
        sockets = [each for each in server.sockets if each.family == socket.AF_INET] or list(server.sockets)
        bound = int(sockets[0].getsockname()[1])
        self.address = f"{scheme}://{unparse_host_port(get_ip() if _is_wildcard(host) else host, bound)}"
        self._door = _Door(server, bound, tls, secret, wanted=private, here=f"the agent at {self.address}")
        if not private:
            logger.warning(INSECURE, self.address, os.getuid())
        StartMethod.acquire(dashboard=bool(self._options.get("dashboard")))
        return self

    def _where(self) -> str:
        """Return the address to listen at, with its scheme and the wanted port."""
        host, interface, protocol = (self._options.get(key) for key in ("host", "interface", "protocol"))
        certified = has_certificates(self.security)
        listen = self._listen_host or host
        if listen is None and interface is None and not certified:
            listen = LOOPBACK
        protocol = protocol or ("tls" if certified else "tcp")
        try:
            where = listen_address(
                None,
                self.security,
                host=listen,
                interface=interface,
                protocol=None if listen and "://" in listen else protocol,
                port=self._wanted_port,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot listen at {listen or interface}: {error}; check --listen-address") from None
        if where.partition("://")[0] not in ("tcp", "tls"):
            raise ConfigError(f"cannot listen at {where}: an agent in standby listens at tcp://… or tls://…")
        return where

    async def finished(self) -> None:
        """Wait until it is closed."""
        await self._ended.wait()

    async def retire(self, hurry: asyncio.Event) -> None:
        """Move the data of the agent's workers to other nodes; see :meth:`agentcluster.agent.agent.Agent.retire`.

        Parameters
        ----------
        hurry
            Ends the call when it is set.
        """
        if self.agent is not None:
            await self.agent.retire(hurry)

    async def close(self, reason: str = "close") -> None:
        """Stop listening, release the agent, and end all connections.

        Parameters
        ----------
        reason
            Reason for the log.
        """
        if self._door is None:
            return
        self._door.server.close()
        for task in self._serving:
            task.cancel(reason)
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._door.server.wait_closed()
        self._door = None
        StartMethod.release()
        self._ended.set()

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(Channel(reader, writer)))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, channel: Channel) -> None:
        """Answer one peer, to the end of its connection."""
        assert self._door is not None
        try:
            try:
                request = await self._door.request(channel)
            except (OSError, TimeoutError) as error:
                self._log.add(channel.host, error)
                channel.abort()
                return
            await self._adopt(channel, Settings.decode(request))
        except Exception as error:  # also of a value that cannot be unpickled here
            with contextlib.suppress(OSError):
                await channel.send({"refused": one_line(error)})
        finally:
            await channel.close()

    async def _adopt(self, channel: Channel, settings: Settings) -> None:
        """Run an agent in a cluster, until its connection, its scheduler or the agent ends."""
        if self.agent is not None:
            raise ConfigError(
                f"agent at {self.address} already belongs to the cluster at {self.agent.scheduler_address}; close that "
                f"cluster first"
            )
        options = {**self._options, **unpickled(settings.options)}
        if settings.name is not None:
            options["name"] = settings.name
        agent = self.agent = Agent(settings.scheduler, security=self.security, lasting=True, **options)
        released = asyncio.ensure_future(channel.ended())
        starting = asyncio.ensure_future(agent)
        try:
            await asyncio.wait([starting, released], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await channel.send_line(introduce(settings.role, starting.result()).encode())
                ended = asyncio.ensure_future(agent.finished())
                await asyncio.wait([ended, released], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (released, starting):
                task.cancel()
            await asyncio.gather(released, starting, return_exceptions=True)
            await agent.close(reason="released")
            self.agent = None
            logger.info("Agent of node %s was released by %s", agent.node_name, settings.scheduler)


class _Door:
    """Lets in whoever proves to be a cluster; there are few others at a time, and not for long.

    Parameters
    ----------
    server, port
        What listens, and at which port.
    tls
        Context of TLS; None without.
    secret
        The secret; None with TLS.
    wanted
        Whether a cluster must prove that it knows the secret.
    here
        The agent, for messages.
    """

    def __init__(
        self,
        server: asyncio.Server,
        port: int,
        tls: ssl.SSLContext | None,
        secret: bytes | None,
        *,
        wanted: bool,
        here: str,
    ) -> None:
        self.server = server
        self._port, self._tls, self._secret, self._here = port, tls, secret, here
        self._wanted = wanted and tls is None
        self.handshakes = Handshakes(HANDSHAKE, of_one=MOST_OF_ONE, of_all=MOST)

    async def request(self, channel: Channel) -> str:
        """Return the request of a peer that has proved to be a cluster.

        Parameters
        ----------
        channel
            Connection to the peer.

        Raises
        ------
        OSError, TimeoutError, VersionMismatch
            When it is none, or does not answer; or has another version, which it may be told.
        """
        async with self.handshakes.limited(channel.host):
            if self._tls is not None:
                await channel.start_tls(self._tls)
            return await handshake.agent_side(
                channel, self._secret, wanted=self._wanted, port=self._port, here=self._here
            )


class _RefusalLog:
    """Logs peers that were refused: of many one in a while, with their number; and frees what they leave."""

    def __init__(self) -> None:
        self._count, self._said = 0, -QUIET
        self._left = 0

    def add(self, peer: str, error: Exception) -> None:
        """Count a peer, and log it unless another was logged just now."""
        self._count += 1
        self._left += 1
        if self._left == COLLECT:  # each leaves a circle of objects, with TLS one that has a buffer of 256 KiB
            self._left = 0
            gc.collect()
        if time.monotonic() - self._said >= QUIET:
            why = "it said nothing in time" if isinstance(error, TimeoutError) else one_line(error)[:200]
            logger.warning("Refused %d connections that no cluster made, the last from %s: %s", self._count, peer, why)
            self._count, self._said = 0, time.monotonic()


def _is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")
