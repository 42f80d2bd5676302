"""The values that cross a process boundary: frozen dataclasses, bytes and seconds.

Inside the package these are what functions take and return. On the wire (msgpack between dask processes, JSON on an
agent's stdin) they are plain dicts: :func:`to_wire` writes them, :func:`from_wire` parses them once, at the border,
and refuses keys that it does not know by name.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NewType, TypeVar

import cloudpickle

from agentcluster.errors import ConfigError, suggest

NodeName = NewType("NodeName", str)
WorkerName = NewType("WorkerName", str)
Address = NewType("Address", str)

#: What a worker is for: ``cpu`` and ``gpu`` carry our resource labels, ``custom`` is exactly what the user said.
Kind = Literal["cpu", "gpu", "custom"]

PICKLED = "__cloudpickle__"


@dataclass(frozen=True)
class Gpu:
    """One GPU or MIG device of a node.

    Attributes
    ----------
    visible_id
        What ``CUDA_VISIBLE_DEVICES`` calls it: an index as text, or a UUID (always, for a MIG device).
    uuid, name
        As NVML says them.
    memory
        Total device memory in bytes; 0 where the device has none of its own.
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
    """What was detected on a node.

    Attributes
    ----------
    hostname
        The machine's own name.
    cpus
        Cores that may be used (affinity and cgroup applied).
    memory
        Bytes that may be used (cgroup and rlimit applied).
    gpus
        GPUs and MIG devices, in ``CUDA_VISIBLE_DEVICES`` order.
    gpu_problem
        Why there are none, when there are none.
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
        """Say in a few words what the host has."""
        gpus = f", {len(self.gpus)} GPUs" if self.gpus else ""
        return f"{self.cpus} cores, {self.memory / 2**30:.1f} GiB{gpus}"


@dataclass(frozen=True)
class Mode:
    """A mode's name with its options.

    Attributes
    ----------
    name
        ``auto-cpu``, ``auto-gpu``, ``auto``, ``mixed``, ``uniform``, ``spec``, ``none``, or one added by entry point.
    config
        The mode's options, by name.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerSpec:
    """One worker's wanted settings.

    Attributes
    ----------
    kind
        ``cpu``, ``gpu`` or ``custom``.
    cls
        Import path of the class, such as ``distributed.Nanny``, or a pickled class (see :func:`pickled`).
    options
        Keyword arguments of that class, less the fields below.
    nthreads, memory_limit
        Threads and bytes; ``None`` leaves them to the class. ``memory_limit=0`` means no limit, as in dask.
    resources
        Abstract resources that the worker offers, amount by name.
    env
        Environment variables of the worker's process.
    devices, device
        For a GPU worker: all the node's device ids that the mode uses, and this worker's index among them.
    """

    kind: Kind
    cls: str | Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    nthreads: int | None = None
    memory_limit: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    device: int | None = None


@dataclass(frozen=True)
class NodePlan:
    """The workers wanted on a node now.

    Attributes
    ----------
    revision
        Grows by one with every change of the plan.
    mode
        The mode that the workers came from.
    workers
        Worker name -> its settings.
    """

    revision: int
    mode: Mode
    workers: Mapping[str, WorkerSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerState:
    """One worker as its agent sees it.

    Attributes
    ----------
    name
        The worker's name.
    state
        ``starting``, ``running``, ``restarting``, ``stopping``, ``retired`` (closed by the scheduler on purpose) or
        ``failed``.
    address
        The worker's address, once it has one.
    pid
        Process id of the worker itself.
    restarts
        How often it was started again after a crash.
    problem
        Last words of a failed worker.
    """

    name: str
    state: Literal["starting", "running", "restarting", "stopping", "retired", "failed"]
    address: str | None = None
    pid: int | None = None
    restarts: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class HostMetrics:
    """A host's load, as sent with each heartbeat.

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
    """What a reprovisioning did on one node.

    Attributes
    ----------
    node
        The node's name.
    mode
        Name of the mode that it was to have.
    outcome
        ``changed``, ``unchanged`` (planned only, not reached, or right as it was), ``failed`` (it has its old workers,
        unless the error says otherwise) or ``rolled back``.
    strategy, because
        Whether new workers came before old ones went (``surge``) or after (``replace``), and why they could not before.
    old, new
        Names of the workers that went and that came.
    shape
        What those that came are, such as ``2 x 4 threads, 8.00 GiB``.
    kept
        Names of the workers that stayed as they were.
    keys, nbytes
        Keys that only the old workers held and that were moved, and their bytes.
    rerun
        Tasks that ran on old workers when their time was up, and were run again elsewhere.
    bound
        Tasks that no worker could run afterwards: key and what it asks for.
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
    rerun: int = 0
    bound: tuple[str, ...] = ()
    start: float = 0.0
    drain: float = 0.0
    retire: float = 0.0
    stop: float = 0.0


T = TypeVar("T")

#: What is plain data as it is.
SCALARS = (str, int, float, bool, type(None))


def pickled(value: Any) -> dict[str, str]:
    """Wrap a value that is not plain data, so that it can travel as text to the agent that needs it."""
    return {PICKLED: base64.b85encode(cloudpickle.dumps(value)).decode()}


def unpickled(value: Any) -> Any:
    """Undo :func:`pickled` in a value, at any depth; only an agent does this, on data of its own scheduler."""
    if isinstance(value, Mapping):
        if set(value) == {PICKLED}:
            return cloudpickle.loads(base64.b85decode(value[PICKLED]))
        return {k: unpickled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [unpickled(v) for v in value]
    return value


def plain(value: Any) -> Any:
    """Return `value` as JSON-able data; what is not plain is :func:`pickled`.

    A mapping's keys become text, a tuple a list.
    """
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return pickled(value)


def to_wire(value: Any) -> Any:
    """Return a dataclass (or a container of them) as plain dicts and lists."""
    if isinstance(value, SCALARS):  # most of what a node says, and 200 of them may be looked at twice a second
        return value
    cls: Any = type(value)
    if names := _fields(cls):
        return {name: to_wire(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(k): to_wire(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(v) for v in value]
    return plain(value)


@functools.cache
def _fields(cls: Any) -> tuple[str, ...]:
    """Return the names of a dataclass's fields; of any other class, nothing."""
    return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_wire(cls: type[T], data: Any, where: str = "") -> T:
    """Parse plain data into the dataclass `cls`.

    Parameters
    ----------
    cls
        One of this module's dataclasses.
    data
        A mapping of its fields.
    where
        The place the data came from, for the message.

    Raises
    ------
    ConfigError
        When `data` is no mapping, has a key that `cls` does not have, lacks one that it needs, or a value has the
        wrong type.
    """
    place = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: expected a mapping of {cls.__name__}'s fields, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"{place}: unknown key {key!r}; {suggest(str(key), fields)}", key=str(key))
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {key: _parse(hints[key], value, f"{place}.{key}") for key, value in data.items()}
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{place}: {missing[0]!r} is missing", key=missing[0])
    return cls(**values)


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint of one of the dataclasses above and convert what the wire flattened."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return plain(value)  # dask's wire makes lists tuples, which would differ from what was sent
    if isinstance(hint, NewType):
        return _parse(hint.__supertype__, value, where)
    if origin in (types.UnionType, typing.Union):
        return _parse_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not allowed; {suggest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_parse(args[0], v, where) for v in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_wire(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _parse_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    problem: ConfigError | None = None
    for choice in choices:
        if choice is not type(None):
            try:
                return _parse(choice, value, where)
            except ConfigError as error:
                problem = error
    assert problem is not None
    raise problem
