"""Credentials of a cluster and of its processes, and arguments of TLS connections.

Temporary credentials live in memory as PEM text; those of a user's :class:`distributed.Security` may be files here, and
are read here: a launched process always gets text, over its stdin.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

from distributed.comm.addressing import get_address_host_port, parse_address
from distributed.security import Security

from agentcluster.errors import ConfigError, suggest

#: Keyword arguments of :class:`distributed.Security`, or of its connections.
Arguments: TypeAlias = dict[str, Any]

#: Address of this machine that no other can reach.
LOOPBACK = "127.0.0.1"

_COMMON = ("require_encryption", "tls_ciphers", "tls_min_version", "tls_max_version", "tls_ca_file")


def resolve_credentials(
    security: Security | bool | Arguments | str | PathLike[str] | None, *, remote: bool, attached: list[str]
) -> Security:
    """Return the credentials of a cluster.

    Parameters
    ----------
    security
        The user's argument. None means TLS as soon as a process is on another machine; True always; False never. A path
        is that of a folder for :func:`credentials`.
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
    if isinstance(security, str | PathLike):
        security = credentials(security)
    if isinstance(security, dict):
        security = _from_mapping(security)
    if security is None:
        security = remote or any(not is_private(address) for address in attached)
    if security is True:
        if attached:
            raise ConfigError(_attached_problem(attached), key="security")
        temporary: Security = Security.temporary()
        return temporary
    if security is False:
        return Security()
    if not isinstance(security, Security):
        raise ConfigError(
            f"security={security!r} must be None, True, False, a distributed.Security, or a folder of credentials",
            key="security",
        )
    return security


def is_private(address: str) -> bool:
    """Return whether an agent is reached without TLS and on this machine.

    Parameters
    ----------
    address
        Address of the agent.
    """
    return address.startswith("tcp://") and is_loopback(get_address_host_port(address)[0])


def _attached_problem(addresses: list[str]) -> str:
    """Return why the cluster cannot make credentials for agents that run already."""
    plain = [address for address in addresses if address.startswith("tcp://")]
    if plain:
        return (
            f"agent {plain[0]} is reached without encryption, so it cannot be given this cluster's temporary "
            f"credentials; start it with --credentials DIR (made by `agentcluster credentials DIR`) and a "
            f"--listen-address with tls://, and pass security=DIR; or turn encryption off with security=False"
        )
    return (
        f"agent {addresses[0]} has credentials of its own, so it cannot be given this cluster's temporary ones; pass "
        f"the same to this cluster, security=DIR or security=Security(…)"
    )


#: Roles of processes with a certificate; agents have that of their workers.
ROLES = ("scheduler", "worker", "client")

#: Days before the expiry of a certificate from which on there are warnings.
SOON = 14


def credentials(folder: str | PathLike[str], *roles: str) -> Security:
    """Return the credentials in a folder that ``agentcluster credentials`` wrote.

    Parameters
    ----------
    folder
        Path of the folder.
    *roles
        Roles whose certificates must be there: ``scheduler``, ``worker``, ``client``; default is those that are there,
        at least one.

    Returns
    -------
    Security
        The credentials, which require encryption; also for ``Client(security=…)`` and ``Scheduler(security=…)``.

    Raises
    ------
    ConfigError
        When a file is missing or cannot be read, or a certificate has expired.

    Warns
    -----
    UserWarning
        When a certificate expires within two weeks.
    """
    if not isinstance(folder, str | PathLike) or not str(folder).strip():
        raise ConfigError(f"credentials {folder!r}: give the path of a folder", key="security")
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f"credentials for role {role!r}; {suggest(str(role), ROLES)}", key="security")
    try:
        place = Path(folder).expanduser()
        place.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with NUL, or in the home of an unknown user
        raise ConfigError(f"credentials {str(folder)[:200]!r} cannot be read: {error}", key="security") from None
    found = roles or tuple(role for role in ROLES if (place / f"{role}.pem").exists()) or ROLES
    names = {"tls_ca_file": "ca.pem"}
    for role in found:
        names |= {f"tls_{role}_cert": f"{role}.pem", f"tls_{role}_key": f"{role}.key"}
    for name in names.values():
        if not (place / name).is_file():
            raise ConfigError(
                f"credentials {str(folder)!r}: there is no {name}; `agentcluster credentials DIR` makes the files",
                key="security",
            )
    _check_expiry([place / name for name in names.values() if name.endswith(".pem")])
    return Security(require_encryption=True, **{key: str(place / name) for key, name in names.items()})


def credentials_of_options(folder: str | None, files: Arguments, role: str) -> Security:
    """Return the credentials that a command line names: ``--credentials``, or ``--tls-ca-file`` and the two others.

    Parameters
    ----------
    folder
        The folder; None without one.
    files
        Keyword arguments of :class:`distributed.Security` for the files that were given.
    role
        Role of the command's process.

    Raises
    ------
    ConfigError
        When both are given, the folder's files cannot be used, or there is no certificate of the CA.
    """
    if folder is not None and files:
        raise ConfigError("--credentials cannot be given with --tls-ca-file, --tls-cert or --tls-key: it has them")
    if folder is not None:
        return credentials(folder, role)
    security = Security(**files)
    if files and not getattr(security, "tls_ca_file", None):
        raise ConfigError("--tls-cert and --tls-key have no effect without --tls-ca-file; give that too")
    return security


