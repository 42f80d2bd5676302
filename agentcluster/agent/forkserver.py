"""Warm forkserver that an agent's workers are forked from, and the start method built on it.

multiprocessing keeps one forkserver per process. Its environment is fixed when it starts, and by then it has imported
numpy, so variables that count only when a process starts or imports (``OMP_NUM_THREADS``, ``MALLOC_…``, ``LD_…``,
``PYTHON…``) cannot be given to a worker forked from it. This module starts the server early, with the right
environment, and offers dask a start method, ``agentcluster``, that forks a worker from that server unless the worker
needs one of those variables with another value: then it is spawned with it.

Only the standard library is imported here: an agent calls :func:`warm` before anything else.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.context
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import Queue

    #: Queue by which a worker's process and its nanny send each other messages.
    MessageQueue: TypeAlias = Queue[dict[str, object]]

METHOD = "agentcluster"

#: Greatest length, in bytes, of a folder in which multiprocessing can make a folder with a socket.
LONGEST = 107 - len("/pymp-12345678/listener-12345678")

#: Names of the commands that run an agent.
COMMANDS = ("dask-agent",)

#: Modules that distributed preloads into a forkserver, spelled out so that it can start before that is imported.
PRELOAD = ("distributed", "numpy", "pandas", "lz4")

#: Variables that are read when a process starts or when a library is first imported.
_START_TIME_PREFIXES = (
    "BLIS_",
    "DYLD_",
    "GLIBC_TUNABLES",
    "GOMP_",
    "GOTO_",
    "KMP_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "NUMEXPR_",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "VECLIB_",
)

_own_environ: ContextVar[Mapping[str, str] | None] = ContextVar("own_environ", default=None)
_made: ContextVar[list[MessageQueue] | None] = ContextVar("made", default=None)
_environ_lock = threading.RLock()
_server_environ: dict[str, str] | None = None


def available() -> bool:
    """Return whether this platform has a forkserver; where it has none, workers are spawned."""
    return "forkserver" in multiprocessing.get_all_start_methods()


def _short_socket_path() -> bool:
    """Have multiprocessing keep its sockets where their paths fit; return whether there is such a folder.

    A socket's path has at most 107 bytes, and ``$TMPDIR`` may have more.
    """
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    place = next((each for each in places if len(os.fsencode(each)) <= LONGEST and os.access(each, os.W_OK)), None)
    if place is None:
        return False
    before, tempfile.tempdir = tempfile.tempdir, place
    try:
        multiprocessing.util.get_temp_dir()  # made there for the whole life of this process, with mode 0700
    finally:
        tempfile.tempdir = before
    return True


def start_time_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that count only when a process starts.

    Parameters
    ----------
    environ
        Environment variables.
    """
    return {k: v for k, v in environ.items() if k.startswith(_START_TIME_PREFIXES)}


def warm(environ: Mapping[str, str], preload: Sequence[str] = PRELOAD) -> None:
    """Start the forkserver now, unless one runs.

    Parameters
    ----------
    environ
        Variables that the server, and so every worker forked from it, has from its first instruction on.
    preload
        Modules that the server imports once for all workers; those that are missing are left out.

    Notes
    -----
    Returns as soon as the process is started: the imports run beside the caller's own. The server ends by itself when
    this process and the last worker forked from it have ended.
    """
    global _server_environ
    if not available() or _server_environ is not None:
        return
    from multiprocessing import forkserver

    if not _short_socket_path():
        return
    _release_main()
    if forkserver._forkserver._forkserver_pid is not None:  # type: ignore[attr-defined]
        return  # another library's, with an unknown environment, so workers are spawned
    forkserver.set_forkserver_preload([*preload, "agentcluster.agent.forkserver_preload"])
    with environment(environ):
        forkserver.ensure_running()
        _server_environ = start_time_variables(os.environ)
    atexit.register(_kill_left)


