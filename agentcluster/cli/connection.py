"""How the operator's command reaches a scheduler, and what it makes of errors: options, connection, exit codes.

Exit codes: 0, it is done. 1, it was begun and went wrong; the message says what is true now. 2, it was refused and
nothing was touched. 3, there is no scheduler to ask, or none with agentcluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from typing import Any

import click
import dask.config
from dask.utils import natural_sort_key
from distributed.core import rpc
from distributed.security import Security

from agentcluster.agent.options import scheduler_address
from agentcluster.errors import (
    AgentClusterError,
    ConfigError,
    NodeNotFound,
    PreflightError,
    RolloutBusy,
    SchedulerUnfit,
)

#: Seconds within which a scheduler must answer the first call.
CONNECT = 10.0

FAILED, REFUSED, NOBODY = 1, 2, 3

OPTIONS = (
    click.option("--scheduler", help="Its address, such as tcp://10.0.0.1:8786. Default: dask's 'scheduler-address'."),
    click.option("--scheduler-file", type=click.Path(exists=True, dir_okay=False), help="File that it has written."),
    click.option("--tls-ca-file", type=click.Path(exists=True, dir_okay=False), help="CA's certificate (PEM)."),
    click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="Certificate (PEM)."),
    click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="Its private key (PEM)."),
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class NoScheduler(Exception):
    """There is no scheduler to ask, or none with agentcluster."""


class Connection:
    """A scheduler that answers, with agentcluster's calls as coroutines."""

    def __init__(self, scheduler: Any, address: str) -> None:
        self.scheduler, self.address = scheduler, address

    async def call(self, name: str, **arguments: Any) -> Any:
        """Call, and return what it answers."""
        return await getattr(self.scheduler, name)(**arguments)

    async def nodes(self) -> dict[str, dict[str, Any]]:
        """Return node -> what is known of it, by name."""
        try:
            async with asyncio.timeout(CONNECT + 2):  # connecting has CONNECT of its own, and says more
                found = await self.call("get_nodes")
        except (OSError, TimeoutError) as error:
            raise NoScheduler(f"no scheduler answers at {self.address}: {str(error) or 'it is silent'}") from error
        if not isinstance(found, Mapping):  # dask's way to say that it does not know the call
            raise NoScheduler(
                f"the scheduler at {self.address} has no agentcluster: no agent has joined it yet; start one with "
                f"'dask-agent {self.address}', or the scheduler with --preload agentcluster"
            )
        return {name: dict(found[name]) for name in sorted(found, key=natural_sort_key)}

    async def chosen(self, patterns: Iterable[str]) -> list[str] | None:
        """Return what is to be chosen as the scheduler takes it; None for all, where nothing is given."""
        await self.nodes()  # says so where there is nobody to choose
        return [each for pattern in patterns for each in pattern.split(",") if each] or None


@contextlib.asynccontextmanager
async def connected(options: Mapping[str, Any]) -> AsyncIterator[Connection]:
    """Reach the scheduler that the options name."""
    address = _address(options)
    given = {key: options[f"tls_{key}"] for key in ("ca_file", "cert", "key")}
    names = {"ca_file": "tls_ca_file", "cert": "tls_client_cert", "key": "tls_client_key"}
    security = Security(**{names[key]: value for key, value in given.items() if value})
    try:
        arguments = security.get_connection_args("client")
    except OSError as error:
        raise ConfigError(f"TLS credentials cannot be loaded: {error}") from error
    if address.startswith("tls://") and arguments.get("ssl_context") is None:
        raise ConfigError(f"{address} speaks TLS; give --tls-ca-file, --tls-cert and --tls-key")
    scheduler = rpc(address, timeout=CONNECT, connection_args=arguments)
    try:
        yield Connection(scheduler, address)
    finally:
        await scheduler.close_rpc()


def _address(options: Mapping[str, Any]) -> str:
    file, given = options["scheduler_file"], options["scheduler"]
    if file and given:
        raise ConfigError("--scheduler and --scheduler-file: give one of them")
    if file:
        try:
            with open(file) as stream:
                return str(json.load(stream)["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--scheduler-file {file!r} is no scheduler's: {error}") from error
    address = given or dask.config.get("scheduler-address", None)
    if not address:
        raise ConfigError(
            "which scheduler? give --scheduler tcp://…, --scheduler-file, or DASK_SCHEDULER_ADDRESS in the environment"
        )
    return scheduler_address(address)


def operates(command: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """Make a command of a coroutine that takes a :class:`Connection` first, with the options that name a scheduler."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        there = {key: options.pop(key) for key in ("scheduler", "scheduler_file", "tls_ca_file", "tls_cert", "tls_key")}

        async def main() -> int | None:
            async with connected(there) as connection:
                return await command(connection, **options)

        sys.exit(_exit_code(main()))

    for option in reversed(OPTIONS):
        run = option(run)
    return run


def _exit_code(main: Coroutine[Any, Any, int | None]) -> int:
    try:
        return asyncio.run(main) or 0
    except KeyboardInterrupt:
        return 0
    except (NoScheduler, SchedulerUnfit) as error:
        code, said = NOBODY, str(error)
    except (ConfigError, PreflightError, NodeNotFound, RolloutBusy) as error:
        code, said = REFUSED, str(error)
    except (AgentClusterError, TimeoutError) as error:
        code, said = FAILED, str(error) or "it took too long"
    except OSError as error:
        code, said = NOBODY, f"the connection to the scheduler ended: {error}"
    click.echo(f"agentcluster: {said}", err=True)
    return code


def printed(data: Any) -> None:
    """Print plain data as JSON."""
    click.echo(json.dumps(data, default=str))
