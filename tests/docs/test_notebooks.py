"""The notebooks: each runs from its first cell to its last in a fresh kernel, and its outputs are in the file.

``python -m tests.docs.test_notebooks [NAME ...]`` executes them and writes the outputs into the files; those that
cannot run with this Python (dask-cuda, Slurm) are left out with the reason. A name is any part of a file's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import nvml
from tests.support import slurm as one_node
from tests.support.programs import ROOT

FOLDER = ROOT / "notebooks"

GROUND, REPROVISION, GPUS, ADAPTIVE, SLURM = NAMES = (
    "1-dask-from-the-ground.ipynb",
    "2-reprovision-with-data.ipynb",
    "3-gpus-and-mixed-fleets.ipynb",
    "4-resources-and-adaptive.ipynb",
    "5-inside-slurm.ipynb",
)

#: Seconds that one cell may take, and a whole notebook.
CELL, NOTEBOOK = 90, 240

#: What is in the metadata of every notebook, whichever machine executed it.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}

#: Paths of one machine, addresses in memory, and colours of a terminal.
PRIVATE = re.compile(rf"/(?:home|root|tmp|work|opt|usr|Users)/|\bat 0x[0-9a-f]{{6,}}|\x1b\[|{re.escape(str(ROOT))}")

#: Characters that one cell may print, and that a table may have as HTML.
SHORT, SHORT_HTML = 3000, 12_000


# -- executing one -----------------------------------------------------------------------------------------------------


def execute(source: Path, target: Path, directory: Path) -> None:
    """Execute a notebook in a fresh kernel of this Python and write it, with its outputs, to `target`.

    Raises
    ------
    CellExecutionError
        With the cell and its traceback.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(KernelSpecManager):  # type: ignore[misc]
        """Knows one kernel, whatever is registered on this machine."""

        def get_kernel_spec(self, kernel_name: str) -> Any:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    class Manager(AsyncKernelManager):  # type: ignore[misc]
        """Made by the client, which then ends the kernel too."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, kernel_spec_manager=ThisPython())

    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=Manager,
        kernel_name="python3",
        timeout=CELL,
        startup_timeout=60,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.clear()
    nbformat.validate(notebook)
    target.write_text(nbformat.writes(notebook) + "\n")


def run(name: str, target: Path, directory: Path, **variables: str) -> str | None:
    """Execute a notebook in a process of its own, and nothing of it in this user's folders; return what was wrong.

    The process is for what zmq and asyncio keep open for the life of one.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_", "JUPYTER_"))}
    environ |= {"PYTHONPATH": str(ROOT), "PYDEVD_DISABLE_FILE_VALIDATION": "1", **variables}
    for key in ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        environ[key] = str(directory / key.lower())
    work = directory / "work"
    work.mkdir()
    log = directory / "output"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.docs.test_notebooks", "--one", str(FOLDER / name), str(target), str(work)],
            env=environ,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        rc = process.wait(NOTEBOOK)
    except BaseException as error:
        process.kill()  # its kernel sees that, and ends
        process.wait(10)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return f"{name} was not done after {NOTEBOOK} s\n{log.read_text()}"
    return None if rc == 0 else f"{name}:\n{log.read_text()}"


@contextmanager
def surroundings(name: str, directory: Path) -> Iterator[dict[str, str]]:
    """Have what a notebook needs around it; yield its environment variables, or skip the test with the reason."""
    for module in ("nbclient", "ipykernel"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    if name == GPUS:
        pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
        yield nvml.environ(library=nvml.build(directory / "nvml"), gpus=2)
    elif name == SLURM:
        pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
        with one_node.serve() as slurm:
            yield slurm.environ
    else:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        yield {}


# -- the tests ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(cell: Any) -> Iterator[str]:
    """Yield what a cell printed, pictures left out; nothing of it is too long."""
    for output in cell["outputs"]:
        found = {"text/plain": output["text"]} if "text" in output else output["data"]
        for kind, lines in found.items():
            if kind.startswith("text/"):
                text = "".join(lines)
                assert len(text) <= (SHORT_HTML if kind == "text/html" else SHORT), text
                yield text


def test_these_are_all() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if not path.name.startswith(".")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept(name: str) -> None:
    """Each file holds one whole run, from a fresh kernel, with nothing in it of the machine that it was run on."""
    notebook = read(FOLDER / name)
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook["metadata"] == METADATA
    assert not any(cell["metadata"] for cell in notebook["cells"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    host = socket.gethostname()
    for cell in cells:
        assert not [each for each in cell["outputs"] if each["output_type"] == "error"], cell["source"]
        for text in texts(cell):
            assert not PRIVATE.search(text), text
            assert len(host) < 4 or host not in text, text


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_for(name: str) -> None:
    first = read(FOLDER / name)["cells"][0]
    title, _, said = "".join(first["source"]).partition("\n")
    assert first["cell_type"] == "markdown"
    assert title.startswith("# ")
    assert "After this notebook you can" in said


@pytest.mark.timeout(NOTEBOOK + 60)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(GROUND, marks=pytest.mark.notebook),
        pytest.param(REPROVISION, marks=pytest.mark.notebook),
        pytest.param(GPUS, marks=pytest.mark.gpu_stub),
        pytest.param(ADAPTIVE, marks=pytest.mark.notebook),
        pytest.param(
            SLURM,
            marks=[
                pytest.mark.slurm,
                pytest.mark.skipif(bool(why := one_node.missing()), reason=f"no Slurm here: {why}"),
            ],
        ),
    ],
)
def test_it_runs(name: str, tmp_path: Path) -> None:
    target = tmp_path / "executed.ipynb"
    with surroundings(name, tmp_path) as variables:
        wrong = run(name, target, tmp_path, **variables)
    if wrong:
        pytest.fail(wrong, pytrace=False)
    kept, now = code(read(FOLDER / name)), code(read(target))
    assert [cell["id"] for cell in kept] == [cell["id"] for cell in now]
    silent = [cell["source"] for cell, new in zip(kept, now, strict=True) if new["outputs"] and not cell["outputs"]]
    assert not silent, "these cells print, and the file does not have what"


# -- from the command line ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute notebooks in place."""
    parser = argparse.ArgumentParser(description="Execute the notebooks and keep their outputs in the files.")
    parser.add_argument("names", nargs="*", help="parts of file names; default is all")
    parser.add_argument("--one", nargs=3, metavar=("SOURCE", "TARGET", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return _one(*map(Path, options.one))
    failed = 0
    for name in NAMES:
        if options.names and not any(each in name for each in options.names):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="agentcluster-notebook-") as folder:
            directory = Path(folder)
            target = directory / "executed.ipynb"
            try:
                if name == SLURM and (why := one_node.missing()):
                    pytest.skip(f"no Slurm here: {why}")
                with surroundings(name, directory) as variables:
                    wrong = run(name, target, directory, **variables)
            except pytest.skip.Exception as skipped:
                print(f"{name}: left out, {skipped}", flush=True)
                continue
            if wrong is None:
                (FOLDER / name).write_text(target.read_text())
            failed += wrong is not None
            print(wrong or f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    return 1 if failed else 0


def _one(source: Path, target: Path, directory: Path) -> int:
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        execute(source, target, directory)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