def _check_expiry(paths: list[Path]) -> None:
    """Refuse expired certificates; warn about those that expire soon."""
    from cryptography import x509  # only who has credentials in files needs it

    found: list[tuple[datetime, Path]] = []
    for path in paths:
        try:
            found.append((x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc, path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"certificate {str(path)!r} cannot be read: {error}", key="security") from None
    ends, first = min(found)
    left = ends - datetime.now(UTC)
    remedy = f"`agentcluster credentials {first.parent} --renew`, where its ca.key is, makes others"
    if left.total_seconds() <= 0:
        raise ConfigError(f"certificate {str(first)!r} expired on {ends:%Y-%m-%d}; {remedy}", key="security")
    if left.days < SOON:
        warnings.warn(f"certificate {str(first)!r} expires on {ends:%Y-%m-%d}; {remedy}", UserWarning, stacklevel=3)


@contextlib.contextmanager
def written_aside(path: Path, data: bytes) -> Iterator[Path]:
    """Write a file of mode 0600 beside `path`, for the block to move or link there; it is removed at the end.

    Who reads `path` meanwhile has what was there, or the new file whole.

    Parameters
    ----------
    path
        Where the file is to be.
    data
        What is in it.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def parse_security(security: object) -> Security:
    """Return the credentials of an agent.

    Parameters
    ----------
    security
        Credentials, keyword arguments of :class:`distributed.Security`, or None for none.

    Raises
    ------
    ConfigError
        For anything else.
    """
    if isinstance(security, Security):
        return security
    if security is not None and not isinstance(security, Mapping):
        raise ConfigError(
            f"security={security!r} must be a distributed.Security, its arguments, or None", key="security"
        )
    arguments = security or {}
    try:
        return Security(**{str(key): value for key, value in arguments.items()})
    except (TypeError, ValueError) as error:
        names = ", ".join(sorted(map(str, arguments)))
        raise ConfigError(f"security= cannot be made of {names}: {error}", key="security") from None


def _from_mapping(arguments: Arguments) -> Security:
    """Make credentials of keyword arguments; refuse those that would turn encryption off without a word."""
    names = ", ".join(sorted(map(str, arguments)))
    security = parse_security(arguments)
    if not has_credentials(security):
        raise ConfigError(
            f"security={{{names}}} has no credentials; give tls_ca_file with certificates and "
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
    for name in (*_COMMON, f"tls_{role}_cert", f"tls_{role}_key"):
        value = getattr(security, name, None)
        if value is None or value is False:
            continue
        if name.endswith(("_file", "_cert", "_key")) and "\n" not in value:
            value = _read(name, value)
        arguments[name] = value if isinstance(value, str | bool) else int(value)
    return arguments


def has_credentials(security: Security) -> bool:
    """Return whether there are credentials, or encryption is required.

    Parameters
    ----------
    security
        Credentials, perhaps empty.
    """
    return bool(getattr(security, "tls_ca_file", None) or security.require_encryption)


def has_certificates(security: Security) -> bool:
    """Return whether an agent has what it needs to listen with TLS.

    Parameters
    ----------
    security
        Credentials of the agent, perhaps empty.
    """
    return all(getattr(security, field, None) for field in ("tls_ca_file", "tls_worker_cert", "tls_worker_key"))


def _read(field: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"security: {field} {path!r} cannot be read: {error.strerror or error}", key=field) from error


def connection_args(security: Security, address: str | None, role: Literal["worker", "client"] = "worker") -> Arguments:
    """Return the connection arguments of an agent, or of a client, checked against an address.

    Parameters
    ----------
    security
        Credentials of the agent.
    address
        Address to connect to or to listen at; None to check the credentials alone.
    role
        Role of the process: an agent has the credentials of workers.

    Raises
    ------
    ConfigError
        When the credentials cannot be loaded, or the address needs others.
    """
    try:
        arguments: Arguments = security.get_connection_args(role)
    except OSError as error:
        fields = ("tls_ca_file", f"tls_{role}_cert", f"tls_{role}_key")
        files = ", ".join(str(value) for field in fields if _is_path(value := getattr(security, field, None)))
        raise ConfigError(
            f"TLS credentials {files or 'in memory'} cannot be loaded: {error}", key="security"
        ) from error
    scheme = None if address is None else parse_address(address)[0]
    if scheme == "tcp" and security.require_encryption:
        raise ConfigError(f"{address} is not encrypted, and encryption is required here; use tls://", key="security")
    if scheme == "tls" and arguments.get("ssl_context") is None:
        raise ConfigError(
            f"{address} speaks TLS, which needs credentials: give --credentials DIR, or --tls-ca-file, --tls-cert and "
            f"--tls-key (security=Security(tls_ca_file=…, tls_{role}_cert=…, tls_{role}_key=…))",
            key="security",
        )
    return arguments


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "\n" not in value


def is_loopback(host: str) -> bool:
    """Return whether a host can be reached from this machine alone.

    Parameters
    ----------
    host
        An IP address, or a name; one that is not known is not loopback.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)} if host else set()
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(each).partition("%")[0]).is_loopback for each in found)
