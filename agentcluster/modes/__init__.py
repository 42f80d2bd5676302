"""Named rules from a node's hardware to its workers: which there are, what options they take, what they make.

Pure: nothing is started, detected or waited for; a plan depends on the mode and the :class:`Hardware` alone, and is the
same each time. Third parties add modes as entry points of the group ``agentcluster.modes``: a function from
`Hardware` and the mode's options (a mapping of plain data, as the user gave them) to an iterable of `WorkerSpec`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from agentcluster.errors import ConfigError, ModeRefused, suggest
from agentcluster.model import Hardware, Mode, WorkerSpec
from agentcluster.modes import builtin
from agentcluster.modes import options as checks
from agentcluster.modes.options import Place, worker_keywords
from agentcluster.modes.sizing import Site, warn_of_overcommit
from agentcluster.modes.spec import check_spec, plan_spec
from agentcluster.wire import from_wire, to_wire

__all__ = ["GROUP", "named", "names", "parse", "plan", "worker_keywords"]

#: The group of entry points by which third parties add modes.
GROUP = "agentcluster.modes"


class _Rule(NamedTuple):
    check: Callable[[Place, Mapping[str, Any]], dict[str, Any]]
    plan: Callable[[Site, Mapping[str, Any]], tuple[WorkerSpec, ...]]


_RULES: Mapping[str, _Rule] = {
    "auto-cpu": _Rule(builtin.check_cpu, builtin.plan_cpu),
    "auto-gpu": _Rule(builtin.check_gpu, builtin.plan_gpu),
    "auto": _Rule(builtin.check_auto, builtin.plan_auto),
    "mixed": _Rule(builtin.check_mixed, builtin.plan_mixed),
    "uniform": _Rule(builtin.check_uniform, builtin.plan_uniform),
    "spec": _Rule(check_spec, plan_spec),
    "none": _Rule(builtin.check_none, builtin.plan_none),
}


def names() -> list[str]:
    """Return the names of all modes: the built-in ones, then those of third parties."""
    return [*_RULES, *sorted(_third_party())]


def parse(mode: str | Mode, config: Mapping[str, Any] | str | None = None) -> Mode:
    """Check a mode's name and options.

    Parameters
    ----------
    mode
        A mode's name, or a `Mode`, which has its options already.
    config
        The options by name, or JSON text of them.

    Returns
    -------
    Mode
        With options that are plain data: what is not is pickled, several ways to say the same are one.

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
        raise ConfigError(f"mode {checks.shown(mode)} is not allowed; give a name: {', '.join(names())}", key="mode")
    if mode not in _RULES and mode not in _third_party():
        raise ConfigError(f"unknown mode {mode!r}; {suggest(mode, names())}", key="mode")
    place = Place(mode)
    if isinstance(config, str):
        config = checks.from_json(place, config)
    options = checks.mapping(
        place, {} if config is None else config, "the mode's options by name, or JSON text of them"
    )
    if mode in _RULES:
        return Mode(mode, _RULES[mode].check(place, options))
    return Mode(mode, {key: checks.as_plain(place.at(key), value) for key, value in options.items()})


def plan(mode: Mode, hardware: Hardware, *, node: str) -> tuple[WorkerSpec, ...]:
    """Return the workers that a mode gives a node.

    Parameters
    ----------
    mode
        The mode; it is checked again, since it may have come over the wire.
    hardware
        What the node has.
    node
        The node's name, for messages.

    Raises
    ------
    ModeRefused
        When the node cannot serve the mode; says why and what would help.
    ConfigError
        For an option that is not allowed.

    Warns
    -----
    UserWarning
        When memory limits that were set by hand add up to more than the node has.
    """
    mode = parse(mode)
    site = Site(mode.name, node, hardware)
    rule = _RULES.get(mode.name)
    workers = _plan_third_party(site, mode.config) if rule is None else rule.plan(site, mode.config)
    warn_of_overcommit(site, workers)
    return workers


def try_plan(mode: Mode, hardware: Hardware, *, node: str) -> tuple[WorkerSpec, ...] | str:
    """Plan the workers of a node, with the reason in place of an error.

    Parameters
    ----------
    mode, hardware, node
        As for :func:`plan`.

    Returns
    -------
    tuple of WorkerSpec or str
        The workers, or the reason why the node cannot have them.
    """
    try:
        return plan(mode, hardware, node=node)
    except ModeRefused as error:
        return error.reason
    except ConfigError as error:
        return str(error)


def named(mode: Mode, workers: Sequence[WorkerSpec]) -> tuple[tuple[str, WorkerSpec], ...]:
    """Return the workers of a plan with the names that the user gave them in a spec; () for other modes."""
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


def _plan_third_party(site: Site, options: Mapping[str, Any]) -> tuple[WorkerSpec, ...]:
    entry_point = _third_party()[site.mode]
    try:
        workers = tuple(entry_point.load()(site.hardware, options))
    except ConfigError:
        raise
    except Exception as error:  # a third party's code: whatever it raises is its reason
        raise site.refuse(f"{entry_point.value} raised {type(error).__name__}: {error}") from error
    for worker in workers:
        if not isinstance(worker, WorkerSpec):
            raise site.refuse(f"{entry_point.value} returned {checks.shown(worker)}, which is not a WorkerSpec")
    try:
        return tuple(from_wire(WorkerSpec, to_wire(worker)) for worker in workers)
    except ConfigError as error:
        raise site.refuse(f"{entry_point.value} returned a WorkerSpec that cannot be used: {error}") from error
