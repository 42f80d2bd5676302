"""Swaps between CPU and GPU workers on a node: the real dask-cuda over the stub of NVIDIA's library."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from dask.system import CPU_COUNT
from distributed import Client

from agentcluster import AgentCluster, Mode
from agentcluster.errors import PreflightError, SwapError
from tests.support import nvml
from tests.support.waiting import wait_until

pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")

pytestmark = pytest.mark.gpu_stub

TWO_CPU = {"nworkers": 2, "nthreads": 1}


class Node:
    """A cluster of one local agent that sees stub GPUs, and a client of it."""

    def __init__(self, cluster: AgentCluster, client: Client) -> None:
        self.cluster, self.client = cluster, client

    @property
    def hardware(self) -> Any:
        return self.cluster.nodes["local"]["hardware"]

    @property
    def names(self) -> list[str]:
        return sorted(str(ws.name) for ws in self.cluster.scheduler.workers.values())

    async def look(self) -> dict[str, dict[str, Any]]:
        """Return worker name -> what it is, as the worker itself sees it."""

        def look(dask_worker: Any) -> dict[str, Any]:
            import os

            data = dask_worker.data
            return {
                "name": dask_worker.name,
                "pid": os.getpid(),
                "parent": os.getppid(),
                "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "data": type(data).__name__,
                "device_memory": data.device_buffer.n if hasattr(data, "device_buffer") else None,
                "memory": dask_worker.memory_manager.memory_limit,
                "nthreads": dask_worker.state.nthreads,
                "resources": dict(dask_worker.state.total_resources),
            }

        found = await self.client.run(look)
        return {each["name"]: each for each in sorted(found.values(), key=lambda each: str(each["name"]))}

    async def pids(self) -> dict[str, int]:
        return {name: each["pid"] for name, each in (await self.look()).items()}


Open = Callable[..., contextlib.AbstractAsyncContextManager[Node]]


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Open:
    library = nvml.build(tmp_path_factory.getbasetemp() / "nvml")

    @contextlib.asynccontextmanager
    async def open_node(mode: str = "auto-cpu", config: Any = None, **stub: Any) -> AsyncIterator[Node]:
        # Local agents inherit it, and the loader reads it when they start; this process saw no GPU before.
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for key, value in nvml.environ(library=library, **stub).items():
            monkeypatch.setenv(key, value)
        config = TWO_CPU if mode == "auto-cpu" and config is None else config
        async with (
            AgentCluster(
                mode=mode, config=config, asynchronous=True, scheduler_options={"dashboard_address": ":0"}
            ) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            yield Node(cluster, client)

    return open_node


def rotated(ids: list[str]) -> list[str]:
    return [",".join(ids[i:] + ids[:i]) for i in range(len(ids))]


@pytest.mark.parametrize("gpus", [1, 2, 8])
async def test_there_and_back_with_data_in_memory(node: Open, gpus: int) -> None:
    async with node(gpus=gpus) as one:
        before = await one.pids()
        kept = await one.client.scatter(list(range(20)), hash=False)

        report = await one.cluster.reprovision("auto-gpu")
        assert len(report.nodes["local"].new) == gpus
        assert one.names == sorted(report.nodes["local"].new)
        assert not set(one.names) & set(before)
        found = await one.look()
        visible = {each["visible"] for each in found.values()}
        assert visible == set(rotated([str(i) for i in range(gpus)]))
        for each in found.values():
            assert each["resources"] == {"GPU": 1.0}
            assert each["data"] == "DeviceHostFile"
            assert each["device_memory"] == int(0.8 * nvml.MEMORY)
            assert each["memory"] == one.hardware["memory"] // gpus
            assert each["nthreads"] == 1
        assert len({each["parent"] for each in found.values()}) == 1  # all forked from the one warm server
        assert await one.client.gather(kept) == list(range(20))
        assert await one.client.submit(sum, kept, resources={"GPU": 1}) == 190

        await one.cluster.reprovision("auto-cpu", TWO_CPU)
        assert [each["resources"] for each in (await one.look()).values()] == [{"CPU": 1.0}] * 2
        assert not set(one.names) & (set(before) | set(found))
        assert await one.client.gather(kept) == list(range(20))


async def test_mig_devices(node: Open) -> None:
    async with node(gpus=2, mig={0: 2, 1: 3}) as one:
        uuids = nvml.mig_uuids(0, 2) + nvml.mig_uuids(1, 3)
        memory = {gpu["visible_id"]: gpu["memory"] for gpu in one.hardware["gpus"]}
        assert list(memory) == uuids
        assert len(set(memory.values())) == 2
        await one.cluster.reprovision("auto-gpu")
        found = await one.look()
        assert {each["visible"] for each in found.values()} == set(rotated(uuids))
        for each in found.values():
            assert each["device_memory"] == int(0.8 * memory[each["visible"].split(",")[0]])


async def test_a_limit_set_by_hand_for_mig_devices(node: Open) -> None:
    async with node("auto-gpu", {"device_memory_limit": "1GiB"}, gpus=1, mig={0: 2}) as one:
        assert [each["device_memory"] for each in (await one.look()).values()] == [2**30] * 2


async def test_each_worker_asks_for_its_own_device(node: Open) -> None:
    """Shown all devices at once, dask-cuda would ask for those of device ``2 * i`` for the `i`-th worker."""
    async with node("auto-gpu", gpus=3, fail="memory@1:3") as one:
        found = {each["visible"]: each["data"] for each in (await one.look()).values()}
    assert found.pop("1,2,0") != "DeviceHostFile"
    assert found == {"0,1,2": "DeviceHostFile", "2,0,1": "DeviceHostFile"}


async def test_each_gpu_worker_stops_and_starts_alone(node: Open) -> None:
    async with node("auto-gpu", gpus=2) as one:
        before = await one.look()
        kept = await one.client.scatter(list(range(20)), hash=False)
        await one.cluster.scale(1)
        await wait_until(lambda: len(one.names) == 1)
        [stayer] = one.names
        assert (await one.look())[stayer] == before[stayer]
        assert await one.client.gather(kept) == list(range(20))

        await one.cluster.scale(2)
        await wait_until(lambda: len(one.names) == 2)
        after = await one.look()
        assert after[stayer] == before[stayer]
        [comer] = set(after) - {stayer}
        assert comer not in before
        assert {each["visible"] for each in after.values()} == {"0,1", "1,0"}
        assert await one.client.gather(kept) == list(range(20))


async def test_a_chosen_device_stays_as_it_is(node: Open) -> None:
    async with node("auto-gpu", {"devices": [3, 1]}, gpus=4) as one:
        before = await one.look()
        assert {each["visible"] for each in before.values()} == {"3,1", "1,3"}
        assert {each["device_memory"] for each in before.values()} == {int(0.8 * nvml.MEMORY)}
        report = await one.cluster.reprovision("auto-gpu", {"devices": "3,1"})
        assert sorted(report.nodes["local"].kept) == sorted(before)
        assert await one.look() == before


async def test_client_restart_is_no_crash(node: Open) -> None:
    async with node("auto-gpu", gpus=2) as one:
        before = await one.look()
        for _ in range(2):
            await one.client.restart(timeout=30)
        after = await one.look()
        assert {name: {**each, "pid": 0} for name, each in after.items()} == {
            name: {**each, "pid": 0} for name, each in before.items()
        }
        assert {each["pid"] for each in after.values()}.isdisjoint(each["pid"] for each in before.values())
        assert [each["restarts"] for each in one.cluster.nodes["local"]["workers"].values()] == [0, 0]


async def test_a_gpu_worker_that_is_cut_off_comes_back_on_its_device(node: Open) -> None:
    async with node("auto-gpu", gpus=2) as one:
        before = await one.look()
        name = one.names[1]
        [address] = [ws.address for ws in one.cluster.scheduler.workers.values() if ws.name == name]
        one.cluster.scheduler.stream_comms[address].abort()
        await wait_until(lambda: address not in one.cluster.scheduler.workers and len(one.names) == 2, 20)
        after = await one.look()
        assert {**after[name], "pid": 0} == {**before[name], "pid": 0}
        assert after[name]["pid"] != before[name]["pid"]
        assert after[one.names[0]] == before[one.names[0]]


async def test_a_killed_gpu_worker_comes_back_on_its_device(node: Open) -> None:
    async with node("auto-gpu", gpus=2) as one:
        before = await one.look()
        name = one.names[1]
        os.kill(before[name]["pid"], signal.SIGKILL)

        async def back() -> bool:
            if len(one.names) < 2:
                return False
            with contextlib.suppress(OSError):
                pids = await one.pids()
                return pids.get(name) not in (None, before[name]["pid"])
            return False

        await wait_until(back)
        after = await one.look()
        assert {**after[name], "pid": 0} == {**before[name], "pid": 0}
        other = one.names[0]
        assert after[other] == before[other]


@pytest.mark.skipif(CPU_COUNT < 2, reason="needs a core beside the GPU's")
async def test_mixed(node: Open) -> None:
    async with node(gpus=1) as one:
        kept = await one.client.scatter(list(range(20)), hash=False)
        await one.cluster.reprovision("mixed")
        found = list((await one.look()).values())
        gpu = [each for each in found if "GPU" in each["resources"]]
        cpu = [each for each in found if "CPU" in each["resources"]]
        assert len(gpu) == 1
        assert len(cpu) == len(found) - 1 > 0
        assert (gpu[0]["visible"], gpu[0]["data"]) == ("0", "DeviceHostFile")
        assert {each["visible"] for each in cpu} == {None}
        assert sum(each["nthreads"] for each in found) == one.hardware["cpus"]
        assert sum(each["memory"] for each in found) <= one.hardware["memory"]
        assert await one.client.gather(kept) == list(range(20))


@pytest.mark.skipif(CPU_COUNT < 2, reason="needs a core beside the GPU's")
async def test_gpu_workers_by_number(node: Open) -> None:
    """The node changes to a mode that has both kinds, and back to what it can do without GPU workers."""
    async with node(gpus=1) as one:
        kept = await one.client.scatter(list(range(20)), hash=False)
        await one.cluster.scale(gpu=1)
        found = await one.look()
        assert one.cluster.nodes["local"]["mode"] == "mixed"
        assert sorted(tuple(each["resources"]) for each in found.values()) == [("CPU",), ("CPU",), ("GPU",)]
        cpu = {name: each["pid"] for name, each in found.items() if "CPU" in each["resources"]}
        with pytest.warns(UserWarning, match=r"scale\(gpu=3\): the nodes have room for 1 gpu"):
            await one.cluster.scale(gpu=3)
        await one.cluster.scale(gpu=0)
        assert await one.pids() == cpu
        assert await one.client.gather(kept) == list(range(20))


@pytest.mark.parametrize(("gpus", "resources"), [(1, {"GPU": 1.0}), (0, {"CPU": 1.0})])
async def test_auto(node: Open, gpus: int, resources: dict[str, float]) -> None:
    async with node("auto", {"cpu": TWO_CPU}, gpus=gpus) as one:
        assert {tuple(each["resources"].items()) for each in (await one.look()).values()} == {tuple(resources.items())}
        assert len(one.names) == (gpus or 2)


@pytest.mark.parametrize(
    ("stub", "said"),
    [({"gpus": 0}, "NVML sees no GPU"), ({"gpus": 1, "fail": "init:9"}, "driver"), ({"gpus": 1, "mig": {0: 0}}, "MIG")],
    ids=["none", "driver", "mig"],
)
@pytest.mark.parametrize("mode", ["auto-gpu", "mixed"])
async def test_without_gpus_the_cpu_workers_stay(node: Open, stub: dict[str, Any], said: str, mode: str) -> None:
    async with node(**stub) as one:
        before = await one.pids()
        with pytest.raises(PreflightError, match="no GPU was found there") as caught:
            await one.cluster.reprovision(mode)
        assert said in caught.value.refusals["local"]
        with pytest.raises(PreflightError, match="no GPU was found there"):
            await one.client.scheduler.reprovision_nodes(mode=mode)
        assert await one.pids() == before
        assert one.cluster.nodes["local"]["mode"] == "auto-cpu"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"worker_port": 9000}, "worker_port=9000 has 1 ports for 2 GPUs; give a range, such as '9000:9001'"),
        ({"rmm_pool_size": "1GB"}, "rmm"),
        ({"preload": ["no_such_module_at_all"]}, "no_such_module_at_all"),
    ],
    ids=["ports", "rmm", "preload"],
)
async def test_gpu_workers_that_do_not_start(node: Open, config: dict[str, Any], said: str) -> None:
    async with node(gpus=2) as one:
        before = await one.pids()
        with pytest.raises(SwapError, match=said):
            await one.cluster.reprovision("auto-gpu", config)
        assert await one.pids() == before
        await one.cluster.reprovision("auto-gpu")
        assert len(one.names) == 2


async def test_warnings_of_dask_cuda_reach_the_user(node: Open) -> None:
    """They point at the user's line: of the constructor, and of a change; once for all workers of a node."""
    spill, old = {"enable_cudf_spill": True}, {"rmm_pool_size": "1GB", "rmm_async": True}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        async with node("auto-gpu", spill, gpus=2) as one:
            await one.cluster.reprovision("none")
            of_start = [each for each in seen if "cuDF" in str(each.message)]
            with pytest.raises(SwapError, match="module 'rmm' is not available") as caught:
                await one.cluster.reprovision("auto-gpu", {**spill, **old})
            assert isinstance(caught.value.__cause__, ValueError)
            await one.cluster.reprovision("auto-gpu", spill)
    both = [each for each in seen if "cuDF" in str(each.message)]
    assert (len(of_start), len(both)) == (1, 2)
    assert all(str(each.message).startswith("local: cuDF spilling is enabled, please ensure") for each in both)
    (future,) = [each for each in seen if each.category is FutureWarning]
    assert "'rmm_pool_size' is not needed when 'rmm_async' is enabled" in str(future.message)
    assert {Path(each.filename).name for each in [*both, future]} == {Path(__file__).name}


