"""A day in short: tasks that prepare, tasks that train on a GPU, tasks that prepare again, on two nodes."""

import time

import dask
from distributed import Client

from agentcluster import AgentCluster, Mode
from agentcluster.reports import AdaptiveLog


def prepare(number: int) -> int:
    time.sleep(0.1)
    return number


def train(number: int) -> int:
    time.sleep(0.1)
    return number


def day(cluster: AgentCluster, client: Client) -> AdaptiveLog:
    cpu = Mode("auto-cpu", {"nworkers": 2})
    cluster.adapt(minimum=1, modes=[cpu, "auto-gpu"], gpu=(0, 4), interval="200ms", target_duration="1s")
    client.gather(client.map(prepare, range(60)))
    with dask.annotate(resources={"GPU": 1}):
        trained = client.map(train, range(120))
    client.gather(trained)
    del trained
    client.gather(client.map(prepare, range(60, 160)))
    time.sleep(2)  # who is not needed any more goes
    return cluster.adaptive_log()


def plot(log: AdaptiveLog, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times, workers = log.timeline()
    figure, axes = pyplot.subplots(figsize=(7, 2.5), layout="constrained")
    for kind, counts in workers.items():
        axes.step([each - times[0] for each in times], counts, where="post", label=kind, linewidth=2)
    axes.set(xlabel="seconds", ylabel="workers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    with AgentCluster(hosts=["local", "local"], config={"nworkers": 2}) as cluster, Client(cluster) as client:
        log = day(cluster, client)
    print(log)
    plot(log, "day.svg")
