"""Requests at the border: names that others could not show are refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from agentcluster.errors import ConfigError
from agentcluster.model import Hardware
from agentcluster.requests import LONGEST_NAME, NodeRegistration
from agentcluster.wire import from_wire, to_wire

NODE: dict[str, Any] = to_wire(NodeRegistration("n", "tcp://127.0.0.1:1", Hardware("host", 1, 2**30)))


@pytest.mark.parametrize("name", ["gpu-1", "box 3", "tcp://10.0.0.5:8790", "ünï", "x" * LONGEST_NAME])
def test_names_that_can_be_shown(name: str) -> None:
    facts = {**NODE, "name": name, "external_name": name, "labels": {name: name, "empty": ""}}
    assert from_wire(NodeRegistration, facts).name == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "''"),
        ("  ", "'  '"),
        ("a\nINFO - all is well", r"'a\nINFO - all is well'"),
        ("\x1b[2J", r"'\x1b[2J'"),
        ("\u202egnp", r"'\u202egnp'"),
        ("x" * (LONGEST_NAME + 1), f"'{'x' * 40}'… of {LONGEST_NAME + 1} characters"),
    ],
)
@pytest.mark.parametrize("place", ["name", "external_name", "label", "value"])
def test_names_that_cannot(name: str, says: str, place: str) -> None:
    facts: dict[str, Any] = {
        "name": {"name": name},
        "external_name": {"external_name": name},
        "label": {"labels": {name: "a"}},
        "value": {"labels": {"a": name or " "}},  # a label may have no value
    }[place]
    says = says if name or place != "value" else "' '"
    with pytest.raises(ConfigError) as caught:
        from_wire(NodeRegistration, {**NODE, **facts}, "register_node")
    assert says in str(caught.value)
    assert "printable characters" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2 * LONGEST_NAME


@pytest.mark.parametrize("name", [5, b"n", None, ["n"], {"n": 1}, True])
def test_a_name_is_text(name: object) -> None:
    with pytest.raises(ConfigError, match=r"register_node\.name: expected str"):
        from_wire(NodeRegistration, {**NODE, "name": name}, "register_node")
