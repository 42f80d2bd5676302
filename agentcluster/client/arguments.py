"""Arguments of an AgentCluster and of its calls, parsed before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from agentcluster import modes
from agentcluster.client.calls import Plain
from agentcluster.errors import ConfigError, NodeNotFound
from agentcluster.model import Mode
from agentcluster.reports import Nodes, NodeSnapshot
from agentcluster.units import parse_seconds

#: Nodes by name, pattern, label or a function of what is known of them; None for all.
NodeSelection: TypeAlias = str | Sequence[str] | Callable[[NodeSnapshot], bool] | None


def parse_mapping(key: str, value: Plain | None) -> dict[str, Any]:
    """Return a copy of a mapping by text, such as ``worker_options``; empty for None.

    Parameters
    ----------
    key
        Name of the argument.
    value
        What was given.

    Raises
    ------
    ConfigError
        For anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key}={value!r} must be a mapping from names to values", key=key)
    return dict(value)


def first_modes(
    mode: str | Mode | Mapping[str, str | Mode], config: Plain | str | None, names: Sequence[str]
) -> tuple[Mode, dict[str, Mode]]:
    """Parse the first modes that a cluster is given.

    Parameters
    ----------
    mode
        Mode of all nodes, or node name -> mode.
    config
        Options of the mode of all nodes.
    names
        Names of the nodes.

    Returns
    -------
    default : Mode
        Mode of the nodes that have none by name.
    by_name : dict
        Node name -> mode.

    Raises
    ------
    ConfigError, NodeNotFound
        For a mode that cannot be used, or the name of no node.
    """
    if not isinstance(mode, Mapping):
        return modes.parse(mode, config), {}
    for name in mode:
        if name not in names:
            raise NodeNotFound(str(name), names)
    if config is not None:
        raise ConfigError(
            "config= cannot be given with a mapping of modes; use Mode(name, config) as its values", key="config"
        )
    return Mode("auto-cpu"), {name: modes.parse(each) for name, each in mode.items()}


def parse_rollouts(
    known: Nodes, mode: str | Mode | Mapping[str, str | Mode], config: Plain | str | None, nodes: NodeSelection
) -> list[tuple[str | Sequence[str] | None, Mode]]:
    """Return the rollouts that a call of ``reprovision`` asks for.

    Parameters
    ----------
    known
        The nodes.
    mode, config, nodes
        As for :meth:`agentcluster.AgentCluster.reprovision`.

    Returns
    -------
    list of tuple
        Nodes, None for all, and their mode, for each rollout.

    Raises
    ------
    ConfigError
        For arguments that cannot be given together, or a function that selects no node.
    """
    if isinstance(mode, Mapping):
        if nodes is not None:
            raise ConfigError("nodes= cannot be given with a mapping of modes: its keys are the nodes", key="nodes")
        return [([name], modes.parse(each, config)) for name, each in mode.items()]
    if callable(nodes):
        names = [name for name, node in known.items() if nodes(node)]
        if not names:
            raise ConfigError(f"nodes={nodes!r} selects no node of {', '.join(known)}", key="nodes")
        return [(names, modes.parse(mode, config))]
    return [(nodes, modes.parse(mode, config))]


def parse_optional_seconds(key: str, value: str | float | None, zero: bool = False) -> float | None:
    """Parse an optional time of ``reprovision``.

    Parameters
    ----------
    key, value
        Name and value of the argument.
    zero
        Whether it may be 0.
    """
    return None if value is None else parse_seconds(key, value, call="reprovision", zero=zero)


def parse_timeout(key: str, value: str | float | None, default: float) -> float:
    """Parse an optional time of ``AgentCluster``.

    Parameters
    ----------
    key, value
        Name and value of the argument.
    default
        Seconds where it is None.
    """
    return default if value is None else parse_seconds(key, value, call="AgentCluster")
