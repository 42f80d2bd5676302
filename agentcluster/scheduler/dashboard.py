"""Nodes page of the scheduler's dashboard, and its plots for JupyterLab: nodes, rollouts, adaptive decisions.

Imported only where the scheduler has a dashboard, and so bokeh. Dask builds its pages when the scheduler starts; these
come later, with the plugin, as one more application of the same web server.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    DataRange1d,
    DatetimeTickFormatter,
    FactorRange,
    HoverTool,
    LayoutDOM,
)
from bokeh.models.widgets.markups import Div
from bokeh.plotting import figure
from bokeh.server.tornado import BokehTornado
from dask.utils import format_bytes, natural_sort_key
from distributed import Scheduler
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from distributed.http.scheduler.info import IndividualPlots
from tornado.ioloop import IOLoop

from agentcluster.reports import TONES, data_held, shape_of
from agentcluster.scheduler.planning.nodes import Node, Registry
from agentcluster.tables import COLOURS, amounts, count, page, stacked, toned
from agentcluster.wire import TOPIC

#: Kind of worker -> its colour; others share one.
KINDS = {"cpu": "#3b82c4", "gpu": "#76b900"}
OTHER = "#9467bd"

#: Step of a rollout -> its colour.
STEPS = {"swap": "#8a8f98", "start": "#3b82c4", "drain": "#d08a00", "retire": "#9467bd", "stop": "#d64541"}

#: Measured load of a host -> its colour, and its offset beside the others.
LOAD = {"CPU": ("#2e9e5b", -0.3), "memory": ("#d08a00", -0.1), "GPU": ("#76b900", 0.1), "GPU memory": ("#3b82c4", 0.3)}

#: Milliseconds between two updates.
INTERVAL = 500

#: Pixels of a node, and of a plot beside its nodes.
LINE, FRAME = 26, 110

#: Returns the number of ``keys`` on a node's workers, and their ``nbytes``.
DataOn = Callable[[Node], Mapping[str, int]]

SizingMode = Literal["stretch_width"]

Row = Mapping[str, object]
Columns = dict[str, list[object]]


class NodesPlot:
    """Each node's workers by kind, its state and its load.

    Parameters
    ----------
    registry
        The nodes.
    data_on
        Amount of data on a node's workers.
    sizing_mode
        Passed to bokeh.
    """

    def __init__(self, registry: Registry, data_on: DataOn, sizing_mode: SizingMode | None = None) -> None:
        self.registry, self.data_on = registry, data_on
        self.names = FactorRange()
        self.workers, self.load, self.words = (ColumnDataSource(data) for data in self._data())
        about = [(field, f"@{field}") for field in ("node", "state", "mode", "shape", "data", "problem")]
        self.widths = DataRange1d(start=0)
        self.figure = _figure(
            "Workers by kind",
            self.names,
            "workers",
            x_range=self.widths,
            toolbar_location=None,
            sizing_mode=sizing_mode,
        )
        self.figure.xaxis.ticker = _whole_numbers()
        bars = self.figure.hbar(
            y="node", left="left", right="right", height=0.7, color="color", legend_field="kind", source=self.workers
        )
        self.figure.text(
            x="right",
            y="node",
            text="says",
            x_offset=8,
            text_baseline="middle",
            text_font_size="11px",
            source=self.words,
        )
        self.figure.add_tools(HoverTool(renderers=[bars], tooltips=[("kind", "@kind"), ("workers", "@number"), *about]))
        _legend(self.figure)
        self.busy = _figure(
            "Load of the hosts", self.names, "%", x_range=(0, 100), toolbar_location=None, sizing_mode=sizing_mode
        )
        loads = self.busy.hbar(
            y="y", left=0, right="percent", height=0.18, color="color", legend_field="what", source=self.load
        )
        self.busy.add_tools(HoverTool(renderers=[loads], tooltips=[("node", "@node"), ("@what", "@says")]))
        _legend(self.busy)
        self.busy.yaxis.visible = False
        self.summary = Div(sizing_mode="stretch_width")
        plots = row(self.figure, self.busy, sizing_mode="stretch_width")
        self.root = column(self.summary, plots, sizing_mode=sizing_mode)

    def update(self) -> None:
        """Draw the present state of the nodes."""
        data = self._data()
        names = _downwards(self.registry.nodes)
        if names != self.names.factors:
            self.names.factors = names
            self.figure.height = self.busy.height = FRAME + LINE * max(3, len(names))
        widest = max((len(node.plan.workers) for node in self.registry.nodes.values()), default=0)
        self.widths.end = 2.6 * max(1, widest)  # room for the words beside the longest bar
        for source, new in zip((self.workers, self.load, self.words), data, strict=True):
            _put(source, new)
        self.summary.text = self._summary()

    def _summary(self) -> str:
        states = Counter(node.state for node in self.registry.nodes.values())
        workers = sum(len(node.plan.workers) for node in self.registry.nodes.values())
        said = [toned(f"{number} {state} ", TONES[state]) for state, number in states.items()]
        return page(stacked([f"{count(len(self.registry.nodes), 'node')}, {count(workers, 'worker')}: ", *said]))

    def _data(self) -> tuple[Columns, Columns, Columns]:
        workers: list[Row] = []
        load: list[Row] = []
        words: list[Row] = []
        for node in self.registry.nodes.values():
            about = self._about(node)
            kinds = Counter(spec.kind for spec in node.plan.workers.values())
            left = 0
            for kind, number in sorted(kinds.items()):
                edges = {"left": left, "right": left + number, "color": KINDS.get(kind, OTHER)}
                workers.append({**about, **edges, "kind": kind, "number": number})
                left += number
            says = f"{node.state} · {node.plan.mode.name} · {about['shape']}"
            words.append({"node": node.name, "right": left, "says": says})
            load += _load(node)
        return (
            _columns(workers, (*_ABOUT, "left", "right", "color", "kind", "number")),
            _columns(load, ("node", "y", "percent", "color", "what", "says")),
            _columns(words, ("node", "right", "says")),
        )

    def _about(self, node: Node) -> dict[str, str]:
        return {
            "node": node.name,
            "state": node.state,
            "mode": node.plan.mode.name,
            "shape": shape_of({name: vars(spec) for name, spec in node.plan.workers.items()}),
            "data": data_held(self.data_on(node)),
            "problem": node.problem or "-",
        }


_ABOUT = ("node", "state", "mode", "shape", "data", "problem")


def _load(node: Node) -> list[Row]:
    """Return the load of a host, a row for each measure."""
    hardware, now = node.hardware, node.metrics
    found = {"CPU": (now.cpu, f"{now.cpu:.0f}% of {count(hardware.cpus, 'core')}")}
    if hardware.memory:
        found["memory"] = _part(now.memory_used, hardware.memory)
    if hardware.gpus and len(now.gpu) == len(hardware.gpus):
        mean = sum(now.gpu) / len(now.gpu)
        found["GPU"] = (mean, f"{mean:.0f}% of {count(len(now.gpu), 'GPU')}")
        found["GPU memory"] = _part(sum(now.gpu_memory_used), sum(gpu.memory for gpu in hardware.gpus))
    return [
        {"node": node.name, "y": (node.name, LOAD[what][1]), "percent": percent, "says": says}
        | {"color": LOAD[what][0], "what": what}
        for what, (percent, says) in found.items()
    ]


def _part(used: int, whole: int) -> tuple[float, str]:
    """Return a use of memory as a percentage and as text."""
    return (100 * used / whole if whole else 0.0, f"{format_bytes(used)} of {format_bytes(whole)}")


class Rollouts:
    """Steps of nodes in rollouts, over time.

    Parameters
    ----------
    scheduler
        The scheduler, whose events are drawn.
    sizing_mode
        Passed to bokeh.
    """

    def __init__(self, scheduler: Scheduler, sizing_mode: SizingMode | None = None) -> None:
        self.scheduler = scheduler
        self.names = FactorRange()
        self.source = ColumnDataSource(self._data([]))
        self.root = _figure("Rollouts", self.names, None, x_axis_type="datetime", sizing_mode=sizing_mode)
        bars = self.root.hbar(
            y="node", left="began", right="ended", height=0.7, color="color", legend_field="step", source=self.source
        )
        tips = [(field, f"@{field}") for field in ("rollout", "node", "step", "seconds")]
        self.root.add_tools(HoverTool(renderers=[bars], tooltips=tips))
        self.root.xaxis.formatter = _clock()
        _legend(self.root)

    def update(self) -> None:
        """Draw the scheduler's events."""
        found = spans(self.scheduler.get_events(TOPIC))
        data = self._data(found)
        if data == self.source.data:
            return
        names = _downwards({span.node for span in found})
        if names != self.names.factors:
            self.names.factors = names
            self.root.height = FRAME + LINE * max(3, len(names))
        self.source.data = data

    def _data(self, found: Sequence[Span]) -> Columns:
        now = time.time()
        rows = [
            {"rollout": span.rollout, "node": span.node, "step": span.step, "color": STEPS.get(span.step, OTHER)}
            | {"began": 1000 * span.began, "ended": 1000 * (span.ended or now)}
            | {"seconds": f"{(span.ended or now) - span.began:.2f}"}
            for span in found
        ]
        return _columns(rows, ("rollout", "node", "step", "color", "began", "ended", "seconds"))


