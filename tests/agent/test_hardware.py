"""What is detected on a node, over a stub of NVIDIA's library.

The stub must be on ``LD_LIBRARY_PATH`` when a process starts. One child process is therefore started with it, which
imports the code once and forks for each question, so that each is answered by a process that never used NVML before.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agentcluster.agent import hardware
from agentcluster.model import Gpu, Hardware, HostMetrics
from agentcluster.wire import from_wire
from tests.support import nvml
from tests.support.programs import ROOT

CHILD = """
import json, os, sys
import dask.config
from agentcluster.agent import hardware
from agentcluster.wire import to_wire

def answer(env, config, cpus, hide, metrics_fail):
    os.environ.update(env)
    if cpus:
        os.sched_setaffinity(0, cpus)
    if hide:
        sys.modules[hide] = None
    with dask.config.set(config):
        found = hardware.detect()
    if metrics_fail:
        os.environ["STUB_NVML_FAIL"] = metrics_fail
    return {"hardware": to_wire(found), "metrics": to_wire(hardware.metrics(found))}

def loaded():
    with open("/proc/self/maps") as maps:
        return "libnvidia-ml" in maps.read()

print(json.dumps({"loaded": loaded()}), flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            print(json.dumps(answer(**json.loads(line))), flush=True)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        print(json.dumps({"crashed": line}), flush=True)
"""


def clean() -> dict[str, str]:
    """Return this process's environment without what would hide or show GPUs."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "STUB_NVML_", "DASK_"))}
    return keep | {"PYTHONPATH": str(ROOT)}


class Node:
    """The child process, and how to ask it."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=clean() | nvml.environ(library=library),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 30)
        assert ready, "the child says nothing"
        return json.loads(self.process.stdout.readline())

    def ask(
        self,
        visible: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        cpus: list[int] | None = None,
        hide: str | None = None,
        metrics_fail: str | None = None,
        **stub: Any,
    ) -> tuple[Hardware, HostMetrics]:
        env = nvml.environ(library=self.library, **stub)
        if visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        request = {"env": env, "config": config or {}, "cpus": cpus, "hide": hide, "metrics_fail": metrics_fail}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        assert "crashed" not in answer
        return from_wire(Hardware, answer["hardware"]), from_wire(HostMetrics, answer["metrics"])

    def close(self) -> None:
        self.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def node(library: Path) -> Iterator[Node]:
    node = Node(library)
    yield node
    node.close()


def gpu(index: int, visible_id: str | None = None) -> Gpu:
    return Gpu(visible_id or str(index), nvml.gpu_uuid(index), "Stub GPU", nvml.MEMORY)


def ids(found: Hardware) -> list[str]:
    return [gpu.visible_id for gpu in found.gpus]


def run(code: str, env: Mapping[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_does_not_touch_nvml(node: Node) -> None:
    assert node.hello == {"loaded": False}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_gpus(node: Node, count: int) -> None:
    found, _ = node.ask(gpus=count)
    assert found.gpus == tuple(gpu(index) for index in range(count))
    assert found.gpu_problem is None


def test_no_gpu(node: Node) -> None:
    found, load = node.ask(gpus=0)
    assert found.gpus == ()
    assert found.gpu_problem == "NVML sees no GPU on this machine"
    assert load.gpu == load.gpu_memory_used == ()


def test_memory_of_gpu(node: Node) -> None:
    assert node.ask(gpus=1, memory=5 * 2**30)[0].gpus[0].memory == 5 * 2**30


def test_gpu_without_memory_of_its_own(node: Node) -> None:
    found, load = node.ask(gpus=1, memory=None)
    assert found.gpus[0].memory == 0
    assert found.gpu_problem is None
    assert (load.gpu, load.gpu_memory_used) == ((10,), (0,))


def test_mig_devices_take_the_place_of_their_gpu(node: Node) -> None:
    found, load = node.ask(gpus=3, mig={1: 2})
    first, second = nvml.mig_uuids(1, 2)
    assert ids(found) == ["0", first, second, "2"]
    assert found.gpus[1] == Gpu(first, first, "Stub GPU MIG 1g.5gb", nvml.MEMORY // 2, mig=True)
    assert [gpu.mig for gpu in found.gpus] == [False, True, True, False]
    assert load.gpu == (10, 0, 0, 30)
    assert load.gpu_memory_used == tuple(used * 2**20 for used in (1, 2, 2, 3))


def test_all_mig_slots(node: Node) -> None:
    assert ids(node.ask(gpus=1, mig={0: 7})[0]) == nvml.mig_uuids(0, 7)


def test_mig_mode_without_devices(node: Node) -> None:
    found, _ = node.ask(gpus=1, mig={0: 0})
    assert found.gpus == ()
    assert "no MIG device" in (found.gpu_problem or "")
    assert ids(node.ask(gpus=2, mig={0: 0})[0]) == ["1"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("3,1,-1,0", [3, 1]),
        ("0,4,1", [0]),
        ("0,nonsense,1", [0]),
        ("2,", [2]),
    ],
)
def test_visible_by_index(node: Node, visible: str, expected: list[int]) -> None:
    found, load = node.ask(visible, gpus=4)
    assert found.gpus == tuple(gpu(index) for index in expected)
    assert found.gpu_problem is None
    assert load.gpu == tuple(10 * (index + 1) for index in expected)


def test_visible_by_uuid(node: Node) -> None:
    uuids = [nvml.gpu_uuid(2), nvml.gpu_uuid(0)]
    found, load = node.ask(",".join(uuids), gpus=4)
    assert found.gpus == (gpu(2, uuids[0]), gpu(0, uuids[1]))
    assert load.gpu == (30, 10)


def test_visible_by_index_and_uuid(node: Node) -> None:
    assert ids(node.ask(f"3,{nvml.gpu_uuid(1)}", gpus=4)[0]) == ["3", nvml.gpu_uuid(1)]


def test_beginning_of_uuid_becomes_the_whole(node: Node) -> None:
    assert node.ask("GPU-00000003", gpus=4)[0].gpus == (gpu(2, nvml.gpu_uuid(2)),)
    whole = nvml.mig_uuids(0, 2)[1]
    assert ids(node.ask("MIG-00010007", gpus=2, mig={0: 2, 1: 1})[0]) == [whole]


@pytest.mark.parametrize("visible", ["-1", "4", "nonsense", "NoDevFiles", "GPU-0000", "GPU-12345678", "MIG-00010001"])
def test_visible_names_nothing(node: Node, visible: str) -> None:
    found, _ = node.ask(visible, gpus=4)
    assert found.gpus == ()
    assert found.gpu_problem == f"CUDA_VISIBLE_DEVICES={visible!r}: {visible!r} names no device of this machine"


@pytest.mark.parametrize("visible", ["", " "])
def test_visible_empty(node: Node, visible: str) -> None:
    found, _ = node.ask(visible, gpus=2)
    assert (found.gpus, found.gpu_problem) == ((), "CUDA_VISIBLE_DEVICES is empty")


@pytest.mark.parametrize("visible", ["0,0", f"1,{nvml.gpu_uuid(1)}"])
def test_visible_twice(node: Node, visible: str) -> None:
    found, _ = node.ask(visible, gpus=2)
    assert found.gpus == ()
    assert "names a device twice" in (found.gpu_problem or "")


def test_visible_mig(node: Node) -> None:
    first, second = nvml.mig_uuids(0, 2)
    assert ids(node.ask(f"{second},{first}", gpus=1, mig={0: 2})[0]) == [second, first]
    assert ids(node.ask(second, gpus=1, mig={0: 2})[0]) == [second]


@pytest.mark.parametrize("visible", ["1", nvml.gpu_uuid(1)])
def test_visible_gpu_in_mig_mode(node: Node, visible: str) -> None:
    assert ids(node.ask(visible, gpus=2, mig={1: 3})[0]) == nvml.mig_uuids(1, 3)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (4, "Insufficient Permissions"),
        (9, "Driver Not Loaded"),
        (18, "NVML/RM version mismatch"),
        (999, "Unknown Error"),
        (77, "Stub Error 77"),
    ],
)
def test_driver_fails(node: Node, code: int, said: str) -> None:
    found, load = node.ask(gpus=2, fail=f"init:{code}")
    assert found.gpus == ()
    assert (found.gpu_problem or "").startswith("NVIDIA's driver cannot be used: ")
    assert said in (found.gpu_problem or "")
    assert found.cpus > 0
    assert load.gpu == ()


@pytest.mark.parametrize("call", ["handle", "name", "uuid", "memory", "mig"])
def test_one_gpu_fails(node: Node, call: str) -> None:
    found, _ = node.ask(gpus=2, fail=f"{call}@1:15")
    assert (found.gpus, found.gpu_problem) == ((), "NVML cannot read GPU 1: GPU is lost")
    assert ids(node.ask("0", gpus=2, fail=f"{call}@1:15")[0]) == ["0"]


def test_count_fails(node: Node) -> None:
    found, _ = node.ask(gpus=2, fail="count:999")
    assert (found.gpus, found.gpu_problem) == ((), "NVML cannot list the GPUs: Unknown Error")


def test_switched_off_by_dask_config(node: Node, library: Path) -> None:
    expected = "GPUs are switched off by the dask setting distributed.diagnostics.nvml: False"
    found, _ = node.ask(gpus=2, config={"distributed.diagnostics.nvml": False})
    assert (found.gpus, found.gpu_problem) == ((), expected)
    code = "from agentcluster.agent.hardware import detect; print(detect().gpu_problem)"
    env = clean() | nvml.environ(library=library) | {"DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False"}
    assert run(code, env).strip() == expected


def test_without_pynvml(node: Node) -> None:
    found, _ = node.ask(gpus=2, hide="pynvml")
    assert found.gpus == ()
    assert (found.gpu_problem or "").startswith("pynvml (package nvidia-ml-py) cannot be imported")


def test_metrics_of_a_gpu_that_fails_later(node: Node) -> None:
    found, load = node.ask(gpus=3, metrics_fail="utilization@0:15,memory@1:15,handle@2:15")
    assert len(found.gpus) == 3
    assert load.gpu == (0, 20, 0)
    assert load.gpu_memory_used == (2**20, 0, 0)


def test_affinity(node: Node) -> None:
    one = min(os.sched_getaffinity(0))
    assert node.ask(cpus=[one])[0].cpus == 1
    assert node.ask()[0].cpus == hardware.detect().cpus


def test_nvml_is_initialised_again_after_a_fork(library: Path) -> None:
    code = """
import os
from agentcluster.agent.hardware import detect, metrics
before = detect()
print(len(before.gpus), *metrics(before).gpu, flush=True)
if os.fork() == 0:
    print(*metrics(before).gpu, len(detect().gpus), flush=True)
    os._exit(0)
os.wait()
"""
    assert run(code, clean() | nvml.environ(library=library)).splitlines() == ["2 10 20", "10 20 2"]
