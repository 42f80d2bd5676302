"""The options of ``dask cuda worker`` on the command line of dask-agent, where they cannot be taken."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support.programs import AGENT, ROOT

NOWHERE = "tcp://127.0.0.1:1"

#: dask-agent where dask-cuda is not installed, or cannot be imported.
WITHOUT = "import sys; sys.modules['dask_cuda'] = None; from agentcluster.cli.dask_agent import main; main()"
BROKEN = """
import sys, types
sys.modules["dask_cuda.cli"] = None
from agentcluster.cli.dask_agent import main
main()
"""
#: dask-agent, which says at the end whether dask-cuda was imported.
TELLING = """
import atexit, sys
atexit.register(lambda: print("imported" if "dask_cuda" in sys.modules else "not imported"))
from agentcluster.cli.dask_agent import main
main()
"""

needs_dask_cuda = pytest.mark.skipif(importlib.util.find_spec("dask_cuda") is None, reason="dask-cuda is not installed")


def run(*arguments: str) -> tuple[int, str]:
    """Run Python with arguments; return the exit code and all it said."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("DASK_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=50, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr


def refused(*arguments: str) -> str:
    """Return the one sentence by which a command line is refused."""
    code, said = run(*arguments)
    assert code == 2, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize("mode", [["--mode", "auto-gpu"], ["--mode=auto-gpu"]], ids=" ".join)
def test_without_dask_cuda_it_says_so(mode: list[str]) -> None:
    said = refused("-c", WITHOUT, NOWHERE, *mode, "--rmm-pool-size", "1GB")
    assert "--rmm-pool-size" in said
    assert "dask-cuda is not installed here" in said
    assert 'pip install "agentcluster[gpu-cu13]"' in said


def test_without_dask_cuda_another_mode_has_no_such_option() -> None:
    said = refused("-c", WITHOUT, NOWHERE, "--rmm-pool-size", "1GB")
    assert "No such option" in said
    assert "--rmm-pool-size" in said
    assert "dask-cuda" not in said


def test_without_dask_cuda_the_help_is_there() -> None:
    code, said = run("-c", WITHOUT, "--mode", "auto-gpu", "--help")
    assert code == 0
    assert "--nthreads" in said
    assert "--rmm-pool-size" not in said


@needs_dask_cuda
@pytest.mark.gpu_stub
def test_a_dask_cuda_that_cannot_be_imported_is_named() -> None:
    said = refused("-c", BROKEN, NOWHERE, "--mode", "auto-gpu", "--rmm-pool-size", "1GB")
    assert "dask-cuda cannot be imported here: ModuleNotFoundError" in said


@needs_dask_cuda
@pytest.mark.gpu_stub
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rmm-pool-size", "1GB"], ["--rmm-pool-size is", "no --mode was given", "give --mode auto-gpu"]),
        (["--mode", "auto-cpu", "--pre-import", "json"], ["--pre-import is", "--mode 'auto-cpu' was given"]),
        (["--mode", "none", "--device-memory-limit=1"], ["--device-memory-limit is", "--mode 'none' was given"]),
        (["--mode", "mixed", "--disable-infiniband"], ["--disable-infiniband", '{"gpu": {"enable_infiniband": …}}']),
        (["--mode", "auto", "--cudf-spill-stats", "1"], ["--cudf-spill-stats", '{"gpu": {"cudf_spill_stats": …}}']),
        (["--spec", "{}", "--rmm-async"], ["--rmm-async", "no --mode was given"]),
        (["--mode", "auto-gpu", "--multiprocessing-method", "thread"], ["--multiprocessing-method", "'thread'"]),
        (["--mode", "auto-gpu", "--set-rmm-allocator-for-libs", "numpy"], ["invalid choice(s): numpy"]),
        (["--mode", "auto-gpu", "--rmm-pool"], ["No such option", "--rmm-pool-size"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_refused_by_name(arguments: list[str], words: list[str]) -> None:
    said = refused(*AGENT, NOWHERE, *arguments)
    for word in words:
        assert word in said


@needs_dask_cuda
@pytest.mark.gpu_stub
def test_standby_takes_none() -> None:
    assert "--rmm-async" in refused(*AGENT, "--standby", "--rmm-async")
    code, said = run(*AGENT, "--standby", "--mode", "auto-gpu", "--rmm-async")
    assert code != 0
    assert "--mode cannot be given with --standby" in said


@needs_dask_cuda
@pytest.mark.gpu_stub
@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        (["--help"], False),
        (["--mode", "auto-cpu", "--help"], False),
        (["--mode", "auto-gpu", "--help"], True),
        (["--version"], False),
        ([NOWHERE, "--nthreads", "none"], False),
        ([NOWHERE, "--name", "a", "--preload", "json", "--", "--rmm-async"], False),
        ([NOWHERE, "--rmm-async"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_dask_cuda_is_imported_only_for_its_options(arguments: list[str], imported: bool) -> None:
    _, said = run("-c", TELLING, *arguments)
    assert ("not imported" in said) is not imported
    assert ("imported" in said.split()) is True


@needs_dask_cuda
@pytest.mark.gpu_stub
def test_the_help_of_the_mode_has_all_of_them() -> None:
    from dask_cuda.cli import worker

    _, plain = run(*AGENT, "--help")
    _, said = run(*AGENT, "--mode", "auto-gpu", "--help")
    for parameter in worker.params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert flag in said or not flag.startswith("-")
    assert "--rmm-pool-size" not in plain
