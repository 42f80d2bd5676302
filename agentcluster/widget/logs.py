"""The tab that shows what the agent of a node logged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ipywidgets import Dropdown, HBox, VBox

from agentcluster.errors import ConfigError
from agentcluster.markup import preformatted, scrolled
from agentcluster.report import Nodes
from agentcluster.widget.part import Part

if TYPE_CHECKING:
    from agentcluster.widget import Panel

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
