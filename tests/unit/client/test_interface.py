"""Calls that block or return a coroutine: what a decorated method does, and what its caller and documentation see."""

from __future__ import annotations

import asyncio
import inspect
import traceback
import warnings
from typing import Any

import dask
import pytest

from agentcluster.client.interface import (
    MaybeAsync,
    begun,
    synced,
    warn,
)
from agentcluster.errors import ConfigError


class Doubler(MaybeAsync[bool]):
    """Runs coroutines to their end, as a synchronous cluster does, or hands them out."""

    def __init__(self, asynchronous: bool) -> None:
        self.sync = (lambda call: call()) if asynchronous else (lambda call: asyncio.run(call()))

    @synced
    async def double(self, number: int, *, plus: int = 0, **more: int) -> int:
        """Return twice a number."""
        if number < 0:
            raise ValueError(number)
        return 2 * number + plus + sum(more.values())

    @synced
    async def refuse(self) -> None:
        """Fail some calls down."""

        def inner() -> None:
            try:
                raise KeyError("x")
            except KeyError as error:
                raise ConfigError("x is not there; give y") from error

        await asyncio.sleep(0)
        inner()

    @begun
    async def mark(self, seen: list[str]) -> int:
        """Leave a mark, and warn of it."""
        warn("a mark was left")
        seen.append("mark")
        return len(seen)


def test_a_synchronous_object_waits() -> None:
    assert Doubler(False).double(2, plus=1, asynchronous=3, func=2, method=1, place=1) == 12
    with pytest.raises(ValueError, match="-1"):
        Doubler(False).double(-1)


async def test_an_asynchronous_object_returns_a_coroutine() -> None:
    call: Any = Doubler(True).double(2)
    assert inspect.iscoroutine(call)
    assert await call == 4


def test_documentation_sees_the_method_and_no_coroutine() -> None:
    method: Any = Doubler.double
    assert method.__doc__ == "Return twice a number."
    assert method.__qualname__ == "Doubler.double"
    assert not inspect.iscoroutinefunction(method)
    assert not hasattr(method, "__wrapped__")
    assert list(inspect.signature(method).parameters) == ["self", "number", "plus", "more"]
    assert list(inspect.signature(Doubler(True).double).parameters) == ["number", "plus", "more"]


async def test_a_call_that_dask_begins_at_once_begins_awaited_or_not() -> None:
    seen: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        call: Any = Doubler(True).mark(seen)
        await asyncio.sleep(0.01)
    assert seen == ["mark"]
    assert await call == 1
    assert [(str(each.message), each.filename) for each in warned] == [("a mark was left", __file__)]


def test_a_warning_points_at_the_line_of_the_call() -> None:
    with pytest.warns(UserWarning, match="a mark was left") as warned:
        assert Doubler(False).mark([]) == 1
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert [(each.filename, each.lineno) for each in warned] == [(__file__, line)]


def frames(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def test_an_error_has_no_frames_behind_the_call() -> None:
    with pytest.raises(ConfigError) as caught:
        Doubler(False).refuse()
    assert frames(caught.value) == ["test_an_error_has_no_frames_behind_the_call", "call"]
    assert caught.value.__cause__ is None
    shown = "".join(traceback.format_exception(caught.value)).splitlines()
    assert shown[-1] == "agentcluster.errors.ConfigError: x is not there; give y"
    assert len(shown) <= 6


async def test_nor_behind_an_awaited_call() -> None:
    with pytest.raises(ConfigError) as caught:
        await Doubler(True).refuse()
    assert len(frames(caught.value)) <= 3


def test_ipython_shows_the_sentence_first_and_the_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Doubler(False).refuse()
    sentence, place, line = caught.value._render_traceback_()
    assert sentence == "ConfigError: x is not there; give y"
    assert place.endswith(f"of {__file__}:")
    assert line.strip() == "Doubler(False).refuse()"


def test_debug_shows_all_frames() -> None:
    with dask.config.set({"agentcluster.debug": True}), pytest.raises(ConfigError) as caught:
        Doubler(False).refuse()
    assert frames(caught.value)[-1] == "inner"
    assert isinstance(caught.value.__cause__, KeyError)
    with dask.config.set({"agentcluster.debug": True}), pytest.raises(NotImplementedError):
        caught.value._render_traceback_()


def test_a_cause_of_the_users_own_stays() -> None:
    class TheirError(Exception):
        """Of a plugin, for example."""

    class Broken(Doubler):
        @synced
        async def refuse(self) -> None:
            """Fail by the user's code."""
            raise ConfigError("the plugin failed") from TheirError("at home")

    with pytest.raises(ConfigError) as caught:
        Broken(False).refuse()
    assert isinstance(caught.value.__cause__, TheirError)
    assert caught.value._render_traceback_()[-1] == "because of TheirError: at home"
