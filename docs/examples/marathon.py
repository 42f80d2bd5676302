"""Runs agents as apps of Marathon, one app for each node: a launcher of one's own."""

import asyncio
import json
import logging
import uuid
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient, HTTPClientError

from agentcluster.errors import LaunchError, LaunchTimeout
from agentcluster.launch.attached import Adopted, AttachedLauncher
from agentcluster.launch.protocol import Settings

logger = logging.getLogger(__name__)


class MarathonLauncher:
    """Starts one agent; `app` has more keys of the app, such as cpus, mem, constraints or container."""

    def __init__(self, name: str, marathon: str, *, agent: str = "dask-agent", protocol: str = "tcp", **app: Any):
        self.name = name
        self.where = f"Marathon at {urlsplit(marathon).hostname} (app {name})"  # never with a password
        self._api, self._protocol = f"{marathon}/v2", protocol
        command = f"exec {agent} --standby --listen-address {protocol}://$HOST:$PORT0"
        self._app = {"cmd": command, "cpus": 1, "mem": 1024, "portDefinitions": [{"port": 0}], **app}

    async def launch(self, settings: Settings, *, timeout: float) -> "MarathonAgent":
        app = f"{self.name}-{uuid.uuid4().hex[:8]}"  # an app that is being deleted holds its id for a while
        creating = asyncio.create_task(self._ask("POST", "/apps", {"id": app, "instances": 1, **self._app}))
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(creating)
                agent = AttachedLauncher(await self._address(app), name=self.name)
                return MarathonAgent(self, app, await agent.launch(settings, timeout=timeout))
        except BaseException as error:
            [created] = await asyncio.gather(creating, return_exceptions=True)
            if not isinstance(created, LaunchError):
                await asyncio.shield(self.delete(app, timeout))
            if isinstance(error, TimeoutError):
                raise LaunchTimeout(self.where, f"no agent of it was ready within {timeout:g} s") from error
            raise

    async def _address(self, app: str) -> str:
        while True:
            known = (await self._ask("GET", f"/apps/{app}?embed=app.tasks&embed=app.lastTaskFailure"))["app"]
            if failure := known.get("lastTaskFailure"):
                raise LaunchError(self.where, f"its task ended: {failure['message']}")
            for task in known["tasks"]:
                if task["state"] == "TASK_RUNNING":
                    return f"{self._protocol}://{task['host']}:{task['ports'][0]}"
            await asyncio.sleep(0.5)

    async def delete(self, app: str, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                done = (await self._ask("DELETE", f"/apps/{app}"))["deploymentId"]
                while any(each["id"] == done for each in await self._ask("GET", "/deployments")):
                    await asyncio.sleep(0.5)
        except (LaunchError, TimeoutError) as error:
            logger.warning("App %s may still be there: %s", app, error or f"not gone within {timeout:g} s")

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        try:
            answer = await AsyncHTTPClient().fetch(self._api + path, method=method, body=content, headers=headers)
        except HTTPClientError as error:
            if error.code == 599:  # Tornado's own: no answer, or only a part of one
                raise TimeoutError(f"{method} /v2{path}: {error.message}") from error
            said = error.response.body.decode(errors="replace") if error.response else ""
            raise LaunchError(self.where, f"{method} /v2{path}: {error}", " ".join(said.split())[:300]) from error
        except OSError as error:
            raise LaunchError(self.where, f"it cannot be reached: {error}") from error
        return json.loads(answer.body)


class MarathonAgent:
    """The agent, adopted; closing it deletes its app."""

    def __init__(self, launcher: MarathonLauncher, app: str, agent: Adopted):
        self.ready, self.log, self.wait = agent.ready, agent.log, agent.wait
        self._launcher, self._app, self._agent = launcher, app, agent
        self._closing: asyncio.Task[None] | None = None

    async def close(self, timeout: float) -> None:
        self._closing = self._closing or asyncio.create_task(self._close(timeout))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        await self._agent.close(timeout)
        await self._launcher.delete(self._app, timeout)
