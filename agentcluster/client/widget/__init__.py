"""The panel that a notebook shows of a cluster: what its nodes do, and buttons for what can be asked of it.

It draws what the cluster knows anyway, and asks the scheduler only while a rollout runs. What a button begins runs in
the cluster's event loop, so the kernel stays free; what became of it, an error too, is shown below the buttons.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

import ipywidgets
from distributed.core import Status

from agentcluster.client.widget.controls import Work, wrong
from agentcluster.client.widget.tabs import Adapting, Change, Logs, Scaling
from agentcluster.tables import Markup, Tone, count, html_table, page, paragraph, scrolled, stacked, toned

#: Part of the time that drawing may take.
SHARE = 0.05


class Panel:
    """What is shown of a cluster.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.

    Attributes
    ----------
    root : ipywidgets.VBox
        The widget.
    """

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self._header = ipywidgets.HTML()
        self._table = ipywidgets.HTML()
        self._parts = [Change(self), Scaling(self), Adapting(self), Logs(self)]
        tabs = ipywidgets.Tab([part.root for part in self._parts], selected_index=0)
        tabs.titles = [part.TITLE for part in self._parts]
        self.root = ipywidgets.VBox([self._header, self._table, tabs])
        self.root.add_class("agentcluster-panel")
        self._drawn: tuple[Any, ...] = ()
        self._not_before = 0.0
        self.rolls = False

    async def update(self) -> None:
        """Show what is true now; soon after the last time only if that was quick."""
        if time.monotonic() < self._not_before:
            return
        began = time.thread_time()
        nodes, problem = self.cluster.nodes, self.cluster._problem
        now = (nodes, problem, self.cluster.status)
        if now != self._drawn:
            self._drawn = now
            self._draw()
        for part in self._parts:
            part.update(nodes)
        took = time.thread_time() - began
        self._not_before = time.monotonic() + took / SHARE
        swaps = any(node["state"] == "swapping" for node in nodes.values())
        if (swaps or self.rolls) and problem is None and self.cluster.status is Status.running:
            await self._follow()

    async def _follow(self) -> None:
        try:
            rollout = await self.cluster.rollout_status()
        except OSError:  # the scheduler is gone, which the cluster finds out and says
            rollout = None
        self.rolls = rollout is not None
        for part in self._parts:
            part.progress(rollout)

    def close(self) -> None:
        """Show that the cluster is closed, and that nothing can be asked of it."""
        self._draw()
        for part in self._parts:
            part.close()

    def _draw(self) -> None:
        cluster, nodes = self.cluster, self.cluster.nodes
        status = cluster.status.name
        where = "" if status == "closed" else f" at {cluster.scheduler_address}"
        workers = sum(len(node["plan"]) for node in nodes.values())
        says = f"{cluster.name}{where}: {status}, {count(len(nodes), 'node')}, {count(workers, 'worker')}"
        tone: Tone = "good" if status == "running" else "still" if status == "closed" else "busy"
        parts = [toned(says, "bad" if cluster._problem else tone)]
        if status == "running" and (link := cluster.dashboard_link):
            parts.append(Markup(f" &nbsp;<a href='{html.escape(link)}' target='_blank'>dashboard</a>"))
        told = [paragraph(toned(cluster._problem, "bad"))] if cluster._problem else []
        self._header.value = page(paragraph(stacked(parts)), *told)
        if status != "closed":
            told = [paragraph(f"{name}: {node['problem']}") for name, node in nodes.items() if node["problem"]]
            self._table.value = page(scrolled(html_table(nodes.HTML_HEADER, nodes.html_rows())), *told)

    def run(self, work: Work, message: ipywidgets.HTML, *buttons: ipywidgets.Button, says: str) -> None:
        """Begin something in the cluster's loop; the buttons rest until it has ended, and its words are shown."""
        for button in buttons:
            button.disabled = True
        message.value = page(paragraph(toned(says, "busy")))
        self.cluster.loop.add_callback(self._run, work, message, buttons)

    async def _run(self, work: Work, message: ipywidgets.HTML, buttons: Sequence[ipywidgets.Button]) -> None:
        try:
            message.value = page(await work())
        except Exception as error:  # whatever it was, it is for who pressed the button
            message.value = wrong(error)
        finally:
            for button in buttons:
                button.disabled = self.cluster.status is not Status.running
            self._not_before = 0.0
