"""Runs agents as apps of Marathon, one app for each node: a launcher of one's own."""

import asyncio
import json
import uuid
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient

from agentcluster.launch.adopt import ManagedLauncher


class MarathonLauncher(ManagedLauncher):
    """Runs one agent; `app` has more keys of the app, such as cpus, mem, constraints or container."""

    def __init__(self, name: str, url: str, *, agent: str = "dask-agent", protocol: str = "tls", **app: Any):
        where = f"Marathon at {urlsplit(url).hostname} (app {name})"  # never with a password
        super().__init__(name, where, standby=app.pop("standby", False))
        self._api, self._protocol = f"{url}/v2", protocol
        command = f"exec {agent} --standby --listen-address {protocol}://$HOST:$PORT0"
        self._app = {"cmd": command, "cpus": 1, "mem": 1024, "portDefinitions": [{"port": 0}], **app}

    async def start(self) -> None:
        self._id = f"{self.name}-{uuid.uuid4().hex[:8]}"  # an app that is being deleted holds its id for a while
        await self._ask_for("POST", "/apps", {"id": self._id, "instances": 1, **self._app})

    async def address(self) -> str | None:
        app = (await self._ask_for("GET", f"/apps/{self._id}?embed=app.tasks&embed=app.lastTaskFailure"))["app"]
        if failure := app.get("lastTaskFailure"):
            raise RuntimeError(f"its task ended: {failure['message']}")
        running = [task for task in app["tasks"] if task["state"] == "TASK_RUNNING"]
        return f"{self._protocol}://{running[0]['host']}:{running[0]['ports'][0]}" if running else None

    async def stop(self) -> None:
        deployment = (await self._ask_for("DELETE", f"/apps/{self._id}"))["deploymentId"]
        while any(each["id"] == deployment for each in await self._ask_for("GET", "/deployments")):
            await asyncio.sleep(0.5)

    async def _ask_for(self, method: str, path: str, body: Any = None) -> Any:
        options = {} if body is None else {"body": json.dumps(body), "headers": {"Content-Type": "application/json"}}
        answer = await AsyncHTTPClient().fetch(self._api + path, method=method, raise_error=False, **options)
        if answer.code == 599:  # Tornado's own: no connection, no answer, or only a part of one
            raise answer.error if isinstance(answer.error, OSError) else TimeoutError(str(answer.error))
        if answer.code >= 400:
            raise RuntimeError(f"{method} /v2{path}: HTTP {answer.code}: {answer.body.decode(errors='replace')}")
        return json.loads(answer.body)
