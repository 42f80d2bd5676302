"""Ports that workers were given: under dask's name for a server's own, and one of several for each device."""

from __future__ import annotations

from typing import Any

from distributed.utils import parse_ports

from agentcluster.errors import ConfigError
from agentcluster.model import WorkerSpec


def with_port(arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """Return arguments with the port that is a server's own under dask's name for it."""
    port, others = arguments.get(key), {k: v for k, v in arguments.items() if k not in (key, "nanny_port")}
    return others if port is None else {"port": port, **others}


def port_of(ports: Any, spec: WorkerSpec) -> int | None:
    """Return a GPU worker's own port of those that were given for all devices."""
    each = parse_ports(ports)
    if len(each) < len(spec.devices):
        raise ConfigError(
            f"worker_port={ports!r} has {len(each)} ports for {len(spec.devices)} GPUs; give a range, such as "
            f"'9000:{8999 + len(spec.devices)}'",
            key="worker_port",
        )
    assert spec.device is not None
    return each[spec.device]
