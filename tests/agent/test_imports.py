"""Imports of an agent's process: nothing of the other processes, and nothing heavy before its forkserver runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
