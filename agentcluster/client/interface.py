"""Interface of a cluster to its users: calls that block or are coroutines, and arguments, parsed before all else.

Warnings point at the user's line, and errors have no frames behind it.

A method is written once, as a coroutine function with the decorator :func:`synced`. Type checkers see the result itself
on an ``AgentCluster()``, and a coroutine on an ``AgentCluster(asynchronous=True)``.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)

from agentcluster import modes
from agentcluster.client.calls import Plain
from agentcluster.errors import (
    MACHINERY,
    AgentClusterError,
    ConfigError,
    NodeNotFound,
    by_reason,
    in_short,
    printable,
    suggest,
)
from agentcluster.launch.protocol import Launcher
from agentcluster.model import Hardware, Mode
from agentcluster.modes.options import NANNY, RESERVED, check_keywords, known_keywords
from agentcluster.reports import Nodes, NodeSnapshot
from agentcluster.units import parse_seconds, split_address
from agentcluster.wire import from_wire, with_cause

# -- the user's line ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A line of the user's program, as warnings want it."""

    file: str
    line: int
    module: str
    registry: dict[Any, Any]


#: Line of the call that is under way.
_place: ContextVar[Place | None] = ContextVar("_place", default=None)


def callers_line() -> Place:
    """Return the innermost line that is neither of this package nor of dask."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None and _module(frame).partition(".")[0] in MACHINERY:
        frame = frame.f_back
    assert frame is not None
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    return Place(frame.f_code.co_filename, frame.f_lineno, _module(frame), registry)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


@contextlib.contextmanager
def at_line(place: Place) -> Iterator[None]:
    """Have warnings inside point at a line.

    Parameters
    ----------
    place
        The line.
    """
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of what happened in a call, with the line of the user's program that made it.

    Parameters
    ----------
    message
        The sentence.
    category
        Class of the warning.

    Warns
    -----
    Warning
        Of the category, with the message.
    """
    place = _place.get() or callers_line()
    warnings.warn_explicit(message, category, place.file, place.line, place.module, place.registry)


def warn_of_workers(nodes: Mapping[str, NodeSnapshot], names: Container[str] | None = None) -> None:
    """Pass on the warnings that the classes of workers gave on their hosts, each once with all nodes.

    Parameters
    ----------
    nodes
        Node name -> the node.
    names
        Names of the workers; default is all.
    """
    given = [
        (name, each)
        for name, node in nodes.items()
        for worker, state in node["workers"].items()
        if names is None or worker in names
        for each in state["warnings"]
    ]
    for category in dict.fromkeys(each.partition(": ")[0] for _, each in given):
        found: object = getattr(builtins, category, UserWarning)
        kind = found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
        own = dict.fromkeys((name, each.partition(": ")[2]) for name, each in given if each.startswith(f"{category}: "))
        for message in by_reason(own):
            warn(printable(message), kind)


def warn_of_options(given: Iterable[Mode]) -> None:
    """Warn of options of modes that have no future, as dask's own clusters do where they are given.

    Parameters
    ----------
    given
        The modes.
    """
    for message in filter(None, map(modes.outdated, given)):
        warn(message, FutureWarning)


# -- calls -------------------------------------------------------------------------------------------------------------

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)
Owner = TypeVar("Owner", bound="MaybeAsync[Any]")

if TYPE_CHECKING:
    import typing_extensions

    #: ``Literal[True]`` for asynchronous objects; ``bool`` where that is not known before the program runs.
    AsyncT = typing_extensions.TypeVar("AsyncT", Literal[True], Literal[False], bool, default=Literal[False])
else:
    AsyncT = TypeVar("AsyncT")


class MaybeAsync(Generic[AsyncT]):
    """Base of objects with :func:`synced` methods.

    Attributes
    ----------
    sync
        Runs a coroutine function in the cluster's event loop, see :class:`distributed.utils.SyncMethodMixin`.
    """

    sync: Callable[..., Any]

    def _check_open(self) -> None:
        """Raise ConfigError once calls can have no effect."""


