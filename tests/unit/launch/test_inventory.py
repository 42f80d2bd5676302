"""Hosts from files and from Slurm, and nodes chosen by name, pattern, label or a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcluster import Host
from agentcluster.errors import ConfigError, NodeNotFound
from agentcluster.launch import launchers_for
from agentcluster.launch.inventory import expanded, hosts_in, slurm_hosts
from agentcluster.launch.ssh import SSHLauncher
from agentcluster.model import Hardware
from agentcluster.requests import NodeRegistration
from agentcluster.scheduler.planning.nodes import Registry

INVENTORY = """
defaults:
  user: dask
  remote_python: /opt/dask/bin/python
  labels: {site: x}
hosts:
  - login
  - root@login-2:2222
  - local
groups:
  gpu:
    labels: {kind: a100}
    env: {NCCL_DEBUG: INFO}
    hosts:
      - gpu-[1-2]
      - {host: gpu-9, name: big, port: 2022, labels: {kind: h100}}
  cloud:
    standby: true
    user: ubuntu
    hosts: ["cloud-[08-10]"]
"""


def file(directory: Path, text: str, name: str = "hosts.yaml") -> str:
    (directory / name).write_text(text)
    return str(directory / name)


def test_an_inventory(tmp_path: Path) -> None:
    common: Any = {"user": "dask", "remote_python": "/opt/dask/bin/python"}
    gpu: Any = {**common, "env": {"NCCL_DEBUG": "INFO"}}
    found = hosts_in(file(tmp_path, INVENTORY))
    assert found == [
        Host("login", **common, labels={"site": "x"}),
        Host("login-2", **{**common, "user": "root"}, port=2222, labels={"site": "x"}),
        "local",
        Host("gpu-1", **gpu, labels={"site": "x", "group": "gpu", "kind": "a100"}),
        Host("gpu-2", **gpu, labels={"site": "x", "group": "gpu", "kind": "a100"}),
        Host("gpu-9", **gpu, name="big", port=2022, labels={"site": "x", "group": "gpu", "kind": "h100"}),
        *(
            Host(name, **{**common, "user": "ubuntu"}, standby=True, labels={"site": "x", "group": "cloud"})
            for name in ("cloud-08", "cloud-09", "cloud-10")
        ),
    ]
    for hosts in (file(tmp_path, INVENTORY), tmp_path / "hosts.yaml"):
        launchers = launchers_for(hosts)
        assert [each.name for each in launchers][:6] == ["login", "login-2", "local", "gpu-1", "gpu-2", "big"]
        last = launchers[-1]
        assert isinstance(last, SSHLauncher)
        assert (last.standby, last.labels) == (True, {"site": "x", "group": "cloud"})


def test_a_plain_list(tmp_path: Path) -> None:
    text = "# all of them\nnode-[1-2]\n\nuser@node-7:2222  # the odd one\ntcp://10.0.0.5:8790\n"
    assert [each.where for each in launchers_for(file(tmp_path, text, "hosts.txt"))] == [
        *("node-1", "node-2", "user@node-7:2222", "tcp://10.0.0.5:8790"),
    ]
    assert [each.name for each in launchers_for(tmp_path / "hosts.txt")][:2] == ["node-1", "node-2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "hosts.yaml: expected a mapping"),
        ("hosts: gpu-1", "hosts.yaml: hosts: expected a list, got 'gpu-1'"),
        ("hsots: []", "hosts.yaml: unknown key 'hsots'; did you mean 'hosts'"),
        ("hosts: [{host: a, prot: 1}]", "hosts.yaml: hosts: unknown key 'prot'; did you mean 'port'"),
        ("hosts: [{port: 1}]", "names no host"),
        ("hosts: [{host: a, port: x}]", "port 'x' is not a number"),
        ("hosts: [{host: a, standby: maybe}]", "standby 'maybe' is not true or false"),
        ("hosts: [{host: a, labels: [x]}]", "hosts: labels: expected a mapping, got ['x']"),
        ("hosts: ['a b']", "host 'a b' is not understood"),
        ("hosts: ['gpu-[8-1]']", "[8-1] in 'gpu-[8-1]' is not a range"),
        ("hosts: ['gpu-[1-99999]']", "more than 10000 hosts"),
        ("hosts: [{host: 'gpu-[1-2]', name: x}]", "are 2 hosts, which cannot all have one name"),
        ("groups: {gpu: {hosts: [a], name: x}}", "groups: gpu: unknown key 'name'"),
        ("groups: [gpu]", "groups: expected a mapping"),
        ("hosts: [", "hosts.yaml: "),
    ],
)
def test_what_is_wrong_in_an_inventory(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launchers_for(file(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("none.yaml", "none", "none.txt"):
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            launchers_for(str(tmp_path / name))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not text"):
        launchers_for(tmp_path / "binary.txt")


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_hosts({"SLURM_JOB_NODELIST": "n[01-03,07],gpu-1"}) == ["n01", "n02", "n03", "n07", "gpu-1"]
    monkeypatch.setenv("SLURM_JOB_NODELIST", "rack[1-2]-node[1-2]")
    names = [each.name for each in launchers_for("slurm")]
    assert names == ["rack1-node1", "rack1-node2", "rack2-node1", "rack2-node2"]
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    monkeypatch.delenv("SLURM_NODELIST", raising=False)
    with pytest.raises(ConfigError, match="this is not a Slurm allocation"):
        launchers_for("slurm")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["n", "gpu-", "r1n"]), st.integers(0, 99), st.integers(0, 5), st.sampled_from([1, 3])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_ranges_are_what_they_say(parts: list[tuple[str, int, int, int]]) -> None:
    text = ",".join(f"{name}[{first:0{width}d}-{first + more:0{width}d}]" for name, first, more, width in parts)
    assert expanded(text, "here") == [
        f"{name}{number:0{len(f'{first:0{width}d}')}d}"
        for name, first, more, width in parts
        for number in range(first, first + more + 1)
    ]


def test_ipv6_stays() -> None:
    assert expanded("user@[::1]:22,[fe80::1]", "here") == ["user@[::1]:22", "[fe80::1]"]


# -- choosing nodes ----------------------------------------------------------------------------------------------------


def test_names_patterns_and_labels() -> None:
    registry = Registry()
    for name, labels in {"gpu-2": {"rack": "a"}, "gpu-10": {"rack": "b"}, "cpu": {"rack": "a"}, "bare": {}}.items():
        registry.register(NodeRegistration(name, "tcp://x:1", Hardware(name, 1, 1), labels=labels), now=0.0)
    registry.get("cpu").to("lost")

    def chosen(*names: str) -> list[str]:
        return [node.name for node in registry.select(list(names))]

    assert chosen("gpu-10") == ["gpu-10"]
    assert chosen("gpu-*") == ["gpu-2", "gpu-10"]
    assert chosen("rack=a") == ["gpu-2"]  # the other one is lost
    assert chosen("rack=*") == ["gpu-2", "gpu-10"]
    assert chosen("cpu") == ["cpu"]  # lost, but named
    assert chosen("rack=b", "gpu-*") == ["gpu-10", "gpu-2"]
    for none in ("tpu-*", "rack=c", "zone=*"):
        with pytest.raises(NodeNotFound, match=r"no node (named|has)"):
            chosen(none)
