"""Arguments of the calls on the scheduler, shared by the client and the scheduler.

Each is a frozen dataclass that checks itself and travels as plain data, see :mod:`agentcluster.wire`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agentcluster.errors import ConfigError
from agentcluster.model import Hardware, Mode

Drain = Literal["tasks", "data", "now"]
OnFailure = Literal["rollback", "stop", "continue"]
Strategy = Literal["surge", "replace"]


@dataclass(frozen=True)
class RolloutPolicy:
    """How a change is to be carried out; what a user can say beside the mode.

    Attributes
    ----------
    strategy
        ``surge`` brings the new workers up before the old go, where both fit; ``replace`` never does.
    drain
        ``tasks`` waits for tasks that run on old workers, ``data`` only moves data, ``now`` does not even do that.
    drain_timeout
        Seconds that running tasks get; None for the configured ones.
    max_parallel
        Nodes that change at the same time; None for all (``replace``: for one).
    on_failure
        Whether nodes that have changed already are brought back (``rollback``) or left (``stop``), or the others go on
        (``continue``).
    canary
        Whether one node goes first, alone.
    timeout
        Seconds for starting, and again for moving data; None for the configured ones.
    dry_run
        Plan and check only.
    wait
        Whether to wait for a rollout that runs, True or False, or for how many seconds.
    """

    strategy: Strategy = "surge"
    drain: Drain = "tasks"
    drain_timeout: float | None = None
    max_parallel: int | None = None
    on_failure: OnFailure = "rollback"
    canary: bool = False
    timeout: float | None = None
    dry_run: bool = False
    wait: bool | float = True

    def __post_init__(self) -> None:
        for key in ("timeout", "drain_timeout"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ConfigError(f"{key}={value!r} must not be negative", key=key)
        if self.max_parallel is not None and self.max_parallel < 1:
            raise ConfigError(f"max_parallel={self.max_parallel!r} must be 1 or more", key="max_parallel")


@dataclass(frozen=True)
class ScaleTarget:
    """What is wanted; of workers, cores and memory at least as much of each as is said.

    Attributes
    ----------
    workers
        Number of workers, exactly where nothing else is said.
    cores
        Threads of all workers together.
    memory
        Bytes of all workers' memory limits together.
    nodes
        Number of nodes that have all workers of their mode; the others have none.
    kinds
        Number of workers of each kind: what they are (``cpu``, ``gpu``), a resource that they have, or the name that a
        spec gives them. Those of other kinds stay as they are.
    extra
        Nodes that are there only for what the others have no room for.
    """

    workers: int | None = None
    cores: int | None = None
    memory: int | None = None
    nodes: int | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        amounts = {"n": self.workers, "cores": self.cores, "memory": self.memory, "nodes": self.nodes, **self.kinds}
        for key, value in amounts.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ConfigError(f"scale({key}={value!r}): give a whole number, 0 or more", key=key)
        ways = [self.nodes is not None, bool(self.kinds), {self.workers, self.cores, self.memory} != {None}]
        if sum(ways) > 1:
            raise ConfigError(f"{self}: nodes= and kinds of workers are each for themselves; give one of them")

    def __str__(self) -> str:
        amounts = {"cores": self.cores, "memory": self.memory, "nodes": self.nodes, **self.kinds}
        said = [] if self.workers is None else [str(self.workers)]
        return f"scale({', '.join(said + [f'{key}={value}' for key, value in amounts.items() if value is not None])})"


@dataclass(frozen=True)
class AdaptiveRequest:
    """What an adaptive cluster asks the scheduler for, again and again.

    Attributes
    ----------
    modes
        What nodes may run; () for what they do. The first that a node can have is the one that it goes back to.
    target_duration
        Seconds within which all that is to do should be done.
    least, most
        Workers, threads, and bytes of their memory limits, together; None for no limit.
    kinds
        Resource or kind of worker, in lower case -> the least and the greatest number of workers; None for no limit.
    requests
        Resource -> how many tasks that need one of it there is to be room for, whether they are there or not.
    may_go
        Workers, and nodes that go back to their first mode, that have not been needed for long enough.
    may_come
        Whether workers may come.
    reserve
        Host that may be launched, in the order in which they are -> its hardware; None where that is not known.
    extra
        Nodes on such hosts: they have workers only for what the others have no room for.
    """

    modes: tuple[Mode, ...] = ()
    target_duration: float = 5.0
    least: tuple[float, ...] = (0, 0, 0)
    most: tuple[float | None, ...] = (None, None, None)
    kinds: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    requests: Mapping[str, int] = field(default_factory=dict)
    may_go: tuple[str, ...] = ()
    may_come: bool = True
    reserve: Mapping[str, Hardware | None] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeRegistration:
    """An agent's request to take its node in.

    Attributes
    ----------
    name
        The node's name.
    address
        Address of the agent.
    hardware
        What was detected on the host.
    mode
        First mode of the node, where its agent was given one.
    fallback
        First mode of the node where no mode was set for the scheduler's nodes.
    exact
        Whether a taken name is an error; otherwise ``.2``, ``.3`` … is appended.
    external_name
        The name that a cluster manager gave the node, and by which it knows the node's workers.
    slots
        Greatest number of workers at a time, where the agent was given ports for a number of them; None for any.
    resources
        Resources that each worker of the node offers, whatever its mode.
    labels
        Labels of the host, by which nodes are selected.
    """

    name: str
    address: str
    hardware: Hardware
    mode: Mode | None = None
    fallback: Mode | None = None
    exact: bool = True
    external_name: str | int | None = None
    slots: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
