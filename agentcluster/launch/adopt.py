"""Adopts an agent that already runs (``dask-agent --standby``), for as long as the cluster lives.

One connection to the agent is held open; its end, for whatever reason, stops the workers and returns the agent to
standby. Nothing is started here, and nothing secret is sent: the agent joins with the credentials that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any

from distributed.comm.addressing import get_address_host_port
from distributed.comm.core import Comm, CommClosedError, connect
from distributed.core import clean_exception
from distributed.security import Security

from agentcluster.config import Config
from agentcluster.errors import AgentClusterError, LaunchError, LaunchTimeout, VersionMismatch, one_line
from agentcluster.launch.protocol import LogTail, Ready, Settings
from agentcluster.model import Hardware
from agentcluster.wire import check_protocol, from_wire, spoken, to_wire

logger = logging.getLogger(__name__)


class AttachedLauncher:
    """A :class:`~agentcluster.launch.protocol.Launcher` for an agent that runs.

    Parameters
    ----------
    address
        Where the agent listens, such as ``tcp://10.0.0.5:8790``.
    name
        The node's name.
    standby
        Adopt it only when its workers are needed, and release it when they are not any more.
    """

    def __init__(self, address: str, *, name: str, standby: bool = False) -> None:
        self.address = address
        self.name = name
        self.standby = standby

    @property
    def where(self) -> str:
        """The agent's address."""
        return self.address

    async def launch(self, settings: Settings, *, timeout: float) -> Adopted:
        """Adopt the agent.

        Raises
        ------
        LaunchError
            When it does not answer, belongs to another cluster, cannot reach the scheduler, or speaks TLS where the
            cluster does not (or the reverse).
        LaunchTimeout
            When that took longer than `timeout` seconds.
        """
        # Of a cluster's credentials a launcher is told the part for workers.
        arguments = Security(**settings.security).get_connection_args("worker")
        if self.address.startswith("tls://") and arguments["ssl_context"] is None:
            raise LaunchError(self.address, "it speaks TLS and this cluster does not; pass security=Security(…)")
        if self.address.startswith("tcp://") and arguments["require_encryption"]:
            raise LaunchError(
                self.address,
                "it is reached without encryption and this cluster requires it; start the agent with --tls-ca-file, "
                "--tls-cert, --tls-key and a --listen-address with tls://",
            )
        comm: Comm | None = None
        try:
            async with asyncio.timeout(timeout):
                await _check_tls(self.address, arguments["ssl_context"])
                comm = await connect(self.address, timeout=timeout, **arguments)
                await comm.write(
                    {
                        "op": "adopt",
                        "scheduler": settings.scheduler,
                        "name": settings.name,
                        "options": to_wire(settings.options),
                        **spoken(),
                    }
                )
                return Adopted(comm, _ready(self.address, await comm.read()))
        except TimeoutError:
            _abort(comm)
            raise LaunchTimeout(
                self.address, f"no answer within {timeout:g} s; is `dask-agent --standby` running there?"
            ) from None
        except AgentClusterError:
            _abort(comm)
            raise
        except OSError as error:
            _abort(comm)
            raise LaunchError(
                self.address,
                f"{error}; is `dask-agent --standby --listen-address {self.address}` running there, and is tcp:// or "
                f"tls:// what it speaks?",
            ) from error
        except BaseException:
            _abort(comm)
            raise


async def _check_tls(address: str, context: ssl.SSLContext | None) -> None:
    """Raise :class:`ssl.SSLError` when TLS with `address` fails.

    Tornado drops a connection to one that speaks no TLS without closing it, and says only "not idle".
    """
    if not address.startswith("tls://"):
        return
    with contextlib.suppress(ConnectionError):  # connect() tries that again
        _, writer = await asyncio.open_connection(*get_address_host_port(address), ssl=context)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _abort(comm: Comm | None) -> None:
    if comm is not None:
        comm.abort()


def _ready(address: str, answer: Any) -> Ready:
    if not isinstance(answer, dict):
        raise LaunchError(address, "what listens there is no agent")
    if answer.get("status") != "OK":
        _, error, _ = clean_exception(**answer)
        raise LaunchError(address, str(error or answer.get("exception_text")))
    try:
        check_protocol(f"the agent at {address}", answer.get("protocol"), answer.get("version"), here="this cluster")
    except VersionMismatch as mismatch:
        raise LaunchError(address, str(mismatch)) from mismatch
    hardware = from_wire(Hardware, answer["hardware"], f"hardware of {address}")
    return Ready(address=answer["address"], pid=answer["pid"], versions=hardware.versions, hardware=hardware)


