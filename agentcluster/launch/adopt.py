"""Adoption of agents in standby (``dask-agent --standby``), running already or started by another system.

One connection to the agent stays open; its end, for any reason, stops the workers and returns the agent to standby.
Nothing secret is sent: the agent joins with its own credentials. :class:`AttachedLauncher` adopts an agent that runs;
:class:`ManagedLauncher` first asks another system to start one, and returns it to that system at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import TypeVar

from distributed.comm.addressing import get_address_host_port
from distributed.security import Security

from agentcluster.config import Config
from agentcluster.errors import LaunchError, LaunchTimeout, VersionMismatch, one_line
from agentcluster.launch import check_agent_address, check_launcher
from agentcluster.launch.handshake import (
    LONG,
    Channel,
    HandshakeFailed,
    cluster_side,
    read_secret,
    refusal,
    secret_file,
)
from agentcluster.launch.protocol import LogTail, Ready, Settings
from agentcluster.security import is_loopback
from agentcluster.wire import REFUSED

logger = logging.getLogger(__name__)

T = TypeVar("T")

IS_IT_THERE = "is `dask-agent --standby` running there, at this port and with the same scheme (tcp:// or tls://)?"

#: Seconds between attempts to connect to an agent that does not listen yet.
PAUSE = 0.2


class AttachedLauncher:
    """A :class:`~agentcluster.launch.protocol.Launcher` that adopts a running agent.

    Parameters
    ----------
    address
        Address of the agent, such as ``tcp://10.0.0.5:8790``.
    name
        Name of the node.
    standby
        Adopt the agent only when its workers are needed, and release it when they are no longer needed.
    """

    def __init__(self, address: str, *, name: str, standby: bool = False) -> None:
        check_agent_address(address, "address")
        check_launcher(name, standby)
        self.address = address
        self.name = name
        self.standby = standby

    @property
    def where(self) -> str:
        """Address of the agent."""
        return self.address

    async def launch(self, settings: Settings, *, timeout: float) -> Adopted:
        """Adopt the agent.

        Parameters
        ----------
        settings
            Settings of the agent. Its name, its scheduler and its options are sent; credentials are not.
        timeout
            Seconds until the agent has joined the scheduler.

        Returns
        -------
        Adopted
            The agent.

        Raises
        ------
        LaunchError
            When the agent does not answer, belongs to another cluster or another user, cannot reach the scheduler, or
            speaks TLS where the cluster does not (or the reverse).
        LaunchTimeout
            When it was not adopted in time.
        """
        # The settings have the part of the cluster's credentials for workers.
        arguments = Security(**settings.security).get_connection_args("worker")
        encrypted = self.address.startswith("tls://")
        context: ssl.SSLContext | None = arguments["ssl_context"] if encrypted else None
        if encrypted and context is None:
            raise LaunchError(self.address, "it speaks TLS and this cluster does not; pass security=Security(…)")
        if not encrypted and arguments["require_encryption"]:
            raise LaunchError(
                self.address,
                "it is reached without encryption and this cluster requires it; start the agent with --tls-ca-file, "
                "--tls-cert, --tls-key and a --listen-address with tls://",
            )
        host, port = get_address_host_port(self.address, strict=True)
        request = Settings(name=settings.name, scheduler=settings.scheduler, options=settings.options).encode()
        there = f"the agent at {self.address}"
        channel: Channel | None = None
        try:
            async with asyncio.timeout(timeout):
                channel = Channel(*await _connection(host, port, context))
                # Read when it listens: it makes the secret before.
                secret = None if encrypted or not is_loopback(host) else read_secret(secret_file())
                await cluster_side(channel, secret, request, port=port, there=there)
                return Adopted(channel, _ready(self.address, await channel.receive_line(LONG)))
        except BaseException as error:
            if channel is not None:
                channel.abort()
            if isinstance(error, TimeoutError):
                raise LaunchTimeout(self.address, f"no answer within {timeout:g} s; {IS_IT_THERE}") from None
            if isinstance(error, VersionMismatch | HandshakeFailed):
                raise LaunchError(self.address, str(error)) from error
            if isinstance(error, OSError):
                raise LaunchError(self.address, f"{error}; {IS_IT_THERE}") from error
            raise


async def _connection(
    host: str, port: int, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an agent; one that does not listen yet is waited for, for a moment."""
    began = time.monotonic()
    while True:
        try:
            return await asyncio.open_connection(host, port, ssl=context)
        except ConnectionRefusedError:
            if time.monotonic() - began > REFUSED:
                raise
        await asyncio.sleep(PAUSE)


def _ready(address: str, line: str) -> Ready:
    """Parse the answer to the request."""
    ready = Ready.decode(line)
    if ready is None:
        raise HandshakeFailed(refusal(line))
    return ready


