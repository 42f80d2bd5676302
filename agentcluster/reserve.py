"""Hosts that a cluster may launch an agent on, and does not until their workers are needed (``standby=True``).

:class:`Reserve` knows them; :class:`Launching` has the cluster launch some while everything else goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from agentcluster.model import Hardware, from_wire

logger = logging.getLogger(__name__)

#: Seconds for which a host is left alone after a launch that failed, doubled for each further one.
RETRY = 10.0

#: Their most.
LONGEST_RETRY = 600.0


class Reserve:
    """Keeps hosts in the order in which they are launched; what is known of their hardware comes from earlier times.

    Parameters
    ----------
    launchers
        How an agent gets to each of them, an object with ``name``.
    """

    def __init__(self, launchers: Iterable[Any] = ()) -> None:
        self._launchers = {launcher.name: launcher for launcher in launchers}
        self._out: set[str] = set()
        self._hardware: dict[str, Hardware] = {}
        self._failures: dict[str, tuple[int, float]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._launchers

    @property
    def here(self) -> tuple[str, ...]:
        """Names of the hosts that are not launched, first those that never failed, then as they were given."""
        names = [name for name in self._launchers if name not in self._out]
        return tuple(sorted(names, key=lambda name: self._failures.get(name, (0, 0.0))))

    @property
    def out(self) -> tuple[str, ...]:
        """Names of those that are, or are just being."""
        return tuple(name for name in self._launchers if name in self._out)

    def add(self, launcher: Any) -> None:
        """Take one more host."""
        self._launchers[launcher.name] = launcher

    def forget(self, name: str) -> None:
        """Have a host no more."""
        self._launchers.pop(name, None)
        self._out.discard(name)

    def ready(self, now: float) -> dict[str, Hardware | None]:
        """Return the hosts that may be launched at a time (seconds) -> their hardware, None where it is unknown."""
        return {name: self._hardware.get(name) for name in self.here if self._failures.get(name, (0, 0.0))[1] <= now}

    def take(self, name: str) -> Any:
        """Return the launcher of a host that is to be launched."""
        self._out.add(name)
        return self._launchers[name]

    def failed(self, name: str, now: float) -> None:
        """Leave a host alone for a while, because its launch failed."""
        count = self._failures.get(name, (0, 0.0))[0] + 1
        self._failures[name] = count, now + min(RETRY * 2.0 ** min(count - 1, 32), LONGEST_RETRY)
        self._out.discard(name)

    def came(self, name: str, hardware: Mapping[str, Any]) -> None:
        """Remember what a launched host has, given as plain data."""
        self._failures.pop(name, None)
        self._hardware[name] = from_wire(Hardware, hardware, f"hardware of {name}")

    def back(self, name: str) -> None:
        """Have a host back whose agent has ended."""
        self._out.discard(name)


class Launching:
    """Launches hosts of a cluster's reserve in the background, and lets go of those that have no workers.

    Parameters
    ----------
    cluster
        The cluster.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._task: asyncio.Task[None] | None = None
        self._now: tuple[str, ...] = ()

    def hosts(self) -> dict[str, Hardware | None]:
        """Return the hosts that may come, those first that are being launched -> their hardware where it is known."""
        return {**dict.fromkeys(self._now), **self._cluster._reserve.ready(time.monotonic())}

    def begin(self, names: Sequence[str], then: Callable[[Sequence[str], Mapping[str, str]], Awaitable[None]]) -> None:
        """Launch hosts, unless some are being launched.

        Parameters
        ----------
        names
            The hosts.
        then
            Called with them, and with those that did not come -> why.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(names, then), name="agentcluster launches hosts in standby")

    async def _run(
        self, names: Sequence[str], then: Callable[[Sequence[str], Mapping[str, str]], Awaitable[None]]
    ) -> None:
        self._now = tuple(names)
        try:
            failed = await self._cluster._call_up(names)
        except Exception as error:  # whatever it is, it is said
            failed = dict.fromkeys(names, str(error) or type(error).__name__)
        finally:
            self._now = ()
        try:
            await then(names, failed)
        except Exception as error:  # the cluster was closed meanwhile
            logger.debug("Nobody hears what became of %s: %s", ", ".join(names), error)

    async def let_go(self) -> list[str]:
        """End agents of the reserve that have no workers; return the hosts."""
        if self._now or not self._cluster._extra():
            return []
        await self._cluster._refresh()
        gone: list[str] = await self._cluster._let_go()
        return gone
