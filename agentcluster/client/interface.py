"""Calls of users: they block or are coroutines, warn at the user's line, and raise errors without frames of ours.

A method is written once, as a coroutine function with the decorator :func:`synced`. Type checkers see the result itself
on an ``AgentCluster()``, and a coroutine on an ``AgentCluster(asynchronous=True)``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

from agentcluster.errors import AgentClusterError, in_short, is_machinery

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
    while frame is not None and frame.f_back is not None and is_machinery(frame):
        frame = frame.f_back
    assert frame is not None
    place = frame.f_globals
    registry = place.setdefault("__warningregistry__", {})
    return Place(frame.f_code.co_filename, frame.f_lineno, str(place.get("__name__", "")), registry)


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


def warn(message: str) -> None:
    """Warn of what happened in a call, with the line of the user's program that made it.

    Parameters
    ----------
    message
        The sentence.

    Warns
    -----
    UserWarning
        With the message.
    """
    place = _place.get() or callers_line()
    warnings.warn_explicit(message, UserWarning, place.file, place.line, place.module, place.registry)


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
            raise in_short(error) from error.__cause__


#: Calls that have begun and are not done; asyncio itself would forget those that nobody awaits.
_begun: set[asyncio.Future[Any]] = set()


def _under_way(call: Coroutine[Any, Any, object]) -> asyncio.Future[object]:
    """Begin a call now."""
    task = asyncio.ensure_future(call)
    _begun.add(task)
    task.add_done_callback(_begun.discard)
    return task
