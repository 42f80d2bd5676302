"""The documentation is true: its code runs as it stands there; its examples, figures and reference are whole.

A block of code in :data:`PAGES` is run by a test, or is named in :data:`NOT_RUN` with the reason: there is no third
way.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dask
import pytest
from distributed import Client

import agentcluster
from agentcluster import AgentCluster, PreflightError, errors
from agentcluster.config import Config
from agentcluster.launch import launchers_for
from tests.support import nvml
from tests.support.documents import ROOT, Block, blocks, shape
from tests.support.forked import ForkedHosts, ForkedLauncher
from tests.support.programs import AGENT, CALM_ENVIRON, Start
from tests.support.waiting import wait_blocking, wait_until
from tests.support.zygote import Zygote

README, QUICKSTART, TUTORIAL, HOWTO = "README.rst", "docs/quickstart.rst", "docs/tutorial.rst", "docs/howto.rst"
PAGES = (README, QUICKSTART, "docs/index.rst", TUTORIAL, HOWTO)

#: Page and first line of a block -> why it is not run here.
NOT_RUN = {
    (README, "python -m pip install . && agentcluster demo"): "a new environment each: .ci/run, step demo",
    (README, 'python -m pip install -e ".[test]" && python -m pytest'): "this very suite; .ci/run, step tests",
    (QUICKSTART, "from agentcluster import AgentCluster, Host"): "other machines: test_cluster_ssh.py",
    ("docs/index.rst", 'with AgentCluster(hosts=["gpu-1", "gpu-2"]) as cluster, Client(cluster) as client:'): (
        "other machines with GPUs: test_cluster_ssh.py, test_gpu_swap.py"
    ),
    (TUTORIAL, "$ python3 -m venv env"): "a new environment: .ci/run, step demo, installs likewise",
    (HOWTO, 'cluster.reprovision("auto-gpu")'): "GPUs: test_quickstart.py has them there and back",
    (HOWTO, 'cluster.adapt(minimum=1, modes=["auto-cpu", "auto-gpu"], gpu=(0, 2))'): (
        "GPUs: test_a_day in test_examples.py"
    ),
    (HOWTO, "$ curl -s http://localhost:8787/metrics | grep ^dask_agentcluster"): "test_metrics.py reads that page",
    (HOWTO, "scrape_configs:  # in prometheus.yml"): "a file of Prometheus",
    (HOWTO, "$ agentcluster credentials secrets"): "it keeps no file: test_credentials.py, test_what_it_writes",
    (HOWTO, "$ dask-agent --standby --listen-address tls://:8790 --credentials /etc/dask/secrets"): (
        "other machines: test_credentials.py, test_standby_cluster_and_client"
    ),
    (HOWTO, 'hosts = ["tls://10.0.0.5:8790", "tls://10.0.0.6:8790", "tls://10.0.0.7:8790"]'): (
        "other machines: test_credentials.py, test_standby_cluster_and_client"
    ),
    (HOWTO, "from agentcluster.security import credentials"): (
        "other machines: test_credentials.py, test_standby_cluster_and_client"
    ),
    (HOWTO, 'cluster = AgentCluster(hosts="hosts.yaml")'): "other machines: test_inventory.py",
}  # fmt: skip

#: Page and first line of a block -> the test here that runs it; what else a page of :data:`TALKS` has, its talk runs.
RUN = {
    (README, "import dask.array as da"): "test_the_quickstart_prints_what_the_page_shows",
    (README, "node   state  mode      workers                  cores  memory     GPUs"): (
        "test_the_quickstart_prints_what_the_page_shows"
    ),
    (README, "dask scheduler"): "test_a_scheduler_an_agent_and_a_client",
    (README, 'client = await Client("tcp://localhost:8786", asynchronous=True)'): (
        "test_a_scheduler_an_agent_and_a_client"
    ),
    (QUICKSTART, "import dask.array as da"): "test_the_quickstart_prints_what_the_page_shows",
    (QUICKSTART, "node   state  mode      workers                  cores  memory     GPUs"): (
        "test_the_quickstart_prints_what_the_page_shows"
    ),
    (QUICKSTART, "dask-agent --standby --listen-address tcp://127.0.0.1:8790"): "test_an_agent_in_standby_is_adopted",
    (QUICKSTART, "dask scheduler"): "test_a_scheduler_an_agent_and_a_client",
    (QUICKSTART, "dask-agent tcp://localhost:8786"): "test_a_scheduler_an_agent_and_a_client",
    (QUICKSTART, 'client = await Client("tcp://localhost:8786", asynchronous=True)'): (
        "test_a_scheduler_an_agent_and_a_client"
    ),
    (HOWTO, 'cluster.reprovision("uniform", {"nthreads": 2, "nworkers": 1}, max_parallel=1)'): "test_pause_and_undo",
    (HOWTO, 'client.sync(client.scheduler.control_rollout, action="pause")  # no further node is begun'): (
        "test_pause_and_undo"
    ),
    (HOWTO, "cluster.rollout.undo()"): "test_pause_and_undo",
    (HOWTO, "defaults:  # hosts.yaml"): "test_the_inventory",
}

#: Page -> what its prompt has before the first line.
TALKS = {
    TUTORIAL: "",
    HOWTO: """
