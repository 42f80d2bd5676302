"""Workers of unlike shapes on one node, and workers of one shape on nodes that are unlike."""

from agentcluster import AgentCluster
from agentcluster.reports import RolloutReport

NANNY = "dask.distributed.Nanny"


def unlike_workers(cluster: AgentCluster, node: str) -> RolloutReport:
    """Give a node four workers with one thread each, and one with sixteen."""
    spec = {
        f"small-{number}": {"cls": NANNY, "opts": {"nthreads": 1, "memory_limit": "256 MiB"}} for number in range(4)
    }
    spec["large"] = {"cls": NANNY, "opts": {"nthreads": 16, "memory_limit": "1 GiB"}}
    return cluster.reprovision("spec", {"spec": spec}, nodes=[node])


def workers_alike(cluster: AgentCluster) -> RolloutReport:
    """Give all nodes as many workers of one shape as each has room for."""
    return cluster.reprovision("uniform", {"nthreads": 1, "memory_limit": "512 MiB"})


if __name__ == "__main__":
    with AgentCluster(hosts=["local", "local", "local"]) as cluster:
        print(unlike_workers(cluster, "local"))
        print(workers_alike(cluster))
        print(cluster.nodes)
