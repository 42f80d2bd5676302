"""Moving data off workers inside the scheduler, and saying which of them may be stopped.

The only place that touches the scheduler's own state. ``Scheduler.retire_workers`` does the moving; what it returns,
not what it was asked, says which workers are free of data. It has no deadline and does not take its policies back
when it is cancelled, and it can leave workers in ``closing_gracefully``, so both are put right here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler, Status
from distributed.metrics import time


@dataclass(frozen=True)
class Evacuation:
    """What became of the data of some workers.

    Attributes
    ----------
    keys, nbytes
        Worker name -> keys that only leaving workers held, and their bytes, before.
    problem
        Why not all could leave; None when all did.
    """

    keys: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    problem: str | None = None


def actors(scheduler: Scheduler, names: Iterable[str]) -> dict[str, list[str]]:
    """Return worker name -> keys of the actors it holds; an actor cannot be moved."""
    return {str(ws.name): sorted(str(ts.key) for ts in ws.actors) for ws in _states(scheduler, names) if ws.actors}


def held(scheduler: Scheduler, names: Iterable[str]) -> dict[str, int]:
    """Return worker name -> bytes of data that it holds."""
    return {str(ws.name): ws.nbytes for ws in _states(scheduler, names)}


async def evacuate(scheduler: Scheduler, names: Sequence[str], timeout: float) -> Evacuation:
    """Move data off workers and remove them from the scheduler; all of them, or none.

    Parameters
    ----------
    scheduler
        The scheduler.
    names
        Names of the workers that leave. Those that are gone already count as left.
    timeout
        Seconds for the whole call.

    Returns
    -------
    Evacuation
        With a `problem` when not all could leave: then those that are still there take tasks again.
    """
    leaving = _states(scheduler, names)
    keys, nbytes = _only_copies(leaving)
    addresses = [ws.address for ws in leaving]
    try:
        async with asyncio.timeout(timeout):
            # First only the data: as long as no worker is removed, everything can still be taken back.
            emptied = await scheduler.retire_workers(workers=addresses, close_workers=False, remove=False)
            stuck = _stuck(scheduler, addresses, emptied)
            if not stuck:
                # What ended in between is moved too; a worker is removed in the step that finds it empty.
                removed = await scheduler.retire_workers(workers=addresses, close_workers=False, remove=True)
                stuck = _stuck(scheduler, addresses, removed)
    except TimeoutError:
        problem = f"data could not be moved within {timeout:g} s: {_describe(_present(scheduler, addresses))}"
    else:
        if not stuck:
            return Evacuation(keys, nbytes)
        problem = f"data could not be moved to another worker: {_describe(stuck)}"
    _reinstate(scheduler, addresses)
    return Evacuation(keys, nbytes, problem)


def _states(scheduler: Scheduler, names: Iterable[str]) -> list[Any]:
    wanted = set(names)
    return [ws for ws in scheduler.workers.values() if str(ws.name) in wanted]


def _present(scheduler: Scheduler, addresses: Iterable[str]) -> list[Any]:
    return [scheduler.workers[address] for address in addresses if address in scheduler.workers]


def _stuck(scheduler: Scheduler, addresses: Iterable[str], confirmed: dict[str, Any]) -> list[Any]:
    return [ws for ws in _present(scheduler, addresses) if ws.address not in confirmed]


def _only_copies(leaving: Sequence[Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Count the keys, and their bytes, that no staying worker holds; a key that several hold counts once."""
    gone = set(leaving)
    keys = {str(ws.name): 0 for ws in leaving}
    nbytes = dict(keys)
    seen = set()
    for ws in leaving:
        for ts in ws.has_what:
            if ts not in seen and ts.who_has <= gone:
                seen.add(ts)
                keys[str(ws.name)] += 1
                nbytes[str(ws.name)] += ts.get_nbytes()
    return keys, nbytes


def _describe(stuck: Iterable[Any]) -> str:
    parts = []
    for ws in stuck:
        some = sorted(str(ts.key) for ts in ws.has_what)
        listed = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
        parts.append(f"worker {ws.name} keeps {listed}" if some else f"worker {ws.name} did not answer")
    return "; ".join(parts)


def _reinstate(scheduler: Scheduler, addresses: Iterable[str]) -> None:
    """Let workers that were to leave take tasks again."""
    amm: Any = scheduler.extensions.get("amm")
    for policy in list(amm.policies) if amm is not None else []:
        if getattr(policy, "address", None) in set(addresses):
            amm.policies.discard(policy)
    for ws in _present(scheduler, addresses):
        if ws.status is Status.closing_gracefully:
            scheduler.stream_comms[ws.address].send(
                {
                    "op": "worker-status-change",
                    "status": Status.running.name,
                    "stimulus_id": f"agentcluster-reinstate-{time()}",
                }
            )
