"""What the tabs of the panel are made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets

from agentcluster.errors import ConfigError, one_line
from agentcluster.reports import Nodes
from agentcluster.tables import Markup, page, paragraph, toned

if TYPE_CHECKING:
    from agentcluster.client.widget import Panel

#: What a button begins; returns what is to be shown of it.
Work = Callable[[], Awaitable[str]]


class Part:
    """One tab of the panel."""

    TITLE = ""
    root: ipywidgets.Widget

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self.cluster = panel.cluster
        self.message = ipywidgets.HTML()
        self.buttons: list[ipywidgets.Button] = []

    def button(self, label: str, pressed: Callable[[], None], style: str = "", tip: str = "") -> ipywidgets.Button:
        """Make a button of this part."""
        made = ipywidgets.Button(description=label, button_style=style, tooltip=tip or label, layout={"width": "auto"})
        made.on_click(lambda _: pressed())
        self.buttons.append(made)
        return made

    def update(self, nodes: Nodes) -> None:
        """Show what is true now."""

    def progress(self, rollout: Mapping[str, Any] | None) -> None:
        """Show how far a rollout is."""

    def close(self) -> None:
        """Have nothing pressed any more."""
        for button in self.buttons:
            button.disabled = True


def text_field(label: str, hint: str) -> ipywidgets.Text:
    return ipywidgets.Text(description=label, placeholder=hint)


def number_field(label: str, value: str = "") -> ipywidgets.Text:
    """Return a field that may also be left empty, unlike one for numbers only."""
    style = {"description_width": "90px"}
    return ipywidgets.Text(value=value, description=label, placeholder="-", style=style, layout={"width": "170px"})


def listed(field: ipywidgets.Text) -> list[str]:
    """Return what is between the commas."""
    return [each.strip() for each in field.value.split(",") if each.strip()]


def numbers(fields: Mapping[str, ipywidgets.Text]) -> dict[str, int]:
    """Return the numbers of those fields that are not empty."""
    return {key: whole(field) for key, field in fields.items() if field.value.strip()}


def wrong(error: Exception) -> Markup:
    """Return an error for who pressed the button."""
    return page(paragraph(toned(one_line(error), "bad")))


def whole(field: ipywidgets.Text) -> int:
    text = field.value.strip()
    if not text.isdecimal():
        raise ConfigError(f"{field.description}: {text!r} is not a whole number such as 4")
    return int(text)
