"""What the scheduler's Prometheus endpoint says of nodes, where ``prometheus_client`` is installed.

Dask's own handler at ``/metrics`` prints what is in prometheus_client's registry of the process, and so this too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler
from distributed.http.prometheus import PrometheusCollector

from agentcluster.scheduler.planning.nodes import Registry

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

    INSTALLED = True
except ImportError:
    INSTALLED = False


@dataclass(frozen=True)
class _Source:
    """What is told of: a scheduler's nodes."""

    registry: Registry
    tally: Tally


class NodesCollector(PrometheusCollector):
    """Metrics of the nodes of this process's last scheduler; named ``dask_agentcluster_…``, as dask's own are."""

    source: _Source | None = None

    def __init__(self, server: Scheduler) -> None:
        super().__init__(server)  # type: ignore[no-untyped-call]
        self.subsystem = "agentcluster"

    def collect(self) -> Iterator[Any]:
        """Yield the metrics; what prometheus_client calls."""
        if self.source is None:
            return
        nodes, tally = self.source.registry.nodes.values(), self.source.tally
        name_of: Any = self.build_name

        def counter(name: str, what: str, label: str, values: Counter[str]) -> Any:
            family = CounterMetricFamily(name_of(name), what, labels=[label])
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
        yield counter("swaps_total", "Nodes whose workers were to change, by what became of it", "result", tally.swaps)
        yield SummaryMetricFamily(name_of("rollout_seconds"), "Rollouts, and their time", tally.rollouts, tally.seconds)
        yield CounterMetricFamily(name_of("moved_keys_total"), "Keys moved by rollouts", tally.keys)
        yield CounterMetricFamily(name_of("moved_bytes_total"), "Bytes moved by rollouts", tally.nbytes)
        yield counter("worker_restarts_total", "Workers that crashed and were started again", "node", tally.restarts)


_collector: NodesCollector | None = None


def publish(scheduler: Scheduler, registry: Registry, tally: Tally) -> None:
    """Have the process's Prometheus endpoint tell of these nodes from now on."""
    global _collector
    if not INSTALLED:
        return
    if _collector is None:
        _collector = NodesCollector(scheduler)
        REGISTRY.register(_collector)
    _collector.source = _Source(registry, tally)


def withdraw(registry: Registry) -> None:
    """Tell of these nodes no more."""
    if _collector is not None and _collector.source is not None and _collector.source.registry is registry:
        _collector.source = None


@dataclass
class Tally:
    """Sums over all rollouts; the first workers of a node that joins are none.

    Attributes
    ----------
    swaps
        Outcome, such as ``changed`` or ``failed`` -> number of nodes.
    rollouts, seconds
        Number of rollouts, and their time in sum.
    keys, nbytes
        What was moved.
    restarts
        Node -> how often a worker crashed and was started again.
    """

    swaps: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    seconds: float = 0.0
    keys: int = 0
    nbytes: int = 0
    restarts: Counter[str] = field(default_factory=Counter)

    def add(self, report: Mapping[str, Any]) -> None:
        """Count a rollout that has ended, by its report as plain data."""
        self.rollouts += 1
        self.seconds += report["seconds"]
        for node in report["nodes"].values():
            self.swaps[node["outcome"]] += 1
            self.keys += node["keys"]
            self.nbytes += node["nbytes"]

    def restarted(self, node: str, times: int) -> None:
        """Count restarts; fewer than before are those of another worker."""
        if times > 0:
            self.restarts[node] += times
