"""A process that has imported what commands import, and forks for each command that a test starts.

A program: it reads requests from stdin, each a JSON line with a module, its arguments, an environment, a directory and
the files that are its three streams. It answers ``{"pid": …}`` on stdout, and ``{"ended": pid, "code": …}`` when that
process has ended. A fork runs the module as ``python -m`` does; what is missing is the second that the imports take.
The forkserver that an agent starts is a fork of the agent, for the same reason; as it has the variables that count when
a process starts from here, the zygote has those that dask sets before it starts a worker.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing.forkserver
import multiprocessing.util
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import dask

from agentcluster.agent.forkserver import pre_spawn_environ

#: Modules that a zygote runs.
MODULES = (
    "agentcluster.cli.dask_agent",
    "agentcluster.cli.launched",
    "distributed.cli.dask_scheduler",
    "distributed.cli.dask_spec",
)


#: Modules that those import only in a process that is started, or that workers import.
IMPORTED = (
    "agentcluster.agent.agent",
    "agentcluster.scheduler.plugin",
    "distributed.dashboard.worker",
    "distributed.nanny",
    "numpy",
)


#: Flags with which a file is opened for output.
APPEND = os.O_CREAT | os.O_WRONLY | os.O_APPEND


class Forked:
    """A process that a zygote forked, with the calls of ``subprocess.Popen`` that tests use."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._zygote.ended.get(self.pid)

    def poll(self) -> int | None:
        """Return its exit code as far as it is known now."""
        self._zygote.read(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return its exit code once it has ended."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked command", timeout)
            self._zygote.read(0.1)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Zygote:
    """The process, for the tests that start commands."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.ended: dict[int, int] = {}
        # Nannies in this process may set the latter at any time.
        self._environ = pre_spawn_environ(dask.config.get("distributed.nanny.pre-spawn-environ")) | environ
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=self._environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def can_run(self, arguments: tuple[str, ...], environ: dict[str, str]) -> bool:
        """Whether a fork is as good as a new Python: some variables count at the start of a process only."""

        def counts(name: str) -> bool:
            return name.startswith(("LD_", "PYTHON", "MALLOC_")) and name != "PYTHONPATH"

        ours = {name: value for name, value in self._environ.items() if counts(name)}
        theirs = {name: value for name, value in environ.items() if counts(name)}
        return arguments[0] == "-m" and arguments[1] in MODULES and ours | theirs == ours

    def start(
        self,
        arguments: tuple[str, ...],
        environ: dict[str, str],
        directory: Path,
        streams: Sequence[str],
        session: bool = False,
        go: str | None = None,
    ) -> Forked:
        """Fork for a command, such as ``("-m", module, …)``.

        Parameters
        ----------
        arguments, environ, directory
            As for a new Python.
        streams
            Files that are stdin, stdout and stderr.
        session
            Whether it has a session of its own.
        go
            Text that it writes first, with its pid in place of ``$$``, and then waits for a line; None for neither.
        """
        request = {
            "arguments": arguments[1:],
            "environ": environ,
            "directory": str(directory),
            "streams": list(streams),
            "session": session,
            "go": go,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        while (pid := self.read(30)) is None:
            assert self._process.poll() is None
        return Forked(self, pid)

    def read(self, timeout: float) -> int | None:
        """Take answers as long as there are some; return the pid where one answers a request."""
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], timeout)[0]:
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, "the zygote has ended"
            *lines, self._rest = (self._rest + data).split(b"\n")
            found = None
            for answer in map(json.loads, lines):
                if "pid" in answer:
                    found = int(answer["pid"])
                    self.ended.pop(found, None)
                else:
                    self.ended[answer["ended"]] = answer["code"]
            if found is not None:
                return found
            timeout = 0
        return None

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _say(**answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _fork(request: dict[str, Any]) -> None:
    flags = (os.O_RDONLY, APPEND, APPEND)
    streams = [os.open(path, flag) for path, flag in zip(request["streams"], flags, strict=True)]
    pid = os.fork()
    if pid:
        for fd in streams:
            os.close(fd)
        _say(pid=pid)  # who waits for it may close the streams now
        return
    code = 1
    try:
        _become(request, streams)
        multiprocessing.util.spawnv_passfds = _start_helper
        module, *arguments = request["arguments"]
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _end(code)


def _become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Take on the streams, the environment and the directory of a new process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["session"]:
        os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    if request["go"] is not None:
        os.write(1, request["go"].replace("$$", str(os.getpid())).encode())
        while (read := os.read(0, 1)) != b"\n":
            if not read:
                os._exit(1)
    os.closerange(3, 256)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environ"])
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [request["directory"], *places, *(place for place in sys.path[1:] if place not in places)]
    dask.config.refresh(paths=dask.config._get_paths())


def _start_helper(path: str, arguments: list[str], fds: list[int]) -> int:
    """Start a process of multiprocessing as its ``spawnv_passfds`` does; a forkserver is a fork of this process."""
    code = arguments[-1]
    if "multiprocessing.forkserver" not in code or threading.active_count() > 1:
        return _spawn_helper(path, arguments, fds)
    if pid := os.fork():
        return pid
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for fd in set(range(3, 256)).difference(fds):
            with contextlib.suppress(OSError):
                os.close(fd)
        multiprocessing.forkserver._forkserver.__init__()  # type: ignore[attr-defined,misc]  # its lock is held
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


_spawn_helper = multiprocessing.util.spawnv_passfds


def _end(code: int) -> NoReturn:
    """End as a Python does that has run its main module."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    for module in (*MODULES, *IMPORTED):
        importlib.import_module(module)
    for module in MODULES:  # each is executed anew, as the main module
        del sys.modules[module]
    gc.collect()
    gc.freeze()
    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    rest = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 65536)
            while (ended := _reaped()) is not None:
                _say(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _fork(json.loads(line))


def _reaped() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


if __name__ == "__main__":
    main()
