"""Preflight: check whether changes are possible, and choose their strategy, before anything is touched.

Reads the scheduler and asks the agents; changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dask.utils import format_bytes, parse_bytes
from distributed import Scheduler
from distributed.core import PooledRPCCall
from distributed.scheduler import TaskState, WorkerState

from agentcluster.model import WorkerSpec
from agentcluster.requests import Drain, RolloutPolicy
from agentcluster.scheduler.departures import BINDINGS, UNFINISHED, Bindings
from agentcluster.scheduler.planning.change import NodeChange
from agentcluster.scheduler.planning.nodes import Node
from agentcluster.tables import count
from agentcluster.wire import to_wire

#: Bytes that a worker process takes without data.
WORKER_MEMORY = 150 * 2**20

#: Greatest number of tasks that a message names; the others are counted.
NAMED = 5


def with_strategy(scheduler: Scheduler, change: NodeChange, policy: RolloutPolicy) -> NodeChange:
    """Choose the strategy of a change.

    ``surge`` needs the memory for old and new workers at the same time; cores may be used twice for a while.

    Parameters
    ----------
    scheduler
        The scheduler that has the old workers.
    change
        The change, with the new workers named.
    policy
        Policy of the rollout.

    Returns
    -------
    NodeChange
        The change with its strategy, and the reason when it is not the one asked for.
    """
    if not change.remove or not change.names:
        return replace(change, strategy="surge")
    if policy.strategy == "replace":
        return replace(change, strategy="replace", because="asked for")
    why = _no_capacity(scheduler, change)
    return replace(change, strategy="replace" if why else "surge", because=why)


def _no_capacity(scheduler: Scheduler, change: NodeChange) -> str:
    """Return the reason why old and new workers do not fit side by side on a node; "" when they do."""
    hardware, metrics, slots = change.node.hardware, change.node.metrics, change.node.slots
    if slots is not None and len(change.keep) + len(change.remove) + len(change.names) > slots:
        return f"its ports are for {slots} workers at a time"
    _, nbytes = sole_replicas(scheduler, change.old)
    needed = len(change.names) * WORKER_MEMORY + sum(nbytes.values())
    free = hardware.memory - metrics.memory_used
    if metrics.memory_used and needed > free:
        return f"{format_bytes(needed)} more memory are needed, {format_bytes(max(free, 0))} are free"
    for gpu, used in zip(hardware.gpus, metrics.gpu_memory_used, strict=False):
        pools = [_pool(spec, gpu.memory) for spec in change.new.values() if _device(spec) in (gpu.visible_id, gpu.uuid)]
        if gpu.memory and sum(pools) > gpu.memory - used:
            return (
                f"GPU {gpu.visible_id} has {format_bytes(gpu.memory - used)} free, "
                f"the new worker's pool is {format_bytes(sum(pools))}"
            )
    return ""


def _device(spec: WorkerSpec) -> str | None:
    """Return the GPU that a worker uses first; `spec.device` is a position in `spec.devices`."""
    return None if spec.device is None else spec.devices[spec.device]


def _pool(spec: WorkerSpec, memory: int) -> int:
    """Return the bytes of device memory that a GPU worker allocates at its start; 0 where the option means none."""
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
        return 0  # dask-cuda refuses it when the worker starts


def crowded(change: NodeChange) -> str:
    """Return the reason why a node has too few slots for its workers.

    Parameters
    ----------
    change
        The change, with the new workers named.

    Returns
    -------
    str
        The reason; "" when there are enough.
    """
    slots, count = change.node.slots, len(change.keep) + len(change.names)
    if slots is None or count <= slots:
        return ""
    return f"{count} workers need as many ports, and it has {slots}; give it a range, as --worker-port 9000:9010"


def immovable(scheduler: Scheduler, changes: Mapping[str, NodeChange], policy: RolloutPolicy) -> dict[str, str]:
    """Find nodes whose data cannot be moved.

    Parameters
    ----------
    scheduler
        The scheduler.
    changes
        Node name -> its change, with its strategy.
    policy
        Policy of the rollout.

    Returns
    -------
    dict
        Node name -> the reason.
    """
    if not any(change.remove for change in changes.values()):
        return {}
    refusals = _with_bound_tasks(scheduler, changes) if policy.bound == "refuse" else {}
    if policy.drain == "now":
        return refusals
    going = {name: each.old for name, each in changes.items()}
    everyone = [worker for go in going.values() for worker in go]
    surging = any(each.names and each.strategy == "surge" for each in changes.values())
    left = {} if surging else stranded(scheduler, everyone)
    for name, change in changes.items():
        if change.strategy == "replace":
            alone = stranded(scheduler, going[name])
            if keys := sum(alone.values()):
                refusals[name] = (
                    f"its old workers must go before the new ones come ({change.because}), and no other worker "
                    f"could take the only copies of {keys} keys; start a worker on another node, release those "
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


def _with_bound_tasks(scheduler: Scheduler, changes: Mapping[str, NodeChange]) -> dict[str, str]:
    """Return the reason for each node to whose leaving workers unfinished tasks are bound."""
    refusals = {}
    for name, change in changes.items():
        leaving = [ws.address for ws in workers_named(scheduler, change.old)]
        if tasks := [str(ts.key) for ts in _bindings(scheduler).bound_to(leaving) if ts.state in UNFINISHED]:
            refusals[name] = (
                f"{count(len(tasks), 'unfinished task')} bound to its workers, such as {min(tasks)}; "
                f"wait for the end of that work, or leave out bound='refuse'"
            )
    return refusals


async def ask_agent(scheduler: Scheduler, node: Node, named: Mapping[str, WorkerSpec], timeout: float) -> str:
    """Ask an agent whether it could start workers.

    Parameters
    ----------
    scheduler
        The scheduler.
    node
        The agent's node.
    named
        Worker name -> settings.
    timeout
        Seconds that the agent has to answer.

    Returns
    -------
    str
        The reason why it could not; "" when it could.
    """
    agent: PooledRPCCall = scheduler.rpc(node.address)
    try:
        async with asyncio.timeout(timeout):
            answer = await agent.check_workers(specs=to_wire(named))
    except Exception as error:  # the scheduler turns whatever the agent raised into a plain Exception
        return f"its agent does not answer: {error or type(error).__name__}"
    return next(iter(answer.values()), "")


def stranded_tasks(scheduler: Scheduler, changes: Mapping[str, NodeChange]) -> dict[str, str]:
    """Find tasks that no worker there is could run, among those that changes may concern.

    Parameters
    ----------
    scheduler
        The scheduler.
    changes
        Node name -> its change.

    Returns
    -------
    dict
        Key of a task -> its description, with its restriction.
    """
    if not any(change.remove for change in changes.values()):
        return {}
    bindings = _bindings(scheduler)
    tasks = [*scheduler.unrunnable, *(bindings.of_nodes(changes) if bindings.tasks else ())]
    if _resources_leave(scheduler, changes):
        tasks += scheduler.tasks.values()
    offers = [ws.resources for ws in scheduler.workers.values()]
    return _without_worker(bindings, tasks, offers, set(scheduler.workers))


def bound_tasks(scheduler: Scheduler, changes: Mapping[str, NodeChange]) -> dict[str, str]:
    """Find tasks that no worker could run after the changes.

    Parameters
    ----------
    scheduler
        The scheduler.
    changes
        Node name -> its change.

    Returns
    -------
    dict
        Key of a task -> its description, with its restriction. Tasks that are bound to a worker whose node has workers
        afterwards are not among them.
    """
    emptied = {name: each for name, each in changes.items() if not each.keep and not each.add}
    gone = {ws.address for each in emptied.values() for ws in workers_named(scheduler, each.old)}
    bindings = _bindings(scheduler)
    tasks = list(bindings.bound_to([*emptied, *gone]))
    if _resources_leave(scheduler, changes):
        tasks += scheduler.tasks.values()
    return _without_worker(bindings, tasks, _offers_after(scheduler, changes), scheduler.workers.keys() - gone)


def _without_worker(
    bindings: Bindings, tasks: Iterable[TaskState], offers: Sequence[Mapping[str, float]], addresses: Collection[str]
) -> dict[str, str]:
    """Describe the unfinished tasks that none of the workers with these resources and addresses could run."""
    found = {}
    for ts in tasks:
        if ts.state not in UNFINISHED or ts.loose_restrictions:
            continue
        asks, binding = ts.resource_restrictions, bindings.tasks.get(ts)
        if asks and not any(all(offer.get(k, 0) >= v for k, v in asks.items()) for offer in offers):
            found[str(ts.key)] = f"{ts.key} (resources {dict(asks)})"
        elif binding and not binding.hosts and (ts.worker_restrictions or set()).isdisjoint(addresses):
            found[str(ts.key)] = f"{ts.key} (workers {', '.join(sorted(binding.workers | binding.nodes))})"
    return found


def _resources_leave(scheduler: Scheduler, changes: Mapping[str, NodeChange]) -> bool:
    """Return whether leaving workers offer resources that no worker offers afterwards, or did and have left."""
    after = _offers_after(scheduler, changes)
    old = [change.node.offers(spec) for change in changes.values() for spec in change.remove.values()]
    return any(not any(all(offer.get(k, 0) >= v for k, v in offers.items()) for offer in after) for offers in old)


def _offers_after(scheduler: Scheduler, changes: Mapping[str, NodeChange]) -> list[Mapping[str, float]]:
    """Return the resources of each worker that there is after changes."""
    going = {worker for each in changes.values() for worker in each.old}
    staying = [ws.resources for ws in scheduler.workers.values() if str(ws.name) not in going]
    return [*staying, *(each.node.offers(spec) for each in changes.values() for spec in each.add)]


def _bindings(scheduler: Scheduler) -> Bindings:
    bindings: Bindings = scheduler.extensions[BINDINGS]
    return bindings


def listed(tasks: Mapping[str, str]) -> list[str]:
    """Return descriptions of tasks for a report: at most :data:`NAMED`, and the number of the others.

    Parameters
    ----------
    tasks
        Key of a task -> its description.
    """
    return sorted(tasks.values())[:NAMED] + ([f"and {len(tasks) - NAMED} more"] if len(tasks) > NAMED else [])


def describe(scheduler: Scheduler, report: dict[str, Any], changes: Mapping[str, NodeChange], drain: Drain) -> None:
    """Add the data to move, or to give up, and the tasks bound to workers that leave to the report of a dry run.

    Parameters
    ----------
    scheduler
        The scheduler.
    report
        Report of a rollout that has not run.
    changes
        Node name -> its change.
    drain
        How workers leave.
    """
    bound = bound_tasks(scheduler, changes)
    columns = ("given_up", "given_up_nbytes") if drain == "now" else ("keys", "nbytes")
    for name, each in changes.items():
        held = (sum(numbers.values()) for numbers in sole_replicas(scheduler, each.old))
        leaving = [ws.address for ws in workers_named(scheduler, each.old)]
        tasks = [ts for ts in _bindings(scheduler).bound_to(leaving) if ts.state in UNFINISHED]
        report["nodes"][name] |= {
            **dict(zip(columns, held, strict=True)),
            "followed": sum(1 for ts in tasks if str(ts.key) not in bound),
            "bound": listed(bound) if each.remove else [],
        }


# -- what workers hold -------------------------------------------------------------------------------------------------


def holders(ts: TaskState) -> set[WorkerState]:
    """Return the workers that hold the result of a task.

    Parameters
    ----------
    ts
        The task.
    """
    return ts.who_has or set()


def workers_named(scheduler: Scheduler, names: Iterable[str]) -> list[WorkerState]:
    """Return the workers of these names that are in the scheduler.

    Parameters
    ----------
    scheduler, names
        The scheduler, and names of workers.
    """
    wanted = set(names)
    return [ws for ws in scheduler.workers.values() if str(ws.name) in wanted]


def actors(scheduler: Scheduler, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the actors on workers; an actor cannot be moved.

    Parameters
    ----------
    scheduler, names
        The scheduler, and names of its workers.

    Returns
    -------
    dict
        Worker name -> keys of the actors that it holds; workers without actors are left out.
    """
    return {
        str(ws.name): sorted(str(ts.key) for ts in ws.actors) for ws in workers_named(scheduler, names) if ws.actors
    }


