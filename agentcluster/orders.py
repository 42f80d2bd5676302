"""The orders about workers that an agent takes from its scheduler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentcluster.errors import WorkerStartError
from agentcluster.model import WorkerSpec, from_wire, to_wire
from agentcluster.supervisor import Supervisor


@dataclass(frozen=True)
class Orders:
    """Calls of an agent.

    Parameters
    ----------
    serving
        Returns the supervisor of the workers that the caller means, or raises why there is none.
    """

    serving: Callable[[], Awaitable[Supervisor]]

    def handlers(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """Return the calls by name."""
        calls = (self.check_workers, self.start_workers, self.stop_workers, self.rename_workers)
        return {call.__name__: call for call in calls}

    async def check_workers(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Return, for each worker that could not be started here, why; touches nothing."""
        return (await self.serving()).check(_parsed(specs))

    async def start_workers(self, specs: Mapping[str, Mapping[str, Any]], timeout: float) -> Any:
        """Start workers; all of them, or none.

        Returns
        -------
        dict
            ``{"states": [WorkerState as plain data, …]}``, or ``{"failures": {worker name: why}}``: a scheduler does
            not deserialize errors that its peers raise.
        """
        try:
            return {"states": to_wire(await (await self.serving()).start(_parsed(specs), timeout))}
        except WorkerStartError as error:
            return {"failures": error.failures}

    async def stop_workers(self, names: Sequence[str], timeout: float) -> None:
        """Stop workers; returns when their processes have ended."""
        await (await self.serving()).stop(names, timeout)

    async def rename_workers(self, names: Mapping[str, str]) -> None:
        """Give workers other names, old name -> new name; unknown names are those that ended already."""
        await (await self.serving()).rename(names)


def _parsed(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, WorkerSpec]:
    return {name: from_wire(WorkerSpec, spec, f"worker {name}") for name, spec in specs.items()}
