"""Subcommands of ``agentcluster`` on a running cluster: nodes, reprovision, scale, logs, events and top."""

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
from agentcluster.cli.connection import AS_JSON, Connection, Facts, operates, print_json, selection
from agentcluster.client.rollouts import parse_status, watch
from agentcluster.errors import ConfigError
from agentcluster.model import NodeProgress
from agentcluster.modes.options import once
from agentcluster.reports import Nodes, RolloutReport, shape_of
from agentcluster.requests import RolloutPolicy, ScaleTarget
from agentcluster.tables import count
from agentcluster.units import parse_nbytes, parse_seconds
from agentcluster.wire import to_wire

#: Seconds between two polls of ``--follow``.
POLL = 0.5

#: Seconds between two updates of ``top``, at least.
INTERVAL = 0.1

#: Most digits of a number of workers.
DIGITS = 30

NODES = click.option(
    "--nodes",
    multiple=True,
    metavar="NAME",
    help="Names, patterns or labels of nodes, such as gpu-1,gpu-2 or 'gpu-*' or rack=a; repeatable.  [default: all]",
)
FOLLOW = click.option("-f", "--follow", is_flag=True, help="Keep printing new lines until Ctrl-C.")


@click.command()
@AS_JSON
@operates
async def nodes(there: Connection, as_json: bool) -> None:
    """List the nodes with their state, mode, workers and hardware."""
    found = await there.nodes()
    if as_json:
        print_json(found)
    else:
        click.echo(repr(Nodes(found)) if found else "no nodes")


def _modes(context: click.Context, parameter: click.Parameter, prefix: str) -> list[str]:
    """Complete the name of a mode of this side; the scheduler may know others."""
    return [name for name in modes.names() if name.startswith(prefix)]


@click.command()
@click.argument("mode", shell_complete=_modes)
@click.option("--config", metavar="JSON", help="Options of the mode, such as '{\"nthreads\": 2}'.")
@click.option(
    *("-o", "--option", "options"), multiple=True, metavar="NAME=VALUE", help="One of them, as nthreads=2; repeatable."
)
@NODES
@click.option("--add", is_flag=True, help="Keep the workers that run, and add the mode's.")
@click.option(
    "--strategy",
    type=click.Choice(["surge", "replace"]),
    default="surge",
    show_default=True,
    help="surge: start new workers before old ones stop, where both fit. replace: stop old workers first.",
)
@click.option(
    "--drain",
    type=click.Choice(["tasks", "data", "now"]),
    default="tasks",
    show_default=True,
    help="Before a worker stops: wait for its tasks and move its data, only move its data, or neither.",
)
@click.option("--drain-timeout", metavar="TIME", help="Longest time to wait for running tasks, such as 30s.")
@click.option(
    "--bound",
    type=click.Choice(["follow", "wait", "refuse"]),
    default="follow",
    show_default=True,
    help="Tasks bound to old workers: run them on the new ones, wait for them, or refuse while there are any.",
)
@click.option("--max-parallel", type=click.IntRange(1), help="Maximum number of nodes that change at the same time.")
@click.option("--canary", is_flag=True, help="Change one node alone first.")
@click.option(
    "--on-failure",
    type=click.Choice(["rollback", "stop", "continue"]),
    default="rollback",
    show_default=True,
    help="When a node fails: roll back the changed nodes, stop and leave them, or continue with the others.",
)
@click.option("--timeout", metavar="TIME", help="Longest time for new workers to start, and again for data to move.")
@click.option("--wait/--no-wait", default=True, help="Wait for a running rollout to end, or refuse.")
@click.option("--dry-run", is_flag=True, help="Plan and check, but change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before --drain now gives data up.")
@click.option("--progress/--no-progress", default=None, help="Draw progress bars.  [default: in a terminal]")
@AS_JSON
@operates
async def reprovision(
    there: Connection,
    mode: str,
    config: str | None,
    options: Sequence[str],
    nodes: Sequence[str],
    add: bool,
    yes: bool,
    progress: bool | None,
    as_json: bool,
    **terms: Any,
) -> None:
    """Replace the workers of nodes in place with those of MODE, such as auto-cpu, auto-gpu, mixed, uniform or none."""
    wanted = modes.parse(mode, config)
    if options:
        own = once("--option", map(_option, options))
        if twice := sorted(own.keys() & wanted.config.keys()):
            raise ConfigError(f"option {twice[0]!r} of mode {mode!r} is given twice, in --config and as --option")
        wanted = modes.parse(mode, {**wanted.config, **own})
    if terms["drain_timeout"] is not None:
        terms["drain_timeout"] = parse_seconds("--drain-timeout", terms["drain_timeout"], zero=True)
    if terms["timeout"] is not None:
        terms["timeout"] = parse_seconds("--timeout", terms["timeout"])
    terms = {
        **to_wire(RolloutPolicy(**terms)),
        "mode": wanted.name,
        "config": to_wire(wanted.config),
        "nodes": selection(nodes),
        "remove_existing": not add,
    }
    if terms["drain"] == "now" and not yes and not terms["dry_run"]:
        await _confirm_loss(there, terms)
    order = there.call("reprovision_nodes", **terms)
    draws = (sys.stderr.isatty() and not as_json and not terms["dry_run"]) if progress is None else progress
    answer = await (watch(order, there.rollout, Console(stderr=True)) if draws else order)
    if as_json:
        print_json(answer)
    else:
        _print_report(RolloutReport.parse(answer))


