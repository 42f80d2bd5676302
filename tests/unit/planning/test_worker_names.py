"""Names of a node's workers, what its workers offer, and the patterns by which the node is selected."""

from __future__ import annotations

import pytest

from agentcluster.model import Hardware, Mode, WorkerSpec, WorkerState
from agentcluster.requests import NodeRegistration
from agentcluster.scheduler.planning.nodes import Node, Registry

HARDWARE = Hardware("host", 8, 2**30)
CPU = WorkerSpec("cpu", "distributed.Nanny", nthreads=1, resources={"CPU": 1.0})


def registered(
    name: str = "n",
    external_name: str | int | None = None,
    *,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
) -> Node:
    request = NodeRegistration(
        name,
        "tcp://n:1",
        HARDWARE,
        external_name=external_name,
        slots=3,
        resources=resources or {},
        labels=labels or {},
    )
    return Registry().register(request, 1.5)


def test_a_registration_is_kept() -> None:
    node = registered("7", 7, resources={"A": 1.0}, labels={"rack": "a"})
    assert (node.name, node.address, node.hardware, node.state, node.heard) == (
        "7",
        "tcp://n:1",
        HARDWARE,
        "joining",
        1.5,
    )
    assert (node.external_name, node.slots, node.resources, node.labels) == (7, 3, {"A": 1.0}, {"rack": "a"})


def test_first_workers_of_a_node_that_no_manager_named_have_numbers() -> None:
    node = registered()
    assert node.first_names(2, ()) == ["n-0", "n-1"]
    assert node.external_names == ()


@pytest.mark.parametrize(
    ("count", "names"), [(0, ("n",)), (1, ("n",)), (2, ("n-0", "n-1")), (3, ("n-0", "n-1", "n-2"))]
)
def test_first_workers_of_a_node_that_a_manager_named_have_the_names_of_dask_worker(
    count: int, names: tuple[str, ...]
) -> None:
    node = registered("n", "n")
    assert node.first_names(count, ()) == list(names[:count])
    assert node.external_names == names
    assert not set(node.take_names(5)) & set(names)


def test_names_that_other_workers_have_are_not_given_to_first_workers() -> None:
    node = registered("n", "n")
    assert node.first_names(2, {"n-1"}) == ["n-2", "n-3"]
    assert node.external_names == ("n-0", "n-1")
    node = registered("n", "n")
    assert node.first_names(2, {"n-2"}) == ["n-0", "n-1"], "a name that no first worker would have does not matter"


def test_a_manager_may_name_workers_by_number() -> None:
    node = registered("7", 7)
    [name] = node.first_names(1, ())
    assert name == "7"
    assert node.scheduler_name(name) == 7
    assert node.scheduler_name("7-1") == "7-1"
    assert registered("7").scheduler_name("7") == "7"


def test_renamed_workers_have_their_new_names_everywhere() -> None:
    node = registered()
    node.adopt(Mode("auto-cpu"), {"n-0": CPU, "n-1": CPU})
    node.workers = {name: WorkerState(name, "running") for name in ("n-0", "n-1")}
    node.ended = {"n-1", "n-9"}
    revision = node.plan.revision
    node.rename({"n-1": "blue"})
    assert list(node.plan.workers) == ["n-0", "blue"]
    assert node.workers == {name: WorkerState(name, "running") for name in ("n-0", "blue")}
    assert node.ended == {"blue", "n-9"}
    assert node.plan.revision == revision


def test_the_last_external_name_that_is_forgotten() -> None:
    node = registered("n", "n")
    node.first_names(2, ())
    assert not node.forget("other")
    assert not node.forget("n-0")
    assert node.external_names == ("n-1",)
    assert node.forget("n-1")
    assert not node.forget("n-1"), "there was none any longer"


def test_the_last_worker_that_is_dropped() -> None:
    node = registered()
    node.adopt(Mode("auto-cpu"), {"n-0": CPU, "n-1": CPU})
    assert [node.drop("other"), node.drop("n-0"), node.drop("n-1"), node.drop("n-1")] == [False, False, True, False]
    node.to("swap")
    assert not node.drop("n-2")
    assert node.ended == {"n-2"}


def test_a_host_adds_its_resources_and_settings_win() -> None:
    node = registered(resources={"CPU": 9.0, "TPU": 2.0})
    assert node.offers(CPU) == {"CPU": 1.0, "TPU": 2.0}


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("gpu-1", True),
        ("gpu-*", True),
        ("gpu-?", True),
        ("cpu-*", False),
        ("GPU-1", False),
        ("rack=a", True),
        ("rack=*", True),
        ("rack=b", False),
        ("row=*", False),
        ("gpu-1=a", False),
    ],
)
def test_patterns_of_names_and_labels(pattern: str, matches: bool) -> None:
    assert registered("gpu-1", labels={"rack": "a"}).matches(pattern) is matches


def test_what_is_expected_of_nodes_that_are_yet_to_join() -> None:
    nodes = Registry()
    cpu, gpu, none = Mode("auto-cpu", {"nworkers": 1}), Mode("auto-gpu"), Mode("none")
    nodes.expect(cpu, {"a": gpu}, ["b"])
    nodes.expect(None, {"c": none}, ["d"])
    assert nodes.default is cpu
    assert nodes.wanted == {"a": gpu, "c": none}
    assert nodes.bare == {"b", "d"}
    nodes.unregister("b")
    nodes.unregister("a")
    assert (nodes.wanted, nodes.bare) == ({"c": none}, {"d"})
