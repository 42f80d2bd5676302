"""Parts that the panel's tabs share: their base class, fields, and messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

import ipywidgets

from agentcluster.errors import ConfigError, one_line
from agentcluster.model import RolloutStatus
from agentcluster.reports import Nodes, RolloutReport
from agentcluster.tables import Markup, Tone, html_table, page, paragraph, scrolled, stacked, toned

if TYPE_CHECKING:
    from agentcluster.client.widget import Panel

#: Work that a button begins; returns the HTML to show afterwards.
Work = Callable[[], Awaitable[str]]


class Part:
    """Tab of the panel.

    Parameters
    ----------
    panel : Panel
        The panel.

    Attributes
    ----------
    TITLE : str
        Title of the tab.
    root : ipywidgets.Widget
        The tab's widget.
    message : ipywidgets.HTML
        Place for the result of the last button.
    buttons : list of ipywidgets.Button
        The tab's buttons.
    """

    TITLE = ""
    root: ipywidgets.Widget

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self.cluster = panel.cluster
        self.message = ipywidgets.HTML()
        self.buttons: list[ipywidgets.Button] = []

    def __repr__(self) -> str:
        return f"<Tab {self.TITLE!r} of {self.panel!r}>"

    def button(self, label: str, pressed: Callable[[], None], style: str = "", tip: str = "") -> ipywidgets.Button:
        """Make a button of this tab.

        Parameters
        ----------
        label
            Text on the button.
        pressed
            Called when it is pressed.
        style
            Style of ipywidgets, such as ``primary``.
        tip
            Text shown beside the pointer; default is the label.

        Returns
        -------
        Button
            The button.
        """
        made = ipywidgets.Button(description=label, button_style=style, tooltip=tip or label, layout={"width": "auto"})
        made.on_click(lambda _: pressed())
        self.buttons.append(made)
        return made

    def update(self, nodes: Nodes) -> None:
        """Show the state of the nodes.

        Parameters
        ----------
        nodes
            The nodes.
        """

    def progress(self, rollout: RolloutStatus | None) -> None:
        """Show the progress of a rollout.

        Parameters
        ----------
        rollout
            The progress; None when no rollout runs.
        """

    def close(self) -> None:
        """Disable the buttons, because the cluster is closed."""
        for button in self.buttons:
            button.disabled = True


# -- fields ------------------------------------------------------------------------------------------------------------


def text_field(label: str, hint: str) -> ipywidgets.Text:
    """Return a field for text, with a hint in it while it is empty.

    Parameters
    ----------
    label
        Text before the field.
    hint
        Text in the field while it is empty.

    Returns
    -------
    Text
        The field, which is empty.
    """
    return ipywidgets.Text(description=label, placeholder=hint, continuous_update=False)


def number_field(label: str, value: str = "") -> ipywidgets.Text:
    """Return a field for a number that may also be left empty.

    Parameters
    ----------
    label
        Text before the field.
    value
        Text in the field at first.

    Returns
    -------
    Text
        The field; its text is not checked before :func:`number_in` reads it.
    """
    return ipywidgets.Text(
        value=value,
        description=label,
        placeholder="-",
        continuous_update=False,  # a kernel that is busy would be sent the first digit, and act on it
        style={"description_width": "90px"},
        layout={"width": "170px"},
    )


def names_in(field: ipywidgets.Text) -> list[str]:
    """Return the names in a field, which are separated by commas.

    Parameters
    ----------
    field
        The field.

    Returns
    -------
    list of str
        The names without spaces around them; empty for an empty field.
    """
    return [each.strip() for each in field.value.split(",") if each.strip()]


def number_in(field: ipywidgets.Text) -> int:
    """Return the number in a field.

    Raises
    ------
    ConfigError
        When it is not a whole number.
    """
    text = field.value.strip()
    if not text.isdecimal():
        raise ConfigError(f"{field.description}: {text!r} is not a whole number such as 4")
    return int(text)


def numbers_in(fields: Mapping[str, ipywidgets.Text]) -> dict[str, int]:
    """Return the numbers in those fields that are not empty.

    Parameters
    ----------
    fields
        Key -> field.

    Returns
    -------
    dict
        Key -> number, without the keys of empty fields.

    Raises
    ------
    ConfigError
        When one of them is not a whole number.
    """
    return {key: number_in(field) for key, field in fields.items() if field.value.strip()}


# -- messages ----------------------------------------------------------------------------------------------------------


def error_message(error: Exception) -> Markup:
    """Return an error as HTML.

    Parameters
    ----------
    error
        The error.

    Returns
    -------
    Markup
        Its message in one line, after a dot in the tone ``bad``.
    """
    return page(paragraph(toned(one_line(error), "bad")))


def report_message(report: RolloutReport, tone: Tone) -> Markup:
    """Return a report as HTML, with a dot of a tone before its summary.

    Parameters
    ----------
    report
        Report of a rollout.
    tone
        Tone of the dot.

    Returns
    -------
    Markup
        The summary, the table of the nodes where there are some, and the notes.
    """
    table = [scrolled(html_table(report.header(), report.rows()))] if report.nodes else []
    return stacked([paragraph(toned(report.summary(), tone)), *table, *map(paragraph, report.notes())])
