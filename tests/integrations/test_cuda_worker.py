"""dask-agent --mode auto-gpu beside the real ``dask cuda worker``: what runs, and every option of its command line.

Both see the stub of NVIDIA's library. The first half starts both as the processes that users start, and compares their
workers. The second half has both commands go as far as ``CUDAWorker``, which an option must reach as dask-cuda hands it
on whether or not this machine could serve it (an RMM pool needs a GPU), and compares what it got and what it made.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from distributed import Client, Scheduler
from distributed.security import Security

from tests.support import nvml
from tests.support.programs import AGENT, ROOT, SCHEDULER, Program, Start, programs
from tests.support.waiting import wait_blocking, wait_until

pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")

from dask_cuda.cli import worker as cuda_worker

pytestmark = pytest.mark.gpu_stub

OURS = (*AGENT, "--mode", "auto-gpu")
THEIRS = ("-m", "dask", "cuda", "worker")

#: dask-agent's own label, by which tasks ask for a GPU.
LABEL = {"GPU": 1.0}


# -- the workers -------------------------------------------------------------------------------------------------------


def looking() -> Any:
    """Return the function that says what a worker is, as the worker sees itself."""

    # defined in here, so that it is sent whole: the workers cannot import this module
    def look(dask_worker: Any) -> dict[str, Any]:
        import os
        from pathlib import Path

        import dask

        def settings(plugin: Any) -> dict[str, Any]:
            # dask's own plugins hold the worker and what it does
            return vars(plugin) if type(plugin).__module__.startswith("dask_cuda") else {}

        data, place, manager = dask_worker.data, Path(dask_worker.local_directory), dask_worker.memory_manager
        buffers = {key: getattr(data, key, None) for key in ("device_buffer", "host_buffer")}
        plugins = {type(each).__name__: each for each in dask_worker.plugins.values()}
        variables = {key: value for key, value in os.environ.items() if key != "__DASK_PARENT_PID"}
        return {
            "name": dask_worker.name,
            "class": type(dask_worker).__qualname__,
            "nthreads": dask_worker.state.nthreads,
            "affinity": sorted(os.sched_getaffinity(0)),
            "memory": manager.memory_limit,
            "fractions": [getattr(manager, f"memory_{key}_fraction") for key in ("target", "spill", "pause")],
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "environment": variables,
            "resources": dict(dask_worker.state.total_resources),
            "plugins": {name: settings(plugins[name]) for name in sorted(plugins)},
            "preloads": [[each.name, list(each.argv)] for each in dask_worker.preloads],
            "data": type(data).__name__,
            "buffers": {key: buffer and (buffer.n, buffer.fast.n) for key, buffer in buffers.items()},
            "services": sorted(dask_worker.service_ports),
            "protocol": dask_worker.address.partition("://")[0],
            "host": dask_worker.ip,
            "dashboard": dask_worker.http_server.prefix if hasattr(dask_worker.http_server, "prefix") else None,
            "space": str(place.parent),
            "place": place.name.partition("-")[0],
            "files": sorted(path.name for path in place.iterdir()),
            "lifetime": dask_worker.lifetime,
            "method": dask.config.get("distributed.worker.multiprocessing-method"),
        }

    return look


async def workers(
    start: Start, command: tuple[str, ...], options: list[str], count: int, env: dict[str, str]
) -> list[dict[str, Any]]:
    """Start a command with a scheduler of its own; return what its workers say of themselves, by their device."""
    async with scheduler() as (address, client):
        program = start(*command, address, *options, env=env)
        await wait_until(lambda: _there(client, count, program), 45)
        found = list((await client.run(looking())).values())
        return sorted(found, key=lambda each: str(each["visible"]))


async def _there(client: Client, count: int, program: Program) -> bool:
    assert program.popen.poll() is None, program.output()
    return len((await client.scheduler.identity(n_workers=-1))["workers"]) == count


@contextlib.asynccontextmanager
async def scheduler() -> AsyncIterator[tuple[str, Client]]:
    async with (
        Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0") as scheduler,
        Client(scheduler.address, asynchronous=True) as client,
    ):
        yield scheduler.address, client


def amounts(worker: dict[str, Any]) -> list[float]:
    """Take out the bytes that follow from the machine's memory, which may move a little between two commands."""
    buffers = [each or (0, 0) for each in worker.pop("buffers").values()]
    return [worker.pop("memory") or 0, *(size for sizes in buffers for size in sizes)]