def _option(text: str) -> tuple[str, object]:
    """Parse ``name=value``; a value is JSON, or text where it is none."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise click.UsageError(f"--option {text!r}: give a name and a value, such as nthreads=2")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


async def _confirm_loss(there: Connection, terms: Mapping[str, Any]) -> None:
    """Ask whether to give data up, where there is some; without a terminal, refuse."""
    planned = RolloutReport.parse(await there.call("reprovision_nodes", **{**terms, "dry_run": True}))
    if not planned.given_up:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{planned.summary()}; --yes does it, --drain data moves it first")
    click.confirm(f"{planned.summary()}; do it?", abort=True)


def _print_report(report: RolloutReport) -> None:
    """Print a report, in red where it gave data up."""
    click.secho(repr(report), fg="red" if report.given_up else None)


@click.command()
@click.argument("n", type=click.IntRange(0), required=False)
@click.option("--cores", type=click.IntRange(0), help="Minimum number of threads of all workers together.")
@click.option("--memory", metavar="SIZE", help="Minimum memory of all workers together, such as '64 GiB'.")
@click.option("--on-nodes", type=click.IntRange(0), help="Number of nodes that have all workers of their mode.")
@click.option("--kind", multiple=True, metavar="KIND=N", help="Number of workers of a kind, such as gpu=2; repeatable.")
@NODES
@click.option("--strict", is_flag=True, help="Change nothing when there is no capacity for all.")
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
    """Scale the cluster to N workers, or to the amounts of the options; data of leaving workers is moved first."""
    nbytes = None if memory is None else parse_nbytes("--memory", memory)
    kinds = once("--kind", map(_kind, kind))
    if (n, cores, nbytes, on_nodes) == (None,) * 4 and not kinds:
        raise ConfigError("scale needs a target: a number of workers, --cores, --memory, --on-nodes or --kind")
    target = ScaleTarget(n, cores, nbytes, on_nodes, kinds)
    answer = await there.call("scale_nodes", target=to_wire(target), nodes=selection(nodes), strict=strict)
    if as_json:
        print_json(answer)
        return
    click.echo(repr(Nodes(await there.nodes())))
    if answer["short"]:
        click.echo(f"agentcluster: {answer['short']}", err=True)


@click.command()
@click.argument("names", nargs=-1, metavar="[NODE]...")
@FOLLOW
@click.option("-n", "--lines", type=click.IntRange(0), metavar="N", help="Show only the last N lines of each log.")
@AS_JSON
@operates
async def logs(there: Connection, names: Sequence[str], follow: bool, lines: int | None, as_json: bool) -> None:
    """Show the logs of the nodes' agents."""
    seen: dict[str, Sequence[str]] = {}
    while True:
        found = await there.logs(selection(names, "NODE"))
        for node, log in found.items():
            for line in _after(seen[node], log) if node in seen else _last(log, lines):
                if as_json:
                    print_json({"node": node, "line": line})
                else:
                    click.echo(f"{node}  {line}")
            seen[node] = log
        if not follow:
            return
        await asyncio.sleep(POLL)


