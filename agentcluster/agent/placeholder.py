"""A worker that works on nothing: it bears a name that a cluster manager tracks while its node has no other for it."""

from __future__ import annotations

from typing import Any

from distributed import Status, Worker


class Placeholder(Worker):
    """A worker that is paused from its first moment on: it gets no tasks, and no data by itself."""

    @property
    def status(self) -> Status:
        """What the worker says of itself."""
        return Worker.status.fget(self)  # type: ignore[no-any-return]

    @status.setter
    def status(self, value: Status) -> None:
        Worker.status.fset(self, Status.paused if value is Status.running else value)

    async def plugin_add(self, *plugin: Any, **more: Any) -> Any:
        """Set nothing up: what a plugin prepares is for tasks."""
        return {"status": "OK"}
