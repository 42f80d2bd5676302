"""Modes: what each makes of a node, and what each says when it cannot."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
from distributed.deploy.utils import nprocesses_nthreads
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.errors import ConfigError, ModeRefused
from agentcluster.model import Gpu, Hardware, Mode, WorkerSpec
from agentcluster.modes import GROUP, names, outdated, parse, plan, try_plan, worker_keywords
from agentcluster.modes.options import CUDA_WORKER, known_keywords
from agentcluster.wire import from_wire, to_wire, unpickled

GIB = 2**30
NO_DASK_CUDA = importlib.util.find_spec("dask_cuda") is None
CPU_ALLOWED = (
    "Allowed: env, kind_resource, memory_limit, nthreads, nworkers, resources and any keyword of distributed.Nanny"
)


def gpus(n: int, ids: str = "{}") -> tuple[Gpu, ...]:
    return tuple(Gpu(ids.format(i), f"GPU-{i:04}", "H200", 141 * GIB) for i in range(n))


def machine(cpus: int = 8, memory: int = 64 * GIB, ngpus: int = 0, **facts: Any) -> Hardware:
    facts = {
        "gpus": gpus(ngpus),
        "gpu_problem": None if ngpus else "no NVIDIA driver",
        "versions": {"python": "3.11.7", "dask-cuda": "26.10.0"},
        **facts,
    }
    return Hardware("there", cpus, memory, **facts)


def workers(mode: str, config: Any = None, hardware: Hardware | None = None) -> tuple[WorkerSpec, ...]:
    return plan(parse(mode, config), hardware or machine(), node="n1")


def shape(specs: tuple[WorkerSpec, ...]) -> list[tuple[str, int | None, int | None]]:
    return [(spec.kind, spec.nthreads, spec.memory_limit) for spec in specs]


def total(specs: tuple[WorkerSpec, ...]) -> int:
    return sum(spec.memory_limit or 0 for spec in specs)


def threads(specs: tuple[WorkerSpec, ...]) -> int:
    return sum(spec.nthreads or 0 for spec in specs)


cores = st.integers(1, 256)
memories = st.integers(GIB, 4096 * GIB)
NODES = st.builds(machine, cores, memories)
GPU_NODES = st.builds(machine, cores, memories, st.integers(1, 8))
MODES = st.one_of(
    st.just(("auto-cpu", {})),
    st.builds(lambda n: ("auto-cpu", {"nworkers": n}), st.integers(1, 300)),
    st.builds(lambda t: ("auto-cpu", {"nthreads": t}), st.integers(1, 300)),
    st.builds(lambda n, t: ("auto-cpu", {"nworkers": n, "nthreads": t}), st.integers(1, 300), st.integers(1, 300)),
    st.just(("auto-gpu", {"resources": "MEM=1e9", "env": {"A": 1}})),
    st.just(("auto", {"nthreads": 2})),
    st.just(("mixed", {})),
    st.builds(lambda f: ("mixed", {"gpu": {"memory_limit": f}}), st.floats(0.01, 0.12)),
    st.builds(lambda f: ("mixed", {"cpu": {"memory_limit": f, "nworkers": 2}}), st.floats(0.01, 0.45)),
    st.builds(lambda t: ("uniform", {"nthreads": t}), st.integers(1, 300)),
    st.builds(lambda t, f: ("uniform", {"nthreads": t, "memory_limit": f}), st.integers(1, 9), st.floats(0.001, 1)),
    st.builds(
        lambda t, n: ("spec", {"spec": {"cls": "distributed.Nanny", "opts": {"nthreads": t}}, "nworkers": n}),
        st.integers(1, 300),
        st.integers(1, 64),
    ),
    st.builds(
        lambda t, f: (
            "spec",
            {
                "a": {"cls": "distributed.Nanny", "opts": {"nthreads": t}},
                "b": {"cls": "distributed.Worker", "options": {"memory_limit": f}},
                "c": {"cls": "distributed.Nanny"},
            },
        ),
        st.integers(1, 300),
        st.floats(0.01, 0.9),
    ),
    st.just(("none", {})),
)


# Properties


@given(NODES)
def test_auto_cpu_loses_and_invents_no_thread(hardware: Hardware) -> None:
    specs = workers("auto-cpu", None, hardware)
    assert threads(specs) == hardware.cpus
    assert (len(specs), specs[0].nthreads) == nprocesses_nthreads(hardware.cpus)


@given(NODES | GPU_NODES, MODES)
def test_memory_limits_that_nobody_oversubscribed_never_exceed_the_node(
    hardware: Hardware, mode: tuple[str, dict[str, Any]]
) -> None:
    try:
        specs = workers(*mode, hardware)
    except ModeRefused:
        return
    assert total(specs) <= hardware.memory
    assert all(spec.memory_limit for spec in specs)


@given(NODES | GPU_NODES, MODES)
def test_every_worker_survives_the_wire_and_every_plan_is_the_same_again(
    hardware: Hardware, mode: tuple[str, dict[str, Any]]
) -> None:
    try:
        specs = workers(*mode, hardware)
    except ModeRefused:
        return
    assert tuple(from_wire(WorkerSpec, json.loads(json.dumps(to_wire(spec)))) for spec in specs) == specs
    sent = from_wire(Mode, json.loads(json.dumps(to_wire(parse(*mode)))))
    assert parse(sent) == sent == parse(*mode)
    assert plan(sent, hardware, node="n1") == specs
    assert workers(mode[0], json.dumps(mode[1]), hardware) == specs


@given(NODES, st.integers(1, 300), st.none() | st.integers(1, 300), st.none() | st.floats(0.0001, 1))
def test_uniform_fits(hardware: Hardware, nthreads: int, most: int | None, fraction: float | None) -> None:
    config: dict[str, Any] = {"nthreads": nthreads, "nworkers": most}
    if fraction is not None:
        config["memory_limit"] = fraction
    if nthreads > hardware.cpus:
        with pytest.raises(ModeRefused):
            workers("uniform", config, hardware)
        return
    specs = workers("uniform", config, hardware)
    assert len(set(shape(specs))) == 1
    assert threads(specs) <= hardware.cpus
    assert total(specs) <= hardware.memory
    # One more would not fit, or was not asked for.
    one = specs[0].memory_limit or 0
    assert (
        len(specs) == most
        or threads(specs) + nthreads > hardware.cpus
        or (fraction is not None and total(specs) + one > hardware.memory)
    )


@given(GPU_NODES, st.integers(1, 4))
def test_mixed_uses_every_core_once(hardware: Hardware, nthreads: int) -> None:
    used = nthreads * len(hardware.gpus)
    if used >= hardware.cpus:
        with pytest.raises(ModeRefused, match=f"leave none of {hardware.cpus} cores"):
            workers("mixed", {"gpu": {"nthreads": nthreads}}, hardware)
        return
    specs = workers("mixed", {"gpu": {"nthreads": nthreads}}, hardware)
    assert threads(specs) == hardware.cpus
    assert [spec.device for spec in specs if spec.kind == "gpu"] == list(range(len(hardware.gpus)))


@given(GPU_NODES)
def test_auto_gpu_limits_memory_as_dask_cuda_does(hardware: Hardware) -> None:
    n = len(hardware.gpus)
    assert shape(workers("auto-gpu", None, hardware)) == [("gpu", 1, int(hardware.memory * min(1, 1 / n)))] * n


# auto-cpu


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [("cpu", 2, 16 * GIB)] * 4),
        ({"nworkers": "auto"}, [("cpu", 2, 16 * GIB)] * 4),
        ({"nworkers": 2}, [("cpu", 4, 32 * GIB)] * 2),
        ({"nworkers": 3}, [("cpu", 2, 16 * GIB)] * 3),
        ({"nworkers": 16}, [("cpu", 1, 4 * GIB)] * 16),
        ({"nworkers": -1}, [("cpu", 1, 8 * GIB)] * 8),
        ({"nworkers": -8}, [("cpu", 8, 64 * GIB)]),
        ({"nthreads": 4}, [("cpu", 4, 32 * GIB)] * 2),
        ({"nthreads": 3, "nworkers": "auto"}, [("cpu", 3, 24 * GIB)] * 2),
        ({"nthreads": 9}, [("cpu", 9, 64 * GIB)]),
        ({"nworkers": 4, "nthreads": 8}, [("cpu", 8, 16 * GIB)] * 4),
        ({"nworkers": None, "nthreads": None, "resources": None, "env": None}, [("cpu", 2, 16 * GIB)] * 4),
    ],
)
def test_auto_cpu_splits(config: dict[str, Any], expected: list[Any]) -> None:
    specs = workers("auto-cpu", config)
    assert shape(specs) == expected
    assert {spec.cls for spec in specs} == {"distributed.Nanny"}
    assert all(spec.resources == {"CPU": spec.nthreads} for spec in specs)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", 64 * GIB),
        (0, 0),
        (None, 0),
        ("0", 0),
        ("1", 64 * GIB),
        (1.0, 64 * GIB),
        (0.25, 16 * GIB),
        ("0.25", 16 * GIB),
        (1e-18, 1),
        ("4GiB", 4 * GIB),
        ("4 GB", 4 * 10**9),
        ("4e9", 4 * 10**9),
        (5e9, 5 * 10**9),
        (GIB, GIB),
    ],
)
def test_a_memory_limit_means_what_it_means_to_dask(given: Any, expected: int) -> None:
    assert workers("auto-cpu", {"nworkers": 1, "memory_limit": given})[0].memory_limit == expected


def test_options_of_a_worker() -> None:
    config = {
        "nworkers": 1,
        "resources": "MEM=10e9,DISK=2 CPU=3",
        "env": {"OMP_NUM_THREADS": 2, "LANG": "C"},
        "preload": ("a.py", "b.py"),
        "lifetime": "1h",
    }
    (spec,) = workers("auto-cpu", config)
    assert spec.resources == {"CPU": 3, "MEM": 1e10, "DISK": 2}
    assert spec.env == {"OMP_NUM_THREADS": "2", "LANG": "C"}
    assert spec.options == {"preload": ["a.py", "b.py"], "lifetime": "1h"}


def test_a_value_that_is_not_plain_survives() -> None:
    class Plugin:
        pass

    mode = parse("auto-cpu", {"plugins": (Plugin(),), "worker_class": Plugin, "its_own": 1})
    sent = from_wire(Mode, json.loads(json.dumps(to_wire(mode))))
    options = unpickled(plan(sent, machine(), node="n1")[0].options)
    assert type(options["plugins"][0]).__name__ == "Plugin"
    assert options["worker_class"].__name__ == "Plugin"
    assert options["its_own"] == 1


def test_a_value_that_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^mode 'auto-cpu', option 'data': <unlocked .* cannot be sent to the nodes"):
        parse("auto-cpu", {"data": threading.Lock()})


def test_limits_by_hand_that_add_up_to_too_much_are_kept_with_one_warning() -> None:
    config = {"nworkers": 4, "memory_limit": "32GiB"}
    with pytest.warns(UserWarning, match="memory limits") as caught:
        specs = workers("auto-cpu", config)
    assert [spec.memory_limit for spec in specs] == [32 * GIB] * 4
    assert [str(warning.message) for warning in caught] == [
        "node 'n1', mode 'auto-cpu': memory limits set by hand add up to 137438953472 bytes (128.00 GiB), "
        "the node has 68719476736 bytes (64.00 GiB)"
    ]


def test_limits_by_hand_that_fit_bring_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers("auto-cpu", {"nworkers": 2, "memory_limit": "32GiB"})
        workers("auto-cpu", {"nworkers": 4, "memory_limit": 0})


# auto-gpu


def test_auto_gpu_has_a_worker_per_device() -> None:
    config = {"nthreads": 2, "resources": {"BIG": 1}, "env": {"A": 1}, "rmm_pool_size": "10GB", "rmm_async": True}
    specs = workers("auto-gpu", config, machine(ngpus=2))
    assert specs == tuple(
        WorkerSpec(
            kind="gpu",
            cls="dask_cuda.CUDAWorker",
            options={"rmm_pool_size": "10GB", "rmm_async": True},
            nthreads=2,
            memory_limit=32 * GIB,
            resources={"GPU": 1, "BIG": 1},
            env={"A": "1"},
            devices=("0", "1"),
            device=device,
        )
        for device in range(2)
    )


MIG = (
    Gpu("MIG-a", "MIG-a", "H200 MIG 1g.18gb", 18 * GIB, mig=True),
    Gpu("MIG-b", "MIG-b", "H200 MIG 1g.18gb", 18 * GIB, mig=True),
)


@pytest.mark.parametrize(
    ("there", "asked", "devices"),
    [
        (gpus(4), None, ("0", "1", "2", "3")),
        (gpus(4), "2,0", ("2", "0")),
        (gpus(4), [3], ("3",)),
        (gpus(4), ("GPU-0002", 1), ("2", "1")),  # CUDA does not take both in one list
        (gpus(4), ("GPU-0002", "GPU-0001"), ("GPU-0002", "GPU-0001")),
        (gpus(4)[2:], [2], ("2",)),
        (MIG, None, ("MIG-a", "MIG-b")),
        (MIG, [1], ("MIG-b",)),
        (MIG, " MIG-b, MIG-a", ("MIG-b", "MIG-a")),
        ((*gpus(1), *MIG), ["0", "MIG-b"], ("0", "MIG-b")),
    ],
)
def test_auto_gpu_takes_the_devices_asked_for(there: tuple[Gpu, ...], asked: Any, devices: tuple[str, ...]) -> None:
    specs = workers("auto-gpu", {"devices": asked}, machine(gpus=there))
    assert {spec.devices for spec in specs} == {devices}
    assert [spec.device for spec in specs] == list(range(len(devices)))
    assert specs[0].memory_limit == int(64 * GIB * (1 / len(devices)))


@pytest.mark.skipif(NO_DASK_CUDA, reason="needs dask-cuda")
def test_auto_gpu_knows_dask_cudas_keywords() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("auto-gpu", {"rmm_pool": "1GB"})
    assert str(caught.value) == (
        "mode 'auto-gpu': unknown option 'rmm_pool'; did you mean 'rmm_pool_size'? "
        "Allowed: devices, env, kind_resource, memory_limit, nthreads, resources "
        "and any keyword of dask_cuda.CUDAWorker"
    )
    for given_by_dask_cuda in ("plugins", "config", "data", "http_prefix"):
        with pytest.raises(ConfigError, match=f"unknown option '{given_by_dask_cuda}'"):
            parse("auto-gpu", {given_by_dask_cuda: None})
    assert parse("auto-gpu", {"lifetime": "1h", "dashboard_prefix": "/x"}).config["lifetime"] == "1h"
    assert parse("auto-gpu", {"worker_class": "mine.Worker", "mine": 1}).config["mine"] == 1


@pytest.mark.skipif(not NO_DASK_CUDA, reason="needs a Python without dask-cuda")
def test_auto_gpu_leaves_keywords_to_the_agent_where_dask_cuda_is_not() -> None:
    assert known_keywords(CUDA_WORKER) is None
    assert parse("auto-gpu", {"rmm_pool": "1GB"}).config == {"rmm_pool": "1GB"}


# auto, mixed, uniform, none


def test_auto_uses_gpus_where_they_can_be_used() -> None:
    config = {"nthreads": 2, "env": {"A": "1"}, "gpu": {"rmm_async": True}, "cpu": {"nworkers": 1, "nthreads": 3}}
    gpu = workers("auto", config, machine(ngpus=2))
    assert [(spec.kind, spec.nthreads, spec.env, spec.options) for spec in gpu] == [
        ("gpu", 2, {"A": "1"}, {"rmm_async": True})
    ] * 2
    for without in (machine(), machine(ngpus=2, versions={})):
        (cpu,) = workers("auto", config, without)
        assert (cpu.kind, cpu.nthreads, cpu.env, cpu.options) == ("cpu", 3, {"A": "1"}, {})


@pytest.mark.parametrize(
    ("config", "gpu", "cpu"),
    [
        ({}, 16 * GIB, 16 * GIB),
        ({"gpu": {"memory_limit": "4GiB"}}, 4 * GIB, 28 * GIB),
        ({"cpu": {"memory_limit": "4GiB"}}, 28 * GIB, 4 * GIB),
        ({"gpu": {"memory_limit": 0}}, 0, 16 * GIB),
        ({"cpu": {"memory_limit": None}}, 16 * GIB, 0),
        ({"gpu": {"memory_limit": "auto"}, "cpu": {"memory_limit": 0.1}}, (64 * GIB - 2 * 6871947673) // 2, 6871947673),
        ({"gpu": {"memory_limit": 0.125}, "cpu": {"memory_limit": "1GiB"}}, 8 * GIB, GIB),
    ],
)
def test_mixed_shares_memory(config: dict[str, Any], gpu: int, cpu: int) -> None:
    specs = workers("mixed", config, machine(cpus=4, ngpus=2))
    assert shape(specs) == [("gpu", 1, gpu)] * 2 + [("cpu", 1, cpu)] * 2


def test_mixed_takes_the_options_of_both() -> None:
    config = {"gpu": {"devices": "1", "nthreads": 2, "rmm_async": True}, "cpu": {"nworkers": -1, "lifetime": "1h"}}
    gpu, *cpu = workers("mixed", config, machine(ngpus=2))
    assert (gpu.devices, gpu.nthreads, gpu.options, gpu.resources) == (("1",), 2, {"rmm_async": True}, {"GPU": 1})
    assert [(spec.nthreads, spec.options, spec.resources) for spec in cpu] == [(1, {"lifetime": "1h"}, {"CPU": 1})] * 6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [("cpu", 1, 8 * GIB)] * 8),
        ({"nthreads": 3}, [("cpu", 3, 24 * GIB)] * 2),
        ({"nthreads": 3, "nworkers": 1}, [("cpu", 3, 24 * GIB)]),
        ({"nthreads": 3, "nworkers": 9}, [("cpu", 3, 24 * GIB)] * 2),
        ({"memory_limit": "20GiB"}, [("cpu", 1, 20 * GIB)] * 3),
        ({"memory_limit": 0}, [("cpu", 1, 0)] * 8),
        ({"memory_limit": 1.0}, [("cpu", 1, 64 * GIB)]),
    ],
)
def test_uniform_puts_as_many_as_fit(config: dict[str, Any], expected: list[Any]) -> None:
    assert shape(workers("uniform", config)) == expected


def test_none_has_no_workers() -> None:
    assert workers("none") == workers("none", {}) == ()


# spec


class Custom:
    """A worker class of a user's own."""

    class Inner:
        pass


