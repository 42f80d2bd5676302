"""The tree of errors: each keeps its facts through a pickle, says one sentence, and is the builtin that is caught."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest
from distributed.core import clean_exception, error_message
from distributed.protocol import dumps, loads

from agentcluster import errors
from agentcluster.errors import (
    AgentClusterError,
    ConfigError,
    LaunchError,
    LaunchTimeout,
    ModeRefused,
    NodeExists,
    NodeNotFound,
    PreflightError,
    RolloutBusy,
    SchedulerUnfit,
    SwapError,
    VersionMismatch,
    WorkerStartError,
    WorkerStartTimeout,
    printable,
    suggest,
)

#: One of each, the facts that it keeps, and what it says.
EXAMPLES: list[tuple[AgentClusterError, dict[str, Any], str]] = [
    (AgentClusterError("nothing more is known"), {}, "nothing more is known"),
    (ConfigError("port=-1 must be 0 or more", key="port"), {"key": "port"}, "port=-1 must be 0 or more"),
    (ConfigError("no hosts were given"), {"key": None}, "no hosts were given"),
    (
        ModeRefused("n1", "auto-gpu", "no NVIDIA driver"),
        {"node": "n1", "mode": "auto-gpu", "reason": "no NVIDIA driver", "key": None},
        "node 'n1' cannot serve mode 'auto-gpu': no NVIDIA driver",
    ),
    (
        PreflightError("auto-gpu", {"a": "no driver", "b": "no dask-cuda"}),
        {"mode": "auto-gpu", "refusals": {"a": "no driver", "b": "no dask-cuda"}},
        "cannot reprovision to 'auto-gpu', nothing was changed: a: no driver; b: no dask-cuda",
    ),
    (
        PreflightError("none", {"a": "it holds actors", "b": "it holds actors"}),
        {"mode": "none", "refusals": {"a": "it holds actors", "b": "it holds actors"}},
        "cannot stop the workers, nothing was changed: a, b: it holds actors",
    ),
    (
        NodeNotFound("rack=b", {"gpu-1": 0}, ["rack=a"]),
        {"name": "rack=b", "known": ["gpu-1"]},
        "no node has the label 'rack=b'; labels: rack=a",
    ),
    (
        NodeNotFound("gpu-*", {"cpu": 0}),
        {"name": "gpu-*", "known": ["cpu"]},
        "no node has a name like 'gpu-*'; nodes: cpu",
    ),
    (
        NodeNotFound("gpu1", {"gpu-1": 0, "cpu": 0}),
        {"name": "gpu1", "known": ["cpu", "gpu-1"]},
        "no node named 'gpu1'; did you mean 'gpu-1'? Allowed: cpu, gpu-1",
    ),
    (
        NodeExists("n1", "tcp://10.0.0.1:99"),
        {"name": "n1", "address": "tcp://10.0.0.1:99"},
        "a node named 'n1' is already registered by the agent at tcp://10.0.0.1:99; "
        "give this one another name (Host(..., name=…) or dask-agent --name)",
    ),
    (
        LaunchError("me@gpu-1", "it refused the connection"),
        {"host": "me@gpu-1", "reason": "it refused the connection", "last_output": ""},
        "agent on me@gpu-1 did not start: it refused the connection",
    ),
    (
        LaunchTimeout("gpu-1", "it said nothing within 60 s", "No module named 'agentcluster'"),
        {"host": "gpu-1", "reason": "it said nothing within 60 s", "last_output": "No module named 'agentcluster'"},
        "agent on gpu-1 did not start: it said nothing within 60 s; last output: \"No module named 'agentcluster'\"",
    ),
    (
        WorkerStartError("n1", {"n1-0": "ImportError: x", "n1-1": "late"}),
        {"node": "n1", "failures": {"n1-0": "ImportError: x", "n1-1": "late"}, "raised": {}},
        "workers on node 'n1' did not start: n1-0: ImportError: x; n1-1: late",
    ),
    (
        WorkerStartTimeout("n1", {"n1-0": "had not joined"}),
        {"node": "n1", "failures": {"n1-0": "had not joined"}, "raised": {}},
        "workers on node 'n1' did not start: n1-0: had not joined",
    ),
    (
        SwapError("no room", "the workers that ran before still run"),
        {"reason": "no room", "state": "the workers that ran before still run", "report": None, "raised": {}},
        "no room; the workers that ran before still run",
    ),
    (
        SwapError("no room", "b changed", {"nodes": {"a": {"outcome": "failed"}}}),
        {"reason": "no room", "state": "b changed", "report": {"nodes": {"a": {"outcome": "failed"}}}, "raised": {}},
        "no room; b changed",
    ),
    (
        RolloutBusy("uniform", 12.3),
        {"label": "uniform", "seconds": 12.3},
        "a rollout to 'uniform' has run for 12 s; wait=True waits for it, cluster.rollout.cancel() ends it",
    ),
    (
        SchedulerUnfit("tcp://s:8786", "it has no plugin"),
        {"address": "tcp://s:8786", "reason": "it has no plugin"},
        "scheduler at tcp://s:8786 cannot hold nodes: it has no plugin",
    ),
    (
        VersionMismatch("the agent on a has agentcluster 1 with protocol 1, this cluster has 2; upgrade …"),
        {"key": None},
        "the agent on a has agentcluster 1 with protocol 1, this cluster has 2; upgrade …",
    ),
]

each_error = pytest.mark.parametrize(
    ("error", "facts", "sentence"), EXAMPLES, ids=[type(error).__name__ for error, _, _ in EXAMPLES]
)


def tree(cls: type[BaseException] = AgentClusterError) -> Iterator[type[BaseException]]:
    """Yield a class and all below it that this package defines."""
    yield cls
    for below in cls.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


def drawn() -> Iterator[tuple[str, str, str | None]]:
    """Yield (class, the class it hangs under, the builtin in brackets) from the drawing in the module's docstring."""
    above: list[str] = []
    line = re.compile(r"^    ((?:│   |    )*)(?:[├└]── )?(\w+)(?: \((\w+)\))?")
    drawing = (errors.__doc__ or "").partition("::")[2].partition("\n\n    AgentClusterError")
    for text in ("    AgentClusterError" + drawing[2].partition("\n\n")[0]).splitlines():
        found = line.match(text)
        assert found, f"cannot read the drawing's line {text!r}"
        depth = len(found[1]) // 4 + ("── " in text)
        above[depth:] = [found[2]]
        yield found[2], above[depth - 1] if depth else "", found[3]


