"""Commands of dask and of ours as the processes that users start, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.waiting import wait_until
from tests.support.zygote import Forked, Zygote

ROOT = Path(__file__).parents[2]

#: Configuration of dask without what each process measures of itself, 50 times a second: a test does not look at it,
#: and a worker that waits takes a fifth of the time.
CALM: dict[str, object] = {
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.admin.tick.interval": "500ms",
    "distributed.worker.profile.enabled": False,
}

#: The same, as environment variables.
CALM_ENVIRON = {f"DASK_{key.replace('.', '__').replace('-', '_').upper()}": str(value) for key, value in CALM.items()}

AGENT = ("-m", "agentcluster.cli.dask_agent")
SCHEDULER = ("-m", "distributed.cli.dask_scheduler")

#: dask's scheduler where agentcluster is not installed: neither from the checkout nor as what pip installed.
SCHEDULER_WITHOUT = (
    "-c",
    "import os, sys\n"
    "sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p or '.', 'agentcluster'))]\n"
    "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
    "from importlib.util import find_spec\n"
    "assert find_spec('agentcluster') is None\n"
    "from distributed.cli.dask_scheduler import main\n"
    "main()\n",
)

#: The same, where it cannot be imported in any way.
SCHEDULER_AGAINST = (
    "-c",
    "import sys; sys.modules['agentcluster'] = None; from distributed.cli.dask_scheduler import main; main()",
)


@dataclass
class Program:
    """A process that a test started; all it writes goes to a file."""

    popen: subprocess.Popen[bytes] | Forked
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def output(self) -> str:
        """Return what it wrote so far."""
        return self.log.read_text()

    def children(self) -> list[psutil.Process]:
        """Return its whole process tree, without itself."""
        return psutil.Process(self.pid).children(recursive=True)

    def kill(self, number: int = signal.SIGKILL) -> list[psutil.Process]:
        """Send a signal; return the process tree of that moment, itself included; empty where it has just ended."""
        try:
            tree = [psutil.Process(self.pid), *self.children()]
        except psutil.NoSuchProcess:
            return []
        self.popen.send_signal(number)
        return tree

    async def ended(self, timeout: float = 15.0) -> int:
        """Return its exit code once it has ended by itself."""
        await wait_until(lambda: self.popen.poll() is not None, timeout)
        code = self.popen.returncode
        assert code is not None
        return code

    async def says(self, text: str, timeout: float = 15.0) -> str:
        """Return the first line with `text` in it once it is there."""

        def line() -> str | None:
            assert self.popen.poll() is None, self.output()
            return next((each for each in self.output().splitlines() if text in each), None)

        return str(await wait_until(line, timeout))


Start = Callable[..., Program]


@contextmanager
def programs(directory: Path, zygote: Zygote | None = None) -> Iterator[Start]:
    """Yield a function that starts Python with arguments, and kill what of it is left at the end.

    Parameters
    ----------
    directory
        The programs' directory, and that of their logs.
    zygote
        Forks for the commands that it has imported.
    """
    started: list[Program] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> Program:
        log = directory / f"program-{len(started)}.log"
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_"))}
        environ |= {"PYTHONPATH": str(ROOT), **CALM_ENVIRON, **(env or {})}
        words = tuple(map(str, arguments))
        popen: subprocess.Popen[bytes] | Forked
        if zygote is not None and zygote.can_run(words, environ):
            log.touch()
            popen = zygote.start(words, environ, directory, (os.devnull, str(log), str(log)))
        else:
            with log.open("wb") as file:
                popen = subprocess.Popen(
                    [sys.executable, *words],
                    env=environ,
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                )
        started.append(Program(popen, log))
        return started[-1]

    try:
        yield start
    finally:
        for program in reversed(started):
            if program.popen.poll() is None:
                for process in program.kill():
                    try:
                        process.kill()
                    except psutil.NoSuchProcess:
                        continue
            program.popen.wait(10)


async def start_scheduler(
    start: Start, directory: Path, *arguments: str, command: tuple[str, ...] = SCHEDULER
) -> tuple[Program, str]:
    """Start dask's scheduler on any free port; return it and its address."""
    file = directory / "scheduler.json"
    fixed = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    program = start(*command, *fixed, *arguments)

    def address() -> str | None:
        assert program.popen.poll() is None, program.output()
        try:
            return str(json.loads(file.read_text())["address"])
        except (OSError, ValueError):
            return None

    return program, await wait_until(address, 15)


async def gone(processes: list[psutil.Process], timeout: float = 5.0) -> None:
    """Wait until none of the processes runs."""
    await wait_until(lambda: not [p for p in processes if _runs(p)], timeout)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
