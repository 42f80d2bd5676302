"""The mode spec: exactly the workers that the user says, as ``dask spec`` and ``SpecCluster`` accept them.

The many ways to say it become one, ``{"spec": {name: {"cls": …, "options": {…}}}}``, when the mode is parsed. The names
only tell the entries apart: worker names are the node's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agentcluster.errors import ConfigError, ModeRefused
from agentcluster.model import WorkerSpec
from agentcluster.modes import options as checks
from agentcluster.modes.builtin import COMMON, Options, Workers, check_options
from agentcluster.modes.options import NANNY, RESERVED, WORKER, Place, canonical, import_path, known_keywords
from agentcluster.modes.sizing import Site
from agentcluster.wire import PICKLED

_ENTRY = ("cls", "options", "opts")
_OPTIONS = ("spec", "nworkers")
_EXAMPLE = '{"cls": "dask.distributed.Nanny", "opts": {…}}, or such mappings by name, or JSON text of either'
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def check_spec(place: Place, config: Options) -> dict[str, Any]:
    """Check a spec in any of its forms.

    Parameters
    ----------
    place
        The mode.
    config
        ``{"spec": …}``, with ``"nworkers": n`` to repeat a single entry; or the spec itself.

    Raises
    ------
    ConfigError
        For a form, key, class or option that is not allowed, or text that is not JSON.
    """
    if "spec" not in config and config and (set(config) & set(_ENTRY) or _all_mappings(config)):
        config = {"spec": config}
        at_spec = place
    else:
        at_spec = place.at("spec")
    for key in config:
        if key not in _OPTIONS:
            raise place.unknown(key, (*_OPTIONS, *_ENTRY))
    if config.get("spec") is None:
        raise place.error(f"spec is missing; give {_EXAMPLE}")
    entries = _entries(at_spec, config["spec"])
    checked: dict[str, Any] = {"spec": entries}
    if config.get("nworkers") is not None:
        checked["nworkers"] = checks.repetitions(place.at("nworkers"), config["nworkers"])
        if len(entries) > 1:
            problem = f"nworkers repeats a single worker, and the spec has {len(entries)}; drop it or name one worker"
            raise place.at("nworkers").error(problem)
    return checked


def _all_mappings(config: Options) -> bool:
    return all(isinstance(value, Mapping) for value in config.values())


def _entries(place: Place, spec: Any) -> dict[str, Any]:
    if isinstance(spec, str):
        spec = checks.from_json(place, spec)
    if not spec:
        raise place.wrong(spec, _EXAMPLE)
    spec = checks.mapping(place, spec, _EXAMPLE)
    if set(spec) & set(_ENTRY):
        return {"0": _entry(place, spec)}
    return {name: _entry(place.at(name), entry) for name, entry in spec.items()}


def _entry(place: Place, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise place.wrong(entry, 'a mapping with "cls" and "opts"')
    for key in entry:
        if key not in _ENTRY:
            raise place.unknown(str(key), _ENTRY)
    if "cls" not in entry:
        raise place.error('"cls" is missing; name the worker\'s class, such as "dask.distributed.Nanny"')
    if "opts" in entry and "options" in entry:
        raise place.error('"opts" and "options" are two names of the same; give one of them')
    key = "opts" if "opts" in entry else "options"
    options = checks.mapping(place.at(key), entry.get(key) or {}, "a mapping of the class's keywords")
    cls = _class(place.at("cls"), entry["cls"])
    return {"cls": cls, "options": _options(place.at(key), cls, options)}


def _class(place: Place, cls: Any) -> str | dict[str, str]:
    if isinstance(cls, type):
        return import_path(cls) or checks.as_plain(place, cls)
    if isinstance(cls, Mapping) and set(cls) == {PICKLED}:
        return dict(cls)
    if not isinstance(cls, str) or not _PATH.fullmatch(cls):
        raise place.wrong(cls, 'a class or its import path, such as "dask.distributed.Nanny"')
    return canonical(cls)


def _options(place: Place, cls: str | dict[str, str], options: Options) -> dict[str, Any]:
    for key in options:
        if key in RESERVED:
            raise place.at(key).error(f"this is not yours to set: {RESERVED[key]}")
    if isinstance(cls, str):
        # A Worker without a nanny has no process, and so no environment, of its own.
        own = {key: check for key, check in COMMON.items() if (cls, key) != (WORKER, "env")}
        if known_keywords(cls) is not None:
            return check_options(place, options, own, cls)
    return {key: checks.as_plain(place.at(key), value) for key, value in options.items()}


def plan_spec(site: Site, options: Options) -> Workers:
    """Return the workers that the spec says, in its order."""
    entries = list(options["spec"].values()) * options.get("nworkers", 1)
    limits = _limits(site, entries)
    return tuple(_worker(site, entry, limit) for entry, limit in zip(entries, limits, strict=True))


def _is_distributeds(entry: Options) -> bool:
    return entry["cls"] in (NANNY, WORKER)


def _limits(site: Site, entries: list[Any]) -> list[int | None]:
    """Return the memory limit of each entry: the user's, or a share of the node where the class is distributed's."""
    limits = [_limit_by_hand(site, entry) for entry in entries]
    unset = [i for i, limit in enumerate(limits) if limit is None and _is_distributeds(entries[i])]
    cpus = site.hardware.cpus
    shares = [min(1, entries[i]["options"].get("nthreads", cpus) / cpus) for i in unset]
    taken = sum(limit or 0 for limit in limits)
    for i, limit in zip(unset, site.default_limits(shares, taken), strict=True):
        limits[i] = limit
    return limits


def _limit_by_hand(site: Site, entry: Options) -> int | None:
    """Return a memory limit in bytes, or ``None`` where it is not set, or not in a way that we know."""
    given = entry["options"].get("memory_limit", "auto")
    try:
        return site.limit_by_hand(given)
    except ModeRefused:
        raise
    except ValueError:
        return None


def _worker(site: Site, entry: Options, limit: int | None) -> WorkerSpec:
    """Move what a :class:`WorkerSpec` has a field for out of the options; what we cannot read stays the class's."""
    options = dict(entry["options"])
    place = Place("spec")
    lifted: dict[str, Any] = {}
    for key in ("nthreads", "resources", "env"):
        if options.get(key) is not None:
            try:
                lifted[key] = COMMON[key](place, options[key])
            except ConfigError:
                continue
            del options[key]
    if limit is not None:
        options.pop("memory_limit", None)
    if _is_distributeds(entry):
        lifted.setdefault("nthreads", site.hardware.cpus)
        lifted["resources"] = {"CPU": float(lifted["nthreads"]), **lifted.get("resources", {})}
    return WorkerSpec(kind="custom", cls=entry["cls"], options=options, memory_limit=limit, **lifted)
