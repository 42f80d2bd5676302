"""Which workers come in place of which: pairs of old and new workers, and what a bound task may run on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.scheduler.planning.change import Lineage, pair

NUMBERS = st.integers(0, 12)


def some(prefix: str, number: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(number)]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (2, 2, {"o0": ("n0",), "o1": ("n1",)}),
        (4, 2, {"o0": ("n0",), "o1": ("n0",), "o2": ("n1",), "o3": ("n1",)}),
        (2, 4, {"o0": ("n0", "n1"), "o1": ("n2", "n3")}),
        (3, 1, {"o0": ("n0",), "o1": ("n0",), "o2": ("n0",)}),
        (1, 2, {"o0": ("n0", "n1")}),
        (2, 0, {"o0": (), "o1": ()}),
        (0, 2, {}),
    ],
)
def test_pairs(old: int, new: int, expected: dict[str, tuple[str, ...]]) -> None:
    assert pair(some("o", old), some("n", new)) == expected


@given(NUMBERS, NUMBERS)
def test_pairs_are_even_and_in_order(old: int, new: int) -> None:
    pairs = pair(some("o", old), some("n", new))
    assert list(pairs) == some("o", old)
    if not (old and new):
        assert not any(pairs.values())
        return
    assert {each for successors in pairs.values() for each in successors} == set(some("n", new))
    sizes = {len(successors) for successors in pairs.values()}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    shared = [sum(each in successors for successors in pairs.values()) for each in some("n", new)]
    assert max(shared) - min(shared) <= 1
    order = [int(each[1:]) for successors in pairs.values() for each in successors]
    assert order == sorted(order)


def resolved(lineage: Lineage, address: str, there: Sequence[str], node: Sequence[str] = ()) -> set[str]:
    return set(lineage.resolve(address, there.__contains__, lambda departed: node))


def test_a_task_follows_its_worker() -> None:
    lineage = Lineage()
    assert resolved(lineage, "o0", ["o0"]) == {"o0"}
    assert resolved(lineage, "o0", [], ["n0"]) == set(), "nothing is known of it"
    lineage.leave("o0", "n-0", "n")
    assert resolved(lineage, "o0", ["o0", "n0"]) == {"o0"}, "it is there yet"
    assert resolved(lineage, "o0", ["k0"], ["o0", "k0"]) == {"k0"}, "any of its node"
    lineage.succeed(["o0", "o1"], ["n0", "n1"])
    assert resolved(lineage, "o0", ["n0", "n1", "k0"], ["k0"]) == {"n0"}
    assert resolved(lineage, "o1", ["n0", "n1"]) == set(), "it never left"
    lineage.leave("n0", "n-1", "n")
    lineage.succeed(["n0"], ["m0", "m1"])
    assert resolved(lineage, "o0", ["m0", "m1"]) == {"m0", "m1"}
    lineage.leave("m0", "n-2", "n")
    assert resolved(lineage, "o0", ["m1"]) == {"m1"}


def test_workers_that_change_places_end_the_search() -> None:
    lineage = Lineage()
    for address in ("a", "b"):
        lineage.leave(address, f"name of {address}", "n")
    lineage.succeed(["a"], ["b"])
    lineage.succeed(["b"], ["a"])
    assert resolved(lineage, "a", []) == set()
    assert resolved(lineage, "a", ["b"]) == {"b"}


def test_the_oldest_are_forgotten() -> None:
    lineage = Lineage(kept=2)
    for number in range(3):
        lineage.leave(f"a{number}", "same name", "n")
    assert lineage.departed("a0") is None
    assert lineage.named("same name") == "a2"
    assert lineage.of_node("n") == ["a1", "a2"]
    lineage.leave("b", "other", "n")
    lineage.leave("c", "third", "n")
    assert lineage.named("same name") is None
    assert lineage.of_node("n") == ["b", "c"]