def test_local_cuda_cluster_warns_of_the_same_option(library: Path) -> None:
    """Its constructor does, and goes no further here: the module rmm needs a GPU."""
    script = "from dask_cuda import LocalCUDACluster as C; C(n_workers=1, rmm_pool_size='1GB', rmm_async=True)"
    env = os.environ | nvml.environ(library=library, gpus=1)
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert "FutureWarning: 'rmm_pool_size' is not needed when 'rmm_async' is enabled" in run.stderr


async def test_dask_cudas_class_in_a_spec_is_refused(node: Open) -> None:
    async with node(gpus=2) as one:
        before = await one.pids()
        with pytest.raises(PreflightError, match="use mode 'auto-gpu'"):
            await one.cluster.reprovision("spec", {"spec": {"cls": "dask_cuda.CUDAWorker"}})
        assert await one.pids() == before


async def test_adapt_to_tasks_that_need_a_gpu(node: Open) -> None:
    """Sixty tasks that need a GPU bring GPU workers up, no others, and those go back when they are done."""

    def train(number: int) -> str:
        import os

        return f"{number} on {os.environ['CUDA_VISIBLE_DEVICES'].partition(',')[0]}"

    async with node(gpus=2) as one:
        kept = await one.client.scatter(list(range(20)), hash=False)
        one.cluster.adapt(minimum=1, modes=[Mode("auto-cpu", TWO_CPU), "auto-gpu"], interval="50ms", wait_count=3)
        prepared = await one.client.gather(one.client.map(float, range(20)))
        trained = await one.client.gather(one.client.map(train, range(60), resources={"GPU": 1}))
        assert [each.partition(" on ")[0] for each in trained] == [str(number) for number in range(60)]
        await wait_until(lambda: any("auto-cpu" in each.decided for each in one.cluster.adaptive_log()[1:]))
        assert one.cluster.nodes["local"]["mode"] == "auto-cpu"
        assert prepared == [float(number) for number in range(20)]
        assert await one.client.gather(kept) == list(range(20))
        changes = [decision.decided for decision in one.cluster.adaptive_log() if "auto-gpu" in decision.decided]
        assert len(changes) == 1, one.cluster.adaptive_log()
