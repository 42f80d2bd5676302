"""Arguments of the calls on the scheduler, shared by clients, agents and the scheduler.

Each is a frozen dataclass that checks its values and is sent as plain data, see :mod:`agentcluster.wire`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agentcluster.errors import ConfigError
from agentcluster.model import Hardware, Mode
from agentcluster.units import parse_seconds
from agentcluster.wire import check_types

#: Greatest number of characters of a node's name or of a label, as for a name in DNS.
LONGEST_NAME = 253

Drain = Literal["tasks", "data", "now"]
Bound = Literal["follow", "wait", "refuse"]
OnFailure = Literal["rollback", "stop", "continue"]
Strategy = Literal["surge", "replace"]


#: Greatest number that can be asked for, of workers or of bytes: more cannot be sent.
MOST = 2**62


@dataclass(frozen=True)
class RolloutPolicy:
    """Policy of a rollout: the order of its steps, their limits, and the handling of failures.

    Attributes
    ----------
    strategy
        ``surge`` starts the new workers before the old leave, where a node has capacity for both; ``replace`` after.
    drain
        ``tasks`` waits for tasks that run on old workers, ``data`` only moves data, ``now`` does neither.
    drain_timeout
        Seconds for running tasks to end; None for the configured ones.
    bound
        Tasks that are bound to old workers and that none has begun: whether they run on the workers that come in their
        place (``follow``), are waited for like running tasks (``wait``), or are a reason to refuse (``refuse``).
    max_parallel
        Number of nodes that change at the same time; None for all (``replace``: for one).
    on_failure
        Whether nodes that have changed are returned to their earlier plans (``rollback``) or left (``stop``), or the
        others continue (``continue``).
    canary
        Whether one node changes first, alone.
    timeout
        Seconds for starting, and again for moving data; None for the configured ones.
    dry_run
        Whether to plan and check only.
    wait
        Whether to wait for a rollout that runs: True, False, or a number of seconds.

    Raises
    ------
    ConfigError
        For a value of another type, a time that is none, or fewer than one node at a time.
    """

    strategy: Strategy = "surge"
    drain: Drain = "tasks"
    drain_timeout: float | None = None
    bound: Bound = "follow"
    max_parallel: int | None = None
    on_failure: OnFailure = "rollback"
    canary: bool = False
    timeout: float | None = None
    dry_run: bool = False
    wait: bool | float = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.timeout is not None:
            parse_seconds("timeout", self.timeout)
        if self.drain_timeout is not None:
            parse_seconds("drain_timeout", self.drain_timeout, zero=True)
        if not isinstance(self.wait, bool):
            parse_seconds("wait", self.wait, zero=True)
        most = self.max_parallel
        if most is not None and not 0 < most <= MOST:
            raise ConfigError(f"max_parallel={most!r} must be a whole number from 1 to {MOST}", key="max_parallel")


@dataclass(frozen=True)
class ScaleTarget:
    """Target of ``scale()``; of workers, cores and memory at least as much of each as is set.

    Attributes
    ----------
    workers
        Number of workers; exactly this number where nothing else is set.
    cores
        Threads of all workers together.
    memory
        Bytes of all workers' memory limits together.
    nodes
        Number of nodes that have all workers of their mode; the others have none.
    kinds
        Number of workers of each kind: ``cpu`` or ``gpu``, a resource that they offer, or the name that a spec gives
        them. Workers of other kinds stay as they are.
    extra
        Nodes that are used only for demand that the others have no capacity for.

    Raises
    ------
    ConfigError
        For a value that is no whole number of 0 or more, and for targets that exclude each other.
    """

    workers: int | None = None
    cores: int | None = None
    memory: int | None = None
    nodes: int | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kinds, Mapping):
            raise ConfigError(f"scale: kinds={self.kinds!r} must be numbers of workers by kind", key="kinds")
        if not isinstance(self.extra, list | tuple) or not all(isinstance(name, str) for name in self.extra):
            raise ConfigError(f"scale: extra={self.extra!r} must be names of nodes", key="extra")
        amounts = {"n": self.workers, "cores": self.cores, "memory": self.memory, "nodes": self.nodes, **self.kinds}
        for key, value in amounts.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ConfigError(f"scale({key}={value!r}): give a whole number, 0 or more", key=key)
            if value is not None and value > MOST:
                raise ConfigError(f"scale({key}={value!r}): give at most {MOST}", key=key)
        ways = [self.nodes is not None, bool(self.kinds), {self.workers, self.cores, self.memory} != {None}]
        if sum(ways) > 1:
            raise ConfigError(f"{self}: nodes= and kinds of workers cannot be combined with other targets; give one")

    def __str__(self) -> str:
        amounts = {"cores": self.cores, "memory": self.memory, "nodes": self.nodes, **self.kinds}
        said = [] if self.workers is None else [str(self.workers)]
        return f"scale({', '.join(said + [f'{key}={value}' for key, value in amounts.items() if value is not None])})"


@dataclass(frozen=True)
class AdaptiveRequest:
    """Request of an adaptive cluster for the workers that tasks need now.

    Attributes
    ----------
    modes
        Modes that nodes may have; () for the one that each has. A node returns to the first that it can have.
    target_duration
        Seconds within which all known work should be done.
    least, most
        Workers, threads, and bytes of their memory limits, together; None for no limit.
    kinds
        Resource or kind of worker, in lower case -> the least and the greatest number of workers; None for no limit.
    requests
        Resource -> number of tasks that need one of it, for which there should be capacity before they come.
    may_go
        Workers, and nodes that would return to their first mode, that were unused for long enough to leave.
    may_come
        Whether workers may come.
    reserve
        Standby hosts that may be launched, in order -> their hardware; None where it is not known.
    extra
        Nodes on such hosts; they are used only for demand that the others have no capacity for.
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

    Raises
    ------
    ConfigError
        For a value of another type; and for a name or a label that others could not show: it has control characters,
        is empty, or is longer than :data:`LONGEST_NAME`.
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

    def __post_init__(self) -> None:
        check_types(self)
        check_name("node", self.name)
        if isinstance(self.external_name, str):
            check_name("external", self.external_name)
        for label, value in self.labels.items():
            check_label(label, value)


def check_label(label: str, value: str) -> None:
    """Check a label of a node.

    Parameters
    ----------
    label, value
        The label; it may have no value.

    Raises
    ------
    ConfigError
        As for :func:`check_name`.
    """
    check_name("label", label)
    if value:
        check_name("label", value)


def check_name(kind: str, name: object) -> None:
    """Check a name that is shown to others: in tables, logs, pages and messages.

    Parameters
    ----------
    kind
        What it is the name of, for the message.
    name
        The name.

    Raises
    ------
    ConfigError
        When it is not text, is empty, longer than :data:`LONGEST_NAME`, or has a character that is not printed.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{kind} name {name!r} is not text", key="name")
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        shown = ascii(name) if len(name) <= LONGEST_NAME else f"{name[:40]!a}… of {len(name)} characters"
        raise ConfigError(
            f"{kind} name {shown} is not allowed; give 1 to {LONGEST_NAME} printable characters", key="name"
        )
