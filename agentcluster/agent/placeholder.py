"""Worker that takes no tasks: it keeps a name that a cluster manager tracks while no other worker has it."""

from __future__ import annotations

from distributed import Status, Worker
from distributed.core import OKMessage


class Placeholder(Worker):
    """Worker that is paused from the start: the scheduler gives it neither tasks nor data."""

    @property
    def status(self) -> Status:
        """The worker's status: ``paused`` in place of ``running``."""
        return Worker.status.fget(self)  # type: ignore[no-any-return]

    @status.setter
    def status(self, value: Status) -> None:
        Worker.status.fset(self, Status.paused if value is Status.running else value)

    async def plugin_add(self, *plugin: object, **options: object) -> OKMessage:
        """Set nothing up: plugins prepare workers for tasks.

        Parameters
        ----------
        *plugin, **options
            Not used.
        """
        return {"status": "OK"}
