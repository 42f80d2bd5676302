"""The tab that changes nodes: which, to what mode and how; what it would do, how far it is, what it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets

from agentcluster import modes
from agentcluster.markup import Markup, bar, html_table, page, paragraph, scrolled, stacked, toned
from agentcluster.progress import reckon
from agentcluster.report import Nodes, Report
from agentcluster.widget.part import Part, Work, listed, text_field, wrong

if TYPE_CHECKING:
    from agentcluster.widget import Panel


class Change(Part):
    """Nodes, a mode, and the rollout."""

    TITLE = "Reprovision"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._names = ipywidgets.SelectMultiple(layout={"width": "160px", "height": "104px"})
        self._nodes = text_field("nodes", "all, or gpu-1, gpu-*, rack=a")
        self._mode = ipywidgets.Dropdown(options=modes.names(), description="mode")
        self._config = text_field("options", '{"nthreads": 2}')
        self._strategy = ipywidgets.Dropdown(options=["surge", "replace"], description="strategy")
        self._drain = ipywidgets.Dropdown(options=["tasks", "data", "now"], description="drain")
        self._bars = ipywidgets.HTML()
        self._names.observe(self._picked, "value")
        self._look = self.button("Dry run", lambda: self._change(True), tip="Plan and check; nothing is changed")
        self._go = self.button("Reprovision", lambda: self._change(False), "primary", "Swap the workers in place")
        self._undo = self.button("Undo", self._back, tip="Bring back what the last rollout changed")
        self._pause = self.button("Pause", self._halt, tip="Begin no further wave of nodes")
        self._cancel = self.button("Cancel", self._end, tip="End the rollout that runs")
        self._pause.disabled = self._cancel.disabled = True
        fields = ipywidgets.VBox([self._nodes, self._mode, self._config])
        more = ipywidgets.VBox([self._strategy, self._drain])
        buttons = ipywidgets.HBox([self._look, self._go, self._undo, self._pause, self._cancel])
        self.root = ipywidgets.VBox(
            [ipywidgets.HBox([self._names, fields, more]), buttons, self._bars, self.message],
        )

    def update(self, nodes: Nodes) -> None:
        """Offer the nodes that there are, and leave chosen what was."""
        if tuple(nodes) != self._names.options:
            kept = [name for name in self._names.value if name in nodes]
            self._names.unobserve(self._picked, "value")
            self._names.options = tuple(nodes)
            self._names.value = kept
            self._names.observe(self._picked, "value")

    def _picked(self, change: Mapping[str, Any]) -> None:
        self._nodes.value = ", ".join(change["new"])

    def _change(self, dry_run: bool) -> None:
        text = self._nodes.value.strip()
        terms: dict[str, Any] = {"strategy": self._strategy.value, "drain": self._drain.value, "dry_run": dry_run}
        terms["nodes"] = listed(self._nodes) or None
        mode, config = self._mode.value, self._config.value.strip() or None

        async def work() -> str:
            report: Report = await self.cluster.reprovision(mode, config, **terms)
            return _told(report)

        says = f"{'planning' if dry_run else 'reprovisioning'} {text or 'all nodes'} to {mode}"
        self._begin(work, says)

    def _back(self) -> None:
        async def work() -> str:
            report: Report = await self.cluster.rollout.undo()
            return _told(report)

        self._begin(work, "undoing the last rollout")

    def _begin(self, work: Work, says: str) -> None:
        self.panel.rolls = True
        self.panel.run(work, self.message, self._look, self._go, self._undo, says=says)

    def _halt(self) -> None:
        action = "resume" if self._pause.description == "Resume" else "pause"
        self.cluster.loop.add_callback(self._control, action)

    def _end(self) -> None:
        self.cluster.loop.add_callback(self._control, "cancel")

    async def _control(self, action: str) -> None:
        try:
            await getattr(self.cluster.rollout, action)()
        except Exception as error:  # it may have ended just now, or the scheduler is gone
            self.message.value = wrong(error)

    def progress(self, rollout: Mapping[str, Any] | None) -> None:
        """Show a bar per node; nothing when it is over."""
        self._pause.disabled = self._cancel.disabled = rollout is None
        halted = rollout is not None and (rollout["state"] == "paused" or rollout["pausing"])
        self._pause.description = "Resume" if halted else "Pause"
        self._bars.value = page(_bars(rollout)) if rollout is not None else ""


def _told(report: Report) -> Markup:
    table = scrolled(html_table(report.header(), report.rows()))
    return stacked(
        [
            paragraph(toned(report.summary(), "calm" if report.dry_run else "good")),
            table,
            *map(paragraph, report.notes()),
        ]
    )


def _bars(rollout: Mapping[str, Any]) -> Markup:
    state = rollout["state"]
    if rollout["pausing"] and state == "running":
        state = "pauses after this wave"
    title = f"rollout to {rollout['mode']}: {state}, {rollout['seconds']:.0f} s"
    rows = []
    for name, step in rollout["nodes"].items():
        done, says = reckon(step)
        rows.append((name, bar(done / 100, says, "good" if done >= 100 else "calm")))
    return stacked([paragraph(title), scrolled(html_table(("node", "progress"), rows))])
