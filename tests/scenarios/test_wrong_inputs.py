"""Wrong values for every argument of every call: each is refused in one sentence, and nothing is touched.

The arguments come from the signatures, so that a new one is noticed: it has to be given its kind in :data:`KINDS`. A
kind tells which values are right; all others must be refused by an error of this package that names the argument or the
value. ``python -m tests.scenarios.test_wrong_inputs`` prints how many there were of each outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import dask
import pytest
from distributed import Client
from distributed.security import Security
from hypothesis import given, settings
from tornado.ioloop import IOLoop

from agentcluster import AgentCluster, Host
from agentcluster.client.rollouts import RolloutControl
from agentcluster.config import _READERS, Config, _attribute
from agentcluster.errors import AgentClusterError, ConfigError, NodeNotFound
from agentcluster.requests import RolloutPolicy
from agentcluster.scheduler.plugin import CALLS as CALLS_ON_SCHEDULER
from agentcluster.scheduler.plugin import AgentPlugin
from tests.cli import test_wrong_options
from tests.support.inprocess import here
from tests.support.wrong_values import (
    COUNT,
    FLAG,
    LIMIT,
    MORE,
    OPTIONS,
    TEXTS,
    TIME,
    TIME_0,
    VALUES,
    Right,
    anything,
    check_sentence,
    is_int,
    maybe,
    maybe_text,
    nbytes,
    nothing,
    one_of,
    seconds,
)
from tests.unit import test_wrong_arguments

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
        "bound": one_of("follow", "wait", "refuse"),
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


# -- calls of a plain client on the scheduler --------------------------------------------------------------------------

#: Greatest whole number that dask's own client can send, whoever is called.
SENDABLE = 2**63 - 1

NODE: Right = lambda value: isinstance(value, str)  # noqa: E731

#: Fields of a :class:`RolloutPolicy`, which most calls take.
TERMS: dict[str, Right] = {
    "strategy": one_of("surge", "replace"),
    "drain": one_of("tasks", "data", "now"),
    "bound": one_of("follow", "wait", "refuse"),
    "drain_timeout": lambda value: value is None or (is_number(value) and value >= 0),
    "max_parallel": maybe(lambda value: is_int(value, 1, 2**62)),
    "on_failure": one_of("rollback", "stop", "continue"),
    "canary": FLAG,
    "timeout": lambda value: value is None or (is_number(value) and value > 0),
    "dry_run": FLAG,
    "wait": lambda value: isinstance(value, bool) or (is_number(value) and value >= 0),
}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_empty_list(value: Any) -> bool:
    return value in ([], ())


#: Call of the scheduler -> its arguments -> the values that are right.
ON_SCHEDULER: dict[str, dict[str, Right]] = {
    "reprovision_nodes": {
        "mode": nothing,
        "config": lambda value: value is None or value == {},
        "nodes": lambda value: value is None,
        "remove_existing": FLAG,
        **TERMS,
    },
    "scale_nodes": {
        "n": lambda value: is_int(value, 0, 2**62),
        "nodes": maybe(is_empty_list),
        "target": maybe(nothing),
        "strict": FLAG,
        **TERMS,
    },
    "retire_node": {"name": nothing, "ends": FLAG, **TERMS},
    # Names that nobody has are ignored, as those of workers that have ended already.
    "retire_node_workers": {"names": lambda value: is_empty_list(value) or value == ["x"], **TERMS},
    "undo_rollout": TERMS,
    "control_rollout": {"action": nothing},
    "await_nodes": {
        "names": is_empty_list,
        "timeout": lambda value: is_number(value) and value >= 0,
    },
    "set_provision_mode": {
        "mode": maybe(nothing),
        "config": lambda value: value is None or value == {},
        "nodes": lambda value: value is None or value == {},
        "bare": lambda value: is_empty_list(value) or value == ["x"],
    },
    "get_node_logs": {"nodes": maybe(is_empty_list)},
    # One that is not there has left already.
    "unregister_node": {"name": NODE},
}
#: Calls with arguments that only this package's own processes make -> the arguments' type, which checks itself.
NOT_OF_PERSONS = {"register_node": "NodeRegistration", "adapt_nodes": "AdaptiveRequest", "await_demand": "float"}

#: Arguments that another one needs.
BESIDE: dict[str, dict[str, Any]] = {
    "reprovision_nodes": {"mode": "uniform"},
    "scale_nodes": {"n": 1},
    "retire_node": {"name": "local"},
    "retire_node_workers": {"names": []},
    "await_nodes": {"names": ["local"], "timeout": 0.1},
}


def test_every_argument_of_the_scheduler_has_its_kind() -> None:
    assert TERMS.keys() == {field.name for field in dataclasses.fields(RolloutPolicy)}
    for call in CALLS_ON_SCHEDULER:
        parameters = inspect.signature(getattr(AgentPlugin, call)).parameters
        names = {*parameters} - {"self", "terms"} | (TERMS.keys() if "terms" in parameters else set())
        if call not in NOT_OF_PERSONS and names:
            assert ON_SCHEDULER[call].keys() == names, call
    assert ON_SCHEDULER.keys() | NOT_OF_PERSONS.keys() <= set(CALLS_ON_SCHEDULER)


async def refused_by_scheduler(client: Client, values: Sequence[Any]) -> Counter[str]:
    """Give each argument of each call each wrong value; return how many were refused by each."""
    count: Counter[str] = Counter()
    for call, arguments in ON_SCHEDULER.items():
        for argument, right in arguments.items():
            # The terms of all calls are parsed by the same class.
            fewer = argument in TERMS and call != "reprovision_nodes"
            for value in values[:: 5 if fewer else 1]:
                if right(value) or (isinstance(value, int) and abs(value) > SENDABLE):
                    continue
                about = f"{call}({argument}={value!r})"
                try:
                    answer = await getattr(client.scheduler, call)(**{**BESIDE.get(call, {}), argument: value})
                except AgentClusterError as error:
                    said = str(error)
                else:
                    raise AssertionError(f"{about} was accepted: {answer!r}")
                check_sentence(said, about, argument, value, call, "mode")
                count[call] += 1
    return count


async def scheduler_state(client: Client) -> object:
    """Return what no refused call may change."""
    assert client.scheduler is not None
    nodes = await client.scheduler.get_nodes()
    found = {name: (node["mode"], node["plan"], node["revision"], node["state"]) for name, node in nodes.items()}
    return found, await client.scheduler.get_provision_mode(), await client.scheduler.rollout_status()


async def test_the_scheduler_refuses_wrong_values_and_touches_nothing() -> None:
    async with (
        AgentCluster(hosts=here(), config={"nworkers": 1, "nthreads": 1}, asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        before = await scheduler_state(client)
        assert (await refused_by_scheduler(client, VALUES)).total() > 1000
        assert await scheduler_state(client) == before


# -- the configuration -------------------------------------------------------------------------------------------------


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


async def of_scheduler() -> Counter[str]:
    async with (
        AgentCluster(hosts=here(), config={"nworkers": 1, "nthreads": 1}, asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        return await refused_by_scheduler(client, VALUES)


def main() -> None:
    """Print how many wrong values each call, each constructor and each command refused."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        of_commands = Counter({f"command {name}": count for name, count in test_wrong_options.run(TEXTS).items()})
    with AgentCluster(config={"nworkers": 1, "nthreads": 1}) as cluster:
        counts = run(None, CONSTRUCTORS, VALUES) + run(cluster, CALLS, VALUES) + of_commands
    counts += asyncio.run(of_scheduler())
    counts += test_wrong_arguments.run(VALUES)
    for call, number in sorted(counts.items()):
        print(f"{call:22}{number:6} refused")


if __name__ == "__main__":
    main()
