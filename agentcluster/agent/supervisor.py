"""Start, watch, restart and stop the workers of one host, under dask's own nannies.

:class:`Supervisor` owns every server that it made until that server is closed, and reports each change of a worker's
state to a callback. It decides nothing but the time at which a crashed worker is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from distributed import Nanny, Status
from distributed.comm.addressing import get_address_host_port
from distributed.nanny import WorkerProcess
from distributed.security import Security
from distributed.utils import import_term, parse_ports

from agentcluster import modes
from agentcluster.agent import forkserver
from agentcluster.agent.nanny import (
    RestartPolicy,
    SupervisedNanny,
    Supervision,
    WorkerServer,
    build_cuda_nanny,
    describe_error,
    own_error,
    rename,
    supervised,
    user_start_method,
)
from agentcluster.agent.options import PORT_OPTIONS, WorkerArguments, WorkerOptions
from agentcluster.errors import (
    AgentClusterError,
    ConfigError,
    Failure,
    WorkerStartError,
    WorkerStartTimeout,
    suggest,
)
from agentcluster.model import WorkerSpec, WorkerState
from agentcluster.wire import pickled, unpickled

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether a worker's process is ready; dask's own 0.05 are a tenth of a swap.
POLL = 0.01

#: Greatest number of warnings of a worker's class that are passed on with each heartbeat, and of characters of one.
MOST_WARNINGS, LONGEST_WARNING = 8, 1000

#: Greatest number of bytes of an exception of a worker's own code that is passed on.
MOST_OF_AN_ERROR = 100_000

#: Seconds that the workers of a start that failed get to end.
DISCARD_TIMEOUT = 10.0

CUDA_WORKER = "dask_cuda.CUDAWorker"
NO_DEVICE = "CUDAWorker is several workers, one per GPU; use mode 'auto-gpu', which starts each of them with its device"

State: TypeAlias = Literal["starting", "running", "restarting", "stopping", "retired", "failed"]


@dataclass
class _Worker:
    """One worker of the supervisor; `server` is a nanny, or of whatever class the spec named."""

    name: str
    spec: WorkerSpec
    server: WorkerServer
    warnings: tuple[str, ...] = ()
    stopping: bool = False
    ready: bool = False
    ended: asyncio.Task[None] | None = None
    problem: str | None = None

    def state(self) -> WorkerState:
        server = self.server
        # A worker without a nanny has its address, or an error in its place, before it is a worker.
        address = None if server.status is Status.init else getattr(server, "worker_address", None)
        crashes = len(server.crashes) if isinstance(server, SupervisedNanny) else 0
        pid = getattr(server, "pid", None)
        return WorkerState(self.name, self._state(), address, pid, crashes, self.problem, self.warnings)

    def _state(self) -> State:
        if self.stopping:
            return "stopping"
        if self.server.status in (Status.closed, Status.failed):
            return "failed" if self.problem else "retired"
        if not self.ready:
            return "starting"
        process: WorkerProcess | None = getattr(self.server, "process", None)
        return "running" if process is None or process.status is Status.running else "restarting"


@dataclass
class Supervisor:
    """Starts, watches and stops the workers of one host.

    Parameters
    ----------
    scheduler
        Address of the scheduler that the workers join.
    security
        Credentials of the workers.
    host_options
        Keyword arguments for every worker on this host whatever its mode (``interface``, ``host``, ``protocol``,
        ``local_directory``, ``resources``, …).
    policy
        Rule by which crashed workers are started again.
    on_change
        Called with a worker's new state.
    in_touch
        Returns whether the agent itself has its connection to the scheduler: then a worker that lost its own is started
        again.
    external_names
        Worker name -> the name object that the scheduler gets in its place, such as a number.
    """

    scheduler: str
    security: Security | None = None
    host_options: WorkerOptions = field(default_factory=dict)
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    on_change: Callable[[WorkerState], None] = lambda state: None
    in_touch: Callable[[], bool] = lambda: False
    external_names: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        WorkerProcess._init_msg_interval = POLL
        self._workers: dict[str, _Worker] = {}
        self._closed = False

    def states(self) -> tuple[WorkerState, ...]:
        """Return the state of every worker, in the order they were started."""
        return tuple(worker.state() for worker in self._workers.values())

    def check(self, specs: Mapping[str, WorkerSpec]) -> dict[str, str]:
        """Check whether workers could be started here; start nothing.

        Parameters
        ----------
        specs
            Worker name -> its settings.

        Returns
        -------
        dict
            Worker name -> problem, for those that could not be started.
        """
        refused = {}
        for name, spec in specs.items():
            try:
                _check(spec)
            except ConfigError as error:
                refused[name] = str(error)
        return refused

    async def start(self, specs: Mapping[str, WorkerSpec], timeout: float) -> tuple[WorkerState, ...]:
        """Start workers and wait until each has joined the scheduler; all of them, or none.

        Parameters
        ----------
        specs
            Worker name -> its settings. No name may be in use.
        timeout
            Seconds for the whole call.

        Returns
        -------
        tuple of WorkerState
            The workers' states, in the order of `specs`.

        Raises
        ------
        WorkerStartError
            When one fails or is late. Those that did start are stopped again before it is raised.
        """
        taken = sorted(set(specs) & set(self._workers))
        if taken:
            raise ConfigError(f"worker {taken[0]!r} already runs here")
        if self._closed:
            raise ConfigError("this node's agent ends, and starts no more workers")
        batch: dict[str, _Worker] = {}
        try:
            failures, late = await self._start_all(specs, batch, timeout)
        except BaseException:
            await self._discard(batch.values())
            raise
        if failures:
            await self._discard(batch.values())
            raise (WorkerStartTimeout if late else WorkerStartError)("", failures)
        for worker in batch.values():
            worker.ready = True
            worker.ended = asyncio.create_task(self._watch(worker), name=f"watch {worker.name}")
            logger.info("Worker %s started at %s", worker.name, worker.state().address)
        return tuple(worker.state() for worker in batch.values())

    async def stop(self, names: Iterable[str], timeout: float) -> None:
        """Stop workers; returns when their processes have ended.

        Parameters
        ----------
        names
            Names of the workers; unknown ones are taken for those that have ended already.
        timeout
            Seconds for a worker to end.
        """
        workers = [self._workers[name] for name in names if name in self._workers]
        for worker in workers:
            worker.stopping = True
        await asyncio.gather(*(self._close(worker, timeout) for worker in workers))

    async def kill(self, timeout: float, reason: str) -> None:
        """End the processes of workers that have a nanny, which starts them again.

        Parameters
        ----------
        timeout
            Seconds for a worker to end by itself.
        reason
            Reason for the log.
        """
        nannies = [each.server for each in self._workers.values() if isinstance(each.server, Nanny)]
        await asyncio.gather(*(nanny.kill(timeout=timeout, reason=reason) for nanny in nannies))

    async def rename(self, names: Mapping[str, str]) -> None:
        """Rename workers, now and for when they are started again.

        Parameters
        ----------
        names
            Old name -> new name; unknown workers are taken for those that have ended already.
        """
        renamed = [worker for name, worker in self._workers.items() if name in names]
        for worker in renamed:
            worker.name = names[worker.name]
        self._workers = {worker.name: worker for worker in self._workers.values()}
        await asyncio.gather(*(rename(each.server, self._external_name(each.name)) for each in renamed))

    async def close(self, timeout: float) -> None:
        """Stop every worker, and start no more.

        Parameters
        ----------
        timeout
            Seconds for a worker to end.
        """
        self._closed = True
        await self.stop(list(self._workers), timeout)

    # -- building ------------------------------------------------------------------------------------------------------

    def _build(self, specs: Mapping[str, WorkerSpec], failures: dict[str, Failure]) -> Iterator[_Worker]:
        """Yield each worker, not started; note in `failures` the problem of those that cannot be built."""
        gpus = {name: spec for name, spec in specs.items() if spec.cls == CUDA_WORKER}
        ports = self._assign_ports(specs, gpus)
        for name, spec in specs.items():
            if name not in gpus:
                try:
                    with _noted() as noted:
                        server = self._build_server(name, spec, ports[name])
                except Exception as error:  # a user's class may raise anything from its constructor
                    failures[name] = failure(error)
                else:
                    yield _Worker(name, spec, server, tuple(noted))
        try:
            with _noted() as noted:
                nannies = {name: self._build_cuda_nanny(name, spec) for name, spec in gpus.items()}
        except Exception as error:  # as above: CUDAWorker passes on what NVML and RMM raise
            failures.update(dict.fromkeys(gpus, failure(error)))
        else:
            for name, nanny in nannies.items():
                yield _Worker(name, gpus[name], nanny, tuple(noted))

    def _assign_ports(
        self, specs: Mapping[str, WorkerSpec], gpus: Mapping[str, WorkerSpec]
    ) -> dict[str, dict[str, list[int]]]:
        """Assign ports to workers without a GPU; those with one have each the port of its device."""
        taken = {port for worker in self._workers.values() for port in ports_in_use(worker.server)}
        taken |= device_ports(self.host_options, gpus.values())
        return assign_ports(self.host_options, [name for name in specs if name not in gpus], taken)

    def _arguments(self, name: str, spec: WorkerSpec, ports: WorkerOptions) -> WorkerArguments:
        arguments = {**self.host_options, **unpickled(spec.options), **ports, "name": self._external_name(name)}
        if spec.nthreads is not None:
            arguments["nthreads"] = spec.nthreads
        if spec.memory_limit is not None:
            arguments["memory_limit"] = spec.memory_limit
        resources = {**(self.host_options.get("resources") or {}), **spec.resources}
        if resources:
            arguments["resources"] = resources
        if spec.env:
            arguments["env"] = {**(self.host_options.get("env") or {}), **spec.env}
        if self.security is not None:
            arguments["security"] = self.security
        return arguments

    def _build_server(self, name: str, spec: WorkerSpec, ports: WorkerOptions) -> WorkerServer:
        cls = resolve(spec.cls)
        own_port = "nanny_port" if issubclass(cls, Nanny) else "worker_port"
        arguments = _with_own_port(self._arguments(name, spec, ports), own_port)
        arguments.pop("listen_address", None)  # given in parts too
        allowed = modes.worker_keywords(cls)
        if allowed is not None:
            # These are for dask's workers; another class gets those of them that it knows.
            ours = {"security", *self.host_options}
            arguments = {key: value for key, value in arguments.items() if key in allowed or key not in ours}
        if issubclass(cls, Nanny):
            cls = supervised(cls)  # type: ignore[arg-type]  # mypy takes a class for unhashable
            _resolve_worker_class(arguments)
            arguments["config"] = {**user_start_method(), **(arguments.get("config") or {})}
        with forkserver.environment({}):  # a nanny reads the environment, which must not be that of a worker just then
            server: WorkerServer = cls(self.scheduler, **arguments)
        return self._supervise(server)

    def _build_cuda_nanny(self, name: str, spec: WorkerSpec) -> WorkerServer:
        """Build dask-cuda's nanny for a worker's device; none of them when one cannot be built."""
        if spec.device is None:
            raise ConfigError(f"worker {name!r}: {NO_DEVICE}", key="cls")
        arguments = _cuda_arguments(_with_own_port(self._arguments(name, spec, {}), "nanny_port"))
        env = arguments.pop("env", {})
        arguments.setdefault("memory_limit", 1 / len(spec.devices))
        if arguments.get("worker_port"):
            arguments["worker_port"] = device_port(arguments["worker_port"], spec)
        nanny = build_cuda_nanny(self.scheduler, arguments, spec.devices[spec.device])
        # CUDAWorker takes no environment variables.
        order = ",".join(spec.devices[spec.device :] + spec.devices[: spec.device])
        nanny.env = {**nanny.env, "CUDA_VISIBLE_DEVICES": order, "RAPIDS_NO_INITIALIZE": "True", **env}
        nanny.config = {**nanny.config, **user_start_method()}
        return self._supervise(nanny)

    def _supervise(self, server: WorkerServer) -> WorkerServer:
        if isinstance(server, SupervisedNanny):
            server.supervise(Supervision(self.policy, self.in_touch, self._report))
        return server

    def _external_name(self, name: str) -> str | int:
        return self.external_names.get(name, name)

    # -- starting, watching, ending ------------------------------------------------------------------------------------

    async def _start_all(
        self, specs: Mapping[str, WorkerSpec], batch: dict[str, _Worker], timeout: float
    ) -> tuple[dict[str, Failure], bool]:
        """Build and start workers and add them to `batch`; return problems of some, and whether all were only late."""
        failures: dict[str, Failure] = {}
        starts: dict[str, asyncio.Future[object]] = {}
        late: set[asyncio.Future[object]] = set()
        try:
            for worker in self._build(specs, failures):
                name = worker.name
                if self._closed:
                    failures[name] = "its agent ended meanwhile"
                    break
                batch[name] = self._workers[name] = worker
                starts[name] = asyncio.ensure_future(_ready(worker.server))
                late.add(starts[name])
                await asyncio.sleep(0)  # its process is made while the next is built
            if not failures and starts:
                _, late = await asyncio.wait(starts.values(), timeout=timeout)
        finally:
            # All of them, when this call is cancelled: also the errors of those that are done must be retrieved.
            for start in late:
                start.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if failures:
            return failures, False
        for name, start in starts.items():
            if start in late:
                failures[name] = f"had not joined {self.scheduler} after {timeout:g} s"
            elif error := start.exception():
                failures[name] = failure(error)
        return failures, len(late) == len(failures)

    async def _watch(self, worker: _Worker) -> None:
        await worker.server.finished()
        worker.problem = getattr(worker.server, "problem", None)
        if not worker.stopping:
            # Closed by the scheduler (Client.retire_workers, adaptive) or given up: not started again from here.
            self._report(worker.name)
            self._workers.pop(worker.name, None)

    async def _close(self, worker: _Worker, timeout: float) -> None:
        # A nanny kills its process itself, and at the latest after 1.8 times its timeout.
        close: Callable[..., Any] = worker.server.close
        arguments = {"timeout": timeout / 2} if _takes_timeout(close) else {}
        try:
            async with asyncio.timeout(timeout):
                await close(**arguments)
                if worker.ended is not None:
                    await asyncio.shield(worker.ended)
        except Exception as error:  # a user's class may raise anything; the others must be closed all the same
            logger.warning("Worker %s did not end in order: %s", worker.name, describe_error(error))
        if worker.ended is not None:
            worker.ended.cancel()
        self._workers.pop(worker.name, None)

    async def _discard(self, workers: Iterable[_Worker]) -> None:
        for worker in workers:
            worker.stopping = True
        await asyncio.gather(*(self._close(worker, DISCARD_TIMEOUT) for worker in workers))

    def _report(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is not None:
            self.on_change(worker.state())


async def _ready(server: WorkerServer) -> object:
    return await server


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """Note the warnings to users that a class gives in the block; they go to the log, and to the user himself."""
    noted: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        for category in (UserWarning, FutureWarning):
            warnings.simplefilter("always", category)
        yield noted
    texts = dict.fromkeys(f"{each.category.__name__}: {' '.join(str(each.message).split())}" for each in seen)
    noted += [text[:LONGEST_WARNING] for text in texts][:MOST_WARNINGS]
    for text in noted:
        logger.warning("%s", text)


def failure(error: BaseException) -> Failure:
    """Return why a worker did not start, with the exception of its own code where that can be passed on.

    Parameters
    ----------
    error
        The error of the start.
    """
    why, own = describe_error(error), own_error(error)
    if isinstance(own, AgentClusterError | TimeoutError):
        return why
    try:
        raised = pickled(own)
    except Exception:  # whatever an exception of a user's has in it
        return why
    return {"why": why, "raised": raised} if len(str(raised)) <= MOST_OF_AN_ERROR else why


def _takes_timeout(close: Callable[..., object]) -> bool:
    """Return whether a worker's ``close`` takes a timeout; SpecCluster, the home of user classes, never gives one."""
    parameters = inspect.signature(close).parameters
    return "timeout" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