class Adopted:
    """An agent that belongs to this cluster until :meth:`close` (a :class:`~agentcluster.launch.protocol.Launched`).

    Parameters
    ----------
    channel
        Connection that keeps the agent.
    ready
        Address, process id and hardware of the agent.
    """

    def __init__(self, channel: Channel, ready: Ready) -> None:
        self.ready = ready
        self.log = LogTail(Config.load().log_lines)
        self._channel = channel
        self._ended = asyncio.create_task(channel.ended(), name=f"attached to {ready.address}")

    async def close(self, timeout: float) -> None:
        """Release the agent and wait until its workers have ended.

        Parameters
        ----------
        timeout
            Seconds for its workers to end.
        """
        if not self._ended.done():
            with contextlib.suppress(OSError):
                await self._channel.send({"release": True})
            await asyncio.wait([self._ended], timeout=timeout)
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)
        await self._channel.close()

    async def wait(self) -> int | None:
        """Wait until the agent no longer belongs to this cluster.

        Returns
        -------
        None
            The exit code of the agent is not known.
        """
        await asyncio.wait([self._ended])
        return None


#: Seconds between two calls of :meth:`ManagedLauncher.address`.
POLL = 0.5


class ManagedLauncher(ABC):
    """Base of a :class:`~agentcluster.launch.protocol.Launcher` for an agent that another system starts and stops.

    Parameters
    ----------
    name
        Name of the node.
    where
        Place of the agent, for messages; without a password.
    standby
        Start the agent only when its workers are needed, and stop it when they are no longer needed.

    Notes
    -----
    An error of the three methods becomes a :class:`~agentcluster.errors.LaunchError` that names `where`.
    """

    def __init__(self, name: str, where: str, *, standby: bool = False) -> None:
        check_launcher(name, standby, where)
        self.name = name
        self.where = where
        self.standby = standby

    @abstractmethod
    async def start(self) -> None:
        """Request one agent, ``dask-agent --standby --listen-address …``.

        Never cancelled, so that it is known what was requested; a call that can take long needs a timeout.

        Raises
        ------
        Exception
            When the request fails; :meth:`launch` makes it a LaunchError, or a LaunchTimeout of a TimeoutError.
        """

    @abstractmethod
    async def address(self) -> str | None:
        """Return the address of the agent.

        Returns
        -------
        str or None
            The address, such as ``tcp://10.0.0.5:8790``; None until the agent runs.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Stop the agent, or a request for it that is not yet served; return when it is gone.

        Called once for each :meth:`start` that did not fail, also when the agent never ran.

        Raises
        ------
        Exception
            When the agent could not be stopped; it is logged.
        """

    async def launch(self, settings: Settings, *, timeout: float) -> ManagedAgent:
        """Start an agent and adopt it.

        Parameters
        ----------
        settings
            Settings of the agent; its credentials are not sent.
        timeout
            Seconds until the agent has joined the scheduler.

        Returns
        -------
        ManagedAgent
            The agent.

        Raises
        ------
        LaunchError
            When a method of this launcher fails, or the agent cannot be adopted.
        LaunchTimeout
            When the agent was not adopted in time.
        """
        starting = asyncio.ensure_future(self._named(self.start()))
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(starting)
                while (address := await self._named(self.address())) is None:
                    await asyncio.sleep(POLL)
                adopted = await AttachedLauncher(address, name=self.name).launch(settings, timeout=timeout)
                return ManagedAgent(self, adopted)
        except BaseException as error:
            await asyncio.shield(self._undo(starting, timeout))
            if isinstance(error, TimeoutError):
                raise LaunchTimeout(self.where, f"its agent was not ready within {timeout:g} s") from error
            raise

    async def _named(self, call: Awaitable[T]) -> T:
        """Await a method; its error becomes one that names the place."""
        try:
            return await call
        except (LaunchError, TimeoutError):
            raise
        except OSError as error:
            raise LaunchError(self.where, f"it cannot be reached: {error}") from error
        except Exception as error:
            raise LaunchError(self.where, one_line(error)[:500]) from error

    async def _undo(self, starting: asyncio.Future[None], timeout: float) -> None:
        """Wait for the start, and stop the agent if it was started."""
        [failed] = await asyncio.gather(starting, return_exceptions=True)
        if failed is None or isinstance(failed, TimeoutError):  # without an answer, it may have been started
            await self.stop_within(timeout)

    async def stop_within(self, timeout: float) -> None:
        """Call :meth:`stop`; an error is only logged.

        Parameters
        ----------
        timeout
            Seconds for the call.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._named(self.stop())
        except (LaunchError, TimeoutError) as error:
            why = str(error) or f"not gone within {timeout:g} s"
            logger.warning("The agent of node %s may still run: %s", self.name, why)


class ManagedAgent:
    """An adopted agent that its system stops at the end (a :class:`~agentcluster.launch.protocol.Launched`).

    Parameters
    ----------
    launcher
        The launcher that started it.
    agent
        The adopted agent.
    """

    def __init__(self, launcher: ManagedLauncher, agent: Adopted) -> None:
        self.ready, self.log = agent.ready, agent.log
        self._launcher, self._agent = launcher, agent
        self._closing: asyncio.Task[None] | None = None

    async def wait(self) -> int | None:
        """Wait until the agent no longer belongs to this cluster.

        Returns
        -------
        None
            The exit code of the agent is not known.
        """
        return await self._agent.wait()

    async def close(self, timeout: float) -> None:
        """Release the agent and stop it; all callers wait for the same work.

        Parameters
        ----------
        timeout
            Seconds for its workers to end, and again for it to stop.
        """
        self._closing = self._closing or asyncio.create_task(self._close(timeout))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        await self._agent.close(timeout)
        await self._launcher.stop_within(timeout)
