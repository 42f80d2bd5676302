"""Environments of processes: before a worker starts, at its start, and put back."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.agent import forkserver


@pytest.mark.parametrize(
    ("configured", "existing", "expected"),
    [
        ({}, {}, {"PYTHONHASHSEED": "6640"}),
        ({"A": 1}, {}, {"A": "1", "PYTHONHASHSEED": "6640"}),
        ({"A": 1}, {"A": "2", "B": "3"}, {"A": "2", "PYTHONHASHSEED": "6640"}),
        ({"A": None}, {"A": "2"}, {"PYTHONHASHSEED": "6640"}),
        ({"PYTHONHASHSEED": 0}, {}, {"PYTHONHASHSEED": "6640"}),
        ({"PYTHONHASHSEED": 5}, {}, {"PYTHONHASHSEED": "5"}),
        ({"PYTHONHASHSEED": 5}, {"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "6640"}),
    ],
)
def test_pre_spawn_environ(
    monkeypatch: pytest.MonkeyPatch, configured: dict[str, Any], existing: dict[str, str], expected: dict[str, str]
) -> None:
    for key in ("A", "B", "PYTHONHASHSEED"):
        monkeypatch.delenv(key, raising=False)
    for key, value in existing.items():
        monkeypatch.setenv(key, value)
    assert forkserver.pre_spawn_environ(configured) == expected


@given(st.dictionaries(st.sampled_from(["OMP_X", "PYTHONX", "LD_X", "MALLOC_X", "FOO", "XOMP_"]), st.text(max_size=3)))
def test_start_time_variables(environ: dict[str, str]) -> None:
    found = forkserver.start_time_variables(environ)
    assert found == {k: v for k, v in environ.items() if k not in ("FOO", "XOMP_")}


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTCLUSTER_A", "before")
    monkeypatch.delenv("AGENTCLUSTER_B", raising=False)
    before = dict(os.environ)
    with forkserver.environment({"AGENTCLUSTER_A": "1", "AGENTCLUSTER_B": "2"}):
        with forkserver.environment({"AGENTCLUSTER_A": "3"}):
            assert (os.environ["AGENTCLUSTER_A"], os.environ["AGENTCLUSTER_B"]) == ("3", "2")
        assert os.environ["AGENTCLUSTER_A"] == "1"
    assert dict(os.environ) == before
    with pytest.raises(ZeroDivisionError), forkserver.environment({"AGENTCLUSTER_A": "1", "AGENTCLUSTER_B": "2"}):
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_environments_of_two_threads_are_one_after_the_other() -> None:
    seen: list[tuple[str, str]] = []
    together = threading.Barrier(4)

    def take(value: str) -> None:
        together.wait(5)
        for _ in range(500):
            with forkserver.environment({"AGENTCLUSTER_A": value}):
                seen.append((value, os.environ["AGENTCLUSTER_A"]))

    threads = [threading.Thread(target=take, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 2000
    assert all(wanted == found for wanted, found in seen)
    assert "AGENTCLUSTER_A" not in os.environ
