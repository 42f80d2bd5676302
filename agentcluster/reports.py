"""Reports and tables that people read: nodes, rollouts, scaling, and adaptive decisions.

Pure rendering; the values come from :mod:`agentcluster.model` and from the call ``get_nodes``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, overload

from dask.utils import format_bytes, format_time

from agentcluster.errors import by_reason
from agentcluster.model import NodeReport
from agentcluster.tables import Markup, Tone, amounts, bar, count, grid, html_table, page, paragraph, text_table, toned
from agentcluster.wire import from_wire

#: A node as plain data, as ``get_nodes`` returns it; the documentation of the interface lists the keys.
NodeSnapshot = Mapping[str, Any]


def _workers(names: Sequence[str]) -> str:
    """Shorten a list of names: ``gpu-1-0 … gpu-1-3 (4)``."""
    if len(names) <= 2:
        return " ".join(names) or "-"
    return f"{names[0]} … {names[-1]} ({len(names)})"


def shape_of(plan: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the workers of a plan, alike ones together.

    Parameters
    ----------
    plan
        Worker name -> a :class:`~agentcluster.model.WorkerSpec` as plain data.

    Returns
    -------
    str
        Such as ``2 x 4 threads, 8.00 GiB``; ``-`` without workers.
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


#: State of a node -> tone in which it is shown.
TONES: Mapping[str, Tone] = {
    "ready": "good",
    "standby": "calm",
    "swapping": "busy",
    "joining": "busy",
    "lost": "bad",
    "refused": "bad",
}


#: Number of GPUs of a node up to which each has a line to itself.
ROW = 2


class Nodes(Mapping[str, NodeSnapshot]):
    """Mapping from a node's name to its state, mode, plan, workers, hardware and load; a table as its repr.

    Parameters
    ----------
    snapshots
        As the call ``get_nodes`` returns them.
    """

    HEADER = ("node", "state", "mode", "workers", "cores", "memory", "GPUs")
    HTML_HEADER = ("node", "state", "mode", "workers", "CPU", "memory", "data", "GPUs")

    def __init__(self, snapshots: Mapping[str, NodeSnapshot] | None = None) -> None:
        self._snapshots = dict(snapshots or {})

    def __getitem__(self, name: str) -> NodeSnapshot:
        return self._snapshots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def kinds(self) -> Counter[str]:
        """Count the workers of each kind.

        Returns
        -------
        Counter
            Kind -> number of workers.
        """
        return Counter(spec["kind"] for node in self._snapshots.values() for spec in node["plan"].values())

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table as text.

        Returns
        -------
        list of tuple of str
            One row per node.
        """
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
        """Return the rows of the HTML table, with the load as bars.

        Returns
        -------
        list of tuple of str
            One row per node.
        """
        return [(name, *_cells(node)) for name, node in self._snapshots.items()]

    def _repr_html_(self) -> str:
        return page(html_table(self.HTML_HEADER, self.html_rows()), *map(paragraph, self._problems()))


def _cells(node: NodeSnapshot) -> tuple[str, ...]:
    """Return a node's cells beside its name; the load of a lost node is unknown."""
    hardware, load, held = node["hardware"], node["metrics"], node.get("held", {})
    first = (toned(node["state"], TONES.get(node["state"], "still")), node["mode"], shape_of(node["plan"]))
    if node["state"] == "lost":
        return (*first, "-", "-", "-", "-")
    gpus = [*zip(hardware["gpus"], load["gpu"], load["gpu_memory_used"], strict=False)]
    bars = [
        each for gpu, busy, used in gpus for each in (bar(busy / 100, f"{busy}%"), _gpu_memory(used, gpu["memory"]))
    ]
    return (
        *first,
        bar(load["cpu"] / 100, f"{load['cpu']:.0f}% of {count(hardware['cpus'], 'core')}"),
        _memory(load["memory_used"], hardware["memory"]),
        data_held(held) if held.get("keys") else "-",
        grid(bars, 2 if len(gpus) <= ROW else 4) if bars else str(len(hardware["gpus"]) or "-"),
    )


