"""Run ``dask cuda worker`` and ``dask-agent`` as far as ``CUDAWorker``, and tell what it was given and what it made.

A program: it reads command lines from stdin, each a JSON list of which the first item is the command, and answers each
with one JSON line on stdout. dask-cuda is the real one; its constructor does its work, and then the command is made to
fail, so that no worker is started. Each command line is run in a fork, since constructors change dask's configuration
and the environment; imports, which take most of the time, are done once.
"""

from __future__ import annotations

import faulthandler
import functools
import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask_cuda.cli
from dask_cuda import CUDAWorker
from distributed.security import Security

from agentcluster.agent import forkserver
from agentcluster.cli import dask_agent as agent

#: Seconds for a command; then it says where it stands, and ends.
DEADLINE = 40

COMMANDS = {"dask-agent": agent.main, "dask cuda worker": dask_cuda.cli.worker}


class SeenError(Exception):
    """Ends a command once it was seen what it would start."""


def plain(value: Any) -> Any:
    """Return a value as JSON can have it, with what its objects hold where they are settings."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, type):
        return f"<class {value.__module__}.{value.__qualname__}>"
    if isinstance(value, Security):
        return {key: plain(getattr(value, key)) for key in Security.__slots__}
    if type(value).__module__ == "dask_cuda.plugins":
        return {type(value).__name__: plain(vars(value))}
    return f"<{type(value).__qualname__}>"


def record(answer: Path) -> None:
    """Have the next ``CUDAWorker`` of this process described in a file."""
    construct = CUDAWorker.__init__

    @functools.wraps(construct)  # dask-agent asks for the signature
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(construct).bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = {key: value for key, value in bound.arguments.items() if key != "self"}
        found: dict[str, Any] = {"arguments": plain({**arguments.pop("kwargs"), **arguments})}
        try:
            construct(self, *args, **kwargs)
        except Exception as error:  # what it would say to its user
            found["error"] = f"{type(error).__name__}: {error}"
        else:
            found["nannies"] = [plain(vars(nanny)) for nanny in self.nannies]
        found["pid files"] = [file.read_text() == str(os.getpid()) for file in Path.cwd().glob("*.pid")]
        answer.write_text(json.dumps(found))
        raise SeenError

    CUDAWorker.__init__ = constructed


def run(command: str, arguments: list[str], directory: Path) -> dict[str, Any]:
    """Run a command in a fork; return what was seen, or what it said when it came to nothing."""
    answer, log = directory / "answer", directory / "log"
    child = os.fork()
    if child == 0:
        try:
            file = os.open(log, os.O_CREAT | os.O_WRONLY)
            for standard in (1, 2):
                os.dup2(file, standard)
            faulthandler.dump_traceback_later(DEADLINE, exit=True, file=file)
            os.chdir(directory)
            record(answer)
            COMMANDS[command].main(arguments, prog_name=command)
        except BaseException:
            traceback.print_exc()
        finally:
            forkserver._kill_left()  # as at the exit of an agent's process
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
    if answer.exists():
        return dict(json.loads(answer.read_text().replace(str(directory), "here")))
    return {"said": log.read_text()}


def main() -> None:
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="recorder-") as directory:
            print(json.dumps(run(command, arguments, Path(directory))), flush=True)


if __name__ == "__main__":
    main()