class Decisions:
    """Decisions of adaptive scaling, and the number of workers of each kind, over time.

    Parameters
    ----------
    scheduler
        The scheduler, whose events are drawn.
    sizing_mode
        Passed to bokeh.
    """

    def __init__(self, scheduler: Scheduler, sizing_mode: SizingMode | None = None) -> None:
        self.scheduler = scheduler
        self.sources = {kind: ColumnDataSource({"when": [], "number": []}) for kind in (*KINDS, "other")}
        self.points = ColumnDataSource(self._points([]))
        self.root = figure(
            title="Adaptive scaling",
            y_range=DataRange1d(start=0),
            height=220,
            tools="xpan,xwheel_zoom,reset",
            x_axis_type="datetime",
            sizing_mode=sizing_mode,
        )
        self.root.xaxis.formatter = _clock()
        self.root.yaxis.axis_label = "workers"
        self.root.yaxis.ticker = _whole_numbers()
        for kind, source in self.sources.items():
            self.root.step(
                "when",
                "number",
                mode="after",
                color=KINDS.get(kind, OTHER),
                line_width=2,
                legend_label=kind,
                source=source,
            )
        dots = self.root.scatter("when", "number", size=8, color=COLOURS["still"], source=self.points)
        tips = [(field, f"@{field}") for field in ("at", "saw", "decided", "why", "workers")]
        self.root.add_tools(HoverTool(renderers=[dots], tooltips=tips))
        _legend(self.root)

    def update(self) -> None:
        """Draw the scheduler's events."""
        found = decisions(self.scheduler.get_events(TOPIC))
        points = self._points(found)
        _put(self.points, points)
        if found:
            now = 1000 * int(time.time())  # the last decision still holds
            when = [1000 * each["when"] for each in found]
            for kind, source in self.sources.items():
                numbers = [_number(each["workers"], kind) for each in (*found, found[-1])]
                _put(source, {"when": [*when, max(now, when[-1])], "number": [*numbers]})

    def _points(self, found: Sequence[Message]) -> Columns:
        rows = [
            {"when": 1000 * each["when"], "number": sum(each["workers"].values())}
            | {"at": time.strftime("%H:%M:%S", time.localtime(each["when"]))}
            | {key: each[key] or "-" for key in ("saw", "decided", "why")}
            | {"workers": amounts(each["workers"])}
            for each in found
        ]
        return _columns(rows, ("when", "number", "at", "saw", "decided", "why", "workers"))


