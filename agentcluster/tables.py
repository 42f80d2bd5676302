"""Tables and bars, as text and as HTML that fits a light page and a dark one.

Pure rendering: callers pass the content. Cells that are plain text are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

#: Tone of a bar or a word -> its colour, legible on a light and on a dark page.
COLOURS = {"good": "#2e9e5b", "busy": "#d08a00", "bad": "#d64541", "calm": "#3b82c4", "still": "#8a8f98"}

Tone = Literal["good", "busy", "bad", "calm", "still"]

#: Fractions from which a bar is shown as busy, and as bad.
BUSY, FULL = 0.7, 0.9

_STYLE = """<style>
.agentcluster {line-height: 1.45; font-size: 13px}
.agentcluster table {border-collapse: collapse; margin: 4px 0; color: inherit; font-size: inherit}
.agentcluster th, .agentcluster td {text-align: left !important; vertical-align: top; padding: 2px 14px 2px 0}
.agentcluster th {border-bottom: 1px solid rgba(128, 128, 128, .5); font-weight: 600}
.agentcluster th, .agentcluster .scroll td {white-space: nowrap}
.agentcluster p {margin: 3px 0; line-height: inherit}
.agentcluster pre {margin: 3px 0; white-space: pre-wrap; color: inherit; background: none; font-size: 12px}
.agentcluster .scroll {max-height: 420px; overflow: auto}
.agentcluster .bar {position: relative; min-width: 120px; margin-bottom: 2px; border-radius: 3px;
  background: rgba(128, 128, 128, .22); overflow: hidden}
.agentcluster .bar i {position: absolute; left: 0; top: 0; bottom: 0; opacity: .55}
.agentcluster .grid {display: grid; column-gap: 4px}
.agentcluster .grid .bar {min-width: 58px}
.agentcluster .bar span {position: relative; display: block; padding: 0 6px; white-space: nowrap; font-size: 12px}
</style>"""


class Markup(str):
    """HTML that is put on the page unescaped."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Escape a text; :class:`Markup` stays as it is.

    Parameters
    ----------
    text
        Plain text, which is escaped, or :class:`Markup`.

    Returns
    -------
    Markup
        HTML that shows the text.
    """
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def page(*parts: str) -> Markup:
    """Return parts below each other, with the style sheet that they need.

    Parameters
    ----------
    *parts
        Parts of the page, from top to bottom; those that are plain text are escaped.

    Returns
    -------
    Markup
        One element with the style sheet and the parts.
    """
    return Markup(f"<div class='agentcluster'>{_STYLE}{''.join(map(escaped, parts))}</div>")


def paragraph(text: str) -> Markup:
    """Return a paragraph.

    Parameters
    ----------
    text
        Plain text, which is escaped, or :class:`Markup`.

    Returns
    -------
    Markup
        The paragraph.
    """
    return Markup(f"<p>{escaped(text)}</p>")


def scrolled(content: str) -> Markup:
    """Wrap content so that it scrolls where it is long.

    Parameters
    ----------
    content
        Plain text, which is escaped, or :class:`Markup`.

    Returns
    -------
    Markup
        The content in an element of limited height.
    """
    return Markup(f"<div class='scroll'>{escaped(content)}</div>")


def preformatted(text: str) -> Markup:
    """Return text with its line breaks and spaces kept.

    Parameters
    ----------
    text
        Plain text, which is escaped, or :class:`Markup`.

    Returns
    -------
    Markup
        The text; lines that are too long for the page are wrapped.
    """
    return Markup(f"<pre>{escaped(text)}</pre>")


def toned(text: str, tone: Tone) -> Markup:
    """Return a text after a dot in a tone's colour.

    Parameters
    ----------
    text
        Plain text, which is escaped, or :class:`Markup`.
    tone
        Tone of the dot, a key of :data:`COLOURS`.

    Returns
    -------
    Markup
        The dot and the text.
    """
    return Markup(f"<span style='color:{COLOURS[tone]}'>&#9679;</span>&nbsp;{escaped(text)}")


def bar(part: float, says: str, tone: Tone | None = None) -> Markup:
    """Return a bar with a text in it.

    Parameters
    ----------
    part
        Filled fraction, from 0 to 1.
    says
        The text.
    tone
        Its colour; None to choose the colour by the filled fraction.

    Returns
    -------
    Markup
        The bar.
    """
    part = min(max(part, 0.0), 1.0)
    if tone is None:
        tone = "bad" if part >= FULL else "busy" if part >= BUSY else "good"
    return Markup(
        f"<div class='bar'><i style='width:{part:.0%};background:{COLOURS[tone]}'></i>"
        f"<span>{escaped(says)}</span></div>"
    )


def stacked(parts: Iterable[str]) -> Markup:
    """Concatenate parts, of one cell or one paragraph.

    Parameters
    ----------
    parts
        The parts, in order; those that are plain text are escaped.

    Returns
    -------
    Markup
        The parts with nothing between them.
    """
    return Markup("".join(map(escaped, parts)))


def grid(parts: Sequence[str], columns: int) -> Markup:
    """Arrange parts of one cell in columns.

    Parameters
    ----------
    parts
        The parts, row by row; those that are plain text are escaped.
    columns
        Number of columns.

    Returns
    -------
    Markup
        The grid.
    """
    return Markup(f"<div class='grid' style='grid-template-columns:repeat({columns},auto)'>{stacked(parts)}</div>")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Return an HTML table.

    Parameters
    ----------
    header
        Titles of the columns.
    rows
        Cells of each row, as many as there are titles.

    Returns
    -------
    Markup
        The table; cells that are plain text are escaped.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return Markup(f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text with aligned columns.

    Parameters
    ----------
    header
        Titles of the columns.
    rows
        Cells of each row, as many as there are titles.

    Returns
    -------
    str
        Lines separated by newlines, with the header first and without trailing spaces.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def amounts(numbers: Mapping[str, int]) -> str:
    """Format the number of each kind: ``2 cpu, 1 gpu``, or ``none``.

    Parameters
    ----------
    numbers
        Kind -> its number.

    Returns
    -------
    str
        The numbers, in the order of the mapping.
    """
    return ", ".join(f"{number} {kind}" for kind, number in numbers.items()) or "none"


def count(number: int, what: str) -> str:
    """Format a number with its noun: ``1 node``, ``2 nodes``.

    Parameters
    ----------
    number
        The number.
    what
        The noun in the singular; its plural is formed with ``s``.

    Returns
    -------
    str
        Number and noun.
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