class Synced(Protocol[P, T_co]):
    """Type of a :func:`synced` method."""

    @overload
    def __get__(self, instance: MaybeAsync[Literal[False]], owner: type) -> Callable[P, T_co]: ...
    @overload
    def __get__(self, instance: MaybeAsync[Literal[True]], owner: type) -> Callable[P, Coroutine[Any, Any, T_co]]: ...
    @overload
    def __get__(self, instance: MaybeAsync[bool], owner: type) -> Callable[P, T_co | Coroutine[Any, Any, T_co]]: ...


class Begun(Protocol[P, T_co]):
    """Type of a :func:`begun` method."""

    @overload
    def __get__(self, instance: MaybeAsync[Literal[False]], owner: type) -> Callable[P, T_co]: ...
    @overload
    def __get__(self, instance: MaybeAsync[Literal[True]], owner: type) -> Callable[P, Awaitable[T_co]]: ...
    @overload
    def __get__(self, instance: MaybeAsync[bool], owner: type) -> Callable[P, T_co | Awaitable[T_co]]: ...


def synced(method: Callable[Concatenate[Owner, P], Coroutine[Any, Any, T_co]]) -> Synced[P, T_co]:
    """Make a coroutine method block where its object is synchronous.

    Parameters
    ----------
    method
        A coroutine function of a :class:`MaybeAsync`.

    Returns
    -------
    function
        Returns the coroutine in the object's event loop and on asynchronous objects; otherwise waits for its result.
    """

    return cast("Synced[P, T_co]", _callable(method))


def begun(method: Callable[Concatenate[Owner, P], Coroutine[Any, Any, T_co]]) -> Begun[P, T_co]:
    """Make a coroutine method as :func:`synced` does, which on asynchronous objects begins at once, awaited or not.

    Parameters
    ----------
    method
        A coroutine function of a :class:`MaybeAsync`, which dask's own class of the object begins at once as well.

    Returns
    -------
    function
        Returns a task in the object's event loop and on asynchronous objects; otherwise waits for its result.
    """
    return cast("Begun[P, T_co]", _callable(method, begin=True))


def _callable(method: Callable[..., Coroutine[Any, Any, object]], begin: bool = False) -> Callable[..., object]:
    """Return what users call; one frame of it stays in the traceback of an error."""

    @functools.wraps(method)
    def call(self: Owner, /, *args: object, **kwargs: object) -> object:
        place = callers_line()
        try:
            self._check_open()
            result = self.sync(functools.partial(_shown, place, method, self, *args, **kwargs))
        except AgentClusterError as error:
            raise in_short(error) from error.__cause__
        return _under_way(result) if begin and inspect.iscoroutine(result) else result

    # Otherwise documentation would show an "async" method, whatever the cluster is.
    call.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    del call.__wrapped__
    return call


async def _shown(
    place: Place, method: Callable[P, Coroutine[Any, Any, T_co]], /, *args: P.args, **kwargs: P.kwargs
) -> T_co:
    """Run a call of the user's, with his line for warnings, and errors without the frames behind them."""
    with at_line(place):
        try:
            return await method(*args, **kwargs)
        except AgentClusterError as error:
            raise in_short(with_cause(error)) from error.__cause__


#: Calls that have begun and are not done; asyncio itself would forget those that nobody awaits.
_begun: set[asyncio.Future[Any]] = set()


def _under_way(call: Coroutine[Any, Any, object]) -> asyncio.Future[object]:
    """Begin a call now."""
    task = asyncio.ensure_future(call)
    _begun.add(task)
    task.add_done_callback(_begun.discard)
    return task


