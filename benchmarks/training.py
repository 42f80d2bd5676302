"""Trainings, shuffles and calls while workers are replaced at random moments: ``python -m benchmarks.training``.

Work with LightGBM, XGBoost, P2P merges and rechunks, and ``client.run`` (extra ``test-libraries``) runs over and over,
and the workers of the cluster are replaced at random moments of it, also by more or fewer. It prints how often work of
each kind came to its end, had a wrong result, ended with an error, which it names, or hung. Exit code 1
when work hung or had a wrong result.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import lightgbm
import numpy as np
import pandas as pd
import xgboost.dask
from distributed import Client

from agentcluster import AgentCluster
from benchmarks.common import titled

#: Seconds after which work counts as hung; draining ends earlier.
HUNG, DRAIN = 150.0, 90.0

#: Replaces the workers of a cluster by so many.
Swap = Callable[[int], None]


class Work:
    """Work of each kind, on data that a cluster holds; each returns whether its result is right."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.x = da.random.default_rng(0).random((4000, 5), chunks=(1000, 5)).persist()
        self.y = (self.x[:, 0] > 0.5).astype(int).persist()
        frame = pd.DataFrame({"k": np.arange(20_000) % 500, "v": 1.0})
        self.left = dd.from_pandas(frame, npartitions=8)
        self.right = dd.from_pandas(pd.DataFrame({"k": np.arange(500), "w": 2.0}), npartitions=4)

    def _learned(self, said: Any) -> bool:
        said, right = dask.compute(said, self.y)
        return bool((said.astype(int) == right).mean() > 0.95)

    def lightgbm(self) -> bool:
        model = lightgbm.DaskLGBMClassifier(client=self.client, n_estimators=20, num_leaves=7, verbose=-1)
        return self._learned(model.fit(self.x, self.y).predict(self.x))

    def xgboost(self) -> bool:
        data = xgboost.dask.DaskDMatrix(self.client, self.x, self.y)
        found = xgboost.dask.train(
            self.client, {"objective": "binary:logistic", "nthread": 1}, data, num_boost_round=50
        )
        return self._learned(xgboost.dask.predict(self.client, found, self.x) > 0.5)

    def merge(self) -> bool:
        with dask.config.set({"dataframe.shuffle.method": "p2p"}):
            return bool(self.client.compute(self.left.merge(self.right, on="k").w.sum()).result() == 40_000)

    def rechunk(self) -> bool:
        with dask.config.set({"array.rechunk.method": "p2p"}):
            return bool(self.client.compute(self.x.rechunk((4000, 1)).sum()).result() > 9_000)

    def run(self) -> bool:
        return all(set(self.client.run(lambda: 1).values()) == {1} for _ in range(20))


KINDS = ("lightgbm", "xgboost", "merge", "rechunk", "run")


@contextmanager
def agents() -> Iterator[tuple[Client, Swap]]:
    memory = 2

    def swap(workers: int) -> None:
        nonlocal memory
        memory = 5 - memory
        shape = {"nworkers": workers, "nthreads": 1, "memory_limit": f"{memory}GiB"}
        cluster.reprovision("auto-cpu", shape, drain_timeout=DRAIN)

    shape = {"nworkers": 2, "nthreads": 1, "memory_limit": "2GiB"}
    with AgentCluster(config=shape) as cluster, Client(cluster) as client:
        yield client, swap


def measure(swaps: int, kind: str, seed: int, same: bool) -> Counter[str]:
    """Swap workers at random moments of work of a kind; return how often the work had each outcome."""
    moments, outcomes = random.Random(seed), Counter[str]()
    stop = threading.Event()
    with agents() as (client, swap), ThreadPoolExecutor(1) as threads:
        work = getattr(Work(client), kind)

        def go_on() -> None:
            while not stop.is_set():
                try:
                    outcomes["right" if work() else "wrong"] += 1
                except Exception as error:
                    outcomes[f"{type(error).__name__}: {error}".splitlines()[0][:70]] += 1

        working = threads.submit(go_on)
        for _ in range(swaps):
            time.sleep(moments.uniform(0, 1.5))
            swap(2 if same else moments.choice([1, 2, 3]))
        stop.set()
        try:
            working.result(HUNG)
        except TimeoutError:
            outcomes["hung"] += 1
            client.cancel(list(client.futures), force=True)
            client.close()
    return outcomes


def main() -> int:
    """Print what became of the work under swaps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--swaps", type=int, default=40, help="swaps for each kind of work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    asked = parser.parse_args()
    rows, bad = [], 0
    for kind in asked.kinds:
        half = asked.swaps // 2
        found = measure(half, kind, asked.seed, same=True)
        found += measure(asked.swaps - half, kind, asked.seed, same=False)
        errors = {text: number for text, number in found.items() if text not in ("right", "wrong", "hung")}
        rows.append(
            (kind, *map(str, (asked.swaps, found["right"], found["wrong"], found["hung"], sum(errors.values()))))
        )
        bad += found["wrong"] + found["hung"]
        for text, number in errors.items():
            print(f"{kind}: {number} x {text}", file=sys.stderr)
    print(titled("Work under swaps", ("kind", "swaps", "right", "wrong", "hung", "errors"), rows))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
