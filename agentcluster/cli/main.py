"""Command ``agentcluster``: its subcommands on a running cluster, and ``demo``, which starts one on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import click
from distributed import Client, Future, wait

from agentcluster.cli.commands import events, logs, nodes, reprovision, scale, top
from agentcluster.cli.credentials import credentials
from agentcluster.client.cluster import AgentCluster
from agentcluster.errors import AgentClusterError, PreflightError
from agentcluster.tables import count

KEYS = 200

#: Futures of keys in memory.
Futures: TypeAlias = list[Future[Any]]


@click.group()
@click.version_option(package_name="agentcluster")
def main() -> None:
    """Show and change a Dask cluster of agents, whose workers are swapped in place.

    The scheduler is named by --scheduler, by --scheduler-file, or in dask's configuration (DASK_SCHEDULER_ADDRESS).

    Exit codes: 0, done. 1, begun and failed. 2, refused; nothing was changed. 3, no scheduler answers, or it has no
    agentcluster, or one of another protocol version. 130, ended by Ctrl-C before the answer came.
    """


for command in (nodes, reprovision, scale, logs, events, top, credentials):
    main.add_command(command)


@main.command()
@click.option("--hosts", default=1, show_default=True, type=click.IntRange(1, 16), help="Number of local agents.")
def demo(hosts: int) -> None:
    """Put results in memory, swap the workers through several modes, and count the results that are lost."""
    try:
        lost = _demo(hosts)
    except (AgentClusterError, OSError, TimeoutError) as error:
        click.echo(f"agentcluster demo: {error}", err=True)
        sys.exit(1)
    sys.exit(1 if lost else 0)


def _demo(hosts: int) -> int:
    """Run the demo; return the number of lost keys."""
    began = time.perf_counter()
    with AgentCluster(hosts=["local"] * hosts) as cluster, Client(cluster) as client:
        click.echo(f"{count(hosts, 'local agent')} up in {time.perf_counter() - began:.2f} s\n\n{cluster.nodes!r}")
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
            # The data can be moved to the other nodes.
            last = list(cluster.nodes)[-1]
            for mode in ("none", "auto-cpu"):
                _swap(cluster, mode, nodes=[last])
                lost += _lost(client, futures)
            _swap(cluster, "auto-cpu")
            lost += _lost(client, futures)
        began = time.perf_counter()
    click.echo(f"\nClosed in {time.perf_counter() - began:.2f} s. Keys lost in all: {lost}.")
    return lost


def _to_none_and_back(cluster: AgentCluster, client: Client, futures: Futures) -> int:
    """Show that the only node keeps its workers while they hold data, and removes them when they hold none."""
    try:
        _swap(cluster, "none")
    except PreflightError as error:
        click.echo(f"refused: {error}")
    lost = _lost(client, futures)
    click.echo("\nThe results are released, so the workers can leave.")
    client.cancel(futures)
    futures.clear()
    _swap(cluster, "none")
    _swap(cluster, "auto-cpu")
    return lost + _lost(client, _remember(client))


def _swap(
    cluster: AgentCluster, mode: str, config: Mapping[str, object] | None = None, nodes: list[str] | None = None
) -> None:
    """Reprovision; print the call, the report and the nodes."""
    more = f", {config!r}" if config else ""
    more += f", nodes={nodes!r}" if nodes else ""
    click.echo(f"\n>>> cluster.reprovision({mode!r}{more})")
    click.echo(f"{cluster.reprovision(mode, config, nodes=nodes)!r}\n\n{cluster.nodes!r}")


def _remember(client: Client) -> Futures:
    """Put results in memory: scattered data, which only this client has, and results of tasks."""
    scattered = client.scatter([bytes([i]) * 10_000 for i in range(KEYS)], hash=False)
    computed = client.map(pow, range(KEYS), [2] * KEYS, pure=False)
    wait([*scattered, *computed], timeout=60)
    click.echo(f"\nIn memory now: {KEYS} scattered keys and {KEYS} computed ones.")
    return [*scattered, *computed]


def _lost(client: Client, futures: Futures) -> int:
    """Print and return the number of keys whose value is lost or wrong."""
    wrong = _wrong(client, futures)
    click.echo(f"Keys lost: {wrong}")
    return wrong


def _wrong(client: Client, futures: Futures) -> int:
    """Return the number of keys whose value is lost or wrong."""
    expected = [*(bytes([i]) * 10_000 for i in range(KEYS)), *(i**2 for i in range(KEYS))]
    found = client.gather(futures, errors="skip")
    if len(found) < len(futures):
        return len(futures) - len(found)
    return sum(1 for value, right in zip(found, expected, strict=True) if value != right)


if __name__ == "__main__":
    main()