def at_border(function: Callable[P, T_co]) -> Callable[P, T_co]:
    """Make another function that users call raise errors of this package without the frames behind it.

    Parameters
    ----------
    function
        The function.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T_co:
        try:
            return function(*args, **kwargs)
        except AgentClusterError as error:
            raise in_short(error) from error.__cause__

    return call


# -- arguments ---------------------------------------------------------------------------------------------------------

#: Keyword arguments of all workers on a host that none of dask's classes has.
OF_HOSTS = frozenset({"worker_port", "nanny_port", "labels"})

#: Nodes by name, pattern, label or a function of what is known of them; None for all.
NodeSelection: TypeAlias = str | Sequence[str] | Callable[[NodeSnapshot], bool] | None


#: A mode by its name, or with its options.
AnyMode: TypeAlias = str | Mode

#: Returns the mode of a node, or its workers as mode ``spec`` takes them, for its hardware.
ModeFunction: TypeAlias = Callable[[Hardware], "AnyMode | Mapping[str, Any]"]


def parse_mapping(key: str, value: Plain | None) -> dict[str, Any]:
    """Return a copy of a mapping by text, such as ``worker_options``; empty for None.

    Parameters
    ----------
    key
        Name of the argument.
    value
        What was given.

    Raises
    ------
    ConfigError
        For anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key}={value!r} must be a mapping from names to values", key=key)
    return dict(value)


def parse_worker_options(value: Mapping[str, Plain] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse ``worker_options`` of a cluster.

    Parameters
    ----------
    value
        What was given.

    Returns
    -------
    options : dict
        Keyword arguments for every worker, whatever its mode.
    shape : dict
        Options of the first mode: ``nthreads`` and ``memory_limit``, which each mode decides.

    Raises
    ------
    ConfigError
        For a keyword that no worker of dask has, unless another class of worker is given.
    """
    options = parse_mapping("worker_options", value)
    known = (known_keywords(NANNY) or frozenset()) | OF_HOSTS
    for key in options:
        if key in RESERVED:
            raise ConfigError(f"worker_options: {key!r} cannot be set: {RESERVED[key]}", key="worker_options")
        if key not in known and options.get("worker_class") is None:
            raise ConfigError(f"worker_options: unknown option {key!r}; {suggest(key, known)}", key="worker_options")
    shape: dict[str, Any] = {key: options.pop(key) for key in ("nthreads", "memory_limit") if key in options}
    return check_keywords("worker_options", options), shape


def parse_scheduler_options(value: Mapping[str, Plain] | None) -> dict[str, Any]:
    """Parse ``scheduler_options`` of a cluster; whether the scheduler has a keyword is known when it is made.

    Parameters
    ----------
    value
        What was given.

    Returns
    -------
    dict
        Keyword arguments of the scheduler.

    Raises
    ------
    ConfigError
        For a value of another type than the keyword has.
    """
    return check_keywords("scheduler_options", parse_mapping("scheduler_options", value))


def parse_name(value: object) -> str | None:
    """Parse the name of a cluster.

    Parameters
    ----------
    value
        What was given.

    Raises
    ------
    ConfigError
        For anything but text that can be printed, or None.
    """
    if value is not None and not (isinstance(value, str) and value and value.isprintable()):
        raise ConfigError(f"name={value!r} must be text that can be printed", key="name")
    return value


def parse_flag(key: str, value: object) -> bool:
    """Parse a bool; "no" and 0 are none.

    Parameters
    ----------
    key
        Name of the argument.
    value
        What was given.

    Raises
    ------
    ConfigError
        For anything else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} must be True or False", key=key)
    return value


def parse_address(key: str, value: str) -> str:
    """Parse the address of a process that runs.

    Parameters
    ----------
    key
        Name of the argument.
    value
        What was given.

    Raises
    ------
    ConfigError
        When it has no protocol of dask's, no host, or no port.
    """
    try:
        usable = split_address(value)[1] > 0
    except (ValueError, TypeError):
        usable = value.startswith("inproc://")
    if not usable:
        raise ConfigError(f"{key}={value!r} is not the address of a scheduler, such as 'tcp://10.0.0.1:8786'", key=key)
    return value


