"""``cluster.rollout``: what a user can do with the rollout that runs, and with the one that ended last."""

from __future__ import annotations

from typing import Any


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
