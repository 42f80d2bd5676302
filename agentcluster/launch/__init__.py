"""Hosts as users give them, and the launcher of each: parsing, checks and node names.

Nothing heavy is imported here; asyncssh only for a host that is reached by SSH.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

from agentcluster.errors import ConfigError

if TYPE_CHECKING:
    from agentcluster.launch.protocol import Launcher

    #: A checked item of ``hosts``; text is ``local``, or the address of a running agent.
    Item: TypeAlias = "str | Host | Launcher"

__all__ = ["Host", "launchers_for"]

T = TypeVar("T")

FORMS = "host, user@host, host:port, user@host:port, with an IPv6 address in brackets ([::1]:22)"
ALL_FORMS = f"'local', {FORMS}, tcp://host:port, tls://host:port"

_PART = r"[^\s@:/\[\]-][^\s@:/\[\]]*"
_SSH = re.compile(
    rf"(?:(?P<user>{_PART})@)?(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<host>{_PART}))(?::(?P<port>.*))?"
)
_ADDRESS = re.compile(rf"(?:tcp|tls)://(?:\[(?P<v6>[^\s\]]+)\]|(?P<host>{_PART})):(?P<port>\d+)")


@dataclass(frozen=True)
class Host:
    """A host that is reached by SSH, or ``local``, this machine.

    Attributes
    ----------
    host
        Name or address, or an alias of ``~/.ssh/config``.
    user, port
        User and port of the connection; ``None`` for those of ``~/.ssh/config``, or SSH's defaults.
    name
        Name of the node; by default the host's.
    remote_python
        Path of the Python interpreter on the host; by default the path of this one.
    connect_options
        Keyword arguments of ``asyncssh.connect``. Not in the repr: they can have a password.
    env
        Environment variables of the agent and its workers. Not in the repr.
    standby
        Launch the agent only when its workers are needed, and end it when they are no longer needed.
    labels
        Labels of the node, such as ``{"rack": "a"}``, by which it can be selected.

    Raises
    ------
    ConfigError
        When a value cannot be used.
    """

    host: str
    user: str | None = None
    port: int | None = None
    name: str | None = None
    remote_python: str | None = None
    connect_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    standby: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text(self, "host", r"[^\s@/\[\]-][^\s@/\[\]]*")
        _check_text(self, "user", _PART)
        _check_text(self, "name", r"\S(.*\S)?")
        _check_text(self, "remote_python", r".*\S.*")
        if self.host == "local" and (self.user is not None or self.port is not None):
            raise ConfigError(f"Host('local', user={self.user!r}, port={self.port!r}): this machine has neither")
        if self.port is not None and (type(self.port) is not int or not 0 < self.port < 65536):
            raise ConfigError(f"Host({self.host!r}): port {self.port!r} is not a number from 1 to 65535", key="port")
        if not isinstance(self.connect_options, Mapping):
            raise ConfigError(f"Host({self.host!r}): connect_options must be a mapping", key="connect_options")
        for key in ("env", "labels"):
            value = getattr(self, key)
            if not isinstance(value, Mapping) or not all(
                isinstance(each, str) and "\0" not in each for each in (*value, *value.values())
            ):
                raise ConfigError(f"Host({self.host!r}): {key} must be a mapping of text to text, without NUL", key=key)
        if not isinstance(self.standby, bool):
            raise ConfigError(f"Host({self.host!r}): standby {self.standby!r} is not true or false", key="standby")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.user is None else f"{self.user}@"
        return user + host + ("" if self.port is None else f":{self.port}")

    @classmethod
    def parse(cls, text: str) -> Host:
        """Parse a host such as ``user@gpu-1:2222``.

        Parameters
        ----------
        text
            The host as the user wrote it.

        Returns
        -------
        Host
            The host.

        Raises
        ------
        ConfigError
            When `text` has none of the allowed forms, which the message names.

        Examples
        --------
        >>> host = Host.parse("user@gpu-1:2222")
        >>> host.user, host.host, host.port
        ('user', 'gpu-1', 2222)
        """
        if "://" in text:
            raise ConfigError(
                f"host {text!r}: unknown scheme {text.split('://')[0]!r}; allowed: {ALL_FORMS}", key="hosts"
            )
        match = _SSH.fullmatch(text) if text.isprintable() else None
        if match is None:
            raise ConfigError(f"host {text!r} is not understood; allowed: {ALL_FORMS}", key="hosts")
        port = match["port"]
        if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
            hint = "; an IPv6 address needs brackets" if ":" in port else ""
            raise ConfigError(
                f"host {text!r}: port {port!r} is not a number from 1 to 65535{hint}; allowed: {ALL_FORMS}", key="hosts"
            )
        return cls(match["v6"] or match["host"], user=match["user"], port=None if port is None else int(port))


def _check_text(host: Host, key: str, pattern: str) -> None:
    """Check an attribute of a host that is text."""
    value = getattr(host, key)
    if value is None and key != "host":
        return
    if not isinstance(value, str) or not re.fullmatch(pattern, value) or not value.isprintable():
        raise ConfigError(f"Host({host.host!r}): {key} {value!r} cannot be used", key=key)


def check_launcher(name: object, standby: object, where: object = "local") -> None:
    """Check what all launchers are given.

    Parameters
    ----------
    name, standby, where
        Attributes of a :class:`~agentcluster.launch.protocol.Launcher`.

    Raises
    ------
    ConfigError
        For a name, or a place, that is not text which can be printed, and for a `standby` that is no bool.
    """
    for key, text in (("name", name), ("where", where)):
        if not isinstance(text, str) or not text.strip() or not text.isprintable():
            raise ConfigError(f"{key} {text!r} of a launcher cannot be used; give text that can be printed", key=key)
    if not isinstance(standby, bool):
        raise ConfigError(f"standby {standby!r} of launcher {name!r} is not true or false", key="standby")


def check_agent_address(address: object, key: str) -> None:
    """Check the address of an agent that runs.

    Parameters
    ----------
    address
        The address.
    key
        Name of the argument.

    Raises
    ------
    ConfigError
        When it has no host, no port, or another scheme than ``tcp://`` and ``tls://``.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) and address.isprintable() else None
    if match is None or len(match["port"]) > 5 or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"host {address!r} is not an agent's address; it must be tcp://host:port or tls://host:port", key=key
        )


