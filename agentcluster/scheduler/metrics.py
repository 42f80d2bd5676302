"""Prometheus metrics of nodes, where ``prometheus_client`` is installed.

The handler of dask at ``/metrics`` prints all collectors in prometheus_client's registry of the process, and so this
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler
from distributed.http.prometheus import PrometheusCollector

from agentcluster.scheduler.planning.nodes import Registry

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

    INSTALLED = True
except ImportError:
    INSTALLED = False


@dataclass(frozen=True)
class _Source:
    """Nodes of a scheduler and sums over its rollouts."""

    registry: Registry
    totals: RolloutTotals


class NodesCollector(PrometheusCollector):
    """Collect metrics of the nodes of the scheduler started last in this process; named ``dask_agentcluster_…``.

    Parameters
    ----------
    server
        The scheduler, whose options give the prefix of names.
    """

    source: _Source | None = None

    def __init__(self, server: Scheduler) -> None:
        super().__init__(server)  # type: ignore[no-untyped-call]
        self.subsystem = "agentcluster"

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; prometheus_client calls this for each request.

        Yields
        ------
        Metric
            None when no scheduler with nodes runs.
        """
        if self.source is None:
            return
        nodes, totals = self.source.registry.nodes.values(), self.source.totals
        name_of: Callable[[str], str] = self.build_name

        def counter(name: str, text: str, label: str, values: Counter[str]) -> CounterMetricFamily:
            family = CounterMetricFamily(name_of(name), text, labels=[label])
            for value, count in sorted(values.items()):
                family.add_metric([value], count)
            return family

        states = GaugeMetricFamily(name_of("nodes"), "Nodes", labels=["state", "mode"])
        for labels, count in sorted(Counter((node.state, node.plan.mode.name) for node in nodes).items()):
            states.add_metric(labels, count)
        yield states
        workers = GaugeMetricFamily(name_of("workers"), "Workers in the nodes' plans", labels=["kind"])
        for kind, count in sorted(Counter(spec.kind for node in nodes for spec in node.plan.workers.values()).items()):
            workers.add_metric([kind], count)
        yield workers
        yield counter("swaps_total", "Nodes in rollouts, by outcome", "result", totals.swaps)
        yield SummaryMetricFamily(
            name_of("rollout_seconds"), "Rollouts and their duration", totals.rollouts, totals.seconds
        )
        yield CounterMetricFamily(name_of("moved_keys_total"), "Keys moved by rollouts", totals.keys)
        yield CounterMetricFamily(name_of("moved_bytes_total"), "Bytes moved by rollouts", totals.nbytes)
        yield CounterMetricFamily(name_of("lost_keys_total"), "Keys lost by rollouts that gave data up", totals.lost)
        yield counter("worker_restarts_total", "Restarts of workers that crashed", "node", totals.restarts)


_collector: NodesCollector | None = None


def publish(scheduler: Scheduler, registry: Registry, totals: RolloutTotals) -> None:
    """Register the collector with prometheus_client, or point it to these nodes.

    Parameters
    ----------
    scheduler, registry
        The scheduler and its nodes.
    totals
        Sums over its rollouts.
    """
    global _collector
    if not INSTALLED:
        return
    if _collector is None:
        _collector = NodesCollector(scheduler)
        REGISTRY.register(_collector)
    _collector.source = _Source(registry, totals)


def withdraw(registry: Registry) -> None:
    """Unregister the nodes of a scheduler that closes.

    The collector stays registered, without metrics, until the next scheduler of this process; it does nothing when
    another scheduler has been published since.

    Parameters
    ----------
    registry
        The nodes.
    """
    if _collector is not None and _collector.source is not None and _collector.source.registry is registry:
        _collector.source = None


@dataclass
class RolloutTotals:
    """Sums over all rollouts; provisioning a node that joins is none.

    Attributes
    ----------
    swaps
        Outcome, such as ``changed`` or ``failed`` -> number of nodes.
    rollouts, seconds
        Number of rollouts, and their total time.
    keys, nbytes
        Data moved.
    lost
        Keys given up that could not be computed again.
    restarts
        Node -> number of restarts of workers that crashed.
    """

    swaps: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    seconds: float = 0.0
    keys: int = 0
    nbytes: int = 0
    lost: int = 0
    restarts: Counter[str] = field(default_factory=Counter)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add a rollout that has ended.

        Parameters
        ----------
        report
            Its report as plain data.
        """
        self.rollouts += 1
        self.seconds += report["seconds"]
        for node in report["nodes"].values():
            self.swaps[node["outcome"]] += 1
            self.keys += node["keys"]
            self.nbytes += node["nbytes"]
            self.lost += node["lost"]

    def restarted(self, node: str, times: int) -> None:
        """Add restarts of a worker.

        Parameters
        ----------
        node
            Name of the node.
        times
            Number of restarts since the last message; negative for a new worker of the same name, which is ignored.
        """
        if times > 0:
            self.restarts[node] += times
