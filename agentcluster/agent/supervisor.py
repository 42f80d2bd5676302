"""The workers of one host: started, watched, restarted and stopped under dask's own nannies.

:class:`Supervisor` is told what to run and makes it so; it decides nothing but when a crashed worker is started again.
It owns every nanny it made until that nanny is closed, and reports each change of a worker's state to a callback.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed import Nanny, Status
from distributed.comm.addressing import get_address_host_port
from distributed.nanny import WorkerProcess
from distributed.security import Security
from distributed.utils import import_term, parse_ports

from agentcluster import modes
from agentcluster.agent import forkserver
from agentcluster.agent.nanny import (
    METHOD_KEY,
    RestartPolicy,
    StartMethod,
    Supervised,
    plain_method,
    supervised,
    taken_over,
    tell_name,
    words,
)
from agentcluster.agent.options import PORT_OPTIONS
from agentcluster.errors import ConfigError, WorkerStartError, suggest
from agentcluster.model import WorkerSpec, WorkerState
from agentcluster.wire import unpickled

__all__ = ["CUDA_WORKER", "METHOD_KEY", "RestartPolicy", "StartMethod", "Supervisor", "resolve"]

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether a worker's process is ready; dask's own 0.05 are a tenth of a swap.
POLL = 0.01

#: What a server measures of its process and its event loop, 50 times a second. The agent does it, in the same process.
MEASURED_ONCE = ("tick", "ticks", "monitor")

CUDA_WORKER = "dask_cuda.CUDAWorker"
NO_DEVICE = "CUDAWorker is several workers, one per GPU; use mode 'auto-gpu', which starts each of them with its device"


@dataclass
class _Worker:
    """One worker that the supervisor answers for; `server` is a nanny, or whatever class the spec named."""

    name: str
    spec: WorkerSpec
    server: Any
    stopping: bool = False
    ready: bool = False
    ended: asyncio.Task[None] | None = None
    problem: str | None = None
    address: str | None = None

    def state(self) -> WorkerState:
        server = self.server
        crashes = len(getattr(server, "crashes", ()))
        process = getattr(server, "process", None)
        running = process is None or process.status is Status.running
        status: Any = "running" if running else "restarting"
        if not self.ready:
            status = "starting"
        if server.status in (Status.closed, Status.failed):
            status = "failed" if self.problem else "retired"
        if self.stopping:
            status = "stopping"
        # A worker without a nanny has its address, or an error in its place, before it is a worker.
        address = None if server.status is Status.init else getattr(server, "worker_address", None) or self.address
        return WorkerState(self.name, status, address, getattr(server, "pid", None), crashes, self.problem)


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
        When crashed workers are started again.
    on_change
        Called with a worker's new state.
    in_touch
        Whether the agent itself has its connection to the scheduler: then a worker that lost its own is started again.
    spelling
        Worker name -> what the scheduler is to know the worker by, where that is not the name itself but a number.
    """

    scheduler: str
    security: Security | None = None
    host_options: Mapping[str, Any] = field(default_factory=dict)
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    on_change: Callable[[WorkerState], None] = lambda state: None
    in_touch: Callable[[], bool] = lambda: False
    spelling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        WorkerProcess._init_msg_interval = POLL
        self._workers: dict[str, _Worker] = {}

    def states(self) -> tuple[WorkerState, ...]:
        """Return the state of every worker, in the order they were started."""
        return tuple(worker.state() for worker in self._workers.values())

    def check(self, specs: Mapping[str, WorkerSpec]) -> dict[str, str]:
        """Return, for each worker that could not be started here, why; touches nothing.

        Parameters
        ----------
        specs
            Worker name -> its settings.
        """
        refused = {}
        for name, spec in specs.items():
            try:
                if spec.cls == CUDA_WORKER and spec.device is None:
                    raise ConfigError(NO_DEVICE, key="cls")
                cls = resolve(spec.cls)
                allowed = modes.worker_keywords(cls)
                unknown = sorted(set(spec.options) - allowed) if allowed is not None else []
                if unknown:
                    raise ConfigError(
                        f"{cls.__name__} has no option {unknown[0]!r}; {suggest(unknown[0], allowed or ())}"
                    )
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

        Raises
        ------
        WorkerStartError
            When one fails or is late. Those that did start are stopped again before it is raised.
        """
        taken = sorted(set(specs) & set(self._workers))
        if taken:
            raise ConfigError(f"worker {taken[0]!r} already runs here")
        batch: dict[str, _Worker] = {}
        try:
            failures = await self._start_all(specs, batch, timeout)
        except BaseException:
            await self._discard(batch.values())
            raise
        if failures:
            await self._discard(batch.values())
            raise WorkerStartError("", failures)
        for worker in batch.values():
            worker.ready = True
            worker.ended = asyncio.create_task(self._watch(worker), name=f"watch {worker.name}")
            logger.info("Worker %s started at %s", worker.name, worker.state().address)
        return tuple(worker.state() for worker in batch.values())

    async def stop(self, names: Iterable[str], timeout: float) -> None:
        """Stop workers; returns when their processes have ended. Unknown names are those that ended already."""
        workers = [self._workers[name] for name in names if name in self._workers]
        for worker in workers:
            worker.stopping = True
        await asyncio.gather(*(self._close(worker, timeout) for worker in workers))

    async def rename(self, names: Mapping[str, str]) -> None:
        """Give workers other names, old name -> new name, also for when they are started again."""
        renamed = [worker for name, worker in self._workers.items() if name in names]
        for worker in renamed:
            worker.name = names[worker.name]
        self._workers = {worker.name: worker for worker in self._workers.values()}
        await asyncio.gather(*(tell_name(each.server, self.spelling.get(each.name, each.name)) for each in renamed))

    async def close(self, timeout: float) -> None:
        """Stop every worker."""
        await self.stop(list(self._workers), timeout)

    def _build(self, specs: Mapping[str, WorkerSpec], failures: dict[str, str]) -> Iterator[tuple[str, Any]]:
        """Yield each worker, built and not started; note in `failures` why one cannot be."""
        gpus = {name: spec for name, spec in specs.items() if spec.cls == CUDA_WORKER}
        ports = self._ports(specs, gpus)
        for name, spec in specs.items():
            if name not in gpus:
                try:
                    server = self._instance(name, spec, ports[name])
                except Exception as error:  # a user's class may raise anything from its constructor
                    failures[name] = words(error)
                else:
                    yield name, server
        if gpus:
            try:
                nannies = self._cuda_nannies(gpus)
            except Exception as error:  # as above: CUDAWorker passes on what NVML and RMM raise
                failures.update(dict.fromkeys(gpus, words(error)))
            else:
                yield from nannies.items()

    def _ports(self, specs: Mapping[str, WorkerSpec], gpus: Mapping[str, WorkerSpec]) -> dict[str, dict[str, Any]]:
        """Deal ports to workers without a GPU; those with one have each the port of its device."""
        taken = {port for worker in self._workers.values() for port in in_use(worker.server)}
        taken |= ports_of_devices(self.host_options, gpus.values())
        return dealt(self.host_options, [name for name in specs if name not in gpus], taken)

    def _arguments(self, name: str, spec: WorkerSpec, **more: Any) -> dict[str, Any]:
        arguments = {**self.host_options, **unpickled(spec.options), **more, "name": self.spelling.get(name, name)}
        if spec.nthreads is not None:
            arguments["nthreads"] = spec.nthreads
        if spec.memory_limit is not None:
            arguments["memory_limit"] = spec.memory_limit
        resources = {**(self.host_options.get("resources") or {}), **spec.resources}
        if resources:
            arguments["resources"] = resources
        if spec.env:
            arguments["env"] = dict(spec.env)
        if self.security is not None:
            arguments["security"] = self.security
        return arguments

    def _instance(self, name: str, spec: WorkerSpec, ports: Mapping[str, Any]) -> Any:
        cls = resolve(spec.cls)
        arguments = with_port(
            self._arguments(name, spec, **ports), "nanny_port" if issubclass(cls, Nanny) else "worker_port"
        )
        arguments.pop("listen_address", None)  # it is there in parts too
        allowed = modes.worker_keywords(cls)
        if allowed is not None:
            # Host options are for dask's workers; another class gets those of them that it knows.
            arguments = {k: v for k, v in arguments.items() if k in allowed or k not in self.host_options}
        if issubclass(cls, Nanny):
            cls = supervised(cls)
            if isinstance(worker_class := arguments.get("worker_class"), str):
                arguments["worker_class"] = resolve(worker_class)
            arguments["config"] = {**plain_method(), **(arguments.get("config") or {})}
        with forkserver.environment({}):  # a nanny reads the environment, which must not be that of a worker just then
            return self._adopt(cls(self.scheduler, **arguments))

    def _cuda_nannies(self, specs: Mapping[str, WorkerSpec]) -> dict[str, Any]:
        """Build dask-cuda's nannies, one per wanted device.

        CUDAWorker builds, unstarted, a nanny for each device that it sees in the environment, so it is shown one: then
        there are no others to close, and core affinity and device memory are those of this device. (Shown several, it
        takes those of device ``2 * i`` for the `i`-th: it rotates the list, then counts `i` on in it.)
        """
        from dask_cuda import CUDAWorker

        servers = {}
        for name, spec in specs.items():
            if spec.device is None:
                raise ConfigError(f"worker {name!r}: {NO_DEVICE}", key="cls")
            arguments = _for_cuda(with_port(self._arguments(name, spec), "nanny_port"))
            resources = arguments.pop("resources", {})
            env = arguments.pop("env", {})
            arguments["resources"] = " ".join(f"{key}={value!r}" for key, value in resources.items()) or None
            arguments.setdefault("memory_limit", 1 / len(spec.devices))
            if arguments.get("worker_port"):
                arguments["worker_port"] = port_of(arguments["worker_port"], spec)
            with forkserver.environment({"CUDA_VISIBLE_DEVICES": spec.devices[spec.device]}):
                [nanny] = CUDAWorker(self.scheduler, **arguments).nannies
            # CUDAWorker takes neither a nanny class nor environment variables.
            order = ",".join(spec.devices[spec.device :] + spec.devices[: spec.device])
            nanny.env = {**nanny.env, "CUDA_VISIBLE_DEVICES": order, "RAPIDS_NO_INITIALIZE": "True", **env}
            nanny.config = {**nanny.config, **plain_method()}
            servers[name] = self._adopt(taken_over(nanny))
        return servers

    def _adopt(self, server: Any) -> Any:
        if isinstance(server, Supervised):
            server.policy, server.in_touch = self.policy, self.in_touch
            server.crashes = []
            server.problem = None
            # Nanny would put these into this process's environment, under other workers that are being started; they
            # are in the forkserver's, and in its env.
            server.pre_spawn_env = {}  # type: ignore[attr-defined]
            for each in MEASURED_ONCE:
                server.periodic_callbacks.pop(each, None)  # type: ignore[attr-defined]
            server.changed = lambda: self._report(str(server.name))  # type: ignore[attr-defined]
        return server

    async def _start_all(
        self, specs: Mapping[str, WorkerSpec], batch: dict[str, _Worker], timeout: float
    ) -> dict[str, str]:
        """Build and start workers, which `batch` gets; return why some did not start."""
        failures: dict[str, str] = {}
        starts: dict[str, asyncio.Future[None]] = {}
        late: set[asyncio.Future[None]] = set()
        try:
            for name, server in self._build(specs, failures):
                batch[name] = self._workers[name] = _Worker(name, specs[name], server)
                starts[name] = asyncio.ensure_future(_ready(server))
                late.add(starts[name])
                await asyncio.sleep(0)  # its process is made while the next is built
            if not failures and starts:
                _, late = await asyncio.wait(starts.values(), timeout=timeout)
        finally:
            # All of them, when this call is cancelled: also the errors of those that are done have to be taken.
            for start in late:
                start.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if failures:
            return failures
        for name, start in starts.items():
            if start in late:
                failures[name] = f"had not joined {self.scheduler} after {timeout:g} s"
            elif error := start.exception():
                failures[name] = words(error)
        return failures

    async def _watch(self, worker: _Worker) -> None:
        await worker.server.finished()
        worker.problem = getattr(worker.server, "problem", None)
        if not worker.stopping:
            # Closed by the scheduler (Client.retire_workers, adaptive) or given up: not ours to start again.
            self._report(worker.name)
            self._workers.pop(worker.name, None)

    async def _close(self, worker: _Worker, timeout: float) -> None:
        # A nanny kills its process itself, and at the latest after 1.8 times its timeout.
        close = worker.server.close
        arguments = {"timeout": timeout / 2} if _takes_timeout(close) else {}
        try:
            async with asyncio.timeout(timeout):
                await close(**arguments)
                if worker.ended is not None:
                    await asyncio.shield(worker.ended)
        except Exception as error:  # a user's class may raise anything; the others must be closed all the same
            logger.warning("Worker %s did not end in order: %s", worker.name, words(error))
        if worker.ended is not None:
            worker.ended.cancel()
        self._workers.pop(worker.name, None)

    async def _discard(self, workers: Iterable[_Worker]) -> None:
        for worker in workers:
            worker.stopping = True
        await asyncio.gather(*(self._close(worker, 10.0) for worker in workers))

    def _report(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is not None:
            self.on_change(worker.state())


async def _ready(server: Any) -> None:
    await server


def resolve(cls: str | Mapping[str, str]) -> Any:
    """Return the class that a worker spec names.

    Raises
    ------
    ConfigError
        When it cannot be imported or is no class.
    """
    try:
        found = import_term(cls) if isinstance(cls, str) else unpickled(cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import worker class {cls!r} here: {words(error)}", key="cls") from error
    if not isinstance(found, type):
        raise ConfigError(f"{cls!r} is no class but {type(found).__name__}", key="cls")
    return found


def _takes_timeout(close: Callable[..., Any]) -> bool:
    """Whether a worker's ``close`` can be told its seconds; SpecCluster, whose workers these are, never does."""
    parameters = inspect.signature(close).parameters
    return "timeout" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _for_cuda(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments as CUDAWorker takes them: a class, and one place to listen, not that in parts too."""
    arguments = dict(arguments)
    if isinstance(worker_class := arguments.get("worker_class"), str):
        arguments["worker_class"] = resolve(worker_class)
    if listen := arguments.get("listen_address"):
        for part in ("host", "worker_port"):
            arguments.pop(part, None)
        if arguments.get("contact_address") == listen:
            del arguments["contact_address"]
    return arguments


def in_use(server: Any) -> set[int]:
    """Return the ports that a nanny and its worker, or a worker without one, listen at."""
    used = set()
    for address in (getattr(server, "_address", None), getattr(server, "worker_address", None)):
        with contextlib.suppress(ValueError):  # not started, or a protocol without ports
            used.add(get_address_host_port(address or "")[1])
    return used


def dealt(options: Mapping[str, Any], names: Iterable[str], taken: set[int]) -> dict[str, dict[str, list[int]]]:
    """Deal ranges of ports out to workers that start together, in turn and as ``dask worker`` does: none is for two.

    Parameters
    ----------
    options
        Options for every worker of a host, each of ``PORT_OPTIONS`` a port, a range such as ``"9000:9010"`` or None.
    names
        The workers.
    taken
        Ports that are not for them.

    Returns
    -------
    dict
        Worker -> those of them for which there are ports for it -> its ports, in their order.
    """
    shares: dict[str, dict[str, list[int]]] = {name: {} for name in names}
    ranges = {key: deque(_numbers(options, key)) for key in PORT_OPTIONS}
    seen = set(taken)
    while shares and any(ranges.values()):
        for share in shares.values():
            for key, ports in ranges.items():
                while ports and ports[0] in seen:
                    ports.popleft()
                if ports:
                    seen.add(ports[0])
                    share.setdefault(key, []).append(ports.popleft())
    return shares


def _numbers(options: Mapping[str, Any], key: str) -> list[int]:
    """Return the ports that were asked for by number."""
    return [port for port in parse_ports(options.get(key)) if port]


def with_port(arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """Return arguments with the port that is a server's own under dask's name for it."""
    port, others = arguments.get(key), {k: v for k, v in arguments.items() if k not in (key, "nanny_port")}
    return others if port is None else {"port": port, **others}


def ports_of_devices(options: Mapping[str, Any], specs: Iterable[WorkerSpec]) -> set[int]:
    """Return the ports that :func:`port_of` gives; where there are too few, none: it says so."""
    each = _numbers(options, "worker_port")
    return {each[spec.device] for spec in specs if spec.device is not None and spec.device < len(each)}


def port_of(ports: Any, spec: WorkerSpec) -> int | None:
    """Return a GPU worker's own port of those that were given for all devices."""
    each = parse_ports(ports)
    if len(each) < len(spec.devices):
        raise ConfigError(
            f"worker_port={ports!r} has {len(each)} ports for {len(spec.devices)} GPUs; give a range, such as "
            f"'9000:{8999 + len(spec.devices)}'",
            key="worker_port",
        )
    assert spec.device is not None
    return each[spec.device]