def launchers_for(
    hosts: object = None,
    *,
    connect_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    remote_python: str | Sequence[str | None] | None = None,
) -> list[Launcher]:
    """Return one launcher per host, with unique node names.

    Parameters
    ----------
    hosts
        A list, or a single item; the name of a file of hosts (``.yaml``, ``.yml``, ``.txt``, or any path), see
        :mod:`agentcluster.launch.inventory`; or ``"slurm"``, the hosts of this process's allocation. Items:
        ``"local"``; ``"tcp://host:port"`` or ``"tls://host:port"`` of a running agent; other text as for
        :meth:`Host.parse`; a :class:`Host`; an object with the interface of
        :class:`~agentcluster.launch.protocol.Launcher`. ``None`` is one local agent.
    connect_options
        Keyword arguments of ``asyncssh.connect`` for all SSH hosts, or a list with one mapping per host. Those of a
        :class:`Host` override them.
    remote_python
        Path of the Python interpreter on all SSH hosts, or a list with one per host. That of a :class:`Host` overrides
        it.

    Returns
    -------
    list of Launcher
        The launchers, in the order of the hosts.

    Raises
    ------
    ConfigError
        When a host or an option cannot be used, or two hosts have the same explicit name.

    Notes
    -----
    A node is named after its host; a second one of that name is ``name.2``, and so on. Explicit names are kept.
    """
    items = _items(hosts)
    parsed = [_parse(item) for item in items]
    options = _per_host(connect_options, Mapping, len(items), "connect_options")  # type: ignore[type-abstract]
    pythons = _per_host(remote_python, str, len(items), "remote_python")
    for python in pythons:
        if python is not None and not (python.strip() and python.isprintable()):
            raise ConfigError(f"remote_python {python!r} is not the path of a file", key="remote_python")
    launchers = []
    for item, name, own_options, python in zip(parsed, _names(parsed), options, pythons, strict=True):
        if isinstance(item, Host) and item.host != "local":
            item = dataclasses.replace(
                item,
                name=name,
                remote_python=item.remote_python or python,
                connect_options={**(own_options or {}), **item.connect_options},
            )
        launchers.append(_launcher(item, name))
    return launchers