def of_all_hosts(**options: object) -> dict[str, Any]:
    """Return the options of hosts that are the same for all, so that hosts that come later have them too.

    Parameters
    ----------
    **options
        Each a value for all hosts, a list with one for each of the first hosts, or None.

    Returns
    -------
    dict
        The options, with None in place of lists.
    """
    return {key: None if isinstance(value, list | tuple) else value for key, value in options.items()}


def refuse_spec(scheduler: object) -> None:
    """Refuse a scheduler as ``SpecCluster`` takes it, by its class.

    Parameters
    ----------
    scheduler
        Argument of the cluster.

    Raises
    ------
    ConfigError
        For a mapping; it names what to write instead.
    """
    if isinstance(scheduler, Mapping):
        raise ConfigError(
            "scheduler={'cls': …} is for dask's SpecCluster; write scheduler_options={…} for its options, or start one "
            "of another class by itself, and join it with scheduler='tcp://…'",
            key="scheduler",
        )


def launcher_at(scheduler: object, launchers: Iterable[Launcher]) -> object:
    """Return the launcher of the host that the scheduler is to be on, where it is one of the cluster's own.

    Parameters
    ----------
    scheduler
        Argument of the cluster.
    launchers
        Launchers of the cluster's hosts, with the options of each.

    Returns
    -------
    object
        The launcher, or the argument as it is.
    """
    if not isinstance(scheduler, str) or scheduler == "local" or "://" in scheduler:
        return scheduler
    return next((launcher for launcher in launchers if launcher.where == scheduler), scheduler)


#: Other keyword of dask's clusters -> what to write instead.
ELSEWHERE: Mapping[str, str] = {
    "n_workers": 'config={{"nworkers": {0}}}',
    "nworkers": 'config={{"nworkers": {0}}}',
    "threads_per_worker": 'config={{"nthreads": {0}}}',
    "nthreads": 'config={{"nthreads": {0}}}',
    "memory_limit": 'config={{"memory_limit": {0}}}',
    "host": 'hosts=… for machines, or scheduler_options={{"host": {0}}} for where the scheduler listens',
    "ip": 'scheduler_options={{"host": {0}}}',
    "scheduler_port": 'scheduler_options={{"port": {0}}}',
    "dashboard_address": 'scheduler_options={{"dashboard_address": {0}}}',
    "diagnostics_port": 'scheduler_options={{"dashboard_address": {0}}}',
    "worker_dashboard_address": 'worker_options={{"dashboard_address": {0}}}',
    "services": 'scheduler_options={{"services": {0}}}',
    "service_kwargs": 'scheduler_options={{"service_kwargs": {0}}}',
    "blocked_handlers": 'scheduler_options={{"blocked_handlers": {0}}}',
    "protocol": 'scheduler_options={{"protocol": {0}}}',
    "scheduler_kwargs": "scheduler_options={0}",
    "worker_kwargs": "worker_options={0}",
    "kwargs": "worker_options={0}",
    "worker": "hosts=[…] and mode=…: each host has an agent, which starts the workers of its mode",
    "workers": "hosts=[…] and mode=…: each host has an agent, which starts the workers of its mode",
    "worker_module": "nothing: an agent runs there",
    "worker_services": "nothing: workers have none",
    "processes": "nothing: workers are processes of their own",
    "start": "nothing: a cluster starts when it is made",
    "shutdown_scheduler": 'scheduler="tcp://…", for one that goes on',
}


