"""The report of scale: its line, its table, its remarks, and how several changes of a node become one."""

from __future__ import annotations

from agentcluster.model import NodeReport
from agentcluster.reports import RolloutReport, ScaleReport


def changed(node: str, **facts: object) -> NodeReport:
    return NodeReport(node, "uniform", "changed", **facts)  # type: ignore[arg-type]


def test_nothing_to_do_is_one_line() -> None:
    report = ScaleReport("scale", {}, 0.01, asked="scale(1)", workers=1)
    assert repr(report) == "scale(1): 1 worker, nothing changed"
    assert "<table>" not in report._repr_html_()


def test_what_changed_is_a_table_with_remarks() -> None:
    nodes = {"b": changed("b", new=("b-0", "b-1"), start=0.5)}
    report = ScaleReport(
        "scale",
        nodes,
        0.5,
        asked="scale(9)",
        workers=4,
        short="scale(9): the nodes have room for 4 workers",
        launched=("b",),
        ended=("c", "d"),
        left_out={"e": "no answer"},
    )
    first, header, row, *notes = repr(report).splitlines()
    assert first == "scale(9): 4 workers, 1 node changed, 0 keys (0 B) moved, 0.50 s"
    assert header.split()[:6] == ["node", "mode", "outcome", "went", "came", "stayed"]
    assert row.split()[:5] == ["b", "uniform", "changed", "-", "b-0"]
    assert notes == [
        "scale(9): the nodes have room for 4 workers",
        "launched agents on b",
        "ended the agents on c, d, which had no workers left",
        "host e is left out: no answer",
    ]
    assert all(note in report._repr_html_() for note in notes)


def test_two_changes_of_a_node_are_one() -> None:
    first = changed("a", old=("a-0",), new=("a-1", "a-2"), kept=("a-9",), keys=1, nbytes=10, start=1.0, bound=("x",))
    then = changed("a", old=("a-1", "a-9"), new=("a-3",), kept=("a-2",), keys=2, nbytes=5, stop=0.5, bound=("x", "y"))
    other = changed("b", new=("b-0",))
    same = NodeReport("b", "uniform", kept=("b-0",))
    merged = RolloutReport.merged(
        [RolloutReport("scale", {"a": first, "b": other}, 1.0), RolloutReport("scale", {"a": then, "b": same}, 2.0)]
    )
    assert (merged.mode, merged.seconds, merged.keys, merged.nbytes) == ("scale", 3.0, 3, 15)
    assert merged.nodes["b"] is other
    a = merged.nodes["a"]
    assert (a.old, a.new, a.kept) == (("a-0", "a-9"), ("a-2", "a-3"), ())
    assert (a.start, a.stop, a.bound) == (1.0, 0.5, ("x", "y"))
