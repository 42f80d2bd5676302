"""Who takes which copies: everything once, near first, no more than a share too much."""

from __future__ import annotations

import uuid
from typing import Any

from distributed.core import Status
from distributed.scheduler import TaskGroup, TaskPrefix, TaskState, WorkerState
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.scheduler.planning.placement import CROWDED, choose_recipients

GB = 10**9


def worker(host: str, port: int, memory_limit: int = 4 * GB, used: int = 0) -> WorkerState:
    ws = WorkerState(
        address=f"tcp://{host}:{port}",
        status=Status.running,
        pid=port,
        name=str(port),
        nthreads=1,
        memory_limit=memory_limit,
        local_directory="",
        nanny="",
        server_id=uuid.uuid4().hex,
    )
    ws.metrics = {"memory": used, "spilled_bytes": {"memory": 0, "disk": 0}, "managed_bytes": 0}
    ws._memory_unmanaged_old = used
    return ws


def tasks(sizes: list[int], *holders: WorkerState) -> list[Any]:
    made = []
    for number, nbytes in enumerate(sizes):
        ts = TaskState(f"key-{number}", None, "released", group=TaskGroup("key", TaskPrefix("key")), validate=False)
        ts.nbytes = nbytes
        ts.who_has = {holders[number % len(holders)]}
        made.append(ts)
    return made


@given(
    st.lists(st.integers(0, GB), max_size=60),
    st.integers(1, 5),
    st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2"]), min_size=1, max_size=6),
)
def test_every_key_goes_to_one_recipient(sizes: list[int], holders: int, hosts: list[str]) -> None:
    old = [worker("10.0.0.1", port) for port in range(holders)]
    new = [worker(host, 100 + port) for port, host in enumerate(hosts)]
    wanted = choose_recipients(tasks(sizes, *old), new)
    assert sorted(key for keys in wanted.values() for key in keys) == sorted(f"key-{i}" for i in range(len(sizes)))
    assert set(wanted) <= {ws.address for ws in new}


@given(st.lists(st.integers(1, GB), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_none_gets_much_more_than_its_share(sizes: list[int], holders: int, recipients: int) -> None:
    old = [worker("10.0.0.1", port) for port in range(holders)]
    new = [worker("10.0.0.2", 100 + port, memory_limit=1000 * GB) for port in range(recipients)]
    moving = tasks(sizes, *old)
    by_key = {ts.key: ts.nbytes for ts in moving}
    share = sum(sizes) / recipients
    for keys in choose_recipients(moving, new).values():
        # A bundle is a share and what its last key is beyond that; one is given to who has less than a share so far.
        assert sum(by_key[key] for key in keys) <= 2 * share + max(sizes)


def test_a_worker_of_the_same_host_is_preferred_until_it_is_crowded() -> None:
    old = worker("10.0.0.1", 1)
    near, far = worker("10.0.0.1", 2), worker("10.0.0.2", 3)
    assert choose_recipients(tasks([GB], old), [far, near]) == {near.address: ["key-0"]}
    crowded = worker("10.0.0.1", 2, used=int(4 * GB * CROWDED) + 1)
    assert choose_recipients(tasks([GB], old), [far, crowded]) == {far.address: ["key-0"]}


def test_recipients_fill_in_proportion_to_their_memory_limits() -> None:
    old = [worker("10.0.0.1", port) for port in range(16)]  # one key of each, so that each key is placed alone
    large, small = worker("10.0.0.2", 100, memory_limit=30 * GB), worker("10.0.0.2", 101, memory_limit=10 * GB)
    wanted = choose_recipients(tasks([GB // 4] * 16, *old), [small, large])
    assert {address: len(keys) for address, keys in wanted.items()} == {large.address: 12, small.address: 4}


def test_small_keys_of_a_holder_stay_together() -> None:
    old = [worker("10.0.0.1", port) for port in range(4)]
    new = [worker("10.0.0.1", 100 + port) for port in range(4)]
    moving = tasks([100] * 400, *old)
    holder = {ts.key: next(iter(ts.who_has or ())) for ts in moving}
    for keys in choose_recipients(moving, new).values():
        assert len({holder[key] for key in keys}) == 1


def test_nobody_takes_anything_when_there_is_nobody() -> None:
    assert choose_recipients(tasks([1, 2], worker("10.0.0.1", 1)), []) == {}
    assert choose_recipients([], [worker("10.0.0.1", 1)]) == {}
