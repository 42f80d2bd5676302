"""The stub of NVIDIA's management library: compile it, and the environment that makes a process see its GPUs.

The loader reads ``LD_LIBRARY_PATH`` when a process starts, so only a child process can be given the stub::

    library = nvml.build(directory)
    subprocess.run([sys.executable, ...], env=os.environ | nvml.environ(library=library, gpus=2))
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml_stub.c")
#: First slot of a GPU's MIG devices is ``MIG_SLOTS`` less their number.
MIG_SLOTS = 7
#: Bytes of a stub GPU, unless said otherwise.
MEMORY = 16 * 2**30


def build(directory: Path) -> Path:
    """Compile the stub into `directory`, unless it is there, and return the library; skip the test without ``cc``."""
    library = directory / "libnvidia-ml.so.1"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("the stub of NVML needs a C compiler (cc)")
    directory.mkdir(parents=True, exist_ok=True)
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{library.name}"]
    done = subprocess.run([compiler, *options, "-o", library, SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def environ(
    *,
    library: Path,
    gpus: int = 2,
    memory: int | None = MEMORY,
    mig: Mapping[int, int] | None = None,
    fail: str | None = None,
) -> dict[str, str]:
    """Return the variables to add to a process's environment so that it sees `gpus` stub GPUs.

    Parameters
    ----------
    library
        What :func:`build` returned.
    gpus
        Number of GPUs, at most 16.
    memory
        Bytes of memory of each; ``None`` for GPUs without memory of their own.
    mig
        GPU -> number of its MIG devices (up to 7), for each GPU in MIG mode.
    fail
        Calls that fail with an NVML error code, such as ``"init:9"`` or ``"name@1:15,memory:3"``; the words are in
        ``nvml_stub.c``.
    """
    path = os.environ.get("LD_LIBRARY_PATH")
    variables = {
        "LD_LIBRARY_PATH": f"{library.parent}:{path}" if path else str(library.parent),
        "STUB_NVML_GPUS": str(gpus),
        "STUB_NVML_MEMORY": "none" if memory is None else str(memory),
    }
    if mig is not None:
        variables["STUB_NVML_MIG"] = ",".join(f"{gpu}:{count}" for gpu, count in mig.items())
    if fail is not None:
        variables["STUB_NVML_FAIL"] = fail
    return variables


def gpu_uuid(gpu: int) -> str:
    """UUID of a stub GPU."""
    return f"GPU-{gpu + 1:08x}-0000-0000-0000-{gpu + 1:012x}"


def mig_uuids(gpu: int, count: int) -> list[str]:
    """UUIDs of a stub GPU's `count` MIG devices."""
    return [
        f"MIG-{gpu + 1:04x}{slot + 1:04x}-0000-0000-0000-{gpu + 1:012x}" for slot in range(MIG_SLOTS - count, MIG_SLOTS)
    ]
