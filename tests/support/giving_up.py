"""Cluster managers that give workers up, without waiting until they do.

A SpecCluster, and whatever derives from it, looks some time after a worker has gone (``lost-worker-timeout``) whether
another one bears its name, and closes the job where none does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dask
import pytest

#: The function in which a SpecCluster looks for a worker that has gone.
LOOK = "SpecCluster._update_worker_status.<locals>.f"


class GivingUp:
    """The looks that managers of a test have set, which come when the test says so and not by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._looks: list[Callable[[], Any]] = []
        call_later = asyncio.BaseEventLoop.call_later

        def kept(loop: Any, delay: float, callback: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(callback, "__qualname__", "") == LOOK:
                self._looks.append(callback)
            return call_later(loop, delay, callback, *args, **kwargs)

        monkeypatch.setattr(asyncio.BaseEventLoop, "call_later", kept)
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})

    def looks(self, least: int = 1) -> None:
        """Have the managers look for all workers that have gone so far.

        Parameters
        ----------
        least
            Number of looks that there must be; fewer mean that a manager has not heard yet, or that dask has changed.
        """
        found, self._looks = self._looks, []
        assert len(found) >= least
        for look in found:
            look()


@pytest.fixture
def giving_up(monkeypatch: pytest.MonkeyPatch) -> GivingUp:
    """The looks of managers for workers that have gone."""
    return GivingUp(monkeypatch)
