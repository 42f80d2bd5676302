"""How a call of the scheduler answers with one of our own errors."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from distributed.core import error_message

from agentcluster.errors import AgentClusterError

T = TypeVar("T")


def answered(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T | Any]]:
    """Send our own errors to the caller without a traceback in the scheduler's log: they are answers, not faults."""

    @functools.wraps(method)
    async def handler(self: Any, *args: Any, **kwargs: Any) -> T | Any:
        try:
            return await method(self, *args, **kwargs)
        except (AgentClusterError, TimeoutError) as error:
            return error_message(error, status="uncaught-error")

    return handler
