"""An agent where a worker stood: the arguments of a ``Worker`` or a ``Nanny`` that mean something for a whole node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask import config
from distributed.utils import json_load_robust

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
