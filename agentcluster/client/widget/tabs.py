"""Tabs of the panel: reprovision, scale, adapt, and logs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ipywidgets import HTML, Dropdown, HBox, SelectMultiple, VBox

from agentcluster import modes
from agentcluster.client.calls import Plain
from agentcluster.client.widget.controls import (
    Part,
    Work,
    error_message,
    names_in,
    number_field,
    number_in,
    numbers_in,
    report_message,
    text_field,
)
from agentcluster.errors import ConfigError
from agentcluster.model import RolloutStatus
from agentcluster.reports import Nodes, RolloutReport
from agentcluster.tables import (
    Markup,
    Tone,
    amounts,
    bar,
    count,
    html_table,
    page,
    paragraph,
    preformatted,
    scrolled,
    stacked,
    toned,
)

if TYPE_CHECKING:
    from agentcluster.client.widget import Panel

#: Number of adaptive decisions that are shown.
DECISIONS = 8

#: Seconds after which a log is given up.
LOG_TIMEOUT = 10.0

#: Number of lines of a log that are shown.
LOG_LINES = 200


class Change(Part):
    """Tab that changes nodes: select them, plan or make the change, follow it, undo it."""

    TITLE = "Reprovision"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._names = SelectMultiple(layout={"width": "160px", "height": "104px"})
        self._nodes = text_field("nodes", "all, or gpu-1, gpu-*, rack=a")
        self._mode = Dropdown(options=modes.names(), description="mode")
        self._config = text_field("options", '{"nthreads": 2}')
        self._strategy = Dropdown(options=["surge", "replace"], description="strategy")
        self._drain = Dropdown(options=["tasks", "data", "now"], description="drain")
        self._bars = HTML()
        self._asked: tuple[object, ...] = ()
        self._names.observe(self._copy_selection, "value")
        self._plan = self.button("Dry run", lambda: self._change(True), tip="Plan and check; nothing is changed")
        self._go = self.button("Reprovision", lambda: self._change(False), "primary", "Change the workers in place")
        self._undo = self.button("Undo", self._undo_last, tip="Restore what the last rollout changed")
        self._pause = self.button("Pause", self._pause_or_resume, tip="Begin no further wave of nodes")
        self._cancel = self.button("Cancel", lambda: self._control("cancel"), tip="End the rollout that runs")
        self._pause.disabled = self._cancel.disabled = True
        fields = VBox([self._nodes, self._mode, self._config])
        policy = VBox([self._strategy, self._drain])
        buttons = HBox([self._plan, self._go, self._undo, self._pause, self._cancel])
        self.root = VBox([HBox([self._names, fields, policy]), buttons, self._bars, self.message])

    def update(self, nodes: Nodes) -> None:
        """Offer the nodes that are there, and keep the selection.

        Parameters
        ----------
        nodes
            The nodes.
        """
        if tuple(nodes) != self._names.options:
            kept = [name for name in self._names.value if name in nodes]
            self._names.unobserve(self._copy_selection, "value")
            self._names.options = tuple(nodes)
            self._names.value = kept
            self._names.observe(self._copy_selection, "value")

    def _copy_selection(self, change: Mapping[str, tuple[str, ...]]) -> None:
        self._nodes.value = ", ".join(change["new"])

    def _change(self, dry_run: bool) -> None:
        mode, config = self._mode.value, self._config.value.strip() or None
        names, strategy, drain = names_in(self._nodes) or None, self._strategy.value, self._drain.value

        asked = (mode, config, names, strategy, drain)
        asks = drain == "now" and not dry_run and self._asked != asked

        async def change(dry_run: bool) -> RolloutReport:
            return await self.cluster.reprovision(
                mode, config, nodes=names, strategy=strategy, drain=drain, dry_run=dry_run
            )

        async def work() -> str:
            if asks and (planned := await change(dry_run=True)).given_up:
                self._asked = asked
                return _result(planned, acted, "Reprovision again does it")
            self._asked = ()
            return _result(await change(dry_run), acted)

        what = self._nodes.value.strip() or "all nodes"
        acted = f"{mode}{f' {config}' if config else ''} on {what}, strategy {strategy}, drain {drain}"
        self._begin(work, f"{'planning' if dry_run else 'reprovisioning'} {what} to {mode}")

    def _undo_last(self) -> None:
        async def work() -> str:
            return _result(await self.cluster.rollout.undo())

        self._begin(work, "undoing the last rollout")

    def _begin(self, work: Work, text: str) -> None:
        self.panel.rollout_begins()
        self.panel.run(work, self.message, self._plan, self._go, self._undo, text=text)

    def _pause_or_resume(self) -> None:
        self._control("resume" if self._pause.description == "Resume" else "pause")

    def _control(self, action: Literal["pause", "resume", "cancel"]) -> None:
        async def control() -> None:
            rollout = self.cluster.rollout
            try:
                status = await rollout.status()
                await {"pause": rollout.pause, "resume": rollout.resume, "cancel": rollout.cancel}[action]()
                what = f"the rollout to {status.mode} on {', '.join(status.nodes)}" if status else "the rollout"
                self.message.value = page(paragraph(toned(f"{action}: {what}", "busy")))
            except Exception as error:  # it may have ended just now, or the scheduler is gone
                self.message.value = error_message(error)

        self.panel.loop.add_callback(control)

    def progress(self, rollout: RolloutStatus | None) -> None:
        """Show a bar per node; nothing when no rollout runs.

        Parameters
        ----------
        rollout
            The progress.
        """
        self._pause.disabled = self._cancel.disabled = rollout is None
        paused = rollout is not None and (rollout.state == "paused" or rollout.pausing)
        self._pause.description = "Resume" if paused else "Pause"
        self._bars.value = page(_bars(rollout)) if rollout is not None else ""


def _result(report: RolloutReport, *lines: str) -> Markup:
    """Return a report as HTML, with more lines below it."""
    tone: Tone = "bad" if report.given_up else "calm" if report.dry_run else "good"
    return stacked([report_message(report, tone), *map(paragraph, lines)])


def _bars(rollout: RolloutStatus) -> Markup:
    rows = [
        (name, bar(each.percent / 100, str(each), "good" if each.percent >= 100 else "calm"))
        for name, each in rollout.nodes.items()
    ]
    return stacked([paragraph(rollout.summary()), scrolled(html_table(("node", "progress"), rows))])


class Scaling(Part):
    """Tab that sets the number of workers."""

    TITLE = "Scale"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._number = number_field("workers")
        self._kinds = {kind: number_field(f"{kind} workers") for kind in ("cpu", "gpu")}
        total = self.button("Scale", self._to_number, "primary")
        kinds = self.button("Scale kinds", self._to_kinds, "primary", "Kinds that are left empty stay as they are")
        self._now = HTML()
        self.root = VBox([self._now, HBox([self._number, total]), HBox([*self._kinds.values(), kinds]), self.message])

    def update(self, nodes: Nodes) -> None:
        """Show the number of workers.

        Parameters
        ----------
        nodes
            The nodes.
        """
        text = page(paragraph(f"workers now: {amounts(dict(sorted(nodes.kinds().items())))}"))
        if text != self._now.value:
            self._now.value = text

    def _to_number(self) -> None:
        self._scale(lambda: {"n": number_in(self._number)}, f"{self._number.value.strip()} workers")

    def _to_kinds(self) -> None:
        def target() -> dict[str, int]:
            if numbers := numbers_in(self._kinds):
                return numbers
            raise ConfigError("enter the number of workers of a kind")

        texts = {kind: field.value.strip() for kind, field in self._kinds.items()}
        self._scale(target, ", ".join(f"{text} {kind} workers" for kind, text in texts.items() if text))

    def _scale(self, target: Callable[[], Plain], what: str) -> None:
        async def work() -> str:
            report = await self.cluster.scale(**target())
            return report_message(report, "busy" if report.short else "good")

        self.panel.run(work, self.message, *self.buttons, text=f"scaling to {what}")


class Adapting(Part):
    """Tab that scales by demand."""

    TITLE = "Adapt"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._minimum, self._maximum = number_field("minimum", "0"), number_field("maximum")
        self._modes = text_field("modes", "auto-cpu, auto-gpu")
        adapt = self.button("Adapt", self._adapt, "primary")
        stop = self.button("Stop", self._stop)
        self._decisions = HTML()
        self._shown: object = None
        row = HBox([self._minimum, self._maximum, self._modes, adapt, stop])
        self.root = VBox([row, self.message, self._decisions])

    def update(self, nodes: Nodes) -> None:
        """Show the last decisions.

        Parameters
        ----------
        nodes
            The nodes.
        """
        log = self.cluster.adaptive_log()
        last = log[-1] if len(log) else None
        if last is not self._shown:
            self._shown = last
            self._decisions.value = page(html_table(log.HEADER, log.rows()[-DECISIONS:][::-1]))

    def _adapt(self) -> None:
        async def work() -> str:
            limits = numbers_in({"minimum": self._minimum, "maximum": self._maximum})
            names = names_in(self._modes)
            options: dict[str, Any] = {**limits, **({"modes": names} if names else {})}
            self.cluster.adapt(**options)
            shown = [f"{key} {value}" for key, value in limits.items()] + [f"modes {', '.join(names)}"] * bool(names)
            return paragraph(toned(f"adapting: {', '.join(shown) or 'no limits'}", "good"))

        self.panel.run(work, self.message, *self.buttons, text="adapting")

    def _stop(self) -> None:
        async def work() -> str:
            adaptive = self.cluster.scaling.adaptive
            ran = adaptive is not None and adaptive.state in ("starting", "running")
            self.cluster.scaling.stop_adaptive()
            workers = count(sum(self.cluster.nodes.kinds().values()), "worker")
            return paragraph(f"not adapting: {'stopped' if ran else 'it did not run'}, {workers} there")

        self.panel.run(work, self.message, *self.buttons, text="stopping")


class Logs(Part):
    """Tab that shows the log of a node's agent."""

    TITLE = "Logs"

    def __init__(self, panel: Panel) -> None:
        super().__init__(panel)
        self._node = Dropdown(description="node")
        show = self.button("Show", self._show)
        self.root = VBox([HBox([self._node, show]), self.message])

    def update(self, nodes: Nodes) -> None:
        """Offer the nodes that are there.

        Parameters
        ----------
        nodes
            The nodes.
        """
        if tuple(nodes) != self._node.options:
            kept = self._node.value
            self._node.options = tuple(nodes)
            self._node.value = kept if kept in nodes else next(iter(nodes), None)

    def _show(self) -> None:
        name = self._node.value

        async def work() -> str:
            if name is None:
                raise ConfigError("there is no node")
            async with asyncio.timeout(LOG_TIMEOUT):
                lines = (await self.cluster.display.agent_logs()).get(name, [])
            shown = lines[-LOG_LINES:]
            title = paragraph(f"log of {name}, {f'last {LOG_LINES} lines' if len(lines) > len(shown) else 'all of it'}")
            return stacked([title, scrolled(preformatted("\n".join(shown) or "nothing was logged"))])

        self.panel.run(work, self.message, *self.buttons, text=f"reading the log of {name}")
