"""The modes that look at a node and decide: auto-cpu, auto-gpu, auto, mixed, uniform, and none.

Each is two functions: one checks its options, once; one makes a node's workers of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentcluster.model import Gpu, WorkerSpec
from agentcluster.modes import options as checks
from agentcluster.modes.options import CUDA_WORKER, NANNY, RESERVED, Check, Place, known_keywords
from agentcluster.modes.sizing import Site, amount, split_cores

Options = Mapping[str, Any]
Workers = tuple[WorkerSpec, ...]

#: Part of a device's memory that its worker may use before it spills, as in dask-cuda.
DEVICE_SHARE = 0.8

COMMON: Mapping[str, Check] = {
    "nthreads": checks.positive,
    "memory_limit": checks.memory_limit,
    "resources": checks.resources,
    "env": checks.env,
}
CPU: Mapping[str, Check] = {"nworkers": checks.worker_count, **COMMON}
GPU: Mapping[str, Check] = {"devices": checks.devices, **COMMON}
UNIFORM: Mapping[str, Check] = {"nworkers": checks.positive, **COMMON}


def check_options(place: Place, config: Options, known: Mapping[str, Check], cls: str | None = None) -> dict[str, Any]:
    """Check options by name and value.

    Parameters
    ----------
    place
        Where the options were given.
    config
        The options.
    known
        The options of our own -> their check. ``None`` as a value is "not given", but for ``memory_limit``.
    cls
        The class whose keywords are allowed too.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    keywords = frozenset[str]() if cls is None else known_keywords(cls)
    # A worker class of the user's own may take keywords that only it knows.
    open_ended = keywords is None or ("worker_class" in keywords and config.get("worker_class") is not None)
    checked = {}
    for key, value in config.items():
        if key in RESERVED and cls is not None:
            raise place.at(key).error(f"this is not yours to set: {RESERVED[key]}")
        if key in known:
            if value is not None or key == "memory_limit":
                checked[key] = known[key](place.at(key), value)
        elif open_ended or keywords is None or key in keywords:
            checked[key] = checks.as_plain(place.at(key), value)
        else:
            raise place.unknown(key, known, keywords, cls or "")
    return checked


def check_cpu(place: Place, config: Options) -> dict[str, Any]:
    return check_options(place, config, CPU, NANNY)


def check_gpu(place: Place, config: Options) -> dict[str, Any]:
    return check_options(place, config, GPU, CUDA_WORKER)


def check_uniform(place: Place, config: Options) -> dict[str, Any]:
    return check_options(place, config, UNIFORM, NANNY)


def check_none(place: Place, config: Options) -> dict[str, Any]:
    return check_options(place, config, {})


def _check_gpu_side(place: Place, config: Any) -> dict[str, Any]:
    return check_gpu(place, checks.mapping(place, config, "a mapping of the options of auto-gpu"))


def _check_cpu_side(place: Place, config: Any) -> dict[str, Any]:
    return check_cpu(place, checks.mapping(place, config, "a mapping of the options of auto-cpu"))


SIDES: Mapping[str, Check] = {"gpu": _check_gpu_side, "cpu": _check_cpu_side}


def check_auto(place: Place, config: Options) -> dict[str, Any]:
    return check_options(place, config, {**SIDES, **COMMON})


def check_mixed(place: Place, config: Options) -> dict[str, Any]:
    return check_options(place, config, SIDES)


def plan_cpu(site: Site, options: Options) -> Workers:
    """Split the node as ``LocalCluster`` splits a machine."""
    cpus = site.hardware.cpus
    nworkers, nthreads = split_cores(site, cpus, options.get("nworkers"), options.get("nthreads"))
    limit = site.limit_by_hand(options.get("memory_limit", "auto"))
    if limit is None:
        limit = site.default_limits([min(1, nthreads / cpus)] * nworkers)[0]
    return _cpu_workers(options, nworkers, nthreads, limit)


def plan_gpu(site: Site, options: Options) -> Workers:
    """Give each GPU or MIG device a worker, with the memory limit that dask-cuda gives it."""
    gpus = _devices(site, options)
    limit = site.limit_by_hand(options.get("memory_limit", "auto"))
    if limit is None:
        limit = site.default_limits([1 / len(gpus)] * len(gpus))[0]
    return _gpu_workers(options, gpus, limit)


def plan_auto(site: Site, options: Options) -> Workers:
    """Use the GPUs where there are some that dask-cuda can use, else the cores."""
    gpu = _gpu_refusal(site) is None
    common = {key: value for key, value in options.items() if key in COMMON}
    side = {**common, **options.get("gpu" if gpu else "cpu", {})}
    return plan_gpu(site, side) if gpu else plan_cpu(site, side)


def plan_mixed(site: Site, options: Options) -> Workers:
    """Give each GPU a worker, and the cores and the memory that remain to CPU workers."""
    gpu, cpu = options.get("gpu", {}), options.get("cpu", {})
    gpus = _devices(site, gpu)
    cpus = site.hardware.cpus
    used = gpu.get("nthreads", 1) * len(gpus)
    if used >= cpus:
        raise site.refuse(
            f"{len(gpus)} GPU workers with {gpu.get('nthreads', 1)} threads each leave none of {cpus} cores for "
            f"CPU workers; use auto-gpu, or fewer GPUs with gpu={{'devices': …}}"
        )
    nworkers, nthreads = split_cores(site, cpus - used, cpu.get("nworkers"), cpu.get("nthreads"))
    gpu_limit, cpu_limit = _mixed_limits(site, gpu, len(gpus), cpu, nworkers)
    return _gpu_workers(gpu, gpus, gpu_limit) + _cpu_workers(cpu, nworkers, nthreads, cpu_limit)


