"""What people see of nodes and changes: tables, with bars where they are HTML.

Pure rendering; the values come from :mod:`agentcluster.model` and from ``get_nodes``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes, format_time

from agentcluster.model import NodeReport
from agentcluster.tables import Markup, Tone, amounts, bar, count, grid, html_table, page, paragraph, text_table, toned
from agentcluster.wire import from_wire


def _workers(names: Sequence[str]) -> str:
    """Say names briefly: ``gpu-1-0 … gpu-1-3``."""
    if len(names) <= 2:
        return " ".join(names) or "-"
    return f"{names[0]} … {names[-1]} ({len(names)})"


def shape_of(plan: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what workers are: ``2 x 4 threads, 8.00 GiB``.

    Parameters
    ----------
    plan
        Worker name -> a :class:`~agentcluster.model.WorkerSpec` as plain data.
    """
    shapes: dict[str, int] = {}
    for spec in plan.values():
        threads = spec.get("nthreads")
        memory = spec.get("memory_limit")
        cls = spec.get("cls", "")
        parts = [count(threads, "thread") if threads else cls if isinstance(cls, str) else "a class of the user's"]
        if memory is not None:
            parts.append(format_bytes(memory) if memory else "no memory limit")
        if spec.get("kind") == "gpu":
            parts.append("1 GPU")
        shape = ", ".join(parts)
        shapes[shape] = shapes.get(shape, 0) + 1
    return "; ".join(f"{number} x {shape}" for shape, number in shapes.items()) or "-"


def _order(node: NodeReport) -> str:
    """Say in which order old and new workers are to take turns."""
    if node.old and node.new:
        return "new start, then old stop" if node.strategy == "surge" else "old stop, then new start"
    return "new start" if node.new else "old stop" if node.old else "nothing changes"


#: State of a node -> how it is shown.
TONES: Mapping[str, Tone] = {
    "ready": "good",
    "standby": "calm",
    "swapping": "busy",
    "joining": "busy",
    "lost": "bad",
    "refused": "bad",
}


#: GPUs of a node of which each has a line of its own.
ROW = 2