def data_held(held: Mapping[str, int]) -> str:
    """Describe the data that a node's workers hold.

    Parameters
    ----------
    held
        ``keys`` and ``nbytes``, as ``get_nodes`` returns them.

    Returns
    -------
    str
        Such as ``1.00 GiB in 3 keys``.
    """
    return f"{format_bytes(held['nbytes'])} in {count(held['keys'], 'key')}"


def _gpu_memory(used: int, total: int) -> Markup:
    """Return a short bar of a GPU's memory."""
    return bar(used / total if total else 0.0, f"{used / 2**30:.0f} GiB")


def _memory(used: int, total: int) -> Markup:
    """Return a bar of a host's memory."""
    return bar(used / total if total else 0.0, f"{format_bytes(used)} of {format_bytes(total)}")


@dataclass(frozen=True, repr=False)
class RolloutReport:
    """Result of a change of workers; a table as its repr.

    Attributes
    ----------
    mode
        Name of the mode that was asked for; ``undo`` for one that was undone.
    nodes
        Node name -> what was done there.
    seconds
        Duration of the whole change.
    dry_run
        Whether it was only planned.

    Examples
    --------
    >>> RolloutReport("uniform", {}, seconds=0.5).summary()
    'uniform: 0 nodes, 0 keys (0 B) moved, 0.50 s'
    """

    mode: str
    nodes: Mapping[str, NodeReport]
    seconds: float
    dry_run: bool = False

    @property
    def keys(self) -> int:
        """Number of keys that were moved, over all nodes."""
        return sum(node.keys for node in self.nodes.values())

    @property
    def nbytes(self) -> int:
        """Number of bytes that were moved, over all nodes."""
        return sum(node.nbytes for node in self.nodes.values())

    @property
    def given_up(self) -> int:
        """Number of keys that were given up with their workers (``drain="now"``), over all nodes."""
        return sum(node.given_up for node in self.nodes.values())

    @property
    def lost(self) -> int:
        """Number of keys that were given up and cannot be computed again, over all nodes."""
        return sum(node.lost for node in self.nodes.values())

    @property
    def rerun(self) -> int:
        """Number of tasks that ran longer than the drain timeout and were run again elsewhere, over all nodes."""
        return sum(node.rerun for node in self.nodes.values())

    def header(self) -> tuple[str, ...]:
        """Return the titles of the columns of :meth:`rows`.

        Returns
        -------
        tuple of str
            Other columns for a dry run than for a change.
        """
        if self.dry_run:
            given_up = ("keys to give up", "bytes to give up") if self.given_up else ()
            return ("node", "mode", "order", "go", "come", "stay", "keys to move", "bytes to move", *given_up)
        given_up = ("keys lost", "keys to compute again") if self.given_up else ()
        rerun = ("tasks rerun",) if self.rerun else ()
        moved = ("keys moved", "bytes moved", *given_up, *rerun)
        return ("node", "mode", "outcome", "went", "came", "stayed", *moved, "start", "drain", "retire", "stop")

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table as text.

        Returns
        -------
        list of tuple of str
            One row per node.
        """
        return [self._row(node) for node in self.nodes.values()]

    def _row(self, node: NodeReport) -> tuple[str, ...]:
        came = _workers(node.new)
        if set(node.old) & set(node.new):  # those of a cluster manager keep their names
            came = f"{came} (new)"
        workers = (_workers(node.old), came, _workers(node.kept))
        moved = (str(node.keys), format_bytes(node.nbytes))
        if self.dry_run:
            # New workers have no names yet.
            go, _, stay = workers
            given_up = (str(node.given_up), format_bytes(node.given_up_nbytes)) if self.given_up else ()
            return (node.node, node.mode, _order(node), go, node.shape or "-", stay, *moved, *given_up)
        outcome = f"{node.outcome}, {node.strategy}" if node.strategy != "surge" else node.outcome
        seconds = (f"{each:.2f} s" for each in (node.start, node.drain, node.retire, node.stop))
        given_up = (str(node.lost), str(node.given_up - node.lost)) if self.given_up else ()
        rerun = (str(node.rerun),) if self.rerun else ()
        return (node.node, node.mode, outcome, *workers, *moved, *given_up, *rerun, *seconds)

    def notes(self) -> list[str]:
        """Return remarks that have no column.

        Returns
        -------
        list of str
            One line each, with the nodes: why old workers went first, and tasks that no worker can run now.
        """
        notes = []
        for node in self.nodes.values():
            if node.because:
                notes.append((node.node, f"old workers {'go' if self.dry_run else 'went'} first: {node.because}"))
            if node.followed:
                bound = "will be bound" if self.dry_run else "were bound"
                notes.append((node.node, f"{count(node.followed, 'task')} {bound} to the successors of old workers"))
            if node.bound:
                tasks = ", ".join(node.bound)
                notes.append((node.node, f"these tasks have no worker left that can run them: {tasks}"))
        return by_reason(notes)

    def summary(self) -> str:
        """Return the change in one line.

        Returns
        -------
        str
            Such as ``uniform: 2 nodes, 3 keys (1.00 GiB) moved, 0.50 s``.
        """
        if self.dry_run:
            loss = f"; it would give up {self._given_up()}" if self.given_up else ""
            return f"{self.mode}: planned only, nothing was changed{loss}"
        return f"{self.mode}: {count(len(self.nodes), 'node')}, {self._moved()}"

    def _moved(self) -> str:
        took = f"{self.seconds:.2f} s"
        if not self.given_up:
            return f"{count(self.keys, 'key')} ({format_bytes(self.nbytes)}) moved, {took}"
        moved = f"{count(self.keys, 'key')} moved, " if self.keys else ""
        if self.lost == self.given_up:
            return f"{moved}{self._given_up()} lost, {took}"
        return f"{moved}{self._given_up()} given up, {self.lost} of them lost, {took}"

    def _given_up(self) -> str:
        nbytes = sum(node.given_up_nbytes for node in self.nodes.values())
        return f"{count(self.given_up, 'key')} ({format_bytes(nbytes)})"

    def __repr__(self) -> str:
        table = [text_table(self.header(), self.rows())] if self._has_table() else []
        return "\n".join([self.summary(), *table, *self.notes()])

    def _repr_html_(self) -> str:
        table = [html_table(self.header(), self.rows())] if self._has_table() else []
        summary = toned(self.summary(), "bad") if self.given_up else self.summary()
        return page(paragraph(summary), *table, *map(paragraph, self.notes()))

    def _has_table(self) -> bool:
        return True

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> RolloutReport:
        """Parse the answer of a call that changes nodes, such as ``reprovision_nodes``.

        Parameters
        ----------
        answer
            The answer, as plain data.

        Returns
        -------
        RolloutReport
            The report.

        Raises
        ------
        ConfigError
            When the answer has a key that this version does not know.
        """
        nodes = {name: from_wire(NodeReport, each) for name, each in answer["nodes"].items()}
        return RolloutReport(answer["mode"], nodes, answer["seconds"], answer["dry_run"])

    @classmethod
    def merged(cls, reports: Sequence[RolloutReport]) -> RolloutReport:
        """Combine the reports of several changes, one after the other.

        Parameters
        ----------
        reports
            The reports, in the order of the changes; at least one.

        Returns
        -------
        RolloutReport
            One report; a node that changed more than once has the sum of its changes.
        """
        nodes: dict[str, NodeReport] = {}
        for report in reports:
            for name, node in report.nodes.items():
                nodes[name] = _sum(nodes[name], node) if name in nodes else node
        return RolloutReport(
            ", ".join(dict.fromkeys(report.mode for report in reports)),
            nodes,
            sum(report.seconds for report in reports),
            any(report.dry_run for report in reports),
        )


def _order(node: NodeReport) -> str:
    """Return the order in which old and new workers take turns."""
    if node.old and node.new:
        return "new start, then old stop" if node.strategy == "surge" else "old stop, then new start"
    return "new start" if node.new else "old stop" if node.old else "nothing changes"


def _sum(first: NodeReport, then: NodeReport) -> NodeReport:
    """Return two changes of a node as one; workers that came and went in between are left out."""
    if then.outcome == "unchanged":
        return first
    return replace(
        then,
        old=(*first.old, *(name for name in then.old if name not in first.new)),
        new=(*(name for name in first.new if name not in then.old), *then.new),
        kept=tuple(name for name in then.kept if name not in first.new),
        because=then.because or first.because,
        bound=tuple(dict.fromkeys((*first.bound, *then.bound))),
        **{key: getattr(first, key) + getattr(then, key) for key in _SUMMED},
    )


_SUMMED = (
    "keys",
    "nbytes",
    "given_up",
    "given_up_nbytes",
    "lost",
    "rerun",
    "followed",
    "start",
    "drain",
    "retire",
    "stop",
)


@dataclass(frozen=True, repr=False)
class ScaleReport(RolloutReport):
    """Result of ``scale``; a line, with a table of the nodes that changed, as its repr.

    Attributes
    ----------
    mode, nodes, seconds, dry_run
        As in :class:`RolloutReport`; `nodes` has those that changed.
    asked
        The call, such as ``scale(4)``.
    workers
        Number of workers now.
    short
        Sentence about what there is no capacity for; None where there is capacity for all.
    launched, ended
        Standby hosts whose agents were launched, and those whose agents were ended.
    left_out
        Standby host that could not be launched -> reason.

    Examples
    --------
    >>> ScaleReport("scale", {}, seconds=0.1, asked="scale(2)", workers=2)
    scale(2): 2 workers, nothing changed
    """

    asked: str = ""
    workers: int = 0
    short: str | None = None
    launched: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the change in one line.

        Returns
        -------
        str
            Such as ``scale(1): 1 worker, 1 node changed, 4 keys (1.00 MiB) moved, 0.30 s``.
        """
        changed = f"{count(len(self.nodes), 'node')} changed, {self._moved()}" if self.nodes else "nothing changed"
        return f"{self.asked}: {count(self.workers, 'worker')}, {changed}"

    def notes(self) -> list[str]:
        """Return remarks that have no column.

        Returns
        -------
        list of str
            One line each: a shortfall, and standby hosts that were launched, ended, or could not be launched.
        """
        notes = [self.short] if self.short else []
        if self.launched:
            notes.append(f"launched agents on {', '.join(self.launched)}")
        if self.ended:
            notes.append(f"ended the agents on {', '.join(self.ended)}, which had no workers left")
        notes += [f"host {name} is left out: {why}" for name, why in self.left_out.items()]
        return [*notes, *super().notes()]

    def _has_table(self) -> bool:
        return bool(self.nodes)


