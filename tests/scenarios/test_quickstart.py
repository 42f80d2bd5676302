"""The quickstart as people type it: ``dask scheduler``, ``dask-agent``, and a plain client that reprovisions."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest
from distributed import Client

from agentcluster.errors import PreflightError
from tests.support import nvml
from tests.support.programs import AGENT, Program, Start
from tests.support.waiting import wait_until

SMALL = ("--nworkers", "1", "--nthreads", "1", "--memory-limit", "512MiB", "--name", "box")
NANNY = {"spec": {"cls": "dask.distributed.Nanny", "opts": {}}}


async def pids(client: Client) -> dict[str, int]:
    """Return worker name -> its process."""

    def look(dask_worker: Any) -> tuple[str, int]:
        return str(dask_worker.name), os.getpid()

    return dict((await client.run(look)).values())


async def joined(client: Client, agent: Program) -> dict[str, int]:
    """Wait until the agent's first workers run."""

    async def ready() -> bool:
        assert agent.popen.poll() is None, agent.output()
        nodes = await client.scheduler.get_nodes() or {}
        return "box" in nodes and nodes["box"]["state"] == "ready"

    await wait_until(ready, 30)
    return await pids(client)


async def test_no_gpu_is_one_error_and_the_workers_stay(client: Client, address: str, start: Start) -> None:
    agent = start(*AGENT, address, *SMALL, env={"CUDA_VISIBLE_DEVICES": ""})
    before = await joined(client, agent)
    assert list(before) == ["box"]
    kept = await client.scatter(list(range(10)), hash=False)
    with pytest.raises(PreflightError, match=r"cannot reprovision to 'auto-gpu', nothing was changed: box: .*GPU"):
        await client.scheduler.reprovision_nodes(mode="auto-gpu")
    assert await pids(client) == before
    assert await client.gather(kept) == list(range(10))
    assert await client.submit(sum, [1, 2]) == 3
    (node,) = (await client.scheduler.get_nodes()).values()
    assert (node["mode"], node["state"], list(node["plan"])) == ("auto-cpu", "ready", ["box"])
    assert "Traceback" not in agent.output()


async def test_spec(client: Client, address: str, start: Start) -> None:
    agent = start(*AGENT, address, *SMALL)
    before = await joined(client, agent)
    kept = await client.scatter(list(range(10)), hash=False)
    report = await client.scheduler.reprovision_nodes(mode="spec", config=NANNY)
    after = await pids(client)
    assert list(after) == ["box"]
    assert not any(map(psutil.pid_exists, before.values()))
    assert list(report["nodes"]["box"]["old"]) == ["box"]
    assert await client.gather(kept) == list(range(10))
    assert await client.submit(sum, [1, 2]) == 3
    assert (await client.scheduler.get_provision_mode())["mode"] == "spec"


async def test_a_late_agent_keeps_the_mode_that_it_was_given(client: Client, address: str, start: Start) -> None:
    await joined(client, start(*AGENT, address, *SMALL))
    one = {"nthreads": 1, "nworkers": 1, "memory_limit": "600MiB"}
    await client.scheduler.reprovision_nodes(mode="uniform", config=one)
    late = start(*AGENT, address, "--mode", "none", "--name", "late")

    async def there() -> Any:
        assert late.popen.poll() is None, late.output()
        node = (await client.scheduler.get_nodes()).get("late")
        return node and node["state"] == "standby"

    await wait_until(there, 30)
    found = await client.scheduler.get_nodes()
    assert {name: node["mode"] for name, node in found.items()} == {"box": "uniform", "late": "none"}
    assert list(await pids(client)) == ["box"]
    await client.scheduler.reprovision_nodes(mode="uniform", config=one)
    assert sorted(await pids(client)) == ["box", "late"]


async def test_a_late_agent_that_was_given_no_mode_gets_that_of_the_others(
    client: Client, address: str, start: Start
) -> None:
    await joined(client, start(*AGENT, address, *SMALL))
    one = {"nthreads": 1, "memory_limit": "300MiB"}
    await client.scheduler.reprovision_nodes(mode="uniform", config=one)
    late = start(*AGENT, address, "--name", "late")

    async def there() -> Any:
        assert late.popen.poll() is None, late.output()
        node = (await client.scheduler.get_nodes()).get("late")
        return node if node and node["state"] == "ready" else None

    node = await wait_until(there, 30)
    assert (node["mode"], node["config"]) == ("uniform", one)
    assert {worker["nthreads"] for worker in node["plan"].values()} == {1}
    assert len(node["plan"]) == node["hardware"]["cpus"]


@pytest.mark.gpu_stub
async def test_gpu_workers_replace_cpu_workers_and_back(
    client: Client, address: str, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
    library = nvml.build(tmp_path_factory.getbasetemp() / "nvml")
    agent = start(*AGENT, address, *SMALL, env=nvml.environ(library=library, gpus=2))
    before = await joined(client, agent)
    kept = await client.scatter(list(range(50)), hash=False)

    await client.scheduler.reprovision_nodes(mode="auto-gpu")

    def device(dask_worker: Any) -> tuple[str, str, float]:
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        return str(dask_worker.name), visible, dask_worker.state.total_resources["GPU"]

    gpus = (await client.run(device)).values()
    assert sorted(name for name, _, _ in gpus) == ["box", "box-1"]
    firsts = {visible.split(",")[0] for _, visible, _ in gpus}
    assert len(firsts) == 2, gpus
    assert {amount for _, _, amount in gpus} == {1}
    assert not any(map(psutil.pid_exists, before.values()))
    assert await client.gather(kept) == list(range(50))
    assert await client.submit(sum, [1, 2], resources={"GPU": 1}) == 3

    await client.scheduler.reprovision_nodes(mode="auto-cpu", config={"nworkers": 1, "nthreads": 1})
    assert list(await pids(client)) == ["box"]
    assert await client.gather(kept) == list(range(50))