def _number(workers: Mapping[str, int], kind: str) -> int:
    """Return the number of workers of a kind."""
    if kind != "other":
        return workers.get(kind, 0)
    return sum(number for name, number in workers.items() if name not in KINDS)


def _downwards(names: Iterable[str]) -> list[str]:
    """Sort names for an axis that points upwards."""
    return sorted(names, key=natural_sort_key, reverse=True)


def _figure(title: str, names: FactorRange, label: str | None, **settings: Any) -> figure:
    """Return an empty plot with a row for each node."""
    drawn = figure(title=title, y_range=names, height=FRAME + 3 * LINE, tools="xpan,xwheel_zoom,reset", **settings)
    drawn.xaxis.axis_label = label
    drawn.ygrid.visible = False
    return drawn


def _legend(drawn: figure) -> None:
    """Move the legend above the plot, in one line."""
    (legend,) = drawn.legend
    legend.update(orientation="horizontal", border_line_alpha=0, background_fill_alpha=0, label_text_font_size="11px")
    legend.update(padding=0, margin=2, glyph_width=14, glyph_height=14)
    drawn.add_layout(legend, "above")


def _clock() -> DatetimeTickFormatter:
    """Return the format of a time axis."""
    near, far = "%H:%M:%S", "%H:%M"
    return DatetimeTickFormatter(milliseconds=f"{near}.%3N", seconds=near, minsec=near, minutes=far, hourmin=far)


