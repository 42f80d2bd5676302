"""dask-cuda's own tests of ``dask cuda worker``, which its wheel brings, with that command and with dask-agent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import nvml
from tests.support.programs import ROOT

pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")

pytestmark = pytest.mark.gpu_stub

TESTS = "dask_cuda.tests.test_dask_cuda_worker"

#: Tests that dask-agent fails on purpose: what it does otherwise is in docs/deploy/worker.rst.
OTHERWISE = {"test_unknown_argument"}

#: Needs an address that does not answer, and waits for it.
LEFT_OUT = "test_worker_timeout"

#: The first of them has nine.
GPUS = 9


def outcomes(library: Path, directory: Path, *, ours: bool) -> dict[str, str]:
    """Run the tests; return what came of each."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("DASK_", "CUDA_", "PYTEST_"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ |= nvml.environ(library=library, gpus=GPUS) | {"PYTHONPATH": str(ROOT), "PATH": programs}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--pyargs", TESTS, "-k", f"not {LEFT_OUT}"]
    command += [word for plugin in ("cacheprovider", "xdist", "asyncio") for word in ("-p", f"no:{plugin}")]
    if ours:
        command += ["-p", "tests.support.in_place_of"]
        environ["AGENTCLUSTER_IN_PLACE_OF"] = json.dumps([["cuda", "worker"], ["agent", "--mode", "auto-gpu"]])
    run = subprocess.run(command, env=environ, cwd=directory, capture_output=True, text=True, timeout=200, check=False)
    found = re.findall(r"^(PASSED|FAILED|ERROR|XPASS|XFAIL) \S*::(\S+)", run.stdout, flags=re.MULTILINE)
    assert found, run.stdout + run.stderr
    return {name: outcome for outcome, name in found}


@pytest.mark.timeout(450)
def test_what_passes_there_passes_here(library: Path, tmp_path: Path) -> None:
    # one after the other: they use the same ports
    theirs, ours = (outcomes(library, tmp_path, ours=each) for each in (False, True))
    assert ours.keys() == theirs.keys()
    passed = {name for name, outcome in theirs.items() if outcome in ("PASSED", "XPASS")}
    assert len(passed) >= 7
    assert {name for name in passed if ours[name] not in ("PASSED", "XPASS")} == OTHERWISE
