"""The operator's command on a cluster that runs: ``nodes``, ``reprovision``, ``scale``, ``logs`` and ``events``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentcluster import modes
from agentcluster.cli.connection import AS_JSON, Connection, operates, printed
from agentcluster.client.rollouts import parse_status, watch
from agentcluster.errors import ConfigError
from agentcluster.model import NodeProgress
from agentcluster.reports import Nodes, RolloutReport, shape_of
from agentcluster.requests import ScaleTarget
from agentcluster.tables import count
from agentcluster.units import call_bytes, call_seconds
from agentcluster.wire import TOPIC, to_wire

#: Seconds between two looks of what follows.
LOOK = 0.5

WHICH = click.option(
    "--nodes", multiple=True, metavar="NAME", help="Which, as in gpu-1,gpu-2 or 'gpu-*'. Default: all."
)


@click.command()
@AS_JSON
@operates
async def nodes(there: Connection, as_json: bool) -> None:
    """Show the nodes: state, mode, workers, hardware."""
    found = await there.nodes()
    if as_json:
        printed(found)
    else:
        click.echo(repr(Nodes(found)) if found else "no nodes")


def _modes(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Complete the name of a mode; others may be known where the scheduler runs."""
    return [name for name in modes.names() if name.startswith(begun)]


@click.command()
@click.argument("mode", shell_complete=_modes)
@click.option("--config", metavar="JSON", help="Options of the mode, as in '{\"nthreads\": 2}'.")
@WHICH
@click.option("--add", is_flag=True, help="Add the mode's workers beside those that run.")
@click.option("--strategy", type=click.Choice(["surge", "replace"]), default="surge", show_default=True)
@click.option("--drain", type=click.Choice(["tasks", "data", "now"]), default="tasks", show_default=True)
@click.option("--drain-timeout", metavar="TIME", help="Time that running tasks get, as in 30s.")
@click.option("--max-parallel", type=click.IntRange(1), help="Nodes that change at the same time.")
@click.option("--canary", is_flag=True, help="Change one node first, alone.")
@click.option(
    "--on-failure", type=click.Choice(["rollback", "stop", "continue"]), default="rollback", show_default=True
)
@click.option("--timeout", metavar="TIME", help="Time for new workers to start, and again for data to move.")
@click.option("--wait/--no-wait", default=True, help="Wait for a rollout that runs already.")
@click.option("--dry-run", is_flag=True, help="Plan and check only.")
@click.option("--progress/--no-progress", default=None, help="Draw a bar per node. Default: in a terminal.")
@AS_JSON
@operates
async def reprovision(
    there: Connection,
    mode: str,
    config: str | None,
    nodes: Sequence[str],
    add: bool,
    progress: bool | None,
    as_json: bool,
    **terms: Any,
) -> None:
    """Swap the workers of nodes in place, to MODE: auto-cpu, auto-gpu, mixed, uniform, spec, none, …"""
    wanted = modes.parse(mode, config)
    for key in ("drain_timeout", "timeout"):
        if terms[key] is not None:
            terms[key] = call_seconds("reprovision", key, terms[key])
    order = there.call(
        "reprovision_nodes",
        mode=wanted.name,
        config=to_wire(wanted.config),
        nodes=await there.chosen(nodes),
        remove_existing=not add,
        **terms,
    )
    draws = (sys.stderr.isatty() and not as_json and not terms["dry_run"]) if progress is None else progress
    answer = await (watch(order, lambda: there.call("rollout_status"), Console(stderr=True)) if draws else order)
    printed(answer) if as_json else click.echo(repr(RolloutReport.parse(answer)))


