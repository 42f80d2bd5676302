"""Values that cross a process boundary: frozen dataclasses, bytes and seconds.

Inside the package functions take and return these. On the wire they are plain data, see :mod:`agentcluster.wire`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agentcluster.tables import text_table
from agentcluster.wire import Plain

#: Kind of a worker: ``cpu`` and ``gpu`` have resources of these names, ``custom`` is as the user wrote it.
Kind = Literal["cpu", "gpu", "custom"]

#: What is shown in place of a value that may be a secret.
HIDDEN = "…"


@dataclass(frozen=True)
class Gpu:
    """One GPU or MIG device of a node.

    Attributes
    ----------
    visible_id
        Its name in ``CUDA_VISIBLE_DEVICES``: an index as text, or a UUID (always, for a MIG device).
    uuid, name
        As NVML reports them.
    memory
        Total device memory in bytes; 0 where the device shares the host's.
    mig
        Whether it is a MIG device.
    """

    visible_id: str
    uuid: str
    name: str
    memory: int
    mig: bool = False


@dataclass(frozen=True)
class Hardware:
    """Hardware detected on a node.

    Attributes
    ----------
    hostname
        Name of the machine.
    cpus
        Cores that may be used (affinity and cgroup applied).
    memory
        Bytes that may be used (cgroup and rlimit applied).
    gpus
        GPUs and MIG devices, in ``CUDA_VISIBLE_DEVICES`` order.
    gpu_problem
        Reason why there are none; None where there are some.
    versions
        Package name -> version, for python, dask, distributed, agentcluster and, where installed, dask-cuda.
    """

    hostname: str
    cpus: int
    memory: int
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return a short description, such as ``8 cores, 64.0 GiB, 2 GPUs``."""
        gpus = f", {len(self.gpus)} GPUs" if self.gpus else ""
        return f"{self.cpus} cores, {self.memory / 2**30:.1f} GiB{gpus}"


