"""Changes of nodes: the workers that stay, leave and come; planned by the controller, carried out by a swap.

The :class:`Lineage` keeps which workers came in place of which: a task that is bound to a worker is bound to its
successors once the worker leaves. Where as many workers come as leave, each has one successor, so that tasks that need
each other and were bound to different workers still are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agentcluster.model import Mode, NodeReport, WorkerSpec
from agentcluster.reports import shape_of
from agentcluster.requests import Strategy
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.wire import to_wire

#: Workers whose successors are known; the oldest are forgotten first.
KEPT = 10_000


@dataclass(frozen=True)
class NodeChange:
    """Change of one node's workers, planned once and refined with :func:`dataclasses.replace`.

    The planner says which workers stay, leave and come; the controller names those that come; the preflight chooses the
    strategy; a swap adds names for workers that it may have to start again.

    Attributes
    ----------
    node
        The node.
    mode
        Mode of the node after the change.
    keep
        Workers that stay as they are: name -> settings.
    remove
        Workers that leave: name -> settings.
    add
        Settings of the workers that come.
    names
        Names of the workers that come, in the order of `add`; () until they are named.
    restore_names
        Names for workers like those that leave, in the order of `remove`, in case those must be started again
        (``replace`` only).
    strategy, because
        Order in which new workers come and old ones leave, and the reason where it is not the order asked for.
    """

    node: Node
    mode: Mode
    keep: Mapping[str, WorkerSpec] = field(default_factory=dict)
    remove: Mapping[str, WorkerSpec] = field(default_factory=dict)
    add: tuple[WorkerSpec, ...] = ()
    names: tuple[str, ...] = ()
    restore_names: tuple[str, ...] = ()
    strategy: Strategy = "surge"
    because: str = ""

    @property
    def name(self) -> str:
        """Name of the node."""
        return self.node.name

    @property
    def old(self) -> tuple[str, ...]:
        """Names of the workers that leave."""
        return tuple(self.remove)

    @property
    def new(self) -> dict[str, WorkerSpec]:
        """Workers that come, once they are named: name -> settings."""
        return dict(zip(self.names, self.add, strict=True)) if self.names else {}

    @property
    def restored(self) -> dict[str, WorkerSpec]:
        """Workers that take the place of those that left, if they are started again: name -> settings."""
        return dict(zip(self.restore_names, self.remove.values(), strict=True)) if self.restore_names else {}

    def report(self) -> NodeReport:
        """Return the report of this change before it is carried out."""
        return NodeReport(
            node=self.name,
            mode=self.mode.name,
            strategy=self.strategy,
            because=self.because,
            old=self.old,
            new=self.names,
            shape=shape_of(to_wire(self.new)) if self.names else "",
            kept=tuple(self.keep),
        )


def change_to(node: Node, mode: Mode, specs: Sequence[WorkerSpec]) -> NodeChange:
    """Plan the least change that gives a node the workers of `specs`.

    Parameters
    ----------
    node
        The node.
    mode
        Mode of the node after the change.
    specs
        Settings, one for each worker wanted.

    Returns
    -------
    NodeChange
        Keeps each worker whose settings are wanted.
    """
    keep, missing = match_workers(node.plan.workers, specs)
    remove = {name: spec for name, spec in node.plan.workers.items() if name not in keep}
    return NodeChange(node, mode, keep, remove, missing)


def change_without(node: Node, mode: Mode, leaving: Container[str], add: Sequence[WorkerSpec] = ()) -> NodeChange:
    """Plan a change that removes the workers named in `leaving`.

    Parameters
    ----------
    node
        The node.
    mode
        Mode of the node after the change.
    leaving
        Names of workers; those that the node does not have are ignored.
    add
        Settings of workers that come.
    """
    workers = node.plan.workers
    keep = {name: spec for name, spec in workers.items() if name not in leaving}
    return NodeChange(node, mode, keep, {name: workers[name] for name in workers if name in leaving}, tuple(add))


def match_workers(
    current: Mapping[str, WorkerSpec], wanted: Sequence[WorkerSpec]
) -> tuple[dict[str, WorkerSpec], tuple[WorkerSpec, ...]]:
    """Match running workers with wanted settings, each worker with one of them.

    Parameters
    ----------
    current
        Worker name -> settings, as they run.
    wanted
        The settings wanted, one per worker.

    Returns
    -------
    dict, tuple
        The workers whose settings are wanted, in the order of `current`; the settings that no worker has, in the order
        of `wanted`.
    """
    missing = list(wanted)
    keep = {}
    for name, spec in current.items():
        if spec in missing:
            missing.remove(spec)
            keep[name] = spec
    return keep, tuple(missing)


# -- successors --------------------------------------------------------------------------------------------------------


def pair(old: Sequence[str], new: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Assign new workers to old ones, evenly and in order.

    Parameters
    ----------
    old, new
        Workers that leave, and those that come, each once, in the order of their slots.

    Returns
    -------
    dict
        Old worker -> its successors. Each new worker succeeds at least one old one, and each old worker has at least
        one successor where there are new ones. With as many new as old workers each has one of its own.
    """
    few, many = len(new) <= len(old), max(len(old), len(new))
    found: dict[str, list[str]] = {worker: [] for worker in old}
    if old and new:
        for i in range(many):
            here, there = (i, i * len(new) // many) if few else (i * len(old) // many, i)
            found[old[here]].append(new[there])
    return {worker: tuple(successors) for worker, successors in found.items()}


@dataclass
class Departed:
    """A worker that left, or leaves.

    Attributes
    ----------
    name, node
        Its name, and the node that it belonged to.
    successors
        Addresses of the workers that came in its place; () while there are none.
    """

    name: str
    node: str
    successors: tuple[str, ...] = ()


class Lineage:
    """Workers that left, by address, and their successors.

    Parameters
    ----------
    kept
        Greatest number of workers that are remembered.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._departed: OrderedDict[str, Departed] = OrderedDict()
        self._by_name: dict[str, str] = {}
        self._kept = kept

    def leave(self, address: str, name: str, node: str) -> None:
        """Note that a worker leaves.

        Parameters
        ----------
        address, name, node
            Its address, its name, and the name of its node.
        """
        before = self._departed.pop(address, None)
        self._departed[address] = Departed(name, node, before.successors if before else ())
        self._by_name[name] = address
        while len(self._departed) > self._kept:
            gone, departed = self._departed.popitem(last=False)
            if self._by_name.get(departed.name) == gone:
                del self._by_name[departed.name]

    def succeed(self, old: Sequence[str], new: Sequence[str]) -> None:
        """Note which workers came in place of others.

        Parameters
        ----------
        old, new
            Addresses, in the order of their slots; an old one that is not known to leave is left out.
        """
        for address, successors in pair(old, new).items():
            if address in self._departed:
                self._departed[address].successors = successors

    def named(self, name: str) -> str | None:
        """Return the address of the worker that left last under a name; None when there was none.

        Parameters
        ----------
        name
            Name of a worker.
        """
        return self._by_name.get(name)

    def departed(self, address: str) -> Departed | None:
        """Return the facts about a worker that left; None when there was none at this address.

        Parameters
        ----------
        address
            Address of a worker.
        """
        return self._departed.get(address)

    def of_node(self, node: str) -> list[str]:
        """Return the addresses of the workers that left a node.

        Parameters
        ----------
        node
            Name of the node.
        """
        return [address for address, departed in self._departed.items() if departed.node == node]

    def resolve(
        self, address: str, is_open: Callable[[str], bool], in_place_of: Callable[[Departed], Iterable[str]]
    ) -> frozenset[str]:
        """Return the workers that tasks bound to an address may run on.

        Parameters
        ----------
        address
            Address that a task is bound to.
        is_open
            Returns whether there is a worker at an address that takes tasks.
        in_place_of
            Returns the addresses of the workers that stand in for one that has no successors.

        Returns
        -------
        frozenset of str
            The worker itself while it is open; else its successors, theirs where those left too; else those open ones
            that stand in for it. Empty when there are none.
        """
        found: set[str] = set()
        seen: set[str] = set()
        left = [address]
        while left:
            each = left.pop()
            if each in seen:
                continue
            seen.add(each)
            if is_open(each):
                found.add(each)
            elif departed := self._departed.get(each):
                left += departed.successors
        if not found and (first := self._departed.get(address)):
            found.update(filter(is_open, in_place_of(first)))
        return frozenset(found)
