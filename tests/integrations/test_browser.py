"""What people see: the panel in JupyterLab, dask's sidebar there, and the dashboard, in a headless Chromium."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client

from agentcluster import AgentCluster, Host

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

for needed in ("selenium", "jupyterlab", "dask_labextension", "ipywidgets", "bokeh"):
    pytest.importorskip(needed, reason=f"{needed} is not installed (extra 'browser')")
if not shutil.which("chromedriver"):
    pytest.skip("Chromium's driver is not installed (Debian's chromium-driver)", allow_module_level=True)


from selenium.webdriver.common.keys import Keys  # noqa: E402

from tests.support.browser import chromium, jupyterlab  # noqa: E402

SMALL = {"nworkers": 2, "nthreads": 1, "memory_limit": "512MiB"}

CELLS = (
    "from agentcluster import AgentCluster, Host\n"
    "from dask.distributed import Client\n\n"
    "hosts = [Host('local', name=name) for name in ('box-1', 'box-2')]\n"
    "cluster = AgentCluster(hosts=hosts, config={'nworkers': 2, 'memory_limit': '512 MiB'},\n"
    "                       scheduler_options={'dashboard_address': ':0'})\n"
    "client = Client(cluster)\n"
    "data = client.scatter([bytes(2**20)] * 100, hash=False)",
    "cluster",
    "print('still', len(client.gather(data)), 'keys')",
)

FACTORY = {
    "DASK_LABEXTENSION__FACTORY__MODULE": "agentcluster",
    "DASK_LABEXTENSION__FACTORY__CLASS": "AgentCluster",
    "DASK_LABEXTENSION__FACTORY__KWARGS": json.dumps(
        {"config": SMALL, "scheduler_options": {"dashboard_address": ":0"}}
    ),
}

PANEL = ".agentcluster-panel"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_panel(tmp_path: Path, theme: str) -> None:
    with (
        jupyterlab(tmp_path / "lab", theme=f"JupyterLab {theme.title()}", notebook=CELLS) as lab,
        chromium(tmp_path, (1400, 1000)) as browser,
    ):
        lab.open(browser, "n.ipynb")
        lab.run_all(browser)
        browser.find(f"{PANEL} table", r"box-1.*auto-cpu.*2 x 1 thread, 512.00 MiB")
        browser.find(f"{PANEL} select option", "uniform").click()
        browser.find(f"{PANEL} input[placeholder*=nthreads]").send_keys('{"nthreads": 2, "memory_limit": "1 GiB"}')
        browser.press(f"{PANEL} button", "Dry run")
        browser.find(f"{PANEL} p", "planned only, nothing was changed")
        browser.press(f"{PANEL} button", "Reprovision")
        browser.find(f"{PANEL} p", "uniform: 2 nodes, 100 keys .* moved")
        browser.find(f"{PANEL} table", r"box-1.*uniform.*1 x 2 threads, 1.00 GiB")
        browser.picture(f"panel-{theme}", PANEL)
        browser.press(f"{PANEL} .lm-TabBar-tab", "Logs")
        browser.press(f"{PANEL} button", "Show")
        browser.find(f"{PANEL} pre", "box-1")
        browser.press(f"{PANEL} .lm-TabBar-tab", "Scale")
        browser.find(f"{PANEL} input[type=text]").send_keys("3")
        browser.press(f"{PANEL} button", "^Scale$")
        browser.find(f"{PANEL} p", r"scale\(3\): \d workers")
        browser.find(".jp-OutputArea-output", "still 100 keys")


def test_dask_s_sidebar(tmp_path: Path) -> None:
    with jupyterlab(tmp_path / "lab", env=FACTORY) as lab, chromium(tmp_path, (1280, 1500)) as browser:
        lab.open(browser)
        browser.press("li.lm-TabBar-tab[data-id='dask-dashboard-launcher']")
        browser.press("jp-button[data-command='dask:launch-cluster']")
        item = ".dask-ClusterListingItem"
        browser.find(item, "AgentCluster 1(.|\n)*Number of Workers: 2")
        browser.press(".dask-DashboardListing-item button", "^NODES$")
        with browser.frame("iframe"):
            browser.wait(DRAWN, "Workers by kind")
        browser.picture("sidebar")

        def rescale(*fields: tuple[str, str], adaptive: bool = False) -> None:
            browser.press(f"{item} button", "SCALE")
            if adaptive:
                browser.press(".jp-Dialog input[type=checkbox]")
            for label, value in fields:
                section = "//*[contains(@class, 'dask-ScalingSection-item')][*[text()='{}']]/input"
                field = browser.driver.find_element("xpath", section.format(label))
                field.send_keys(Keys.CONTROL, "a", Keys.NULL, value)
            browser.press(".jp-Dialog button.jp-mod-accept")

        rescale(("Workers", "1"))
        browser.find(item, "Number of Workers: 1\n")
        rescale(("Minimum workers", "1"), ("Maximum workers", "2"), adaptive=True)
        browser.find(item, "Minimum Workers: 1\nMaximum Workers: 2")
        everything = psutil.Process().children(recursive=True)
        agents = [each for each in everything if "agentcluster.cli" in _command(each)]
        assert agents
        workers = [child for agent in agents for child in agent.children(recursive=True)]
        assert workers
        browser.press(f"{item} button", "SHUTDOWN")
        browser.wait(f"return document.querySelector('{item}') === null")
        _, left = psutil.wait_procs([*agents, *workers], timeout=20)
        assert [_command(each) for each in left] == []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_the_nodes_page(tmp_path: Path) -> None:
    hosts = [Host("local", name=f"box-{number}") for number in (1, 2, 3)]
    options = {"dashboard_address": "127.0.0.1:0"}
    with (
        AgentCluster(hosts=hosts, config=SMALL, scheduler_options=options) as cluster,
        Client(cluster) as client,
        chromium(tmp_path) as browser,
    ):
        browser.driver.get(cluster.dashboard_link)
        browser.press("a", "^Nodes$")
        browser.wait(DRAWN, "Workers by kind")
        kept = client.scatter(list(range(100)), hash=False)
        cluster.reprovision("uniform", {"nthreads": 1, "memory_limit": "300MiB"}, max_parallel=1)
        browser.wait(f"{SOURCES}.some(data => data.rollout?.includes('uniform') && data.step.includes('retire'))")
        browser.wait(f"{SOURCES}.some(data => data.mode?.every(mode => mode === 'uniform'))")
        cluster.scale(1)
        adaptive = cluster.adapt(minimum=1, maximum=5, interval="500ms", target_duration="1s")
        client.gather(client.map(time.sleep, [0.25] * 24, pure=False))
        browser.wait(f"{SOURCES}.some(data => data.decided?.some(each => each.includes(': +')))")
        browser.wait(f"{SOURCES}.some(data => data.decided?.some(each => each.includes(': -')))")
        browser.picture("nodes-page")
        adaptive.stop()
        assert client.gather(kept) == list(range(100))
        for plot in ("individual-nodes", "individual-rollouts", "individual-adaptive"):
            browser.driver.get(cluster.dashboard_link.replace("status", plot))
            browser.wait("return Bokeh.documents[0]?.is_idle && document.querySelector('.bk-Column') !== null")
        severe = [each for each in browser.driver.get_log("browser") if each["level"] == "SEVERE"]
        assert severe == []


#: JavaScript: the data that a page of bokeh's draws from, and whether it has drawn a plot of that title.
SOURCES = (
    "return Bokeh.documents.flatMap(each => [...each._all_models.values()])"
    ".filter(each => each.type === 'ColumnDataSource').map(each => each.data)"
)
DRAWN = (
    "return Bokeh.documents[0]?.is_idle &&"
    " [...Bokeh.documents[0]._all_models.values()].some(each => each.type === 'Title' && each.text === arguments[0])"
)