@dataclass(frozen=True)
class Mode:
    """Mode's name with its options; inside the package as :func:`agentcluster.modes.parse` returns it.

    Attributes
    ----------
    name
        ``auto-cpu``, ``auto-gpu``, ``auto``, ``mixed``, ``uniform``, ``spec``, ``none``, or one added by entry point.
    config
        The mode's options, by name.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Mode(name={self.name!r}, config={without_env(self.config)!r})"


def without_env(data: Plain) -> Plain:
    """Return plain data with the names of environment variables, and without their values.

    Parameters
    ----------
    data
        Plain data, with mappings of variables below keys ``env`` at any depth.

    Returns
    -------
    Plain
        A copy in which :data:`HIDDEN` is the value of each of those variables.
    """
    if isinstance(data, Mapping):
        hidden = data.get("env")
        shown = {key: without_env(value) for key, value in data.items()}
        return {**shown, "env": dict.fromkeys(hidden, HIDDEN)} if isinstance(hidden, Mapping) else shown
    if isinstance(data, list | tuple):
        return [without_env(each) for each in data]
    return data


@dataclass(frozen=True)
class WorkerSpec:
    """Settings of one worker.

    Attributes
    ----------
    kind
        ``cpu``, ``gpu`` or ``custom``.
    cls
        Import path of the class, such as ``distributed.Nanny``, or a pickled class (see
        :func:`agentcluster.wire.pickled`).
    options
        Keyword arguments of that class, without the fields below. Not in the repr: they may hold a password.
    nthreads, memory_limit
        Threads and bytes; ``None`` leaves them to the class. ``memory_limit=0`` means no limit, as in dask.
    resources
        Abstract resources that the worker offers, amount by name.
    env
        Environment variables of the worker's process. Not in the repr.
    devices, device
        For a GPU worker: ids of all the node's devices that the mode uses, and this worker's index among them.
    """

    kind: Kind
    cls: str | Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    nthreads: int | None = None
    memory_limit: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    devices: tuple[str, ...] = ()
    device: int | None = None


@dataclass(frozen=True)
class NodePlan:
    """Workers wanted on a node.

    Attributes
    ----------
    revision
        Number of the plan; each change adds one.
    mode
        Mode that the workers were planned by.
    workers
        Worker name -> settings.
    """

    revision: int
    mode: Mode
    workers: Mapping[str, WorkerSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerState:
    """State of one worker, as its agent reports it.

    Attributes
    ----------
    name
        Name of the worker.
    state
        ``starting``, ``running``, ``restarting``, ``stopping``, ``retired`` (closed by the scheduler) or ``failed``.
    address
        Address of the worker, once it has one.
    pid
        Process id of the worker, not of its nanny.
    restarts
        Number of starts after a crash.
    problem
        Last message of a failed worker.
    warnings
        Warnings that its class gave when it was made, each after its category: ``FutureWarning: …``.
    """

    name: str
    state: Literal["starting", "running", "restarting", "stopping", "retired", "failed"]
    address: str | None = None
    pid: int | None = None
    restarts: int = 0
    problem: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostMetrics:
    """Load of a host, as each heartbeat reports it.

    Attributes
    ----------
    cpu
        Percent of all cores, 0 to 100.
    memory_used
        Bytes used on the host.
    gpu, gpu_memory_used
        Percent and bytes per GPU, in the order of the node's hardware.
    """

    cpu: float = 0.0
    memory_used: int = 0
    gpu: tuple[int, ...] = ()
    gpu_memory_used: tuple[int, ...] = ()


@dataclass(frozen=True)
class NodeReport:
    """Report of a rollout on one node.

    Attributes
    ----------
    node
        Name of the node.
    mode
        Name of the mode that the node was to get.
    outcome
        ``changed``, ``unchanged`` (planned only, not reached, or right as it was), ``failed`` (it has its old workers,
        unless the error reports otherwise) or ``rolled back``.
    strategy, because
        Whether new workers came before old ones left (``surge``) or after (``replace``), and the reason where they
        could not come before.
    old, new
        Names of the workers that left and that came.
    shape
        Description of those that came, such as ``2 x 4 threads, 8.00 GiB``.
    kept
        Names of the workers that stayed as they were.
    keys, nbytes
        Number of sole replicas that were moved off the old workers, and their bytes.
    given_up, given_up_nbytes
        Number of sole replicas that were given up with the old workers (``drain="now"``), and their bytes.
    lost
        Number of those that cannot be computed again.
    rerun
        Number of tasks that ran on old workers at the end of the drain timeout, and were run again elsewhere.
    followed
        Number of unfinished tasks that were bound to old workers, and are bound to the workers that came for them.
    bound
        Tasks that no worker can run since then: key and restriction; in a dry run, those that none could run.
    start, drain, retire, stop
        Seconds that each step took.
    """

    node: str
    mode: str
    outcome: Literal["changed", "unchanged", "failed", "rolled back"] = "unchanged"
    strategy: Literal["surge", "replace"] = "surge"
    because: str = ""
    old: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    shape: str = ""
    kept: tuple[str, ...] = ()
    keys: int = 0
    nbytes: int = 0
    given_up: int = 0
    given_up_nbytes: int = 0
    lost: int = 0
    rerun: int = 0
    followed: int = 0
    bound: tuple[str, ...] = ()
    start: float = 0.0
    drain: float = 0.0
    retire: float = 0.0
    stop: float = 0.0


#: Step of a node -> percentage at which it begins; moving data covers what lies between its own and the next.
STEPS: Mapping[str, int] = {
    "waiting": 0,
    "swap": 5,
    "start": 10,
    "drain": 40,
    "retire": 40,
    "stop": 90,
    "ready": 100,
    "standby": 100,
}


@dataclass(frozen=True)
class NodeProgress:
    """Progress of one node, or of one worker that leaves, in a rollout.

    Attributes
    ----------
    step
        ``waiting``, ``swap``, ``start``, ``drain``, ``retire``, ``stop``, or the state that the node's change ended in.
    keys, all_keys
        Keys that have a replica elsewhere already, and all that need one.
    nbytes, all_nbytes
        Their bytes; those that were moved are estimated from the number of keys.
    tasks
        Tasks that still run on workers that leave.
    left
        Seconds until tasks that still run then are run again elsewhere.
    needs
        Names of tasks that are waited for, and what else is, such as ``a shuffle``; at most five of each worker.

    Examples
    --------
    >>> progress = NodeProgress("retire", keys=50, all_keys=100)
    >>> print(progress, progress.percent)
    50 of 100 keys moved 65.0
    >>> print(NodeProgress("drain", tasks=2, left=113.4))
    2 tasks run, 1:53 left
    >>> print(NodeProgress("drain", tasks=2, left=113.4, needs=("_train_part",)))
    2 tasks run (_train_part), 1:53 left
    """

    step: str = "waiting"
    keys: int = 0
    all_keys: int = 0
    nbytes: int = 0
    all_nbytes: int = 0
    tasks: int = 0
    left: float = 0.0
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, parts: Iterable[NodeProgress]) -> NodeProgress:
        """Return the progress of a node whose workers have these; its step is that of the first of them.

        Parameters
        ----------
        parts
            Progress of each worker; at least one.
        """
        each = list(parts)
        sums = {key: sum(getattr(part, key) for part in each) for key in _AMOUNTS}
        needs = tuple(sorted({name for part in each for name in part.needs}))
        return cls(step=each[0].step, left=max(part.left for part in each), needs=needs, **sums)

    @property
    def percent(self) -> float:
        """Length of the node's progress bar, from 0 to 100."""
        begin = float(STEPS.get(self.step, 0))
        return begin + self.keys / self.all_keys * (STEPS["stop"] - begin) if self._moves() else begin

    def _moves(self) -> bool:
        return self.step == "retire" and self.all_keys > 0

    def __str__(self) -> str:
        if self.step == "drain" and (self.tasks or self.needs):
            minutes, seconds = divmod(round(self.left), 60)
            tasks = "1 task runs" if self.tasks == 1 else f"{self.tasks} tasks run"
            what = ", ".join(self.needs)
            waits = f"waits for {what}" if not self.tasks else f"{tasks} ({what})" if what else tasks
            return f"{waits}, {minutes}:{seconds:02} left"
        return f"{self.keys} of {self.all_keys} keys moved" if self._moves() else self.step


