"""Arithmetic of a node: cores of each worker, memory of each worker, and refusals of workers that do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from dask.utils import format_bytes
from distributed.deploy.utils import nprocesses_nthreads

from agentcluster.errors import ModeRefused
from agentcluster.model import Hardware, WorkerSpec
from agentcluster.modes.options import memory_amount, shown

#: Workers of a node, in the order of their names.
Workers = tuple[WorkerSpec, ...]


@dataclass(frozen=True)
class NodeHardware:
    """Hardware of a node that a mode is planned for, with the names that messages need.

    Attributes
    ----------
    mode
        Name of the mode.
    name
        Name of the node.
    hardware
        Hardware of the node.
    """

    mode: str
    name: str
    hardware: Hardware

    def refuse(self, reason: str) -> ModeRefused:
        """Return the error that the node cannot have the mode.

        Parameters
        ----------
        reason
            The reason, and what would help.
        """
        return ModeRefused(self.name, self.mode, reason)

    def limit_by_hand(self, value: object) -> int | None:
        """Return a memory limit in bytes on this node.

        Parameters
        ----------
        value
            The limit as the user wrote it.

        Returns
        -------
        int or None
            0 for no limit, None where `value` asks for the default share.

        Raises
        ------
        ModeRefused
            When it is more than the node has.
        ValueError
            When `value` is no memory limit.
        """
        wanted, memory = memory_amount(value), self.hardware.memory
        if isinstance(wanted, float):
            # A tiny fraction must not round to 0, which is no limit.
            return max(1, int(wanted * memory))
        if wanted is not None and wanted > memory:
            raise self.refuse(
                f"memory_limit {shown(value)} is {in_bytes(wanted)} a worker, the node has {in_bytes(memory)}; "
                f"give at most that, a fraction up to 1.0, or 0 for no limit"
            )
        return wanted

    def default_limits(self, shares: Sequence[float], taken: int = 0) -> list[int]:
        """Return memory limits for workers whose limit was not set.

        Parameters
        ----------
        shares
            Part of the node's memory that each would get if it were alone, 0 to 1.
        taken
            Bytes of the limits that were set by hand for other workers.

        Returns
        -------
        list of int
            Bytes, one for each share; with `taken` they never add up to more than the node has.

        Raises
        ------
        ModeRefused
            When nothing is left for them.
        """
        memory = self.hardware.memory
        limits = [int(memory * share) for share in shares]
        wanted, left = sum(limits), memory - taken
        if wanted > left:
            limits = [limit * max(0, left) // wanted for limit in limits]
        if not all(limits):
            raise self.refuse(
                f"memory limits set by hand take {in_bytes(taken)} of the node's {in_bytes(memory)} and leave too "
                f"little for {len(limits)} workers without one; lower them, or set memory_limit for all"
                if taken
                else f"{in_bytes(memory)} of memory are too little for {len(limits)} workers; ask for fewer"
            )
        return limits


def in_bytes(nbytes: int) -> str:
    """Return an amount of memory for a message, exact and rounded.

    Parameters
    ----------
    nbytes
        The amount.
    """
    return f"{nbytes} bytes ({format_bytes(nbytes)})"


def split_cores(node: NodeHardware, cpus: int, nworkers: int | str | None, nthreads: int | None) -> tuple[int, int]:
    """Split cores among workers.

    Parameters
    ----------
    node
        The node, for messages.
    cpus
        Cores to split.
    nworkers, nthreads
        Numbers that the user set; None and ``"auto"`` for those that he did not. Both may be more than the cores.

    Returns
    -------
    int, int
        Number of workers, and of threads of each.

    Raises
    ------
    ModeRefused
        When a negative `nworkers` leaves none.
    """
    if isinstance(nworkers, str):
        nworkers = None
    if nworkers is not None and nworkers < 0:
        asked, nworkers = nworkers, cpus + 1 + nworkers
        if nworkers < 1:
            raise node.refuse(f"nworkers={asked} leaves no worker on {cpus} cores; give at least {-cpus}")
    if nworkers is None and nthreads is None:
        workers, threads = nprocesses_nthreads(cpus)
        return int(workers), int(threads)
    if nworkers is None:
        assert nthreads is not None
        return max(1, cpus // nthreads), nthreads
    return nworkers, max(1, cpus // nworkers) if nthreads is None else nthreads


def warn_of_overcommit(node: NodeHardware, workers: Workers) -> None:
    """Warn when memory limits set by hand add up to more than the node has; they are kept, as ``dask worker`` does.

    Parameters
    ----------
    node
        The node.
    workers
        Its workers.

    Warns
    -----
    UserWarning
        With both amounts.
    """
    total = sum(worker.memory_limit or 0 for worker in workers)
    if total > node.hardware.memory:
        warnings.warn(
            f"node {node.name!r}, mode {node.mode!r}: memory limits set by hand add up to {in_bytes(total)}, "
            f"the node has {in_bytes(node.hardware.memory)}",
            UserWarning,
            stacklevel=3,
        )
