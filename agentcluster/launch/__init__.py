"""Which launcher brings an agent to which host: the forms in which hosts are given, checked and named.

Nothing heavy is imported here; asyncssh only when a host is reached by SSH.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from agentcluster.errors import ConfigError

if TYPE_CHECKING:
    from agentcluster.launch.protocol import Launcher

__all__ = ["Host", "launchers_for"]

FORMS = "host, user@host, host:port, user@host:port, with an IPv6 address in brackets ([::1]:22)"
ALL_FORMS = f"'local', {FORMS}, tcp://host:port, tls://host:port"

_PART = r"[^\s@:/\[\]-][^\s@:/\[\]]*"
_SSH = re.compile(
    rf"(?:(?P<user>{_PART})@)?(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<host>{_PART}))(?::(?P<port>.*))?"
)
_ADDRESS = re.compile(rf"(?:tcp|tls)://(?:\[(?P<v6>[^\s\]]+)\]|(?P<host>{_PART})):(?P<port>\d+)")


@dataclass(frozen=True)
class Host:
    """A host that is reached by SSH, or ``local``, this machine; with its own options.

    Attributes
    ----------
    host
        Name or address, or an alias of ``~/.ssh/config``.
    user, port
        As ``~/.ssh/config`` and SSH's defaults say when ``None``.
    name
        The node's name; by default the host's.
    remote_python
        Path of the Python there; by default the path of this one.
    connect_options
        Keyword arguments of ``asyncssh.connect``. Not in the repr: a password may be among them.
    env
        Environment variables of the agent and its workers there. Not in the repr.
    standby
        Launch nothing there until its workers are needed, and end it when they are not any more.
    labels
        Words about it, such as ``{"rack": "a"}``, by which nodes can be chosen.

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
            if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in (*value, *value.values())):
                raise ConfigError(f"Host({self.host!r}): {key} must be a mapping of text to text", key=key)
        if not isinstance(self.standby, bool):
            raise ConfigError(f"Host({self.host!r}): standby {self.standby!r} is not true or false", key="standby")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.user is None else f"{self.user}@"
        return user + host + ("" if self.port is None else f":{self.port}")

    @classmethod
    def parse(cls, text: str) -> Host:
        """Read a host as it is typed, such as ``user@gpu-1:2222``.

        Raises
        ------
        ConfigError
            When it has none of the allowed forms, which the message names.

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
        match = _SSH.fullmatch(text)
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
    value = getattr(host, key)
    if value is None and key != "host":
        return
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ConfigError(f"Host({host.host!r}): {key} {value!r} cannot be used", key=key)


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
        A list, or one item alone; the name of a file of hosts (``.yaml``, ``.yml``, ``.txt``, or any path), see
        :mod:`agentcluster.launch.inventory`; or ``"slurm"``, the hosts of the allocation that this runs in. Items:
        ``"local"``; ``"tcp://host:port"`` or ``"tls://host:port"`` of an agent that runs; other text as
        :meth:`Host.parse` reads it; a :class:`Host`; an object with the interface of
        :class:`~agentcluster.launch.protocol.Launcher`. ``None`` is one local agent.
    connect_options
        Keyword arguments of ``asyncssh.connect`` for all SSH hosts, or a list with one mapping per host. Those of a
        :class:`Host` go first.
    remote_python
        Path of the Python on all SSH hosts, or a list with one per host. That of a :class:`Host` goes first.

    Raises
    ------
    ConfigError
        When a host or an option cannot be used, or two hosts have been given the same name.

    Notes
    -----
    A node's name is its host's; the second of that name is ``name.2``, and so on. Names given by hand stay.
    """
    items = _items(hosts)
    parsed = [_parse(item) for item in items]
    options = _per_host(connect_options, Mapping, len(items), "connect_options")
    pythons = _per_host(remote_python, str, len(items), "remote_python")
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


def _items(hosts: object) -> list[object]:
    from agentcluster.launch.inventory import hosts_in, is_file, slurm_hosts

    if hosts is None:
        return ["local"]
    if hosts == "slurm":
        return list(slurm_hosts())
    if isinstance(hosts, str | os.PathLike) and is_file(hosts):
        return hosts_in(hosts)
    if isinstance(hosts, str | Host) or _is_launcher(hosts):
        return [hosts]
    if isinstance(hosts, Iterable) and not isinstance(hosts, Mapping | bytes):
        return list(hosts)
    raise ConfigError(f"hosts={hosts!r} is not a list of hosts; each is {ALL_FORMS}, a Host or a launcher", key="hosts")


def _is_launcher(item: object) -> bool:
    return not isinstance(item, type) and callable(getattr(item, "launch", None)) and hasattr(item, "name")


def _parse(item: object) -> Any:
    """Return a Host, a launcher, or the text of ``local`` and addresses."""
    if isinstance(item, Host) or _is_launcher(item):
        return item
    if not isinstance(item, str):
        raise ConfigError(f"host {item!r} is not {ALL_FORMS}, a Host or a launcher", key="hosts")
    if item == "local":
        return item
    if not item.startswith(("tcp://", "tls://")):
        return Host.parse(item)
    match = _ADDRESS.fullmatch(item)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"host {item!r} is not an agent's address; it must be tcp://host:port or tls://host:port", key="hosts"
        )
    return item


def _per_host(value: Any, kind: type, count: int, key: str) -> list[Any]:
    """Give each host its own of what may be one for all or a list; messages hold no values, they may be secret."""
    if value is None or isinstance(value, kind):
        return [value] * count
    if not isinstance(value, list | tuple) or not all(v is None or isinstance(v, kind) for v in value):
        raise ConfigError(
            f"{key} must be one {kind.__name__.lower()} for all hosts, or a list with one per host", key=key
        )
    if len(value) != count:
        raise ConfigError(f"{key} has {len(value)} items for {count} hosts; give one per host, or one for all", key=key)
    return list(value)


def _names(items: Sequence[Any]) -> list[str]:
    """Return each item's node name: the one given by hand, else the host's, numbered where it is taken."""
    by_hand = [None if isinstance(item, str) else item.name for item in items]
    taken: set[str] = set()
    for name in by_hand:
        if name is None:
            continue
        if not isinstance(name, str) or not name:
            raise ConfigError(f"node name {name!r} is not text", key="hosts")
        if name in taken:
            raise ConfigError(f"two hosts have the name {name!r}; each node needs its own", key="hosts")
        taken.add(name)
    names = []
    for item, name in zip(items, by_hand, strict=True):
        names.append(_free(_default_name(item), taken) if name is None else name)
        taken.add(names[-1])
    return names


def _free(base: str, taken: set[str]) -> str:
    numbered = (f"{base}.{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in taken)


def _default_name(item: str | Host) -> str:
    if isinstance(item, Host):
        return item.host
    match = _ADDRESS.fullmatch(item)
    return (match["v6"] or match["host"]) if match else item


def _launcher(item: Any, name: str) -> Launcher:
    if isinstance(item, Host) and item.host == "local":
        from agentcluster.launch.local import LocalLauncher

        return LocalLauncher(name, item.remote_python, item.env, standby=item.standby, labels=item.labels)
    if isinstance(item, Host):
        from agentcluster.launch.ssh import SSHLauncher

        return SSHLauncher(item)
    if item == "local":
        from agentcluster.launch.local import LocalLauncher

        return LocalLauncher(name)
    if isinstance(item, str):
        from agentcluster.launch.adopt import AttachedLauncher

        return AttachedLauncher(item, name=name)
    return cast("Launcher", item)
