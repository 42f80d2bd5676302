"""Number and kinds of a cluster's workers: by hand with ``scale()``, by demand with ``adapt()`` and ``request()``."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from distributed.deploy.adaptive import Adaptive

from agentcluster import modes
from agentcluster.client.adaptive import AgentAdaptive
from agentcluster.client.calls import ScaleAnswer
from agentcluster.client.interface import at_border, warn
from agentcluster.errors import ConfigError
from agentcluster.model import Hardware
from agentcluster.reports import AdaptiveLog, NodeSnapshot, RolloutReport, ScaleReport
from agentcluster.requests import ScaleTarget
from agentcluster.wire import from_wire, to_wire

if TYPE_CHECKING:
    from agentcluster.client.cluster import AsyncCluster


class Scaling:
    """Scaling of a cluster.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster; everything here runs in its event loop.
    """

    def __init__(self, cluster: AsyncCluster) -> None:
        self._cluster = cluster

    def __repr__(self) -> str:
        running = self.adaptive is not None and self.adaptive.state in ("starting", "running")
        return f"<Scaling of cluster {self._cluster.name!r}: {self.adaptive if running else 'by hand'}>"

    @property
    def adaptive(self) -> Adaptive | None:
        """Object that ``adapt()`` returned last."""
        return self._cluster._adaptive  # dask's attribute: dask stops it, and shows whether it runs

    # -- by hand -------------------------------------------------------------------------------------------------------

    async def up_or_down(self, target: ScaleTarget, strict: bool) -> ScaleReport:
        """Change the number of workers.

        Standby hosts are launched while the other nodes have no capacity, and ended when they have no workers left.

        Parameters
        ----------
        target
            Workers that are asked for.
        strict
            Whether it is an error when there is no capacity for all.

        Returns
        -------
        ScaleReport
            Result of the change.

        Raises
        ------
        ConfigError
            For a kind that no node can have, and with `strict` when there is no capacity for all.
        """
        reports: list[RolloutReport] = []
        launched: list[str] = []
        left_out: dict[str, str] = {}
        ended: list[str] = []
        hosts = self._cluster.hosts
        try:
            answer = await self._once(target, strict, reports)
            while chosen := self._next_hosts(target, answer, tried={*launched, *left_out}):
                failed = await hosts.launch(chosen)
                launched += [name for name in chosen if name not in failed]
                left_out |= failed
                for name, why in failed.items():
                    warn(f"host {name} is left out: {why}")
                answer = await self._once(target, strict, reports)
            if isinstance(answer, ConfigError):
                raise answer
        finally:
            # A scheduler that cannot be reached is reported by the call, or by the next update of the view.
            with contextlib.suppress(OSError):
                await self._cluster.view.refresh()
                ended = await hosts.end_idle()
        if answer["short"]:
            warn(answer["short"])
        whole = RolloutReport.merged(reports)
        return ScaleReport(
            "scale",
            {name: node for name, node in whole.nodes.items() if node.outcome != "unchanged"},
            whole.seconds,
            asked=str(target),
            workers=answer["workers"],
            short=answer["short"],
            launched=tuple(launched),
            ended=tuple(ended),
            left_out=left_out,
        )

    async def _once(self, target: ScaleTarget, strict: bool, reports: list[RolloutReport]) -> ScaleAnswer | ConfigError:
        """Scale the nodes that are there; return an error that more hosts may resolve."""
        target = replace(target, extra=self._cluster.hosts.extra())
        nodes = list(self._cluster.workers)
        try:
            answer = await self._cluster.scheduler_comm.scale_nodes(target=to_wire(target), nodes=nodes, strict=strict)
        except ConfigError as error:
            return error
        reports.append(RolloutReport.parse(answer))
        return answer

    def _next_hosts(self, target: ScaleTarget, answer: ScaleAnswer | ConfigError, tried: set[str]) -> list[str]:
        """Return the standby hosts to launch next, none when there is capacity for all."""
        ready = [name for name in self._cluster.hosts.reserve.ready(time.monotonic()) if name not in tried]
        if isinstance(answer, ConfigError):
            return ready[: self._shortfall(target, 0)]
        return ready[: self._shortfall(target, answer["workers"])] if answer["short"] else []

    def _shortfall(self, target: ScaleTarget, workers: int) -> int:
        """Estimate how many hosts are missing: each has as many workers as the nodes have now."""
        nodes = len(self._cluster.workers)
        if target.nodes is not None:
            return max(1, target.nodes - nodes)
        if target.workers is None or not workers:
            return 1
        return max(1, math.ceil((target.workers - workers) / max(1, workers // nodes)))

    async def down(self, workers: Sequence[str]) -> None:
        """Stop workers, after their data was moved to others.

        Parameters
        ----------
        workers
            Names of the workers.
        """
        await self._cluster.scheduler_comm.retire_node_workers(names=[str(worker) for worker in workers])
        await self._cluster.view.refresh()
        await self._cluster.hosts.end_idle()

    def smallest_threads(self) -> int:
        """Return the smallest number of threads of a worker.

        Returns
        -------
        int
            The number; 1 when there are no workers, nor modes that have some.
        """
        return min((spec["nthreads"] for spec in self._specs() if spec["nthreads"]), default=1)

    def smallest_memory(self) -> int:
        """Return the smallest memory limit of a worker, in bytes.

        Returns
        -------
        int
            The limit.

        Raises
        ------
        ConfigError
            When no worker has a memory limit.
        """
        limits = [spec["memory_limit"] for spec in self._specs() if spec["memory_limit"]]
        if not limits:
            raise ConfigError("adapt(minimum_memory=…): the workers have no memory limit", key="memory")
        return int(min(limits))

    def _specs(self) -> list[NodeSnapshot]:
        """Return the workers of all nodes; of a node without any, those that its mode would give it."""
        return [spec for node in self._cluster.nodes.values() for spec in node["plan"].values() or _would_be(node)]

    # -- by demand -----------------------------------------------------------------------------------------------------

    def stop_adaptive(self) -> None:
        """Stop adaptive scaling, because something was asked for by hand; not for a call of that scaling itself."""
        adaptive = self.adaptive
        if adaptive is None or (adaptive._adapting and not isinstance(adaptive, AgentAdaptive)):
            return
        adaptive.stop(reason="by hand")

    def log(self) -> AdaptiveLog:
        """Return the decisions of adaptive scaling.

        Returns
        -------
        AdaptiveLog
            The decisions, oldest first.
        """
        return AdaptiveLog(tuple(self.adaptive.decisions) if isinstance(self.adaptive, AgentAdaptive) else ())


class Request:
    """Capacity that is held for tasks before they are submitted; see :meth:`AgentCluster.request`.

    Parameters
    ----------
    cluster : AgentCluster
        The cluster.
    resources
        Resource -> number of tasks that need one of it.
    timeout
        Seconds until there must be capacity.

    Raises
    ------
    ConfigError
        When no resource is given, or a number is not a whole number above 0.
    """

    def __init__(self, cluster: AsyncCluster, resources: Mapping[str, int], timeout: float) -> None:
        for name, number in resources.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"request({name.lower()}={number!r}): give a whole number above 0", key=name)
        if not resources:
            raise ConfigError("request() needs at least one resource, for example gpu=4")
        self._cluster, self._resources, self._timeout = cluster, resources, timeout
        self._held: tuple[AgentAdaptive, int] | None = None

    def __repr__(self) -> str:
        resources = ", ".join(f"{name}={number}" for name, number in self._resources.items())
        return f"<Request for {resources}: {'held' if self._held else 'not held'}>"

    @at_border
    def __enter__(self) -> Self:
        self._cluster.sync(self.__aenter__)
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    async def __aenter__(self) -> Self:
        adaptive = self._cluster.scaling.adaptive
        if not isinstance(adaptive, AgentAdaptive) or adaptive.state not in ("starting", "running"):
            raise ConfigError(
                "request() holds capacity while cluster.adapt() runs; call that first, or use cluster.scale()"
            )
        self._held = adaptive, await adaptive.hold(self._resources, self._timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            adaptive, number = self._held
            self._held = None
            adaptive.release(number)


def resource_name(name: str) -> str:
    """Return the resource that a keyword of ``request()`` stands for.

    Parameters
    ----------
    name
        Keyword, such as ``gpu``.

    Returns
    -------
    str
        ``CPU``, ``GPU``, or the name as it is.
    """
    return name.upper() if name in ("cpu", "gpu") else name


def _would_be(node: NodeSnapshot) -> list[NodeSnapshot]:
    """Return the workers that a node's mode plans for it."""
    mode = modes.parse(node["mode"], node["config"])
    with contextlib.suppress(ConfigError):  # it cannot serve the mode
        return list(to_wire(modes.plan(mode, from_wire(Hardware, node["hardware"]), node=node["name"])))
    return []