def _whole_numbers() -> BasicTicker:
    """Return ticks at whole numbers only."""
    return BasicTicker(min_interval=1, num_minor_ticks=0)


def _put(source: ColumnDataSource, data: Columns) -> None:
    """Replace the data of a plot; equal data is not sent again."""
    if data != source.data:
        source.data = data


def _columns(rows: Sequence[Row], names: Sequence[str]) -> Columns:
    """Return rows as columns."""
    return {name: [row[name] for row in rows] for name in names}


# -- the pages ---------------------------------------------------------------------------------------------------------


class Plot(Protocol):
    """Plot on a page, updated periodically."""

    @property
    def root(self) -> LayoutDOM:
        """Element of the page."""

    def update(self) -> None:
        """Draw the present state."""


Make = Callable[[], Plot]


def _nodes_page(makes: Sequence[Make], scheduler: Scheduler, extra: Mapping[str, object], doc: Document) -> None:
    """Fill a document with the Nodes page."""
    _plots(makes, scheduler, extra, doc)
    doc.title = "Dask: Nodes"
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)


def _plots(makes: Sequence[Make], scheduler: Scheduler, extra: Mapping[str, object], doc: Document) -> None:
    """Fill a document with plots that update themselves."""
    parts = [make() for make in makes]
    for part in parts:
        part.update()
        add_periodic_callback(doc, part, INTERVAL)
    doc.add_root(column(*(part.root for part in parts), sizing_mode="stretch_width"))
    doc.theme = BOKEH_THEME
    doc.title = "Dask: agentcluster"


#: Address of a plot -> its name in menus.
PLOTS = {"individual-nodes": "Nodes", "individual-rollouts": "Rollouts", "individual-adaptive": "Adaptive Scaling"}


