"""What a cluster shows of itself: a panel or a table in a notebook, a line in a terminal, and its logs."""

from __future__ import annotations

import importlib
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.utils import Log, Logs
from tornado.ioloop import PeriodicCallback

from agentcluster.reports import Nodes


class Display(Cluster):
    """A base of :class:`~agentcluster.AgentCluster`."""

    sync: Any
    loop: Any
    scheduler_comm: Any
    workers: Any
    _nodes: Nodes
    _panel: Any = None

    def get_logs(self, cluster: bool = True, scheduler: bool = True, workers: Any = True, agents: bool = False) -> Any:
        """Return logs of the cluster object, the scheduler, the workers and the agents.

        Parameters
        ----------
        cluster, scheduler, workers
            As for :meth:`distributed.deploy.Cluster.get_logs`.
        agents : bool
            Also what each node's agent logged, by node name.
        """
        return self.sync(self._get_logs, cluster=cluster, scheduler=scheduler, workers=workers, agents=agents)

    async def _get_logs(
        self, cluster: bool = True, scheduler: bool = True, workers: Any = True, agents: bool = False
    ) -> Logs:
        logs: Logs = await super()._get_logs(cluster=cluster, scheduler=scheduler, workers=workers)
        if agents:
            logs.update({name: Log("\n".join(lines)) for name, lines in (await self._agent_logs()).items()})
        return logs

    async def _agent_logs(self) -> dict[str, list[str]]:
        """Return node name -> what its agent logged, where it was launched from here, or else as it says itself."""
        logs = {name: node.lines() for name, node in self.workers.items()}
        if remote := [name for name, lines in logs.items() if not lines]:
            logs |= await self.scheduler_comm.get_node_logs(nodes=remote)
        return logs

    def __repr__(self) -> str:
        begin, sign, rest = super().__repr__().rpartition(", workers=")
        return f"{begin}, nodes={len(self._nodes)}{sign}{rest}"

    def _repr_html_(self, cluster_status: str | None = None) -> str:
        return str(super()._repr_html_(cluster_status)) + self._nodes._repr_html_()

    def _widget(self) -> Any:
        """Return the panel, or None where ipywidgets is not installed."""
        if self._panel is None:
            try:
                self._panel = importlib.import_module("agentcluster.client.widget").Panel(self)
            except ModuleNotFoundError as error:
                if error.name != "ipywidgets":
                    raise
                return None
            if self.status in (Status.closing, Status.closed, Status.failed):
                self._close_panel()
            else:
                self.loop.add_callback(self._keep_panel)
        return self._panel.root

    async def _keep_panel(self) -> None:
        interval = parse_timedelta(dask.config.get("distributed.deploy.cluster-repr-interval"), default="ms")
        await self._panel.update()
        keeper = self.periodic_callbacks["cluster-repr"] = PeriodicCallback(self._panel.update, interval * 1000)
        keeper.start()

    def _close_panel(self) -> None:
        """Show for the last time what is true."""
        if self._panel is not None:
            self._panel.close()
