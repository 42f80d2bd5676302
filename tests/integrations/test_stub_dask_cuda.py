"""The real dask-cuda over the stub of NVIDIA's library: what it makes of a node, and that we see the same node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import nvml
from tests.support.programs import ROOT

pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")

pytestmark = pytest.mark.gpu_stub

LOOK = """
import asyncio, json, sys, warnings

warnings.simplefilter("error", ResourceWarning)
from agentcluster.agent.hardware import detect
from agentcluster.wire import to_wire
from dask_cuda import CUDAWorker
from dask_cuda.utils import get_gpu_count

def describe(nanny):
    data = nanny.worker_kwargs["data"]
    plugins = {type(plugin).__name__: plugin for plugin in nanny.worker_kwargs["plugins"]}
    return {
        "name": nanny.name,
        "visible": nanny.env["CUDA_VISIBLE_DEVICES"],
        "memory": nanny.memory_manager.memory_limit,
        "device_memory": data[1]["device_memory_limit"] if data else None,
        "nthreads": nanny.nthreads,
        "resources": nanny.resources,
        "plugins": sorted(plugins),
        "cores": plugins["CPUAffinity"].cores,
        "preload": [*nanny.preload, *nanny.preload_argv],
    }

async def main(options):
    found = {"hardware": to_wire(detect()), "count": get_gpu_count()}
    try:
        workers = CUDAWorker("tcp://127.0.0.1:1234", host="127.0.0.1", dashboard=False, name="node", **options)
    except Exception as error:
        found["error"] = repr(error)
    else:
        found["nannies"] = [describe(nanny) for nanny in workers.nannies]
        await workers.close()
        found["closed"] = [nanny.status.name for nanny in workers.nannies]
    found["tasks"] = len(asyncio.all_tasks()) - 1
    print(json.dumps(found))

asyncio.run(main(json.loads(sys.argv[1])))
"""

ONE = """
import asyncio, json, os

async def main():
    from dask_cuda import CUDAWorker
    from distributed import Client, Scheduler

    def look(dask_worker):
        data = dask_worker.data
        return os.environ["CUDA_VISIBLE_DEVICES"], type(data).__name__, data.device_buffer.n, dask_worker.name

    async with Scheduler(port=0, host="127.0.0.1", dashboard=False) as scheduler:
        workers = CUDAWorker(scheduler.address, host="127.0.0.1", dashboard=False, name="node")
        first, second = workers.nannies
        await first.close()
        async with second, Client(scheduler.address, asynchronous=True) as client:
            (seen,) = (await client.run(look)).values()
            print(json.dumps([*seen, await client.submit(sum, [40, 2]), len(scheduler.workers)]))

if __name__ == "__main__":
    asyncio.run(main())
"""


def run(arguments: list[str], library: Path, visible: str | None = None, **stub: Any) -> Any:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "STUB_NVML_", "DASK_"))}
    env |= nvml.environ(library=library, **stub) | {"PYTHONPATH": str(ROOT)}
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def look(library: Path, visible: str | None = None, options: dict[str, Any] | None = None, **stub: Any) -> Any:
    return run(["-c", LOOK, json.dumps(options or {})], library, visible, **stub)


def rotated(ids: list[str]) -> list[str]:
    return [",".join(ids[i:] + ids[:i]) for i in range(len(ids))]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_one_nanny_per_gpu(library: Path, count: int) -> None:
    found = look(library, gpus=count)
    hardware, nannies = found["hardware"], found["nannies"]
    assert found["count"] == len(nannies) == len(hardware["gpus"]) == count
    assert [nanny["visible"] for nanny in nannies] == rotated([gpu["visible_id"] for gpu in hardware["gpus"]])
    for index, (nanny, gpu) in enumerate(zip(nannies, hardware["gpus"], strict=True)):
        assert nanny["name"] == ("node" if count == 1 else f"node-{index}")
        assert nanny["memory"] == hardware["memory"] // count
        assert nanny["device_memory"] == int(0.8 * gpu["memory"])
        assert nanny["nthreads"] == 1
        assert nanny["plugins"] == ["CPUAffinity", "CUDFSetup", "PreImport", "RMMSetup"]
        assert nanny["cores"] == list(range(os.sysconf("SC_NPROCESSORS_ONLN")))
        assert nanny["preload"] == ["dask_cuda.initialize", "--create-cuda-context"]


def test_unstarted_nannies_close_without_a_trace(library: Path) -> None:
    found = look(library, gpus=8)
    assert found["closed"] == ["closed"] * 8
    assert found["tasks"] == 0


def test_options(library: Path) -> None:
    options = {"nthreads": 2, "memory_limit": "1 GB", "device_memory_limit": "auto", "resources": "GPU=1 extra=2"}
    for nanny in look(library, options=options, gpus=2)["nannies"]:
        assert (nanny["nthreads"], nanny["memory"], nanny["device_memory"]) == (2, 10**9, nvml.MEMORY)
        assert nanny["resources"] == {"GPU": 1, "extra": 2}


def test_no_gpu_is_an_error_of_dask_cuda(library: Path) -> None:
    found = look(library, gpus=0)
    assert found["count"] == 0
    assert "error" in found
    assert found["hardware"]["gpu_problem"] == "NVML sees no GPU on this machine"


@pytest.mark.parametrize("visible", ["1", "2,0", nvml.gpu_uuid(3), f"{nvml.gpu_uuid(1)},{nvml.gpu_uuid(0)}"])
def test_visible_devices(library: Path, visible: str) -> None:
    found = look(library, visible, gpus=4)
    seen = [gpu["visible_id"] for gpu in found["hardware"]["gpus"]]
    assert seen == visible.split(",")
    assert [nanny["visible"] for nanny in found["nannies"]] == rotated(seen)


def test_mig_devices(library: Path) -> None:
    uuids = nvml.mig_uuids(0, 2) + nvml.mig_uuids(1, 1)
    found = look(library, ",".join(uuids), gpus=2, mig={0: 2, 1: 1})
    assert [gpu["visible_id"] for gpu in found["hardware"]["gpus"]] == uuids
    assert [nanny["visible"] for nanny in found["nannies"]] == rotated(uuids)


def test_dask_cuda_takes_the_memory_of_a_mig_device_from_its_gpu(library: Path) -> None:
    (uuid, _) = nvml.mig_uuids(0, 2)
    found = look(library, uuid, gpus=1, mig={0: 2})
    assert found["hardware"]["gpus"][0]["memory"] == nvml.MEMORY // 2
    assert found["nannies"][0]["device_memory"] == int(0.8 * nvml.MEMORY)


def test_dask_cuda_does_not_list_mig_devices_itself(library: Path) -> None:
    found = look(library, gpus=1, mig={0: 2})
    assert [nanny["visible"] for nanny in found["nannies"]] == ["0"]
    assert [gpu["visible_id"] for gpu in found["hardware"]["gpus"]] == nvml.mig_uuids(0, 2)


def test_gpus_without_memory_of_their_own(library: Path) -> None:
    found = look(library, gpus=1, memory=None)
    assert found["hardware"]["gpus"][0]["memory"] == 0
    assert found["nannies"][0]["device_memory"] is None


def test_one_nanny_runs_alone(library: Path, tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(ONE)
    assert run([str(script)], library, gpus=2) == ["1,0", "DeviceHostFile", int(0.8 * nvml.MEMORY), "node-1", 42, 1]
