"""The policy by which an agent restarts workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.agent.nanny import RestartPolicy

POLICY = RestartPolicy(limit=4, window=60.0, backoff=1.0, backoff_max=3.0)


@pytest.mark.parametrize(
    ("crashes", "now", "delay"),
    [
        ([0.0], 0.0, 0.0),
        ([0.0, 1.0], 1.0, 1.0),
        ([0.0, 1.0, 2.0], 2.0, 2.0),
        ([0.0, 1.0, 2.0, 3.0], 3.0, 3.0),  # 4 s without the most
        ([0.0, 1.0, 2.0, 3.0, 4.0], 4.0, None),
        ([0.0, 1.0, 2.0, 3.0, 60.0], 60.0, 3.0),  # the first is out of the window
        ([0.0, 1.0, 2.0, 3.0, 100.0], 100.0, 0.0),
    ],
)
def test_delay(crashes: list[float], now: float, delay: float | None) -> None:
    assert POLICY.delay(crashes, now) == delay


@given(
    limit=st.integers(0, 10),
    window=st.floats(0.1, 1e4),
    backoff=st.floats(0.0, 100.0),
    more=st.floats(0.0, 1000.0),
    gaps=st.lists(st.floats(0.0, 1e4), min_size=1, max_size=30),
)
def test_delay_is_bounded_and_grows(limit: int, window: float, backoff: float, more: float, gaps: list[float]) -> None:
    policy = RestartPolicy(limit, window, backoff, backoff + more)
    crashes: list[float] = []
    now = 0.0
    for gap in gaps:
        now += gap
        crashes.append(now)
        delay = policy.delay(crashes, now)
        recent = [at for at in crashes if now - at < window]
        assert (delay is None) == (len(recent) > limit)
        if delay is None:
            continue
        assert 0.0 <= delay <= policy.backoff_max
        again = policy.delay([*crashes, now], now)
        assert again is None or again >= delay


@pytest.mark.parametrize("crashes", [1100, 5000])
def test_delay_of_a_very_large_limit(crashes: int) -> None:
    assert RestartPolicy(limit=10_000).delay([0.0] * crashes, 0.0) == 30.0
