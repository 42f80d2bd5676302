"""``--spec`` and ``--spec-file``: what ``dask spec`` takes, in the words of ``dask-agent``."""

from __future__ import annotations

import json
from typing import Any

import yaml

from agentcluster.errors import ConfigError
from agentcluster.worker_like import take_scheduler

#: Every path that leads to the class that ``dask spec`` also starts, and which is no worker.
_SCHEDULER = ("dask.distributed.Scheduler", "distributed.Scheduler", "distributed.scheduler.Scheduler")


def with_spec(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the spec read, and with what it says of the whole node said by the node's own options.

    Parameters
    ----------
    options
        All options of the command line: parameter name -> value. The new ``spec`` is None where neither was given.

    Raises
    ------
    ConfigError
        For text that is not JSON, a file that cannot be read, a class that is no worker, and what is said twice.
    """
    found = _read(options)
    options = {**options, "spec": found}
    if not isinstance(found, dict):
        return options
    for entry in (found, *found.values()):
        if isinstance(entry, dict) and entry.get("cls") in _SCHEDULER:
            raise ConfigError(f"the spec has {entry['cls']}, and an agent runs workers; `dask spec` starts a scheduler")
    if "cls" not in found:
        return options
    key = "opts" if "opts" in found else "options"
    if not isinstance(found.get(key), dict):
        return options
    own = dict(found[key])
    options["spec"] = {**found, key: own}
    if isinstance(own.get("nanny"), bool):  # an option of `dask worker`; the class says it here
        del own["nanny"]
    for option, value in (("scheduler", take_scheduler(own)), ("name", own.pop("name", None))):
        if value is not None and options[option] not in (None, value):
            raise ConfigError(f"{option} is given twice, as {options[option]!r} and in the spec as {value!r}; give one")
        options[option] = options[option] if value is None else value
    return options


def _read(options: dict[str, Any]) -> Any:
    if options["spec"] and options["spec_file"]:
        raise ConfigError("--spec and --spec-file cannot be given together; give exactly one of them")
    if options["spec_file"]:
        try:
            with open(options["spec_file"]) as file:
                return yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"--spec-file {options['spec_file']!r} cannot be read: {text}") from error
    return from_json("--spec", options["spec"]) if options["spec"] else None


def from_json(option: str, text: str) -> dict[str, Any]:
    """Return the JSON object that an option was given."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{option}: expected a JSON object, got {text!r}")
    return found
