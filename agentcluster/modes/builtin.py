"""Built-in modes that plan workers from a node's hardware: auto-cpu, auto-gpu, auto, mixed, uniform, and none.

Each mode has two functions: one checks its options when the mode is parsed, one plans the workers of a node. The
arithmetic of a node (cores and memory of each worker, refusals of workers that do not fit) is at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dask.utils import format_bytes
from distributed.deploy.utils import nprocesses_nthreads

from agentcluster.errors import ModeRefused
from agentcluster.model import Gpu, Hardware, WorkerSpec
from agentcluster.modes.options import (
    COMMON,
    CUDA_WORKER,
    NANNY,
    Check,
    CheckedOptions,
    OptionPath,
    Options,
    check_devices,
    check_flag,
    check_mapping,
    check_options,
    check_positive,
    check_worker_count,
    memory_amount,
    shown,
)

#: Workers of a node, in the order of their names.
Workers = tuple[WorkerSpec, ...]

#: Part of a device's memory that its worker may use before it spills, as in dask-cuda.
DEVICE_SHARE = 0.8

#: Whether workers have the resource of their kind, ``CPU`` or ``GPU``; dask's own workers have none of their own.
KIND: Mapping[str, Check] = {"kind_resource": check_flag}

CPU: Mapping[str, Check] = {"nworkers": check_worker_count, **COMMON, **KIND}
GPU: Mapping[str, Check] = {"devices": check_devices, **COMMON, **KIND}
UNIFORM: Mapping[str, Check] = {"nworkers": check_positive, **COMMON, **KIND}


# -- checks of options -------------------------------------------------------------------------------------------------


def check_cpu(path: OptionPath, config: Options) -> CheckedOptions:
    """Check the options of mode ``auto-cpu``; see :func:`~agentcluster.modes.options.check_options`.

    Parameters
    ----------
    path
        Path of the options, for messages.
    config
        The options: ``nworkers``, those of every worker, and keywords of the nanny.

    Returns
    -------
    dict
        The options that are set, as plain data.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    return check_options(path, config, CPU, NANNY)


def check_gpu(path: OptionPath, config: Options) -> CheckedOptions:
    """Check the options of mode ``auto-gpu``; see :func:`~agentcluster.modes.options.check_options`.

    Parameters
    ----------
    path
        Path of the options, for messages.
    config
        The options: ``devices``, those of every worker, and keywords of dask-cuda's worker.

    Returns
    -------
    dict
        The options that are set, as plain data.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    return check_options(path, config, GPU, CUDA_WORKER)


def check_uniform(path: OptionPath, config: Options) -> CheckedOptions:
    """Check the options of mode ``uniform``; see :func:`~agentcluster.modes.options.check_options`.

    Parameters
    ----------
    path
        Path of the options, for messages.
    config
        The options: ``nworkers``, those of every worker, and keywords of the nanny.

    Returns
    -------
    dict
        The options that are set, as plain data.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    return check_options(path, config, UNIFORM, NANNY)


def check_none(path: OptionPath, config: Options) -> CheckedOptions:
    """Check that mode ``none`` has no options; see :func:`~agentcluster.modes.options.check_options`.

    Parameters
    ----------
    path
        Path of the options, for messages.
    config
        The options.

    Returns
    -------
    dict
        An empty mapping.

    Raises
    ------
    ConfigError
        For any option.
    """
    return check_options(path, config, {})


def _check_gpu_side(path: OptionPath, config: object) -> CheckedOptions:
    return check_gpu(path, check_mapping(path, config, "a mapping of the options of auto-gpu"))


def _check_cpu_side(path: OptionPath, config: object) -> CheckedOptions:
    return check_cpu(path, check_mapping(path, config, "a mapping of the options of auto-cpu"))


SIDES: Mapping[str, Check] = {"gpu": _check_gpu_side, "cpu": _check_cpu_side}


