"""Display of a cluster: a panel or a table in a notebook, a line in a terminal, and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dask
from dask.utils import parse_timedelta
from distributed.core import Status
from tornado.ioloop import PeriodicCallback

from agentcluster.config import Config

if TYPE_CHECKING:
    from agentcluster.client.cluster import AsyncCluster
    from agentcluster.client.widget import Panel


class Display:
    """Display of a cluster.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.
    """

    def __init__(self, cluster: AsyncCluster) -> None:
        self._cluster = cluster
        self._panel: Panel | None = None
        self._log_lines = Config.load().log_lines

    def __repr__(self) -> str:
        return f"<Display of cluster {self._cluster.name!r}: {'panel shown' if self._panel else 'no panel'}>"

    def line(self, line: str) -> str:
        """Add the number of nodes to dask's repr of a cluster.

        Parameters
        ----------
        line
            The repr, ``AgentCluster(…, workers=…)``.

        Returns
        -------
        str
            The same with ``nodes=…``.
        """
        begin, sign, rest = line.rpartition(", workers=")
        return f"{begin}, nodes={len(self._cluster.nodes)}{sign}{rest}"

    def panel(self) -> Panel | None:
        """Return the panel, and keep it current from now on.

        Returns
        -------
        Panel or None
            None where ipywidgets is not installed.
        """
        if self._panel is None:
            try:
                from agentcluster.client.widget import Panel
            except ModuleNotFoundError as error:
                if error.name != "ipywidgets":
                    raise
                return None
            self._panel = Panel(self._cluster)
            if self._cluster.status in (Status.closing, Status.closed, Status.failed):
                self.close()
            else:
                self._panel.loop.add_callback(self._keep, self._panel)
        return self._panel

    async def _keep(self, panel: Panel) -> None:
        interval = parse_timedelta(dask.config.get("distributed.deploy.cluster-repr-interval"), default="ms")
        await panel.update()
        keeper = PeriodicCallback(panel.update, interval * 1000)
        self._cluster.periodic_callbacks["cluster-repr"] = keeper
        keeper.start()

    def close(self) -> None:
        """Show that the cluster is closed."""
        if self._panel is not None:
            self._panel.close()

    async def agent_logs(self) -> dict[str, list[str]]:
        """Return the last lines of each agent's log, at most ``agentcluster.log.lines``.

        Returns
        -------
        dict
            Node name -> lines: from the process where this cluster launched it, otherwise as the agent answers.
        """
        logs = {name: node.lines() for name, node in self._cluster.workers.items()}
        if remote := [name for name, lines in logs.items() if not lines]:
            found = await self._cluster.scheduler_comm.get_node_logs(nodes=remote)
            logs |= {name: list(lines) for name, lines in found.items()}
        return {name: lines[-self._log_lines :] for name, lines in logs.items()}
