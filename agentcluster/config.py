"""Configuration of the package: its defaults in dask's config system, the checked values, and the tested versions.

Importing this module adds ``agentcluster.yaml`` to :mod:`dask.config` as defaults. :meth:`Config.load` reads the key
``agentcluster`` once; nothing else in the package asks :mod:`dask.config` for one of its options.
"""

from __future__ import annotations

import functools
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import dask.config
import yaml

from agentcluster.errors import ConfigError, suggest
from agentcluster.units import parse_seconds

__all__ = ["Config", "overrides", "warn_untested"]

ROOT = "agentcluster"

#: Options by name; those of a section are a mapping.
Options: TypeAlias = dict[str, Any]

# Through the loader: in a scheduler the package can be without a directory (:mod:`agentcluster.shipping`).
defaults: Options = yaml.safe_load(pkgutil.get_data("agentcluster", "agentcluster.yaml") or b"")

dask.config.update_defaults(defaults)


@dataclass(frozen=True)
class Config:
    """Options of the package, checked; times are in seconds.

    The attributes are named like the options below ``agentcluster`` in :mod:`dask.config`, with ``_`` for ``.`` and
    ``-``.

    Examples
    --------
    >>> with dask.config.set({"agentcluster.node.ttl": "1 minute"}):
    ...     Config.load().node_ttl
    60.0

    Attributes
    ----------
    launch_timeout
        Seconds from the launch of an agent to its Ready line.
    start_timeout
        Seconds from the start of a swap's new workers until they have joined.
    stop_timeout
        Seconds for a worker to end by itself.
    drain_timeout
        Seconds for running tasks of leaving workers to end.
    retire_timeout
        Seconds for moving data off leaving workers.
    node_name
        Name of an agent's node; ``None`` for its hostname.
    node_heartbeat_interval
        Seconds between an agent's heartbeats.
    node_ttl
        Seconds without a heartbeat after which a node is lost.
    worker_restart_limit
        Number of crashes within the window after which a worker is not restarted.
    worker_restart_window
        Seconds in which crashes are counted.
    worker_restart_backoff, worker_restart_backoff_max
        Seconds before the second restart, and the longest delay.
    forkserver_preload
        Names of the modules that a warm forkserver imports.
    log_lines
        Number of the last lines of output that are kept for each node.
    ssh_keepalive_interval
        Seconds between keepalive requests on an SSH connection.
    secret_file
        Path of the secret by which this user's clusters and agents in standby know each other on one machine; ``None``
        for the user's folder of states.
    debug
        Whether errors are shown with all their frames, not with the user's line alone.
    ssh_keepalive_count
        Number of unanswered keepalive requests after which an SSH connection is lost.
    """

    launch_timeout: float
    start_timeout: float
    stop_timeout: float
    retire_timeout: float
    drain_timeout: float
    node_name: str | None
    node_heartbeat_interval: float
    node_ttl: float
    worker_restart_limit: int
    worker_restart_window: float
    worker_restart_backoff: float
    worker_restart_backoff_max: float
    forkserver_preload: tuple[str, ...]
    log_lines: int
    secret_file: str | None
    debug: bool
    ssh_keepalive_interval: float
    ssh_keepalive_count: int

    @classmethod
    def load(cls) -> Config:
        """Read the current configuration.

        Returns
        -------
        Config
            The checked values; later changes of :mod:`dask.config` do not change them.

        Raises
        ------
        ConfigError
            For an unknown option, or a value that cannot be used. The message and the error's `key` have the full name
            of the option, such as ``agentcluster.node.ttl``.
        """
        found = dict(_options(dask.config.get(ROOT, {}), defaults[ROOT], ROOT))
        config = cls(**{_attribute(key): _READERS[key](key, value) for key, value in found.items()})
        config._check_pairs(found)
        return config

    def _check_pairs(self, found: Mapping[str, object]) -> None:
        """Check the options that depend on each other."""
        ttl, interval = f"{ROOT}.node.ttl", f"{ROOT}.node.heartbeat-interval"
        if self.node_ttl <= self.node_heartbeat_interval:
            raise _wrong(ttl, found[ttl], f"a time longer than {interval} ({found[interval]!r})")
        most, first = f"{ROOT}.worker.restart.backoff-max", f"{ROOT}.worker.restart.backoff"
        if self.worker_restart_backoff_max < self.worker_restart_backoff:
            raise _wrong(most, found[most], f"a time not shorter than {first} ({found[first]!r})")


def _attribute(key: str) -> str:
    return key.removeprefix(f"{ROOT}.").replace(".", "_").replace("-", "_")


