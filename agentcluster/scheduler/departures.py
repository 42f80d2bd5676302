"""Workers that a change removed: answer what they still say until their processes end.

A worker is out of the scheduler some milliseconds before its process ends. What it says in between, a heartbeat or a
question for the whereabouts of keys, dask takes for a fault, and logs a warning or a traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.metrics import monotonic, time

#: Start of the stimulus of a worker that a change removes.
STIMULUS = "agentcluster-evacuate-"

#: Seconds for which a removed worker is answered; its agent ends its process much sooner.
LATE = 60.0


class Departures(SchedulerPlugin):
    """Keep the addresses of workers that changes removed, and answer their last messages.

    Parameters
    ----------
    scheduler
        The scheduler.
    """

    name = "agentcluster-departures"

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._removed: dict[str, float] = {}
        self._heartbeat: Callable[..., dict[str, Any]] = scheduler.handlers["heartbeat_worker"]
        self._refresh_who_has: Callable[..., None] = scheduler.stream_handlers["request-refresh-who-has"]

    def remove_worker(self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **facts: Any) -> None:
        """Note that a worker was removed.

        Parameters
        ----------
        scheduler, worker, stimulus_id, **facts
            As dask passes them.
        """
        now = monotonic()
        for address in [address for address, when in self._removed.items() if when < now - LATE]:
            del self._removed[address]
        if stimulus_id.startswith(STIMULUS):
            self._removed[worker] = now

    def is_late(self, address: str) -> bool:
        """Return whether a message is that of a worker which a change has removed.

        Parameters
        ----------
        address
            Address of the worker that sent it.
        """
        removed = self._removed.get(address)
        return removed is not None and address not in self.scheduler.workers and monotonic() < removed + LATE

    def heartbeat_worker(self, *, address: str, **facts: Any) -> dict[str, Any]:
        """Answer a heartbeat like ``Scheduler.heartbeat_worker``; a worker that was removed is not told to end.

        Parameters
        ----------
        address, **facts
            Arguments of ``Scheduler.heartbeat_worker``.

        Returns
        -------
        dict
            The answer of the scheduler; for a removed worker one that asks for no further heartbeat in time.
        """
        if self.is_late(address):
            return {"status": "OK", "time": time(), "heartbeat-interval": LATE}
        return self._heartbeat(address=address, **facts)

    def refresh_who_has(self, keys: Collection[Any], worker: str, stimulus_id: str) -> None:
        """Tell a worker where keys are, like the scheduler's handler; there is no connection to one that was removed.

        Parameters
        ----------
        keys, worker, stimulus_id
            As the worker sends them.
        """
        if worker in self.scheduler.stream_comms:
            self._refresh_who_has(keys=keys, worker=worker, stimulus_id=stimulus_id)
