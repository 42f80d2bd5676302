"""Lists of hosts from files and from Slurm: an inventory in YAML, a text file of hosts, an allocation.

An inventory has ``hosts``, ``groups`` of hosts, and ``defaults``; a host is a name, a range such as ``gpu-[1-8]``, or a
mapping of the options of :class:`~agentcluster.Host`. Options of a host override those of its group, and those override
the defaults; labels are merged, and the group is one of them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from agentcluster.errors import ConfigError, suggest
from agentcluster.launch import Host

#: Endings of the name of a file of hosts.
ENDINGS = (".yaml", ".yml", ".txt")

#: Maximum number of hosts; more are a mistake in a range.
MOST = 10_000

#: Options of a host, a group, or of all hosts, by name.
Options: TypeAlias = Mapping[str, Any]

_RANGE = re.compile(r"\[([^\[\]]*)\]")
_OPTIONS = {field.name for field in dataclasses.fields(Host)}


def is_file(hosts: object) -> bool:
    """Return whether `hosts` is the name of a file of hosts.

    Parameters
    ----------
    hosts
        The value that the user gave.

    Returns
    -------
    bool
        True for a path object, and for text with a known ending or a slash.
    """
    if isinstance(hosts, os.PathLike):
        return True
    return isinstance(hosts, str) and "://" not in hosts and (hosts.endswith(ENDINGS) or "/" in hosts)


def hosts_in(path: str | os.PathLike[str]) -> list[Host | str]:
    """Read the hosts of a file.

    Parameters
    ----------
    path
        Name of the file: an inventory when it ends with ``.yaml`` or ``.yml``, otherwise text with one host per line.

    Returns
    -------
    list of Host or str
        The hosts.

    Raises
    ------
    ConfigError
        When the file cannot be read, or has an error; the message names the place.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"file of hosts {os.fspath(path)!r} cannot be read: {why}", key="hosts") from None
    if not os.fspath(path).endswith((".yaml", ".yml")):
        lines = (line.split("#")[0].strip() for line in text.splitlines())
        return [host for line in lines if line for host in expanded(line, os.fspath(path))]
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{os.fspath(path)}: {' '.join(str(error).split())}", key="hosts") from None
    return list(_inventory(data, os.fspath(path)))


def slurm_hosts(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the hosts of the Slurm allocation of this process.

    Parameters
    ----------
    environ
        Environment variables of the process.

    Returns
    -------
    list of str
        Names of the hosts.

    Raises
    ------
    ConfigError
        When the process is not in an allocation.
    """
    names = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not names:
        raise ConfigError("hosts='slurm': this is not a Slurm allocation, SLURM_JOB_NODELIST is not set", key="hosts")
    return expanded(names, "SLURM_JOB_NODELIST")


def expanded(text: str, place: str) -> list[str]:
    """Expand a list of hosts with ranges, as Slurm writes it.

    Parameters
    ----------
    text
        Hosts with commas between them, with ranges in brackets. A range such as ``[01-10]`` keeps its zeros; the
        brackets of an IPv6 address are kept.
    place
        Place of the text, for messages.

    Returns
    -------
    list of str
        The hosts.

    Raises
    ------
    ConfigError
        When a range cannot be used.

    Examples
    --------
    >>> expanded("gpu-[1-3,07],login", "hosts")
    ['gpu-1', 'gpu-2', 'gpu-3', 'gpu-07', 'login']
    """
    found: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text):
        for host in _ranges(part.strip(), place):
            found.append(host)
            if len(found) > MOST:
                raise ConfigError(f"{place}: {text!r} are more than {MOST} hosts", key="hosts")
    return found


def _ranges(text: str, place: str) -> Iterator[str]:
    """Yield the hosts of a name with ranges."""
    match = _RANGE.search(text)
    if match is None or ":" in match[1]:
        yield text
        return
    for item in match[1].split(","):
        first, dash, last = item.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ConfigError(f"{place}: [{match[1]}] in {text!r} is not a range, such as [1-8] or [1,3]", key="hosts")
        for number in range(int(first), int(last) + 1):
            for rest in _ranges(text[match.end() :], place):
                yield f"{text[: match.start()]}{number:0{len(first)}d}{rest}"


def _inventory(data: object, path: str) -> Iterator[Host | str]:
    """Yield the hosts of an inventory."""
    top = _mapping(data, path, {"hosts", "groups", "defaults"})
    defaults = _mapping(top.get("defaults"), f"{path}: defaults", _OPTIONS - {"host", "name"})
    groups = top.get("groups") or {}
    if not isinstance(groups, Mapping):
        raise ConfigError(f"{path}: groups: expected a mapping of group to hosts, got {groups!r}", key="hosts")
    yield from _hosts(top.get("hosts"), f"{path}: hosts", [defaults])
    for name, group in groups.items():
        place = f"{path}: groups: {name}"
        own = _mapping(group, place, {"hosts", *_OPTIONS} - {"host", "name"})
        labels = {"labels": {"group": str(name)}}
        options = {key: value for key, value in own.items() if key != "hosts"}
        yield from _hosts(own.get("hosts"), f"{place}: hosts", [defaults, labels, options])


def _hosts(hosts: object, place: str, above: Iterable[Options]) -> Iterator[Host | str]:
    """Yield the hosts of a list; `above` are the options of the levels above it."""
    if not isinstance(hosts, list | None):
        raise ConfigError(f"{place}: expected a list, got {hosts!r}", key="hosts")
    for entry in hosts or ():
        own: Options = {"host": entry} if isinstance(entry, str) else _mapping(entry, place, _OPTIONS)
        if not isinstance(own.get("host"), str):
            raise ConfigError(f"{place}: {entry!r} names no host", key="hosts")
        options = _merged([*above, own], place)
        names = expanded(options.pop("host"), place)
        if len(names) > 1 and options.get("name"):
            raise ConfigError(f"{place}: {entry!r} are {len(names)} hosts, which cannot all have one name", key="name")
        for name in names:
            elsewhere = isinstance(entry, str) and (name == "local" or "://" in name)
            yield name if elsewhere else _host(name, options, place)


def _merged(levels: Sequence[Options], place: str) -> dict[str, Any]:
    """Merge options; later levels override earlier ones, and mappings are merged."""
    options = {key: value for level in levels for key, value in level.items()}
    for name in ("labels", "env", "connect_options"):
        parts = [level[name] for level in levels if level.get(name) is not None]
        if wrong := [part for part in parts if not isinstance(part, Mapping)]:
            raise ConfigError(f"{place}: {name}: expected a mapping, got {wrong[0]!r}", key=name)
        if parts:
            options[name] = {str(key): value for part in parts for key, value in part.items()}
    if labels := options.get("labels"):
        options["labels"] = {key: str(value) for key, value in labels.items()}
    return options


def _host(text: str, options: Options, place: str) -> Host:
    """Parse a host, and add its options."""
    try:
        parsed = Host.parse(text)
        typed = {key: value for key in ("user", "port") if (value := getattr(parsed, key)) is not None}
        return dataclasses.replace(parsed, **{**options, **typed})
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}", key="hosts") from None


def _mapping(data: object, place: str, known: set[str]) -> Options:
    """Check that data is a mapping with known keys; None is an empty one."""
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: expected a mapping, got {data!r}", key="hosts")
    for key in data:
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key!r}; {suggest(str(key), known)}", key=str(key))
    return data