@dataclass(frozen=True)
class Decision:
    """Decision of adaptive scaling, or its message.

    Attributes
    ----------
    when
        Seconds since the epoch.
    saw
        Demand of the tasks.
    decided
        Changes of the nodes.
    why
        Reason, where the demand alone does not explain the change.
    took
        Duration in seconds.
    workers
        Kind of worker -> number of workers afterwards.
    """

    when: float
    saw: str
    decided: str
    why: str
    took: float
    workers: Mapping[str, int]


class AdaptiveLog(Sequence[Decision]):
    """Decisions of adaptive scaling, oldest first; a table as their repr.

    Parameters
    ----------
    decisions
        The decisions.

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

    @overload
    def __getitem__(self, index: int) -> Decision: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Decision | Self:
        return type(self)(self._decisions[index]) if isinstance(index, slice) else self._decisions[index]

    def __len__(self) -> int:
        return len(self._decisions)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table as text.

        Returns
        -------
        list of tuple of str
            One row per decision.
        """
        return [
            (
                time.strftime("%H:%M:%S", time.localtime(each.when)),
                each.saw,
                each.decided,
                each.why,
                format_time(each.took) if each.took else "-",
                amounts(each.workers),
            )
            for each in self._decisions
        ]

    def __repr__(self) -> str:
        return text_table(self.HEADER, self.rows()) if self._decisions else "nothing was decided yet"

    def _repr_html_(self) -> str:
        return page(html_table(self.HEADER, self.rows()))

    def timeline(self) -> tuple[list[float], dict[str, list[int]]]:
        """Return the number of workers of each kind over time, for a plot with steps.

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