class Nodes(Mapping[str, Mapping[str, Any]]):
    """Node name -> what is known of the node, with a table as its repr.

    Parameters
    ----------
    snapshots
        As the call ``get_nodes`` returns them.
    """

    HEADER = ("node", "state", "mode", "workers", "cores", "memory", "GPUs")
    HTML_HEADER = ("node", "state", "mode", "workers", "CPU", "memory", "data", "GPUs")

    def __init__(self, snapshots: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._snapshots = dict(snapshots or {})

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self._snapshots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def kinds(self) -> Counter[str]:
        """Return kind -> number of workers."""
        return Counter(spec["kind"] for node in self._snapshots.values() for spec in node["plan"].values())

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row of text per node."""
        return [
            (
                name,
                node["state"],
                node["mode"],
                shape_of(node["plan"]),
                str(node["hardware"]["cpus"]),
                format_bytes(node["hardware"]["memory"]),
                str(len(node["hardware"]["gpus"])),
            )
            for name, node in self._snapshots.items()
        ]

    def _problems(self) -> list[str]:
        return [f"{name}: {node['problem']}" for name, node in self._snapshots.items() if node["problem"]]

    def __repr__(self) -> str:
        return "\n".join([text_table(self.HEADER, self.rows()), *self._problems()])

    def html_rows(self) -> list[tuple[str, ...]]:
        """Return one row per node with its load, as bars."""
        return [(name, *_seen(node)) for name, node in self._snapshots.items()]

    def _repr_html_(self) -> str:
        return page(html_table(self.HTML_HEADER, self.html_rows()), *map(paragraph, self._problems()))


def _seen(node: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a node's cells beside its name; of a lost one nothing is known but that."""
    hardware, load, held = node["hardware"], node["metrics"], node.get("held", {})
    first = (toned(node["state"], TONES.get(node["state"], "still")), node["mode"], shape_of(node["plan"]))
    if node["state"] == "lost":
        return (*first, "-", "-", "-", "-")
    gpus = [*zip(hardware["gpus"], load["gpu"], load["gpu_memory_used"], strict=False)]
    bars = [each for gpu, busy, used in gpus for each in (bar(busy / 100, f"{busy}%"), _of_gpu(used, gpu["memory"]))]
    return (
        *first,
        bar(load["cpu"] / 100, f"{load['cpu']:.0f}% of {count(hardware['cpus'], 'core')}"),
        _filled(load["memory_used"], hardware["memory"]),
        data_held(held) if held.get("keys") else "-",
        grid(bars, 2 if len(gpus) <= ROW else 4) if bars else str(len(hardware["gpus"]) or "-"),
    )


def data_held(held: Mapping[str, int]) -> str:
    """Say what a node's workers hold: ``1.00 GiB in 3 keys``."""
    return f"{format_bytes(held['nbytes'])} in {count(held['keys'], 'key')}"


def _of_gpu(used: int, whole: int) -> Markup:
    """Return a short bar of a GPU's memory."""
    return bar(used / whole if whole else 0.0, f"{used / 2**30:.0f} GiB")


def _filled(used: int, whole: int) -> Markup:
    """Return a bar of memory."""
    return bar(used / whole if whole else 0.0, f"{format_bytes(used)} of {format_bytes(whole)}")


@dataclass(frozen=True, repr=False)
class Report:
    """What a change of workers did.

    Attributes
    ----------
    mode
        The mode that was asked for.
    nodes
        Node name -> what was done there.
    seconds
        How long all of it took.
    dry_run
        Whether it was only planned.

    Examples
    --------
    >>> Report("uniform", {}, seconds=0.5).summary()
    'uniform: 0 nodes, 0 keys (0 B) moved, 0.50 s'
    """

    mode: str
    nodes: Mapping[str, NodeReport]
    seconds: float
    dry_run: bool = False

    @property
    def keys(self) -> int:
        """Keys that were moved, over all nodes."""
        return sum(node.keys for node in self.nodes.values())

    @property
    def nbytes(self) -> int:
        """Bytes that were moved, over all nodes."""
        return sum(node.nbytes for node in self.nodes.values())

    @property
    def rerun(self) -> int:
        """Tasks that were run again elsewhere because their time was up, over all nodes."""
        return sum(node.rerun for node in self.nodes.values())

    def header(self) -> tuple[str, ...]:
        """Return what the columns of :meth:`rows` are."""
        if self.dry_run:
            return ("node", "mode", "order", "go", "come", "stay", "keys to move", "bytes to move")
        rerun = ("tasks rerun",) if self.rerun else ()
        moved = ("keys moved", "bytes moved", *rerun)
        return ("node", "mode", "outcome", "went", "came", "stayed", *moved, "start", "drain", "retire", "stop")

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row of text per node."""
        return [self._row(node) for node in self.nodes.values()]

    def _row(self, node: NodeReport) -> tuple[str, ...]:
        workers = (_workers(node.old), _workers(node.new), _workers(node.kept))
        moved = (str(node.keys), format_bytes(node.nbytes))
        if self.dry_run:
            # Those that would come have no names yet.
            go, _, stay = workers
            return (node.node, node.mode, _order(node), go, node.shape or "-", stay, *moved)
        outcome = f"{node.outcome}, {node.strategy}" if node.strategy != "surge" else node.outcome
        seconds = (f"{each:.2f} s" for each in (node.start, node.drain, node.retire, node.stop))
        rerun = (str(node.rerun),) if self.rerun else ()
        return (node.node, node.mode, outcome, *workers, *moved, *rerun, *seconds)

    def notes(self) -> list[str]:
        """Return what else is to be said of nodes, one line each."""
        told = []
        for node in self.nodes.values():
            if node.because:
                told.append(f"{node.node}: old workers {'go' if self.dry_run else 'went'} first: {node.because}")
            if node.bound:
                told.append(f"{node.node}: no worker could run these tasks any more: {', '.join(node.bound)}")
        return told

    def summary(self) -> str:
        """Return the change in one line."""
        if self.dry_run:
            return f"{self.mode}: planned only, nothing was changed"
        moved = f"{count(self.keys, 'key')} ({format_bytes(self.nbytes)}) moved"
        return f"{self.mode}: {count(len(self.nodes), 'node')}, {moved}, {self.seconds:.2f} s"

    def __repr__(self) -> str:
        return "\n".join([self.summary(), text_table(self.header(), self.rows()), *self.notes()])

    def _repr_html_(self) -> str:
        return page(paragraph(self.summary()), html_table(self.header(), self.rows()), *map(paragraph, self.notes()))

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Report:
        """Read what the call ``reprovision_nodes`` answered."""
        nodes = {name: from_wire(NodeReport, each) for name, each in answer["nodes"].items()}
        return cls(answer["mode"], nodes, answer["seconds"], answer["dry_run"])

    @classmethod
    def merged(cls, reports: Sequence[Report]) -> Report:
        """Return several changes, one after the other, as one."""
        return cls(
            ", ".join(dict.fromkeys(report.mode for report in reports)),
            {name: node for report in reports for name, node in report.nodes.items()},
            sum(report.seconds for report in reports),
            any(report.dry_run for report in reports),
        )


@dataclass(frozen=True)
class Decision:
    """One thing that was done, or said.

    Attributes
    ----------
    when
        Seconds since the epoch.
    saw
        What tasks needed.
    decided
        What changed on which node.
    why
        Why, where that does not speak for itself.
    took
        Seconds.
    workers
        Kind of worker -> how many there were afterwards.
    """

    when: float
    saw: str
    decided: str
    why: str
    took: float
    workers: Mapping[str, int]


class AdaptiveLog(Sequence[Decision]):
    """Decisions, oldest first, with a table as their repr.

    Examples
    --------
    >>> AdaptiveLog()
    nothing was decided yet
    >>> log = AdaptiveLog([Decision(0.0, "120 'train' tasks need GPU=1", "local: +2 -2 auto-gpu", "", 4.0, {"gpu": 2})])
    >>> log.timeline()
    ([0.0], {'gpu': [2]})
    """

    HEADER = ("when", "saw", "decided", "why", "took", "workers")

    def __init__(self, decisions: Sequence[Decision] = ()) -> None:
        self._decisions = tuple(decisions)

    def __getitem__(self, index: Any) -> Any:
        return self._decisions[index]

    def __len__(self) -> int:
        return len(self._decisions)

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row of text per decision."""
        return [
            (
                time.strftime("%H:%M:%S", time.localtime(each.when)),
                each.saw,
                each.decided,
                each.why,
                format_time(each.took),
                amounts(each.workers),
            )
            for each in self._decisions
        ]

    def __repr__(self) -> str:
        return text_table(self.HEADER, self.rows()) if self._decisions else "nothing was decided yet"

    def _repr_html_(self) -> str:
        return page(html_table(self.HEADER, self.rows()))

    def timeline(self) -> tuple[list[float], dict[str, list[int]]]:
        """Return how many workers of each kind there were, for a plot with steps.

        Returns
        -------
        times : list of float
            Seconds since the epoch, one for each decision.
        workers : dict
            Kind of worker -> their number from each of those times on, lists of the same length.
        """
        kinds = dict.fromkeys(kind for each in self._decisions for kind in each.workers)
        return (
            [each.when for each in self._decisions],
            {kind: [each.workers.get(kind, 0) for each in self._decisions] for kind in kinds},
        )
