"""The tab that changes nodes: which, to what mode and how; what it would do, how far it is, what it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets

from agentcluster import modes
from agentcluster.client.rollouts import reckon
from agentcluster.client.widget.controls import Part, Work, listed, text_field, wrong
from agentcluster.reports import Nodes, Report
from agentcluster.tables import Markup, bar, html_table, page, paragraph, scrolled, stacked, toned

if TYPE_CHECKING:
    from agentcluster.client.widget import Panel
import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from ipywidgets import HTML, Dropdown, HBox, VBox

from agentcluster.client.widget.controls import number_field, numbers, whole
from agentcluster.errors import ConfigError
from agentcluster.tables import amounts, preformatted


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


#: Decisions of adaptive scaling that are shown.
DECISIONS = 8


class Scaling(Part):
    """How many workers."""

    TITLE = "Scale"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._count = number_field("workers")
        self._kinds = {kind: number_field(f"{kind} workers") for kind in ("cpu", "gpu")}
        total = self.button("Scale", self._to_number, "primary")
        kinds = self.button("Scale kinds", self._to_kinds, "primary", "Kinds that are left empty stay as they are")
        self._says = HTML()
        self.root = VBox(
            [
                self._says,
                HBox([self._count, total]),
                HBox([*self._kinds.values(), kinds]),
                self.message,
            ]
        )

    def update(self, nodes: Nodes) -> None:
        """Say how many there are."""
        says = page(paragraph(f"workers now: {amounts(dict(sorted(nodes.kinds().items())))}"))
        if says != self._says.value:
            self._says.value = says

    def _to_number(self) -> None:
        self._scale(lambda: {"n": whole(self._count)}, "workers")

    def _to_kinds(self) -> None:
        self._scale(lambda: numbers(self._kinds), "workers of a kind")

    def _scale(self, wanted: Callable[[], Mapping[str, int]], what: str) -> None:
        async def work() -> str:
            target = wanted()
            if not target:
                raise ConfigError(f"say how many {what}")
            await self.cluster.scale(**target)
            there = self.cluster.nodes.kinds()
            there["n"] = sum(there.values())
            short = [f"room for {there.get(kind, 0)} of {n}" for kind, n in target.items() if there.get(kind, 0) < n]
            return paragraph(toned("; ".join(short) or "scaled", "busy" if short else "good"))

        self.panel.run(work, self.message, *self.buttons, says="scaling")


class Adapting(Part):
    """As many workers as tasks need."""

    TITLE = "Adapt"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._least, self._most = number_field("minimum", "0"), number_field("maximum")
        self._modes = text_field("modes", "auto-cpu, auto-gpu")
        adapt = self.button("Adapt", self._adapt, "primary")
        stop = self.button("Stop", self._stop)
        self._decided = HTML()
        self._shown: object = None
        row = HBox([self._least, self._most, self._modes, adapt, stop])
        self.root = VBox([row, self.message, self._decided])

    def update(self, nodes: Nodes) -> None:
        """Show the last decisions."""
        log = self.cluster.adaptive_log()
        last = log[-1] if len(log) else None
        if last is not self._shown:
            self._shown = last
            self._decided.value = page(html_table(log.HEADER, log.rows()[-DECISIONS:][::-1]))

    def _adapt(self) -> None:
        async def work() -> str:
            wanted: dict[str, Any] = dict(numbers({"minimum": self._least, "maximum": self._most}))
            if names := listed(self._modes):
                wanted["modes"] = names
            self.cluster.adapt(**wanted)
            limits = ", ".join(f"{key} {value}" for key, value in wanted.items())
            return paragraph(toned(f"adapting: {limits or 'no limits'}", "good"))

        self.panel.run(work, self.message, *self.buttons, says="adapting")

    def _stop(self) -> None:
        async def work() -> str:
            self.cluster._by_hand()
            return paragraph("not adapting")

        self.panel.run(work, self.message, *self.buttons, says="stopping")


#: Seconds in which a log comes.
TIMEOUT = 10.0

#: Lines that are shown.
LINES = 200


class Logs(Part):
    """What the agent of a node logged."""

    TITLE = "Logs"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._node = Dropdown(description="node")
        show = self.button("Show", self._show)
        self.root = VBox([HBox([self._node, show]), self.message])

    def update(self, nodes: Nodes) -> None:
        """Offer the nodes that there are."""
        if tuple(nodes) != self._node.options:
            kept = self._node.value
            self._node.options = tuple(nodes)
            self._node.value = kept if kept in nodes else next(iter(nodes), None)

    def _show(self) -> None:
        name = self._node.value

        async def work() -> str:
            if name is None:
                raise ConfigError("there is no node")
            async with asyncio.timeout(TIMEOUT):
                lines = (await self.cluster._agent_logs()).get(name, [])
            return scrolled(preformatted("\n".join(lines[-LINES:]) or "nothing was logged"))

        self.panel.run(work, self.message, *self.buttons, says=f"reading the log of {name}")
