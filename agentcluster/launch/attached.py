"""Adopts an agent that already runs (``dask-agent --standby``), for as long as the cluster lives.

One connection to the agent is held open; its end, for whatever reason, stops the workers and returns the agent to
standby. Nothing is started here, and nothing secret is sent: the agent joins with the credentials that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

from distributed.comm.addressing import get_address_host_port
from distributed.comm.core import Comm, CommClosedError, connect
from distributed.core import clean_exception
from distributed.security import Security

from agentcluster.errors import AgentClusterError, LaunchError, LaunchTimeout
from agentcluster.launch.protocol import PROTOCOL, LogTail, Ready, Settings
from agentcluster.model import Hardware, from_wire, to_wire


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
                        "protocol": PROTOCOL,
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
    hardware = from_wire(Hardware, answer["hardware"], f"hardware of {address}")
    return Ready(address=answer["address"], pid=answer["pid"], versions=hardware.versions, hardware=hardware)


class Adopted:
    """An agent that belongs to this cluster until :meth:`close`."""

    def __init__(self, comm: Comm, ready: Ready) -> None:
        self.ready = ready
        self.log = LogTail()
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
