"""View of a cluster: its nodes, kept current, and how they are shown: a panel or a table, a line, and logs."""

from __future__ import annotations

import asyncio
import contextlib
import html
import itertools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import parse_timedelta
from distributed import Scheduler
from distributed.comm.addressing import get_address_host
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.objects import SchedulerInfo
from distributed.utils import format_dashboard_link
from tornado.ioloop import PeriodicCallback

from agentcluster.client.processes import LaunchedProcess
from agentcluster.config import Config
from agentcluster.reports import Nodes, NodeSnapshot
from agentcluster.security import LOOPBACK, is_loopback
from agentcluster.wire import unless_refused

if TYPE_CHECKING:
    from agentcluster.client.cluster import AsyncCluster
    from agentcluster.client.widget import Panel

logger = logging.getLogger(__name__)

#: Seconds in which the changes of a swap, one for each worker, are gathered before the scheduler is asked.
GATHER = 0.2


class NodeView:
    """View of a cluster's nodes.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster; everything here runs in its event loop.
    interval : float
        Seconds between two updates when no change was seen.

    Attributes
    ----------
    nodes : Nodes
        The nodes, those that this cluster launched first.
    problem : str or None
        Why the view may be out of date; None when it is current.
    lost : bool
        Whether the scheduler has gone: then the view is not updated any more.
    """

    def __init__(self, cluster: AsyncCluster, interval: float) -> None:
        self.nodes = Nodes()
        self.problem: str | None = None
        self.lost = False
        self._cluster = cluster
        self._interval = interval
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._shown = 0

    def __repr__(self) -> str:
        return f"<NodeView: {', '.join(self.nodes) or 'no nodes'}{f'; {self.problem}' if self.problem else ''}>"

    @property
    def kept(self) -> bool:
        """True when the view is being kept current."""
        return self._keeper is not None

    def keep(self) -> None:
        """Keep the view current until :meth:`close`."""
        self._keeper = asyncio.create_task(self._keep(), name="agentcluster nodes")

    async def close(self) -> None:
        """Stop updating the view; idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    def changed(self) -> None:
        """Request an update, because a worker joined or left."""
        self._changed.set()

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._changed.wait()
                    await asyncio.sleep(GATHER)
            self._changed.clear()
            news = self._cluster._watch_worker_status_task
            silent = news is not None and news.done()
            try:
                if silent:
                    await unless_refused(self.refresh(), self._cluster.scheduler_address)
                else:
                    await self.refresh()
                self.problem = None
            except OSError as error:
                self.problem = f"cannot reach the scheduler: {error}"
                logger.debug("Cannot ask the scheduler for its nodes: %s", error)
                if silent:
                    self._lose_scheduler()
                    return

    def _lose_scheduler(self) -> None:
        """Show that the cluster has no scheduler any more: neither it nor its nodes are what they were."""
        address = self._cluster.scheduler_address
        why = f"the scheduler at {address} has gone"
        logger.warning("Cluster %s: %s; close the cluster", self._cluster.name, why)
        self.lost = True
        self.nodes = Nodes({name: {**node, "state": "lost", "problem": why} for name, node in self.nodes.items()})
        self._cluster.status = Status.failed

    async def refresh(self) -> None:
        """Ask the scheduler for its nodes; does nothing unless the cluster runs.

        Raises
        ------
        OSError
            When the scheduler cannot be reached.
        """
        cluster = self._cluster
        if cluster.status is not Status.running:
            return
        number = next(self._numbers)
        found = await cluster.scheduler_comm.get_nodes()
        if number < self._shown:
            return  # a later question was answered first
        self._shown = number
        found |= self._ended(found)
        first = [name for name in cluster.worker_spec if name in found]
        self.nodes = Nodes({name: found[name] for name in dict.fromkeys([*first, *found])})
        for name, entry in cluster.worker_spec.items():
            entry["group"] = [worker[len(name) :] for worker in found.get(name, {}).get("plan", ())]

    async def try_refresh(self) -> None:
        """Refresh the view after a call; a scheduler that cannot be reached is reported by it or by the next update."""
        with contextlib.suppress(OSError):
            await self.refresh()

    def _ended(self, found: dict[str, NodeSnapshot]) -> dict[str, NodeSnapshot]:
        """Return the nodes that the scheduler has forgotten because their agents ended by themselves."""
        ended: dict[str, NodeSnapshot] = {}
        for name, node in self._cluster.workers.items():
            if name not in found and name in self.nodes and node.ended:
                last = next(reversed(node.lines()), "")
                problem = f"its agent ended; last output: {last!r}"
                ended[name] = {**self.nodes[name], "state": "lost", "plan": {}, "workers": {}, "problem": problem}
        return ended


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

    def dashboard(self) -> tuple[str | None, str | None]:
        """Return the URL of the scheduler's dashboard for this machine, or the reason why there is none."""
        cluster = self._cluster
        port = cluster.scheduler_info.get("services", {}).get("dashboard")
        if cluster.status is not Status.running or port is None:
            return None, "the scheduler has no dashboard" if port is None else f"the cluster is {cluster.status.name}"
        host = get_address_host(cluster.scheduler_address)
        if isinstance(cluster.scheduler, LaunchedProcess):
            where = cluster.scheduler.launcher.where
            private = str(cluster.scheduler.settings.options.get("dashboard_address", "")).startswith(LOOPBACK)
            if private and where != "local":
                return None, (
                    f"the dashboard listens on {LOOPBACK} of {where} alone: `ssh -L {port}:{LOOPBACK}:{port} {where}` "
                    f"brings it to http://{LOOPBACK}:{port}/status here"
                )
        else:
            private = isinstance(cluster.scheduler, Scheduler) and _is_private(cluster.scheduler.http_server)
        return str(format_dashboard_link(LOOPBACK if private else host, port)), None

    def html(self, status: str | None) -> str:
        """Return dask's repr of a cluster in HTML; its templates take names as they are, so they are escaped here.

        Parameters
        ----------
        status
            HTML of dask's for its widget, if any.

        Returns
        -------
        str
            The repr.
        """
        cluster = self._cluster
        shown = {
            "name": _escaped(cluster.name),
            "dashboard_link": _escaped(cluster.dashboard_link),
            "scheduler_info": SchedulerInfo(_escaped(cluster.scheduler_info)),
        }
        return str(Cluster._repr_html_(type(type(cluster).__name__, (), shown)(), status))

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


def _is_private(server: Any) -> bool:
    """Return whether dask's HTTP server, to which it adds an attribute, listens on loopback."""
    return is_loopback(server.address)


def _escaped(data: Any) -> Any:
    """Return plain data with its texts as HTML."""
    if isinstance(data, str):
        return html.escape(data)
    if isinstance(data, Mapping):
        return {_escaped(key): _escaped(value) for key, value in data.items()}
    return [_escaped(each) for each in data] if isinstance(data, list | tuple) else data
