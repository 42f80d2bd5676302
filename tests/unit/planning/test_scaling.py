"""What scale() means on nodes of several modes, without a scheduler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from agentcluster import modes
from agentcluster.errors import ConfigError
from agentcluster.model import Gpu, Hardware, Mode, WorkerSpec
from agentcluster.requests import NodeRegistration, ScaleTarget
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.scheduler.planning.scaling import ScalePlan, plan_scale

GIB = 2**30
SPEC = modes.parse(
    "spec",
    {
        "thin": {"cls": "dask.distributed.Nanny", "opts": {"nthreads": 1}},
        "wide": {"cls": "dask.distributed.Nanny", "opts": {"nthreads": 2, "resources": {"BIG": 1}}},
    },
)


def node(name: str, mode: Mode | str, *, cpus: int = 4, gpus: int = 0, running: int | None = None) -> Node:
    """Return a node that has the first so many workers of its mode."""
    cards = tuple(Gpu(str(i), f"GPU-{name}-{i}", "H200", 100 * GIB) for i in range(gpus))
    versions = {"dask-cuda": "26.10"} if gpus else {}
    hardware = Hardware(name, cpus, 16 * GIB, cards, "no driver" if not gpus else None, versions=versions)
    found = Registry().register(NodeRegistration(name, f"tcp://{name}:1", hardware), now=0.0)
    mode = modes.parse(mode)
    specs = modes.plan(mode, hardware, node=name)[:running]
    found.adopt(mode, dict(zip(found.take_names(len(specs)), specs, strict=True)))
    return found


def ask(target: ScaleTarget, *nodes: Node, nbytes: dict[str, int] | None = None) -> ScalePlan:
    return plan_scale(target, nodes, {each.name: each.plan.mode for each in nodes}, nbytes or {})


def after(answer: ScalePlan) -> dict[str, list[WorkerSpec]]:
    return {name: [*change.keep.values(), *change.add] for name, change in answer.changes.items()}


def counts(answer: ScalePlan) -> dict[str, Counter[str]]:
    return {name: Counter(spec.kind for spec in specs) for name, specs in after(answer).items()}


def gone(answer: ScalePlan) -> set[str]:
    return {worker for change in answer.changes.values() for worker in change.remove}


FOUR = Mode("auto-cpu", {"nworkers": 4})


@pytest.mark.parametrize("wanted", range(10))
def test_exactly_so_many_workers(wanted: int) -> None:
    answer = ask(ScaleTarget(workers=wanted), node("a", FOUR, running=3), node("b", FOUR, running=1))
    sizes = [len(specs) for specs in after(answer).values()]
    assert sum(sizes) == min(wanted, 8)
    assert answer.short == ({"workers": 8} if wanted > 8 else {})


def test_cores_and_memory_are_those_of_the_workers() -> None:
    nodes = node("a", Mode("auto-cpu", {"nworkers": 1}), running=0), node("b", FOUR, running=1)
    assert {name: len(specs) for name, specs in after(ask(ScaleTarget(cores=5), *nodes)).items()} == {"a": 1, "b": 1}
    assert {name: len(specs) for name, specs in after(ask(ScaleTarget(cores=2), *nodes)).items()} == {"a": 1, "b": 1}
    assert after(ask(ScaleTarget(cores=1), *nodes))["a"] == []
    assert ask(ScaleTarget(cores=9), *nodes).short == {"cores": 8}
    assert ask(ScaleTarget(memory=33 * GIB), *nodes).short == {"memory": 32 * GIB}
    both = after(ask(ScaleTarget(workers=3, memory=20 * GIB), *nodes))
    assert {name: len(specs) for name, specs in both.items()} == {"a": 1, "b": 2}


def test_memory_of_workers_without_a_limit() -> None:
    with pytest.raises(ConfigError, match="no memory limit"):
        ask(ScaleTarget(memory=1), node("a", Mode("auto-cpu", {"memory_limit": 0})))


def test_whole_nodes() -> None:
    nodes = [node("a", FOUR), node("b", FOUR, running=2), node("c", FOUR, running=0), node("d", "none")]
    nbytes = {"a-0": 1, "b-0": 5}
    found = {k: [len(s) for s in after(ask(ScaleTarget(nodes=k), *nodes, nbytes=nbytes)).values()] for k in range(5)}
    assert found == {0: [0, 0, 0, 0], 1: [0, 4, 0, 0], 2: [4, 4, 0, 0], 3: [4, 4, 4, 0], 4: [4, 4, 4, 0]}
    assert ask(ScaleTarget(nodes=4), *nodes).short == {"nodes": 3}


def test_kinds_that_the_mode_has() -> None:
    nodes = node("a", "mixed", gpus=2), node("b", "mixed", gpus=1)
    now = {each.name: Counter(spec.kind for spec in each.plan.workers.values()) for each in nodes}
    answer = ask(ScaleTarget(kinds={"gpu": 1}), *nodes, nbytes={"b-0": 7})
    assert [count["gpu"] for count in counts(answer).values()] == [0, 1]
    assert [count["cpu"] for count in counts(answer).values()] == [count["cpu"] for count in now.values()]
    answer = ask(ScaleTarget(kinds={"gpu": 9, "cpu": 0}), *nodes)
    assert answer.short == {"gpu": 3}
    assert not any(count["cpu"] for count in counts(answer).values())


def test_a_node_gets_both_where_a_kind_is_missing() -> None:
    """The one that holds least; whoever is not named stays as it is elsewhere."""
    nodes = node("a", FOUR, gpus=1), node("b", FOUR, gpus=1), node("c", FOUR)
    answer = ask(ScaleTarget(kinds={"gpu": 1}), *nodes, nbytes={"a-0": 5})
    assert {name: change.mode.name for name, change in answer.changes.items()} == {
        "a": "auto-cpu",
        "b": "mixed",
        "c": "auto-cpu",
    }
    assert answer.changes["b"].mode.config == {"cpu": {"nworkers": 4}}
    assert counts(answer) == {"a": {"cpu": 4}, "b": {"gpu": 1, "cpu": 4}, "c": {"cpu": 4}}
    assert gone(answer) == {"b-0", "b-1", "b-2", "b-3"}  # smaller ones come beside the GPU's
    both = ask(ScaleTarget(kinds={"gpu": 2, "cpu": 3}), *nodes)
    assert sum(count["gpu"] for count in counts(both).values()) == 2
    assert sum(count["cpu"] for count in counts(both).values()) == 3
    assert ask(ScaleTarget(kinds={"gpu": 5}), *nodes).short == {"gpu": 2}


def test_workers_by_their_name_in_a_spec_and_by_a_resource() -> None:
    nodes = node("a", SPEC, cpus=8), node("b", SPEC, cpus=8)
    for kind in ("wide", "BIG", "big"):
        answer = ask(ScaleTarget(kinds={kind: 1}), *nodes, nbytes={"a-1": 3})
        assert [[spec.nthreads for spec in specs] for specs in after(answer).values()] == [[1, 2], [1]]
    answer = ask(ScaleTarget(kinds={"thin": 0, "wide": 2}), *nodes)
    assert [[spec.nthreads for spec in specs] for specs in after(answer).values()] == [[2], [2]]


@pytest.mark.parametrize(
    ("kind", "mode", "said"),
    [
        ("gpu", "auto-cpu", ["'gpu'", "no GPU was found", "no driver"]),
        ("gpu", "uniform", ["'gpu'", "'uniform'", "'mixed'"]),
        ("gqu", "auto-cpu", ["'gqu'", "cpu"]),
        ("think", SPEC, ["'think'", "did you mean 'thin'"]),
    ],
)
def test_a_kind_that_no_node_has(kind: str, mode: Any, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(ScaleTarget(kinds={kind: 1}), node("a", mode))
    assert all(each in str(caught.value) for each in said), caught.value


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"cores": 1.5}, {"nodes": True}, {"kinds": {"gpu": "2"}}])
def test_amounts_are_whole_numbers(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        ScaleTarget(**wrong)


@pytest.mark.parametrize("wrong", [{"workers": 1, "nodes": 1}, {"cores": 1, "kinds": {"gpu": 1}}])
def test_one_target_at_a_time(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be combined with other targets; give one"):
        ScaleTarget(**wrong)