def check_auto(path: OptionPath, config: Options) -> CheckedOptions:
    """Check the options of mode ``auto``; see :func:`~agentcluster.modes.options.check_options`.

    Parameters
    ----------
    path
        Path of the options, for messages.
    config
        The options: those of every worker; ``gpu`` and ``cpu``, mappings of options for auto-gpu and auto-cpu.

    Returns
    -------
    dict
        The options that are set, as plain data.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    return check_options(path, config, {**SIDES, **COMMON, **KIND})


def check_mixed(path: OptionPath, config: Options) -> CheckedOptions:
    """Check the options of mode ``mixed``; see :func:`~agentcluster.modes.options.check_options`.

    Parameters
    ----------
    path
        Path of the options, for messages.
    config
        The options: ``gpu`` and ``cpu``, mappings of options for auto-gpu and auto-cpu.

    Returns
    -------
    dict
        The options that are set, as plain data.

    Raises
    ------
    ConfigError
        For a name or a value that is not allowed.
    """
    return check_options(path, config, SIDES)


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_cpu(node: NodeHardware, options: Options) -> Workers:
    """Split the node's cores as ``LocalCluster`` does; see :func:`agentcluster.modes.plan`.

    Parameters
    ----------
    node
        The node, with its hardware.
    options
        Options of mode ``auto-cpu``, checked.

    Returns
    -------
    tuple of WorkerSpec
        Equal CPU workers.

    Raises
    ------
    ModeRefused
        When a negative ``nworkers`` leaves no worker, when a memory limit is more than the node has, or the node's
        memory is too little for the workers.
    """
    cpus = node.hardware.cpus
    nworkers, nthreads = split_cores(node, cpus, options.get("nworkers"), options.get("nthreads"))
    limit = node.limit_by_hand(options.get("memory_limit", "auto"))
    if limit is None:
        limit = node.default_limits([min(1, nthreads / cpus)] * nworkers)[0]
    return _cpu_workers(options, nworkers, nthreads, limit)


def plan_gpu(node: NodeHardware, options: Options) -> Workers:
    """Plan a worker for each GPU or MIG device, with dask-cuda's memory limit; see :func:`agentcluster.modes.plan`.

    Parameters
    ----------
    node
        The node, with its hardware.
    options
        Options of mode ``auto-gpu``, checked.

    Returns
    -------
    tuple of WorkerSpec
        One worker for each GPU, in the order of ``devices`` or else the node's.

    Raises
    ------
    ModeRefused
        When the node has no GPU or no dask-cuda, when ``devices`` names a GPU twice or one that it does not have,
        when a memory limit is more than the node has, or the node's memory is too little for the workers.
    """
    gpus = _devices(node, options)
    if options.get("enable_cudf_spill") and not all(gpu.memory for gpu in gpus):
        raise node.refuse("enable_cudf_spill: cuDF spilling is not supported on devices without dedicated memory")
    limit = node.limit_by_hand(options.get("memory_limit", "auto"))
    if limit is None:
        limit = node.default_limits([1 / len(gpus)] * len(gpus))[0]
    return _gpu_workers(options, gpus, limit)


def plan_auto(node: NodeHardware, options: Options) -> Workers:
    """Use the GPUs where dask-cuda can use them, else the cores; see :func:`agentcluster.modes.plan`.

    Parameters
    ----------
    node
        The node, with its hardware.
    options
        Options of mode ``auto``, checked; those of ``gpu`` or ``cpu`` win over the common ones.

    Returns
    -------
    tuple of WorkerSpec
        GPU workers, or CPU workers where the node has no GPU or no dask-cuda.

    Raises
    ------
    ModeRefused
        As for :func:`plan_gpu` or :func:`plan_cpu`, whichever is used.
    """
    gpu = _gpu_refusal(node) is None
    common = {key: value for key, value in options.items() if key not in SIDES}
    side = {**common, **options.get("gpu" if gpu else "cpu", {})}
    return plan_gpu(node, side) if gpu else plan_cpu(node, side)


def plan_mixed(node: NodeHardware, options: Options) -> Workers:
    """Plan a worker for each GPU, and CPU workers for the other cores; see :func:`agentcluster.modes.plan`.

    Parameters
    ----------
    node
        The node, with its hardware.
    options
        Options of mode ``mixed``, checked.

    Returns
    -------
    tuple of WorkerSpec
        The GPU workers, then the CPU workers.

    Raises
    ------
    ModeRefused
        As for :func:`plan_gpu` and :func:`plan_cpu`; also when the GPU workers' threads leave no core for CPU workers,
        or when the limits of one side leave no memory for the other.
    """
    gpu, cpu = options.get("gpu", {}), options.get("cpu", {})
    gpus = _devices(node, gpu)
    cpus = node.hardware.cpus
    used = gpu.get("nthreads", 1) * len(gpus)
    if used >= cpus:
        raise node.refuse(
            f"{len(gpus)} GPU workers with {gpu.get('nthreads', 1)} threads each leave none of {cpus} cores for "
            f"CPU workers; use auto-gpu, or fewer GPUs with gpu={{'devices': …}}"
        )
    nworkers, nthreads = split_cores(node, cpus - used, cpu.get("nworkers"), cpu.get("nthreads"))
    gpu_limit, cpu_limit = _mixed_limits(node, gpu, len(gpus), cpu, nworkers)
    return _gpu_workers(gpu, gpus, gpu_limit) + _cpu_workers(cpu, nworkers, nthreads, cpu_limit)


def plan_uniform(node: NodeHardware, options: Options) -> Workers:
    """Plan as many equal workers as the node has capacity for; see :func:`agentcluster.modes.plan`.

    Parameters
    ----------
    node
        The node, with its hardware.
    options
        Options of mode ``uniform``, checked; ``nthreads`` is 1 where it is not set.

    Returns
    -------
    tuple of WorkerSpec
        Equal CPU workers: as many as cores and memory are enough for, at most ``nworkers``.

    Raises
    ------
    ModeRefused
        When one worker has more threads than the node has cores, when a memory limit is more than the node has, or
        the node's memory is too little for the workers.
    """
    cpus, memory = node.hardware.cpus, node.hardware.memory
    nthreads = options.get("nthreads", 1)
    if nthreads > cpus:
        raise node.refuse(f"a worker with nthreads={nthreads} is larger than the node, which has {cpus} cores")
    limit = node.limit_by_hand(options.get("memory_limit", "auto"))
    nworkers = min(cpus // nthreads, options.get("nworkers", cpus))
    if limit:
        nworkers = min(nworkers, memory // limit)
    if limit is None:
        limit = node.default_limits([nthreads / cpus] * nworkers)[0]
    return _cpu_workers(options, nworkers, nthreads, limit)


def plan_none(node: NodeHardware, options: Options) -> Workers:
    """Plan no workers; see :func:`agentcluster.modes.plan`.

    Parameters
    ----------
    node
        The node, with its hardware.
    options
        Options of mode ``none``, which has none.

    Returns
    -------
    tuple of WorkerSpec
        An empty tuple.
    """
    return ()


def _cpu_workers(options: Options, nworkers: int, nthreads: int, limit: int) -> Workers:
    worker = WorkerSpec(
        kind="cpu",
        cls=NANNY,
        options={key: value for key, value in options.items() if key not in CPU},
        nthreads=nthreads,
        memory_limit=limit,
        resources=_with_kind(options, "CPU", float(nthreads)),
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
            resources=_with_kind(options, "GPU", 1.0),
            env=options.get("env", {}),
            devices=devices,
            device=device,
        )
        for device, gpu in enumerate(gpus)
    )


def _with_kind(options: Options, kind: str, amount: float) -> dict[str, float]:
    """Return the resources of a worker, with that of its kind."""
    return {**({kind: amount} if options.get("kind_resource", True) else {}), **options.get("resources", {})}


def _device_memory(gpu: Gpu) -> CheckedOptions:
    """Return the default memory limit of a MIG device; dask-cuda would take that of the whole GPU."""
    return {"device_memory_limit": int(DEVICE_SHARE * gpu.memory)} if gpu.mig and gpu.memory else {}


def _gpu_refusal(node: NodeHardware) -> str | None:
    """Return the reason why the node cannot have GPU workers; None where it can."""
    if not node.hardware.gpus:
        why = f" ({node.hardware.gpu_problem})" if node.hardware.gpu_problem else ""
        return f"no GPU was found there{why}; use a mode without GPUs, such as 'auto-cpu'"
    if "dask-cuda" not in node.hardware.versions:
        return (
            "dask-cuda is not installed there; on that node run: "
            'pip install "agentcluster[gpu-cu13]" (CUDA 13) or "agentcluster[gpu-cu12]" (CUDA 12)'
        )
    return None


def _devices(node: NodeHardware, options: Options) -> tuple[Gpu, ...]:
    """Return the GPUs to use, in the user's order or else the node's."""
    refusal = _gpu_refusal(node)
    if refusal is not None:
        raise node.refuse(refusal)
    gpus = node.hardware.gpus
    names = {gpu.visible_id: gpu for gpu in gpus}
    if not any(gpu.visible_id.isdecimal() for gpu in gpus):
        # Where CUDA names all devices by UUID a number is a position; elsewhere it could be another GPU than CUDA's.
        names.update((str(position), gpu) for position, gpu in enumerate(gpus))
    names.update((gpu.uuid, gpu) for gpu in gpus)
    wanted = options.get("devices") or [gpu.visible_id for gpu in gpus]
    for name in wanted:
        if name not in names:
            here = ", ".join(gpu.visible_id for gpu in gpus)
            raise node.refuse(f"it has no GPU {name!r} as devices asks; its GPUs are: {here}")
    chosen = tuple(names[name] for name in wanted)
    if len(set(chosen)) < len(chosen):
        raise node.refuse(f"devices={','.join(wanted)} names a GPU twice there; name each once")
    if all(name == gpu.uuid for name, gpu in zip(wanted, chosen, strict=True)):
        return tuple(replace(gpu, visible_id=gpu.uuid) for gpu in chosen)  # so in CUDA_VISIBLE_DEVICES, as in dask-cuda
    return chosen


def _mixed_limits(node: NodeHardware, gpu: Options, ngpu: int, cpu: Options, ncpu: int) -> tuple[int, int]:
    """Return the memory limits of a GPU worker and of a CPU worker in mode mixed, in bytes."""
    gpu_limit = node.limit_by_hand(gpu.get("memory_limit", "auto"))
    cpu_limit = node.limit_by_hand(cpu.get("memory_limit", "auto"))
    return (
        _part(node, "gpu", ngpu, (cpu_limit or 0) * ncpu) if gpu_limit is None else gpu_limit,
        _part(node, "cpu", ncpu, (gpu_limit or 0) * ngpu) if cpu_limit is None else cpu_limit,
    )


def _part(node: NodeHardware, side: str, nworkers: int, taken: int) -> int:
    """Return the default memory limit of one side's workers: of what the other side left by hand, or of one half."""
    memory = node.hardware.memory
    part = (memory - taken if taken else memory // 2) // nworkers
    if part < 1:
        other = "cpu" if side == "gpu" else "gpu"
        raise node.refuse(
            f"the limits of the {other} workers take {in_bytes(taken)} of the node's {in_bytes(memory)} and leave "
            f"nothing for {nworkers} {side} workers; lower {other}.memory_limit, or set {side}.memory_limit too"
        )
    return part


# -- arithmetic of a node ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeHardware:
    """Hardware of a node that a mode is planned for, with the names that messages need.

    Attributes
    ----------
    mode
        Name of the mode.
    name
        Name of the node.
    hardware
        Hardware of the node.
    """

    mode: str
    name: str
    hardware: Hardware

    def refuse(self, reason: str) -> ModeRefused:
        """Return the error that the node cannot have the mode.

        Parameters
        ----------
        reason
            The reason, and what would help.
        """
        return ModeRefused(self.name, self.mode, reason)

    def limit_by_hand(self, value: object) -> int | None:
        """Return a memory limit in bytes on this node.

        Parameters
        ----------
        value
            The limit as the user wrote it.

        Returns
        -------
        int or None
            0 for no limit, None where `value` asks for the default share.

        Raises
        ------
        ModeRefused
            When it is more than the node has.
        ValueError
            When `value` is no memory limit.
        """
        wanted, memory = memory_amount(value), self.hardware.memory
        if isinstance(wanted, float):
            # A tiny fraction must not round to 0, which is no limit.
            return max(1, int(wanted * memory))
        if wanted is not None and wanted > memory:
            raise self.refuse(
                f"memory_limit {shown(value)} is {in_bytes(wanted)} a worker, the node has {in_bytes(memory)}; "
                f"give at most that, a fraction up to 1.0, or 0 for no limit"
            )
        return wanted

    def default_limits(self, shares: Sequence[float], taken: int = 0) -> list[int]:
        """Return memory limits for workers whose limit was not set.

        Parameters
        ----------
        shares
            Part of the node's memory that each would get if it were alone, 0 to 1.
        taken
            Bytes of the limits that were set by hand for other workers.

        Returns
        -------
        list of int
            Bytes, one for each share; with `taken` they never add up to more than the node has.

        Raises
        ------
        ModeRefused
            When nothing is left for them.
        """
        memory = self.hardware.memory
        limits = [int(memory * share) for share in shares]
        wanted, left = sum(limits), memory - taken
        if wanted > left:
            limits = [limit * max(0, left) // wanted for limit in limits]
        if not all(limits):
            raise self.refuse(
                f"memory limits set by hand take {in_bytes(taken)} of the node's {in_bytes(memory)} and leave too "
                f"little for {len(limits)} workers without one; lower them, or set memory_limit for all"
                if taken
                else f"{in_bytes(memory)} of memory are too little for {len(limits)} workers; ask for fewer"
            )
        return limits


def in_bytes(nbytes: int) -> str:
    """Return an amount of memory for a message, exact and rounded.

    Parameters
    ----------
    nbytes
        The amount.
    """
    return f"{nbytes} bytes ({format_bytes(nbytes)})"


def split_cores(node: NodeHardware, cpus: int, nworkers: int | str | None, nthreads: int | None) -> tuple[int, int]:
    """Split cores among workers.

    Parameters
    ----------
    node
        The node, for messages.
    cpus
        Cores to split.
    nworkers, nthreads
        Numbers that the user set; None and ``"auto"`` for those that he did not. Both may be more than the cores.

    Returns
    -------
    int, int
        Number of workers, and of threads of each.

    Raises
    ------
    ModeRefused
        When a negative `nworkers` leaves none.
    """
    if isinstance(nworkers, str):
        nworkers = None
    if nworkers is not None and nworkers < 0:
        asked, nworkers = nworkers, cpus + 1 + nworkers
        if nworkers < 1:
            raise node.refuse(f"nworkers={asked} leaves no worker on {cpus} cores; give at least {-cpus}")
    if nworkers is None and nthreads is None:
        workers, threads = nprocesses_nthreads(cpus)
        return int(workers), int(threads)
    if nworkers is None:
        assert nthreads is not None
        return max(1, cpus // nthreads), nthreads
    return nworkers, max(1, cpus // nworkers) if nthreads is None else nthreads


def warn_of_overcommit(node: NodeHardware, workers: Workers) -> None:
    """Warn when memory limits set by hand add up to more than the node has; they are kept, as ``dask worker`` does.

    Parameters
    ----------
    node
        The node.
    workers
        Its workers.

    Warns
    -----
    UserWarning
        With both amounts.
    """
    total = sum(worker.memory_limit or 0 for worker in workers)
    if total > node.hardware.memory:
        warnings.warn(
            f"node {node.name!r}, mode {node.mode!r}: memory limits set by hand add up to {in_bytes(total)}, "
            f"the node has {in_bytes(node.hardware.memory)}",
            UserWarning,
            stacklevel=3,
        )
