"""The configuration: defaults, the schema beside them, where values come from, and what each wrong one says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml

import agentcluster.config
from agentcluster.config import Config
from agentcluster.errors import ConfigError

PACKAGE = Path(agentcluster.config.__file__).parent
SCHEMA = yaml.safe_load((PACKAGE / "agentcluster-schema.yaml").read_text())
TYPES: dict[str, Any] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


DEFAULTS = dict(leaves(agentcluster.config.defaults))


def described(schema: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in schema["properties"].items():
        if "properties" in value:
            yield from described(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def refusal(key: str, value: Any) -> ConfigError:
    with dask.config.set({key: value}), pytest.raises(ConfigError) as caught:
        Config.load()
    return caught.value


def test_the_defaults() -> None:
    assert Config.load() == Config(
        debug=False,
        launch_timeout=60.0,
        start_timeout=60.0,
        stop_timeout=10.0,
        retire_timeout=300.0,
        drain_timeout=120.0,
        node_name=None,
        node_heartbeat_interval=2.0,
        node_ttl=30.0,
        worker_restart_limit=5,
        worker_restart_window=60.0,
        worker_restart_backoff=1.0,
        worker_restart_backoff_max=30.0,
        forkserver_preload=("distributed", "numpy", "pandas", "lz4"),
        log_lines=1000,
        secret_file=None,
        ssh_keepalive_interval=15.0,
        ssh_keepalive_count=4,
    )


def test_times_are_floats_also_when_dask_reads_whole_seconds() -> None:
    config = Config.load()
    for field in dataclasses.fields(Config):
        if field.type == "float":
            assert type(getattr(config, field.name)) is float, field.name


def test_the_schema_describes_each_default_and_nothing_else() -> None:
    schema = dict(described(SCHEMA))
    assert set(schema) == set(DEFAULTS)
    for key, entry in schema.items():
        assert entry["description"].strip(), key
        kinds = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
        assert any(isinstance(DEFAULTS[key], TYPES[kind]) for kind in kinds), key


def test_each_default_has_a_comment() -> None:
    lines = (PACKAGE / "agentcluster.yaml").read_text().splitlines()
    for key in DEFAULTS:
        name = key.rpartition(".")[2]
        assert [line for line in lines if line.strip().startswith(f"{name}:") and "# " in line], key


@pytest.mark.parametrize(
    ("given", "seconds"), [("500ms", 0.5), ("1.5 minutes", 90.0), (7, 7.0), (0.25, 0.25), ("3", 3.0)]
)
def test_a_time(given: Any, seconds: float) -> None:
    with dask.config.set({"agentcluster.launch-timeout": given}):
        assert Config.load().launch_timeout == seconds


def test_underscores_are_hyphens() -> None:
    with dask.config.set({"agentcluster.node.heartbeat_interval": "1s"}):
        assert Config.load().node_heartbeat_interval == 1.0


def test_a_part_that_is_not_given_keeps_its_defaults() -> None:
    whole = Config.load()
    with dask.config.set({"agentcluster": {"node": {"ttl": "9s"}}}):
        assert Config.load() == dataclasses.replace(whole, node_ttl=9.0)


@pytest.mark.parametrize("key", sorted(key for key in DEFAULTS if isinstance(DEFAULTS[key], str)))
@pytest.mark.parametrize("value", ["soon", "", "-1s", "0s", 0, -3, True, None, [], "nan", float("inf"), "5 parsecs"])
def test_a_wrong_time_names_key_value_and_remedy(key: str, value: Any) -> None:
    error = refusal(key, value)
    assert error.key == key
    assert str(error).startswith(f"{key} is {value!r}, but must be a time of more than 0")
    assert "'30s'" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("agentcluster.worker.restart.limit", -1, "a whole number, 0 or more"),
        ("agentcluster.worker.restart.limit", "5", "a whole number, 0 or more"),
        ("agentcluster.worker.restart.limit", 1.5, "a whole number, 0 or more"),
        ("agentcluster.log.lines", 0, "a whole number, 1 or more"),
        ("agentcluster.log.lines", True, "a whole number, 1 or more"),
        ("agentcluster.ssh.keepalive-count", 0, "a whole number, 1 or more"),
        ("agentcluster.node.name", "", "a name, or null for the hostname"),
        ("agentcluster.node.name", 7, "a name, or null for the hostname"),
        ("agentcluster.forkserver.preload", "numpy", "a list of module names"),
        ("agentcluster.forkserver.preload", ["numpy", 3], "a list of module names"),
        ("agentcluster.forkserver.preload", ["numpy; import os"], "a list of module names"),
        ("agentcluster.node", 5, "a mapping of heartbeat-interval, name, ttl"),
        ("agentcluster.node.ttl", "2s", "a time longer than agentcluster.node.heartbeat-interval ('2s')"),
        (
            "agentcluster.worker.restart.backoff-max",
            "1ms",
            "a time not shorter than agentcluster.worker.restart.backoff ('1s')",
        ),
    ],
)
def test_a_wrong_value_names_key_value_and_remedy(key: str, value: Any, allowed: str) -> None:
    error = refusal(key, value)
    assert error.key == key
    assert str(error) == f"{key} is {value!r}, but must be {allowed}"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("agentcluster.lunch-timeout", "launch-timeout"),
        ("agentcluster.node.tll", "ttl"),
        ("agentcluster.worker.restart.limits", "limit"),
        ("agentcluster.ssh.keepalive_intervall", "keepalive-interval"),
    ],
)
def test_an_unknown_option_is_refused_with_the_closest(key: str, meant: str) -> None:
    error = refusal(key, "1s")
    assert error.key == key
    assert str(error).startswith(f"there is no option {key!r}: did you mean {meant!r}? Allowed: ")


def test_environment_variables_win_over_defaults() -> None:
    environ = {
        "DASK_AGENTCLUSTER__LAUNCH_TIMEOUT": "7s",
        "DASK_AGENTCLUSTER__FORKSERVER__PRELOAD": "['distributed']",
    }
    dask.config.refresh(paths=[], env=environ)
    config = Config.load()
    assert (config.launch_timeout, config.forkserver_preload) == (7.0, ("distributed",))


def test_a_refresh_of_dask_config_keeps_the_defaults() -> None:
    before = Config.load()
    dask.config.refresh(paths=[], env={})
    assert Config.load() == before