SHAPES = {
    "2 GPUs": (2, []),
    "1 GPU": (1, []),
    "options": (
        2,
        [
            *("--nthreads", "2", "--memory-limit", "1GB", "--device-memory-limit", "2GB", "--resources", "A=1,B=2"),
            *("--local-directory", "here", "--interface", "lo", "--preload", "json", "--pre-import", "csv,json"),
            *("--enable-cudf-spill", "--cudf-spill-stats", "1", "--dashboard-prefix", "/far"),
        ],
    ),
    "no spilling": (1, ["--device-memory-limit", "0", "--memory-limit", "0", "--no-dashboard"]),
    "start method": (1, ["--multiprocessing-method", "forkserver"]),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_workers_are_those_of_dask_cuda_worker(start: Start, library: Path, shape: str) -> None:
    gpus, options = SHAPES[shape]
    env = nvml.environ(library=library, gpus=gpus)
    options = [*options, "--name", "blue"]
    theirs = await workers(start, THEIRS, options, gpus, env)
    ours = await workers(start, OURS, options, gpus, env)
    assert len(theirs) == len(ours) == gpus
    for their, our in zip(theirs, ours, strict=True):
        # dask-cuda's own workers lack it when they come from a forkserver, which was started before it is set
        assert our["environment"].pop("RAPIDS_NO_INITIALIZE") == "True"
        their["environment"].pop("RAPIDS_NO_INITIALIZE", None)
        assert amounts(our) == pytest.approx(amounts(their), rel=0.01)
        assert our == {**their, "resources": {**their["resources"], **LABEL}}


# -- the options -------------------------------------------------------------------------------------------------------

#: A value of each option that is no flag, number or choice.
VALUES = {
    "host": ["127.0.0.1"],
    "worker_port": ["9000", "9000:9001"],
    "name": ["blue"],
    "memory_limit": ["1GB", "0.25", "0", "auto"],
    "device_memory_limit": ["1GB", "0.25", "0", "auto", "default"],
    "rmm_allocator_external_lib_list": ["cupy", "torch,cupy"],
    "resources": ["A=1 B=2", "A=1,B=2"],
    "dashboard_address": ["127.0.0.1:0"],
    "local_directory": ["files"],
    "protocol": ["tcp"],
    "interface": ["lo"],
    "preload": ["json"],
    "worker_class": ["distributed.worker.Worker"],
    "pre_import": ["json", "json,csv"],
    "dashboard_prefix": ["/far"],
    "pid_file": ["its.pid"],
    "death_timeout": ["30", "1 minute"],
}
#: What has to be given with an option.
WITH = {
    "cudf_spill_stats": ["--enable-cudf-spill"],
    "rmm_release_threshold": ["--rmm-async"],
    "rmm_maximum_pool_size": ["--rmm-async"],
}
#: Options that are given in a way of their own, in tests of their own.
APART = ("scheduler_file", "listen_address", "contact_address", "tls_ca_file", "tls_cert", "tls_key")


def command_lines() -> Iterator[tuple[str, list[str], bool]]:
    """Yield each option of ``dask cuda worker`` with each value: name, words, whether it is not the default."""
    for parameter in cuda_worker.params:
        if not isinstance(parameter, click.Option) or parameter.name in APART:
            continue
        name, flag = str(parameter.name), parameter.opts[0]
        if parameter.is_flag:
            yield name, [flag], parameter.default is not True
            yield from ((name, [off], parameter.default is not False) for off in parameter.secondary_opts)
        elif name in VALUES or isinstance(parameter.type, click.Choice):
            values = VALUES.get(name) or parameter.type.choices
            yield from ((name, [flag, value], value != parameter.default) for value in values)
        else:  # a number, or an amount; those that dask-cuda will have one day, too
            yield name, [flag, "2"], True


LINES = list(command_lines())


class Recorder:
    """Runs both commands as far as ``CUDAWorker``."""

    def __init__(self, process: subprocess.Popen[str], address: str, file: Path) -> None:
        self.process, self.address, self.file = process, address, file

    @functools.cached_property
    def without(self) -> dict[str, Any]:
        """What ``dask cuda worker`` hands on without any option."""
        return self.theirs()

    def theirs(self, *options: str, address: bool = True) -> dict[str, Any]:
        """Return what ``dask cuda worker`` hands on."""
        return self._run("dask cuda worker", *([self.address] if address else []), *options)

    def ours(self, *options: str, mode: str = "auto-gpu", address: bool = True) -> dict[str, Any]:
        """Return what dask-agent hands on."""
        return self._run("dask-agent", *([self.address] if address else []), "--mode", mode, *options)

    def _run(self, *arguments: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def recorder(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    directory = tmp_path_factory.mktemp("recorder")
    file = directory / "scheduler.json"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_"))}
    env |= nvml.environ(library=library, gpus=1) | {"PYTHONPATH": str(ROOT)}
    with programs(directory) as start, (directory / "recorder.log").open("w") as log:
        start(*SCHEDULER, "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.cuda_recorder"],
            env=env,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        wait_blocking(lambda: file.exists() and file.read_text().endswith("}"), 30)
        with process:
            yield Recorder(process, json.loads(file.read_text())["address"], file)
            assert process.stdin is not None
            process.stdin.close()


#: What only tells two nannies apart, or when they were made.
PASSING = ("id", "_last_tick", "_last_tick_cycle", "_updated_sys_path")
#: What an agent says or does in its own way; the nannies show what comes of it.
OWN_WAY = (
    *("scheduler", "scheduler_file", "name", "memory_limit", "resources", "security", "pid_file", "worker_class"),
    *("host", "worker_port", "listen_address", "contact_address"),
)
#: Keywords that dask-cuda's command gives as None or nothing at all.
EMPTY = ("preload_argv", "protocol", "death_timeout")


def arguments(seen: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in seen["arguments"].items() if k not in OWN_WAY and not (k in EMPTY and not v)}


def nannies(seen: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return what the nannies hold, without what a node does in its own way: their names and the label."""
    if "nannies" not in seen:
        return None
    found = []
    for nanny in seen["nannies"]:
        nanny = {key: value for key, value in nanny.items() if key not in (*PASSING, "name")}
        nanny["resources"] = {k: v for k, v in (nanny["resources"] or {}).items() if k not in LABEL}
        # the agent's workers are forked from its own server, and find configured what the user configured
        nanny["config"]["distributed"]["worker"].pop("multiprocessing-method")
        found.append(nanny)
    return found


def compare(theirs: dict[str, Any], ours: dict[str, Any], *but: str) -> None:
    """Fail where what dask-agent hands on is not what ``dask cuda worker`` does, but for some keys."""
    assert "arguments" in theirs, theirs
    assert "arguments" in ours, ours
    for key in but:
        for seen in (theirs, ours):
            seen["arguments"].pop(key, None)
            for nanny in seen.get("nannies", ()):
                nanny.pop(key, None)
                nanny.get("worker_kwargs", {}).pop(key, None)
    assert arguments(ours) == arguments(theirs)
    assert ours.get("error") == theirs.get("error")
    assert nannies(ours) == nannies(theirs)


@pytest.mark.parametrize(("name", "line", "other"), [pytest.param(*each, id=" ".join(each[1])) for each in LINES])
def test_an_option_arrives_as_dask_cuda_worker_hands_it_on(
    recorder: Recorder, name: str, line: list[str], other: bool
) -> None:
    line = [*WITH.get(name, ()), *line]
    theirs, without = recorder.theirs(*line), recorder.without
    if name in without["arguments"]:
        assert (theirs["arguments"][name] != without["arguments"][name]) is other
    ours = recorder.ours(*line)
    assert ours.get("pid files") == theirs["pid files"]
    # the agent itself is what has to reach the scheduler by then; its workers have agentcluster.start-timeout
    compare(theirs, ours, *(["death_timeout"] if name == "death_timeout" else []))


def test_a_file_of_the_scheduler(recorder: Recorder) -> None:
    line = ["--scheduler-file", str(recorder.file)]
    compare(recorder.theirs(*line, address=False), recorder.ours(*line, address=False))


def test_arguments_of_a_preload(recorder: Recorder, tmp_path: Path) -> None:
    preload = tmp_path / "mine.py"
    preload.write_text(
        "import click\n@click.command()\n@click.option('--word')\ndef dask_setup(worker, word):\n    pass\n"
    )
    line = ["--preload", str(preload), "--word", "hello"]
    theirs = recorder.theirs(*line)
    assert theirs["arguments"]["preload_argv"] == ["--word", "hello"]
    compare(theirs, recorder.ours(*line))


def test_credentials(recorder: Recorder, start: Start, tmp_path: Path) -> None:
    temporary = Security.temporary()
    files = {}
    for flag, field in (("ca-file", "tls_ca_file"), ("cert", "tls_scheduler_cert"), ("key", "tls_scheduler_key")):
        file = tmp_path / f"{flag}.pem"
        file.write_text(getattr(temporary, field))
        files[f"--tls-{flag}"] = str(file)
    line = [word for pair in files.items() for word in pair]
    known = tmp_path / "scheduler.json"
    place = ["--host", "127.0.0.1", "--port", "0", "--protocol", "tls", "--no-dashboard"]
    start(*SCHEDULER, *place, "--scheduler-file", str(known), *line)
    wait_blocking(lambda: known.exists() and known.read_text().endswith("}"), 30)
    line += ["--scheduler-file", str(known)]
    theirs = recorder.theirs(*line, address=False)
    assert theirs["nannies"][0]["security"]["tls_worker_key"] == files["--tls-key"]
    ours = recorder.ours(*line, address=False)
    assert (theirs["arguments"]["dashboard_address"], ours["arguments"]["dashboard_address"]) == (":0", "127.0.0.1:0")
    compare(theirs, ours, "dashboard_address")


@pytest.mark.parametrize("contact", [[], ["--contact-address=tcp://127.0.0.2:9000"]], ids=["listen", "contact"])
def test_where_one_worker_listens(recorder: Recorder, contact: list[str]) -> None:
    line = ["--listen-address=tcp://127.0.0.1:9000", *contact]
    compare(recorder.theirs(*line), recorder.ours(*line))


def test_where_one_worker_listens_in_the_config(recorder: Recorder) -> None:
    places = {"listen_address": "tcp://127.0.0.1:9000", "contact_address": "tcp://127.0.0.2:9000"}
    theirs = recorder.theirs(*(f"--{key.replace('_', '-')}={value}" for key, value in places.items()))
    compare(theirs, recorder.ours("--config", json.dumps(places)))


def test_every_option_of_dask_cuda_worker_is_here() -> None:
    tested = {name for name, _, _ in LINES} | set(APART)
    assert tested == {parameter.name for parameter in cuda_worker.params if isinstance(parameter, click.Option)}


def test_an_option_goes_before_the_config(recorder: Recorder) -> None:
    config = json.dumps({"device_memory_limit": "3GB", "pre_import": "json"})
    seen = recorder.ours("--config", config, "--device-memory-limit", "2GB")
    assert seen["arguments"]["device_memory_limit"] == "2GB"
    assert seen["arguments"]["pre_import"] == "json"
