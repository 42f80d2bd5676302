"""Keeping external names: the plan of who gets which name."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations, product

import pytest

from agentcluster.scheduler.managers import NamePlan, plan_names


def planned(
    external: tuple[str, ...],
    staying: Collection[str],
    leaving: Collection[str] = (),
    placeholders: Collection[str] = (),
    present: Collection[str] | None = None,
) -> NamePlan:
    """Plan with all of the node's workers and placeholders in the scheduler, unless said otherwise."""
    there = {*staying, *leaving, *placeholders} if present is None else present
    return plan_names(external, staying=staying, leaving=leaving, placeholders=placeholders, present=there)


def test_workers_that_have_the_names_keep_them() -> None:
    assert planned(("blue-0", "blue-1"), ["blue-0", "blue-1", "blue-2"]) == NamePlan()


def test_a_name_passes_from_a_leaving_worker_to_one_that_stays() -> None:
    assert planned(("blue",), ["blue-7"], ["blue"]) == NamePlan(
        vacant=("blue",), freed=("blue",), given={"blue-7": "blue"}
    )


def test_names_are_given_in_the_natural_order_of_workers() -> None:
    plan = planned(("blue-0", "blue-1"), ["blue-10", "blue-9", "blue-8"], ["blue-0", "blue-1"])
    assert plan.given == {"blue-8": "blue-0", "blue-9": "blue-1"}
    assert plan.freed == ("blue-0", "blue-1")


def test_a_name_without_a_worker_gets_a_placeholder() -> None:
    plan = planned(("blue-0", "blue-1"), ["blue-5"], ["blue-0", "blue-1"])
    assert plan.given == {"blue-5": "blue-0"}
    assert plan.start == ("blue-1",)
    assert plan.freed == ("blue-0", "blue-1")
    assert plan.stop == ()


def test_a_node_without_workers_has_placeholders_only() -> None:
    plan = planned(("blue",), [], ["blue"])
    assert plan == NamePlan(vacant=("blue",), freed=("blue",), start=("blue",))


def test_a_worker_replaces_a_placeholder_which_is_stopped() -> None:
    plan = planned(("blue",), ["blue-3"], placeholders=["blue"])
    assert plan == NamePlan(vacant=("blue",), freed=("blue",), given={"blue-3": "blue"}, stop=("blue",))


def test_a_placeholder_that_is_needed_still_is_left_alone() -> None:
    assert planned(("blue",), [], placeholders=["blue"]) == NamePlan(vacant=("blue",))


def test_a_name_that_a_worker_of_another_node_has_is_left_alone() -> None:
    plan = planned(("blue", "red"), ["blue-1"], present=["blue-1", "red"])
    assert plan.vacant == ("blue",)
    assert plan.given == {"blue-1": "blue"}


def test_a_worker_that_is_being_restarted_gets_no_name() -> None:
    plan = planned(("blue",), ["blue-1", "blue-2"], present=["blue-2"])
    assert plan.given == {"blue-2": "blue"}
    assert planned(("blue",), ["blue-1"], present=[]) == NamePlan(vacant=("blue",), start=("blue",))


EXTERNAL = ("n-0", "n-1")


@pytest.mark.parametrize("others", [(), ("n-5",), ("n-5", "n-6", "n-7")])
def test_afterwards_each_name_is_on_exactly_one_worker_or_placeholder(others: tuple[str, ...]) -> None:
    workers = (*EXTERNAL, *others)
    for size in range(len(workers) + 1):
        for staying in combinations(workers, size):
            rest = [name for name in workers if name not in staying]
            for kinds in product(["leaving", "absent"], repeat=len(rest)):
                leaving = [name for name, kind in zip(rest, kinds, strict=True) if kind == "leaving"]
                absent = [name for name, kind in zip(rest, kinds, strict=True) if kind == "absent"]
                held = [name for name in absent if name in EXTERNAL]
                plan = planned(EXTERNAL, staying, leaving, held)
                names = [plan.given.get(name, name) for name in staying]
                names += [name for name in held if name not in plan.stop] + list(plan.start)
                assert sorted(name for name in names if name in EXTERNAL) == list(EXTERNAL)
                assert {*plan.freed} == {*leaving, *plan.stop} & {*EXTERNAL}