def _options(given: object, known: Mapping[str, object], where: str) -> Iterator[tuple[str, object]]:
    """Yield the full name and the value of each option below `where`; refuse names that `known` does not have."""
    if not isinstance(given, Mapping):
        raise _wrong(where, given, f"a mapping of {', '.join(sorted(known))}")
    # For dask.config, "-" and "_" in a name are the same, and environment variables can only have "_".
    named = {str(name).replace("_", "-"): (name, value) for name, value in given.items()}
    for name, (written, _) in named.items():
        if name not in known:
            key = f"{where}.{written}"
            raise ConfigError(f"there is no option {key!r}: {suggest(name, known)}", key=key)
    for name, default in known.items():
        key = f"{where}.{name}"
        _, value = named.get(name, (name, default))
        if isinstance(default, Mapping):
            yield from _options(value, default, key)
        else:
            yield key, value


def _wrong(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key} is {value!r}, but must be {allowed}", key=key)


def _integer(least: int) -> Callable[[str, object], int]:
    """Return a reader of whole numbers from `least`."""

    def read(key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _wrong(key, value, f"a whole number, {least} or more")
        return value

    return read


def _flag(key: str, value: object) -> bool:
    """Read a bool."""
    if isinstance(value, bool):
        return value
    raise _wrong(key, value, "true or false")


def _name(key: str, value: object) -> str | None:
    """Read the name of a node."""
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise _wrong(key, value, "a name, or null for the hostname")


def _path(key: str, value: object) -> str | None:
    """Read the path of a file."""
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise _wrong(key, value, "the path of a file, or null for the default")


def _modules(key: str, value: object) -> tuple[str, ...]:
    """Read names of modules."""
    if isinstance(value, list | tuple) and all(
        isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) for name in value
    ):
        return tuple(value)
    raise _wrong(key, value, "a list of module names")


#: Full name of an option -> function that checks and converts its value.
_READERS: Mapping[str, Callable[[str, object], Any]] = {
    f"{ROOT}.launch-timeout": parse_seconds,
    f"{ROOT}.start-timeout": parse_seconds,
    f"{ROOT}.stop-timeout": parse_seconds,
    f"{ROOT}.retire-timeout": parse_seconds,
    f"{ROOT}.drain-timeout": parse_seconds,
    f"{ROOT}.node.name": _name,
    f"{ROOT}.node.heartbeat-interval": parse_seconds,
    f"{ROOT}.node.ttl": parse_seconds,
    f"{ROOT}.worker.restart.limit": _integer(0),
    f"{ROOT}.worker.restart.window": parse_seconds,
    f"{ROOT}.worker.restart.backoff": parse_seconds,
    f"{ROOT}.worker.restart.backoff-max": parse_seconds,
    f"{ROOT}.forkserver.preload": _modules,
    f"{ROOT}.log.lines": _integer(1),
    f"{ROOT}.secret-file": _path,
    f"{ROOT}.debug": _flag,
    f"{ROOT}.ssh.keepalive-interval": parse_seconds,
    f"{ROOT}.ssh.keepalive-count": _integer(1),
}


#: First and last versions of distributed that the tests have run with; of the last, any patch.
TESTED = ((2026, 7, 1), (2026, 8))


@functools.cache
def warn_untested() -> None:
    """Warn, once per process, about a version of distributed that the package is not tested with.

    The package uses private API of dask (``docs/develop/private-api.rst``), which another version may lack.

    Warns
    -----
    UserWarning
        When the installed version is outside :data:`TESTED`.
    """
    import distributed  # heavy, and only needed here

    installed = str(vars(distributed)["__version__"])
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", installed)
    version = tuple(map(int, found.groups())) if found else ()
    first, last = TESTED
    if not (first <= version and version[: len(last)] <= last):
        warnings.warn(
            f"agentcluster is tested with distributed {'.'.join(map(str, first))} to {'.'.join(map(str, last))}.*, and "
            f"{installed} is installed: some functions may not work",
            UserWarning,
            stacklevel=3,
        )


def overrides() -> Options:
    """Return the part of dask's configuration that differs from the defaults of all libraries.

    Returns
    -------
    dict
        The options, nested as in :mod:`dask.config`.
    """
    known: Options = {}
    for layer in dask.config.defaults:
        dask.config.update(known, layer)
    return _difference(dask.config.config, known)


def _difference(values: Mapping[str, object], known: Mapping[str, object]) -> Options:
    """Return the values that `known` does not have, or has otherwise."""
    found: Options = {}
    for key, value in values.items():
        default = known.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if inner := _difference(value, default):
                found[key] = inner
        elif key not in known or value != default:
            found[key] = value
    return found