NANNY = {"cls": "dask.distributed.Nanny", "opts": {"nthreads": 2}}


@pytest.mark.parametrize(
    "config",
    [
        {"spec": NANNY},
        {"spec": json.dumps(NANNY)},
        {"spec": {"cls": distributed.Nanny, "options": {"nthreads": 2}}},
        {"spec": {"cls": "distributed.nanny.Nanny", "options": {"nthreads": 2}}},
        {"spec": {"any": NANNY}, "nworkers": 1},
        {"spec": {0: NANNY}},
        {0: NANNY},
        {"any": NANNY},
        NANNY,
        json.dumps(NANNY),
        json.dumps({"spec": NANNY}),
    ],
)
def test_spec_takes_what_dask_spec_and_spec_cluster_take(config: Any) -> None:
    assert workers("spec", config) == (
        WorkerSpec("custom", "distributed.Nanny", nthreads=2, memory_limit=16 * GIB, resources={"CPU": 2}),
    )


def test_spec_of_several_keeps_their_order() -> None:
    spec: dict[str, Any] = {
        "big": {"cls": "distributed.Nanny", "opts": {"nthreads": 4, "memory_limit": "32GiB", "lifetime": "1h"}},
        "small": {"cls": "distributed.Worker", "opts": {"nthreads": 2, "resources": {"CPU": 9, "A": 1}}},
        "mine": {"cls": "mine.Worker", "options": {"nthreads": 1, "memory_limit": 0.5, "x": 1, "env": {"A": 1}}},
    }
    with pytest.raises(ModeRefused, match="leave too little for 1 workers without one"):
        workers("spec", {"spec": spec})
    spec["mine"]["options"]["memory_limit"] = "24GiB"
    assert workers("spec", {"spec": spec}) == (
        WorkerSpec("custom", "distributed.Nanny", {"lifetime": "1h"}, 4, 32 * GIB, {"CPU": 4}),
        WorkerSpec("custom", "distributed.Worker", {}, 2, 8 * GIB, {"CPU": 9, "A": 1}),
        WorkerSpec("custom", "mine.Worker", {"x": 1}, 1, 24 * GIB, {}, {"A": "1"}),
    )


