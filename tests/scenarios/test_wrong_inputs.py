"""Wrong values for every argument of every call: each is refused in one sentence, and nothing is touched.

The arguments come from the signatures, so that a new one is noticed: it has to be given its kind in :data:`KINDS`. A
kind tells which values are right; all others must be refused by an error of this package that names the argument or the
value. ``python -m tests.scenarios.test_wrong_inputs`` prints how many there were of each outcome.
"""

from __future__ import annotations

import datetime
import inspect
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import dask
import pytest
from dask.utils import parse_bytes, parse_timedelta
from distributed.security import Security
from hypothesis import given, settings
from hypothesis import strategies as st
from tornado.ioloop import IOLoop

from agentcluster import AgentCluster, Host
from agentcluster.client.rollouts import RolloutControl
from agentcluster.config import _READERS, Config, _attribute
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound

#: Returns whether a value is right for an argument, or may be: then it is not tried.
Right = Callable[[Any], bool]


def is_int(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def parsed(parse: Callable[[Any], Any], value: Any) -> float:
    """Return a number that dask reads out of a value, or not a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime.timedelta):
        return math.nan
    try:
        return float(parse(value))
    except Exception:
        return math.nan


def seconds(least: Callable[[float], bool]) -> Right:
    return lambda value: least(parsed(parse_timedelta, value)) and math.isfinite(parsed(parse_timedelta, value))


def maybe(right: Right) -> Right:
    return lambda value: value is None or right(value)


def one_of(*allowed: object) -> Right:
    return lambda value: any(value is each or (isinstance(value, str) and value == each) for each in allowed)


def nbytes(value: Any) -> bool:
    return not (isinstance(value, str) and (not value or value.isspace())) and parsed(parse_bytes, value) >= 0


def nothing(value: Any) -> bool:
    return False


def maybe_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()))


def anything(value: Any) -> bool:
    return True


TIME, TIME_0 = maybe(seconds(lambda s: s > 0)), maybe(seconds(lambda s: s >= 0))
COUNT = maybe(lambda value: is_int(value, 0, 2**62))
FLAG: Right = lambda value: isinstance(value, bool)  # noqa: E731
TEXT: Right = lambda value: isinstance(value, str)  # noqa: E731
OPTIONS: Right = maybe(lambda value: isinstance(value, Mapping) and not value)
LIMIT: Right = maybe(lambda value: is_int(value, 0, 2**62) or value == math.inf)

#: Call -> its arguments -> the values that are right. Nodes and hosts that exist are not among the values below.
KINDS: dict[str, dict[str, Right]] = {
    "AgentCluster": {
        "hosts": lambda value: value is None or isinstance(value, str | list | tuple | set | os.PathLike),
        "mode": nothing,
        "config": lambda value: value is None or value == {} or isinstance(value, str),
        "scheduler": lambda value: value is None or isinstance(value, str),  # also a host
        "scheduler_options": OPTIONS,
        "worker_options": OPTIONS,
        # for hosts that are added later
        "connect_options": lambda value: value is None or isinstance(value, Mapping) or value == [None],
        "remote_python": lambda value: all(map(maybe_text, value if isinstance(value, list | tuple) else [value])),
        "security": lambda value: value is None or isinstance(value, bool | Security),
        "on_host_failure": one_of("raise", "warn"),
        "name": lambda value: value is None or (isinstance(value, str) and value.isprintable() and bool(value)),
        "launch_timeout": TIME,
        "start_timeout": TIME,
        "asynchronous": FLAG,
        "loop": lambda value: value is None or isinstance(value, IOLoop),
        "silence_logs": lambda value: value is None or isinstance(value, int),
        "shutdown_on_close": one_of(True),
        "scheduler_sync_interval": seconds(lambda s: s > 0),
        "others": anything,
    },
    "reprovision": {
        "mode": callable,
        "config": lambda value: value is None or value == {} or isinstance(value, str),
        "nodes": lambda value: value is None or callable(value),
        "remove_existing": FLAG,
        "strategy": one_of("surge", "replace"),
        "drain": one_of("tasks", "data", "now"),
        "drain_timeout": TIME_0,
        "max_parallel": maybe(lambda value: is_int(value, 1, 2**62)),
        "canary": FLAG,
        "on_failure": one_of("rollback", "stop", "continue"),
        "timeout": TIME,
        "wait": lambda value: isinstance(value, bool) or (value is not None and TIME_0(value)),
        "progress": FLAG,
        "dry_run": FLAG,
        "options": anything,
    },
    "scale": {
        "n": COUNT,
        "memory": lambda value: value is None or nbytes(value),
        "cores": COUNT,
        "nodes": COUNT,
        "strict": FLAG,
        "kinds": anything,
    },
    "adapt": {
        "Adaptive": lambda value: isinstance(value, type),
        "minimum": LIMIT,
        "maximum": LIMIT,
        "minimum_cores": LIMIT,
        "maximum_cores": LIMIT,
        "minimum_memory": lambda value: value is None or nbytes(value),
        "maximum_memory": lambda value: value is None or nbytes(value),
        "kwargs": anything,
        # of the class
        "interval": TIME_0,
        "wait_count": maybe(lambda value: is_int(value, 1, 2**62)),
        "target_duration": TIME,
        "modes": lambda value: value is None or value in ([], (), {}, set()),
        "idle_timeout": seconds(lambda s: s >= 0),
        "up_delay": seconds(lambda s: s >= 0),
        "worker_key": lambda value: value is None or callable(value),
    },
    "request": {"timeout": seconds(lambda s: s >= 0), "resources": anything},
    "add_host": {"host": lambda value: isinstance(value, str | os.PathLike)},
    "remove_host": {"name": nothing},
    "get_logs": {
        "cluster": FLAG,
        "scheduler": FLAG,
        "agents": FLAG,
        "workers": lambda value: isinstance(value, bool) or value in ([], (), {}, set()),
    },
    "close": {"timeout": TIME},
    "Host": {
        "host": lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^\s@/\[\]-][^\s@/\[\]]*", value)),
        "user": maybe(lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^\s@:/\[\]-]\S*", value))),
        "port": maybe(lambda value: is_int(value, 1, 65535)),
        "name": maybe_text,
        "remote_python": maybe_text,
        "connect_options": lambda value: isinstance(value, Mapping),
        "env": lambda value: isinstance(value, Mapping),
        "labels": lambda value: isinstance(value, Mapping),
        "standby": FLAG,
    },
}
#: Arguments without a name of their own: they stand for any keyword.
OPEN = {"others", "options", "kinds", "kwargs", "resources"}


class Thing:
    """Of no use to anybody."""

    def __repr__(self) -> str:
        return "Thing()"


#: Values that each argument is given, right or wrong.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 65536, 10**30, -(10**30), 0.0, 1.5, -0.5, math.nan, math.inf, -math.inf),
    *("", " ", "x", "no", "1e400", "nan", "-1", "5 potatoes", "a\0b", "\x1b[31m", "ä" * 40, "tcp://", "x" * 3000),
    *([], (), {}, set(), [None], [5], ["x"], {"x": 1}, {5: "x"}, {"x": None}, b"x", object, Thing(), 1j, range(3)),
    *(datetime.timedelta(seconds=-1), lambda: None, Ellipsis, NotImplemented, ValueError("x")),
]


def members() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in KINDS:
        yield name, {"AgentCluster": AgentCluster, "Host": Host}.get(name) or getattr(AgentCluster, name)


def test_every_argument_has_its_kind() -> None:
    for name, call in members():
        parameters = set(inspect.signature(call).parameters) - {"self"}
        assert parameters <= set(KINDS[name]), name
    calls = {
        name
        for name, member in inspect.getmembers(AgentCluster)
        if not name.startswith("_")
        and callable(member)
        and (getattr(member, "__module__", None) or "").startswith("agentcluster")
        and len(inspect.signature(member).parameters) > 1
    }
    assert calls - {"scale_down", "sync"} <= set(KINDS)
    for name, member in inspect.getmembers(RolloutControl, callable):
        assert name.startswith("_") or len(inspect.signature(member).parameters) == 1, name


def tried(cluster: AgentCluster | None, call: str, argument: str, value: Any) -> str:
    """Give an argument a wrong value; return the sentence, and fail where it is not as it should be."""
    target: Any = {"AgentCluster": AgentCluster, "Host": Host}.get(call) or getattr(cluster, call)
    given: dict[str, Any] = {argument: value}
    if call == "reprovision" and argument != "mode":
        given["mode"] = "uniform"
    if call == "Host" and argument != "host":
        given["host"] = "gpu-1"
    if call == "scale" and argument == "strict":
        given["n"] = 1
    if call == "request":
        given["cpu"] = 1
    began = time.monotonic()
    try:
        result = target(**given)
    except AgentClusterError as error:
        said = str(error)
        assert said, (call, argument, value)
        assert "\n" not in said, said
        assert len(said) < 9000, said
        named = argument in said or isinstance(error, NodeNotFound) or getattr(error, "key", None) is not None
        shown = [repr(value)[:20], *(map(repr, value) if isinstance(value, Mapping) else ())]
        assert named or any(each in said for each in shown), (call, argument, value, said)
    else:
        if isinstance(result, AgentCluster):
            result.close()
        raise AssertionError(f"{call}({argument}={value!r}) was accepted: {result!r}")
    assert time.monotonic() - began < 20, (call, argument, value)
    return said


def state(cluster: AgentCluster) -> object:
    """Return what no refused call may change."""
    node = cluster.refresh()["local"]
    return node["mode"], {name: worker["pid"] for name, worker in node["workers"].items()}, cluster._adaptive


def wrong(calls: Iterable[str], values: Sequence[Any]) -> Iterator[tuple[str, str, Any]]:
    for call in calls:
        for argument in KINDS[call].keys() - OPEN:
            yield from ((call, argument, value) for value in values if not KINDS[call][argument](value))


CONSTRUCTORS = ("AgentCluster", "Host")
CALLS = sorted(KINDS.keys() - {*CONSTRUCTORS})

#: Further values, as hypothesis makes them.
MORE = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.binary(max_size=5),
        st.integers(),
        st.floats(),
        st.lists(st.integers() | st.text(max_size=3), max_size=3),
        st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2),
    ),
    min_size=2,
    max_size=2,
)


def run(cluster: AgentCluster | None, calls: Iterable[str], values: Sequence[Any]) -> Counter[str]:
    """Give each argument of some calls each wrong value; return how many were refused by each."""
    return Counter(call for call, argument, value in wrong(calls, values) if tried(cluster, call, argument, value))


def test_a_constructor_refuses_wrong_values() -> None:
    assert sum(run(None, CONSTRUCTORS, VALUES).values()) > 500


@settings(max_examples=20)
@given(MORE)
def test_a_constructor_refuses_whatever_is_wrong(values: list[Any]) -> None:
    run(None, CONSTRUCTORS, values)


def test_a_call_refuses_wrong_values_and_touches_nothing() -> None:
    with AgentCluster(config={"nworkers": 1, "nthreads": 1}) as cluster:
        before = state(cluster)
        assert sum(run(cluster, CALLS, VALUES).values()) > 900
        assert state(cluster) == before


def test_a_call_refuses_whatever_is_wrong() -> None:
    with AgentCluster(config={"nworkers": 1, "nthreads": 1}) as cluster:
        before = state(cluster)

        @settings(max_examples=20)
        @given(MORE)
        def refuses(values: list[Any]) -> None:
            run(cluster, CALLS, values)

        refuses()
        assert state(cluster) == before


@pytest.mark.parametrize("key", sorted(_READERS))
def test_the_configuration_refuses_wrong_values(key: str) -> None:
    right = RIGHT_IN_CONFIG[type(Config.load().__getattribute__(_attribute(key)))]
    for value in VALUES:
        if right(value):
            continue
        with dask.config.set({key: value}), pytest.raises(ConfigError) as caught:
            Config.load()
        assert caught.value.key == key


#: Type of an option's value -> the values that are right, or may be.
RIGHT_IN_CONFIG: dict[type, Right] = {
    float: seconds(lambda s: s > 0),
    int: lambda value: is_int(value, 0),
    bool: FLAG,
    type(None): lambda value: value is None or (isinstance(value, str) and bool(value.strip())),
    tuple: lambda value: isinstance(value, list | tuple),
}


def main() -> None:
    """Print how many wrong values each call refused."""
    with AgentCluster(config={"nworkers": 1, "nthreads": 1}) as cluster:
        for call, number in sorted((run(None, CONSTRUCTORS, VALUES) + run(cluster, CALLS, VALUES)).items()):
            print(f"{call:14}{number:6} refused")


if __name__ == "__main__":
    main()
