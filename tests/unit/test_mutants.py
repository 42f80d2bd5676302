"""Random faults: every kind of fault is made, where a test could notice it, and each run makes the same ones."""

from __future__ import annotations

import ast

import pytest

from benchmarks.mutants import ROOT, TARGETS, choose, mutants

SOURCE = '''"""Text."""

from __future__ import annotations

Number = int | float


def f(x: int | None = 1, *, y: bool = True) -> int | None:
    """Return 2."""
    if not x or y and x < 3:
        return x + 4
    return {5: "a"}[x] if x in (6,) else -x
'''


def test_every_kind_of_fault() -> None:
    found = {(mutant.before, mutant.after) for mutant in mutants("f.py", SOURCE)}
    assert found == {
        ("1", "2"),
        ("True", "False"),
        ("not x or y and x < 3", "not x and (y and x < 3)"),
        ("not x", "x"),
        ("y and x < 3", "y or x < 3"),
        ("x < 3", "x <= 3"),
        ("x < 3", "x >= 3"),
        ("3", "4"),
        ("return x + 4", "return None"),
        ("x + 4", "x - 4"),
        ("4", "5"),
        ('return {5: "a"}[x] if x in (6,) else -x', "return None"),
        ('{5: "a"}[x] if x in (6,) else -x', "-x if x in (6,) else {5: 'a'}[x]"),
        ("5", "6"),
        ("x in (6,)", "x not in (6,)"),
        ("6", "7"),
        ("-x", "x"),
    }


def test_a_mutant_differs_from_the_file_by_its_fault() -> None:
    for mutant in mutants("f.py", SOURCE):
        ast.parse(mutant.source)
        lines = zip(SOURCE.split("\n"), mutant.source.split("\n"), strict=True)
        [line] = [number for number, (before, after) in enumerate(lines, 1) if before != after]
        assert line == mutant.line
        assert str(mutant).startswith(f"f.py:{line}: ")


def test_text_that_is_not_ascii_stays() -> None:
    sources = [mutant.source for mutant in mutants("f.py", 'x = ["─", 1]\n')]
    assert sources == ['x = ["─", (2)]\n']


def test_the_same_seed_chooses_the_same_mutants() -> None:
    chosen = choose(ROOT, 20, 7)
    assert [str(mutant) for mutant, _ in chosen] == [str(mutant) for mutant, _ in choose(ROOT, 20, 7)]
    assert [str(mutant) for mutant, _ in chosen] != [str(mutant) for mutant, _ in choose(ROOT, 20, 8)]
    assert {mutant.path for mutant, _ in choose(ROOT, 10**6, 7, "evacuation")} == {
        "agentcluster/scheduler/evacuation.py"
    }


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in TARGETS])
def test_every_target_has_files_and_tests(pattern: str) -> None:
    assert list(ROOT.glob(pattern))
    [tests] = [tests for each, tests in TARGETS if each == pattern]
    assert all((ROOT / path).exists() for path in tests)