def _items(hosts: object) -> Sequence[object]:
    """Return the items of the argument `hosts`."""
    from agentcluster.launch.inventory import hosts_in, is_file, slurm_hosts

    if hosts is None:
        return ["local"]
    if hosts == "slurm":
        return slurm_hosts()
    if isinstance(hosts, str | os.PathLike) and is_file(hosts):
        return hosts_in(hosts)
    if isinstance(hosts, str | Host) or _is_launcher(hosts):
        return [hosts]
    if isinstance(hosts, Iterable) and not isinstance(hosts, Mapping | bytes):
        return list(hosts)
    raise ConfigError(f"hosts={hosts!r} is not a list of hosts; each is {ALL_FORMS}, a Host or a launcher", key="hosts")


def _is_launcher(item: object) -> TypeGuard[Launcher]:
    """Return whether an item has the interface of a launcher."""
    return not isinstance(item, type) and callable(getattr(item, "launch", None)) and hasattr(item, "name")


def _parse(item: object) -> Item:
    """Return a Host, a launcher, or the text of ``local`` and addresses."""
    if isinstance(item, Host) or _is_launcher(item):
        return item
    if not isinstance(item, str):
        raise ConfigError(f"host {item!r} is not {ALL_FORMS}, a Host or a launcher", key="hosts")
    if item == "local":
        return item
    if not item.startswith(("tcp://", "tls://")):
        return Host.parse(item)
    check_agent_address(item, "hosts")
    return item


def _per_host(value: object, kind: type[T], count: int, key: str) -> list[T | None]:
    """Return the value of each host, from one for all or a list; messages have no values, they can be secret."""
    if value is None or isinstance(value, kind):
        return [value] * count
    if not isinstance(value, list | tuple) or not all(v is None or isinstance(v, kind) for v in value):
        raise ConfigError(
            f"{key} must be one {kind.__name__.lower()} for all hosts, or a list with one per host", key=key
        )
    if len(value) != count:
        raise ConfigError(f"{key} has {len(value)} items for {count} hosts; give one per host, or one for all", key=key)
    return list(value)


def _names(items: Sequence[Item]) -> list[str]:
    """Return the node name of each item: the explicit one, or the host's, numbered when it is taken."""
    explicit: list[object] = [None if isinstance(item, str) else item.name for item in items]
    taken: set[str] = set()
    for name in explicit:
        if name is None:
            continue
        if not isinstance(name, str) or not name:
            raise ConfigError(f"node name {name!r} is not text", key="hosts")
        if name in taken:
            raise ConfigError(f"two hosts have the name {name!r}; each node needs its own", key="hosts")
        taken.add(name)
    names = []
    for item, name in zip(items, explicit, strict=True):
        names.append(name if isinstance(name, str) else _free(_default_name(item), taken))
        taken.add(names[-1])
    return names


def _free(base: str, taken: set[str]) -> str:
    """Return a name that is not taken, numbered where needed."""
    numbered = (f"{base}.{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in taken)


def _default_name(item: Item) -> str:
    """Return the name of the host."""
    if not isinstance(item, str):
        return item.host if isinstance(item, Host) else item.where
    match = _ADDRESS.fullmatch(item)
    return (match["v6"] or match["host"]) if match else item


def _launcher(item: Item, name: str) -> Launcher:
    """Return the launcher of an item."""
    if item == "local":
        item = Host("local")
    if isinstance(item, Host) and item.host == "local":
        from agentcluster.launch.local import LocalLauncher

        return LocalLauncher(name, item.remote_python, item.env, standby=item.standby, labels=item.labels)
    if isinstance(item, Host):
        from agentcluster.launch.ssh import SSHLauncher

        return SSHLauncher(item)
    if isinstance(item, str):
        from agentcluster.launch.adopt import AttachedLauncher

        return AttachedLauncher(item, name=name)
    return item
