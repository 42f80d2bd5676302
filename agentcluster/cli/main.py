"""``agentcluster``: the operator's command; here is ``demo``, which shows on this machine what this is for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import click
from distributed import Client, Future, wait

from agentcluster.cli.commands import events, logs, nodes, reprovision, scale, top
from agentcluster.client.cluster import AgentCluster
from agentcluster.errors import AgentClusterError, PreflightError

KEYS = 200


@click.group()
@click.version_option(package_name="agentcluster")
def main() -> None:
    """Dask on machines that you hold: agents, modes, swaps in place.

    The scheduler is the one of --scheduler, --scheduler-file, or dask's configuration (DASK_SCHEDULER_ADDRESS).

    Exit codes: 0, done. 1, begun, and it went wrong. 2, refused; nothing was touched. 3, no scheduler to ask, or none
    with agentcluster.
    """


for command in (nodes, reprovision, scale, logs, events, top):
    main.add_command(command)


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
        lost = 0
        for mode, config in (
            ("uniform", {"nthreads": 1, "nworkers": 1}),
            ("spec", {"spec": {"cls": "distributed.Nanny", "options": {"nthreads": 3}}, "nworkers": 2}),
        ):
            _swap(cluster, mode, config)
            lost += _lost(client, futures)
        if hosts == 1:
            lost += _to_none_and_back(cluster, client, futures)
        else:
            # With other nodes there, the data has somewhere to go.
            last = list(cluster.nodes)[-1]
            for mode in ("none", "auto-cpu"):
                _swap(cluster, mode, nodes=[last])
                lost += _lost(client, futures)
            _swap(cluster, "auto-cpu")
            lost += _lost(client, futures)
        began = time.perf_counter()
    click.echo(f"\nClosed in {time.perf_counter() - began:.2f} s. Keys lost in all: {lost}.")
    return lost


def _to_none_and_back(cluster: AgentCluster, client: Client, futures: list[Future[Any]]) -> int:
    """Show that the only node keeps its workers as long as they hold data, and lets them go when they hold none."""
    try:
        _swap(cluster, "none")
    except PreflightError as error:
        click.echo(f"refused: {error}")
    lost = _lost(client, futures)
    click.echo("\nThe results are fetched and released, so the workers can go.")
    client.cancel(futures)
    futures.clear()
    _swap(cluster, "none")
    _swap(cluster, "auto-cpu")
    return lost + _lost(client, _remember(client))


def _swap(
    cluster: AgentCluster, mode: str, config: dict[str, Any] | None = None, nodes: list[str] | None = None
) -> None:
    more = f", {config!r}" if config else ""
    more += f", nodes={nodes!r}" if nodes else ""
    click.echo(f"\n>>> cluster.reprovision({mode!r}{more})")
    click.echo(f"{cluster.reprovision(mode, config, nodes=nodes)!r}\n\n{cluster.nodes!r}")


def _remember(client: Client) -> list[Future[Any]]:
    """Put results in memory: data that only this client can give again, and data that tasks made."""
    scattered = client.scatter([bytes([i]) * 10_000 for i in range(KEYS)], hash=False)
    computed = client.map(pow, range(KEYS), [2] * KEYS, pure=False)
    wait([*scattered, *computed], timeout=60)
    click.echo(f"\nIn memory now: {KEYS} scattered keys and {KEYS} computed ones.")
    return [*scattered, *computed]


def _lost(client: Client, futures: Sequence[Future[Any]]) -> int:
    """Count the keys whose value is gone or wrong."""
    wrong = _wrong(client, futures)
    click.echo(f"Keys lost: {wrong}")
    return wrong


def _wrong(client: Client, futures: Sequence[Future[Any]]) -> int:
    expected = [*(bytes([i]) * 10_000 for i in range(KEYS)), *(i**2 for i in range(KEYS))]
    found = client.gather(futures, errors="skip")
    if len(found) < len(futures):
        return len(futures) - len(found)
    return sum(1 for value, right in zip(found, expected, strict=True) if value != right)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"


if __name__ == "__main__":
    main()
