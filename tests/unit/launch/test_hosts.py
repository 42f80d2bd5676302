"""Hosts and the launchers that are made for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agentcluster.errors import ConfigError
from agentcluster.launch import Host, launchers_for
from agentcluster.launch.local import LocalLauncher


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("gpu-1", "gpu-1", None, None),
        ("gpu-1:2222", "gpu-1", None, 2222),
        ("me@gpu-1.example.org", "gpu-1.example.org", "me", None),
        ("first.last@10.0.0.5:65535", "10.0.0.5", "first.last", 65535),
        ("[::1]", "::1", None, None),
        ("me@[fe80::1%eth0]:22", "fe80::1%eth0", "me", 22),
    ],
)
def test_host_forms(text: str, host: str, user: str | None, port: int | None) -> None:
    parsed = Host.parse(text)
    assert parsed == Host(host, user=user, port=port)
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not understood"),
        (" gpu-1", "is not understood"),
        ("gpu 1", "is not understood"),
        ("@gpu-1", "is not understood"),
        ("a@b@c", "is not understood"),
        ("[gpu-1]", "is not understood"),
        ("[::1", "is not understood"),
        ("gpu-1/x", "is not understood"),
        ("-oProxyCommand=x", "is not understood"),
        ("gpu-1:", "port '' is not a number from 1 to 65535"),
        ("gpu-1:ssh", "port 'ssh' is not a number"),
        ("gpu-1:0", "port '0' is not a number"),
        ("gpu-1:65536", "port '65536' is not a number"),
        ("gpu-1:-1", "port '-1' is not a number"),
        ("gpu-1:\u0663", "is not a number"),
        ("fe80::1", "an IPv6 address needs brackets"),
        ("http://gpu-1", "unknown scheme 'http'"),
        ("ssh://gpu-1", "unknown scheme 'ssh'"),
    ],
)
def test_host_refuses(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Host.parse(text)
    assert problem in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "user@host:port" in str(caught.value)
    assert caught.value.key == "hosts"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"host": "a b"}, "host"),
        ({"host": None}, "host"),
        ({"port": "22"}, "port"),
        ({"port": True}, "port"),
        ({"user": ""}, "user"),
        ({"name": ""}, "name"),
        ({"remote_python": 3}, "remote_python"),
        ({"connect_options": ["secret"]}, "connect_options"),
        ({"env": {"A": 1}}, "env"),
    ],
)
def test_host_checks_its_fields(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        dataclasses.replace(Host("gpu-1"), **change)
    assert caught.value.key == key
    assert "secret" not in str(caught.value)


def test_this_machine_has_no_user_and_no_port() -> None:
    (launcher,) = launchers_for(Host("local", name="a", env={"X": "1"}, standby=True), remote_python="/no/such/python")
    assert (type(launcher), launcher.name, launcher.standby) == (LocalLauncher, "a", True)
    for options in ({"user": "me"}, {"port": 22}):
        with pytest.raises(ConfigError, match="this machine has neither"):
            Host("local", **options)


def test_host_keeps_secrets_out_of_the_repr() -> None:
    assert "secret" not in repr(Host("gpu-1", connect_options={"password": "secret"}, env={"TOKEN": "secret"}))


class _Own(LocalLauncher):
    """A user's launcher."""


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        (None, ["local"]),
        ([], []),
        ("local", ["local"]),
        ("gpu-1", ["gpu-1"]),
        (Host("gpu-1", name="a"), ["a"]),
        (_Own("mine"), ["mine"]),
        (("local", "local", "local"), ["local", "local.2", "local.3"]),
        (["me@gpu-1", "gpu-1:2222", "[::1]:22"], ["gpu-1", "gpu-1.2", "::1"]),
        (["tcp://10.0.0.5:8790", "tls://10.0.0.5:8791", "tls://[::1]:1"], ["10.0.0.5", "10.0.0.5.2", "::1"]),
        (["local", _Own("local")], ["local.2", "local"]),
        ([Host("local", name="a"), "local", Host("local")], ["a", "local", "local.2"]),
        (["local", "local", Host("x", name="local.2")], ["local", "local.3", "local.2"]),
        (iter(["a", "b"]), ["a", "b"]),
    ],
)
def test_launchers_are_named_by_their_hosts(hosts: object, names: list[str]) -> None:
    assert [launcher.name for launcher in launchers_for(hosts)] == names


def test_launchers_are_of_the_kind_asked_for() -> None:
    own = _Own("mine")
    launchers = launchers_for(["local", "me@gpu-1:2222", "tcp://10.0.0.5:8790", own])
    assert [type(x).__name__ for x in launchers] == ["LocalLauncher", "SSHLauncher", "AttachedLauncher", "_Own"]
    assert launchers[3] is own
    assert [x.where for x in launchers[:3]] == ["local", "me@gpu-1:2222", "tcp://10.0.0.5:8790"]


@pytest.mark.parametrize(
    ("hosts", "options", "message"),
    [
        (7, {}, "hosts=7 is not a list of hosts"),
        ({"a": 1}, {}, "is not a list of hosts"),
        ([7], {}, "host 7 is not 'local', host, user@host"),
        ([_Own], {}, "is not 'local'"),
        (["http://a"], {}, "unknown scheme 'http'"),
        (["tcp://10.0.0.5"], {}, "must be tcp://host:port"),
        (["tls://10.0.0.5:99999"], {}, "must be tcp://host:port"),
        ([_Own("a"), Host("b", name="a")], {}, "two hosts have the name 'a'"),
        (["a", "b"], {"connect_options": [{}]}, "connect_options has 1 items for 2 hosts"),
        (["a"], {"connect_options": ["secret"]}, "connect_options must be one mapping for all hosts, or a list"),
        (["a"], {"connect_options": {"pasword": "secret"}}, "has no option 'pasword'; did you mean 'password'"),
        (["a"], {"remote_python": 3}, "remote_python must be one str for all hosts, or a list"),
    ],
)
def test_launchers_refuse(hosts: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        launchers_for(hosts, **options)
    assert "secret" not in str(caught.value)


def test_options_of_a_host_go_first() -> None:
    (shared, own) = launchers_for(
        ["a", Host("b", connect_options={"username": "own"}, remote_python="/own")],
        connect_options={"username": "all", "keepalive_interval": 5},
        remote_python="/all",
    )
    assert shared._options() == {"username": "all", "keepalive_interval": 5, "keepalive_count_max": 4}  # type: ignore[attr-defined]
    assert own._options() == {"username": "own", "keepalive_interval": 5, "keepalive_count_max": 4}  # type: ignore[attr-defined]
    assert (shared._python, own._python) == ("/all", "/own")  # type: ignore[attr-defined]


def test_options_per_host() -> None:
    options = [None, {"username": "b"}, {"username": "c"}]
    launchers = launchers_for(["local", "b", "me@c:22"], connect_options=options, remote_python=[None, "/b", "/c"])
    assert [x._options()["username"] for x in launchers[1:]] == ["b", "me"]  # type: ignore[attr-defined]
    assert [x._python for x in launchers[1:]] == ["/b", "/c"]  # type: ignore[attr-defined]
