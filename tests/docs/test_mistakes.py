"""The page of common mistakes shows what is really printed: the sentence, the user's line, and little else.

``python -m tests.docs.test_mistakes`` writes the page anew.
"""

from __future__ import annotations

import linecache
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask
import pytest
from distributed import Client

from agentcluster import AgentCluster
from agentcluster.errors import AgentClusterError
from tests.support.documents import ROOT
from tests.support.programs import CALM_ENVIRON

PAGE = ROOT / "docs" / "mistakes.rst"

#: Most lines of an error, in a terminal and in a notebook.
MOST = 6, 4


@dataclass(frozen=True)
class Mistake:
    """What somebody wrote: a title, and the line."""

    title: str
    code: str


#: On a machine with two cores and no GPU; ``cluster`` is ``AgentCluster()``, ``client`` is its Client.
PYTHON = [
    Mistake("Keywords of LocalCluster", 'AgentCluster(n_workers=4, threads_per_worker=1, memory_limit="4GB")'),
    Mistake("A number where the hosts belong", "AgentCluster(4)"),
    Mistake("Hosts in one text", 'AgentCluster("gpu-1, gpu-2")'),
    Mistake("A host that is not there", 'AgentCluster(["no-such-host.invalid"])'),
    Mistake("A scheduler without a port", 'AgentCluster(scheduler="tcp://10.0.0.5")'),
    Mistake("A mode that does not exist", 'AgentCluster(mode="gpu")'),
    Mistake("Memory without a unit", 'AgentCluster(config={"memory_limit": 4})'),
    Mistake("An option of no worker", 'AgentCluster(worker_options={"nthread": 2})'),
    Mistake("A folder without credentials", 'AgentCluster(security="certificates")'),
    Mistake("A misspelt argument", 'AgentCluster(host=["gpu-1"])'),
    Mistake("A misspelt mode", 'cluster.reprovision("unifrom")'),
    Mistake("A misspelt option of a mode", 'cluster.reprovision("uniform", nworker=2)'),
    Mistake("More threads than cores", 'cluster.reprovision("uniform", nthreads=64)'),
    Mistake("GPUs where there are none", 'cluster.reprovision("auto-gpu")'),
    Mistake("A node that is not there", 'cluster.reprovision("uniform", nodes="gpu-1")'),
    Mistake("A label that no node has", 'cluster.reprovision("uniform", nodes="rack=a")'),
    Mistake("A word that is not among the choices", 'cluster.reprovision("uniform", drain="none")'),
    Mistake("A time that is none", 'cluster.reprovision("uniform", timeout="5 potatoes")'),
    Mistake("No place for the data", 'cluster.reprovision("none")'),
    Mistake("A number as text", 'cluster.scale("4")'),
    Mistake("A kind of worker that no node can have", "cluster.scale(gpus=2)"),
    Mistake("Limits as positions", "cluster.adapt(0, 10)"),
    Mistake("Limits the wrong way round", "cluster.adapt(minimum=5, maximum=2)"),
    Mistake("A host that is not in the cluster", 'cluster.remove_host("gpu-1")'),
    Mistake("A request without adapt", "with cluster.request(gpu=1): pass"),
    Mistake("A cluster that is closed", "closed.scale(2)"),
]
COMMANDS = [
    Mistake("No scheduler is named", "dask-agent"),
    Mistake("A mode that does not exist", "dask-agent tcp://10.0.0.5:8786 --mode gpu"),
    Mistake("Two ways to say one thing", "dask-agent tcp://10.0.0.5:8786 --standby"),
    Mistake("No scheduler is there", "agentcluster nodes --scheduler tcp://127.0.0.1:1"),
    Mistake("A misspelt command", "agentcluster reprovison uniform"),
]

INTRODUCTION = """Common mistakes
===============

What is printed for each: the sentence, and the line that was written. In a terminal Python prints the sentence last, in
a notebook it comes first. ``agentcluster.debug: true`` in dask's configuration shows all frames of an error, those of
agentcluster and of dask too.

This page is written by ``python -m tests.docs.test_mistakes`` on a machine with two cores and no GPU, and a test
compares it with what is printed.
"""


