"""What the scheduler side knows of its nodes: their state, hardware, plan, history and wanted mode.

Pure: the clock is passed in, nothing is awaited, nothing is sent. The states and what moves a node between them are the
table :data:`TRANSITIONS`; an event that the table does not have for a state is a programming error and raises.

::

    joining, ready, standby, refused ──swap──▶ swapping
    joining, swapping, ready, standby ──planned──▶ ready
    joining, swapping, ready, standby ──emptied──▶ standby
    joining, swapping ──refused──▶ refused
    joining, swapping, ready, standby, refused, lost ──lost──▶ lost
    lost ──registered──▶ joining
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from dask.utils import natural_sort_key

from agentcluster.errors import NodeExists, NodeNotFound
from agentcluster.model import Hardware, HostMetrics, Mode, NodePlan, WorkerSpec, WorkerState, like_dask
from agentcluster.wire import to_wire

State = Literal["joining", "ready", "standby", "swapping", "refused", "lost"]
Event = Literal["registered", "planned", "emptied", "swap", "refused", "lost"]

TRANSITIONS: Mapping[tuple[State, Event], State] = {
    ("joining", "planned"): "ready",
    ("joining", "emptied"): "standby",
    ("joining", "refused"): "refused",
    ("joining", "swap"): "swapping",
    ("joining", "lost"): "lost",
    ("ready", "swap"): "swapping",
    ("ready", "planned"): "ready",
    ("ready", "emptied"): "standby",
    ("ready", "lost"): "lost",
    ("standby", "swap"): "swapping",
    ("standby", "emptied"): "standby",
    ("standby", "planned"): "ready",
    ("standby", "lost"): "lost",
    ("swapping", "planned"): "ready",
    ("swapping", "emptied"): "standby",
    ("swapping", "refused"): "refused",
    ("swapping", "lost"): "lost",
    ("refused", "swap"): "swapping",
    ("refused", "lost"): "lost",
    ("lost", "registered"): "joining",
    ("lost", "lost"): "lost",
}

#: States in which a node has the plan that it is meant to have, or said why not.
SETTLED: frozenset[State] = frozenset({"ready", "standby", "refused", "lost"})

EMPTY = NodePlan(revision=0, mode=Mode("none"))

#: The mode of nodes for which nobody has said one.
BUILT_IN = Mode("auto-cpu")


@dataclass
class Node:
    """One node.

    Attributes
    ----------
    name, address, hardware
        As its agent registered them.
    own_mode
        The mode that the agent was given by hand, which wins over the cluster's default until a reprovisioning.
    fallback
        The mode that the agent has for when nobody has set a default.
    state
        See the table.
    plan
        The workers wanted now.
    history
        Earlier plans, oldest first.
    workers
        Last known state of each worker, by name.
    metrics
        The host's last reported load.
    heard
        When the agent was last heard, in the registry's clock.
    problem
        Why the node is refused or lost, or what its last failed worker said.
    ended
        Workers that ended while a change is under way; whatever its end, no plan has them.
    given
        The name that a cluster manager gave the node, and knows its workers by; None when none does.
    tracked
        The names that it knows: those of the node's first workers.
    held
        Those of them that placeholders bear.
    room
        How many workers can be there at once, old and new; None for any number.
    resources
        What each worker there offers, whatever its mode: its host was given it.
    labels
        Words about its host, by which it can be chosen.
    """

    name: str
    address: str
    hardware: Hardware
    own_mode: Mode | None = None
    fallback: Mode | None = None
    state: State = "joining"
    plan: NodePlan = EMPTY
    history: list[NodePlan] = field(default_factory=list)
    workers: dict[str, WorkerState] = field(default_factory=dict)
    metrics: HostMetrics = field(default_factory=HostMetrics)
    heard: float = 0.0
    problem: str | None = None
    ended: set[str] = field(default_factory=set)
    given: str | int | None = None
    tracked: tuple[str, ...] = ()
    held: set[str] = field(default_factory=set)
    room: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    names: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    def to(self, event: Event) -> None:
        """Move along the table."""
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise RuntimeError(f"node {self.name!r} got {event!r} while {self.state!r}") from None

    def take_names(self, count: int) -> list[str]:
        """Return names for `count` new workers; a number is never given twice, a tracked name not at all."""
        return list(itertools.islice((name for name in self.names if name not in self.tracked), count))

    def first_names(self, count: int, taken: Container[str]) -> list[str]:
        """Return names for the first workers: as ``dask worker`` gives them, where a manager named the node."""
        if self.given is None:
            return self.take_names(count)
        self.tracked = tuple(like_dask(self.name, max(count, 1)))
        free = [name for name in self.tracked[:count] if name not in taken]
        return free if len(free) == count else self.take_names(count)

    def offers(self, spec: WorkerSpec) -> dict[str, float]:
        """Return the resources of a worker there: those of its settings, and those that the host gives to all."""
        return {**self.resources, **spec.resources}

    def spelled(self, worker: str) -> str | int:
        """Return a worker's name as the scheduler has it: a manager's own may be a number."""
        return self.given if self.given is not None and worker == str(self.given) else worker

    def rename(self, names: Mapping[str, str]) -> None:
        """Give workers other names: old name -> new name."""

        def now(name: str) -> str:
            return names.get(name, name)

        specs = {now(name): spec for name, spec in self.plan.workers.items()}
        self.plan = replace(self.plan, workers=specs)
        self.workers = {now(name): replace(state, name=now(name)) for name, state in self.workers.items()}
        self.ended = set(map(now, self.ended))

    def forget(self, worker: str) -> bool:
        """Note that a worker was retired from outside; return whether it bore the last of the tracked names."""
        before, self.tracked = self.tracked, tuple(name for name in self.tracked if name != worker)
        return bool(before) and not self.tracked

    def adopt(self, mode: Mode, workers: Mapping[str, WorkerSpec]) -> None:
        """Make `workers` the node's plan, and settle its state."""
        if self.plan.revision:
            self.history.append(self.plan)
        self.plan = NodePlan(self.plan.revision + 1, mode, {n: s for n, s in workers.items() if n not in self.ended})
        self.settle()

    def settle(self) -> None:
        """Leave a swap, or joining, with the plan that the node has."""
        for worker in self.ended:
            self._without(worker)
        self.ended.clear()
        self.workers = {name: state for name, state in self.workers.items() if name in self.plan.workers}
        self.to("planned" if self.plan.workers else "emptied")
        self.problem = None

    def drop(self, worker: str) -> bool:
        """Take a worker that was closed on purpose, or given up, out of the plan; during a swap, when that ends.

        Says whether it was the last one of a node that has no swap.
        """
        if self.state == "swapping":
            self.ended.add(worker)
        elif worker in self.plan.workers:
            self._without(worker)
            if self.state in ("ready", "standby"):
                self.to("planned" if self.plan.workers else "emptied")
                return not self.plan.workers
        return False

    def _without(self, worker: str) -> None:
        if worker in self.plan.workers:
            rest = {name: spec for name, spec in self.plan.workers.items() if name != worker}
            self.plan = NodePlan(self.plan.revision + 1, self.plan.mode, rest)
            self.workers.pop(worker, None)

    def fits(self, pattern: str) -> bool:
        """Whether its name, or for ``key=value`` its label, fits a pattern."""
        key, is_label, value = pattern.partition("=")
        if is_label:
            return key in self.labels and fnmatchcase(self.labels[key], value)
        return fnmatchcase(self.name, pattern)

    def snapshot(self) -> dict[str, Any]:
        """Return what is known of the node as plain data (the form of ``get_nodes``)."""
        return {
            "name": self.name,
            "labels": dict(self.labels),
            "address": self.address,
            "state": self.state,
            "mode": self.plan.mode.name,
            "config": to_wire(self.plan.mode.config),
            "revision": self.plan.revision,
            "hardware": to_wire(self.hardware),
            "plan": to_wire(self.plan.workers),
            "workers": to_wire(self.workers),
            "metrics": to_wire(self.metrics),
            "problem": self.problem,
            "tracked": list(self.tracked),
        }


