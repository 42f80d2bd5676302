"""Where an agent listens, whom it joins, and with which credentials: checked before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed.comm.addressing import (
    address_from_user_args,
    get_address_host,
    get_address_host_port,
    parse_address,
    unparse_host_port,
)
from distributed.core import coerce_to_address
from distributed.security import Security
from distributed.utils import get_ip, parse_ports

from agentcluster.errors import ConfigError

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


def connection_args(security: Security, address: str | None) -> dict[str, Any]:
    """Return the connection arguments of an agent, or raise :class:`ConfigError` where `address` needs others."""
    try:
        arguments: dict[str, Any] = security.get_connection_args("worker")
    except OSError as error:
        fields = ("tls_ca_file", "tls_worker_cert", "tls_worker_key")
        files = ", ".join(str(value) for field in fields if _is_path(value := getattr(security, field, None)))
        raise ConfigError(
            f"TLS credentials {files or 'in memory'} cannot be loaded: {error}", key="security"
        ) from error
    scheme = None if address is None else parse_address(address)[0]
    if scheme == "tcp" and security.require_encryption:
        raise ConfigError(f"{address} is not encrypted, and encryption is required here; use tls://", key="security")
    if scheme == "tls" and arguments.get("ssl_context") is None:
        raise ConfigError(
            f"{address} speaks TLS, which needs credentials: give --tls-ca-file, --tls-cert and --tls-key "
            f"(security=Security(tls_ca_file=…, tls_worker_cert=…, tls_worker_key=…))",
            key="security",
        )
    return arguments


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "\n" not in value
