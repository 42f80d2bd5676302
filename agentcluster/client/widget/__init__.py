"""Panel of a cluster in a notebook: a table of its nodes, and tabs that reprovision, scale, adapt and show logs.

It draws what the cluster knows anyway, and asks the scheduler only while a rollout runs. The work of a button runs in
the cluster's event loop, so the kernel stays free; its result, or its error, is shown below the buttons.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

import ipywidgets
from distributed.core import Status
from tornado.ioloop import IOLoop

from agentcluster.client.cluster import AsyncCluster
from agentcluster.client.widget.controls import Part, Work, error_message
from agentcluster.client.widget.tabs import Adapting, Change, Logs, Scaling
from agentcluster.reports import Nodes
from agentcluster.tables import Markup, Tone, count, html_table, page, paragraph, scrolled, stacked, toned

#: Fraction of the time that drawing may take.
SHARE = 0.05


class Panel:
    """Panel of a cluster.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.

    Attributes
    ----------
    root : ipywidgets.VBox
        The widget.
    """

    def __init__(self, cluster: AsyncCluster) -> None:
        self.cluster = cluster
        self._header = ipywidgets.HTML()
        self._table = ipywidgets.HTML()
        self._parts: list[Part] = [Change(self), Scaling(self), Adapting(self), Logs(self)]
        tabs = ipywidgets.Tab([part.root for part in self._parts], selected_index=0)
        tabs.titles = [part.TITLE for part in self._parts]
        self.root = ipywidgets.VBox([self._header, self._table, tabs])
        self.root.add_class("agentcluster-panel")
        self._drawn: tuple[Nodes, str | None, Status] | None = None
        self._not_before = 0.0
        self._rollout_runs = False

    def __repr__(self) -> str:
        return f"<Panel of cluster {self.cluster.name!r}>"

    @property
    def loop(self) -> IOLoop:
        """Event loop of the cluster."""
        loop = self.cluster.loop
        assert loop is not None
        return loop

    def rollout_begins(self) -> None:
        """Follow a rollout from now on, until it has ended."""
        self._rollout_runs = True

    async def update(self) -> None:
        """Show the current state; soon after the last time only if drawing was quick."""
        if time.monotonic() < self._not_before:
            return
        began = time.thread_time()
        nodes, problem = self.cluster.nodes, self.cluster.view.problem
        now = (nodes, problem, self.cluster.status)
        if now != self._drawn:
            self._drawn = now
            self._draw()
        for part in self._parts:
            part.update(nodes)
        took = time.thread_time() - began
        self._not_before = time.monotonic() + took / SHARE
        swaps = any(node["state"] == "swapping" for node in nodes.values())
        if (swaps or self._rollout_runs) and problem is None and self.cluster.status is Status.running:
            await self._follow()

    async def _follow(self) -> None:
        try:
            rollout = await self.cluster.rollout_status()
        except OSError:  # the scheduler is gone, which the cluster's view reports
            rollout = None
        self._rollout_runs = rollout is not None
        for part in self._parts:
            part.progress(rollout)

    def close(self) -> None:
        """Show that the cluster is closed, and disable all buttons."""
        self._draw()
        for part in self._parts:
            part.close()

    def _draw(self) -> None:
        cluster, nodes, problem = self.cluster, self.cluster.nodes, self.cluster.view.problem
        status = cluster.status.name
        where = "" if status == "closed" else f" at {cluster.scheduler_address}"
        workers = sum(len(node["plan"]) for node in nodes.values())
        title = f"{cluster.name}{where}: {status}, {count(len(nodes), 'node')}, {count(workers, 'worker')}"
        tone: Tone = "good" if status == "running" else "still" if status == "closed" else "busy"
        parts = [toned(title, "bad" if problem else tone)]
        if status == "running" and (link := cluster.dashboard_link):
            parts.append(Markup(f" &nbsp;<a href='{html.escape(link)}' target='_blank'>dashboard</a>"))
        notes = [paragraph(toned(problem, "bad"))] if problem else []
        self._header.value = page(paragraph(stacked(parts)), *notes)
        if status != "closed":
            notes = [paragraph(f"{name}: {node['problem']}") for name, node in nodes.items() if node["problem"]]
            self._table.value = page(scrolled(html_table(nodes.HTML_HEADER, nodes.html_rows())), *notes)

    def run(self, work: Work, message: ipywidgets.HTML, *buttons: ipywidgets.Button, text: str) -> None:
        """Run the work of a button in the cluster's event loop, and show its result.

        Parameters
        ----------
        work
            The work.
        message
            Place for the result.
        *buttons
            Buttons that are disabled meanwhile.
        text
            Message while it runs.
        """
        for button in buttons:
            button.disabled = True
        message.value = page(paragraph(toned(text, "busy")))
        self.loop.add_callback(self._run, work, message, buttons)

    async def _run(self, work: Work, message: ipywidgets.HTML, buttons: Sequence[ipywidgets.Button]) -> None:
        try:
            message.value = page(await work())
        except Exception as error:  # whatever it is, it is shown to the user who pressed the button
            message.value = error_message(error)
        finally:
            for button in buttons:
                button.disabled = self.cluster.status is not Status.running
            self._not_before = 0.0
