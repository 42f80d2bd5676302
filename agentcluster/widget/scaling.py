"""The tabs that say how many workers there are: by number, or as many as tasks need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ipywidgets import HTML, HBox, VBox

from agentcluster.errors import ConfigError
from agentcluster.markup import amounts, html_table, page, paragraph, toned
from agentcluster.report import Nodes
from agentcluster.widget.part import Part, listed, number_field, numbers, text_field, whole

if TYPE_CHECKING:
    from agentcluster.widget import Panel

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
