"""Hardware and load of the machine that the tests run on."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import socket

import psutil
import pytest
from distributed.system import MEMORY_LIMIT

from agentcluster.agent import hardware
from agentcluster.model import Gpu, Hardware


def test_without_library() -> None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        found = hardware.detect()
    else:
        pytest.skip("this machine has NVIDIA's driver")
    assert found.gpus == ()
    assert found.gpu_problem == "NVIDIA's driver cannot be used: NVML Shared Library Not Found"


def test_metrics_without_driver() -> None:
    gpus = (Gpu("0", "GPU-of-another-machine", "", 0),) * 2
    load = hardware.metrics(Hardware("here", 1, 1, gpus=gpus))
    assert load.gpu == load.gpu_memory_used == (0, 0)


def test_metrics_of_host() -> None:
    found = hardware.detect()
    load = hardware.metrics(found)
    assert 0 <= load.cpu <= 100
    assert 0 < load.memory_used < psutil.virtual_memory().total
    assert len(load.gpu) == len(load.gpu_memory_used) == len(found.gpus)


def test_machine() -> None:
    found = hardware.detect()
    assert found.hostname == socket.gethostname()
    assert 1 <= found.cpus <= len(os.sched_getaffinity(0))
    assert found.memory == MEMORY_LIMIT


def test_memory_is_what_the_process_found_when_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    # dask-cuda and distributed hold their workers to what they read at import; a virtual machine's total moves
    now = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now._replace(total=now.total // 2))
    assert hardware.detect().memory == MEMORY_LIMIT


def test_versions() -> None:
    versions = hardware.detect().versions
    assert versions["python"] == platform.python_version()
    for package in ("dask", "distributed", "dask-cuda", "agentcluster"):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        assert versions.get(package) == installed
