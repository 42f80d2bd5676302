"""Waiting for a condition, with and without an event loop."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest

#: Seconds between two looks at something that is waited for.
INTERVAL = 0.02


async def wait_until(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Return the first true value of `predicate`, while the event loop goes on.

    Parameters
    ----------
    predicate
        Asked again and again until what it returns, awaited where that is needed, is true.
    timeout
        Seconds until the test fails.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await asyncio.wait_for(value, max(INTERVAL, deadline - time.monotonic()))
        if value:
            return value
        _check(predicate, deadline, timeout)
        await asyncio.sleep(INTERVAL)


def wait_blocking(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Do what :func:`wait_until` does, for a test without an event loop."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        _check(predicate, deadline, timeout)
        time.sleep(INTERVAL)
    return value


def _check(predicate: Callable[[], Any], deadline: float, timeout: float) -> None:
    __tracebackhide__ = True
    if time.monotonic() >= deadline:
        pytest.fail(f"still not true after {timeout:g} s: {inspect.getsource(predicate).strip()}")
