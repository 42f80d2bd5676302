"""The arithmetic of a node: how cores are split, what memory each worker gets, and when a shape does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import format_bytes
from distributed.deploy.utils import nprocesses_nthreads

from agentcluster.errors import ModeRefused
from agentcluster.model import Hardware, WorkerSpec
from agentcluster.modes.options import memory_amount, shown


@dataclass(frozen=True)
class Site:
    """One node that a mode is planned for."""

    mode: str
    node: str
    hardware: Hardware

    def refuse(self, reason: str) -> ModeRefused:
        return ModeRefused(self.node, self.mode, reason)

    def limit_by_hand(self, value: Any) -> int | None:
        """Return a memory limit in bytes, 0 for none, or ``None`` where `value` asks for the default share.

        Raises
        ------
        ModeRefused
            When it is more than the node has.
        """
        wanted, memory = memory_amount(value), self.hardware.memory
        if isinstance(wanted, float):
            # A tiny fraction must not round to 0, which is no limit.
            return max(1, int(wanted * memory))
        if wanted is not None and wanted > memory:
            raise self.refuse(
                f"memory_limit {shown(value)} is {amount(wanted)} a worker, the node has {amount(memory)}; "
                f"give at most that, a fraction up to 1.0, or 0 for no limit"
            )
        return wanted

    def default_limits(self, shares: Sequence[float], taken: int = 0) -> list[int]:
        """Return memory limits in bytes for workers whose limit nobody set.

        Parameters
        ----------
        shares
            The part of the node's memory that each would get if it were alone, 0 to 1.
        taken
            Bytes that others have by hand.

        Returns
        -------
        list[int]
            One for each share; with `taken` they never add up to more than the node has.

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
                f"memory limits set by hand take {amount(taken)} of the node's {amount(memory)} and leave too little "
                f"for {len(limits)} workers without one; lower them, or set memory_limit for all"
                if taken
                else f"{amount(memory)} of memory are too little for {len(limits)} workers; ask for fewer"
            )
        return limits


def amount(nbytes: int) -> str:
    return f"{nbytes} bytes ({format_bytes(nbytes)})"


def split_cores(site: Site, cpus: int, nworkers: int | str | None, nthreads: int | None) -> tuple[int, int]:
    """Return how many workers with how many threads each share `cpus` cores.

    Parameters
    ----------
    site
        The node, for the message.
    cpus
        Cores to split.
    nworkers, nthreads
        What the user set; ``None`` and ``"auto"`` leave it to us. Both set by hand may be more than the cores.

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
            raise site.refuse(f"nworkers={asked} leaves no worker on {cpus} cores; give at least {-cpus}")
    if nworkers is None and nthreads is None:
        workers, threads = nprocesses_nthreads(cpus)
        return int(workers), int(threads)
    if nworkers is None:
        assert nthreads is not None
        return max(1, cpus // nthreads), nthreads
    return nworkers, max(1, cpus // nworkers) if nthreads is None else nthreads


def warn_of_overcommit(site: Site, workers: Iterable[WorkerSpec]) -> None:
    """Warn when memory limits set by hand add up to more than the node has; they are kept, as `dask worker` does."""
    total = sum(worker.memory_limit or 0 for worker in workers)
    if total > site.hardware.memory:
        warnings.warn(
            f"node {site.node!r}, mode {site.mode!r}: memory limits set by hand add up to {amount(total)}, "
            f"the node has {amount(site.hardware.memory)}",
            UserWarning,
            stacklevel=3,
        )
