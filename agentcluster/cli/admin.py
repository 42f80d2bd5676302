"""``agentcluster``: the operator's command. Its one subcommand so far, ``demo``, shows on this machine what this is for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import click
from distributed import Client, Future, wait

from agentcluster.cluster import AgentCluster
from agentcluster.errors import AgentClusterError

KEYS = 200


@click.group()
@click.version_option(package_name="agentcluster")
def main() -> None:
    """Dask on machines that you hold: agents, modes, swaps in place."""


@main.command()
@click.option("--hosts", default=1, show_default=True, type=click.IntRange(1, 16), help="How many local agents.")
def demo(hosts: int) -> None:
    """Put results in memory, swap the workers under them through several modes, and count what is still there."""
    try:
        lost = _demo(hosts)
    except (AgentClusterError, OSError, TimeoutError) as error:
        click.echo(f"agentcluster demo: {error}", err=True)
        sys.exit(1)
    sys.exit(1 if lost else 0)


def _demo(hosts: int) -> int:
    began = time.perf_counter()
    with AgentCluster(hosts=["local"] * hosts) as cluster, Client(cluster) as client:
        click.echo(f"{_count(hosts, 'local agent')} up in {time.perf_counter() - began:.2f} s\n\n{cluster.nodes!r}")
        futures = _remember(client)
        click.echo(f"\nIn memory now: {KEYS} scattered keys and {KEYS} computed ones.")
        lost = 0
        for mode, config, nodes in _tour(cluster):
            where = f", nodes={nodes!r}" if nodes else ""
            click.echo(f"\n>>> cluster.reprovision({mode!r}{f', {config!r}' if config else ''}{where})")
            click.echo(f"{cluster.reprovision(mode, config, nodes=nodes)!r}\n\n{cluster.nodes!r}")
            lost = _lost(client, futures)
            click.echo(f"Keys lost: {lost}")
        began = time.perf_counter()
    click.echo(f"\nClosed in {time.perf_counter() - began:.2f} s. Keys lost in all: {lost} of {2 * KEYS}.")
    return lost


def _remember(client: Client) -> list[Future]:
    """Put results in memory: data that only this client can give again, and data that tasks made."""
    scattered = client.scatter([bytes([i]) * 10_000 for i in range(KEYS)], hash=False)
    computed = client.map(pow, range(KEYS), [2] * KEYS, pure=False)
    wait([*scattered, *computed], timeout=60)
    return [*scattered, *computed]


def _tour(cluster: AgentCluster) -> list[tuple[str, dict[str, Any] | None, list[str] | None]]:
    """Return the swaps to show: mode, options, nodes.

    A single node cannot go to ``none`` while it holds data, there is nowhere to move it to; one that could is the last.
    """
    last = list(cluster.nodes)[-1]
    return [
        ("uniform", {"nthreads": 1, "nworkers": 1}, None),
        ("spec", {"spec": {"cls": "distributed.Nanny", "options": {"nthreads": 3}}, "nworkers": 2}, None),
        ("none", None, [last]),
        ("auto-cpu", None, None),
    ]


def _lost(client: Client, futures: Sequence[Future]) -> int:
    """Count the keys whose value is gone or wrong."""
    expected = [*(bytes([i]) * 10_000 for i in range(KEYS)), *(i**2 for i in range(KEYS))]
    found = client.gather(futures, errors="skip")
    if len(found) < len(futures):
        return len(futures) - len(found)
    return sum(1 for value, right in zip(found, expected, strict=True) if value != right)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"
