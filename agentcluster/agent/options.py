"""Options of an agent: arguments of a ``Worker`` or ``Nanny`` that count for a whole node, and addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from dask import config
from distributed.comm.addressing import (
    address_from_user_args,
    get_address_host,
    unparse_host_port,
)
from distributed.core import coerce_to_address
from distributed.security import Security
from distributed.utils import get_ip, json_load_robust, parse_ports

from agentcluster.errors import ConfigError
from agentcluster.model import Mode
from agentcluster.security import LOOPBACK, has_credentials
from agentcluster.units import split_address

#: Keyword arguments of dask's workers and nannies, which have no types.
WorkerOptions: TypeAlias = Mapping[str, Any]

#: The same, to be changed.
WorkerArguments: TypeAlias = dict[str, Any]

#: Mode of an agent that is given none, as ``dask worker``: one worker with all threads, and no resource of our own.
LIKE_DASK_WORKER = Mode("auto-cpu", {"nworkers": 1, "kind_resource": False})

#: Arguments of a worker that become options of the node's first mode, so that a reprovisioning replaces them.
MODE_OPTIONS = ("nthreads", "memory_limit")

#: Options with the port, or the range of ports, that workers and their nannies listen at.
PORT_OPTIONS = ("worker_port", "nanny_port")


# -- arguments of a worker ---------------------------------------------------------------------------------------------


def take_scheduler(options: WorkerArguments) -> str | None:
    """Take the scheduler's address out of a worker's arguments, or from dask's configuration, as a worker does.

    Parameters
    ----------
    options
        Keyword arguments; ``scheduler_ip``, ``scheduler_port`` and ``scheduler_file`` are removed from them.

    Returns
    -------
    str or None
        The address; None where there is none.

    Raises
    ------
    ConfigError
        When the file has no address.
    """
    ip, port, file = (options.pop(f"scheduler_{key}", None) for key in ("ip", "port", "file"))
    if ip is not None:
        return f"{ip}:{port}" if port is not None else str(ip)
    return config.get("scheduler-address", None) if file is None else read_scheduler_file(file)


def take_mode(options: WorkerArguments) -> Mode | None:
    """Take :data:`MODE_OPTIONS` out of a worker's arguments.

    Parameters
    ----------
    options
        Keyword arguments; those that become options of the mode are removed from them.

    Returns
    -------
    Mode or None
        First mode of the node, unchecked; None where no argument is about it.
    """
    given = {key: options.pop(key) for key in MODE_OPTIONS if options.get(key) is not None}
    return Mode(LIKE_DASK_WORKER.name, {**LIKE_DASK_WORKER.config, **given}) if given else None


def add_resources(options: WorkerOptions) -> WorkerArguments:
    """Add the resources of ``distributed.worker.resources`` in dask's configuration to the options of all workers.

    Parameters
    ----------
    options
        Keyword arguments for every worker; their ``resources`` take precedence.

    Returns
    -------
    dict
        A copy with the resources of both, as numbers.
    """
    found = {**config.get("distributed.worker.resources", {}), **(options.get("resources") or {})}
    return {**options, "resources": {name: float(amount) for name, amount in found.items()}} if found else {**options}


def keep_http_private(options: WorkerArguments, security: Security) -> WorkerArguments:
    """Have workers with credentials serve HTTP on loopback, where they are not told where: HTTP asks nobody who he is.

    Parameters
    ----------
    options
        Keyword arguments for every worker.
    security
        Credentials of the workers, perhaps empty.

    Returns
    -------
    dict
        A copy, with a ``dashboard_address``; the options as they are where they have one, or without credentials.
    """
    if not has_credentials(security) or options.get("dashboard_address"):
        return options
    return {**options, "dashboard_address": f"{LOOPBACK}:0"}


def slots(options: WorkerOptions) -> int | None:
    """Count the workers that can run at a time, by the ports that they were given.

    Parameters
    ----------
    options
        Keyword arguments for every worker, with ``worker_port`` and ``nanny_port``, each a port or a range such as
        ``"9000:9010"``, and ``contact_address``, which only one worker can have.

    Returns
    -------
    int or None
        Greatest number of workers; None where the options do not limit it.

    Raises
    ------
    ConfigError
        When an option is neither a port nor a range.
    """
    counts = [1] if options.get("contact_address") else []
    ranges: list[set[int]] = []
    for key in PORT_OPTIONS:
        try:
            ports = parse_ports(options.get(key))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key} {options[key]!r}: {error}; give a port or a range, such as 9000:9010") from None
        if ports not in ([None], [0]):
            ranges.append({port for port in ports if port})
    counts += map(len, ranges)
    if len(ranges) > 1:
        counts.append(len(set.union(*ranges)) // len(ranges))  # a port in both ranges still serves one worker
    return min(counts, default=None)


# -- addresses ---------------------------------------------------------------------------------------------------------


def read_scheduler_file(file: str, timeout: float | None = None) -> str:
    """Read the address in the file that a scheduler writes.

    Parameters
    ----------
    file
        Path of the file.
    timeout
        Seconds to wait for the file; None for not at all.

    Raises
    ------
    ConfigError
        When there is no file or no address in it.
    """
    try:
        return str(json_load_robust(file, timeout=timeout)["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = "it has no address" if isinstance(error, KeyError | TypeError) else str(error)
        raise ConfigError(
            f"--scheduler-file {file!r} cannot be used: {problem}; "
            f"it is what `dask scheduler --scheduler-file FILE` writes"
        ) from error


def scheduler_address(scheduler: str) -> str:
    """Complete the address of a scheduler.

    Parameters
    ----------
    scheduler
        Address, with or without a protocol.

    Raises
    ------
    ConfigError
        When it has no host or no port.
    """
    try:
        address = str(coerce_to_address(scheduler))
        if not address.startswith("inproc://") and not split_address(address)[1]:
            raise ValueError("port 0 is that of no scheduler")
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"scheduler {scheduler!r} is not an address: {error}; give one such as tcp://HOST:8786"
        ) from None
    return address


def listen_address(
    scheduler: str | None,
    security: Security,
    *,
    host: str | None,
    interface: str | None,
    protocol: str | None,
    port: int,
) -> str:
    """Return the address that an agent listens at.

    Parameters
    ----------
    scheduler
        Address of the scheduler: without a host or an interface, the one that reaches it is taken.
    security
        The agent's credentials.
    host, interface, protocol
        Where the agent and its workers listen; a host can have a protocol.
    port
        The agent's port; 0 for any.

    Raises
    ------
    ValueError, OSError
        Dask's own error for values that it cannot use.
    """
    if scheduler is not None:
        protocol = protocol or scheduler.split("://")[0]
        if not host and not interface:
            host = unparse_host_port(get_ip(get_address_host(scheduler)))
    return str(address_from_user_args(host=host, port=port, interface=interface, protocol=protocol, security=security))