@click.command()
@FOLLOW
@AS_JSON
@operates
async def events(there: Connection, follow: bool, as_json: bool) -> None:
    """Show the steps of rollouts and the decisions of adaptive scaling."""
    last = 0.0
    while True:
        for when, event in await there.events():
            if when > last:
                last = when
                if as_json:
                    print_json({"when": when, **event})
                else:
                    click.echo(_event_line(when, event))
        if not follow:
            return
        await asyncio.sleep(POLL)


def _last(log: Sequence[str], count: int | None) -> Sequence[str]:
    """Return the last `count` lines of a log; all of them for None."""
    return log if count is None else log[max(0, len(log) - count) :]


def _after(before: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """Return the new lines of a log that keeps only its last lines."""
    for length in range(min(len(before), len(now)), -1, -1):
        if list(before[len(before) - length :]) == list(now[:length]):
            return now[length:]
    return now


def _event_line(when: float, event: Facts) -> str:
    """Format an event in one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(when))
    if "adapt" in event:
        decision = event["adapt"]
        why = f" ({decision['why']})" if decision["why"] else ""
        return f"{clock}  adapt  {decision['saw'] or '-'}: {decision['decided']}{why}"
    facts = {key: value for key, value in event.items() if key not in ("rollout", "began")}
    text = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in facts.items() if value is not None)
    return f"{clock}  rollout {event.get('rollout', '?')}  {text}"


def _kind(text: str) -> tuple[str, int]:
    """Parse a kind of worker and its number."""
    name, _, number = text.partition("=")
    if not name.strip() or not number.isdecimal() or len(number) > DIGITS:
        raise ConfigError(f"--kind {text!r}: give a kind and a number, such as gpu=2")
    return name, int(number)


#: State of a node -> style of its cell.
STYLES = {
    "ready": "green",
    "standby": "cyan",
    "swapping": "yellow",
    "joining": "yellow",
    "lost": "red",
    "refused": "red",
}

#: Characters of a bar.
BAR_WIDTH = 6

#: Characters of a line when the output is not a terminal.
LINE_WIDTH = 120


@click.command()
@click.option(
    "--interval", metavar="TIME", default="1s", show_default=True, help="Time between two updates, at least 0.1s."
)
@click.option("-n", "--iterations", type=click.IntRange(1), metavar="N", help="End after N updates.")
@AS_JSON
@operates
async def top(there: Connection, interval: str, iterations: int | None, as_json: bool) -> None:
    """Show the nodes, their load and the running rollout, until Ctrl-C."""
    seconds = parse_seconds("--interval", interval)
    if seconds < INTERVAL:
        raise ConfigError(f"--interval is {interval!r}, but must be at least {INTERVAL} s")
    console = Console()
    if not console.is_terminal:
        console.width = LINE_WIDTH
    draws = console.is_terminal and not as_json
    screen = Live(console=console, screen=iterations is None, auto_refresh=False) if draws else None
    with screen or contextlib.nullcontext():
        for update in itertools.count(1):
            nodes, rollout = await there.nodes(), await there.rollout()
            if as_json:
                print_json({"nodes": nodes, "rollout": rollout})
            elif screen is None:
                console.print(picture(there.address, nodes, rollout))
            else:
                screen.update(picture(there.address, nodes, rollout), refresh=True)
            if update == iterations:
                return
            await asyncio.sleep(seconds)


def picture(address: str, nodes: Mapping[str, Facts], rollout: Facts | None) -> RenderableType:
    """Draw one update of ``top``.

    Parameters
    ----------
    address
        Address of the scheduler.
    nodes
        Node name -> its description, see :meth:`Connection.nodes`.
    rollout
        Progress of the rollout that runs, see :meth:`Connection.rollout`.

    Returns
    -------
    RenderableType
        A table of the nodes, their problems, and a bar for each node of the rollout.
    """
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
    """Draw the progress of a node."""
    return Text(f"  {name}  ").append_text(_bar(progress.percent / 100, str(progress)))


def _of(used: int, whole: int) -> str:
    """Format a part of an amount of memory."""
    return f"{used / 2**30:.1f} of {whole / 2**30:.1f} GiB"


def _bar(part: float, text: str) -> Text:
    """Draw a bar with a text beside it; green, yellow from 70%, red from 90%."""
    full = round(BAR_WIDTH * min(max(part, 0.0), 1.0))
    style = "red" if part >= 0.9 else "yellow" if part >= 0.7 else "green"
    return Text("█" * full, style=style).append("░" * (BAR_WIDTH - full) + f" {text}", style="default")