def test_the_drawing_is_the_tree() -> None:
    parents = {name: parent for name, parent, _ in drawn()}
    assert parents == {
        cls.__name__: next((b.__name__ for b in cls.__bases__ if b.__module__ == errors.__name__), "") for cls in tree()
    }


def test_the_drawing_names_the_builtin_that_each_brings_in() -> None:
    builtins = {name: builtin for name, _, builtin in drawn() if builtin}
    assert builtins == {
        cls.__name__: base.__name__
        for cls in tree()
        for base in cls.__bases__
        if base.__module__ == "builtins" and base is not Exception
    }
    assert set(builtins.values()) == {"ValueError", "LookupError", "RuntimeError", "TimeoutError"}


def test_every_class_is_public_and_has_an_example() -> None:
    assert {cls.__name__ for cls in tree()} == set(errors.__all__) - {"suggest"}
    assert {type(error) for error, _, _ in EXAMPLES} == set(tree())
    assert all(inspect.getdoc(cls) for cls in tree())


@each_error
def test_it_keeps_its_facts_and_says_one_sentence(
    error: AgentClusterError, facts: dict[str, Any], sentence: str
) -> None:
    assert vars(error) == facts
    assert str(error) == sentence
    assert "\n" not in sentence
    assert not sentence.endswith(".")


