"""Rollouts as a client sees them: ``cluster.rollout``, parsed progress, and progress bars."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from agentcluster.client.interface import (
    AsyncT,
    MaybeAsync,
    synced,
)
from agentcluster.model import NodeProgress, RolloutStatus
from agentcluster.reports import RolloutReport
from agentcluster.wire import from_wire

if TYPE_CHECKING:
    from agentcluster.client.cluster import AgentCluster

AnswerT = TypeVar("AnswerT", bound=Mapping[str, Any])


class RolloutControl(MaybeAsync[AsyncT]):
    """Watch and control the rollout of a cluster.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.

    Notes
    -----
    Each method returns a coroutine when the cluster is asynchronous.

    Examples
    --------
    >>> report = cluster.reprovision("uniform", {"nthreads": 1, "nworkers": 1, "memory_limit": "500 MiB"})
    >>> cluster.rollout.status()              # None: it has ended
    >>> report = cluster.rollout.undo()
    >>> report.nodes["local"].outcome
    'changed'
    """

    def __init__(self, cluster: AgentCluster[AsyncT]) -> None:
        self._cluster: AgentCluster[AsyncT] = cluster
        self.sync = cluster.sync

    def _check_open(self) -> None:
        """Raise ConfigError once the cluster is closed."""
        self._cluster._check_open()

    def __repr__(self) -> str:
        swapping = [name for name, node in self._cluster.nodes.items() if node["state"] == "swapping"]
        state = f"{', '.join(swapping)} swapping" if swapping else "no node swapping"
        return f"<RolloutControl of cluster {self._cluster.name!r}: {state}>"

    @synced
    async def pause(self) -> None:
        """Begin no further wave of nodes until :meth:`resume`; the wave that runs continues.

        Raises
        ------
        ConfigError
            When no rollout runs.
        """
        await self._control("pause")

    @synced
    async def resume(self) -> None:
        """Continue a paused rollout.

        Raises
        ------
        ConfigError
            When no rollout runs.
        """
        await self._control("resume")

    @synced
    async def cancel(self) -> None:
        """End the rollout; nodes keep, or get back, the workers that they had, as `on_failure` says.

        Raises
        ------
        ConfigError
            When no rollout runs.
        """
        await self._control("cancel")

    async def _control(self, action: Literal["pause", "resume", "cancel"]) -> None:
        await self._cluster.scheduler_comm.control_rollout(action=action)

    @synced
    async def undo(self) -> RolloutReport:
        """Restore the plans that the nodes of the last rollout had before it.

        Returns
        -------
        RolloutReport
            Result of the change.

        Raises
        ------
        ConfigError
            When there is no rollout to undo.
        PreflightError, SwapError
            As for :meth:`AgentCluster.reprovision`.
        """
        try:
            return RolloutReport.parse(await self._cluster.scheduler_comm.undo_rollout())
        finally:
            await self._cluster.view.try_refresh()

    @synced
    async def status(self) -> RolloutStatus | None:
        """Return the progress of the rollout that runs.

        Returns
        -------
        RolloutStatus or None
            Progress of each node, with a table as its repr; None when no rollout runs.
        """
        return parse_status(await self._cluster.scheduler_comm.rollout_status())


_KNOWN = frozenset(field.name for field in fields(NodeProgress))


def parse_status(answer: Mapping[str, Any] | None) -> RolloutStatus | None:
    """Parse the answer of the call ``rollout_status``.

    Parameters
    ----------
    answer
        The answer, as plain data.

    Returns
    -------
    RolloutStatus or None
        The progress; None when no rollout runs.
    """
    if answer is None:
        return None
    # A step also has facts that are not its progress, such as the names of workers.
    nodes = {
        name: {key: value for key, value in step.items() if key in _KNOWN} for name, step in answer["nodes"].items()
    }
    return from_wire(RolloutStatus, {**answer, "nodes": nodes}, "rollout_status")


#: Seconds between two updates of the progress bars.
INTERVAL = 0.1


class RolloutProgress:
    """Progress bars of a rollout, one per node; a context manager.

    Parameters
    ----------
    console
        Console to draw on; default is standard output. Nothing is drawn unless it is a terminal or a notebook.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.shown = self.console.is_terminal or self.console.is_jupyter
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.shown,
        )

    def __repr__(self) -> str:
        return f"<RolloutProgress: {len(self._bars)} bars, {'drawn' if self.shown else 'not drawn'}>"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.refresh()  # in a notebook its end draws nothing
        self._progress.stop()

    def update(self, status: RolloutStatus | None) -> None:
        """Draw the progress of each node.

        Parameters
        ----------
        status
            The progress; None changes nothing.
        """
        for node, progress in status.nodes.items() if status else ():
            self._draw(node, progress.percent, str(progress))

    def finish(self, outcomes: Mapping[str, str]) -> None:
        """Draw the end of the rollout.

        Parameters
        ----------
        outcomes
            Node name -> outcome, such as ``changed``.
        """
        for node, outcome in outcomes.items():
            self._draw(node, 100, outcome)

    def _draw(self, node: str, percent: float, text: str) -> None:
        if node not in self._bars:
            self._bars[node] = self._progress.add_task(node, total=100, text="")
        self._progress.update(self._bars[node], completed=percent, text=text)


async def watch(
    order: Coroutine[Any, Any, AnswerT],
    ask: Callable[[], Awaitable[Mapping[str, Any] | None]],
    console: Console | None = None,
) -> AnswerT:
    """Run a call that changes nodes, and draw its progress until it returns.

    Parameters
    ----------
    order
        The call; its answer is that of ``reprovision_nodes``.
    ask
        The call ``rollout_status``.
    console
        As for :class:`RolloutProgress`.

    Returns
    -------
    mapping
        The answer of the call.
    """
    answer = asyncio.ensure_future(order)
    try:
        with RolloutProgress(console) as bars:
            while not answer.done():
                bars.update(parse_status(await ask()))
                await asyncio.wait([answer], timeout=INTERVAL)
            if answer.exception() is None:
                bars.finish({name: node["outcome"] for name, node in answer.result()["nodes"].items()})
        return await answer
    finally:
        answer.cancel()
