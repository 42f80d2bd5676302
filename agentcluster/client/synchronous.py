"""Calls that block on a synchronous cluster and return a coroutine on an asynchronous one, with types for both.

A method is written once, as a coroutine function with the decorator :func:`synced`. Type checkers see the result itself
on an ``AgentCluster()``, and a coroutine on an ``AgentCluster(asynchronous=True)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

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


class Synced(Protocol[P, T_co]):
    """Type of a :func:`synced` method."""

    @overload
    def __get__(self, instance: MaybeAsync[Literal[False]], owner: type) -> Callable[P, T_co]: ...
    @overload
    def __get__(self, instance: MaybeAsync[Literal[True]], owner: type) -> Callable[P, Coroutine[Any, Any, T_co]]: ...
    @overload
    def __get__(self, instance: MaybeAsync[bool], owner: type) -> Callable[P, T_co | Coroutine[Any, Any, T_co]]: ...


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

    @functools.wraps(method)
    def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> object:
        return self.sync(functools.partial(method, self, *args, **kwargs))

    # Otherwise documentation would show an "async" method, whatever the cluster is.
    call.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    del call.__wrapped__
    return cast("Synced[P, T_co]", call)