def test_spec_repeats_a_single_worker_within_the_memory() -> None:
    assert (
        shape(workers("spec", {"spec": {"cls": "distributed.Nanny"}, "nworkers": 4})) == [("custom", 8, 16 * GIB)] * 4
    )


def test_spec_leaves_an_unknown_class_what_only_it_can_read() -> None:
    options = {"nthreads": "some", "memory_limit": "lots", "resources": 3, "env": None, "x": [1]}
    (spec,) = workers("spec", {"cls": "mine.Worker", "opts": options})
    assert spec == WorkerSpec("custom", "mine.Worker", options)
    assert workers("spec", {"cls": "mine.Worker"}) == (WorkerSpec("custom", "mine.Worker"),)


def test_spec_names_a_class_where_it_can_be_imported_and_else_pickles_it() -> None:
    class Local:
        pass

    def sent(cls: type) -> Any:
        mode = from_wire(Mode, json.loads(json.dumps(to_wire(parse("spec", {"cls": cls})))))
        return plan(mode, machine(), node="n1")[0].cls

    assert sent(distributed.Worker) == "distributed.Worker"
    assert sent(Custom) == f"{__name__}.Custom"
    assert unpickled(sent(Custom.Inner)) is Custom.Inner
    assert unpickled(sent(Local)).__name__ == "Local"


