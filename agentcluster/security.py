"""Credentials of a cluster, the part of them that a launched process gets, and arguments of TLS connections.

Temporary credentials live in memory as PEM text; those of a user's :class:`distributed.Security` may be files here, and
are read here: a launched process always gets text, over its stdin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from distributed.comm.addressing import parse_address
from distributed.security import Security

from agentcluster.errors import ConfigError

#: Keyword arguments of :class:`distributed.Security`, or of its connections.
Arguments: TypeAlias = dict[str, Any]

_COMMON = ("require_encryption", "tls_ciphers", "tls_min_version", "tls_max_version", "tls_ca_file")


def resolve_credentials(security: Security | bool | Arguments | None, *, remote: bool, attached: list[str]) -> Security:
    """Return the credentials of a cluster.

    Parameters
    ----------
    security
        The user's argument. None means temporary credentials as soon as a node is on another machine; True always;
        False never.
    remote
        Whether a process is launched on another machine.
    attached
        Addresses of agents that run already; they have credentials of their own, or none.

    Raises
    ------
    ConfigError
        When encryption is asked for, or needed, and an attached agent is reached without; for a mapping without
        credentials.
    """
    if isinstance(security, dict):
        security = _from_mapping(security)
    if security is None:
        security = remote
    if security is True:
        plain = [address for address in attached if address.startswith("tcp://")]
        if plain:
            raise ConfigError(
                f"agent {plain[0]} is reached without encryption, so it cannot be given this cluster's temporary "
                f"credentials; start it with --tls-ca-file, --tls-cert and --tls-key and pass security=Security(…), "
                f"or turn encryption off with security=False",
                key="security",
            )
        temporary: Security = Security.temporary()
        return temporary
    if security is False:
        return Security()
    if not isinstance(security, Security):
        raise ConfigError(f"security={security!r} must be None, True, False or a distributed.Security", key="security")
    return security


def _from_mapping(arguments: Arguments) -> Security:
    """Make credentials of keyword arguments; refuse those that would turn encryption off without a word."""
    try:
        security = Security(**arguments)
    except TypeError as error:
        names = ", ".join(sorted(arguments))
        raise ConfigError(f"security= cannot be made of {names}: {error}", key="security") from None
    if not has_credentials(security):
        raise ConfigError(
            f"security={{{', '.join(sorted(arguments))}}} has no credentials; give tls_ca_file with certificates and "
            f"keys, True for temporary credentials, or False for no encryption",
            key="security",
        )
    return security


def credentials_for_role(security: Security, role: Literal["worker", "scheduler"]) -> Arguments:
    """Reduce credentials to those that a process in one role needs, as text.

    Parameters
    ----------
    security
        Credentials of the cluster.
    role
        Role of the process.

    Returns
    -------
    dict
        Keyword arguments of a :class:`distributed.Security`.

    Raises
    ------
    ConfigError
        When a file that `security` names cannot be read.
    """
    arguments: Arguments = {}
    for field in (*_COMMON, f"tls_{role}_cert", f"tls_{role}_key"):
        value = getattr(security, field, None)
        if value is None or value is False:
            continue
        if field.endswith(("_file", "_cert", "_key")) and "\n" not in value:
            value = _read(field, value)
        arguments[field] = value if isinstance(value, str | bool) else int(value)
    return arguments


def has_credentials(security: Security) -> bool:
    """Return whether there are credentials, or encryption is required.

    Parameters
    ----------
    security
        Credentials, perhaps empty.
    """
    return bool(getattr(security, "tls_ca_file", None) or security.require_encryption)


def _read(field: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"security: {field} {path!r} cannot be read: {error.strerror or error}", key=field) from error


def connection_args(security: Security, address: str | None) -> Arguments:
    """Return the connection arguments of an agent, checked against an address.

    Parameters
    ----------
    security
        Credentials of the agent.
    address
        Address to connect to or to listen at; None to check the credentials alone.

    Raises
    ------
    ConfigError
        When the credentials cannot be loaded, or the address needs others.
    """
    try:
        arguments: Arguments = security.get_connection_args("worker")
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


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "\n" not in value