@click.command()
@click.argument("n", type=click.IntRange(0), required=False)
@click.option("--cores", type=click.IntRange(0), help="At least so many threads of all workers together.")
@click.option("--memory", help="At least so much memory of all workers together, as in '64 GiB'.")
@click.option("--on-nodes", type=click.IntRange(0), help="So many nodes with all workers of their mode, no others.")
@click.option("--kind", multiple=True, metavar="KIND=N", help="So many of a kind, as in gpu=2. May be given again.")
@WHICH
@click.option("--strict", is_flag=True, help="Change nothing where there is no room for all.")
@AS_JSON
@operates
async def scale(
    there: Connection,
    n: int | None,
    cores: int | None,
    memory: str | None,
    on_nodes: int | None,
    kind: Sequence[str],
    nodes: Sequence[str],
    strict: bool,
    as_json: bool,
) -> None:
    """Bring the cluster to N workers, or to what the options say; data of those that go is moved first."""
    nbytes = None if memory is None else call_bytes("scale", "memory", memory)
    kinds = dict(map(_counted, kind))
    if (n, cores, nbytes, on_nodes) == (None,) * 4 and not kinds:
        raise ConfigError("scale: say to what: a number of workers, --cores, --memory, --on-nodes or --kind")
    target = ScaleTarget(n, cores, nbytes, on_nodes, kinds)
    answer = await there.call("scale_nodes", target=to_wire(target), nodes=await there.chosen(nodes), strict=strict)
    if as_json:
        printed(answer)
        return
    click.echo(repr(Nodes(await there.nodes())))
    if answer["short"]:
        click.echo(f"agentcluster: {answer['short']}", err=True)


@click.command()
@click.argument("names", nargs=-1, metavar="[NODE]...")
@click.option("-f", "--follow", is_flag=True, help="Go on, with what comes.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Only the last so many lines of each.")
@AS_JSON
@operates
async def logs(there: Connection, names: Sequence[str], follow: bool, lines: int | None, as_json: bool) -> None:
    """Show what the agents of nodes logged."""
    chosen = await there.chosen(names)
    seen: dict[str, list[str]] = {}
    while True:
        found = await there.call("get_node_logs", nodes=chosen)
        for node, log in found.items():
            for line in _after(seen[node], log) if node in seen else _last(log, lines):
                printed({"node": node, "line": line}) if as_json else click.echo(f"{node}  {line}")
            seen[node] = list(log)
        if not follow:
            return
        await asyncio.sleep(LOOK)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on, with what comes.")
@AS_JSON
@operates
async def events(there: Connection, follow: bool, as_json: bool) -> None:
    """Show what happened: steps of rollouts, and what adaptive scaling decided."""
    await there.nodes()
    last = 0.0
    while True:
        for when, event in await there.call("events", topic=TOPIC):
            if when > last:
                last = when
                printed({"when": when, **event}) if as_json else click.echo(_said(when, event))
        if not follow:
            return
        await asyncio.sleep(LOOK)


def _last(log: Sequence[str], count: int | None) -> Sequence[str]:
    return log if count is None else log[max(0, len(log) - count) :]


def _after(before: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """Return the lines of a log, of which only the last are kept, that are new."""
    for length in range(min(len(before), len(now)), -1, -1):
        if list(before[len(before) - length :]) == list(now[:length]):
            return now[length:]
    return now


def _said(when: float, event: Mapping[str, Any]) -> str:
    """Say an event in one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(when))
    if "adapt" in event:
        decision = event["adapt"]
        why = f" ({decision['why']})" if decision["why"] else ""
        return f"{clock}  adapt  {decision['saw'] or '-'}: {decision['decided']}{why}"
    facts = {key: value for key, value in event.items() if key not in ("rollout", "began")}
    said = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in facts.items() if value is not None)
    return f"{clock}  rollout {event.get('rollout', '?')}  {said}"


def _counted(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdecimal():
        raise ConfigError(f"--kind {text!r}: give a kind and a number, such as gpu=2")
    return name, int(number)


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
    if status := parse_status(rollout):
        parts.append(Text(status.summary(), style="bold"))
        parts += [_step(name, progress) for name, progress in status.nodes.items()]
    return Group(*parts)


def _step(name: str, progress: NodeProgress) -> Text:
    return Text(f"  {name}  ").append_text(_bar(progress.percent / 100, str(progress)))


def _of(used: int, whole: int) -> str:
    return f"{used / 2**30:.1f} of {whole / 2**30:.1f} GiB"


def _bar(part: float, says: str) -> Text:
    """Return a bar with words beside it; green, yellow from 70%, red from 90%."""
    full = round(WIDTH * min(max(part, 0.0), 1.0))
    style = "red" if part >= 0.9 else "yellow" if part >= 0.7 else "green"
    return Text("█" * full, style=style).append("░" * (WIDTH - full) + f" {says}", style="default")