from agentcluster import AgentCluster, Host
from dask.distributed import Client

cluster = AgentCluster(
    hosts=[Host("local", name=f"node-{number}") for number in (1, 2, 3)],
    config={"nworkers": 1, "nthreads": 1, "memory_limit": "600 MiB"},
    scheduler_options={"port": 8786},
)
client = Client(cluster)
parts = client.scatter(list(range(20)), hash=False)
merge = sum
""",
}

#: The programs of the pages -> how this Python runs them.
PROGRAMS = {
    "agentcluster": ("-m", "agentcluster.cli.main"),
    "dask": ("-m", "dask"),
    "dask-agent": AGENT,
}

two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="the pages' machine has two cores"
)


def run_by(test: str, page: str) -> list[Block]:
    """Return the blocks of a page that :data:`RUN` has as run by a test."""
    return [block for block in blocks(page) if RUN.get((page, block.first)) == test]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def environment(directory: Path) -> dict[str, str]:
    """Return the environment of somebody who has installed the package and types the pages' programs."""
    for name, arguments in PROGRAMS.items():
        path = directory / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(arguments)} "$@"\n')
        path.chmod(0o755)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_"))}
    return environ | {
        **CALM_ENVIRON,
        "PATH": f"{directory}:{environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DASK_DISTRIBUTED__SCHEDULER__DASHBOARD__ENABLED": "False",
        "DASK_DISTRIBUTED__ADAPTIVE__INTERVAL": "300ms",  # the page waits a second between two looks
    }


def run_python(directory: Path, *arguments: str) -> str:
    """Run Python to its end, and return what it printed."""
    with open(directory / "stderr", "w") as stderr:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=directory,
            env=environment(directory),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=55,
        )
    assert done.returncode == 0, f"{done.stdout}\n{(directory / 'stderr').read_text()[-6000:]}"
    return done.stdout


def printed_on_two_cores(script: str, directory: Path, _known: dict[str, str] = {}) -> str:  # noqa: B006
    """Return what a script prints on as many cores as the machine of the pages; the same script runs once."""
    if script not in _known:
        program = directory / "script.py"
        program.write_text(script)
        pinned = "import os, runpy; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])"
        run = f"{pinned}; runpy.run_path({str(program)!r}, run_name='__main__')"
        _known[script] = run_python(directory, "-c", run)
    return _known[script]


def test_each_block_is_run_or_named() -> None:
    found = [(block.page, block.first) for page in PAGES for block in blocks(page)]
    assert len(set(found)) == len(found), "two blocks of a page begin alike"
    assert not set(RUN) & set(NOT_RUN)
    assert set(RUN) | set(NOT_RUN) <= set(found)
    assert {key for key in found if key[0] not in TALKS} <= set(RUN) | set(NOT_RUN)
    assert all(callable(globals()[name]) for name in RUN.values())


@pytest.mark.notebook
@two_cores
@pytest.mark.parametrize("page", list(TALKS))
def test_a_talk(page: str, tmp_path: Path) -> None:
    """What a page has a prompt and a terminal say is what they say, in the order of the page."""
    skip = [first for where, first in (*RUN, *NOT_RUN) if where == page]
    told = {"skip": skip, "replaced": {"8786": str(free_port())}, "before": TALKS[page]}
    told["before"] = told["before"].replace("8786", told["replaced"]["8786"])
    wrong = run_python(tmp_path, "-m", "tests.support.documents", page, json.dumps(told))
    assert not wrong.strip()