def refuse_keywords(given: Mapping[str, object], own: Iterable[str]) -> None:
    """Refuse keywords that ``AgentCluster`` does not have, with what to write instead.

    Parameters
    ----------
    given
        The keywords and their values.
    own
        Keywords that it has.

    Raises
    ------
    ConfigError
        For keywords of dask's other clusters, all at once.
    TypeError
        For a name that none of them has.
    """
    of_workers = (known_keywords(NANNY) or frozenset()) | OF_HOSTS
    instead = []
    for key, value in given.items():
        if key not in ELSEWHERE and key not in of_workers:
            raise TypeError(f"AgentCluster() got an unexpected keyword argument {key!r}; {suggest(key, own)}")
        shown = repr(value) if isinstance(value, str | int | float | None) else "…"  # it may hold credentials
        how = ELSEWHERE.get(key, f'worker_options={{{{"{key}": {{0}}}}}}').format(shown)
        instead.append(f"{key}={shown}, write {how}")
    if instead:
        raise ConfigError(f"AgentCluster has other words for this: in place of {'; of '.join(instead)}")


def first_modes(
    mode: str | Mode | Mapping[str, str | Mode],
    config: Plain | str | None,
    names: Sequence[str],
    shape: Mapping[str, object] | None = None,
) -> tuple[Mode, dict[str, Mode]]:
    """Parse the first modes that a cluster is given.

    Parameters
    ----------
    mode
        Mode of all nodes, or node name -> mode.
    config
        Options of the mode of all nodes.
    names
        Names of the nodes.
    shape
        Options of each of these modes that it was not given.

    Returns
    -------
    default : Mode
        Mode of the nodes that have none by name.
    by_name : dict
        Node name -> mode.

    Raises
    ------
    ConfigError, NodeNotFound
        For a mode that cannot be used, or the name of no node.
    """
    for each in mode.values() if isinstance(mode, Mapping) else [mode]:
        if callable(each):
            raise ConfigError(
                f"mode={each!r}: a function cannot give the first mode, as the hardware is not known before the agents "
                f"run; write AgentCluster(…, mode='none'), and then cluster.reprovision(function)",
                key="mode",
            )
    if not isinstance(mode, Mapping):
        return _shaped(modes.parse(mode, config), shape), {}
    if not mode:
        raise ConfigError("mode={} names no node; give a mode for all, or one by the name of each", key="mode")
    for name in mode:
        if name not in names:
            raise NodeNotFound(str(name), names)
    if config is not None:
        raise ConfigError(
            "config= cannot be given with a mapping of modes; use Mode(name, config) as its values", key="config"
        )
    return Mode("auto-cpu"), {name: _shaped(modes.parse(each), shape) for name, each in mode.items()}


def _shaped(mode: Mode, shape: Mapping[str, object] | None) -> Mode:
    """Add options to a mode, unless it has them."""
    return modes.parse(mode.name, {**shape, **mode.config}) if shape else mode


def parse_workers(value: object, known: Mapping[str, Mapping[str, object]]) -> bool | list[str]:
    """Parse a choice of workers.

    Parameters
    ----------
    value
        What was given: whether all, or addresses and names of some.
    known
        Address of a worker -> what the scheduler says of it.

    Returns
    -------
    bool or list of str
        Whether all, or the addresses of those that were chosen.

    Raises
    ------
    ConfigError
        For a worker that there is not.
    """
    if isinstance(value, bool):
        return value
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ConfigError(f"workers={value!r} must be True, False, or a list of addresses or names", key="workers")
    addresses = {**{str(about.get("name")): address for address, about in known.items()}, **{a: a for a in known}}
    chosen = [str(each) for each in value]
    for each in chosen:
        if each not in addresses:
            raise ConfigError(f"there is no worker {each!r}; {suggest(each, addresses)}", key="workers")
    return [addresses[each] for each in chosen]


