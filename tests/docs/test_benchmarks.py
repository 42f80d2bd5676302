"""The benchmark can be imported, and sums up what it measured as it says."""

from __future__ import annotations

import pytest

from benchmarks import common, swap


def test_the_median_is_that_of_the_middle() -> None:
    assert common.median([9.0, 1.0, 2.0]) == 2.0
    assert common.median([1.0, 2.0]) == 1.5


def test_times_is_a_ratio_of_medians() -> None:
    assert common.times([1.0, 2.0, 90.0], [20.0, 1.0, 20.0]) == 10.0
    assert common.times([0.0], [1.0]) == 0.0


def test_a_spread_names_median_and_range() -> None:
    assert common.spread([0.5, 0.25, 2.0]) == "0.50 (0.25-2.00)"


@pytest.mark.parametrize(("value", "said", "code"), [(5.0, "PASS", 0), (4.99, "FAIL", 1)])
def test_a_floor_is_the_least_that_passes(value: float, said: str, code: int) -> None:
    floor = common.Floor("times faster", value, 5)
    assert floor.row() == ("times faster", f"{value:.2f}", ">= 5", said)
    assert common.exit_code([common.Floor("other", 1, 0), floor]) == code


def test_parts_are_medians_in_order_with_shares() -> None:
    steps = [{"start": 0.3, "stop": 0.1}, {"start": 0.5, "stop": 0.1}, {"start": 0.1, "stop": 0.1, "rest": 0.9}]
    assert common.parts(steps) == [("start", "300", "75%"), ("stop", "100", "25%"), ("rest", "0", "0%")]


def test_a_table_is_aligned_under_its_title() -> None:
    assert common.titled("T", ("a", "long"), [("wide", "1")]).splitlines() == [
        "T",
        "a     long",
        "----  ----",
        "wide  1",
    ]


def _measured(workers: int, ours: float, lost: int = 0, least: int = 4) -> swap.Measured:
    scenario = swap.Scenario(swap.SMALL, swap.small_keys(400), workers=workers)
    seconds = {swap.US: [ours], swap.LOCAL: [5.0], **({swap.SSH: [12.0]} if workers == 4 else {})}
    return swap.Measured(scenario, seconds, [{"start": 1.0}], [(4, least, 8)], 400, lost)


def test_all_floors_hold_when_all_is_fast() -> None:
    found = swap.floors([_measured(4, 1.0), _measured(16, 0.5)], [0.7e9], [1e9])
    assert len(found) == 8
    assert common.exit_code(found) == 0


@pytest.mark.parametrize(
    ("measured", "moved", "failed"),
    [
        (_measured(4, 1.01), 0.7e9, ["times faster than LocalCluster", "times faster than SSHCluster"]),
        (_measured(16, 0.7), 0.7e9, ["times faster than LocalCluster"]),
        (_measured(4, 1.0, lost=1), 0.7e9, ["part of the keys still in memory"]),
        (_measured(4, 1.0, least=3), 0.7e9, ["least threads ready, part of before or after"]),
        (_measured(4, 1.0), 0.69e9, ["part of the speed of client.replicate"]),
    ],
)
def test_a_floor_that_does_not_hold_is_named(measured: swap.Measured, moved: float, failed: list[str]) -> None:
    found = [floor for floor in swap.floors([measured], [moved], [1e9]) if not floor.holds]
    assert len(found) == len(failed)
    assert all(floor.what.endswith(what) for floor, what in zip(found, failed, strict=True))


def test_the_tables_name_each_contender() -> None:
    text = "\n\n".join(swap.tables([_measured(4, 1.0)], [1e9], [2e9]))
    assert "5.00 (5.00-5.00)  5.0x" in text
    assert "replicated  2000" in text
    assert "never less than 4 during, 8 after" in text


def test_the_command_line_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        swap.main(["--repeat", "0"])
    assert "--repeat must be 1 or more" in capsys.readouterr().err