@each_error
@pytest.mark.parametrize(
    "copied",
    [
        *(lambda error, p=protocol: pickle.loads(pickle.dumps(error, protocol=p)) for protocol in range(2, 6)),
        lambda error: cloudpickle.loads(cloudpickle.dumps(error)),
        copy.copy,
        copy.deepcopy,
        # As a scheduler sends it to a client.
        lambda error: clean_exception(**loads(dumps(error_message(error))))[1],
    ],
    ids=["pickle2", "pickle3", "pickle4", "pickle5", "cloudpickle", "copy", "deepcopy", "dask"],
)
def test_it_survives_a_pickle(error: AgentClusterError, facts: dict[str, Any], sentence: str, copied: Any) -> None:
    back = copied(error)
    assert type(back) is type(error)
    assert {fact: getattr(back, fact) for fact in facts} == facts
    assert str(back) == sentence
    assert back.args == error.args


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigError("x"), ValueError),
        (ModeRefused("n", "m", "r"), ValueError),
        (PreflightError("m", {}), ValueError),
        (NodeNotFound("n", []), LookupError),
        (NodeExists("n", "a"), ValueError),
        (LaunchError("h", "r"), RuntimeError),
        (LaunchTimeout("h", "r"), RuntimeError),
        (LaunchTimeout("h", "r"), TimeoutError),
        (WorkerStartError("n", {}), RuntimeError),
        (WorkerStartTimeout("n", {}), WorkerStartError),
        (WorkerStartTimeout("n", {}), TimeoutError),
        (SwapError("r", "s"), RuntimeError),
        (RolloutBusy("uniform", 1), RuntimeError),
        (SchedulerUnfit("a", "r"), RuntimeError),
        (VersionMismatch("m"), ValueError),
    ],
)
def test_it_is_caught_as_the_builtin_and_as_ours(error: AgentClusterError, builtin: type[Exception]) -> None:
    for caught in (builtin, AgentClusterError):
        with pytest.raises(caught):
            raise error


def test_an_os_error_may_have_no_number() -> None:
    # LaunchTimeout is an OSError too, whose constructor takes two arguments for a number and a text.
    error = LaunchTimeout("gpu-1", "late")
    assert isinstance(error, OSError)
    assert error.errno is None


def test_facts_are_the_errors_own() -> None:
    refusals = {"a": "no driver"}
    error = PreflightError("auto-gpu", refusals)
    refusals.clear()
    assert error.refusals == {"a": "no driver"}


@pytest.mark.parametrize(
    ("wrong", "allowed", "expected"),
    [
        ("auto-gpo", ["auto-cpu", "auto-gpu"], "did you mean 'auto-gpu'? Allowed: auto-cpu, auto-gpu"),
        ("x", ["b", "a"], "allowed: a, b"),
        ("x", [], "allowed: none"),
    ],
)
def test_suggest(wrong: str, allowed: list[str], expected: str) -> None:
    assert suggest(wrong, allowed) == expected


# -- what other machines wrote -----------------------------------------------------------------------------------------

CLEAR = "\x1b[2J\x1b]0;mine\x07"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("plain: ünïcödé, ✓\tand tabs", "plain: ünïcödé, ✓\tand tabs"),
        (CLEAR, "\\x1b[2J\\x1b]0;mine\\x07"),
        ("one\ntwo\r", "one\\ntwo\\r"),
        ("\x9b31m\x7f\u202e\udc80", "\\x9b31m\\x7f\\u202e\\udc80"),
    ],
)
def test_control_characters_are_shown_as_what_they_are(written: str, shown: str) -> None:
    assert printable(written) == shown
    assert printable(shown) == shown


def test_no_error_takes_a_control_character_to_the_terminal() -> None:
    for error in (
        LaunchError("gpu-1", f"it said {CLEAR}", CLEAR),
        ConfigError(f"name {CLEAR} is taken"),
        PreflightError("uniform", {CLEAR: CLEAR}),
        pickle.loads(pickle.dumps(SwapError(CLEAR, CLEAR, {}))),
    ):
        assert str(error).isprintable()
        assert "\\x1b[2J" in str(error)
    launch = LaunchError("gpu-1", CLEAR, CLEAR)
    assert launch.reason.isprintable()
    assert launch.last_output.isprintable()