# -- classes and their arguments ---------------------------------------------------------------------------------------


def resolve(cls: str | Mapping[str, str]) -> type[Any]:
    """Return the class that a worker spec names.

    Parameters
    ----------
    cls
        Import path of the class, or the pickled class.

    Raises
    ------
    ConfigError
        When it cannot be imported or is not a class.
    """
    try:
        found = import_term(cls) if isinstance(cls, str) else unpickled(cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import worker class {cls!r} here: {describe_error(error)}", key="cls") from error
    if not isinstance(found, type):
        raise ConfigError(f"{cls!r} is not a class but a {type(found).__name__}", key="cls")
    return found


def _check(spec: WorkerSpec) -> None:
    """Raise :class:`ConfigError` for a worker that could not be started here."""
    if spec.cls == CUDA_WORKER and spec.device is None:
        raise ConfigError(NO_DEVICE, key="cls")
    cls = resolve(spec.cls)
    allowed = modes.worker_keywords(cls)
    unknown = sorted(set(spec.options) - allowed) if allowed is not None else []
    if unknown:
        raise ConfigError(f"{cls.__name__} has no option {unknown[0]!r}; {suggest(unknown[0], allowed or ())}")


def _cuda_arguments(arguments: WorkerOptions) -> WorkerArguments:
    """Return arguments as CUDAWorker takes them: resources as text, the address in one piece and not in parts too."""
    changed = dict(arguments)
    _resolve_worker_class(changed)
    resources = changed.get("resources") or {}
    changed["resources"] = " ".join(f"{key}={value!r}" for key, value in resources.items()) or None
    if listen := changed.get("listen_address"):
        for part in ("host", "worker_port"):
            changed.pop(part, None)
        if changed.get("contact_address") == listen:
            del changed["contact_address"]
    return changed


def _resolve_worker_class(arguments: WorkerArguments) -> None:
    if isinstance(worker_class := arguments.get("worker_class"), str):
        arguments["worker_class"] = resolve(worker_class)


def _with_own_port(arguments: WorkerOptions, key: str) -> WorkerArguments:
    """Return arguments with the server's own port, given as `key`, under dask's name for it."""
    port, others = arguments.get(key), {k: v for k, v in arguments.items() if k not in (key, "nanny_port")}
    return others if port is None else {"port": port, **others}


# -- ports -------------------------------------------------------------------------------------------------------------


def assign_ports(options: WorkerOptions, names: Iterable[str], taken: set[int]) -> dict[str, dict[str, list[int]]]:
    """Assign ports from the configured ranges round-robin; no port is used twice.

    ``dask worker`` assigns them the same way to workers that start together.

    Parameters
    ----------
    options
        Options for every worker of a host, each of ``PORT_OPTIONS`` a port, a range such as ``"9000:9010"`` or None.
    names
        Names of the workers that start together.
    taken
        Ports that are in use or kept for others.

    Returns
    -------
    dict
        Worker name -> option -> its ports, in their order; without the options that have no port for the worker.
    """
    assigned: dict[str, dict[str, list[int]]] = {name: {} for name in names}
    ranges = {key: deque(_numbers(options, key)) for key in PORT_OPTIONS}
    seen = set(taken)
    while assigned and any(ranges.values()):
        for ports_of_worker in assigned.values():
            for key, ports in ranges.items():
                while ports and ports[0] in seen:
                    ports.popleft()
                if ports:
                    seen.add(ports[0])
                    ports_of_worker.setdefault(key, []).append(ports.popleft())
    return assigned


def ports_in_use(server: WorkerServer) -> set[int]:
    """Return the ports that a nanny and its worker, or a worker without one, listen at.

    Parameters
    ----------
    server
        The nanny or worker.
    """
    used = set()
    for address in (getattr(server, "_address", None), getattr(server, "worker_address", None)):
        with contextlib.suppress(ValueError):  # not started, or a protocol without ports
            used.add(get_address_host_port(address or "")[1])
    return used


def device_ports(options: WorkerOptions, specs: Iterable[WorkerSpec]) -> set[int]:
    """Return the ports of GPU workers; none where there are too few, which :func:`device_port` refuses.

    Parameters
    ----------
    options
        Options for every worker of a host.
    specs
        The GPU workers.
    """
    ports = _numbers(options, "worker_port")
    return {ports[spec.device] for spec in specs if spec.device is not None and spec.device < len(ports)}


def device_port(option: str | int, spec: WorkerSpec) -> int | None:
    """Return a GPU worker's own port.

    Parameters
    ----------
    option
        The range of ports for all devices.
    spec
        The GPU worker.

    Raises
    ------
    ConfigError
        When there are fewer ports than devices.
    """
    ports: Sequence[int | None] = parse_ports(option)
    if len(ports) < len(spec.devices):
        raise ConfigError(
            f"worker_port={option!r} has {len(ports)} ports for {len(spec.devices)} GPUs; give a range, such as "
            f"'9000:{8999 + len(spec.devices)}'",
            key="worker_port",
        )
    assert spec.device is not None
    return ports[spec.device]


def _numbers(options: WorkerOptions, key: str) -> list[int]:
    """Return the ports that were asked for by number."""
    return [port for port in parse_ports(options.get(key)) if port]
