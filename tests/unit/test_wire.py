"""The values that cross a process boundary: there and back, and what is refused at the border."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from distributed.protocol import dumps, loads
from hypothesis import given
from hypothesis import strategies as st

from agentcluster import VersionMismatch, __version__, model
from agentcluster.errors import ConfigError
from agentcluster.model import (
    Gpu,
    Hardware,
    HostMetrics,
    Mode,
    NodePlan,
    NodeProgress,
    NodeReport,
    RolloutStatus,
    WorkerSpec,
    WorkerState,
)
from agentcluster.wire import PICKLED, PROTOCOL, check_protocol, from_wire, pickled, plain, to_wire, unpickled

TEXT = st.text(max_size=8)
COUNT = st.integers(0, 2**50)
SECONDS = st.floats(0, 1e6, allow_nan=False)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.dictionaries(TEXT, JSON, max_size=3)
MODES = st.builds(Mode, TEXT, OPTIONS)
GPUS = st.builds(Gpu, visible_id=TEXT, uuid=TEXT, name=TEXT, memory=COUNT, mig=st.booleans())
SPECS = st.builds(
    WorkerSpec,
    kind=st.sampled_from(["cpu", "gpu", "custom"]),
    cls=TEXT | st.just(pickled(dict)),
    options=OPTIONS,
    nthreads=st.none() | COUNT,
    memory_limit=st.none() | COUNT,
    resources=st.dictionaries(TEXT, SECONDS, max_size=2),
    env=st.dictionaries(TEXT, TEXT, max_size=2),
    devices=TEXTS,
    device=st.none() | COUNT,
)
PROGRESS = st.builds(NodeProgress, TEXT, COUNT, COUNT, COUNT, COUNT, COUNT, st.floats(0, 1e6))
VALUES = st.one_of(
    PROGRESS,
    st.builds(
        RolloutStatus,
        mode=TEXT,
        state=TEXT,
        pausing=st.booleans(),
        seconds=SECONDS,
        wave=COUNT,
        waves=st.lists(TEXTS, max_size=2).map(tuple),
        nodes=st.dictionaries(TEXT, PROGRESS, max_size=2),
    ),
    GPUS,
    MODES,
    SPECS,
    st.builds(
        Hardware,
        hostname=TEXT,
        cpus=COUNT,
        memory=COUNT,
        gpus=st.lists(GPUS, max_size=3).map(tuple),
        gpu_problem=st.none() | TEXT,
        versions=st.dictionaries(TEXT, TEXT, max_size=3),
    ),
    st.builds(NodePlan, COUNT, MODES, st.dictionaries(TEXT, SPECS, max_size=3)),
    st.builds(
        WorkerState,
        name=TEXT,
        state=st.sampled_from(["starting", "running", "restarting", "stopping", "retired", "failed"]),
        address=st.none() | TEXT,
        pid=st.none() | COUNT,
        restarts=COUNT,
        problem=st.none() | TEXT,
    ),
    st.builds(
        HostMetrics,
        cpu=SECONDS,
        memory_used=COUNT,
        gpu=st.lists(COUNT, max_size=3).map(tuple),
        gpu_memory_used=st.lists(COUNT, max_size=3).map(tuple),
    ),
    st.builds(
        NodeReport,
        node=TEXT,
        mode=TEXT,
        old=TEXTS,
        new=TEXTS,
        kept=TEXTS,
        keys=COUNT,
        nbytes=COUNT,
        start=SECONDS,
        retire=SECONDS,
        stop=SECONDS,
    ),
)
SPEC = WorkerSpec("cpu", "distributed.Nanny", {"preload": ["a"]}, nthreads=2, resources={"CPU": 2.0})


def local() -> str:
    return "here"


# -- there and back ----------------------------------------------------------------------------------------------------


def test_every_dataclass_is_in_the_properties() -> None:
    defined = {cls for cls in vars(model).values() if isinstance(cls, type) and cls.__module__ == model.__name__}
    assert defined == {
        *(Gpu, Hardware, HostMetrics, Mode, NodePlan, NodeProgress, NodeReport, RolloutStatus),
        *(WorkerSpec, WorkerState),
    }


@given(VALUES)
def test_a_value_is_the_same_after_json(value: Any) -> None:
    assert from_wire(type(value), json.loads(json.dumps(to_wire(value)))) == value


@given(VALUES)
def test_a_value_is_the_same_after_dasks_own_wire(value: Any) -> None:
    assert from_wire(type(value), loads(dumps(to_wire(value)))) == value


@given(VALUES)
def test_to_wire_changes_nothing_twice(value: Any) -> None:
    wire = to_wire(value)
    assert to_wire(wire) == plain(wire) == wire
    assert set(wire) == {field.name for field in dataclasses.fields(value)}


def test_containers_of_values() -> None:
    gpu = Gpu("0", "GPU-0", "H200", 1)
    assert to_wire([gpu, (gpu,)]) == [to_wire(gpu), [to_wire(gpu)]]
    assert to_wire({1: gpu}) == {"1": to_wire(gpu)}
    assert from_wire(
        NodePlan, {"revision": 3, "mode": {"name": "none"}, "workers": {"n-0": to_wire(SPEC)}}
    ) == NodePlan(3, Mode("none"), {"n-0": SPEC})


def test_what_the_wire_flattened_has_its_type_again() -> None:
    sent = dataclasses.replace(SPEC, devices=("0", "1"), resources={"CPU": 2})
    parsed = from_wire(WorkerSpec, loads(dumps(to_wire(sent))))
    assert parsed == sent
    assert parsed.options == {"preload": ["a"]}, "dask's wire makes lists tuples"
    assert parsed.devices == ("0", "1")
    assert isinstance(parsed.resources["CPU"], float)


@pytest.mark.parametrize("cls", [Gpu, Hardware, HostMetrics, Mode, NodePlan, NodeReport, WorkerSpec, WorkerState])
def test_values_are_frozen_and_need_only_what_has_no_default(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    needed = [f for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if needed:
        with pytest.raises(ConfigError, match=f"{cls.__name__}: '{needed[0].name}' is missing"):
            from_wire(cls, {})
    else:
        assert from_wire(cls, {}) == cls()


# -- refused at the border ---------------------------------------------------------------------------------------------

PLAN = {"revision": 1, "mode": {"name": "none"}, "workers": {"n-0": {"kind": "cpu", "cls": "distributed.Nanny"}}}


def worker(**more: Any) -> dict[str, Any]:
    return {**PLAN, "workers": {"n-0": {**PLAN["workers"]["n-0"], **more}}}  # type: ignore[index]


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (Mode, {"nam": "auto"}, "Mode: unknown key 'nam'; did you mean 'name'? Allowed: config, name"),
        (Mode, {}, "Mode: 'name' is missing"),
        (Mode, {"name": 1}, "Mode.name: expected str, got 1"),
        (Mode, {"name": None}, "Mode.name: expected str, got None"),
        (Mode, {"name": "spec", "config": ["a"]}, "Mode.config: expected a mapping, got ['a']"),
        (Mode, "auto-cpu", "Mode: expected a mapping of Mode's fields, got 'auto-cpu'"),
        (Mode, {1: "x", "name": "a"}, "Mode: unknown key 1; allowed: config, name"),
        (Gpu, {"visible_id": "0", "uuid": "u", "name": "n", "memory": True}, "Gpu.memory: expected int, got True"),
        (Gpu, {"visible_id": "0", "uuid": "u", "name": "n", "memory": 1.5}, "Gpu.memory: expected int, got 1.5"),
        (
            Gpu,
            {"visible_id": "0", "uuid": "u", "name": "n", "memory": 1, "mig": 1},
            "Gpu.mig: expected bool, got 1",
        ),
        (HostMetrics, {"cpu": True}, "HostMetrics.cpu: expected float, got True"),
        (HostMetrics, {"gpu": "12"}, "HostMetrics.gpu: expected a list, got '12'"),
        (HostMetrics, {"gpu": [1, "2"]}, "HostMetrics.gpu: expected int, got '2'"),
        (
            WorkerState,
            {"name": "n-0", "state": "runing"},
            "WorkerState.state: 'runing' is not allowed; did you mean 'running'? "
            "Allowed: failed, restarting, retired, running, starting, stopping",
        ),
        (
            WorkerState,
            {"name": "n-0", "state": ["running"]},
            "WorkerState.state: ['running'] is not allowed; did you mean",
        ),
        (
            NodePlan,
            {**PLAN, "workers": {"n-0": "cpu"}},
            "NodePlan.workers.n-0: expected a mapping of WorkerSpec's fields, got 'cpu'",
        ),
        (
            NodePlan,
            worker(nthread=1),
            "NodePlan.workers.n-0: unknown key 'nthread'; did you mean 'nthreads'? Allowed: ",
        ),
        (NodePlan, worker(nthreads="2"), "NodePlan.workers.n-0.nthreads: expected int, got '2'"),
        (NodePlan, worker(env={"A": 1}), "NodePlan.workers.n-0.env.A: expected str, got 1"),
        (NodePlan, worker(resources={"GPU": "1"}), "NodePlan.workers.n-0.resources.GPU: expected float, got '1'"),
        (NodePlan, worker(cls=3), "NodePlan.workers.n-0.cls: expected a mapping, got 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(cls: type, data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_wire(cls, data)
    assert str(caught.value).startswith(message)


def test_the_place_is_the_callers() -> None:
    with pytest.raises(ConfigError, match=r"^worker n-0: unknown key 'x'") as caught:
        from_wire(WorkerSpec, {"x": 1}, "worker n-0")
    assert caught.value.key == "x"
    with pytest.raises(ConfigError, match=r"^worker n-0: 'cls' is missing$") as caught:
        from_wire(WorkerSpec, {"kind": "cpu"}, "worker n-0")
    assert caught.value.key == "cls"


@given(VALUES, st.sampled_from(["frob", "Name", "0", ""]))
def test_a_key_that_is_unknown_is_never_ignored(value: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key {key!r}"):
        from_wire(type(value), {**to_wire(value), key: 1})


# -- what is not plain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", 1 + 2j, dict, local, range(3), object], ids=lambda value: type(value).__name__
)
def test_what_is_not_plain_travels_as_text(value: Any) -> None:
    wrapped = plain({"deep": [1, {"er": value}]})
    text = json.dumps(wrapped)
    assert PICKLED in text
    assert unpickled(json.loads(text)) == {"deep": [1, {"er": value}]}


def test_functions_that_no_module_has_travel_too() -> None:
    def make(n: int) -> Callable[[int], int]:
        return lambda x: x + n

    spec = dataclasses.replace(SPEC, options=plain({"hook": make(3), "all": (make(1), "text")}))
    back = from_wire(WorkerSpec, json.loads(json.dumps(to_wire(spec))))
    assert back == spec
    options = unpickled(back.options)
    assert options["hook"](4) == 7
    assert options["all"][0](4) == 5
    assert options["all"][1] == "text"


def test_a_pickled_class_is_a_workers_class() -> None:
    class Mine:
        pass

    spec = WorkerSpec("custom", pickled(Mine))
    back = from_wire(WorkerSpec, json.loads(json.dumps(to_wire(spec))))
    assert unpickled(back.cls).__name__ == "Mine"


def test_only_what_pickled_made_is_unpickled() -> None:
    value = {"a": {PICKLED: "no pickle", "beside": 1}, "b": [PICKLED], PICKLED: {"c": 2}, "d": None}
    assert unpickled(value) == value
    assert unpickled(pickled(None)) is None
    assert pickle.dumps(unpickled(pickled(SPEC))) == pickle.dumps(SPEC)


@given(JSON)
def test_plain_data_stays_as_it_is(value: Any) -> None:
    assert plain(value) == value
    assert unpickled(plain(value)) == value


def test_plain_makes_keys_text_and_tuples_lists() -> None:
    assert plain({1: (True, None, 2.5, "x", [3])}) == {"1": [True, None, 2.5, "x", [3]]}


@pytest.mark.parametrize(
    ("protocol", "older"), [(PROTOCOL - 1, "peer"), (PROTOCOL + 1, "here"), (None, "peer"), ("x" * 1000, "peer")]
)
def test_mismatch_names_versions_and_remedy(protocol: object, older: str) -> None:
    with pytest.raises(VersionMismatch) as caught:
        check_protocol("peer", protocol, "0.0.1", here="here")
    assert "peer has agentcluster 0.0.1" in str(caught.value)
    assert f"here has agentcluster {__version__} with protocol {PROTOCOL}" in str(caught.value)
    assert f"upgrade agentcluster where {older} runs" in str(caught.value)
    assert len(str(caught.value)) < 300
