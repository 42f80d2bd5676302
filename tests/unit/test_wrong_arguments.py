"""Wrong values for the other public constructors and functions: each is refused in one sentence.

What is public is what the page of the API lists; it has to be given its kinds in :data:`KINDS`, or a reason in
:data:`UNCHECKED`.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
from distributed.security import Security

from agentcluster import Agent, modes
from agentcluster.errors import AgentClusterError
from agentcluster.launch.adopt import AttachedLauncher, ManagedLauncher
from agentcluster.launch.local import LocalLauncher
from agentcluster.launch.ssh import SSHLauncher
from agentcluster.model import Hardware, Mode
from agentcluster.requests import NodeRegistration, RolloutPolicy, ScaleTarget
from agentcluster.security import credentials
from tests.support.wrong_values import (
    FLAG,
    VALUES,
    Right,
    anything,
    check_sentence,
    is_int,
    maybe,
    maybe_text,
    nothing,
    one_of,
    seconds,
)


class Managed(ManagedLauncher):
    """A launcher of a system that there is not."""

    async def start(self) -> None: ...

    async def address(self) -> str | None: ...

    async def stop(self) -> None: ...


HERE = Hardware("host", 4, 2**33)


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def name(value: Any) -> bool:
    return is_int(value, -(10**40)) or (text(value) and len(str(value)) <= 253)


def number(least: float) -> Right:
    return lambda value: not isinstance(value, str) and seconds(lambda s: s >= least)(value) and value is not False


def mapping(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


COUNT = maybe(lambda value: is_int(value, 0, 2**62))
NAMES: Right = lambda value: value == [] or value == () or value == ["x"]  # noqa: E731

#: Name -> the call, its arguments and the values that are right, and other arguments that it needs.
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Right], dict[str, Any]]] = {
    "Agent": (
        Agent,
        {
            "scheduler": maybe(nothing),
            "name": maybe(name),
            "mode": maybe(nothing),
            "config": lambda value: value is None or value == {},
            "fallback": maybe(nothing),
            "security": lambda value: value is None or isinstance(value, Security) or value == {},
            "host": maybe(lambda value: isinstance(value, str) and "\0" not in value and value != ""),
            "interface": maybe(lambda value: isinstance(value, str) and "\0" not in value and value != ""),
            "protocol": maybe(lambda value: isinstance(value, str) and "\0" not in value and value != ""),
            "port": maybe(lambda value: is_int(value, 0, 65535)),
            "death_timeout": maybe(seconds(lambda s: s > 0)),
            "lasting": FLAG,
            "worker_options": anything,
        },
        {"scheduler": "tcp://127.0.0.1:1"},
    ),
    "credentials": (credentials, {"folder": nothing, "roles": anything}, {}),
    "parse": (
        modes.parse,
        {"mode": nothing, "config": lambda value: value is None or value == {}},
        {"mode": "uniform"},
    ),
    "plan": (
        modes.plan,
        {"mode": nothing, "hardware": nothing, "node": lambda value: isinstance(value, str)},
        {"mode": Mode("none"), "hardware": HERE, "node": "n"},
    ),
    "LocalLauncher": (
        LocalLauncher,
        {
            "name": text,
            "python": lambda value: maybe_text(value) and (value is None or value.isprintable()),
            "env": maybe(lambda value: value == {}),
            "standby": FLAG,
            "labels": maybe(lambda value: value == {}),
        },
        {},
    ),
    "AttachedLauncher": (
        AttachedLauncher,
        {"address": nothing, "name": text, "standby": FLAG},
        {"address": "tcp://127.0.0.1:1", "name": "n"},
    ),
    "SSHLauncher": (SSHLauncher, {"host": nothing}, {}),
    "ManagedLauncher": (Managed, {"name": text, "where": text, "standby": FLAG}, {"name": "n", "where": "there"}),
    "RolloutPolicy": (
        RolloutPolicy,
        {
            "strategy": one_of("surge", "replace"),
            "drain": one_of("tasks", "data", "now"),
            "bound": one_of("follow", "wait", "refuse"),
            "drain_timeout": maybe(number(0)),
            "max_parallel": maybe(lambda value: is_int(value, 1, 2**62)),
            "on_failure": one_of("rollback", "stop", "continue"),
            "canary": FLAG,
            "timeout": maybe(lambda value: number(0)(value) and value != 0),
            "dry_run": FLAG,
            "wait": lambda value: isinstance(value, bool) or number(0)(value),
        },
        {},
    ),
    "ScaleTarget": (
        ScaleTarget,
        {**dict.fromkeys(("workers", "cores", "memory", "nodes"), COUNT), "kinds": mapping, "extra": NAMES},
        {},
    ),
    "NodeRegistration": (
        NodeRegistration,
        {
            "name": lambda value: text(value) and len(value) <= 253,
            "address": lambda value: isinstance(value, str),
            "hardware": nothing,
            "mode": maybe(nothing),
            "fallback": maybe(nothing),
            "exact": FLAG,
            "external_name": maybe(name),
            "slots": lambda value: value is None or is_int(value, -(10**40)),
            "resources": lambda value: value == {} or value == {"x": 1},
            "labels": lambda value: value == {},
        },
        {"name": "n", "address": "tcp://127.0.0.1:1", "hardware": HERE},
    ),
}
#: Public classes and functions of which no value is checked -> the reason.
UNCHECKED = {
    "AgentCluster": "tests/scenarios/test_wrong_inputs.py",
    "Host": "tests/scenarios/test_wrong_inputs.py",
    "AgentPlugin": "tests/scenarios/test_wrong_inputs.py: its calls; dask_setup makes it",
    "Config": "tests/scenarios/test_wrong_inputs.py: its keys",
    "names": "it has no argument",
    "dask_setup": "dask calls it, with its scheduler",
    "Mode": "a value, which each call that is given one parses before anything else, as modes.parse does",
    **dict.fromkeys(
        (
            *("Nodes", "RolloutReport", "ScaleReport", "RolloutControl", "RolloutStatus", "NodeProgress", "Request"),
            *("AdaptiveLog", "Decision", "Hardware", "Gpu", "HostMetrics", "NodeReport"),
        ),
        "an answer: only the package makes it",
    ),
    "WorkerSpec": "what a mode of a third party returns is checked where it is planned",
    **dict.fromkeys(
        ("Launcher", "Launched", "LogTail", "Settings", "Ready", "launch", "Process"),
        "what a launcher implements, or is given by the package; messages are checked where they are read",
    ),
}


def test_every_public_name_has_its_kinds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.rst").read_text()
    public = {
        path.rpartition(".")[2] for path in re.findall(r"^\.\. auto(?:class|function):: (\S+)", page, re.MULTILINE)
    }
    assert public | {"ManagedLauncher"} == KINDS.keys() | UNCHECKED.keys()
    for call, arguments, _ in KINDS.values():
        assert set(inspect.signature(call).parameters) == arguments.keys(), call


def tried(label: str, argument: str, value: object) -> str:
    """Give an argument a wrong value; return the sentence, and fail where it is not as it should be."""
    call, _, needed = KINDS[label]
    about = f"{label}({argument}={value!r})"
    try:
        made = call(**{**needed, argument: value})
    except AgentClusterError as error:
        said = str(error)
    else:
        raise AssertionError(f"{about} was accepted: {made!r}")
    check_sentence(said, about, argument, value, "mode")
    return said


def run(values: Sequence[Any], *only: str) -> Counter[str]:
    """Give each argument of some calls, or of all, each wrong value; return how many were refused by each."""
    return Counter(
        label
        for label in only or KINDS
        for argument, right in KINDS[label][1].items()
        for value in values
        if not right(value) and tried(label, argument, value)
    )


@pytest.mark.parametrize("label", KINDS)
def test_wrong_values_are_refused(label: str, tmp_path: PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no text is the name of a folder
    monkeypatch.setattr(modes, "_third_party", dict)  # the installed packages are not searched for each value
    assert run(VALUES, label).total() >= 20


@pytest.mark.parametrize("role", ["agent", "", "CLIENT", None, 5])
def test_credentials_for_an_unknown_role(role: Any, tmp_path: Path) -> None:
    with pytest.raises(AgentClusterError, match="scheduler, worker"):
        credentials(tmp_path, role)
