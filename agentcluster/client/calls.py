"""Calls that a cluster makes on its scheduler, with their types; dask's ``rpc`` has none.

The scheduler's side is :class:`agentcluster.scheduler.plugin.AgentPlugin`. All arguments and answers are plain data,
see :mod:`agentcluster.wire`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

from agentcluster.reports import NodeSnapshot

#: Plain data: a dataclass as :func:`agentcluster.wire.to_wire` writes it, or options by name.
Plain = Mapping[str, Any]


class ProvisionMode(TypedDict, total=False):
    """Answer of ``get_provision_mode``: the default mode, and the scheduler's versions."""

    mode: str
    config: Plain
    nodes: Mapping[str, str]
    protocol: int
    version: str


class RolloutAnswer(TypedDict):
    """Answer of the calls that change nodes; :class:`~agentcluster.reports.RolloutReport` parses it."""

    mode: str
    nodes: Mapping[str, Plain]
    seconds: float
    dry_run: bool


class ScaleAnswer(RolloutAnswer):
    """Answer of ``scale_nodes``.

    Attributes
    ----------
    workers
        Number of workers on the nodes.
    short
        Sentence about what the nodes have no capacity for; None where they have it for all.
    """

    workers: int
    short: str | None


class AdaptAnswer(TypedDict):
    """Answer of ``adapt_nodes``.

    Attributes
    ----------
    saw, decided
        Demand of the tasks, and changes of the nodes, as text.
    could_go
        Workers that were not needed and stayed.
    unmet
        Resources that no node can offer -> reason.
    short
        Demand that there is no capacity for now.
    requests
        Resource -> whether there is capacity for what was requested, or why there can never be.
    waits
        Whether workers would be started if `may_come` allowed it.
    launch
        Standby hosts to launch.
    seconds
        Duration of the look.
    """

    saw: str
    decided: str
    could_go: Sequence[str]
    unmet: Mapping[str, str]
    short: Sequence[str]
    requests: Mapping[str, bool | str]
    waits: bool
    launch: Sequence[str]
    seconds: float


class SchedulerCalls(Protocol):
    """The scheduler's calls, as an ``rpc`` object of dask offers them."""

    @property
    def address(self) -> str: ...

    async def register_scheduler_plugin(self, *, plugin: bytes, name: str, idempotent: bool) -> object: ...

    async def get_nodes(self) -> dict[str, NodeSnapshot]: ...

    async def await_nodes(self, *, names: Sequence[str], timeout: float) -> Mapping[str, NodeSnapshot]: ...

    async def get_node_logs(self, *, nodes: Sequence[str]) -> Mapping[str, Sequence[str]]: ...

    async def get_provision_mode(self) -> ProvisionMode | None: ...

    async def set_provision_mode(
        self,
        *,
        mode: str | None = None,
        config: Plain | None = None,
        nodes: Mapping[str, Plain] | None = None,
        bare: Sequence[str] = (),
    ) -> object: ...

    async def reprovision_nodes(
        self,
        *,
        mode: str,
        config: Plain,
        nodes: Sequence[str] | str | None,
        remove_existing: bool,
        **policy: object,
    ) -> RolloutAnswer: ...

    async def scale_nodes(self, *, target: Plain, nodes: Sequence[str], strict: bool) -> ScaleAnswer: ...

    async def adapt_nodes(self, *, asked: Plain, nodes: Sequence[str], wait: bool) -> AdaptAnswer: ...

    async def await_demand(self, *, timeout: float) -> bool: ...

    async def retire_node(self, *, name: str) -> object: ...

    async def retire_node_workers(self, *, names: Sequence[str]) -> object: ...

    async def undo_rollout(self) -> RolloutAnswer: ...

    async def rollout_status(self) -> Plain | None: ...

    async def control_rollout(self, *, action: Literal["pause", "resume", "cancel"]) -> object: ...

    async def log_event(self, *, topic: str, msg: Plain) -> object: ...
