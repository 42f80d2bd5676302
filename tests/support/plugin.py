"""Hooks and fixtures of all tests: dask's settings, the census of leftovers, seeds, servers, clusters and clients."""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import distributed
import hypothesis.core
import pytest
import pytest_asyncio
from distributed import Client, Scheduler
from hypothesis import HealthCheck, settings

from agentcluster import AgentCluster
from tests.support import nvml, ssh_servers
from tests.support.census import KEPT, Census, kill_since
from tests.support.forked import ForkedHosts, ForkedLauncher
from tests.support.giving_up import GivingUp
from tests.support.programs import CALM, ROOT, Start, programs, start_scheduler
from tests.support.ssh_servers import SSHServer
from tests.support.waiting import INTERVAL
from tests.support.zygote import Zygote

# How long one example takes says what else the machine does; a test has its deadline as a whole.
PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=25, **PATIENT)
settings.register_profile("thorough", max_examples=100, **PATIENT)
settings.load_profile("thorough" if os.environ.get("CI") else "quick")

#: Seconds that leftovers of a test have to go.
SETTLE = 5.0

#: A scheduler in this process, which listens on loopback and draws nothing.
SCHEDULER: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that repeats a random test."""
    given = os.environ.get("AGENTCLUSTER_TEST_SEED")
    parser.addoption(
        "--seed",
        type=int,
        default=None if given is None else int(given),
        help="seed of all random tests, as a failure prints it (default: AGENTCLUSTER_TEST_SEED, or a new one each)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Give the seed to hypothesis too."""
    seed = config.getoption("seed")
    if seed is not None:
        hypothesis.core.global_force_seed = seed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs programs of the machine, or minutes under another tool, unless it is asked for."""
    for mark in ("sshd", "slurm", "deploy", "browser", "notebook", "namespaces", "types"):
        for item in items if mark not in config.option.markexpr else ():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"run by: pytest -m {mark}"))


def pytest_collection_finish() -> None:
    """Exclude all that was imported from the collections after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder of states of the tests, where the secret of agents in standby is; processes inherit it."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("states"))


@pytest.fixture(autouse=True)
def dask_settings() -> Iterator[None]:
    """Short connect timeouts, few measurements, and dask's configuration as it was before the test."""
    before = copy.deepcopy(dask.config.config)
    dask.config.set({"distributed.comm.timeouts.connect": "10s", **CALM})
    yield
    dask.config.config.clear()
    dask.config.config.update(before)


@pytest.fixture(autouse=True)
def leaks() -> Iterator[None]:
    """Fail a test that leaves something behind; ``tests/unit``, which starts nothing, has another fixture here."""
    before = Census.take()
    yield
    gc.collect()
    deadline = time.monotonic() + SETTLE
    while (left := Census.take().since(before)) and time.monotonic() < deadline:
        gc.collect()  # what ended meanwhile may hold a socket in a circle
        time.sleep(INTERVAL)
    if left:
        kill_since(before)
        each = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in left.items())
        pytest.fail(f"left behind {SETTLE:g} s after the test: {each}", pytrace=False)


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of one test; a failure shows the seed, and ``pytest --seed N`` or the variable repeats them."""
    given = request.config.getoption("seed")
    seed = random.randrange(2**32) if given is None else given
    print(f"seed {seed}: repeat this test with --seed {seed}")
    return random.Random(seed)


@pytest.fixture
def slow() -> Callable[[int], int]:
    """A task of 0.1 s; what is defined in here needs no test module where it runs."""

    def slow(number: int) -> int:
        time.sleep(0.1)
        return number

    return slow


@pytest.fixture
def by_value(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Send functions of the test's module, which workers cannot import, as code; the wrapper is one that dask takes."""
    module = sys.modules[request.module.__name__]
    cloudpickle.register_pickle_by_value(module)
    yield lambda function: lambda *arguments: function(*arguments)
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that forks for each of the commands that `start` is called with."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_"))}
    zygote = Zygote(environ | {"PYTHONPATH": str(ROOT)})
    KEPT.add(zygote.pid)
    yield zygote
    KEPT.discard(zygote.pid)
    zygote.close()


@pytest.fixture
def forked(zygote: Zygote) -> ForkedHosts:
    """A function that makes hosts whose agents are forked."""

    def hosts(count: int = 1) -> list[ForkedLauncher]:
        return [ForkedLauncher("local" if n == 1 else f"local.{n}", zygote) for n in range(1, count + 1)]

    return hosts


@pytest.fixture
def start(tmp_path: Path, zygote: Zygote) -> Iterator[Start]:
    """A function that starts Python programs, which end with the test."""
    with programs(tmp_path, zygote) as start:
        yield start


@pytest.fixture
def scheduler_options() -> dict[str, Any]:
    """Options of `scheduler`; a module that needs others has a fixture of this name."""
    return SCHEDULER


@pytest_asyncio.fixture
async def scheduler(scheduler_options: dict[str, Any]) -> AsyncIterator[Scheduler]:
    """A plain scheduler in this process, that knows nothing of agents."""
    async with Scheduler(**scheduler_options) as scheduler:
        yield scheduler


@pytest_asyncio.fixture
async def address(start: Start, tmp_path: Path) -> str:
    """The address of a plain ``dask scheduler``, a process."""
    return (await start_scheduler(start, tmp_path))[1]


@pytest.fixture
def cluster_options() -> dict[str, Any]:
    """Options of `cluster` and `sync_cluster`; a module that needs others has a fixture of this name."""
    return {}


@pytest_asyncio.fixture
async def cluster(cluster_options: dict[str, Any]) -> AsyncIterator[AgentCluster]:
    """A cluster of local agents, for a test with an event loop."""
    async with AgentCluster(**{"scheduler_options": SCHEDULER, "asynchronous": True, **cluster_options}) as cluster:
        yield cluster


@pytest.fixture
def sync_cluster(cluster_options: dict[str, Any]) -> Iterator[AgentCluster]:
    """A cluster of local agents, for a test without an event loop."""
    with AgentCluster(**{"scheduler_options": SCHEDULER, **cluster_options}) as cluster:
        yield cluster


@pytest.fixture
def joined(request: pytest.FixtureRequest) -> Any:
    """The cluster or scheduler of the test, by whichever fixture the test names."""
    name = next(name for name in ("cluster", "scheduler", "address") if name in request.fixturenames)
    found = request.getfixturevalue(name)
    return found.address if name == "scheduler" else found


@pytest_asyncio.fixture
async def client(joined: Any) -> AsyncIterator[Client]:
    """An asynchronous client of the test's `cluster`, `scheduler` or `address`."""
    async with Client(joined, asynchronous=True) as client:
        yield client


@pytest_asyncio.fixture(params=ssh_servers.KINDS)
async def server(request: pytest.FixtureRequest, tmp_path: Path, zygote: Zygote) -> AsyncIterator[SSHServer]:
    """An SSH server of each kind."""
    async with ssh_servers.serve(request.param, tmp_path, zygote) as server:
        yield server


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stub of NVIDIA's library, compiled."""
    return nvml.build(tmp_path_factory.getbasetemp() / "nvml")


@pytest.fixture
def giving_up(monkeypatch: pytest.MonkeyPatch) -> GivingUp:
    """The looks of cluster managers for workers that have gone, which come when the test says so."""
    return GivingUp(monkeypatch)


assert distributed.__version__  # imported here, so that what it keeps open is there before the first test
