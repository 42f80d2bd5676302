"""Imports of an agent's process: nothing of the other processes, and nothing heavy before its forkserver runs.

And of its workers: they are forked with all that they need.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
from distributed import Client, Scheduler

from agentcluster.agent.forkserver import PRELOAD
from agentcluster.agent.nanny import DASHBOARD
from tests.support.programs import AGENT, Start
from tests.support.waiting import wait_until

#: Prints the modules that a forkserver has imported when it forks.
FORKSERVER = f"""
import importlib, json, sys
for name in {[*PRELOAD, DASHBOARD, "agentcluster.agent.forkserver_preload"]}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
print(json.dumps(sorted(sys.modules)))
"""

#: Prints the modules that are loaded at the moment at which the forkserver is warmed.
FIRST_PHASE = """
import json, sys
from agentcluster.agent import forkserver
from agentcluster.cli import launched

class Warmed(BaseException):
    pass

def warm(environ, preload):
    print(json.dumps(sorted(sys.modules)), flush=True)
    raise Warmed

forkserver.warm = warm
try:
    launched.main()
except Warmed:
    pass
"""


@functools.cache
def modules_after(code: str, stdin: str = "") -> set[str]:
    """Return the modules that a new process has loaded, which prints them as JSON."""
    done = subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def agent() -> set[str]:
    return modules_after("import json, sys, agentcluster.agent.agent; print(json.dumps(sorted(sys.modules)))")


@pytest.mark.parametrize("room", ["scheduler", "client", "launch", "cli"])
def test_agent_loads_no_other_process(agent: set[str], room: str) -> None:
    assert "agentcluster.agent.registration" in agent
    assert not [name for name in agent if name.startswith(f"agentcluster.{room}")]


def test_forkserver_is_warmed_before_distributed_is_imported() -> None:
    from agentcluster.launch.protocol import Settings

    settings = Settings(scheduler="tcp://127.0.0.1:1", name="n", pre_spawn={})
    loaded = modules_after(FIRST_PHASE, settings.encode() + "\n")
    assert "agentcluster.launch.protocol" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {"dask", "distributed", "numpy", "pandas", "tornado"}


#: Imported by bokeh when a page is first made.
BY_BOKEH = {"bokeh.application.handlers.document_lifecycle"}

#: Packages of which coverage.py, where it measures this suite, imports modules in each process.
BY_COVERAGE = {"coverage", "encodings"}


@pytest.mark.parametrize("command", [AGENT, ("-c", "from agentcluster.cli.dask_agent import main; main()")])
async def test_a_worker_imports_nothing_while_it_starts(
    scheduler: Scheduler, client: Client, start: Start, command: tuple[str, ...]
) -> None:
    # A variable that counts at the start: it is a new Python, and none that was forked.
    start(*command, scheduler.address, "--nworkers", "1", env={"PYTHONNODEBUGRANGES": "1"})
    await wait_until(lambda: scheduler.workers, 20)
    (loaded,) = (await client.run(eval, "sorted(__import__('sys').modules)")).values()
    assert "distributed.worker" in loaded
    assert "agentcluster.agent.forkserver" in loaded
    imported = set(loaded) - modules_after(FORKSERVER) - BY_BOKEH
    assert {name for name in imported if name.partition(".")[0] not in BY_COVERAGE} == set()
