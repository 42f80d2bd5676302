"""How many workers a cluster has, and of which kind: by hand with ``scale()``, by what tasks need with ``adapt()``."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import distributed.deploy.adaptive
from distributed.core import Status
from distributed.deploy.adaptive import Adaptive
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import SpecCluster
from distributed.utils import NoOpAwaitable

from agentcluster.client.adaptive import AgentAdaptive
from agentcluster.client.hosts import Reserve
from agentcluster.errors import ConfigError
from agentcluster.reports import AdaptiveLog, Nodes
from agentcluster.requests import ScaleTarget
from agentcluster.units import parse_nbytes, parse_seconds
from agentcluster.wire import to_wire


class Request:
    """Room that is held for tasks before they come; see :meth:`AgentCluster.request`."""

    def __init__(self, cluster: Elasticity, resources: Mapping[str, int], timeout: float) -> None:
        for name, count in resources.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(f"request({name.lower()}={count!r}): give a whole number above 0", key=name)
        if not resources:
            raise ConfigError("request(): say of what, such as gpu=4")
        self._cluster, self._resources, self._timeout = cluster, resources, timeout
        self._held: tuple[AgentAdaptive, int] | None = None

    def __enter__(self) -> Request:
        self._cluster.sync(self.__aenter__)
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    async def __aenter__(self) -> Request:
        adaptive = self._cluster._adaptive
        if not isinstance(adaptive, AgentAdaptive) or adaptive.state not in ("starting", "running"):
            raise ConfigError("request() holds room while cluster.adapt() runs; call that first, or cluster.scale()")
        self._held = adaptive, await adaptive.hold(self._resources, self._timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            adaptive, number = self._held
            self._held = None
            adaptive.release(number)


def _resource(name: str) -> str:
    return name.upper() if name in ("cpu", "gpu") else name


class Elasticity(SpecCluster):
    """A base of :class:`~agentcluster.AgentCluster`."""

    scheduler_comm: Any
    workers: dict[str, Any]
    worker_spec: dict[str, dict[str, Any]]
    _nodes: Nodes
    _adaptive: Any = None
    _reserve: Reserve
    _refresh: Any
    _call_up: Any
    _let_go: Any

    def scale(
        self,
        n: int | None = None,
        memory: str | int | None = None,
        cores: int | None = None,
        *,
        nodes: int | None = None,
        strict: bool = False,
        **kinds: int,
    ) -> Any:
        """Bring the cluster to so many workers, on the nodes that it has; data of those that go is moved first.

        Who stays is not restarted, and who goes is who holds least. Hosts with ``standby=True`` are launched when the
        others are full, and let go when they have no workers. What has no room is left out, with a warning.

        Parameters
        ----------
        n : int, optional
            Number of workers.
        memory : str or int, optional
            At least as many workers as have this much memory (bytes, or such as "64 GiB") together.
        cores : int, optional
            At least as many workers as have this many threads together.
        nodes : int, optional
            Number of nodes with all workers of their mode; the others stand by.
        strict : bool
            Raise where there is no room for all, and change nothing.
        **kinds : int
            Number of workers of a kind: ``cpu``, ``gpu``, a resource that workers have, or a worker's name in a spec.
            Other kinds stay as they are. A node whose mode lacks the kind changes to ``mixed``, which has both.

        Raises
        ------
        ConfigError
            For a kind that no node can have, and with `strict` where there is no room.

        Examples
        --------
        >>> cluster.scale(1)
        >>> len(cluster.nodes["local"]["plan"])
        1
        """
        if self.status in (Status.closing, Status.closed, Status.failed):
            self.worker_spec.clear()
            return NoOpAwaitable() if self.asynchronous else None
        if (n, memory, cores, nodes, kinds) == (None, None, None, None, {}):
            n = 0  # as in dask
        nbytes = None if memory is None else parse_nbytes("memory", memory, call="scale")
        target = ScaleTarget(n, cores, nbytes, nodes, kinds)
        self._by_hand()
        return self.sync(self._scale, target, strict)

    async def _scale(self, target: ScaleTarget, strict: bool = False) -> None:
        try:
            answer = await self._scale_once(target, strict)
            tried: set[str] = set()
            while answer["short"]:
                names = [name for name in self._reserve.ready(time.monotonic()) if name not in tried]
                if not (chosen := names[: self._hosts(target, answer["workers"])]):
                    break
                tried.update(chosen)
                for name, why in (await self._call_up(chosen)).items():
                    warnings.warn(f"host {name} is left out: {why}", stacklevel=2)
                answer = await self._scale_once(target, strict)
            if "error" in answer:
                raise answer["error"]
        finally:
            # A scheduler that is gone has said so already, or will; that must not hide what happened.
            with contextlib.suppress(OSError):
                await self._refresh()
                await self._let_go()
        if answer["short"]:
            warnings.warn(answer["short"], stacklevel=2)

    async def _scale_once(self, target: ScaleTarget, strict: bool) -> Mapping[str, Any]:
        """Scale the nodes that there are; what they have no room for is no error as long as other hosts may come."""
        target = replace(target, extra=self._extra())
        try:
            answer: Mapping[str, Any] = await self.scheduler_comm.scale_nodes(
                target=to_wire(target), nodes=list(self.workers), strict=strict
            )
        except ConfigError as error:
            return {"short": str(error), "workers": 0, "error": error}
        return answer

    def _extra(self) -> tuple[str, ...]:
        """Return the hosts of the reserve that are there."""
        return tuple(name for name in self._reserve.out if name in self.workers)

    def _hosts(self, target: ScaleTarget, workers: int) -> int:
        """Return how many hosts more it may take: of workers, as many on each as nodes have now."""
        if target.nodes is not None:
            return max(1, target.nodes - len(self.workers))
        if target.workers is None or not workers:
            return 1
        return max(1, math.ceil((target.workers - workers) / max(1, workers // len(self.workers))))

    async def scale_down(self, workers: Sequence[str]) -> None:
        """Stop the named workers, after their data was moved; what Adaptive calls."""
        await self.scheduler_comm.retire_node_workers(names=[str(worker) for worker in workers])
        await self._refresh()
        await self._let_go()

    def _threads_per_worker(self) -> int:
        return min((spec["nthreads"] for spec in self._specs() if spec["nthreads"]), default=1)

    def _memory_per_worker(self) -> int:
        limits = [spec["memory_limit"] for spec in self._specs() if spec["memory_limit"]]
        if not limits:
            raise ConfigError("adapt(minimum_memory=…): the workers have no memory limit", key="memory")
        return int(min(limits))

    def _specs(self) -> list[Mapping[str, Any]]:
        return [spec for node in self._nodes.values() for spec in node["plan"].values()]

    _supports_scaling = True

    # -- by what tasks need --------------------------------------------------------------------------------------------

    def adapt(
        self,
        Adaptive: type[Adaptive] = AgentAdaptive,
        minimum: float = 0,
        maximum: float = math.inf,
        minimum_cores: int | None = None,
        maximum_cores: int | None = None,
        minimum_memory: str | None = None,
        maximum_memory: str | None = None,
        **kwargs: Any,
    ) -> Adaptive:
        """Give nodes the workers that tasks need, and no others, from now on.

        Parameters
        ----------
        Adaptive : type
            A class in place of :class:`agentcluster.client.adaptive.AgentAdaptive`. Where `worker_key` is given it is
            dask's, which counts workers whatever their kind.
        minimum, maximum : int
            Workers to keep around at least, and at most.
        minimum_cores, maximum_cores : int, optional
            Threads of all workers together.
        minimum_memory, maximum_memory : str, optional
            Memory limits of all workers together, such as "100 GiB".
        **kwargs
            As for the class: ``modes``, limits by kind such as ``gpu=(0, 2)``, ``interval``, ``wait_count``,
            ``target_duration``, ``idle_timeout``, ``up_delay``.

        Returns
        -------
        Adaptive
            Its ``stop()`` ends it; so do :meth:`scale`, :meth:`reprovision` and the end of the cluster.

        Examples
        --------
        >>> adaptive = cluster.adapt(minimum=1, maximum=4)
        >>> client.submit(sum, [1, 2, 3]).result()
        6
        >>> adaptive.stop()
        """
        if Adaptive is AgentAdaptive and kwargs.get("worker_key") is not None:
            Adaptive = distributed.deploy.adaptive.Adaptive
        self._adaptive_options: dict[str, Any] = {}  # what an earlier call asked for is not asked for any more
        limits: dict[str, Any] = {
            "minimum": minimum,
            "maximum": maximum,
            "minimum_cores": minimum_cores,
            "maximum_cores": maximum_cores,
            "minimum_memory": minimum_memory,
            "maximum_memory": maximum_memory,
        }
        if issubclass(Adaptive, AgentAdaptive):
            return Cluster.adapt(self, Adaptive, **limits, **kwargs)
        return super().adapt(Adaptive, **limits, **kwargs)

    def request(self, *, timeout: str | float = "5 minutes", **resources: int) -> Request:
        """Hold room for tasks before they come, while :meth:`adapt` runs.

        Parameters
        ----------
        timeout : str or float
            Time that it may take until there is room.
        **resources : int
            How many tasks that need one of a resource there is to be room for, as in ``gpu=4`` or ``cpu=16``.

        Returns
        -------
        Request
            A context manager, asynchronous where the cluster is: there is room inside, and it is given up at its end.

        Raises
        ------
        ConfigError
            When entered: nothing adapts, or no node can ever have room.
        TimeoutError
            When entered: there was no room in time.

        Examples
        --------
        >>> adaptive = cluster.adapt(minimum=1)
        >>> with cluster.request(cpu=1):
        ...     client.submit(sum, [1, 2, 3], resources={"CPU": 1}).result()
        6
        >>> adaptive.stop()
        """
        return Request(
            self,
            {_resource(name): count for name, count in resources.items()},
            parse_seconds("timeout", timeout, call="request", zero=True),
        )

    def adaptive_log(self) -> AdaptiveLog:
        """Return what :meth:`adapt` decided and why, oldest first; a table as its repr."""
        return AdaptiveLog(getattr(self._adaptive, "decisions", ()))

    def _by_hand(self) -> None:
        """Have :meth:`adapt` leave alone what was asked for by hand."""
        adaptive = self._adaptive
        if adaptive is not None and not (adaptive._adapting and not isinstance(adaptive, AgentAdaptive)):
            adaptive.stop(reason="by hand")