def parse_rollouts(
    known: Nodes,
    mode: AnyMode | ModeFunction | Mapping[str, AnyMode],
    config: Plain | str | None,
    nodes: NodeSelection,
    options: Mapping[str, object],
) -> Sequence[tuple[str | Sequence[str] | None, Mode]]:
    """Return the rollouts that a call of ``reprovision`` asks for.

    Parameters
    ----------
    known
        The nodes.
    mode, config, nodes, options
        As for :meth:`agentcluster.AgentCluster.reprovision`.

    Returns
    -------
    list of tuple
        Nodes, None for all, and their mode, for each rollout.

    Raises
    ------
    ConfigError
        For arguments that cannot be given together, or a selection of no node.
    """
    if not (nodes is None or callable(nodes) or _are_texts(nodes)):
        raise ConfigError(f"nodes={nodes!r} must be a name, a list of names, or a function of a node", key="nodes")
    if isinstance(nodes, Sequence) and not nodes:
        raise ConfigError(f"nodes={nodes!r} selects no node; leave it out for all of {', '.join(known)}", key="nodes")
    if isinstance(mode, Mapping):
        if nodes is not None:
            raise ConfigError("nodes= cannot be given with a mapping of modes: its keys are the nodes", key="nodes")
        if not mode or not _are_texts([*mode]):
            raise ConfigError(f"mode={mode!r} must have a mode by the name of each node to change", key="mode")
        return [([name], _with_options(modes.parse(each, config), options)) for name, each in mode.items()]
    if callable(nodes):
        chosen = [name for name, node in known.items() if nodes(node)]
        if not chosen:
            raise ConfigError(f"nodes={nodes!r} selects no node of {', '.join(known)}", key="nodes")
        nodes = chosen
    if not callable(mode):
        return [(nodes, _with_options(modes.parse(mode, config), options))]
    if config is not None or options:
        raise ConfigError("options cannot be given with a function as mode: it returns them too", key="config")
    return _of_function(mode, known, [nodes] if isinstance(nodes, str) else nodes)


def _of_function(mode: ModeFunction, known: Nodes, names: Sequence[str] | None) -> list[tuple[Sequence[str], Mode]]:
    """Return the rollouts that a function from hardware to a mode asks for, one for all nodes of the same mode."""
    found: list[tuple[list[str], Mode]] = []
    for name in known if names is None else names:
        if name not in known:
            raise NodeNotFound(name, known)
        result: object = mode(from_wire(Hardware, known[name]["hardware"]))
        if isinstance(result, Mapping):
            result = Mode("spec", {"spec": result} if "cls" in result else result)
        if not isinstance(result, str | Mode):
            raise ConfigError(
                f"mode={mode!r} returned {result!r} for node {name!r}; return a mode, or the workers as in mode spec",
                key="mode",
            )
        own = modes.parse(result)
        same = next((each for each, other in found if other == own), None)
        if same is None:
            found.append(([name], own))
        else:
            same.append(name)
    return [(each, own) for each, own in found]


def _are_texts(value: object) -> bool:
    """Return whether a value is text, or a list of texts."""
    return isinstance(value, str) or (
        isinstance(value, Sequence | set | frozenset) and all(isinstance(each, str) for each in value)
    )


def _with_options(mode: Mode, options: Mapping[str, object]) -> Mode:
    """Add options to a mode that it must not have already."""
    if twice := sorted(options.keys() & mode.config.keys()):
        raise ConfigError(f"option {twice[0]!r} of mode {mode.name!r} is given twice, in config= and as a keyword")
    return modes.parse(mode.name, {**mode.config, **options}) if options else mode


def parse_optional_seconds(
    key: str, value: str | float | None, zero: bool = False, call: str = "reprovision"
) -> float | None:
    """Parse an optional time.

    Parameters
    ----------
    key, value
        Name and value of the argument.
    zero
        Whether it may be 0.
    call
        Name of the call.
    """
    return None if value is None else parse_seconds(key, value, call=call, zero=zero)


def parse_timeout(key: str, value: str | float | None, default: float) -> float:
    """Parse an optional time of ``AgentCluster``.

    Parameters
    ----------
    key, value
        Name and value of the argument.
    default
        Seconds where it is None.
    """
    return default if value is None else parse_seconds(key, value, call="AgentCluster")
