"""Changes of nodes: the workers that stay, leave and come; planned by the controller, carried out by a swap."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from agentcluster.model import Mode, NodeReport, WorkerSpec
from agentcluster.reports import shape_of
from agentcluster.requests import Strategy
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.wire import to_wire


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