class Adopted:
    """An agent that belongs to this cluster until :meth:`close`."""

    def __init__(self, comm: Comm, ready: Ready) -> None:
        self.ready = ready
        self.log = LogTail(Config.load().log_lines)
        self._comm = comm
        self._ended = asyncio.create_task(self._follow(), name=f"attached to {ready.address}")

    async def _follow(self) -> None:
        with contextlib.suppress(CommClosedError, OSError):
            await self._comm.read()

    async def close(self, timeout: float) -> None:
        """Release the agent and wait until it says that its workers have ended."""
        if not self._ended.done():
            with contextlib.suppress(CommClosedError, OSError):
                await self._comm.write({"op": "release"})
            await asyncio.wait([self._ended], timeout=timeout)
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)
        await self._comm.close()

    async def wait(self) -> int | None:
        """Return when the agent is not this cluster's any more."""
        await asyncio.wait([self._ended])
        return None


#: Seconds between two looks whether the agent is there.
LOOK = 0.5


class ManagedLauncher(ABC):
    """A :class:`~agentcluster.launch.protocol.Launcher` for an agent that another system starts and stops.

    Parameters
    ----------
    name
        The node's name.
    where
        Where its agent runs, for messages; without a password.
    standby
        Ask for nothing until its workers are needed, and give the agent back when they are not any more.

    Notes
    -----
    What the three methods raise becomes a :class:`~agentcluster.errors.LaunchError` that names `where`.
    """

    def __init__(self, name: str, where: str, *, standby: bool = False) -> None:
        self.name = name
        self.where = where
        self.standby = standby

    @abstractmethod
    async def start(self) -> None:
        """Ask for one agent, ``dask-agent --standby --listen-address …``.

        Never cancelled, so that it is known what was asked for; a call that may take long needs a limit of its own.
        """

    @abstractmethod
    async def address(self) -> str | None:
        """Return where the agent listens, such as ``tcp://10.0.0.5:8790``; None as long as it is not there."""

    @abstractmethod
    async def stop(self) -> None:
        """Give the agent back, or what may be there of it; returns when it is gone.

        Called once for each :meth:`start` that did not fail, also when the agent never came.
        """

    async def launch(self, settings: Settings, *, timeout: float) -> ManagedAgent:
        """Have an agent started and adopt it; see :class:`~agentcluster.launch.protocol.Launcher`."""
        starting = asyncio.ensure_future(self._ask(self.start()))
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(starting)
                while (address := await self._ask(self.address())) is None:
                    await asyncio.sleep(LOOK)
                adopted = await AttachedLauncher(address, name=self.name).launch(settings, timeout=timeout)
                return ManagedAgent(self, adopted)
        except BaseException as error:
            await asyncio.shield(self._tidy(starting, timeout))
            if isinstance(error, TimeoutError):
                raise LaunchTimeout(self.where, f"no agent of it was ready within {timeout:g} s") from error
            raise

    async def _ask(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except (LaunchError, TimeoutError):
            raise
        except OSError as error:
            raise LaunchError(self.where, f"it cannot be reached: {error}") from error
        except Exception as error:
            raise LaunchError(self.where, one_line(error)[:500]) from error

    async def _tidy(self, starting: asyncio.Future[None], timeout: float) -> None:
        """Stop what was started, once it is known whether it was."""
        [failed] = await asyncio.gather(starting, return_exceptions=True)
        if failed is None or isinstance(failed, TimeoutError):  # no answer: it may have been
            await self.given_back(timeout)

    async def given_back(self, timeout: float) -> None:
        """Call :meth:`stop`, for at most so many seconds, and say where that failed."""
        try:
            async with asyncio.timeout(timeout):
                await self._ask(self.stop())
        except (LaunchError, TimeoutError) as error:
            why = str(error) or f"not gone within {timeout:g} s"
            logger.warning("The agent of node %s may still be there: %s", self.name, why)


class ManagedAgent:
    """The agent, adopted; closing it gives it back (a :class:`~agentcluster.launch.protocol.Launched`)."""

    def __init__(self, launcher: ManagedLauncher, agent: Adopted) -> None:
        self.ready, self.log = agent.ready, agent.log
        self._launcher, self._agent = launcher, agent
        self._closing: asyncio.Task[None] | None = None

    async def wait(self) -> int | None:
        """Return when the agent is not this cluster's any more."""
        return await self._agent.wait()

    async def close(self, timeout: float) -> None:
        """Release the agent, and give it back; every caller waits for the same end."""
        self._closing = self._closing or asyncio.create_task(self._close(timeout))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        await self._agent.close(timeout)
        await self._launcher.given_back(timeout)
