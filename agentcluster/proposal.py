"""What is to change on one node: decided by :mod:`agentcluster.changes`, carried out by :mod:`agentcluster.swap`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agentcluster.allocate import Change
from agentcluster.model import Mode, NodeReport, WorkerSpec, to_wire
from agentcluster.registry import Node
from agentcluster.report import shape_of
from agentcluster.rollout import Strategy


@dataclass(frozen=True)
class Proposal:
    """What is to change on one node.

    Attributes
    ----------
    node
        The node.
    change
        Which workers stay, go and come.
    named
        The workers that come, by name.
    mode
        The mode that the node has afterwards.
    strategy, because
        Whether the new workers come before the old go, and why not, when they do not.
    """

    node: Node
    change: Change
    named: Mapping[str, WorkerSpec]
    mode: Mode
    strategy: Strategy = "surge"
    because: str = ""


def planned(name: str, proposal: Proposal) -> NodeReport:
    """Return what is to be done on one node."""
    return NodeReport(
        node=name,
        mode=proposal.mode.name,
        strategy=proposal.strategy,
        because=proposal.because,
        old=proposal.change.go,
        new=tuple(proposal.named),
        shape=shape_of(to_wire(proposal.named)) if proposal.named else "",
        kept=tuple(proposal.change.keep),
    )