_AMOUNTS = ("keys", "all_keys", "nbytes", "all_nbytes", "tasks")


@dataclass(frozen=True, repr=False)
class RolloutStatus:
    """Progress of the rollout that runs; a table as its repr.

    Attributes
    ----------
    mode
        Name of the mode that the nodes change to.
    state
        State of the rollout, such as ``running`` or ``paused``.
    pausing
        Whether no further wave begins until the rollout is resumed.
    seconds
        Seconds since it began.
    wave
        Position of the wave that runs, from 0.
    waves
        Names of the nodes of each wave, in their order.
    nodes
        Node name -> progress.

    Examples
    --------
    >>> waves = (("gpu-1",), ("gpu-2",))
    >>> nodes = {"gpu-1": NodeProgress("retire", keys=50, all_keys=100), "gpu-2": NodeProgress()}
    >>> RolloutStatus("auto-gpu", "running", seconds=3.2, waves=waves, nodes=nodes)
    rollout to auto-gpu: running, wave 1 of 2, 3 s
    node   progress
    gpu-1  65%  50 of 100 keys moved
    gpu-2  0%   waiting
    """

    mode: str
    state: str
    pausing: bool = False
    seconds: float = 0.0
    wave: int = 0
    waves: tuple[tuple[str, ...], ...] = ()
    nodes: Mapping[str, NodeProgress] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the state in one line.

        Returns
        -------
        str
            Such as ``rollout to auto-gpu: running, wave 1 of 2, 3 s``.
        """
        wave = f"wave {self.wave + 1} of {len(self.waves)}"
        match self.state:
            case "running":
                state = f"pauses after {wave}" if self.pausing else f"running, {wave}"
            case "paused":
                state = f"paused before {wave}"
            case "back":
                state = "rolling back"
            case other:
                state = other
        return f"rollout to {self.mode}: {state}, {self.seconds:.0f} s"

    def __repr__(self) -> str:
        percents = [f"{each.percent:.0f}%" for each in self.nodes.values()]
        width = max(map(len, percents), default=0)
        rows = [
            (name, f"{percent:{width}}  {each}")
            for (name, each), percent in zip(self.nodes.items(), percents, strict=True)
        ]
        return "\n".join([self.summary(), text_table(("node", "progress"), rows)])


def like_dask(name: str, count: int) -> list[str]:
    """Return the names that ``dask worker --name NAME`` gives to its workers.

    Parameters
    ----------
    name
        The name.
    count
        Number of workers.

    Returns
    -------
    list of str
        The name itself for a single worker, else the name with a number.
    """
    return [name] if count == 1 else [f"{name}-{number}" for number in range(count)]
