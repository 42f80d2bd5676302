"""Arguments of a cluster and its calls: each acts, or is refused in one sentence before anything is touched."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from distributed import LocalCluster, Nanny, SpecCluster, SSHCluster

from agentcluster import AgentCluster, Mode
from agentcluster.client.interface import (
    first_modes,
    parse_mapping,
    parse_rollouts,
    parse_worker_options,
)
from agentcluster.errors import ConfigError, NodeNotFound
from agentcluster.model import Hardware
from agentcluster.modes import parse
from agentcluster.reports import Nodes

#: Keywords that no cluster of dask passes on: of a worker that is started by hand.
OF_A_WORKER = {"scheduler_ip", "scheduler_port", "scheduler_file", "nanny"}

OWN = set(inspect.signature(AgentCluster).parameters)


@pytest.mark.parametrize(
    ("cls", "keyword"),
    [
        (cls, keyword)
        for cls in (LocalCluster, SSHCluster, SpecCluster, Nanny)
        for keyword in inspect.signature(cls).parameters
        if keyword not in OWN and not (cls is Nanny and keyword in OF_A_WORKER)
    ],
)
def test_each_keyword_of_dasks_clusters_is_ours_or_is_told_where_it_goes(cls: object, keyword: str) -> None:
    says = rf"in place of {keyword}='some', write (config|hosts|scheduler|worker|nothing)"
    with pytest.raises(ConfigError, match=says):
        AgentCluster(**{keyword: "some"})  # type: ignore[arg-type]


def test_the_first_line_of_who_comes_from_local_cluster() -> None:
    with pytest.raises(ConfigError) as caught:
        AgentCluster(n_workers=4, threads_per_worker=1, memory_limit="4GB")  # type: ignore[arg-type]
    assert str(caught.value) == (
        'AgentCluster has other words for this: in place of n_workers=4, write config={"nworkers": 4}; '
        "of threads_per_worker=1, write config={\"nthreads\": 1}; of memory_limit='4GB', write "
        "config={\"memory_limit\": '4GB'}"
    )


def test_values_that_may_hold_credentials_are_not_shown() -> None:
    with pytest.raises(ConfigError, match=r'in place of env=…, write worker_options={"env": …}$'):
        AgentCluster(env={"PASSWORD": "known-to-nobody"})  # type: ignore[arg-type]


def test_a_keyword_that_nobody_has() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'hostss'; did you mean 'hosts'\?"):
        AgentCluster(hostss=["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shutdown_on_close": False}, r"shutdown_on_close=False has no effect"),
        ({"name": 5}, r"name=5 must be text"),
        ({"worker_options": {"no_such": 1}}, r"worker_options: unknown option 'no_such'"),
        ({"worker_options": {"local_dir": "x"}}, r"did you mean 'local_directory'\?"),
        ({"worker_options": {"security": 1}}, r"worker_options: 'security' cannot be set"),
        ({"worker_options": [1]}, r"worker_options=\[1\] must be a mapping"),
        (
            {"scheduler": {"cls": "distributed.Scheduler"}},
            r"scheduler={'cls': …} is for .* write scheduler_options={…}",
        ),
        ({"hosts": [0]}, r"host 0 is not 'local'"),
        ({"worker_options": {1: 2}}, r"must be a mapping from names"),
        ({"worker_options": {"nthreads": "many"}}, r"'nthreads'.*'many'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AgentCluster(**options)


def test_threads_and_memory_of_all_workers_are_options_of_the_first_mode() -> None:
    options, shape = parse_worker_options({"nthreads": 2, "memory_limit": "1GiB", "resources": {"x": 1}})
    assert options == {"resources": {"x": 1}}
    first, own = first_modes("uniform", {"nthreads": 3}, ["a"], shape)
    assert (first, own) == (Mode("uniform", {"nthreads": 3, "memory_limit": "1GiB"}), {})
    _, own = first_modes({"a": "uniform"}, None, ["a"], shape)
    assert own["a"].config == shape


def test_another_class_of_worker_has_keywords_of_its_own() -> None:
    assert parse_worker_options({"worker_class": "own.Own", "mine": 1})[0] == {"worker_class": "own.Own", "mine": 1}


def test_a_mapping_is_copied() -> None:
    given = {"a": 1}
    assert parse_mapping("x", given) == given
    assert parse_mapping("x", given) is not given
    assert parse_mapping("x", None) == {}


def test_options_of_a_mode_as_keywords() -> None:
    known = Nodes({})
    assert parse_rollouts(known, "uniform", None, None, {"nthreads": 2}) == [(None, Mode("uniform", {"nthreads": 2}))]
    assert parse_rollouts(known, {"a": "uniform"}, None, None, {"nthreads": 2})[0][1].config == {"nthreads": 2}
    with pytest.raises(ConfigError, match=r"option 'nthreads' of mode 'uniform' is given twice"):
        parse_rollouts(known, "uniform", {"nthreads": 1}, None, {"nthreads": 2})
    with pytest.raises(ConfigError, match=r"'nthread'.*did you mean 'nthreads'"):
        parse_rollouts(known, "uniform", None, None, {"nthread": 2})


@pytest.mark.parametrize("nodes", [[], "", ()])
def test_a_selection_of_no_node(nodes: Any) -> None:
    with pytest.raises(ConfigError, match=r"nodes=.* selects no node; leave it out for all of a"):
        parse_rollouts(Nodes({"a": {}}), "uniform", None, nodes, {})


def a_node(cpus: int) -> Any:
    return {"hardware": {"hostname": "h", "cpus": cpus, "memory": 2**30}}


def test_a_function_from_hardware_is_a_mode() -> None:
    known = Nodes({"a": a_node(2), "b": a_node(8), "c": a_node(2)})

    def mode(hardware: Hardware) -> Any:
        if hardware.cpus > 4:
            return {"cls": "distributed.Nanny", "opts": {"nthreads": hardware.cpus // 2}}
        return Mode("uniform", {"nthreads": 1})

    small, large = Mode("uniform", {"nthreads": 1}), {"cls": "distributed.Nanny", "opts": {"nthreads": 4}}
    assert parse_rollouts(known, mode, None, None, {}) == [(["a", "c"], small), (["b"], parse("spec", {"spec": large}))]
    assert parse_rollouts(known, mode, None, ["a"], {}) == [(["a"], small)]
    assert parse_rollouts(known, lambda hardware: "none", None, "b", {}) == [(["b"], Mode("none"))]
    with pytest.raises(ConfigError, match="returned 5 for node 'a'; return a mode, or the workers as in mode spec"):
        parse_rollouts(known, lambda hardware: 5, None, None, {})  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="options cannot be given with a function as mode"):
        parse_rollouts(known, mode, None, None, {"nthreads": 2})
    with pytest.raises(NodeNotFound, match="no node named 'z'"):
        parse_rollouts(known, mode, None, "z", {})
