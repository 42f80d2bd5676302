"""An agent where a worker stood: the arguments of a ``Worker`` or a ``Nanny`` that mean something for a whole node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask import config
from distributed.comm.addressing import (
    address_from_user_args,
    get_address_host,
    get_address_host_port,
    unparse_host_port,
)
from distributed.core import coerce_to_address
from distributed.security import Security
from distributed.utils import get_ip, json_load_robust, parse_ports

from agentcluster import modes
from agentcluster.errors import ConfigError
from agentcluster.model import Mode

#: What runs there when nobody said anything: one worker with all threads.
LIKE_DASK_WORKER = Mode("auto-cpu", {"nworkers": 1})

#: A worker's arguments that are the first mode's, and no longer hold after a reprovision.
SHAPE = ("nthreads", "memory_limit")


def take_scheduler(options: dict[str, Any]) -> str | None:
    """Take the scheduler's address out of a worker's arguments, or dask's configuration, as a worker does.

    Parameters
    ----------
    options
        Keyword arguments; ``scheduler_ip``, ``scheduler_port`` and ``scheduler_file`` are taken out.

    Raises
    ------
    ConfigError
        When the file has no address.
    """
    ip, port, file = (options.pop(f"scheduler_{key}", None) for key in ("ip", "port", "file"))
    if ip is not None:
        return f"{ip}:{port}" if port is not None else str(ip)
    return config.get("scheduler-address", None) if file is None else address_in(file)


def address_in(file: str, timeout: float | None = None) -> str:
    """Return the address in a scheduler's own file, which may come to be there only within `timeout` seconds."""
    try:
        return str(json_load_robust(file, timeout=timeout)["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = "it has no address" if isinstance(error, KeyError | TypeError) else str(error)
        raise ConfigError(
            f"--scheduler-file {file!r} cannot be used: {problem}; "
            f"it is what `dask scheduler --scheduler-file FILE` writes"
        ) from error


def with_resources(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for every worker of a host with the resources that dask's configuration gives them there."""
    found = {**config.get("distributed.worker.resources", {}), **(options.get("resources") or {})}
    return {**options, "resources": {name: float(amount) for name, amount in found.items()}} if found else {**options}


def take_mode(options: dict[str, Any]) -> Mode | None:
    """Take the shape of the first worker out of a worker's arguments, and return the mode that it means, if any."""
    shape = {key: options.pop(key) for key in SHAPE if options.get(key) is not None}
    return modes.parse(LIKE_DASK_WORKER.name, {**LIKE_DASK_WORKER.config, **shape}) if shape else None


#: Options that say where a worker and its nanny may listen: a port, or a range of them.
PORT_OPTIONS = ("worker_port", "nanny_port")


def scheduler_address(scheduler: str) -> str:
    """Return the address of a scheduler in full, or raise :class:`ConfigError`."""
    address = str(coerce_to_address(scheduler))
    try:
        if not address.startswith("inproc://"):
            get_address_host_port(address, strict=True)
    except ValueError as error:
        raise ConfigError(f"scheduler {scheduler!r} is no address: {error}; give one such as tcp://HOST:8786") from None
    return address


def listen_address(
    scheduler: str | None,
    security: Security,
    *,
    host: str | None,
    interface: str | None,
    protocol: str | None,
    port: int,
    listen_host: str | None,
) -> str:
    """Return the address that an agent is to listen at.

    Parameters
    ----------
    scheduler
        Address of the scheduler: without a host or an interface, the one that reaches it is taken.
    security
        The agent's credentials.
    host, interface, protocol
        Where the agent and its workers listen.
    port
        The agent's port; 0 for any.
    listen_host
        Where the agent itself listens, when that is not where its workers do.

    Raises
    ------
    ValueError, OSError
        What dask says of those that cannot be.
    """
    if listen_host:
        host, interface = listen_host, None
        protocol = None if "://" in host else protocol
    elif scheduler is not None:
        protocol = protocol or scheduler.split("://")[0]
        if not host and not interface:
            host = unparse_host_port(get_ip(get_address_host(scheduler)))
    return str(address_from_user_args(host=host, port=port, interface=interface, protocol=protocol, security=security))


def room(worker_options: Mapping[str, Any]) -> int | None:
    """Return how many workers the ports that they were given are for; None where any number of them can be.

    Parameters
    ----------
    worker_options
        Options for every worker of an agent, among them ``worker_port`` and ``nanny_port``, each a port or a range such
        as ``"9000:9010"``, and ``contact_address``, which can be that of one worker only.
    """
    counts = [1] if worker_options.get("contact_address") else []
    ranges: list[set[int]] = []
    for key in PORT_OPTIONS:
        try:
            ports = parse_ports(worker_options.get(key))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{key} {worker_options[key]!r}: {error}; give a port or a range, such as 9000:9010"
            ) from None
        if ports not in ([None], [0]):
            ranges.append({port for port in ports if port})
    counts += map(len, ranges)
    if len(ranges) > 1:
        counts.append(len(set.union(*ranges)) // len(ranges))  # where they overlap, a port is still one worker's
    return min(counts, default=None)
