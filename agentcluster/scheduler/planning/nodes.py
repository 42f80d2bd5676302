"""Registry of the nodes of a scheduler: their state, hardware, plan and wanted mode.

Pure: the clock is passed in, nothing is awaited, nothing is sent. The table :data:`TRANSITIONS` has a node's states and
the events that move it between them; an event that is not in the table for a state is a programming error.

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
from agentcluster.model import Hardware, HostMetrics, Mode, NodePlan, WorkerSpec, WorkerState, like_dask, without_env
from agentcluster.requests import NodeRegistration
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

#: States in which a node has the plan that it is meant to have, or the reason why not.
SETTLED: frozenset[State] = frozenset({"ready", "standby", "refused", "lost"})

EMPTY = NodePlan(revision=0, mode=Mode("none"))

#: Mode of nodes where none was set.
BUILT_IN = Mode("auto-cpu")


@dataclass
class Node:
    """Node as the scheduler knows it.

    Attributes
    ----------
    name, address, hardware
        As its agent registered them.
    own_mode
        Mode that its agent was given; it wins over the cluster's default until the node is reprovisioned.
    fallback
        Mode that its agent has for when no default is set.
    state
        State, see :data:`TRANSITIONS`.
    plan
        Workers wanted now.
    workers
        Last known state of each worker, by name.
    metrics
        Last reported load of the host.
    heard
        Time of the agent's last message, by the registry's clock.
    problem
        Reason why the node is refused or lost, or the last message of a failed worker.
    ended
        Workers that ended during a change; in no plan, however the change ends.
    external_name
        Name that a cluster manager gave the node, and by which it knows the node's workers; None without one.
    external_names
        Worker names that the manager knows: those of the node's first workers.
    placeholders
        External names that placeholders have now, in place of workers.
    slots
        Greatest number of workers at a time, old and new; None for any number.
    resources
        Resources that each worker of the node offers, whatever its mode.
    labels
        Labels of the host, by which nodes are selected.
    names
        Names for new workers.
    """

    name: str
    address: str
    hardware: Hardware
    own_mode: Mode | None = None
    fallback: Mode | None = None
    state: State = "joining"
    plan: NodePlan = EMPTY
    workers: dict[str, WorkerState] = field(default_factory=dict)
    metrics: HostMetrics = field(default_factory=HostMetrics)
    heard: float = 0.0
    problem: str | None = None
    ended: set[str] = field(default_factory=set)
    external_name: str | int | None = None
    external_names: tuple[str, ...] = ()
    placeholders: set[str] = field(default_factory=set)
    slots: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    names: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    # -- state and plan ------------------------------------------------------------------------------------------------

    def to(self, event: Event) -> None:
        """Move to the state that follows an event.

        Parameters
        ----------
        event
            The event.

        Raises
        ------
        RuntimeError
            When the event cannot happen in the node's state.
        """
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise RuntimeError(f"node {self.name!r} got {event!r} while {self.state!r}") from None

    def adopt(self, mode: Mode, workers: Mapping[str, WorkerSpec]) -> None:
        """Make `workers` the node's plan, and settle its state.

        Parameters
        ----------
        mode
            Mode of the new plan.
        workers
            Worker name -> settings; those that ended meanwhile are left out.
        """
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
        """Remove a worker that was retired or failed from the plan; during a swap, when that ends.

        Parameters
        ----------
        worker
            Name of the worker; one that is in no plan is ignored.

        Returns
        -------
        bool
            Whether it was the last worker of the node, outside a swap.
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
        """Remove a worker from the plan, which is a new revision."""
        if worker in self.plan.workers:
            rest = {name: spec for name, spec in self.plan.workers.items() if name != worker}
            self.plan = NodePlan(self.plan.revision + 1, self.plan.mode, rest)
            self.workers.pop(worker, None)

    # -- names of workers ----------------------------------------------------------------------------------------------

    def take_names(self, count: int) -> list[str]:
        """Take names for new workers.

        Parameters
        ----------
        count
            Number of names.

        Returns
        -------
        list of str
            Names that no worker of the node ever had, and no external names.
        """
        return list(itertools.islice((name for name in self.names if name not in self.external_names), count))

    def first_names(self, count: int, taken: Container[str]) -> list[str]:
        """Take names for the first workers: where a manager named the node, as ``dask worker`` names them.

        Parameters
        ----------
        count
            Number of names.
        taken
            Names of all workers of the scheduler.

        Returns
        -------
        list of str
            The external names, where none of them is taken.
        """
        if self.external_name is None:
            return self.take_names(count)
        self.external_names = tuple(like_dask(self.name, max(count, 1)))
        free = [name for name in self.external_names[:count] if name not in taken]
        return free if len(free) == count else self.take_names(count)

    def scheduler_name(self, worker: str) -> str | int:
        """Return a worker's name as the scheduler has it.

        Parameters
        ----------
        worker
            Name of the worker.

        Returns
        -------
        str or int
            The same, but the external name itself where it is a number: dask does not make it text.
        """
        return self.external_name if self.external_name is not None and worker == str(self.external_name) else worker

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename workers in the plan, its states, and among those that ended.

        Parameters
        ----------
        names
            Old name -> new name.
        """

        def now(name: str) -> str:
            return names.get(name, name)

        specs = {now(name): spec for name, spec in self.plan.workers.items()}
        self.plan = replace(self.plan, workers=specs)
        self.workers = {now(name): replace(state, name=now(name)) for name, state in self.workers.items()}
        self.ended = set(map(now, self.ended))

    def forget(self, worker: str) -> bool:
        """Remove the name of a worker that was retired from outside from the external names.

        Parameters
        ----------
        worker
            Name of the worker.

        Returns
        -------
        bool
            Whether it was the last external name.
        """
        before, self.external_names = self.external_names, tuple(n for n in self.external_names if n != worker)
        return bool(before) and not self.external_names

    # -- properties ----------------------------------------------------------------------------------------------------

    def offers(self, spec: WorkerSpec) -> dict[str, float]:
        """Return the resources of a worker on this node.

        Parameters
        ----------
        spec
            Settings of the worker.

        Returns
        -------
        dict
            Resource -> amount, of the host and of the settings; the settings win.
        """
        return {**self.resources, **spec.resources}

    def matches(self, pattern: str) -> bool:
        """Return whether the node's name, or for ``key=value`` its label, matches a pattern.

        Parameters
        ----------
        pattern
            Pattern with the wildcards of a shell.
        """
        key, is_label, value = pattern.partition("=")
        if is_label:
            return key in self.labels and fnmatchcase(self.labels[key], value)
        return fnmatchcase(self.name, pattern)

    def snapshot(self) -> dict[str, Any]:
        """Return the node as plain data.

        Returns
        -------
        dict
            The form in which ``get_nodes`` sends it; environment variables have no values there.
        """
        return {
            "name": self.name,
            "labels": dict(self.labels),
            "address": self.address,
            "state": self.state,
            "mode": self.plan.mode.name,
            "config": without_env(to_wire(self.plan.mode.config)),
            "revision": self.plan.revision,
            "hardware": to_wire(self.hardware),
            "plan": without_env(to_wire(self.plan.workers)),
            "workers": to_wire(self.workers),
            "metrics": to_wire(self.metrics),
            "problem": self.problem,
            "tracked": list(self.external_names),
        }


class Registry:
    """Nodes of one scheduler, and the modes that nodes get when they join.

    Parameters
    ----------
    mode
        Mode of nodes that were given none; None where none is set.

    Attributes
    ----------
    nodes
        Node name -> node.
    default
        That mode; :data:`BUILT_IN` itself, and not one equal to it, where none is set.
    wanted
        Node name -> the mode that was asked for by the node's name.
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
        """Set the modes of nodes that are yet to join.

        Parameters
        ----------
        default
            Mode of all that have none of their own; None leaves it as it is.
        wanted
            Node name -> mode.
        bare
            Names of nodes that have no workers when they join.
        """
        self.default = default or self.default
        self.wanted |= wanted
        self.bare.update(bare)

    def register(self, registration: NodeRegistration, now: float) -> Node:
        """Add a node.

        Parameters
        ----------
        registration
            The agent's request.
        now
            Time by the registry's clock.

        Returns
        -------
        Node
            The new node; it takes the place of a lost one of its name.

        Raises
        ------
        NodeExists
            When another agent has the name, and the request is for exactly this name.
        """
        name = registration.name if registration.exact else self._free(registration.name)
        before = self.nodes.get(name)
        if before is not None and before.state != "lost":
            raise NodeExists(name, before.address)
        self.nodes[name] = Node(
            name,
            registration.address,
            registration.hardware,
            registration.mode,
            registration.fallback,
            heard=now,
            external_name=registration.external_name,
            slots=registration.slots,
            resources=registration.resources,
            labels=registration.labels,
            # A node that is back has no workers yet, but a worker's name that was used stays used.
            names=self._names.setdefault(name, self._numbered(name)),
        )
        return self.nodes[name]

    def _numbered(self, name: str) -> Iterator[str]:
        """Yield names for a node's workers that are no names of other nodes, which their workers may have."""
        return (each for number in itertools.count() if (each := f"{name}-{number}") not in self.nodes)

    def _free(self, name: str) -> str:
        candidates = itertools.chain([name], (f"{name}.{i}" for i in itertools.count(2)))
        return next(c for c in candidates if c not in self.nodes or self.nodes[c].state == "lost")

    def unregister(self, name: str) -> None:
        """Remove a node; calls of its agent that are under way end, as for a lost node.

        Parameters
        ----------
        name
            Name of the node; an unknown one is of a node that left already.
        """
        if (node := self.nodes.pop(name, None)) is not None:
            node.to("lost")
            node.problem = "its agent left"
        self.wanted.pop(name, None)
        self.bare.discard(name)

    def get(self, name: str) -> Node:
        """Return the node of a name.

        Parameters
        ----------
        name
            Name of the node.

        Raises
        ------
        NodeNotFound
            When there is no node of that name.
        """
        try:
            return self.nodes[name]
        except KeyError:
            raise NodeNotFound(name, self.nodes) from None

    def select(self, names: Iterable[str] | str | None) -> list[Node]:
        """Select nodes by name, pattern or label.

        Parameters
        ----------
        names
            Names; a pattern such as ``gpu-*``, or a label such as ``rack=a`` or ``rack=*``, stands for the nodes that
            match it and are not lost. None for all nodes that are not lost.

        Returns
        -------
        list of Node
            In the order of `names`; all nodes in the natural order of their names.

        Raises
        ------
        NodeNotFound
            For a name that matches no node.
        """
        there = [node for node in self.nodes.values() if node.state != "lost"]
        there.sort(key=lambda node: natural_sort_key(node.name))
        if names is None:
            return there
        chosen: dict[str, Node] = {}
        for name in [names] if isinstance(names, str) else names:
            found = [self.nodes[name]] if name in self.nodes else [node for node in there if node.matches(name)]
            if not found:
                labels = {f"{key}={value}" for node in there for key, value in node.labels.items()}
                raise NodeNotFound(name, self.nodes, labels)
            chosen |= {node.name: node for node in found}
        return list(chosen.values())

    def mode_for(self, node: Node) -> Mode:
        """Return the mode that a joining node gets.

        Parameters
        ----------
        node
            The node.

        Returns
        -------
        Mode
            The first of: the mode asked for by the node's name, the one that its agent was given, the default that was
            set, the agent's fallback, the built-in default.
        """
        default = None if self.default is BUILT_IN else self.default
        return self.wanted.get(node.name) or node.own_mode or default or node.fallback or BUILT_IN

    def stale(self, now: float, ttl: float) -> list[Node]:
        """Return the nodes whose agents are silent.

        Parameters
        ----------
        now
            Time by the registry's clock.
        ttl
            Seconds after which an agent is silent.

        Returns
        -------
        list of Node
            Without those that are lost already.
        """
        return [n for n in self.nodes.values() if n.state != "lost" and now - n.heard > ttl]

    def owner(self, worker: str) -> Node | None:
        """Return the node whose plan has a worker.

        Parameters
        ----------
        worker
            Name of the worker.

        Returns
        -------
        Node or None
            None when no plan has it.
        """
        return next((n for n in self.nodes.values() if worker in n.plan.workers), None)
