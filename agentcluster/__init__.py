"""A Dask cluster of long-lived agents whose workers are swapped in place.

This module has the public names. Each is imported at its first use: the host of an agent needs no asyncssh, a client no
GPU libraries, and the first line of a launched agent must not wait for ``distributed``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentcluster.agent.agent import Agent
    from agentcluster.client.cluster import AgentCluster
    from agentcluster.errors import (
        AgentClusterError,
        ConfigError,
        LaunchError,
        LaunchTimeout,
        ModeRefused,
        NodeExists,
        NodeNotFound,
        PreflightError,
        RolloutBusy,
        SchedulerUnfit,
        SwapError,
        VersionMismatch,
        WorkerStartError,
        WorkerStartTimeout,
    )
    from agentcluster.launch import Host
    from agentcluster.model import Mode
    from agentcluster.scheduler.plugin import dask_setup

    __version__: str

__all__ = [
    "Agent",
    "AgentCluster",
    "AgentClusterError",
    "ConfigError",
    "Host",
    "LaunchError",
    "LaunchTimeout",
    "Mode",
    "ModeRefused",
    "NodeExists",
    "NodeNotFound",
    "PreflightError",
    "RolloutBusy",
    "SchedulerUnfit",
    "SwapError",
    "VersionMismatch",
    "WorkerStartError",
    "WorkerStartTimeout",
    "__version__",
    "dask_setup",
]

#: Public name -> its module; every other name of ``__all__`` but the version is an error.
_HOMES = {
    "Agent": "agentcluster.agent.agent",
    "AgentCluster": "agentcluster.client.cluster",
    "Host": "agentcluster.launch",
    "Mode": "agentcluster.model",
    "dask_setup": "agentcluster.scheduler.plugin",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in __all__:
        value = getattr(importlib.import_module(_HOMES.get(name, "agentcluster.errors")), name)
    else:
        raise AttributeError(f"module 'agentcluster' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Return the version of the installed package, or of the checkout or unpacked sdist that this file is in."""
    from importlib import metadata

    try:
        return metadata.version("agentcluster")
    except metadata.PackageNotFoundError:
        unknown = "0+unknown"
        try:
            from setuptools_scm import get_version
        except ImportError:
            return unknown
        from pathlib import Path

        version: str = get_version(str(Path(__file__).parents[1]), fallback_version=unknown)
        return version
