"""Connection of the operator's command to a scheduler: its options, its calls, and the exit codes of errors.

Exit codes: 0, done. 1, begun and failed; the message describes the state of the cluster. 2, refused; nothing was
changed. 3, no scheduler answers, or it cannot be used: it has no agentcluster, or one of another protocol. 130, ended
by Ctrl-C before the answer came.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import click
import dask.config
from dask.utils import natural_sort_key
from distributed.core import rpc

from agentcluster.agent.options import scheduler_address
from agentcluster.errors import (
    AgentClusterError,
    ConfigError,
    NodeNotFound,
    PreflightError,
    RolloutBusy,
    SchedulerUnfit,
    VersionMismatch,
)
from agentcluster.security import connection_args, credentials_of_options
from agentcluster.wire import TOPIC, check_protocol, is_unicode, unless_refused

#: Seconds within which a scheduler must answer the first call.
CONNECT = 10.0

#: Plain data of the scheduler, by name.
Facts: TypeAlias = Mapping[str, Any]

FAILED, REFUSED, NO_SCHEDULER, INTERRUPTED = 1, 2, 3, 130

#: Commands that a person ends with Ctrl-C, and those whose work goes on without them.
LOOKS, CHANGES = ("top", "events", "logs"), ("reprovision", "scale")

OPTIONS = (
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Address of the scheduler, such as tcp://10.0.0.1:8786.  [default: dask's scheduler-address]",
    ),
    click.option(
        "--scheduler-file", type=click.Path(exists=True, dir_okay=False), help="File that the scheduler has written."
    ),
    click.option(
        "--credentials",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="Folder that `agentcluster credentials` wrote, in place of the three options of TLS.",
    ),
    click.option("--tls-ca-file", type=click.Path(exists=True, dir_okay=False), help="Certificate of the CA (PEM)."),
    click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="Certificate of the client (PEM)."),
    click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="Private key of the client (PEM)."),
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class NoScheduler(Exception):
    """No scheduler answers, or it has no agentcluster."""


class Connection:
    """Agentcluster's calls on a scheduler.

    Parameters
    ----------
    scheduler
        The scheduler's calls, such as :class:`distributed.core.rpc`.
    address
        Address of the scheduler, for messages.

    Notes
    -----
    The first call checks that the scheduler answers, has agentcluster, and speaks this side's protocol; it raises
    :class:`NoScheduler` or :class:`~agentcluster.errors.VersionMismatch` otherwise.
    """

    def __init__(self, scheduler: Any, address: str) -> None:
        self.address = address
        self._scheduler = scheduler
        self._checked = False

    async def call(self, name: str, **arguments: object) -> Facts:
        """Make a call that answers with a mapping.

        Parameters
        ----------
        name
            Name of the call, such as ``scale_nodes``.
        **arguments
            Its arguments, plain data.

        Returns
        -------
        mapping
            The answer, plain data.
        """
        return dict(await self._call(name, **arguments))

    async def nodes(self) -> Mapping[str, Facts]:
        """Return the nodes.

        Returns
        -------
        dict
            Node name -> its description, sorted by name.
        """
        found = await self._call("get_nodes")
        return {name: found[name] for name in sorted(found, key=natural_sort_key)}

    async def rollout(self) -> Facts | None:
        """Return the progress of the rollout that runs.

        Returns
        -------
        mapping or None
            Fields of :class:`agentcluster.model.RolloutStatus`; None when no rollout runs.
        """
        status: Facts | None = await self._call("rollout_status")
        return status

    async def logs(self, nodes: Sequence[str] | None) -> Mapping[str, Sequence[str]]:
        """Return the last lines that agents logged.

        Parameters
        ----------
        nodes
            Names of nodes, with wildcards; None for all.

        Returns
        -------
        mapping
            Node name -> lines.
        """
        return await self.call("get_node_logs", nodes=nodes)

    async def events(self) -> Sequence[tuple[float, Facts]]:
        """Return the events of rollouts and of adaptive scaling that the scheduler has kept.

        Returns
        -------
        sequence
            Time of each event in seconds since the epoch, and the event.
        """
        return [(when, event) for when, event in await self._call("events", topic=TOPIC)]

    async def _call(self, name: str, **arguments: object) -> Any:
        if not self._checked:
            await self._check()
            self._checked = True
        return await getattr(self._scheduler, name)(**arguments)

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(CONNECT + 2):  # connecting has its own timeout, with a better message
                answer = await unless_refused(self._scheduler.get_provision_mode(), self.address)
        except (OSError, TimeoutError) as error:
            raise NoScheduler(f"no scheduler answers at {self.address}: {str(error) or 'no answer in time'}") from error
        if not isinstance(answer, Mapping):  # dask's answer to a call that it does not know
            raise NoScheduler(
                f"the scheduler at {self.address} has no agentcluster: no agent has joined it yet; start one with "
                f"'dask-agent {self.address}', or the scheduler with --preload agentcluster"
            )
        peer = f"the scheduler at {self.address}"
        check_protocol(peer, answer.get("protocol"), answer.get("version"), here="this command")


def selection(patterns: Iterable[str], option: str = "--nodes") -> list[str] | None:
    """Return the selection of nodes that options make.

    Parameters
    ----------
    patterns
        Names, with wildcards, each also with commas between several.
    option
        The option, for messages.

    Returns
    -------
    list or None
        Names and patterns; None for all nodes, when nothing is given.

    Raises
    ------
    ConfigError
        For text that names no node, such as that of a variable which is not set.
    """
    chosen: list[str] = []
    for pattern in patterns:
        names = [each for each in pattern.split(",") if each.strip()]
        if not names:
            raise ConfigError(f"{option} {pattern!r} names no node; leave it out for all of them")
        chosen += names
    return chosen or None


@contextlib.asynccontextmanager
async def connected(options: Mapping[str, str | None]) -> AsyncIterator[Connection]:
    """Open a connection to the scheduler that the options name.

    Parameters
    ----------
    options
        Values of :data:`OPTIONS`, by parameter name.

    Raises
    ------
    ConfigError
        When the options name no scheduler, or its credentials cannot be used.
    """
    address = _address(options)
    names = {"tls_ca_file": "tls_ca_file", "tls_cert": "tls_client_cert", "tls_key": "tls_client_key"}
    files = {name: options[option] for option, name in names.items() if options[option]}
    security = credentials_of_options(options.get("credentials"), files, "client")
    arguments = connection_args(security, address, "client")
    scheduler = rpc(address, timeout=CONNECT, connection_args=arguments)
    try:
        yield Connection(scheduler, address)
    finally:
        await scheduler.close_rpc()


def _address(options: Mapping[str, str | None]) -> str:
    """Return the address of the scheduler that the options, or dask's configuration, name."""
    file, given = options["scheduler_file"], options["scheduler"]
    if file and given:
        raise ConfigError("--scheduler and --scheduler-file: give one of them")
    if file:
        try:
            with open(file) as stream:
                return str(json.load(stream)["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--scheduler-file {file!r} was not written by a scheduler: {error}") from error
    address = dask.config.get("scheduler-address", None) if given is None else given
    if address is None:
        raise ConfigError(
            "no scheduler: give --scheduler tcp://…, --scheduler-file, or set DASK_SCHEDULER_ADDRESS in the environment"
        )
    return scheduler_address(address)


def operates(command: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """Make a click command of a coroutine that takes a :class:`Connection` first.

    Parameters
    ----------
    command
        The coroutine function.

    Returns
    -------
    callable
        A function that connects, runs the coroutine and exits; it has the options that name a scheduler.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        names = ("scheduler", "scheduler_file", "credentials", "tls_ca_file", "tls_cert", "tls_key")
        there = {key: options.pop(key) for key in names}
        for key, value in options.items():
            for text in value if isinstance(value, tuple) else [value]:
                if isinstance(text, str) and not is_unicode(text):
                    raise click.UsageError(f"{key} {text!r} is not text in UTF-8")

        async def main() -> int | None:
            async with connected(there) as connection:
                return await command(connection, **options)

        sys.exit(_exit_code(main()))

    for option in reversed(OPTIONS):
        run = option(run)
    return run


def _exit_code(main: Coroutine[Any, Any, int | None]) -> int:
    """Run a command; print its error, if there is one, and return its exit code."""
    try:
        return asyncio.run(main) or 0
    except KeyboardInterrupt:
        command = click.get_current_context().info_name
        if command in LOOKS:
            return 0
        code, message = INTERRUPTED, "interrupted"
        if command in CHANGES:
            message = f"interrupted; the scheduler carries the {command} on, and `agentcluster top` shows it"
    except (NoScheduler, SchedulerUnfit, VersionMismatch) as error:
        code, message = NO_SCHEDULER, str(error)
    except (ConfigError, PreflightError, NodeNotFound, RolloutBusy) as error:
        code, message = REFUSED, str(error)
    except (AgentClusterError, TimeoutError) as error:
        code, message = FAILED, str(error) or "it took too long"
    except OSError as error:
        code, message = NO_SCHEDULER, f"the connection to the scheduler ended: {error}"
    click.echo(f"agentcluster: {message}", err=True)
    return code


def print_json(data: object) -> None:
    """Print plain data as one line of JSON.

    Parameters
    ----------
    data
        The data; what JSON does not have is printed as text.
    """
    click.echo(json.dumps(data, default=str))