def publish(scheduler: Scheduler, registry: Registry, data_on: DataOn) -> None:
    """Add the page and the plots to a scheduler's dashboard, where it has one.

    Parameters
    ----------
    scheduler, registry
        The scheduler and its nodes.
    data_on
        Amount of data on a node's workers.
    """
    web = scheduler.http_application
    pages = _pages(scheduler)
    if pages is None:
        return
    wide: SizingMode = "stretch_width"
    nodes = functools.partial(NodesPlot, registry, data_on, sizing_mode=wide)
    rollouts = functools.partial(Rollouts, scheduler, sizing_mode=wide)
    adaptive = functools.partial(Decisions, scheduler, sizing_mode=wide)
    applications = {
        "/nodes": functools.partial(_nodes_page, (nodes, rollouts, adaptive)),
        "/individual-nodes": functools.partial(_plots, (nodes,)),
        "/individual-rollouts": functools.partial(_plots, (rollouts,)),
        "/individual-adaptive": functools.partial(_plots, (adaptive,)),
    }
    menu = template_variables(scheduler)
    if "nodes" not in menu["pages"]:
        menu["pages"].insert(menu["pages"].index("workers"), "nodes")
        menu["plots"] += [{"url": url, "name": name} for url, name in PLOTS.items()]
        menu["plots"].sort(key=lambda plot: plot["name"])
    application = BokehApplication(applications, scheduler, prefix=pages.prefix, template_variables=menu)
    web.add_application(application)
    application.initialize(IOLoop.current())
    application.start()
    path = f"{pages.prefix}/individual-plots.json"
    web.add_handlers(".*", [(path, _Listed, {"dask_server": scheduler})])


def _pages(scheduler: Scheduler) -> BokehTornado | None:
    """Return the application with dask's own pages; None where there is no dashboard."""
    return next((each for each in scheduler.http_application.applications if isinstance(each, BokehTornado)), None)


class _Listed(IndividualPlots):
    """List of plots that JupyterLab asks dask for, with those of this module."""

    def write(self, chunk: str | bytes | dict[str, object]) -> None:
        """Write the answer, with the plots of this module.

        Parameters
        ----------
        chunk
            As dask passes it.
        """
        if isinstance(chunk, dict) and (pages := _pages(self.server)) is not None:
            prefix = pages.prefix
            chunk = chunk | {f"Individual {name}": f"{prefix}/{url}" for url, name in PLOTS.items()}
        super().write(chunk)


#: Steps in which a node has not begun, or has ended, its part of a rollout.
AT_REST = ("waiting", "ready", "standby")

#: Message of an event.
Message = Mapping[str, Any]

#: Time of an event, and its message.
Event = tuple[float, Message]


@dataclass(frozen=True)
class Span:
    """One step of one node in a rollout.

    Attributes
    ----------
    rollout
        Name of the rollout: the mode asked for, or the call.
    node, step
        Name of the node, and the step.
    began, ended
        Seconds since the epoch; `ended` is None while the step lasts.
    """

    rollout: str
    node: str
    step: str
    began: float
    ended: float | None = None


def spans(events: Iterable[Event]) -> list[Span]:
    """Extract the steps of rollouts from events.

    Parameters
    ----------
    events
        Time and message of each event, oldest first.

    Returns
    -------
    list of Span
        In the order in which they began.
    """
    found: list[Span] = []
    lasting: dict[tuple[float, str], int] = {}

    def end(key: tuple[float, str], when: float) -> None:
        if key in lasting:
            place = lasting.pop(key)
            found[place] = replace(found[place], ended=when)

    for when, event in events:
        if "rollout" not in event:
            continue
        began = event["began"]
        for key in [key for key in lasting if key[0] != began]:  # one runs at a time: steps of others have ended
            end(key, when)
        if event.get("action") == "step":
            key = (began, event["node"])
            end(key, when)
            if event["step"] not in AT_REST:
                lasting[key] = len(found)
                found.append(Span(event["rollout"], event["node"], event["step"], when))
        elif event.get("action") == "ended":
            for key in [key for key in lasting if key[0] == began]:
                end(key, when)
    return found


def decisions(events: Iterable[Event]) -> list[Message]:
    """Extract the decisions of adaptive scaling from events.

    Parameters
    ----------
    events
        Time and message of each event, oldest first.

    Returns
    -------
    list of dict
        Fields of :class:`agentcluster.reports.Decision`, oldest first.
    """
    return [event["adapt"] for _, event in events if "adapt" in event]