class Registry:
    """The nodes of one scheduler, and the mode that a node gets when it joins.

    Parameters
    ----------
    mode
        Mode of nodes that were given none; None while nobody has set one.

    Attributes
    ----------
    default
        That mode; :data:`BUILT_IN` itself, and not one like it, while nobody has set one.
    wanted
        Node name -> the mode asked for by name.
    bare
        Nodes that have no workers when they join.
    """

    def __init__(self, mode: Mode | None = None) -> None:
        self.nodes: dict[str, Node] = {}
        self.default = mode or BUILT_IN
        self.wanted: dict[str, Mode] = {}
        self.bare: set[str] = set()
        self._names: dict[str, Iterator[str]] = {}

    def expect(self, default: Mode | None, wanted: Mapping[str, Mode], bare: Iterable[str]) -> None:
        """Take what nodes that are yet to join are to have; a `default` of None leaves it as it is."""
        self.default = default or self.default
        self.wanted |= wanted
        self.bare.update(bare)

    def register(
        self,
        name: str,
        address: str,
        hardware: Hardware,
        *,
        now: float,
        own_mode: Mode | None = None,
        fallback: Mode | None = None,
        exact: bool = True,
        given: str | int | None = None,
        room: int | None = None,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Node:
        """Take a node in.

        Parameters
        ----------
        name
            The wanted name.
        exact
            Whether a taken name is an error; otherwise ``.2``, ``.3`` … is appended.
        given
            The name as a cluster manager gave it, where one did.
        room
            How many workers can be there at once; None for any number.
        resources
            What each worker there offers.
        labels
            Words about its host, by which it can be chosen.

        Returns
        -------
        Node
            The new node, or the one of that name that was lost and is back.

        Raises
        ------
        NodeExists
            When another agent holds the name.
        """
        if not exact:
            name = self._free(name)
        before = self.nodes.get(name)
        if before is not None and before.state != "lost":
            raise NodeExists(name, before.address)
        # The new agent has no workers yet, but a worker's name that was used stays used.
        names = self._names.setdefault(name, self._numbered(name))
        node = Node(name, address, hardware, own_mode, fallback, heard=now, given=given, room=room, names=names)
        node.resources, node.labels = dict(resources or {}), dict(labels or {})
        if before is not None:
            node.history = before.history
        self.nodes[name] = node
        return node

    def _numbered(self, name: str) -> Iterator[str]:
        """Make names for a node's workers that are not the names of other nodes, and so of their workers."""
        return (each for number in itertools.count() if (each := f"{name}-{number}") not in self.nodes)

    def _free(self, name: str) -> str:
        candidates = itertools.chain([name], (f"{name}.{i}" for i in itertools.count(2)))
        return next(c for c in candidates if c not in self.nodes or self.nodes[c].state == "lost")

    def unregister(self, name: str) -> None:
        """Forget a node; unknown names are those that left already."""
        self.nodes.pop(name, None)
        self.wanted.pop(name, None)
        self.bare.discard(name)

    def get(self, name: str) -> Node:
        """Return the node of that name, or raise :class:`NodeNotFound`."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NodeNotFound(name, self.nodes) from None

    def select(self, names: Iterable[str] | str | None) -> list[Node]:
        """Return nodes as they were named, or all that are not lost as one would sort them by hand.

        A name may be a pattern such as ``gpu-*``, or a label such as ``rack=a`` or ``rack=*``: then it stands for the
        nodes that it fits and that are not lost.

        Raises
        ------
        NodeNotFound
            For a name that fits no node.
        """
        there = [node for node in self.nodes.values() if node.state != "lost"]
        there.sort(key=lambda node: natural_sort_key(node.name))
        if names is None:
            return there
        chosen: dict[str, Node] = {}
        for name in [names] if isinstance(names, str) else names:
            found = [self.nodes[name]] if name in self.nodes else [node for node in there if node.fits(name)]
            if not found:
                raise NodeNotFound(name, self.nodes)
            chosen |= {node.name: node for node in found}
        return list(chosen.values())

    def mode_for(self, node: Node) -> Mode:
        """Return the mode that a joining node gets.

        The first of: asked for by name, given to the agent by hand, the default that somebody has set, what the agent
        falls back to, the built-in default.
        """
        default = None if self.default is BUILT_IN else self.default
        return self.wanted.get(node.name) or node.own_mode or default or node.fallback or BUILT_IN

    def stale(self, now: float, ttl: float) -> list[Node]:
        """Return the nodes that were not heard for `ttl` seconds."""
        return [n for n in self.nodes.values() if n.state != "lost" and now - n.heard > ttl]

    def owner(self, worker: str) -> Node | None:
        """Return the node whose plan has a worker of that name."""
        return next((n for n in self.nodes.values() if worker in n.plan.workers), None)
