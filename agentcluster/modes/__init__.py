"""Modes: named rules from a node's hardware to its workers.

Pure: nothing is started, detected or awaited; a plan depends on the mode and the :class:`Hardware` alone, and is the
same each time. :func:`parse` checks a mode's options once, where they enter a process: from a user, or over the wire.
Inside, a :class:`Mode` is one that was parsed.

Third parties add modes as entry points of the group ``agentcluster.modes``: a function from :class:`Hardware` and the
mode's options (a mapping of plain data, as the user wrote them) to an iterable of :class:`WorkerSpec`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from agentcluster.errors import ConfigError, ModeRefused, suggest
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.modes import builtin, spec
from agentcluster.modes.builtin import NodeHardware, Workers, warn_of_overcommit
from agentcluster.modes.options import (
    CheckedOptions,
    OptionPath,
    Options,
    check_mapping,
    check_sendable,
    parse_json,
    shown,
    worker_keywords,
)
from agentcluster.wire import from_wire, to_wire

__all__ = ["GROUP", "Workers", "named", "names", "parse", "plan", "try_plan", "worker_keywords"]

#: Group of entry points by which third parties add modes.
GROUP = "agentcluster.modes"


class _Rule(NamedTuple):
    """Functions of a built-in mode: the check of its options, and the plan of a node's workers."""

    check: Callable[[OptionPath, Options], CheckedOptions]
    plan: Callable[[NodeHardware, Options], Workers]


_RULES: Mapping[str, _Rule] = {
    "auto-cpu": _Rule(builtin.check_cpu, builtin.plan_cpu),
    "auto-gpu": _Rule(builtin.check_gpu, builtin.plan_gpu),
    "auto": _Rule(builtin.check_auto, builtin.plan_auto),
    "mixed": _Rule(builtin.check_mixed, builtin.plan_mixed),
    "uniform": _Rule(builtin.check_uniform, builtin.plan_uniform),
    "spec": _Rule(spec.check_spec, spec.plan_spec),
    "none": _Rule(builtin.check_none, builtin.plan_none),
}


def names() -> list[str]:
    """Return the names of all modes: the built-in ones, then those of third parties."""
    return [*_RULES, *sorted(_third_party())]


def parse(mode: str | Mode, config: Options | str | None = None) -> Mode:
    """Check a mode's name and options, where they enter a process.

    Parsing a parsed mode returns an equal one.

    Parameters
    ----------
    mode
        A mode's name, or a mode with its options.
    config
        The options by name, or JSON text of them; only with a mode's name.

    Returns
    -------
    Mode
        With options that are plain data: others are pickled, and the forms of a value become one.

    Raises
    ------
    ConfigError
        For an unknown mode, an unknown option, or a value that is not allowed.

    Examples
    --------
    >>> parse("uniform", {"nthreads": 2, "memory_limit": "8 GiB"})
    Mode(name='uniform', config={'nthreads': 2, 'memory_limit': '8 GiB'})
    """
    if isinstance(mode, Mode):
        if config is not None and mode.config:
            raise ConfigError(f"mode {mode.name!r} has its options already; give config with a mode's name only")
        config = mode.config if config is None else config
        mode = mode.name
    if not isinstance(mode, str):
        raise ConfigError(f"mode {shown(mode)} is not allowed; give a name: {', '.join(names())}", key="mode")
    if mode not in _RULES and mode not in _third_party():
        raise ConfigError(f"unknown mode {mode!r}; {suggest(mode, names())}", key="mode")
    path = OptionPath(mode)
    given = parse_json(path, config) if isinstance(config, str) else config
    options = check_mapping(path, {} if given is None else given, "the mode's options by name, or JSON text of them")
    if mode in _RULES:
        return Mode(mode, _RULES[mode].check(path, options))
    return Mode(mode, {key: check_sendable(path.at(key), value) for key, value in options.items()})