def printed(mistake: Mistake, names: dict[str, Any]) -> tuple[str, str]:
    """Make a mistake in Python; return what a terminal and a notebook show."""
    linecache.cache["work.py"] = (len(mistake.code), None, [mistake.code + "\n"], "work.py")
    try:
        exec(compile(mistake.code, "work.py", "exec"), {"__name__": "__main__", "AgentCluster": AgentCluster, **names})
    except (AgentClusterError, TypeError) as error:
        link = error.__traceback__
        while link is not None and link.tb_frame.f_code.co_filename != "work.py":
            link = link.tb_next
        terminal = traceback.format_exception(type(error), error.with_traceback(link), link)
        if isinstance(error, AgentClusterError):
            notebook = error._render_traceback_()
        else:
            notebook = [f"{type(error).__name__}: {error}"]
        return plain("".join(terminal)), plain("\n".join(notebook))
    raise AssertionError(f"{mistake.code} was accepted")


def plain(text: str) -> str:
    """Leave out what differs between machines, and marks below a line, which Python has from 3.11 and not alike."""
    text = re.sub(r'File "[^"]*/(agentcluster/[^"]*)", line \d+', r'File "…/\1", line …', text.rstrip())
    text = re.sub(r"the node, which has \d+ cores", "the node, which has 2 cores", text)
    text = re.sub(r"cluster '[0-9a-f]{8}'", "cluster '0b0c5db3'", text)
    text = re.sub(r"\(NVIDIA's driver[^)]*\)", "(NVIDIA's driver cannot be used: NVML Shared Library Not Found)", text)
    text = re.sub(r"Name or service not known|Temporary failure in name resolution|No address [^)]*", "…", text)
    return "\n".join(line for line in text.splitlines() if not re.fullmatch(r"[\s~^]+", line))


def said(mistake: Mistake) -> str:
    """Make a mistake on a command line; return what it prints."""
    program, *arguments = mistake.code.split()
    module = {"dask-agent": "agentcluster.cli.dask_agent", "agentcluster": "agentcluster.cli.main"}[program]
    environment = {**CALM_ENVIRON, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.returncode != 0, run
    return plain(run.stdout + run.stderr).replace("python -m agentcluster.cli.main", "agentcluster")


def written() -> Iterator[tuple[Mistake, list[str]]]:
    """Yield each mistake with what is printed."""
    with AgentCluster(config={"nworkers": 1, "nthreads": 1}) as cluster, Client(cluster) as client:
        kept = client.scatter(list(range(3)))
        with AgentCluster(mode="none") as closed:
            pass
        for mistake in PYTHON:
            yield mistake, list(printed(mistake, {"cluster": cluster, "closed": closed}))
        del kept
    for mistake in COMMANDS:
        yield mistake, [said(mistake)]


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for mistake, outputs in written():
        if mistake in (PYTHON[0], COMMANDS[0]):
            title = "In Python" if mistake is PYTHON[0] else "On a command line"
            parts.append(f"{title}\n{'-' * len(title)}\n")
        titles = ("In a terminal:", "In a notebook:") if len(outputs) == 2 else ("",)
        parts.append(f"{mistake.title}\n{'~' * len(mistake.title)}\n")
        if len(outputs) == 1:
            outputs = [f"$ {mistake.code}\n{outputs[0]}"]
        else:
            parts.append(f".. code-block:: python\n\n    {mistake.code}\n")
        for title, output in zip(titles, outputs, strict=True):
            block = "\n".join(f"    {line}".rstrip() for line in output.splitlines())
            parts.append(f"{title}\n\n.. code-block:: text\n\n{block}\n".lstrip())
    return "\n".join(parts)


@pytest.mark.notebook
@pytest.mark.timeout(120)
def test_the_page_shows_what_is_printed() -> None:
    shown = page()
    assert shown == PAGE.read_text()


def test_there_are_enough() -> None:
    assert len(PYTHON) >= 25


def test_each_is_short() -> None:
    blocks = re.findall(
        r"In a (terminal|notebook):\n\n\.\. code-block:: text\n\n((?:    .*\n|\n)+?)(?=\S|\Z)", PAGE.read_text()
    )
    assert len(blocks) == 2 * len(PYTHON)
    for where, block in blocks:
        lines = block.strip().splitlines()
        assert len(lines) <= MOST[where == "notebook"], block


if __name__ == "__main__":
    os.environ.update(CALM_ENVIRON)
    dask.config.refresh()
    PAGE.write_text(page())
