"""``agentcluster top``: nodes with their load, live in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentcluster.cli.reach import AS_JSON, Connection, operates, printed
from agentcluster.markup import count
from agentcluster.progress import reckon
from agentcluster.report import shape_of

#: State -> how it is shown.
STYLES = {
    "ready": "green",
    "standby": "cyan",
    "swapping": "yellow",
    "joining": "yellow",
    "lost": "red",
    "refused": "red",
}

#: Cells of a bar.
WIDTH = 6

#: Columns where there is no terminal to ask.
PAPER = 120


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("-n", "--iterations", type=click.IntRange(1), help="End after so many looks.")
@AS_JSON
@operates
async def top(there: Connection, interval: float, iterations: int | None, as_json: bool) -> None:
    """Show nodes with their load, again and again; ends with Ctrl-C."""
    console = Console()
    if not console.is_terminal:
        console.width = PAPER
    draws = console.is_terminal and not as_json
    screen = Live(console=console, screen=iterations is None, auto_refresh=False) if draws else None
    with screen or contextlib.nullcontext():
        for look in itertools.count(1):
            nodes, rollout = await there.nodes(), await there.call("rollout_status")
            if as_json:
                printed({"nodes": nodes, "rollout": rollout})
            elif screen is None:
                console.print(drawn(there.address, nodes, rollout))
            else:
                screen.update(drawn(there.address, nodes, rollout), refresh=True)
            if look == iterations:
                return
            await asyncio.sleep(interval)


def drawn(address: str, nodes: Mapping[str, Mapping[str, Any]], rollout: Mapping[str, Any] | None) -> RenderableType:
    """Return the picture of one look."""
    table = Table(box=None, pad_edge=False)
    for column in ("node", "state", "mode", "workers", "CPU", "memory", "GPUs"):
        table.add_column(column, no_wrap=column not in ("workers", "GPUs"))
    for name, node in nodes.items():
        hardware, load = node["hardware"], node["metrics"]
        used, memory = load["memory_used"], hardware["memory"]
        gpus = zip(hardware["gpus"], load["gpu"], load["gpu_memory_used"], strict=False)
        table.add_row(
            name,
            Text(node["state"], style=STYLES.get(node["state"], "")),
            node["mode"],
            shape_of(node["plan"]),
            _bar(load["cpu"] / 100, f"{load['cpu']:.0f}%"),
            _bar(used / memory if memory else 0.0, _of(used, memory)),
            Text("\n").join(_bar(busy / 100, f"{busy}%, {_of(taken, gpu['memory'])}") for gpu, busy, taken in gpus),
        )
    workers = sum(len(node["plan"]) for node in nodes.values())
    title = f"{address}: {count(len(nodes), 'node')}, {count(workers, 'worker')}"
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    parts += [Text(f"{name}: {node['problem']}", style="red") for name, node in nodes.items() if node["problem"]]
    if rollout:
        parts.append(Text(f"rollout {rollout.get('label', rollout.get('rollout', ''))}".rstrip(), style="bold"))
        parts += [_step(name, step) for name, step in rollout.get("nodes", {}).items()]
    return Group(*parts)


def _step(name: str, step: Mapping[str, Any]) -> Text:
    done, says = reckon(step)
    return Text(f"  {name}  ").append_text(_bar(done / 100, says))


def _of(used: int, whole: int) -> str:
    return f"{used / 2**30:.1f} of {whole / 2**30:.1f} GiB"


def _bar(part: float, says: str) -> Text:
    """Return a bar with words beside it; green, yellow from 70%, red from 90%."""
    full = round(WIDTH * min(max(part, 0.0), 1.0))
    style = "red" if part >= 0.9 else "yellow" if part >= 0.7 else "green"
    return Text("█" * full, style=style).append("░" * (WIDTH - full) + f" {says}", style="default")
