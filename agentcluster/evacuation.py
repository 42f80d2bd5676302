"""Moving data off workers inside the scheduler, and saying which of them may be stopped.

The only place that touches the scheduler's own state. ``Scheduler.retire_workers`` does the moving; what it returns,
not what it was asked, says which workers are free of data. It has no deadline and does not take its policies back
when it is cancelled, it can leave workers in ``closing_gracefully``, and it removes one worker while another is stuck,
so all of this is put right here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler, Status
from distributed.active_memory_manager import RetireWorker
from distributed.metrics import time

#: Seconds between two looks at workers that got new data while they were emptied.
POLL = 0.05

#: Seconds that a worker has to say that it works again.
ANSWER = 10.0

STIMULUS = "agentcluster-evacuate"


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


def stranded(scheduler: Scheduler, names: Iterable[str]) -> dict[str, int]:
    """Return worker name -> keys that would be lost if the named workers went and none came; {} when others stay."""
    leaving = _states(scheduler, names)
    if scheduler.running - set(leaving):
        return {}
    keys, _ = _only_copies(leaving)
    return {name: count for name, count in keys.items() if count}


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
    keys, nbytes = _only_copies(_states(scheduler, names))
    paused: set[str] = set()
    problem: str | None = None
    try:
        async with asyncio.timeout(timeout):
            # A worker that crashes in between comes back under another address: the end is when no name is left.
            while problem is None and (leaving := _states(scheduler, names)):
                paused |= {ws.address for ws in leaving if ws.status is Status.paused}
                addresses = [ws.address for ws in leaving]
                # Only the data moves here: as long as no worker is removed, everything can still be taken back.
                emptied = await scheduler.retire_workers(workers=addresses, close_workers=False, remove=False)
                if stuck := [ws for ws in _states(scheduler, names) if ws in leaving and ws.address not in emptied]:
                    problem = f"data could not be moved to another worker: {_describe(stuck)}"
                elif not await _remove(scheduler, names):
                    await asyncio.sleep(POLL)
    except TimeoutError:
        if left := _states(scheduler, names):
            problem = f"data could not be moved within {timeout:g} s: {_describe(left)}"
    finally:
        _reinstate(scheduler, _states(scheduler, names), paused)
    if problem:
        await _reinstated(scheduler, names)
    return Evacuation(keys, nbytes, problem)


async def _remove(scheduler: Scheduler, names: Sequence[str]) -> bool:
    """Remove workers from the scheduler, all in one step of the event loop, unless one holds a key that none else has.

    `remove_worker` forgets the worker before it first awaits, and what `gather` starts takes its first step without
    anything in between: what the first of them finds is true for all.
    """
    leaving = _states(scheduler, names)
    free: list[bool] = []

    async def remove(ws: Any) -> None:
        if not free:
            known = all(other in leaving for other in _states(scheduler, names))
            free.append(known and not any(_only_copies(leaving)[0].values()))
        if free[0]:
            await scheduler.remove_worker(ws.address, expected=True, close=False, stimulus_id=f"{STIMULUS}-{time()}")

    await asyncio.gather(*map(remove, leaving))
    return all(free)


def _states(scheduler: Scheduler, names: Iterable[str]) -> list[Any]:
    wanted = set(names)
    return [ws for ws in scheduler.workers.values() if str(ws.name) in wanted]


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


def _describe(stuck: Sequence[Any]) -> str:
    gone = set(stuck)
    parts = []
    for ws in stuck:
        some = sorted(str(ts.key) for ts in ws.has_what if ts.who_has <= gone)
        if some:
            listed = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
            parts.append(f"worker {ws.name} keeps {listed}")
    return "; ".join(parts) or f"{', '.join(str(ws.name) for ws in stuck)} could not leave"


def _reinstate(scheduler: Scheduler, staying: Sequence[Any], paused: Collection[str]) -> None:
    """Let workers that were to leave take tasks again."""
    addresses = {ws.address for ws in staying}
    amm: Any = scheduler.extensions.get("amm")
    for policy in list(amm.policies) if amm is not None else []:
        if isinstance(policy, RetireWorker) and policy.address in addresses:
            # Whoever else waits for this policy would take its absence for success.
            policy.no_recipients = True
            amm.policies.discard(policy)
    for ws in staying:
        if ws.status is Status.closing_gracefully:
            status = Status.paused if ws.address in paused else Status.running
            scheduler.worker_send(
                ws.address,
                {"op": "worker-status-change", "status": status.name, "stimulus_id": f"{STIMULUS}-{time()}"},
            )


async def _reinstated(scheduler: Scheduler, names: Iterable[str]) -> None:
    """Wait until the scheduler has heard that they do: who is to take data back from others must count as running."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER):
            while any(ws.status is Status.closing_gracefully for ws in _states(scheduler, names)):
                await asyncio.sleep(POLL / 5)
