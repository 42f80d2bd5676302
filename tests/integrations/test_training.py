"""Distributed trainings and shuffles while workers are replaced: each comes to its end, with the right result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import dask
import pytest
from distributed import Client

from agentcluster import AgentCluster
from agentcluster.reports import RolloutReport
from tests.support.waiting import wait_blocking

for needed in ("pandas", "pyarrow", "sklearn"):
    pytest.importorskip(needed, reason=f"{needed} is not installed (extra 'test-libraries')")
lightgbm = pytest.importorskip("lightgbm", reason="lightgbm is not installed (extra 'test-libraries')")
xgboost = pytest.importorskip("xgboost.dask", reason="xgboost is not installed (extra 'test-libraries')")
np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")

pytestmark = [pytest.mark.libraries, pytest.mark.timeout(180)]

#: Seconds for a training on a machine that is busy with other things.
LONG = 90.0


def two(memory: str) -> dict[str, Any]:
    return {"nworkers": 2, "nthreads": 1, "memory_limit": memory}


class Cluster:
    """A cluster of two workers, a client, and data to learn from: the first column decides."""

    def __init__(self, cluster: AgentCluster, client: Client, threads: ThreadPoolExecutor) -> None:
        self.cluster = cluster
        self.client = client
        self.threads = threads
        array = pytest.importorskip("dask.array")
        self.x, self.y = self.persisted(array.random.default_rng(0).random((4000, 5), chunks=(1000, 5)))
        self._turn = 0

    def persisted(self, x: Any) -> tuple[Any, Any]:
        x = x.persist()
        return x, (x[:, 0] > 0.5).astype(int).persist()

    def begin(self, work: Callable[[], float]) -> Future[float]:
        return self.threads.submit(work)

    def wait_for_task(self, name: str) -> None:
        """Wait until the scheduler has a task of this name."""
        tasks = self.cluster.scheduler.tasks
        wait_blocking(lambda: any(str(key).startswith(name) for key in list(tasks)), LONG)

    def swap(self, **how: Any) -> RolloutReport:
        """Replace both workers."""
        self._turn += 1
        memory = ("2GiB", "3GiB")[self._turn % 2]
        report = self.cluster.reprovision("auto-cpu", two(memory), **{"drain_timeout": LONG, **how})
        assert isinstance(report, RolloutReport)
        assert len(report.nodes["local"].new) == 2
        return report

    def busy(self) -> None:
        """Give the second worker something else to do."""
        second = list(self.client.scheduler_info(n_workers=-1)["workers"])[1]
        self.held = self.client.submit(time.sleep, 3, workers=[second], pure=False)

    def lightgbm(self) -> float:
        model = lightgbm.DaskLGBMClassifier(client=self.client, n_estimators=20, num_leaves=7, verbose=-1)
        model.fit(self.x, self.y)
        return self.right(model.predict(self.x))

    def xgboost(self) -> float:
        data = xgboost.DaskDMatrix(self.client, self.x, self.y)
        return self.trained(data)

    def trained(self, data: Any) -> float:
        found = xgboost.train(self.client, {"objective": "binary:logistic", "nthread": 1}, data, num_boost_round=100)
        return self.right(xgboost.predict(self.client, found, self.x) > 0.5)

    def right(self, said: Any) -> float:
        """Return the share of right answers."""
        said, right = dask.compute(said, self.y)
        return float((said.astype(int) == right).mean())


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ThreadPoolExecutor(2) as threads, AgentCluster(config=two("2GiB")) as cluster, Client(cluster) as client:
        yield Cluster(cluster, client, threads)


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("task", ["_acquire_port", "_train_part"])
def test_lightgbm(cluster: Cluster, task: str, is_busy: bool) -> None:
    if is_busy:
        cluster.busy()
    training = cluster.begin(cluster.lightgbm)
    cluster.wait_for_task(task)
    report = cluster.swap()
    assert training.result(LONG) > 0.95
    assert report.nodes["local"].rerun == 0


def test_xgboost(cluster: Cluster) -> None:
    training = cluster.begin(cluster.xgboost)
    cluster.wait_for_task("fn-")
    report = cluster.swap()
    assert training.result(LONG) > 0.95
    assert report.nodes["local"].rerun == 0


def test_prepare_train_and_go_back(cluster: Cluster) -> None:
    cluster.swap()
    assert cluster.trained(xgboost.DaskDMatrix(cluster.client, cluster.x, cluster.y)) > 0.95
    cluster.swap()
    assert cluster.lightgbm() > 0.95


def test_shuffles_under_changes_without_pause(cluster: Cluster) -> None:
    frames = pytest.importorskip("dask.dataframe")
    left = frames.from_pandas(pd.DataFrame({"k": np.arange(20_000) % 500, "v": 1.0}), npartitions=8)
    right = frames.from_pandas(pd.DataFrame({"k": np.arange(500), "w": 2.0}), npartitions=4)
    stop = threading.Event()

    def swaps() -> float:
        reports = 0
        while not stop.is_set():
            reports += cluster.swap().nodes["local"].rerun == 0
        return reports

    swapping = cluster.begin(swaps)
    try:
        with dask.config.set({"dataframe.shuffle.method": "p2p"}):
            for _ in range(3):
                future = cluster.client.compute(left.merge(right, on="k").w.sum())
                assert future.result(LONG) == 40_000.0
    finally:
        stop.set()
    assert swapping.result(LONG) > 0


def test_run_under_changes_without_pause(cluster: Cluster) -> None:
    swapping = cluster.begin(lambda: float(sum(len(cluster.swap().nodes) for _ in range(6))))
    answers = 0
    while not swapping.done():
        answers += len(cluster.client.run(lambda: 1)) > 0
    assert swapping.result() == 6
    assert answers > 6
