"""JupyterLab and a headless Chromium for tests: pages as a person sees them, pressed as a person presses.

JupyterLab has settings, kernels and a port of its own, below a temporary folder; Chromium and its driver are
Debian's packages. Pictures go to the folder that ``AGENTCLUSTER_SCREENSHOTS`` names, or else the test's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import psutil
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.support.waiting import wait_blocking

#: Seconds in which something is to appear on a page.
PATIENCE = 60

#: Chromium as root, without the services that it would look for in the network.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


class Browser:
    """A browser with one page."""

    def __init__(self, driver: Any, pictures: Path) -> None:
        self.driver = driver
        self._pictures = pictures

    def script(self, text: str, *arguments: Any) -> Any:
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(text, *arguments)

    def wait(self, text: str, *arguments: Any, timeout: float = PATIENCE) -> Any:
        """Return what JavaScript returns once that is true."""
        return wait_blocking(lambda: self.script(text, *arguments), timeout)

    def find(self, css: str, text: str = "", timeout: float = PATIENCE) -> Any:
        """Return the first shown element that a selector fits and that has a text, once there is one."""

        def look() -> Any:
            try:
                found = self.driver.find_elements(By.CSS_SELECTOR, css)
                return next((each for each in found if each.is_displayed() and re.search(text, each.text)), None)
            except StaleElementReferenceException:
                return None

        return wait_blocking(look, timeout)

    def press(self, css: str, text: str = "") -> None:
        """Click on it."""
        self.find(css, text).click()

    @contextmanager
    def frame(self, css: str) -> Iterator[None]:
        """Look into a page within the page."""
        self.driver.switch_to.frame(self.find(css))
        try:
            yield
        finally:
            self.driver.switch_to.default_content()

    def picture(self, name: str, css: str | None = None) -> Path:
        """Keep what is seen, or only an element, as a PNG."""
        path = self._pictures / f"{name}.png"
        if css is None:
            self.driver.save_screenshot(str(path))
        else:
            self.find(css).screenshot(str(path))
        return path


@contextmanager
def chromium(folder: Path, size: tuple[int, int] = (1280, 900)) -> Iterator[Browser]:
    """Run a browser, with a new profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    pictures = Path(os.environ.get("AGENTCLUSTER_SCREENSHOTS") or folder / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.set_script_timeout(PATIENCE)
        browser = Browser(driver, pictures)
        yield browser
    except BaseException:
        browser.picture("when-it-failed")
        raise
    finally:
        driver.quit()


class Lab:
    """A JupyterLab that runs."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token = address, token

    def open(self, browser: Browser, page: str = "") -> None:
        """Show it, with a notebook where one is named."""
        browser.driver.get(f"{self.address}lab{page and '/tree/'}{page}?token={self.token}")
        browser.wait("return window.jupyterapp !== undefined && document.querySelector('#jp-main-dock-panel') !== null")

    def run_all(self, browser: Browser) -> None:
        """Run all cells of the notebook that is shown."""
        browser.wait("return jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        browser.wait("return jupyterapp.commands.isEnabled('notebook:run-all-cells')")
        browser.script("jupyterapp.commands.execute('notebook:run-all-cells')")


@contextmanager
def jupyterlab(
    folder: Path, *, theme: str = "JupyterLab Light", notebook: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Lab]:
    """Run JupyterLab, with a notebook ``n.ipynb`` that has the given cells."""
    settings, work, runtime = (
        folder / "settings" / "@jupyterlab" / "apputils-extension",
        folder / "work",
        folder / "run",
    )
    for each in (settings, work, runtime):
        each.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in notebook])
    page.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(page, work / "n.ipynb")
    token = os.urandom(16).hex()
    own = {
        **{"HOME": str(folder), "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_TOKEN": token},
        **{"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")},
        **{"JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")},
        **{"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")},
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={work}", "--expose-app-in-browser"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **own, **(env or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def found() -> str | None:
        """Return what the server says of itself, once it has written it whole."""
        assert server.poll() is None, (folder / "log").read_text()
        text = next((file.read_text() for file in runtime.glob("jpserver-*.json")), "")
        return text if text.rstrip().endswith("}") else None

    try:
        yield Lab(json.loads(wait_blocking(found, PATIENCE))["url"], token)
    finally:
        tree = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        try:
            server.wait(PATIENCE)
        finally:
            server.kill()
            for process in psutil.wait_procs(tree, timeout=10)[1]:
                process.kill()
