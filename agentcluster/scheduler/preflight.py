"""Whether a change can be, asked before anything is touched, and in which order its old and new workers fit.

Reads the scheduler and asks the agents; changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dask.utils import format_bytes, parse_bytes
from distributed import Scheduler

from agentcluster.model import WorkerSpec
from agentcluster.requests import RolloutPolicy
from agentcluster.scheduler.evacuation import actors, only_copies, stranded
from agentcluster.scheduler.planning.change import Proposal
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.wire import to_wire

#: Bytes that a worker takes before it holds anything.
WORKER_MEMORY = 150 * 2**20

#: Tasks that are named; of more it is only said how many.
NAMED = 5


def with_strategy(scheduler: Scheduler, proposal: Proposal, terms: RolloutPolicy) -> Proposal:
    """Return the proposal with the strategy that it gets, and why, when that is not the one that was asked for.

    Cores may be used twice for a while; memory in use and GPU memory may not.
    """
    if not proposal.change.go or not proposal.named:
        return replace(proposal, strategy="surge")
    if terms.strategy == "replace":
        return replace(proposal, strategy="replace", because="asked for")
    why = _no_room(scheduler, proposal)
    return replace(proposal, strategy="replace" if why else "surge", because=why)


def _no_room(scheduler: Scheduler, proposal: Proposal) -> str:
    """Say why old and new workers do not fit side by side on a node; "" when they do."""
    hardware, metrics, room = proposal.node.hardware, proposal.node.metrics, proposal.node.room
    change = proposal.change
    if room is not None and len(change.keep) + len(change.go) + len(proposal.named) > room:
        return f"its ports are for {room} workers at a time"
    _, nbytes = only_copies(scheduler, proposal.change.go)
    needed = len(proposal.named) * WORKER_MEMORY + sum(nbytes.values())
    free = hardware.memory - metrics.memory_used
    if metrics.memory_used and needed > free:
        return f"{format_bytes(needed)} more memory are needed, {format_bytes(max(free, 0))} are free"
    for gpu, used in zip(hardware.gpus, metrics.gpu_memory_used, strict=False):
        pools = [_pool(spec, gpu.memory) for spec in proposal.named.values() if _device(spec) == gpu.visible_id]
        if gpu.memory and sum(pools) > gpu.memory - used:
            return (
                f"GPU {gpu.visible_id} has {format_bytes(gpu.memory - used)} free, "
                f"the new worker's pool is {format_bytes(sum(pools))}"
            )
    return ""


def _device(spec: WorkerSpec) -> str | None:
    """Return the name of a GPU worker's own device; its number counts within those that its mode uses."""
    return None if spec.device is None else spec.devices[spec.device]


def _pool(spec: WorkerSpec, memory: int) -> int:
    """Return the device memory that a GPU worker takes at its start, in bytes; 0 where its words mean none."""
    size = spec.options.get("rmm_pool_size")
    if not isinstance(size, int | float | str):
        return 0
    try:
        share = 0.0 if size in (1, "1") and not isinstance(size, float) else float(size)
    except ValueError:
        share = 0.0
    if 0 < share <= 1:
        return int(share * memory)
    try:
        return int(parse_bytes(size))
    except ValueError:
        return 0  # starting the worker will say so, in dask-cuda's words


def crowded(proposal: Proposal) -> str:
    """Say why a node has no room for the workers that it is to have; "" when it has."""
    room, count = proposal.node.room, len(proposal.change.keep) + len(proposal.named)
    if room is None or count <= room:
        return ""
    return f"{count} workers need as many ports, and it has {room}; give it a range, as --worker-port 9000:9010"


def immovable(scheduler: Scheduler, proposals: Mapping[str, Proposal], terms: RolloutPolicy) -> dict[str, str]:
    """Return node name -> why its data cannot be moved."""
    if terms.drain == "now":
        return {}
    refusals = {}
    going = {name: each.change.go for name, each in proposals.items()}
    everyone = [worker for go in going.values() for worker in go]
    surging = any(each.named and each.strategy == "surge" for each in proposals.values())
    left = {} if surging else stranded(scheduler, everyone)
    for name, proposal in proposals.items():
        if proposal.strategy == "replace":
            alone = stranded(scheduler, going[name])
            if keys := sum(alone.values()):
                refusals[name] = (
                    f"its old workers must go before the new ones come ({proposal.because}), and no other worker "
                    f"could take the only copies of {keys} keys; have a worker on another node, release those "
                    f"results, or give them up with drain='now'"
                )
        elif keys := sum(left.get(worker, 0) for worker in going[name]):
            refusals[name] = (
                f"its workers hold the only copies of {keys} keys and no other worker could take them; "
                f"keep a worker on some node, or release those results first"
            )
        for worker, found in actors(scheduler, going[name]).items():
            refusals[name] = (
                f"worker {worker} holds actors, which cannot be moved: {', '.join(found)}; "
                f"release them, or give them up with drain='now'"
            )
    return refusals


async def ask_agent(scheduler: Scheduler, node: Node, named: Mapping[str, WorkerSpec], timeout: float) -> str:
    """Return why an agent could not start workers; "" when it could."""
    agent: Any = scheduler.rpc(node.address)
    try:
        async with asyncio.timeout(timeout):
            answer = await agent.check_workers(specs=to_wire(named))
    except Exception as error:  # the scheduler turns whatever the agent raised into a plain Exception
        return f"its agent does not answer: {error or type(error).__name__}"
    return next(iter(answer.values()), "")


def bound_tasks(scheduler: Scheduler, proposals: Mapping[str, Proposal]) -> dict[str, list[str]]:
    """Return node name -> tasks that no worker could run after the change, each with what it asks for."""
    going = {worker for each in proposals.values() for worker in each.change.go}
    leaving = {ws for ws in scheduler.workers.values() if str(ws.name) in going}
    if not leaving:
        return {}
    offers = [dict(ws.resources) for ws in scheduler.workers.values() if ws not in leaving]
    offers += [dict(spec.resources) for each in proposals.values() for spec in each.named.values()]
    addresses = {ws.address for ws in scheduler.workers.values() if ws not in leaving}
    found = []
    for ts in scheduler.tasks.values():
        if ts.state not in ("processing", "no-worker", "queued", "waiting") or ts.loose_restrictions:
            continue
        asks = ts.resource_restrictions
        if asks and not any(all(offer.get(k, 0) >= v for k, v in asks.items()) for offer in offers):
            found.append(f"{ts.key} (resources {dict(asks)})")
        elif ts.worker_restrictions and not set(ts.worker_restrictions) & addresses:
            found.append(f"{ts.key} (workers {', '.join(sorted(ts.worker_restrictions))})")
    if not found:
        return {}
    listed = sorted(found)[:NAMED] + ([f"and {len(found) - NAMED} more"] if len(found) > NAMED else [])
    return {name: listed for name, each in proposals.items() if each.change.go}


def described(scheduler: Scheduler, report: dict[str, Any], proposals: Mapping[str, Proposal]) -> dict[str, Any]:
    """Return a report of what would be done, with what would be moved and what could not run any more."""
    bound = bound_tasks(scheduler, proposals)
    for name, each in proposals.items():
        keys, nbytes = only_copies(scheduler, each.change.go)
        report["nodes"][name] |= {
            "keys": sum(keys.values()),
            "nbytes": sum(nbytes.values()),
            "bound": bound.get(name, []),
        }
    return report