def _release_main() -> None:
    """Keep the main module of this process, when it is a command of ours, from being imported again by each worker.

    multiprocessing has children import the main module of their parent, as they may be asked for what it defines.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None) or ""
    if os.path.basename(file) in COMMANDS or (spec is not None and spec.name.startswith("agentcluster.")):
        main.__spec__ = None
        vars(main).pop("__file__", None)


def pre_spawn_environ(configured: Mapping[str, object]) -> dict[str, str]:
    """Return the variables that dask sets before it starts a worker; those of this process take precedence.

    Parameters
    ----------
    configured
        ``distributed.nanny.pre-spawn-environ`` of dask's configuration; None there unsets a variable.
    """
    environ = {key: os.environ.get(key, str(value)) for key, value in configured.items() if value is not None}
    if environ.get("PYTHONHASHSEED") in (None, "0"):
        environ["PYTHONHASHSEED"] = "6640"  # the one that Nanny sets, so that all workers hash alike
    return environ


@contextlib.contextmanager
def environment(environ: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process within a block, then restore them.

    Processes inherit the environment at the moment they start, and multiprocessing has no other way to set it. The lock
    keeps two starts apart; the block must be short.

    Parameters
    ----------
    environ
        The variables.
    """
    with _environ_lock:
        before = {key: os.environ.get(key) for key in environ}
        os.environ.update(environ)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


@contextlib.contextmanager
def starting(environ: Mapping[str, str]) -> Iterator[list[MessageQueue]]:
    """Start processes that are created in this block, in this task, with their own environment.

    They are forked from the warm server where its start-time variables are the same, and spawned where they are not.

    Parameters
    ----------
    environ
        The variables.

    Yields
    ------
    list
        Filled with the queues that are made for the processes.
    """
    wanted = start_time_variables(environ)
    agrees = _server_environ is not None and all(_server_environ.get(k) == v for k, v in wanted.items())
    token = _own_environ.set(None if agrees else dict(environ))
    queues: list[MessageQueue] = []
    made = _made.set(queues)
    try:
        yield queues
    finally:
        _made.reset(made)
        _own_environ.reset(token)


def _revive() -> None:
    """Start the server again with its environment if it died; multiprocessing would do it with the present one."""
    from multiprocessing import forkserver

    with environment(_server_environ or {}):
        forkserver.ensure_running()


if available():

    class Process(multiprocessing.context.ForkServerProcess):
        """Process that is forked from the warm server, or spawned when it needs another environment."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # AsyncProcess starts the process in a thread of its own, where the context variable is not set.
            self.own_environ = _own_environ.get()

        @staticmethod
        def _Popen(process_obj: BaseProcess) -> Any:
            assert isinstance(process_obj, Process)
            if process_obj.own_environ is None:
                _revive()
                return multiprocessing.context.ForkServerProcess._Popen(process_obj)
            with environment(process_obj.own_environ):
                return multiprocessing.context.SpawnProcess._Popen(process_obj)

    class Context(multiprocessing.context.ForkServerContext):
        """Context of multiprocessing for the start method ``agentcluster``."""

        _name = METHOD
        Process = Process

        def Queue(self, maxsize: int = 0) -> MessageQueue:
            """Make a queue, and note it for the block of :func:`starting`.

            Parameters
            ----------
            maxsize
                Greatest number of messages; 0 for any.
            """
            queue: MessageQueue = super().Queue(maxsize)
            made = _made.get()
            if made is not None:
                made.append(queue)
            return queue


def _kill_left() -> None:
    """Kill the processes that are left; multiprocessing would send them SIGTERM, which workers outlive, and wait.

    The server that was warmed here is killed too: it would end by itself, but only after all of its imports.
    """
    from multiprocessing import forkserver

    children = multiprocessing.active_children()
    for process in children:
        if isinstance(process, Process):
            process.kill()
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if server is not None and _server_environ is not None and all(isinstance(each, Process) for each in children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def install() -> str | None:
    """Register the start method with multiprocessing.

    dask picks a start method by name (``distributed.worker.multiprocessing-method``), and multiprocessing has no
    public way to add one.

    Returns
    -------
    str or None
        The name of the method; None where there is no forkserver, or no folder for its socket.
    """
    if not available() or not _short_socket_path():
        return None
    contexts: dict[str, object] = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    if METHOD not in contexts:
        contexts[METHOD] = Context()
        atexit.register(_kill_left)
    return METHOD