@two_cores
@pytest.mark.parametrize("page", [README, QUICKSTART])
def test_the_quickstart_prints_what_the_page_shows(page: str, tmp_path: Path) -> None:
    script, shown = run_by("test_the_quickstart_prints_what_the_page_shows", page)
    said = printed_on_two_cores(script.text, tmp_path)
    assert shape(said) == shape(shown.text)


@two_cores
@pytest.mark.parametrize("page", [README, QUICKSTART])
async def test_a_scheduler_an_agent_and_a_client(
    page: str, start: Start, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the page has people type in two terminals, and then in a client, on a port that is free."""
    *terminals, asked = run_by("test_a_scheduler_an_agent_and_a_client", page)
    port, gpus = free_port(), has("dask_cuda")
    environ = {"DASK_DISTRIBUTED__SCHEDULER__DASHBOARD__ENABLED": "False", "CUDA_VISIBLE_DEVICES": ""}
    if gpus:
        environ = {**environ, **nvml.environ(library=nvml.build(tmp_path_factory.getbasetemp() / "nvml"))}
        del environ["CUDA_VISIBLE_DEVICES"]
    lines = [shlex.split(line.replace("8786", str(port))) for block in terminals for line in block.text.splitlines()]
    assert [line[0] for line in lines] == ["dask", "dask-agent"]
    for program, *arguments in lines:
        # The default of `dask scheduler` is the port of the page.
        started = start(
            *PROGRAMS[program], *arguments, *(("--port", str(port)) if program == "dask" else ()), env=environ
        )

    names: dict[str, Any] = {"Client": Client}
    async with Client(f"tcp://localhost:{port}", asynchronous=True, timeout=20) as looking:

        async def ready() -> Any:
            assert started.popen.poll() is None, started.output()
            found = await looking.scheduler.get_nodes() or {}
            return [node for node in found.values() if node["state"] == "ready"]

        await wait_until(ready, 20)
        code = compile(asked.text.replace("8786", str(port)), page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        try:
            if "auto-gpu" in asked.text and not gpus:
                with pytest.raises(
                    PreflightError, match=r"cannot reprovision to 'auto-gpu', nothing was changed: .*GPU"
                ):
                    await eval(code, names)
            else:
                await eval(code, names)
            (node,) = (await looking.scheduler.get_nodes()).values()
            assert node["state"] == "ready"
            wanted = "auto-gpu" if gpus else "auto-cpu"
            assert node["mode"] == (wanted if page == README else "spec")
        finally:
            await names["client"].close()


async def test_an_agent_in_standby_is_adopted(start: Start) -> None:
    (typed,) = run_by("test_an_agent_in_standby_is_adopted", QUICKSTART)
    page = (ROOT / QUICKSTART).read_text()
    assert '``AgentCluster(hosts=["tcp://127.0.0.1:8790"])`` of the same user adopts it.' in page
    port = free_port()
    program, *arguments = shlex.split(typed.text.replace("8790", str(port)))
    agent = start(*PROGRAMS[program], *arguments)
    await agent.says("Standing by at", 20)
    async with AgentCluster(
        hosts=[f"tcp://127.0.0.1:{port}"],
        scheduler_options={"dashboard_address": ":0"},
        config={"nworkers": 1, "nthreads": 1},
        asynchronous=True,
    ) as cluster:
        assert [node["state"] for node in cluster.nodes.values()] == ["ready"]


def test_pause_and_undo(tmp_path: Path, zygote: Zygote) -> None:
    """The how-to's three blocks, the first in one client while the second is in another."""
    here = run_by("test_pause_and_undo", HOWTO)
    change, steer, undo = (compile(block.text, HOWTO, "exec") for block in here)
    options = {"scheduler_options": {"dashboard_address": ":0"}, "config": {"nworkers": 1, "memory_limit": "600 MiB"}}
    hosts = [ForkedLauncher(f"node-{number}", zygote) for number in (1, 2)]
    go = tmp_path / "go"

    def until_told(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.02)

    with AgentCluster(hosts=hosts, **options) as cluster, Client(cluster) as client:
        before = {name: list(node["plan"].values()) for name, node in cluster.nodes.items()}
        names = {"cluster": cluster, "client": client}
        workers = [list(node["plan"]) for node in cluster.nodes.values()]
        tasks = [client.submit(until_told, str(go), workers=names_of, pure=False) for names_of in workers]
        wait_blocking(lambda: len(client.processing()) and all(client.processing().values()))
        other = threading.Thread(target=exec, args=(change, names))
        other.start()
        try:
            wait_blocking(cluster.rollout_status)
            exec(steer, names)  # it waits for the task of the first node, and would not be done otherwise
        finally:
            go.touch()
            other.join(20)
        client.gather(tasks)
        assert {node["mode"] for node in cluster.nodes.values()} == {"uniform"}
        exec(undo, names)
        assert {name: list(node["plan"].values()) for name, node in cluster.nodes.items()} == before


def test_the_inventory(tmp_path: Path) -> None:
    file = tmp_path / "hosts.yaml"
    (inventory,) = run_by("test_the_inventory", HOWTO)
    file.write_text(inventory.text)
    launchers = launchers_for(str(file))
    assert [launcher.name for launcher in launchers] == ["login", "gpu-1", "gpu-2", "gpu-3", "gpu-4"]


def test_the_examples_of_docstrings(forked: ForkedHosts) -> None:
    """Each runs; those that speak of `cluster` and `client` have a cluster of one local agent."""
    names = [each.name for each in pkgutil.walk_packages(agentcluster.__path__, "agentcluster.")]
    lacking = tuple(name for name, package in NEEDS.items() if not has(package))
    modules = [agentcluster, *(importlib.import_module(name) for name in names if not name.startswith(lacking))]
    finder = doctest.DocTestFinder(exclude_empty=True)
    options = {"scheduler_options": {"dashboard_address": ":0"}, "config": {"nworkers": 2, "nthreads": 1}}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    said: list[str] = []
    no_dashboard = dask.config.set({"distributed.scheduler.dashboard.enabled": False})
    with no_dashboard, AgentCluster(forked(), **options) as cluster, Client(cluster) as client:
        for module in modules:
            for test in finder.find(module, extraglobs={"cluster": cluster, "client": client}):
                runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 20


#: Module -> the package that it needs, of an extra that need not be installed; the suite runs with and without.
NEEDS = {"agentcluster.client.widget": "ipywidgets", "agentcluster.scheduler.dashboard": "bokeh"}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def test_no_example_of_a_docstring_is_skipped() -> None:
    for path in Path(agentcluster.__file__).parent.rglob("*.py"):
        assert "doctest: +SKIP" not in path.read_text(), path


def test_the_figures() -> None:
    """Each that is there is on a page, with words for those who do not see it, and has a ground of its own."""
    page = (ROOT / "docs" / "concepts.rst").read_text()
    shown = dict(re.findall(r"^\.\. image:: images/(concept-\S+)\n   :alt: (\S.*)$", page, flags=re.MULTILINE))
    figures = sorted((ROOT / "docs" / "images").glob("concept-*.svg"))
    assert {figure.name for figure in figures} == set(shown)
    for figure in figures:
        root = ElementTree.parse(figure).getroot()
        width, height = root.attrib["width"], root.attrib["height"]
        assert root.attrib["viewBox"] == f"0 0 {width} {height}"
        ground = root.find("{http://www.w3.org/2000/svg}rect")
        assert ground is not None
        assert (ground.attrib["class"], ground.attrib["width"], ground.attrib["height"]) == ("page", width, height)


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.rst").read_text()
    directives = set(re.findall(r"^\.\. auto\w+:: (\S+)$", page, flags=re.MULTILINE))
    wanted = set(agentcluster.__all__) - set(errors.__all__) - {"__version__"}
    assert {f"agentcluster.{name}" for name in wanted} <= directives
    assert "agentcluster.errors" in directives
    documented = set(re.findall(r"\w+", page.partition("autoclass:: agentcluster.AgentCluster")[2].partition("..")[0]))
    own = {name for base in AgentCluster.__mro__ if base.__module__.startswith("agentcluster.") for name in vars(base)}
    # What Adaptive and dask call, and what dask's own page has.
    dasks = {"scheduler_comm", "workers", "worker_spec", "scheduler", "status", "scale_down"}
    assert {name for name in own if not name.startswith("_")} - documented - dasks == set()


def test_the_configuration_has_every_option() -> None:
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    parts = conf.configuration().split(".. confval:: agentcluster.")[1:]
    found = {part.partition("\n")[0].replace(".", "_").replace("-", "_"): part for part in parts}
    assert set(found) == {field.name for field in dataclasses.fields(Config)}
    for name, part in found.items():
        assert ":type: " in part
        assert ":default: ``" in part
        assert re.search(r"^   [A-Z].*\.$", part, flags=re.MULTILINE), part
        assert f"``DASK_AGENTCLUSTER__{name.upper()}``".replace("_", "") in part.replace("_", "")