def plan(mode: Mode, hardware: Hardware, *, node: str) -> Workers:
    """Plan the workers of a node in a mode.

    Parameters
    ----------
    mode
        The mode, as :func:`parse` returns it.
    hardware
        Hardware of the node.
    node
        Name of the node, for messages.

    Returns
    -------
    tuple of WorkerSpec
        Settings of each worker.

    Raises
    ------
    ModeRefused
        When the node cannot have the mode; with the reason and what would help.
    ConfigError
        When a third party's mode refuses an option.

    Warns
    -----
    UserWarning
        When memory limits that were set by hand add up to more than the node has.
    """
    if not isinstance(mode, Mode) or (mode.name not in _RULES and mode.name not in _third_party()):
        raise ConfigError(f"mode {shown(mode)} cannot be planned; give one that modes.parse returned", key="mode")
    if not isinstance(hardware, Hardware):
        raise ConfigError(f"hardware {shown(hardware)} is not that of a node; give a Hardware", key="hardware")
    if not isinstance(node, str):
        raise ConfigError(f"node {shown(node)} is not the name of a node; give text", key="node")
    there = NodeHardware(mode.name, node, hardware)
    rule = _RULES.get(mode.name)
    workers = _plan_third_party(there, mode.config) if rule is None else rule.plan(there, mode.config)
    warn_of_overcommit(there, workers)
    return workers


def outdated(mode: Mode) -> str:
    """Return a warning of options that have no future; "" where a mode has none.

    Parameters
    ----------
    mode
        The mode, as :func:`parse` returns it.
    """
    for options in (mode.config, mode.config.get("gpu")):
        if isinstance(options, Mapping) and options.get("rmm_async") and options.get("rmm_pool_size") is not None:
            # Said by dask_cuda.LocalCUDACluster, and not by the class of its workers.
            return (
                f"mode {mode.name!r}: 'rmm_pool_size' is not needed when 'rmm_async' is enabled, and dask-cuda will "
                f"raise an exception in the future; leave 'rmm_pool_size' out"
            )
    return ""


def try_plan(mode: Mode, hardware: Hardware, *, node: str) -> Workers | str:
    """Plan the workers of a node in a mode, or return the reason why it cannot have them.

    Parameters
    ----------
    mode, hardware, node
        As for :func:`plan`.

    Returns
    -------
    tuple of WorkerSpec or str
        Settings of each worker, or the reason.
    """
    try:
        return plan(mode, hardware, node=node)
    except ModeRefused as error:
        return error.reason
    except ConfigError as error:
        return str(error)


def named(mode: Mode, workers: Sequence[WorkerSpec]) -> tuple[tuple[str, WorkerSpec], ...]:
    """Pair the workers of a plan with the names that a spec gives them.

    Parameters
    ----------
    mode
        The mode.
    workers
        Its plan.

    Returns
    -------
    tuple of (str, WorkerSpec)
        () for other modes than ``spec``.
    """
    if mode.name != "spec":
        return ()
    names = list(mode.config["spec"]) * mode.config.get("nworkers", 1)
    return tuple(zip(names, workers, strict=True))


def _third_party() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the modes of third parties; none takes the place of a built-in one, or of an earlier one on the path."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        if entry_point.name not in _RULES:
            found.setdefault(entry_point.name, entry_point)
    return found


def _plan_third_party(node: NodeHardware, options: Options) -> Workers:
    """Call a third party's function; what it raises or returns wrongly is the reason of a refusal."""
    entry_point = _third_party()[node.mode]
    try:
        workers = tuple(entry_point.load()(node.hardware, options))
    except ConfigError:
        raise
    except Exception as error:
        raise node.refuse(f"{entry_point.value} raised {type(error).__name__}: {error}") from error
    for worker in workers:
        if not isinstance(worker, WorkerSpec):
            raise node.refuse(f"{entry_point.value} returned {shown(worker)}, which is not a WorkerSpec")
    try:
        return tuple(from_wire(WorkerSpec, to_wire(worker)) for worker in workers)
    except ConfigError as error:
        raise node.refuse(f"{entry_point.value} returned a WorkerSpec that cannot be used: {error}") from error