def plan_uniform(site: Site, options: Options) -> Workers:
    """Put as many workers of one shape on the node as fit."""
    cpus, memory = site.hardware.cpus, site.hardware.memory
    nthreads = options.get("nthreads", 1)
    if nthreads > cpus:
        raise site.refuse(f"a worker with nthreads={nthreads} is larger than the node, which has {cpus} cores")
    limit = site.limit_by_hand(options.get("memory_limit", "auto"))
    nworkers = min(cpus // nthreads, options.get("nworkers", cpus))
    if limit:
        nworkers = min(nworkers, memory // limit)
    if limit is None:
        limit = site.default_limits([nthreads / cpus] * nworkers)[0]
    return _cpu_workers(options, nworkers, nthreads, limit)


def plan_none(site: Site, options: Options) -> Workers:
    return ()


def _cpu_workers(options: Options, nworkers: int, nthreads: int, limit: int) -> Workers:
    worker = WorkerSpec(
        kind="cpu",
        cls=NANNY,
        options={key: value for key, value in options.items() if key not in CPU},
        nthreads=nthreads,
        memory_limit=limit,
        resources={"CPU": float(nthreads), **options.get("resources", {})},
        env=options.get("env", {}),
    )
    return (worker,) * nworkers


def _gpu_workers(options: Options, gpus: tuple[Gpu, ...], limit: int) -> Workers:
    devices = tuple(gpu.visible_id for gpu in gpus)
    return tuple(
        WorkerSpec(
            kind="gpu",
            cls=CUDA_WORKER,
            options=_device_memory(gpu) | {key: value for key, value in options.items() if key not in GPU},
            nthreads=options.get("nthreads", 1),
            memory_limit=limit,
            resources={"GPU": 1.0, **options.get("resources", {})},
            env=options.get("env", {}),
            devices=devices,
            device=device,
        )
        for device, gpu in enumerate(gpus)
    )


def _device_memory(gpu: Gpu) -> dict[str, Any]:
    """Return dask-cuda's own default limit for a MIG device; it would take that of the whole GPU."""
    return {"device_memory_limit": int(DEVICE_SHARE * gpu.memory)} if gpu.mig and gpu.memory else {}


def _gpu_refusal(site: Site) -> str | None:
    """Return why the node cannot have GPU workers, if it cannot."""
    if not site.hardware.gpus:
        why = f" ({site.hardware.gpu_problem})" if site.hardware.gpu_problem else ""
        return f"no GPU was found there{why}; use a mode without GPUs, such as 'auto-cpu'"
    if "dask-cuda" not in site.hardware.versions:
        return (
            "dask-cuda is not installed there; on that node run: "
            'pip install "agentcluster[gpu-cu13]" (CUDA 13) or "agentcluster[gpu-cu12]" (CUDA 12)'
        )
    return None


def _devices(site: Site, options: Options) -> tuple[Gpu, ...]:
    """Return the GPUs to use, in the user's order or else the node's."""
    refusal = _gpu_refusal(site)
    if refusal is not None:
        raise site.refuse(refusal)
    gpus = site.hardware.gpus
    names = {gpu.visible_id: gpu for gpu in gpus}
    if not any(gpu.visible_id.isdecimal() for gpu in gpus):
        # Where CUDA knows all by UUID a number is a position; else it would be another GPU than the one CUDA means.
        names.update((str(position), gpu) for position, gpu in enumerate(gpus))
    names.update((gpu.uuid, gpu) for gpu in gpus)
    wanted = options.get("devices") or [gpu.visible_id for gpu in gpus]
    for name in wanted:
        if name not in names:
            here = ", ".join(gpu.visible_id for gpu in gpus)
            raise site.refuse(f"it has no GPU {name!r} as devices asks; its GPUs are: {here}")
    chosen = tuple(names[name] for name in wanted)
    if len(set(chosen)) < len(chosen):
        raise site.refuse(f"devices={','.join(wanted)} names a GPU twice there; name each once")
    return chosen


def _mixed_limits(site: Site, gpu: Options, ngpu: int, cpu: Options, ncpu: int) -> tuple[int, int]:
    """Return the memory limits of a GPU worker and of a CPU worker in mode mixed, in bytes."""
    gpu_limit = site.limit_by_hand(gpu.get("memory_limit", "auto"))
    cpu_limit = site.limit_by_hand(cpu.get("memory_limit", "auto"))
    return (
        _part(site, "gpu", ngpu, (cpu_limit or 0) * ncpu) if gpu_limit is None else gpu_limit,
        _part(site, "cpu", ncpu, (gpu_limit or 0) * ngpu) if cpu_limit is None else cpu_limit,
    )


def _part(site: Site, side: str, nworkers: int, taken: int) -> int:
    """Return the default memory limit of one side's workers: of what the other side left by hand, or of one half."""
    memory = site.hardware.memory
    part = (memory - taken if taken else memory // 2) // nworkers
    if part < 1:
        other = "cpu" if side == "gpu" else "gpu"
        raise site.refuse(
            f"the limits of the {other} workers take {amount(taken)} of the node's {amount(memory)} and leave nothing "
            f"for {nworkers} {side} workers; lower {other}.memory_limit, or set {side}.memory_limit too"
        )
    return part
