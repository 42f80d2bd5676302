"""Mode spec: the workers that the user lists, as ``dask spec`` and ``SpecCluster`` accept them.

The many forms of the list become one, ``{"spec": {name: {"cls": …, "options": {…}}}}``, when the mode is parsed. The
names only distinguish the entries: worker names are the node's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from agentcluster.errors import ConfigError, ModeRefused
from agentcluster.model import WorkerSpec
from agentcluster.modes.builtin import NodeHardware, Workers
from agentcluster.modes.options import (
    COMMON,
    NANNY,
    RESERVED,
    WORKER,
    CheckedOptions,
    OptionPath,
    Options,
    canonical,
    check_mapping,
    check_options,
    check_repetitions,
    check_sendable,
    import_path,
    known_keywords,
    parse_json,
    reserved,
)
from agentcluster.wire import PICKLED

_ENTRY = ("cls", "options", "opts")
_OPTIONS = ("spec", "nworkers")
_EXAMPLE = '{"cls": "dask.distributed.Nanny", "opts": {…}}, or such mappings by name, or JSON text of either'
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def check_spec(path: OptionPath, config: Options) -> CheckedOptions:
    """Check a spec in any of its forms.

    Parameters
    ----------
    path
        Path of the options.
    config
        ``{"spec": …}``, with ``"nworkers": n`` to repeat a single entry; or the spec itself.

    Raises
    ------
    ConfigError
        For a form, key, class or option that is not allowed, or text that is not JSON.

    Returns
    -------
    dict
        ``{"spec": {name: {"cls": …, "options": {…}}}}``, with ``"nworkers"`` where it is set.
    """
    if "spec" not in config and config and (set(config) & set(_ENTRY) or _all_mappings(config)):
        config = {"spec": config}
        at_spec = path
    else:
        at_spec = path.at("spec")
    for key in config:
        if key not in _OPTIONS:
            raise path.unknown(key, (*_OPTIONS, *_ENTRY))
    if config.get("spec") is None:
        raise path.error(f"spec is missing; give {_EXAMPLE}")
    entries = _entries(at_spec, config["spec"])
    checked: CheckedOptions = {"spec": entries}
    if config.get("nworkers") is not None:
        checked["nworkers"] = check_repetitions(path.at("nworkers"), config["nworkers"])
        if len(entries) > 1:
            problem = f"nworkers repeats a single worker, and the spec has {len(entries)}; drop it or name one worker"
            raise path.at("nworkers").error(problem)
    return checked


def _all_mappings(config: Options) -> bool:
    return all(isinstance(value, Mapping) for value in config.values())


def _entries(path: OptionPath, spec: object) -> dict[str, Options]:
    if isinstance(spec, str):
        spec = parse_json(path, spec)
    if not spec:
        raise path.not_allowed(spec, _EXAMPLE)
    entries = check_mapping(path, spec, _EXAMPLE)
    if set(entries) & set(_ENTRY):
        return {"0": _entry(path, entries)}
    return {name: _entry(path.at(name), entry) for name, entry in entries.items()}


def _entry(path: OptionPath, entry: object) -> Options:
    if not isinstance(entry, Mapping):
        raise path.not_allowed(entry, 'a mapping with "cls" and "opts"')
    for key in entry:
        if key not in _ENTRY:
            raise path.unknown(str(key), _ENTRY)
    if "cls" not in entry:
        raise path.error('"cls" is missing; name the worker\'s class, such as "dask.distributed.Nanny"')
    if "opts" in entry and "options" in entry:
        raise path.error('"opts" and "options" are two names of the same; give one of them')
    key = "opts" if "opts" in entry else "options"
    options = check_mapping(path.at(key), entry.get(key) or {}, "a mapping of the class's keywords")
    cls = _class(path.at("cls"), entry["cls"])
    return {"cls": cls, "options": _options(path.at(key), cls, options)}


def _class(path: OptionPath, cls: object) -> str | Mapping[str, str]:
    if isinstance(cls, type):
        cls = import_path(cls) or check_sendable(path, cls)
    if isinstance(cls, Mapping) and set(cls) == {PICKLED}:
        return dict(cls)
    if not isinstance(cls, str) or not _PATH.fullmatch(cls):
        raise path.not_allowed(cls, 'a class or its import path, such as "dask.distributed.Nanny"')
    return canonical(cls)


def _options(path: OptionPath, cls: str | Mapping[str, str], options: Options) -> Options:
    for key in options:
        if key in RESERVED:
            raise reserved(path.at(key))
    if isinstance(cls, str):
        # A Worker without a nanny has no process, and so no environment, of its own.
        own = {key: check for key, check in COMMON.items() if (cls, key) != (WORKER, "env")}
        if known_keywords(cls) is not None:
            return check_options(path, options, own, cls)
    return {key: check_sendable(path.at(key), value) for key, value in options.items()}


def plan_spec(node: NodeHardware, options: Options) -> Workers:
    """Plan the workers of the spec, in its order; see :func:`agentcluster.modes.plan`."""
    entries = list(options["spec"].values()) * options.get("nworkers", 1)
    limits = _limits(node, entries)
    return tuple(_worker(node, entry, limit) for entry, limit in zip(entries, limits, strict=True))


def _is_of_distributed(entry: Options) -> bool:
    return entry["cls"] in (NANNY, WORKER)


def _limits(node: NodeHardware, entries: Sequence[Options]) -> list[int | None]:
    """Return the memory limit of each entry: the user's, or a share of the node where the class is distributed's."""
    limits = [_limit_by_hand(node, entry) for entry in entries]
    unset = [i for i, limit in enumerate(limits) if limit is None and _is_of_distributed(entries[i])]
    cpus = node.hardware.cpus
    shares = [min(1, entries[i]["options"].get("nthreads", cpus) / cpus) for i in unset]
    taken = sum(limit or 0 for limit in limits)
    for i, limit in zip(unset, node.default_limits(shares, taken), strict=True):
        limits[i] = limit
    return limits


def _limit_by_hand(node: NodeHardware, entry: Options) -> int | None:
    """Return a memory limit in bytes; None where it is not set, or in a form that only the class can read."""
    try:
        return node.limit_by_hand(entry["options"].get("memory_limit", "auto"))
    except ModeRefused:
        raise
    except ValueError:
        return None


def _worker(node: NodeHardware, entry: Options, limit: int | None) -> WorkerSpec:
    """Move options that :class:`WorkerSpec` has a field for to it; values that only the class can read stay options."""
    options = dict(entry["options"])
    path = OptionPath("spec")
    lifted: CheckedOptions = {}
    for key in ("nthreads", "resources", "env"):
        if options.get(key) is not None:
            try:
                lifted[key] = COMMON[key](path, options[key])
            except ConfigError:
                continue
            del options[key]
    if limit is not None:
        options.pop("memory_limit", None)
    if _is_of_distributed(entry):
        lifted.setdefault("nthreads", node.hardware.cpus)
        lifted["resources"] = {"CPU": float(lifted["nthreads"]), **lifted.get("resources", {})}
    return WorkerSpec(kind="custom", cls=entry["cls"], options=options, memory_limit=limit, **lifted)
