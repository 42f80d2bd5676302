"""dask-mpi with agents in place of its workers: real ranks of a real mpirun."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from distributed import Client

from tests.support.managed import Work, names, reprovision, there, workers
from tests.support.programs import Program, Start, gone
from tests.support.waiting import wait_until

MPIRUN = shutil.which("mpirun")

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun (Debian's openmpi-bin)"),
]
pytest.importorskip("dask_mpi", reason="dask-mpi is not installed")

#: Open MPI as root, with more ranks than cores, over shared memory and loopback only.
OPENMPI = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
ENVIRON = {
    "OMPI_MCA_btl": "self,vader",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_oob_tcp_if_include": "lo",
    "OMPI_MCA_plm": "isolated",
    # a rank that waits for others does not take a core
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "TMPDIR": "/tmp",
}


def mpirun(start: Start, *arguments: str) -> Program:
    """Start three ranks of Python."""
    assert MPIRUN is not None
    line = [MPIRUN, *OPENMPI, "-n", "3", sys.executable, *arguments]
    # programs are Python; this one becomes mpirun, which then has the pid that gets the signals
    become = f"import os, sys; os.execv({MPIRUN!r}, sys.argv[1:])"
    return start("-c", become, *line, env=ENVIRON)


async def test_the_command(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    program = mpirun(
        start,
        *("-m", "dask_mpi.cli", "--scheduler-file", str(file), "--interface", "lo", "--no-dashboard"),
        *("--nthreads", "1", "--memory-limit", "300MiB", "--name", "rank"),
        *("--worker-class", "agentcluster.Agent"),
    )

    def address() -> str | None:
        assert program.popen.poll() is None, program.output()
        try:
            return str(json.loads(file.read_text())["address"])
        except (OSError, ValueError):
            return None

    async with Client(await wait_until(address, 30), asynchronous=True) as client:
        await there(client, "rank-1", "rank-2")
        for worker in (await workers(client)).values():
            assert (worker["nthreads"], worker["memory_limit"]) == (1, 300 * 2**20)
        work = Work(client, tmp_path / "work")
        await work.begin()
        await reprovision(client, 2)
        assert len(await names(client)) == 4
        assert await names(client) >= {"rank-1", "rank-2"}
        await work.all_there()

        tree = program.children()
        await client.retire_workers(names=["rank-2"])
        await wait_until(lambda: _only(client, "rank-1"), 20)
        await work.all_there()
        assert program.popen.poll() is None
        await client.shutdown()
    assert await program.ended(30) == 0
    await gone(tree)


async def _only(client: Client, name: str) -> bool:
    found = await names(client)
    return len(found) == 2 and name in found and "rank-2" not in found


SCRIPT = """
from dask_mpi import initialize


def main():
    initialize(
        interface="lo",
        dashboard=False,
        nthreads=1,
        memory_limit="300MiB",
        worker_class="agentcluster.Agent",
    )
    from distributed import Client

    with Client() as client:
        client.wait_for_workers(1, timeout=30)
        kept = client.scatter([f"value {n}" for n in range(20)], hash=False)
        before = {worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()}
        client.sync(client.scheduler.reprovision_nodes, mode="auto-cpu", config={"nworkers": 2})
        after = {worker["name"] for worker in client.sync(client.scheduler.identity, n_workers=-1)["workers"].values()}
        assert client.gather(kept) == [f"value {n}" for n in range(20)]
        print("names", sorted(before), len(after), before <= after, flush=True)


if __name__ == "__main__":  # the workers' processes import this file
    main()
"""


async def test_initialize_in_a_script(start: Start, tmp_path: Path) -> None:
    """Rank 0 is the scheduler, rank 1 runs the script, rank 2 is an agent; all end with the script."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    program = mpirun(start, str(script))
    assert await program.ended(55) == 0, program.output()
    assert "names [2] 2 True" in program.output()
