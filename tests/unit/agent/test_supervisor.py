"""Ports of workers, assigned from ranges, and why workers did not start."""

from __future__ import annotations

import threading
from typing import Any

from distributed.utils import parse_ports
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.agent import supervisor as ports
from agentcluster.errors import ConfigError, WorkerStartError
from agentcluster.wire import PICKLED, pickled, with_cause


def ranges() -> st.SearchStrategy[str]:
    bounds = st.lists(st.integers(1, 40), min_size=2, max_size=2, unique=True).map(sorted)
    return bounds.map(lambda both: f"{both[0]}:{both[1]}")


@given(
    worker_port=st.one_of(st.none(), st.just(0), st.integers(1, 20), ranges()),
    nanny_port=st.one_of(st.none(), st.just("0"), ranges()),
    count=st.integers(0, 6),
    taken=st.sets(st.integers(1, 40)),
)
def test_no_port_is_assigned_twice(worker_port: Any, nanny_port: Any, count: int, taken: set[int]) -> None:
    options = {"worker_port": worker_port, "nanny_port": nanny_port}
    shares = ports.assign_ports(options, [f"w{number}" for number in range(count)], taken)
    assert len(shares) == count
    each = [port for share in shares.values() for key in share for port in share[key]]
    assert len(each) == len(set(each))
    asked = {key: {port for port in parse_ports(value) if port} for key, value in options.items()}
    assert set(each) == (set.union(*asked.values()) - taken if count else set())
    for key, wanted in asked.items():
        assert all(set(share.get(key, ())) <= wanted for share in shares.values())
        sizes = [len(share.get(key, ())) for share in shares.values()]
        assert not asked[key] or max(sizes, default=0) - min(sizes, default=0) <= 1


class Locked(Exception):
    """One that holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


def test_why_a_worker_did_not_start() -> None:
    """An exception of its own code goes along, unless it is ours, cannot be sent, or is too large."""
    outer = RuntimeError("Nanny failed to start.")
    outer.__cause__ = ImportError("no module like this")
    said = ports.failure(outer)
    assert isinstance(said, dict)
    assert said["why"] == "ImportError: no module like this"
    error = with_cause(WorkerStartError("n", {"n-0": "late", "n-1": said}))
    assert error.failures == {"n-0": "late", "n-1": "ImportError: no module like this"}
    assert isinstance(error.__cause__, ImportError)
    assert WorkerStartError("n", error.answer()).raised == error.raised
    assert ports.failure(ConfigError("wrong")) == "ConfigError: wrong"
    assert ports.failure(Locked()) == "Locked: locked"
    assert isinstance(ports.failure(ValueError(b"x" * 200_000)), str)


def test_a_cause_that_cannot_be_restored_is_left_out() -> None:
    damaged = {"why": "x", "raised": {PICKLED: "damaged"}}
    assert with_cause(WorkerStartError("n", {"n-0": damaged})).__cause__ is None
    assert with_cause(WorkerStartError("n", {"n-0": {"why": "x", "raised": pickled("no error")}})).__cause__ is None
