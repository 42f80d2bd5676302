"""What people see: tables as text and as HTML, and the words in them."""

from __future__ import annotations

import html.parser
from typing import Any

import pytest

from agentcluster.model import Gpu, Hardware, Mode, NodeReport, WorkerSpec
from agentcluster.reports import Nodes, RolloutReport
from agentcluster.requests import NodeRegistration
from agentcluster.scheduler.planning.nodes import Registry
from agentcluster.tables import COLOURS, html_table, text_table
from agentcluster.wire import pickled

GIB = 2**30
STEPS = ("start", "drain", "retire", "stop")
EVIL = "<script>alert('x')</script> & co"


class Cells(html.parser.HTMLParser):
    """Collects the text of each cell, row by row, and the tags that there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def snapshot(
    specs: list[WorkerSpec], *, name: str = "n", problem: str | None = None, ngpus: int = 0, mode: str = "auto-cpu"
) -> dict[str, Any]:
    gpus = tuple(Gpu(str(i), f"GPU-{i}", "H200", 141 * GIB) for i in range(ngpus))
    node = Registry().register(NodeRegistration(name, "tcp://n:1", Hardware("host", 16, 64 * GIB, gpus)), now=0.0)
    node.adopt(Mode(mode), dict(zip(node.take_names(len(specs)), specs, strict=True)))
    node.problem = problem
    return node.snapshot()


def cpu(**settings: Any) -> WorkerSpec:
    return WorkerSpec(**{"kind": "cpu", "cls": "distributed.Nanny", **settings})


def test_columns_are_aligned_and_lines_end_without_spaces() -> None:
    assert text_table(("node", "n"), [("a", "100"), ("longer", "1")]) == "node    n\na       100\nlonger  1"
    assert text_table(("node", "n"), []) == "node  n"


def test_html_cells_are_escaped() -> None:
    table = html_table(("node", EVIL), [(EVIL, "b")])
    cells = Cells(table)
    assert cells.rows == [["node", EVIL], [EVIL, "b"]]
    assert cells.tags == {"table", "tr", "th", "td"}


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], "-"),
        ([cpu(nthreads=1, memory_limit=GIB)], "1 x 1 thread, 1.00 GiB"),
        ([cpu(nthreads=4, memory_limit=8 * GIB)] * 2, "2 x 4 threads, 8.00 GiB"),
        ([cpu(nthreads=2, memory_limit=0)], "1 x 2 threads, no memory limit"),
        ([cpu(nthreads=2), cpu(nthreads=1), cpu(nthreads=2)], "2 x 2 threads; 1 x 1 thread"),
        ([cpu(kind="gpu", nthreads=1, memory_limit=GIB)] * 3, "3 x 1 thread, 1.00 GiB, 1 GPU"),
        ([cpu(kind="custom", cls="pack.age.Cls")], "1 x pack.age.Cls"),
        ([cpu(kind="custom", cls=pickled(dict))], "1 x a class of the user's"),
    ],
)
def test_the_shape_of_workers(specs: list[WorkerSpec], expected: str) -> None:
    [row] = Nodes({"n": snapshot(specs)}).rows()
    assert dict(zip(Nodes.HEADER, row, strict=True))["workers"] == expected


def test_nodes_are_a_mapping_with_a_table_as_repr() -> None:
    one = snapshot([cpu(nthreads=4, memory_limit=8 * GIB)], name="gpu-1", ngpus=2)
    nodes = Nodes({"gpu-1": one, "b": snapshot([], problem="node 'b' cannot serve", mode="none")})
    assert nodes["gpu-1"] is one
    assert list(nodes) == ["gpu-1", "b"]
    assert len(nodes) == 2
    assert repr(nodes).splitlines() == [
        "node   state    mode      workers                  cores  memory     GPUs",
        "gpu-1  ready    auto-cpu  1 x 4 threads, 8.00 GiB  16     64.00 GiB  2",
        "b      standby  none      -                        16     64.00 GiB  0",
        "b: node 'b' cannot serve",
    ]
    assert not Nodes()
    assert repr(Nodes()) == "node  state  mode  workers  cores  memory  GPUs"


def test_nodes_in_html_have_bars_and_are_escaped() -> None:
    busy = snapshot([cpu(nthreads=4)], ngpus=2)
    busy["metrics"] = {"cpu": 95.0, "memory_used": 16 * GIB, "gpu": [10, 75], "gpu_memory_used": [0, 141 * GIB]}
    busy["held"] = {"keys": 1, "nbytes": 3 * GIB}
    lost = {**snapshot([]), "state": "lost"}
    nodes = Nodes({EVIL: snapshot([], name=EVIL, problem=EVIL), "b": busy, "c": lost})
    text = nodes._repr_html_()
    cells = Cells(text)
    gpus = "10%0 GiB75%141 GiB"
    load = ["95% of 16 cores", "16.00 GiB of 64.00 GiB", "3.00 GiB in 1 key", gpus]
    assert cells.rows[0] == list(Nodes.HTML_HEADER)
    assert cells.rows[1][0] == EVIL
    assert cells.rows[2] == ["b", "\N{BLACK CIRCLE}\N{NO-BREAK SPACE}ready", "auto-cpu", "1 x 4 threads", *load]
    assert cells.rows[3][-4:] == ["-"] * 4
    assert "script" not in cells.tags
    assert text.count("&lt;script&gt;") == 3
    assert "width:95%;background:#d64541" in text
    assert "<p>" not in Nodes({"b": snapshot([])})._repr_html_()


def report(*nodes: NodeReport, **settings: Any) -> RolloutReport:
    return RolloutReport("uniform", {node.node: node for node in nodes}, seconds=1.234, **settings)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([], "uniform: 0 nodes, 0 keys (0 B) moved, 1.23 s"),
        ([NodeReport("a", "uniform", keys=1, nbytes=5)], "uniform: 1 node, 1 key (5 B) moved, 1.23 s"),
        (
            [NodeReport("a", "uniform", keys=2, nbytes=2 * GIB), NodeReport("b", "uniform", keys=1, nbytes=GIB)],
            "uniform: 2 nodes, 3 keys (3.00 GiB) moved, 1.23 s",
        ),
    ],
)
def test_a_report_in_one_line(nodes: list[NodeReport], expected: str) -> None:
    assert report(*nodes).summary() == expected


def test_a_plan_is_not_told_as_a_change() -> None:
    assert report(NodeReport("a", "uniform"), dry_run=True).summary() == ("uniform: planned only, nothing was changed")


def test_a_report_as_text() -> None:
    done = report(
        NodeReport(
            "a", "uniform", "changed", old=("a-0", "a-1", "a-2"), new=("a-3",), keys=2, start=0.5, drain=3, retire=0.25
        ),
        NodeReport("b", "uniform", "failed", old=(), new=("b-1", "b-2"), kept=("b-0",), nbytes=10, stop=2),
    )
    assert (done.keys, done.nbytes) == (2, 10)
    assert repr(done).splitlines()[0] == done.summary()
    assert cells(repr(done)) == [
        [
            "node",
            "mode",
            "outcome",
            "went",
            "came",
            "stayed",
            "keys moved",
            "bytes moved",
            "start",
            "drain",
            "retire",
            "stop",
        ],
        ["a", "uniform", "changed", "a-0 … a-2 (3)", "a-3", "-", "2", "0 B", "0.50 s", "3.00 s", "0.25 s", "0.00 s"],
        ["b", "uniform", "failed", "-", "b-1 b-2", "b-0", "0", "10 B", "0.00 s", "0.00 s", "0.00 s", "2.00 s"],
    ]


def cells(text: str) -> list[list[str]]:
    """Return the cells of a table as text, without the line above it."""
    rows = (line.split("  ") for line in text.splitlines()[1:])
    return [[cell.strip() for cell in row if cell.strip()] for row in rows]


def test_what_was_unusual_is_shown_and_why() -> None:
    done = report(
        NodeReport("a", "uniform", "changed", strategy="replace", because="asked for", rerun=2),
        NodeReport("b", "uniform", "rolled back", bound=("x (resources {'GPU': 1})", "and 7 more")),
    )
    assert done.rerun == 2
    table = [dict(zip(done.header(), row, strict=True)) for row in done.rows()]
    assert [(row["outcome"], row["tasks rerun"]) for row in table] == [("changed, replace", "2"), ("rolled back", "0")]
    notes = [
        "a: old workers went first: asked for",
        "b: these tasks have no worker left that can run them: x (resources {'GPU': 1}), and 7 more",
    ]
    assert repr(done).splitlines()[-2:] == notes
    text = Cells(done._repr_html_()).text
    assert all(note in text for note in notes)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"given_up": 2, "given_up_nbytes": 2 * GIB, "lost": 2}, "2 keys (2.00 GiB) lost"),
        ({"given_up": 2, "given_up_nbytes": GIB, "lost": 1}, "2 keys (1.00 GiB) given up, 1 of them lost"),
        ({"given_up": 1, "keys": 3}, "3 keys moved, 1 key (0 B) given up, 0 of them lost"),
    ],
)
def test_what_was_given_up_is_not_told_as_moved(numbers: dict[str, int], says: str) -> None:
    done = report(NodeReport("a", "uniform", "changed", **numbers), NodeReport("b", "uniform", "changed"))  # type: ignore[arg-type]
    assert done.summary() == f"uniform: 2 nodes, {says}, 1.23 s"
    table = [dict(zip(done.header(), row, strict=True)) for row in done.rows()]
    lost, given_up = numbers.get("lost", 0), numbers["given_up"]
    columns = ("keys lost", "keys to compute again")
    assert [[row[each] for each in columns] for row in table] == [[str(lost), str(given_up - lost)], ["0", "0"]]
    assert COLOURS["bad"] in done._repr_html_()
    plan = report(NodeReport("a", "uniform", given_up=2, given_up_nbytes=GIB), dry_run=True)
    assert plan.summary() == "uniform: planned only, nothing was changed; it would give up 2 keys (1.00 GiB)"
    assert dict(zip(plan.header(), plan.rows()[0], strict=True))["keys to give up"] == "2"


def test_a_plan_tells_what_would_be() -> None:
    four = "1 x 4 threads"
    plan = report(
        NodeReport("a", "uniform", old=("a-0", "a-1", "a-2"), new=("a-new-0",), shape=four, keys=2, nbytes=10),
        NodeReport("b", "uniform", strategy="replace", because="no room", old=("b-0",), new=("b-1",), shape="1 GPU"),
        NodeReport("c", "uniform", new=("c-new-0",), shape=four, kept=("c-0",)),
        NodeReport("d", "none", old=("d-0",)),
        NodeReport("e", "uniform", kept=("e-0",)),
        dry_run=True,
    )
    assert repr(plan).splitlines() == [
        "uniform: planned only, nothing was changed",
        "node  mode     order                     go             come           stay  keys to move  bytes to move",
        "a     uniform  new start, then old stop  a-0 … a-2 (3)  1 x 4 threads  -     2             10 B",
        "b     uniform  old stop, then new start  b-0            1 GPU          -     0             0 B",
        "c     uniform  new start                 -              1 x 4 threads  c-0   0             0 B",
        "d     none     old stop                  d-0            -              -     0             0 B",
        "e     uniform  nothing changes           -              -              e-0   0             0 B",
        "b: old workers go first: no room",
    ]
    assert Cells(plan._repr_html_()).rows == [list(plan.header()), *map(list, plan.rows())]


def test_a_report_in_html_is_escaped() -> None:
    node = NodeReport(EVIL, EVIL, old=(EVIL,), because=EVIL, bound=(EVIL,))
    cells = Cells(RolloutReport(EVIL, {EVIL: node}, seconds=1)._repr_html_())
    assert cells.rows[1][:4] == [EVIL, EVIL, "unchanged", EVIL]
    assert cells.tags == {"div", "style", "p", "table", "tr", "th", "td"}


def test_workers_that_keep_their_names_are_told_apart() -> None:
    nodes = {"a": NodeReport("a", "uniform", "changed", old=("7",), new=("7",))}
    header, row = RolloutReport("uniform", nodes, 1.0).header(), RolloutReport("uniform", nodes, 1.0).rows()[0]
    told = dict(zip(header, row, strict=True))
    assert (told["went"], told["came"]) == ("7", "7 (new)")


def test_a_remark_about_several_nodes_is_made_once() -> None:
    why = "they have too little memory for both"
    nodes = {name: NodeReport(name, "uniform", "changed", because=why) for name in "ab"}
    assert RolloutReport("uniform", nodes, 1.0).notes() == [f"a, b: old workers went first: {why}"]
