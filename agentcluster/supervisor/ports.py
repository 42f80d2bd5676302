"""Ports that workers were given: dealt out, one of several for each device, under dask's name for a server's own."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from distributed.comm.addressing import get_address_host_port
from distributed.utils import parse_ports

from agentcluster.addresses import PORT_OPTIONS
from agentcluster.errors import ConfigError
from agentcluster.model import WorkerSpec


def in_use(server: Any) -> set[int]:
    """Return the ports that a nanny and its worker, or a worker without one, listen at."""
    used = set()
    for address in (getattr(server, "_address", None), getattr(server, "worker_address", None)):
        with contextlib.suppress(ValueError):  # not started, or a protocol without ports
            used.add(get_address_host_port(address or "")[1])
    return used


def dealt(options: Mapping[str, Any], names: Iterable[str], taken: set[int]) -> dict[str, dict[str, list[int]]]:
    """Deal ranges of ports out to workers that start together, in turn and as ``dask worker`` does: none is for two.

    Parameters
    ----------
    options
        Options for every worker of a host, each of ``PORT_OPTIONS`` a port, a range such as ``"9000:9010"`` or None.
    names
        The workers.
    taken
        Ports that are not for them.

    Returns
    -------
    dict
        Worker -> those of them for which there are ports for it -> its ports, in their order.
    """
    shares: dict[str, dict[str, list[int]]] = {name: {} for name in names}
    ranges = {key: deque(_numbers(options, key)) for key in PORT_OPTIONS}
    seen = set(taken)
    while shares and any(ranges.values()):
        for share in shares.values():
            for key, ports in ranges.items():
                while ports and ports[0] in seen:
                    ports.popleft()
                if ports:
                    seen.add(ports[0])
                    share.setdefault(key, []).append(ports.popleft())
    return shares


def _numbers(options: Mapping[str, Any], key: str) -> list[int]:
    """Return the ports that were asked for by number."""
    return [port for port in parse_ports(options.get(key)) if port]


def with_port(arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """Return arguments with the port that is a server's own under dask's name for it."""
    port, others = arguments.get(key), {k: v for k, v in arguments.items() if k not in (key, "nanny_port")}
    return others if port is None else {"port": port, **others}


def ports_of_devices(options: Mapping[str, Any], specs: Iterable[WorkerSpec]) -> set[int]:
    """Return the ports that :func:`port_of` gives; where there are too few, none: it says so."""
    each = _numbers(options, "worker_port")
    return {each[spec.device] for spec in specs if spec.device is not None and spec.device < len(each)}


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