def stored_bytes(scheduler: Scheduler, names: Iterable[str]) -> dict[str, int]:
    """Return the amount of data on workers.

    Parameters
    ----------
    scheduler, names
        The scheduler, and names of its workers.

    Returns
    -------
    dict
        Worker name -> bytes.
    """
    return {str(ws.name): ws.nbytes for ws in workers_named(scheduler, names)}


def sole_replicas(scheduler: Scheduler, names: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Count the keys that only the named workers hold.

    Parameters
    ----------
    scheduler, names
        The scheduler, and names of its workers.

    Returns
    -------
    dict, dict
        Worker name -> number of keys; worker name -> their bytes. A key on several of the workers counts once.
    """
    return _count(workers_named(scheduler, names))


def stranded(scheduler: Scheduler, names: Iterable[str]) -> dict[str, int]:
    """Count the keys that would be lost if the named workers left and no worker joined.

    Parameters
    ----------
    scheduler, names
        The scheduler, and names of its workers.

    Returns
    -------
    dict
        Worker name -> number of keys; {} when other workers could take them.
    """
    leaving = workers_named(scheduler, names)
    if scheduler.running - set(leaving):
        return {}
    keys, _ = _count(leaving)
    return {name: count for name, count in keys.items() if count}


def _count(states: Sequence[WorkerState]) -> tuple[dict[str, int], dict[str, int]]:
    """Count the keys, and their bytes, that no staying worker holds; a key that several hold counts once."""
    leaving = frozenset(states)
    keys = {str(ws.name): 0 for ws in states}
    nbytes = dict(keys)
    seen: set[TaskState] = set()
    for ws in states:
        for ts in ws.has_what:
            if ts not in seen and holders(ts) <= leaving:
                seen.add(ts)
                keys[str(ws.name)] += 1
                nbytes[str(ws.name)] += ts.get_nbytes()
    return keys, nbytes
