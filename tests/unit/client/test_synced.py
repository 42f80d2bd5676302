"""Calls that block or return a coroutine: what a decorated method does, and what documentation sees of it."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from agentcluster.client.interface import MaybeAsync, synced


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


def test_a_synchronous_object_waits() -> None:
    assert Doubler(False).double(2, plus=1, asynchronous=3, func=4) == 12
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
