"""Process that a launcher starts on a host: an agent, or a scheduler.

``python -m agentcluster.cli.launched`` reads one :class:`~agentcluster.launch.protocol.Settings` line from stdin,
prints one :class:`~agentcluster.launch.protocol.Ready` line on stdout, logs to stderr, and runs until stdin ends or
SIGTERM or SIGINT comes; then it stops its workers and exits with 0. On a signal the data of the workers is moved to
other nodes first, unless a second SIGINT comes; when stdin ends, the cluster is gone and its data with it. When the
process cannot start, it prints the reason in one line and exits with 1.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

    from distributed.security import Security

    from agentcluster.launch.protocol import Ready, Settings


def main() -> None:
    """Run the process, as the module's description says."""
    # Nothing heavy is imported before the forkserver runs, so that its imports run in parallel to those of this
    # process. And stdin is read from the start, so that the end of the launcher is noticed during the imports.
    stdin = _own_stdin()
    line = _read_line(stdin)
    if not line:
        sys.exit(0)
    from agentcluster.agent import forkserver
    from agentcluster.errors import AgentClusterError
    from agentcluster.launch.protocol import Settings

    try:
        settings = Settings.decode(line)
        os.environ.update(settings.environ)
        if settings.role == "agent":
            forkserver.warm(forkserver.pre_spawn_environ(settings.pre_spawn), _preload(settings.config))
        lifeline = threading.Event()
        threading.Thread(target=_watch, args=(stdin, lifeline), daemon=True, name="lifeline").start()
        _run(settings, lifeline)
    except (AgentClusterError, OSError, TimeoutError, ValueError) as error:
        _fail(str(error), error)
    except ImportError as error:
        _fail(f"{type(error).__name__}: {error}{_importer(error)}", error)
    except Exception as error:  # such as a TypeError from an option; the launcher shows the user the last line
        _fail(f"{type(error).__name__}: {error}", error)


def _own_stdin() -> int:
    """Return another descriptor of stdin, which no process inherits; stdin itself is empty from now on.

    A task's child that reads stdin would otherwise wait for the end of the cluster, and take what is for this process.
    """
    own, empty = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return own


def _read_line(descriptor: int) -> str:
    """Read a line; nothing else follows it but the end."""
    data = b""
    while b"\n" not in data and (read := os.read(descriptor, 65536)):
        data += read
    return data.decode()


def _preload(config: Mapping[str, object]) -> Sequence[str]:
    """Return the modules that the forkserver imports; the settings have them when they are not the defaults."""
    from agentcluster.agent import forkserver

    found: object = config
    for key in ("agentcluster", "forkserver", "preload"):
        found = found.get(key) if isinstance(found, dict) else None
    # A wrong value is refused with the rest of the configuration, once that can be imported.
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    return forkserver.PRELOAD


def _importer(error: ImportError) -> str:
    """Return where the import that failed was asked for."""
    import traceback

    frames = [each for each in traceback.extract_tb(error.__traceback__) if "importlib" not in each.filename]
    return f", imported at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _fail(why: str, error: Exception) -> NoReturn:
    """Print the reason in one line, and exit with 1."""
    print(" ".join(why.split()) or type(error).__name__, file=sys.stderr, flush=True)
    sys.exit(1)


def _watch(stdin: int, lifeline: threading.Event) -> None:
    """Set the event, and call the callbacks, when stdin ends."""
    while os.read(stdin, 65536):
        pass
    lifeline.set()
    for callback in _at_end:
        callback()


_at_end: list[Callable[[], object]] = []


def _run(settings: Settings, lifeline: threading.Event) -> None:
    """Set dask's configuration, and run the event loop."""
    import dask.config
    from distributed.compatibility import asyncio_run
    from distributed.config import get_loop_factory

    from agentcluster.agent.logs import log_to_stderr
    from agentcluster.wire import unpickled

    log_to_stderr()
    # The interpreter had started when these variables came, which processes that it starts see.
    given = [entry for entry in settings.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = dict.fromkeys([*given, *settings.path, *sys.path])
    dask.config.update(dask.config.config, unpickled(settings.config))
    asyncio_run(_serve(settings, lifeline), loop_factory=get_loop_factory())


async def _serve(settings: Settings, lifeline: threading.Event) -> None:
    """Run the server until it ends, stdin ends, or a signal comes."""
    import asyncio
    import signal

    from distributed.security import Security

    loop = asyncio.get_running_loop()
    ended, hurry = asyncio.Event(), asyncio.Event()

    def end(at_once: bool = False) -> None:
        if at_once:
            hurry.set()
        ended.set()

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_signal_handler(signal.SIGINT, lambda: end(at_once=ended.is_set()))
    _at_end.append(lambda: loop.call_soon_threadsafe(end, True))
    if lifeline.is_set():
        return
    server = _server(settings, Security(**settings.security))
    starting = asyncio.ensure_future(server)
    try:
        if not await _first(ended, starting):
            await _started(starting)
            if settings.role == "scheduler":
                from agentcluster.scheduler.plugin import dask_setup

                await dask_setup(server)
            sys.stdout.write(introduce(settings.role, server).encode() + "\n")
            sys.stdout.flush()
            if await _first(ended, asyncio.ensure_future(server.finished())) and settings.role == "agent":
                await server.retire(hurry)
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await server.close()


async def _started(starting: asyncio.Future[Any]) -> None:
    """Wait for the start of a server; raise the reason when it fails."""
    try:
        await starting
    except RuntimeError as error:
        # dask's servers hide the reason in "Scheduler failed to start".
        raise (error.__cause__ or error) from None


async def _first(ended: asyncio.Event, other: asyncio.Future[Any]) -> bool:
    """Wait for the end or for `other`; return whether the end has come."""
    import asyncio

    end = asyncio.ensure_future(ended.wait())
    await asyncio.wait({end, other}, return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    return ended.is_set()


def _server(settings: Settings, security: Security) -> Any:
    """Make the agent or the scheduler."""
    from agentcluster.wire import unpickled

    if settings.role == "agent":
        from agentcluster.agent.agent import Agent

        options = unpickled(settings.options)
        return Agent(settings.scheduler, name=settings.name, security=security, lasting=True, **options)
    from distributed import Scheduler

    return Scheduler(security=security, **unpickled(settings.options))


def introduce(role: str, server: Any) -> Ready:
    """Return the Ready line's content.

    Parameters
    ----------
    role
        Role of the process, as :class:`~agentcluster.launch.protocol.Settings` have it.
    server
        The agent or the scheduler, which has started.
    """
    from agentcluster.launch.protocol import Ready

    if role == "scheduler":
        return Ready(address=server.address, pid=os.getpid())
    return Ready(address=server.address, pid=os.getpid(), versions=server.hardware.versions, hardware=server.hardware)


if __name__ == "__main__":
    main()
