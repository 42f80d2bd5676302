"""``cluster.rollout``: what a user can do with the rollout that runs, and with the one that ended last."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RolloutControl:
    """Watches and steers the rollout of a cluster. Each method is awaitable when the cluster is asynchronous.

    Examples
    --------
    >>> report = cluster.reprovision("uniform", {"nthreads": 1, "nworkers": 1, "memory_limit": "500 MiB"})
    >>> cluster.rollout.status()              # None: it has ended
    >>> report = cluster.rollout.undo()
    >>> report.nodes["local"].outcome
    'changed'
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster

    def pause(self) -> Any:
        """Begin no further wave of nodes until :meth:`resume`; the wave that runs ends as it would."""
        return self._cluster.sync(self._cluster._call, "control_rollout", action="pause")

    def resume(self) -> Any:
        """Go on."""
        return self._cluster.sync(self._cluster._call, "control_rollout", action="resume")

    def cancel(self) -> Any:
        """End it: nodes keep, or get back, what they had, as `on_failure` says."""
        return self._cluster.sync(self._cluster._call, "control_rollout", action="cancel")

    def undo(self) -> Any:
        """Bring the nodes that the last rollout changed back to the plans that they had before; returns a Report."""
        return self._cluster.sync(self._cluster._undo)

    def status(self) -> Any:
        """Return how far it is, as plain data; None when none runs."""
        return self._cluster.rollout_status()


#: Seconds between two looks at a rollout.
INTERVAL = 0.1

#: Part of a node's bar that is full when a step begins; moving data fills what is between its own and the next.
STEPS = {"waiting": 0, "swap": 5, "start": 10, "retire": 40, "stop": 90, "ready": 100, "standby": 100}


class RolloutProgress:
    """One bar per node of a rollout.

    Parameters
    ----------
    console
        Where to draw; default is standard output. Nothing is drawn when that is neither a terminal nor a notebook.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.shown = self.console.is_terminal or self.console.is_jupyter
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.shown,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, status: Mapping[str, Any] | None) -> None:
        """Show what ``rollout_status`` answered; None changes nothing."""
        for node, step in (status or {}).get("nodes", {}).items():
            self._show(node, *reckon(step))

    def finish(self, outcomes: Mapping[str, str]) -> None:
        """Show how it ended: node -> outcome."""
        for node, outcome in outcomes.items():
            self._show(node, 100, outcome)

    def _show(self, node: str, done: float, says: str) -> None:
        if node not in self._bars:
            self._bars[node] = self._progress.add_task(node, total=100, says="")
        self._progress.update(self._bars[node], completed=done, says=says)


def reckon(step: Mapping[str, Any]) -> tuple[float, str]:
    """Return how full a node's bar is, of 100, and what stands beside it."""
    name = str(step["step"])
    done = float(STEPS.get(name, 0))
    if name != "retire" or not step.get("all_keys"):
        return done, name
    part = step["keys"] / step["all_keys"]
    return done + part * (STEPS["stop"] - done), f"{step['keys']} of {step['all_keys']} keys moved"


async def watch(
    order: Coroutine[Any, Any, Mapping[str, Any]],
    ask: Callable[[], Awaitable[Mapping[str, Any] | None]],
    console: Console | None = None,
) -> Mapping[str, Any]:
    """Carry out an order and draw its progress until it has answered.

    Parameters
    ----------
    order
        The call that begins a rollout and answers with its report.
    ask
        Returns how far the rollout is that runs now.
    """
    answer = asyncio.ensure_future(order)
    try:
        with RolloutProgress(console) as bars:
            while not answer.done():
                bars.update(await ask())
                await asyncio.wait([answer], timeout=INTERVAL)
            if answer.exception() is None:
                bars.finish({name: node["outcome"] for name, node in answer.result()["nodes"].items()})
        return await answer
    finally:
        answer.cancel()
