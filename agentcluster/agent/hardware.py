"""Hardware and load of the host: cores, memory, GPUs and package versions; CPU, memory and GPU load.

This module is the only one that uses NVIDIA's management library (NVML, through ``pynvml``). GPUs that cannot be seen
are never an error: :func:`detect` then gives the reason with the hardware. NVML is initialised on first use, once per
process, so that importing this module before a fork is safe.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import platform
import socket
from types import ModuleType

import dask.config
import dask.system
import psutil
from distributed.system import MEMORY_LIMIT

from agentcluster.model import Gpu, Hardware, HostMetrics

__all__ = ["detect", "metrics"]

logger = logging.getLogger(__name__)

PACKAGES = ("dask", "distributed", "agentcluster", "dask-cuda")

_initialised_in: int | None = None


class _NoGpu(Exception):
    """The reason, as a sentence, why no GPU can be used."""


def detect() -> Hardware:
    """Detect the hardware that this process may use.

    Returns
    -------
    Hardware
        Cores by affinity and cgroup, memory in bytes by cgroup and rlimit, GPUs and MIG devices by
        ``CUDA_VISIBLE_DEVICES``, and package versions. Without GPUs, ``gpu_problem`` says why.
    """
    gpus, problem = _gpus()
    return Hardware(
        hostname=socket.gethostname(),
        cpus=dask.system.cpu_count(),
        # the limit of dask's and dask-cuda's workers: read once, since a virtual machine's total changes while it runs
        memory=MEMORY_LIMIT,
        gpus=gpus,
        gpu_problem=problem,
        versions=_versions(),
    )


def metrics(hardware: Hardware) -> HostMetrics:
    """Measure this host's load now.

    Parameters
    ----------
    hardware
        Hardware of this host, from :func:`detect`.

    Returns
    -------
    HostMetrics
        CPU load in percent since the call before, used memory in bytes, and for each GPU its load
        in percent and its used memory in bytes: 0 where NVML has no value, as for a MIG device's load.
    """
    loads = _gpu_loads(hardware.gpus)
    return HostMetrics(
        cpu=psutil.cpu_percent(interval=None),
        memory_used=psutil.virtual_memory().used,
        gpu=tuple(percent for percent, _ in loads),
        gpu_memory_used=tuple(used for _, used in loads),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _nvml() -> ModuleType:
    """Return pynvml, initialised in this process; NVML's state does not survive a fork.

    Raises
    ------
    _NoGpu
        When pynvml or the driver is missing or unusable.
    """
    global _initialised_in
    try:
        import pynvml
    except ImportError as error:
        raise _NoGpu(f"pynvml (package nvidia-ml-py) cannot be imported: {error}") from error
    if _initialised_in != os.getpid():
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise _NoGpu(f"NVIDIA's driver cannot be used: {error}") from error
        _initialised_in = os.getpid()
    nvml: ModuleType = pynvml
    return nvml


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Return the GPUs that may be used; if there are none, the reason."""
    if not dask.config.get("distributed.diagnostics.nvml", True):
        return (), "GPUs are switched off by the dask setting distributed.diagnostics.nvml: False"
    try:
        nvml = _nvml()
        try:
            return _visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES")), None
        except nvml.NVMLError as error:
            raise _NoGpu(f"NVML cannot list the GPUs: {error}") from error
    except _NoGpu as reason:
        return (), str(reason)


def _visible(nvml: ModuleType, wanted: str | None) -> tuple[Gpu, ...]:
    """Return the devices that `wanted`, the value of ``CUDA_VISIBLE_DEVICES``, leaves visible; never none.

    As in CUDA, an entry that names no device ends the list, and one that names a device again makes it empty.
    """
    count = nvml.nvmlDeviceGetCount()
    if count == 0:
        raise _NoGpu("NVML sees no GPU on this machine")
    if wanted is None:
        if found := [gpu for index in range(count) for gpu in _devices(nvml, index)]:
            return tuple(found)
        raise _NoGpu("every GPU is in MIG mode and has no MIG device; create some with nvidia-smi mig")
    if not wanted.strip():
        raise _NoGpu("CUDA_VISIBLE_DEVICES is empty")
    gpus: list[Gpu] = []
    for entry in map(str.strip, wanted.split(",")):
        named = _named(nvml, entry, count)
        if not named and not gpus:
            raise _NoGpu(f"CUDA_VISIBLE_DEVICES={wanted!r}: {entry!r} names no device of this machine")
        if not named:
            logger.warning("CUDA_VISIBLE_DEVICES=%r is used up to %r, which names no device here", wanted, entry)
            break
        gpus += named
    if len({gpu.uuid for gpu in gpus}) < len(gpus):
        raise _NoGpu(f"CUDA_VISIBLE_DEVICES={wanted!r} names a device twice, so CUDA shows none")
    return tuple(gpus)


def _named(nvml: ModuleType, entry: str, count: int) -> list[Gpu]:
    """Return the devices of an entry of ``CUDA_VISIBLE_DEVICES``: one, or all those of a GPU in MIG mode.

    An index or a UUID is kept as the device's ``visible_id``. The unambiguous beginning of a UUID, which CUDA accepts
    but NVML and dask-cuda do not, becomes the whole one.
    """
    if entry.isascii() and entry.isdecimal():
        return _devices(nvml, int(entry)) if int(entry) < count else []
    if not entry.startswith(("GPU-", "MIG-")):
        return []
    matches: list[list[Gpu]] = []
    for index in range(count):
        devices = _devices(nvml, index)
        if nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)).startswith(entry):
            matches.append([dataclasses.replace(gpu, visible_id=gpu.uuid) for gpu in devices])
        matches += [[gpu] for gpu in devices if gpu.mig and gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else []


def _devices(nvml: ModuleType, index: int) -> list[Gpu]:
    """Return a GPU, or its MIG devices when it is in MIG mode: CUDA cannot use such a GPU as a whole."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if not _mig_mode(nvml, handle):
            return [_gpu(nvml, handle, str(index))]
        return [_gpu(nvml, mig, None) for mig in _mig_handles(nvml, handle)]
    except nvml.NVMLError as error:
        raise _NoGpu(f"NVML cannot read GPU {index}: {error}") from error


def _mig_mode(nvml: ModuleType, handle: object) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError_NotSupported:
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _mig_handles(nvml: ModuleType, handle: object) -> list[object]:
    found = []
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
        except nvml.NVMLError_NotFound:
            continue
    return found


def _gpu(nvml: ModuleType, handle: object, index: str | None) -> Gpu:
    """Describe one device; without an index it is a MIG device."""
    uuid = nvml.nvmlDeviceGetUUID(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    except nvml.NVMLError_NotSupported:
        memory = 0
    return Gpu(index or uuid, uuid, nvml.nvmlDeviceGetName(handle), memory, mig=index is None)


def _gpu_loads(gpus: tuple[Gpu, ...]) -> list[tuple[int, int]]:
    """Return load in percent and used bytes of each device, 0 for values that cannot be read."""
    if not gpus:
        return []
    try:
        nvml = _nvml()
    except _NoGpu:
        return [(0, 0)] * len(gpus)
    return [(_percent(nvml, gpu), _used(nvml, gpu)) for gpu in gpus]


def _percent(nvml: ModuleType, gpu: Gpu) -> int:
    try:
        return int(nvml.nvmlDeviceGetUtilizationRates(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid.encode())).gpu)
    except nvml.NVMLError:
        return 0


def _used(nvml: ModuleType, gpu: Gpu) -> int:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid.encode())).used)
    except nvml.NVMLError:
        return 0