def test_spec_pickles_a_class_of_main(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type("Interactive", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Interactive", cls, raising=False)
    (spec,) = workers("spec", {"cls": cls})
    assert unpickled(spec.cls).__name__ == "Interactive"


# What is refused when a mode is parsed

INT = "give a whole number of at least 1"
NWORKERS = "give a whole number of at least 1, 'auto', or a negative one (cores + 1 + nworkers)"
BYTES = "give bytes, text such as '4GiB', a fraction of the node's memory up to 1.0, 'auto', or 0 for no limit"
AMOUNTS = "give amounts by name, such as {'GPU': 2}, or text such as 'GPU=2 MEM=10e9'"
ENV = "give text or numbers by variable name, such as {'OMP_NUM_THREADS': 1}"
DEVICES = "give a list of different GPUs, or comma-separated text, by index or UUID, such as [0, 1] or '0,1'"
JOINS = "it cannot be set: workers join the scheduler that their agent joined"
SPEC = 'give {"cls": "dask.distributed.Nanny", "opts": {…}}, or such mappings by name, or JSON text of either'
CLS = 'give a class or its import path, such as "dask.distributed.Nanny"'


@pytest.mark.parametrize(
    ("mode", "config", "key", "message"),
    [
        # Names
        (
            "auto-cpus",
            None,
            "mode",
            "unknown mode 'auto-cpus'; did you mean 'auto-cpu'? "
            "Allowed: auto, auto-cpu, auto-gpu, mixed, none, spec, uniform",
        ),
        (
            7,
            None,
            "mode",
            "mode 7 is not allowed; give a name: auto-cpu, auto-gpu, auto, mixed, uniform, spec, none",
        ),
        (
            Mode("auto-cpu", {"nthreads": 1}),
            {},
            None,
            "mode 'auto-cpu' has its options already; give config with a mode's name only",
        ),
        (
            "auto-cpu",
            {"nthread": 1},
            "nthread",
            f"mode 'auto-cpu': unknown option 'nthread'; did you mean 'nthreads'? {CPU_ALLOWED}",
        ),
        (
            "auto-cpu",
            {"lifetme": 1},
            "lifetme",
            f"mode 'auto-cpu': unknown option 'lifetme'; did you mean 'lifetime'? {CPU_ALLOWED}",
        ),
        (
            "auto-cpu",
            {"zzz": 1},
            "zzz",
            f"mode 'auto-cpu': unknown option 'zzz'; {CPU_ALLOWED.replace('A', 'a', 1)}",
        ),
        (
            "auto",
            {"gpu": {}, "cpu": {"nthread": 1}},
            "cpu.nthread",
            f"mode 'auto', option 'cpu': unknown option 'nthread'; did you mean 'nthreads'? {CPU_ALLOWED}",
        ),
        (
            "auto",
            {"nworkers": 1},
            "nworkers",
            "mode 'auto': unknown option 'nworkers'; "
            "allowed: cpu, env, gpu, kind_resource, memory_limit, nthreads, resources",
        ),
        (
            "mixed",
            {"nthreads": 1},
            "nthreads",
            "mode 'mixed': unknown option 'nthreads'; allowed: cpu, gpu",
        ),
        ("none", {"nworkers": 1}, "nworkers", "mode 'none': unknown option 'nworkers'; allowed: none"),
        # Forms
        (
            "uniform",
            [1],
            None,
            "mode 'uniform': [1] is not allowed; give the mode's options by name, or JSON text of them",
        ),
        (
            "uniform",
            '{"nthreads": }',
            None,
            "mode 'uniform': the text is not JSON, line 1 column 14: Expecting value; got '{\"nthreads\": }'",
        ),
        (
            "uniform",
            '"x"',
            None,
            "mode 'uniform': 'x' is not allowed; give the mode's options by name, or JSON text of them",
        ),
        (
            "uniform",
            {1: 2, "1": 3},
            None,
            "mode 'uniform': {1: 2, '1': 3} is not allowed; give keys that differ as text",
        ),
        (
            "mixed",
            {"gpu": 2},
            "gpu",
            "mode 'mixed', option 'gpu': 2 is not allowed; give a mapping of the options of auto-gpu",
        ),
        (
            "auto",
            {"cpu": [2]},
            "cpu",
            "mode 'auto', option 'cpu': [2] is not allowed; give a mapping of the options of auto-cpu",
        ),
        # Values
        ("uniform", {"nthreads": 0}, "nthreads", f"mode 'uniform', option 'nthreads': 0 is not allowed; {INT}"),
        ("uniform", {"nthreads": -2}, "nthreads", f"mode 'uniform', option 'nthreads': -2 is not allowed; {INT}"),
        ("uniform", {"nthreads": True}, "nthreads", f"mode 'uniform', option 'nthreads': True is not allowed; {INT}"),
        ("uniform", {"nthreads": "2"}, "nthreads", f"mode 'uniform', option 'nthreads': '2' is not allowed; {INT}"),
        ("uniform", {"nthreads": 2.0}, "nthreads", f"mode 'uniform', option 'nthreads': 2.0 is not allowed; {INT}"),
        ("uniform", {"nworkers": -1}, "nworkers", f"mode 'uniform', option 'nworkers': -1 is not allowed; {INT}"),
        ("auto-cpu", {"nworkers": 0}, "nworkers", f"mode 'auto-cpu', option 'nworkers': 0 is not allowed; {NWORKERS}"),
        (
            "auto-cpu",
            {"nworkers": False},
            "nworkers",
            f"mode 'auto-cpu', option 'nworkers': False is not allowed; {NWORKERS}",
        ),
        (
            "auto-cpu",
            {"nworkers": "all"},
            "nworkers",
            f"mode 'auto-cpu', option 'nworkers': 'all' is not allowed; {NWORKERS}",
        ),
        *(
            (
                "auto-cpu",
                {key: value},
                key,
                f"mode 'auto-cpu', option {key!r}: {value!r} is not allowed; give {allowed}",
            )
            for key, value, allowed in (
                ("memory_limit", 1, "1.0 for all of the node's memory, or text such as '1 GiB'"),
                ("memory_limit", 4, "at least 1048576 bytes, such as '4 GiB', or 0 for no limit"),
                ("memory_limit", "4", "at least 1048576 bytes, such as '4 GiB', or 0 for no limit"),
                ("nthreads", 10**30, "at most 1000000"),
                ("preload", 5, "text, or a list of texts"),
                ("preload", ["a", 5], "text, or a list of texts"),
                ("local_directory", 5, "text without NUL"),
                ("interface", "", "text without NUL"),
                ("host", "a\0b", "text without NUL"),
                ("lifetime_restart", "no", "True or False"),
                ("kind_resource", 0, "True or False"),
                ("port", "99999:100000", "a port from 0 to 65535, or a range, such as 9000:9010"),
                ("worker_port", -1, "a port from 0 to 65535, or a range, such as 9000:9010"),
                ("worker_port", "x", "a port from 0 to 65535, or a range, such as 9000:9010"),
            )
        ),
        *(
            (
                "auto-cpu",
                {"memory_limit": value},
                "memory_limit",
                f"mode 'auto-cpu', option 'memory_limit': {value!r} is not allowed; {BYTES}",
            )
            for value in ("4 potatoes", "", " ", -1, "-4GB", "-1", True, float("nan"), "inf", [1])
        ),
        *(
            (
                "auto-cpu",
                {"resources": value},
                "resources",
                f"mode 'auto-cpu', option 'resources': {said} is not allowed; {AMOUNTS}",
            )
            for value, said in [
                ("GPU", "'GPU'"),
                ("GPU=many", "'GPU=many'"),
                ("=2", "{'': 2.0}"),
                ({"GPU": "2"}, "{'GPU': '2'}"),
                ({"GPU": True}, "{'GPU': True}"),
                ({"GPU": -1}, "{'GPU': -1}"),
                ("GPU=nan", "{'GPU': nan}"),
                ({1: 1}, "{1: 1}"),
                (3, "3"),
            ]
        ),
        (
            "auto-cpu",
            {"env": "A=1"},
            "env",
            f"mode 'auto-cpu', option 'env': a value of type str is not allowed; {ENV}",
        ),
        ("auto-cpu", {"env": {"A=B": "1"}}, "env", f"mode 'auto-cpu', option 'env': 'A=B' is not allowed; {ENV}"),
        ("auto-cpu", {"env": {1: "1"}}, "env", f"mode 'auto-cpu', option 'env': 1 is not allowed; {ENV}"),
        *(
            (
                "auto-cpu",
                {"env": {"A": value}},
                "env.A",
                f"mode 'auto-cpu', option 'env.A': a value of type {type(value).__name__} is not allowed; give a "
                "number, or text without NUL",
            )
            for value in (True, None, ["x"], "nul\0")
        ),
        *(
            (
                "auto-gpu",
                {"devices": value},
                "devices",
                f"mode 'auto-gpu', option 'devices': {value!r} is not allowed; {DEVICES}",
            )
            for value in (0, [], "", "0,,1", [0, "0"], [-1], [True], [1.5], {"0": 1})
        ),
        # What agentcluster sets itself
        *(
            ("auto-cpu", {key: None}, key, f"mode 'auto-cpu', option '{key}': {JOINS}")
            for key in ("scheduler_ip", "scheduler_port", "scheduler_file", "scheduler")
        ),
        (
            "uniform",
            {"name": "mine"},
            "name",
            "mode 'uniform', option 'name': it cannot be set: worker names are given by the node (node-0, node-1, …)",
        ),
        (
            "auto-gpu",
            {"security": {}},
            "security",
            "mode 'auto-gpu', option 'security': it cannot be set: workers use their agent's credentials; "
            "set them with AgentCluster(security=…) or dask-agent --tls-*",
        ),
        (
            "spec",
            {"cls": "mine.Worker", "opts": {"name": "a"}},
            "opts.name",
            "mode 'spec', option 'opts.name': it cannot be set: worker names are given by the node (node-0, node-1, …)",
        ),
        (
            "spec",
            {"spec": {"a": {"cls": "m.W", "options": {"nanny": 1}}}},
            "spec.a.options.nanny",
            "mode 'spec', option 'spec.a.options.nanny': it cannot be set: the agent ties each worker to its nanny",
        ),
        # spec
        ("spec", None, None, f"mode 'spec': spec is missing; {SPEC}"),
        ("spec", {"nworkers": 2}, None, f"mode 'spec': spec is missing; {SPEC}"),
        (
            "spec",
            {"nworker": 2, "spec": NANNY},
            "nworker",
            "mode 'spec': unknown option 'nworker'; did you mean 'nworkers'? "
            "Allowed: cls, nworkers, options, opts, spec",
        ),
        ("spec", {"spec": 3}, "spec", f"mode 'spec', option 'spec': 3 is not allowed; {SPEC}"),
        ("spec", {"spec": {}}, "spec", f"mode 'spec', option 'spec': {{}} is not allowed; {SPEC}"),
        ("spec", {"spec": "[1]"}, "spec", f"mode 'spec', option 'spec': [1] is not allowed; {SPEC}"),
        (
            "spec",
            {"spec": '{"cls": "a.B",\n "opts"}'},
            "spec",
            "mode 'spec', option 'spec': the text is not JSON, line 2 column 8: Expecting ':' delimiter; "
            'got \'{"cls": "a.B",\\n "opts"}\'',
        ),
        (
            "spec",
            {"spec": "[" * 100_000},
            "spec",
            "mode 'spec', option 'spec': the text is JSON nested too deeply",
        ),
        (
            "spec",
            {"spec": {"cls": "a.B", "opt": {}}},
            "spec.opt",
            "mode 'spec', option 'spec': unknown option 'opt'; did you mean 'opts'? Allowed: cls, options, opts",
        ),
        (
            "spec",
            {"cls": "a.B", "nworkers": 2},
            "nworkers",
            "mode 'spec': unknown option 'nworkers'; allowed: cls, options, opts",
        ),
        (
            "spec",
            {"opts": {}},
            None,
            'mode \'spec\': "cls" is missing; name the worker\'s class, such as "dask.distributed.Nanny"',
        ),
        (
            "spec",
            {"spec": {"a": NANNY, "b": {}}},
            "spec.b",
            "mode 'spec', option 'spec.b': \"cls\" is missing; name the worker's class, "
            'such as "dask.distributed.Nanny"',
        ),
        (
            "spec",
            {"spec": {"a": "distributed.Nanny"}},
            "spec.a",
            "mode 'spec', option 'spec.a': 'distributed.Nanny' is not allowed; "
            'give a mapping with "cls" and "opts"',
        ),
        (
            "spec",
            {"cls": "a.B", "opts": {}, "options": {}},
            None,
            'mode \'spec\': "opts" and "options" are two names of the same; give one of them',
        ),
        (
            "spec",
            {"cls": "a.B", "opts": [1]},
            "opts",
            "mode 'spec', option 'opts': [1] is not allowed; give a mapping of the class's keywords",
        ),
        *(
            ("spec", {"cls": value}, "cls", f"mode 'spec', option 'cls': {value!r} is not allowed; {CLS}")
            for value in ("Nanny", "", "a..b", "a.b()", 3, None)
        ),
        (
            "spec",
            {"cls": "distributed.Nanny", "opts": {"nthreads": "x"}},
            "opts.nthreads",
            f"mode 'spec', option 'opts.nthreads': 'x' is not allowed; {INT}",
        ),
        (
            "spec",
            {"cls": "dask.distributed.Nanny", "opts": {"lifetme": 1}},
            "opts.lifetme",
            "mode 'spec', option 'opts': unknown option 'lifetme'; did you mean 'lifetime'? "
            "Allowed: env, memory_limit, nthreads, resources and any keyword of distributed.Nanny",
        ),
        (
            "spec",
            {"cls": distributed.Worker, "options": {"env": {}}},
            "options.env",
            "mode 'spec', option 'options': unknown option 'env'; "
            "allowed: memory_limit, nthreads, resources and any keyword of distributed.Worker",
        ),
        (
            "spec",
            {"cls": "distributed.Worker", "options": {"worker_class": "a.B", "x": 1}},
            "options.worker_class",
            "mode 'spec', option 'options': unknown option 'worker_class'; did you mean 'WorkerStateClass'? "
            "Allowed: memory_limit, nthreads, resources and any keyword of distributed.Worker",
        ),
        (
            "spec",
            {"spec": {"a": NANNY, "b": NANNY}, "nworkers": 2},
            "nworkers",
            "mode 'spec', option 'nworkers': nworkers repeats a single worker, and the spec has 2; "
            "drop it or name one worker",
        ),
        (
            "spec",
            {"spec": NANNY, "nworkers": 0},
            "nworkers",
            f"mode 'spec', option 'nworkers': 0 is not allowed; {INT}",
        ),
    ],
)
def test_parse_refuses(mode: Any, config: Any, key: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(mode, config)
    assert str(caught.value) == message
    assert caught.value.key == key
    assert not isinstance(caught.value, ModeRefused)


def test_a_message_cuts_a_long_value() -> None:
    for config in ({"nthreads": "9" * 5000}, {"memory_limit": 10**400}):
        with pytest.raises(ConfigError, match="is not allowed") as caught:
            parse("uniform", config)
        assert len(str(caught.value)) < 450


# What a node refuses

FOUR = "4294967296 bytes (4.00 GiB)"
SIXTYFOUR = "68719476736 bytes (64.00 GiB)"


@pytest.mark.parametrize(
    ("mode", "config", "hardware", "reason"),
    [
        (
            "auto-gpu",
            {},
            machine(),
            "no GPU was found there (no NVIDIA driver); use a mode without GPUs, such as 'auto-cpu'",
        ),
        (
            "mixed",
            {},
            machine(gpu_problem=None, versions={}),
            "no GPU was found there; use a mode without GPUs, such as 'auto-cpu'",
        ),
        (
            "auto-gpu",
            {},
            machine(ngpus=1, versions={"dask": "1"}),
            'dask-cuda is not installed there; on that node run: pip install "agentcluster[gpu-cu13]" (CUDA 13) '
            'or "agentcluster[gpu-cu12]" (CUDA 12)',
        ),
        ("auto-gpu", {"devices": "0,7"}, machine(ngpus=2), "it has no GPU '7' as devices asks; its GPUs are: 0, 1"),
        (
            "auto-gpu",
            {"devices": [0]},
            machine(gpus=gpus(4)[2:]),
            "it has no GPU '0' as devices asks; its GPUs are: 2, 3",
        ),
        (
            "auto-gpu",
            {"enable_cudf_spill": True},
            machine(gpus=(Gpu("0", "GPU-0000", "GB10", 0),)),
            "enable_cudf_spill: cuDF spilling is not supported on devices without dedicated memory",
        ),
        (
            "auto-gpu",
            {"devices": ["1", "GPU-0001"]},
            machine(ngpus=2),
            "devices=1,GPU-0001 names a GPU twice there; name each once",
        ),
        (
            "auto-cpu",
            {"nworkers": -9},
            machine(),
            "nworkers=-9 leaves no worker on 8 cores; give at least -8",
        ),
        *(
            (
                mode,
                config,
                machine(memory=4 * GIB, ngpus=1),
                f"memory_limit '64GiB' is {SIXTYFOUR} a worker, the node has {FOUR}; "
                "give at most that, a fraction up to 1.0, or 0 for no limit",
            )
            for mode, config in [
                ("auto-cpu", {"memory_limit": "64GiB"}),
                ("auto-gpu", {"memory_limit": "64GiB"}),
                ("auto", {"memory_limit": "64GiB"}),
                ("uniform", {"memory_limit": "64GiB"}),
                ("mixed", {"cpu": {"memory_limit": "64GiB"}}),
                ("spec", {"cls": "a.B", "opts": {"memory_limit": "64GiB"}}),
            ]
        ),
        (
            "uniform",
            {"nthreads": 16},
            machine(),
            "a worker with nthreads=16 is larger than the node, which has 8 cores",
        ),
        (
            "mixed",
            {"gpu": {"nthreads": 4}},
            machine(ngpus=2),
            "2 GPU workers with 4 threads each leave none of 8 cores for CPU workers; "
            "use auto-gpu, or fewer GPUs with gpu={'devices': …}",
        ),
        (
            "mixed",
            {"gpu": {"memory_limit": 0.5}},
            machine(ngpus=2),
            f"the limits of the gpu workers take {SIXTYFOUR} of the node's {SIXTYFOUR} and leave nothing for "
            "3 cpu workers; lower gpu.memory_limit, or set cpu.memory_limit too",
        ),
        (
            "mixed",
            {"cpu": {"memory_limit": 1.0, "nworkers": 1}},
            machine(ngpus=2),
            f"the limits of the cpu workers take {SIXTYFOUR} of the node's {SIXTYFOUR} and leave nothing for "
            "2 gpu workers; lower cpu.memory_limit, or set gpu.memory_limit too",
        ),
        (
            "spec",
            {
                "a": {"cls": "distributed.Nanny", "opts": {"memory_limit": 1.0}},
                "b": {"cls": "distributed.Nanny"},
            },
            machine(),
            f"memory limits set by hand take {SIXTYFOUR} of the node's {SIXTYFOUR} and leave too little for 1 workers "
            "without one; lower them, or set memory_limit for all",
        ),
        (
            "auto-cpu",
            {"nworkers": 5},
            machine(memory=4),
            "4 bytes (4 B) of memory are too little for 5 workers; ask for fewer",
        ),
    ],
)
def test_a_node_refuses(mode: str, config: dict[str, Any], hardware: Hardware, reason: str) -> None:
    parsed = parse(mode, config)
    with pytest.raises(ModeRefused) as caught:
        plan(parsed, hardware, node="gpu-1")
    assert caught.value.reason == reason
    assert str(caught.value) == f"node 'gpu-1' cannot serve mode {mode!r}: {reason}"


@given(MODES)
def test_parsing_again_changes_nothing(mode: tuple[str, dict[str, Any]]) -> None:
    parsed = parse(*mode)
    assert parse(parsed) == parsed
    assert parse(from_wire(Mode, json.loads(json.dumps(to_wire(parsed))))) == parsed


def test_a_mode_from_another_process_is_checked() -> None:
    with pytest.raises(ConfigError, match="unknown option 'nthread'"):
        parse(Mode("uniform", {"nthread": 2}))


def test_the_plan_or_the_reason_why_there_is_none() -> None:
    assert try_plan(parse("auto-cpu"), machine(), node="n1") == workers("auto-cpu")
    found = try_plan(parse("auto-gpu"), machine(), node="n1")
    assert found == "no GPU was found there (no NVIDIA driver); use a mode without GPUs, such as 'auto-cpu'"


# Keywords


def test_keywords_of_distributeds_classes() -> None:
    worker, nanny = worker_keywords(distributed.Worker), worker_keywords(distributed.Nanny)
    assert worker is not None
    assert nanny is not None
    assert {"nthreads", "lifetime", "data", "connection_limit"} <= worker
    assert {"lifetime", "preload_nanny", "worker_class", "env", "host"} <= nanny
    assert not {"env", "state", "self", "kwargs", "handlers", "stream_handlers", "connection_args"} & worker
    assert not {"worker_kwargs", "self", "handlers"} & nanny


def test_keywords_of_other_classes() -> None:
    class Inherits(distributed.Nanny):
        pass

    class PassesOn(distributed.Nanny):
        def __init__(self, *args: Any, mine: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Closed(distributed.Nanny):
        def __init__(self, scheduler: str, /, mine: int, *args: Any, other: int = 1) -> None:
            super().__init__(scheduler)

    class First:
        def __init__(self, mine: int = 1, other: int = 2) -> None: ...

    class Nothing:
        pass

    class NotAFunction:
        __init__ = functools.partialmethod(setattr, "x", 1)

    assert worker_keywords(Inherits) == worker_keywords(distributed.Nanny)
    assert worker_keywords(PassesOn) is None
    assert worker_keywords(Closed) == frozenset({"mine", "other"})
    assert worker_keywords(First) == frozenset({"mine", "other"})
    assert worker_keywords(Nothing) == frozenset()
    assert worker_keywords(NotAFunction) is None
    assert worker_keywords(dict) is None
    assert known_keywords("mine.Worker") is None


@pytest.mark.skipif(not NO_DASK_CUDA, reason="needs a Python without dask-cuda")
def test_keywords_of_a_dask_cuda_that_does_not_load_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dask_cuda.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("dask_cuda") is not None
    assert known_keywords.__wrapped__(CUDA_WORKER) is None


@pytest.mark.skipif(NO_DASK_CUDA, reason="needs dask-cuda")
def test_keywords_of_dask_cudas_class() -> None:
    import dask_cuda

    found = worker_keywords(dask_cuda.CUDAWorker)
    assert found is not None
    assert found == known_keywords(CUDA_WORKER)
    assert {"rmm_pool_size", "device_memory_limit", "lifetime", "preload_argv"} <= found
    assert not {"plugins", "data", "config", "env", "kwargs"} & found


# Modes of third parties

PLUGIN = """
from agentcluster.errors import ConfigError
from agentcluster.model import WorkerSpec


def halves(hardware, options):
    for _ in range(2):
        yield WorkerSpec("cpu", "distributed.Nanny", {"preload": ("a", "b")}, hardware.cpus // 2, **options)


def bad_option(hardware, options):
    raise ConfigError("color must be red")


def breaks(hardware, options):
    yield WorkerSpec("cpu", "distributed.Nanny")
    raise RuntimeError("no licence")


def wrong_type(hardware, options):
    return [{"cls": "distributed.Nanny"}]


def wrong_field(hardware, options):
    return [WorkerSpec("cpu", "distributed.Nanny", nthreads="2")]


def not_iterable(hardware, options):
    return None


def takeover(hardware, options):
    raise AssertionError("a built-in mode was shadowed")
"""
FUNCTIONS = ["halves", "bad_option", "breaks", "wrong_type", "wrong_field", "not_iterable"]


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a distribution with modes, as pip would."""
    (tmp_path / "modes_of_others.py").write_text(PLUGIN)
    info = tmp_path / "modes_of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modes-of-others\nVersion: 1.0\n")
    lines = [f"{name.replace('_', '-')} = modes_of_others:{name}" for name in FUNCTIONS]
    lines += ["auto-cpu = modes_of_others:takeover", "gone = modes_of_others:gone"]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("modes_of_others", None)


@pytest.mark.usefixtures("third_party")
def test_a_mode_of_a_third_party() -> None:
    assert names()[-7:] == ["bad-option", "breaks", "gone", "halves", "not-iterable", "wrong-field", "wrong-type"]
    assert (
        workers("halves", '{"memory_limit": 5, "resources": {"A": 1}}')
        == (WorkerSpec("cpu", "distributed.Nanny", {"preload": ["a", "b"]}, 4, 5, {"A": 1}),) * 2
    )
    with pytest.raises(ConfigError, match="unknown mode 'halve'; did you mean 'halves'"):
        parse("halve")


@pytest.mark.usefixtures("third_party")
def test_a_third_party_does_not_take_the_place_of_a_built_in_mode() -> None:
    assert names().count("auto-cpu") == 1
    assert len(workers("auto-cpu")) == 4


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("breaks", "modes_of_others:breaks raised RuntimeError: no licence"),
        ("gone", "modes_of_others:gone raised AttributeError: module 'modes_of_others' has no attribute 'gone'"),
        ("not-iterable", "modes_of_others:not_iterable raised TypeError: 'NoneType' object is not iterable"),
        (
            "wrong-type",
            "modes_of_others:wrong_type returned {'cls': 'distributed.Nanny'}, which is not a WorkerSpec",
        ),
        (
            "wrong-field",
            "modes_of_others:wrong_field returned a WorkerSpec that cannot be used: "
            "WorkerSpec.nthreads: expected int, got '2'",
        ),
    ],
)
def test_what_a_third_party_does_wrong_is_a_refusal(mode: str, reason: str) -> None:
    with pytest.raises(ModeRefused) as caught:
        workers(mode)
    assert caught.value.reason == reason


@pytest.mark.usefixtures("third_party")
def test_a_third_partys_own_config_error_passes() -> None:
    with pytest.raises(ConfigError, match=re.escape("color must be red")) as caught:
        workers("bad-option", {"color": "blue"})
    assert not isinstance(caught.value, ModeRefused)
    assert try_plan(parse("bad-option"), machine(), node="n1") == "color must be red"


def test_the_names_of_the_modes() -> None:
    assert names() == ["auto-cpu", "auto-gpu", "auto", "mixed", "uniform", "spec", "none"]


@pytest.mark.parametrize(
    ("mode", "warned"),
    [
        (Mode("auto-gpu", {"rmm_async": True, "rmm_pool_size": "1GB"}), True),
        (Mode("mixed", {"gpu": {"rmm_async": True, "rmm_pool_size": "1GB"}}), True),
        (Mode("auto-gpu", {"rmm_async": True}), False),
        (Mode("auto-gpu", {"rmm_async": False, "rmm_pool_size": "1GB"}), False),
        (Mode("uniform"), False),
    ],
)
def test_options_without_a_future(mode: Mode, warned: bool) -> None:
    assert ("'rmm_pool_size' is not needed when 'rmm_async' is enabled" in outdated(mode)) is warned
